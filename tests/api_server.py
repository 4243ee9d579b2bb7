"""The service in a process of its own, with an engine that never has room, so that jobs stay in the queue.

`python tests/api_server.py` serves on a free port with the settings that LORA_MVP_CONFIG names.
"""

import json
import os
import re
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from browser import process, wait_for

from lora_mvp.api import edge, main
from lora_mvp.api.places import Node, Room


class Resting:
    """An engine without room."""

    lease = 30.0

    def nodes(self):
        return [Node("here", Room(1, 0, 1), Room(0, 0, 0))]

    def start(self, job, folder, node):
        raise AssertionError("there is no room")

    def running(self):
        return {}

    def poll(self, refs):
        return dict.fromkeys(refs, "gone")

    def stop(self, ref, grace_s):
        pass

    def describe(self):
        return {"name": "resting", "slots": 0, "gpus": []}


def places(root: Path, **api) -> dict:
    """The `api` section for a server that lives below `root`, with one picture to train on."""
    (root / "models").mkdir(exist_ok=True)
    if not (root / "data").is_dir():
        (root / "data" / "cats").mkdir(parents=True)
        (root / "data" / "cats" / "1.png").write_bytes(b"not looked into before a job starts")
        row = {"image": "1.png", "caption": "a cat", "split": "train"}
        (root / "data" / "cats" / "manifest.json").write_text(json.dumps([row]))
    here = {"db_path": str(root / "jobs.json"), "jobs_dir": str(root / "jobs"), "data_dir": str(root / "data")}
    return here | {"models_dir": str(root / "models"), "min_free_gb": 0.0, "poll_interval": 0.2} | api


@contextmanager
def served(root: Path, command=(sys.executable, __file__), env=(), **api):
    """A running server below `root`: its process, port, address and log."""
    (root / "config.yaml").write_text(
        json.dumps({"api": places(root, **api), "training": {"pretrained_model": "tiny"}})
    )
    env = os.environ | {"LORA_MVP_CONFIG": str(root / "config.yaml"), "OMP_NUM_THREADS": "1"} | dict(env)
    log = root / "server.log"
    with open(log, "ab") as file, process([*command], env=env, stdout=file, stderr=file) as running:

        def port():
            assert running.poll() is None, log.read_text()
            found = re.findall(r"running on http://127\.0\.0\.1:([0-9]+)", log.read_text())
            return found and int(found[-1])

        before = len(re.findall("running on", log.read_text()))
        wait_for(lambda: port() and len(re.findall("running on", log.read_text())) > before)
        yield SimpleNamespace(process=running, port=port(), url=f"http://127.0.0.1:{port()}", log=log)


def raw(port: int, *parts: bytes, patience=60.0) -> bytes:
    """Send some bytes and read until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:  # it has heard enough
            pass
        answer = b""
        try:
            while piece := connection.recv(2**16):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


if __name__ == "__main__":
    import uvicorn

    edge.BODY_SECONDS = float(os.environ.get("TEST_BODY_SECONDS", edge.BODY_SECONDS))
    uvicorn.run(main.create_app(engine=Resting()), port=0, timeout_graceful_shutdown=20)
