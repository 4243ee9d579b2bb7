"""Trainings in processes of their own, forked from a server that has imported the package: each costs a second and not ten."""

import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

PROVED = ["loss_history.csv", "validation.csv", "lora_adapter/pytorch_lora_weights.safetensors"]


def training_server():
    """What trainings are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_mvp.cli", "lora_mvp.train.loop"])
    return context


def command(arguments: list[str], log: str, largest: int | None = None) -> None:
    """`lora-mvp ARGUMENTS` in this process, its output in a file; no file may have more than `largest` bytes."""
    from lora_mvp.cli import main

    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        if largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.exit(main(arguments))


class Run:
    """One run folder, trained by the command line in processes of its own."""

    def __init__(self, server, manifest: Path, settings: dict):
        self.server, self.manifest, self.settings = server, manifest, settings
        self.folder = Path(settings["training.output_dir"])
        self.log = self.folder.with_suffix(".log")

    def start(self, *options: str, largest: int | None = None):
        sets = [f"--set={key}={json.dumps(value, default=str)}" for key, value in self.settings.items()]
        return self.call("train", "--manifest", str(self.manifest), *sets, *options, largest=largest)

    def call(self, *arguments: str, largest: int | None = None):
        """Any command, its output in the run's log."""
        process = self.server.Process(target=command, args=(list(arguments), str(self.log), largest))
        process.start()
        return process

    def finish(self, *options: str) -> int:
        process = self.start(*options)
        process.join(120)
        return process.exitcode

    def bytes(self) -> dict[str, bytes]:
        """What must be the same however a run came to its end."""
        return {name: (self.folder / name).read_bytes() for name in PROVED}

    def said(self) -> str:
        return self.log.read_text()


def wait_for(condition, process, limit: float) -> bool:
    """Wait until `condition` holds; False when the process ends or the time is up before."""
    end = time.monotonic() + limit
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False
