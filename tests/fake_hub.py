"""Servers that answer as the Hugging Face hub does: one model whose files lie in a folder, and a place to upload to."""

import base64
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
def serving(handler):
    """The address of a server in a thread, whose requests go to `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub(model: str, folder: Path):
    """Its address, and the names of the files that were downloaded."""
    asked: list[str] = []
    with serving(partial(Hub, model, folder, asked)) as url:
        yield url, asked


class Shelf(BaseHTTPRequestHandler):
    """The part of the hub that takes uploads; small files travel inside the commit, as all do here."""

    def __init__(self, models: dict[str, dict], *args):
        self.models = models
        super().__init__(*args)

    def answer(self, body: dict, status: int = 200, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        facts = {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}
        for name, value in facts.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.removeprefix("/api/models/")
        if name not in self.models:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        self.answer({"id": name, "sha": COMMIT, "private": self.models[name]["private"], "siblings": []})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.models[name] = {"private": private, "files": {}}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        name, action = path.removeprefix("/api/models/").removesuffix("/main").rsplit("/", 1)
        if name not in self.models or action not in ("preupload", "commit"):
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.models[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def log_message(self, *_) -> None:
        """The tests look at `models`."""


@contextmanager
def shelf():
    """Its address, and the models that are on it: whether each is private, and its files."""
    models: dict[str, dict] = {}
    with serving(partial(Shelf, models)) as url:
        yield url, models
