"""A server that answers as the Hugging Face hub does, with one model whose files lie in a folder."""

import hashlib
import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    def __init__(self, model: str, folder: Path, asked: list[str], *args):
        self.model, self.folder, self.asked = model, folder, asked
        super().__init__(*args)

    def names(self) -> list[str]:
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{self.model}/tree/"):
            files = [
                {"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": "0"} for n in self.names()
            ]
            return self.answer(json.dumps(files).encode(), Content_Type="application/json")
        if path.startswith(f"/api/models/{self.model}"):
            facts = {"id": self.model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.names()]}
            return self.answer(json.dumps(facts).encode(), Content_Type="application/json")
        name = path.removeprefix(f"/{self.model}/resolve/{COMMIT}/")
        if name not in self.names():
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        if self.command == "GET":
            self.asked.append(name)
        content = (self.folder / name).read_bytes()
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        """The tests look at `asked`."""


@contextmanager
def hub(model: str, folder: Path):
    """Its address, and the names of the files that were downloaded."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, model, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
