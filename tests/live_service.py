"""`lora-mvp serve` as a real process, and what stands between it and a client: a network that breaks."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml
from browser import process, wait_for

ROOT = Path(__file__).resolve().parent.parent
ENV = {name: value for name, value in os.environ.items() if not name.startswith("LORA_MVP_")}
ENV |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
CLI = [sys.executable, "-m", "lora_mvp.cli"]


def settings(home: Path, data: Path, training: dict, **api) -> Path:
    """A server's configuration file below `home`."""
    here = {"data_dir": data, "models_dir": home / "models", "jobs_dir": home / "jobs", "db_path": home / "jobs.json"}
    here = {name: str(path) for name, path in here.items()} | {"poll_interval": 0.2, "min_free_gb": 0.0} | api
    (home / "service.yaml").write_text(yaml.safe_dump({"api": here, "training": training}))
    return home / "service.yaml"


@contextmanager
def serving(config: Path, port: int = 0):
    """A server; gives its process and its address."""
    with open(config.with_suffix(".log"), "ab") as log:
        start = log.tell()
        command = [*CLI, "serve", "--port", str(port), "--config", str(config)]
        with process(command, env=ENV, stdout=log, stderr=log, cwd=config.parent) as server:

            def address():
                text = config.with_suffix(".log").read_bytes()[start:].decode()
                assert server.poll() is None, text
                return (re.search(r"listens on (http://\S+)", text) or [None, None])[1]

            url = wait_for(address)
            yield server, url


def command(*argv: str, **env) -> subprocess.CompletedProcess:
    """A command of `lora-mvp`, run to its end."""
    return subprocess.run([*CLI, *map(str, argv)], env=ENV | env, capture_output=True, text=True, timeout=300)


def trainers(job_id: str) -> list[psutil.Process]:
    """The processes that train for a job."""
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get("LORA_MVP_JOB", "").startswith(job_id) and "lora_mvp.api.work" in p.cmdline():
                found.append(p)
        except psutil.Error:
            continue
    return found


def end_jobs(jobs_dir: Path) -> None:
    """Kill what still works for the jobs of a folder; a failed test must leave nothing behind."""
    names = {path.name for path in jobs_dir.glob("*")}
    for p in psutil.process_iter():
        try:
            if p.environ().get("LORA_MVP_JOB", "").split(":")[0] in names:
                p.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue


class Cutter:
    """A proxy for TCP that cuts connections: `cuts` holds, for each coming connection, after how many bytes of the answer."""

    def __init__(self, port: int, cuts: list[int | None] = ()):
        self.port, self.cuts, self.connections = port, list(cuts), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.connections += 1
            threading.Thread(
                target=self.carry, args=(client, self.cuts.pop(0) if self.cuts else None), daemon=True
            ).start()

    def carry(self, client: socket.socket, cut: int | None):
        """Carry one connection; `cut` bytes of the answer come through, then both ends see it break."""
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                return
            with server:
                threading.Thread(target=self.pump, args=(client, server), daemon=True).start()
                while (data := self.read(server)) and cut != 0:
                    data = data if cut is None else data[:cut]
                    cut = None if cut is None else cut - len(data)
                    try:
                        client.sendall(data)
                    except OSError:
                        break
                for end in (client, server):
                    try:
                        end.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass  # the other side was faster

    def pump(self, source: socket.socket, sink: socket.socket):
        while data := self.read(source):
            try:
                sink.sendall(data)
            except OSError:
                return

    @staticmethod
    def read(source: socket.socket) -> bytes:
        try:
            return source.recv(1 << 16)
        except OSError:
            return b""

    def close(self):
        self.listener.close()
