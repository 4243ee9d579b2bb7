"""Commands in processes of their own, forked from one that has imported the heavy libraries: seconds less for each.

They are what `python -m lora_mvp.cli ...` starts in all but the import of torch and its friends: own arguments, folder,
environment, output and exit code, and they can be sent signals. Without a fork server (Windows) they are started anew.
"""

import atexit
import io
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def words(command: str) -> list[str]:
    """A command as one writes it in a terminal, ready to start: `lora-mvp ...`, or a Python file with its arguments."""
    program, *arguments = shlex.split(command)
    start = ["-m", "lora_mvp.cli"] if program == "lora-mvp" else [str(ROOT / program)]
    return [sys.executable, *start, *arguments]


def _inside(command: list[str], cwd: str, env: dict, files: tuple[str, str]) -> None:
    """What the forked process does: become the command."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, (name, file) in enumerate(zip(("stdout", "stderr"), files, strict=True), 1):
        os.dup2(os.open(file, os.O_WRONLY), stream)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                open(stream, "wb", buffering=0 if stream == 2 else -1, closefd=False),
                encoding="utf-8",
                errors="backslashreplace",
                write_through=stream == 2,
            ),
        )
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora_mvp"]:
        del sys.modules[name]  # another test's server may have imported them
    try:
        if command[1] == "-m":
            sys.argv = [command[2], *command[3:]]
            sys.path[0] = cwd
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command[1:]
            sys.path[0] = str(Path(command[1]).parent)
            runpy.run_path(command[1], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Forked:
    """A running command, with what `subprocess.Popen` has that tests need."""

    def __init__(self, command: str, cwd: Path, env: dict):
        self._files = [tempfile.NamedTemporaryFile(suffix=name, delete=False).name for name in (".out", ".err")]
        context = multiprocessing.get_context("forkserver")
        if forkserver._forkserver._forkserver_pid is None:
            before, path = os.environ.copy(), os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
            try:
                os.environ |= env | {"PYTHONPATH": path}  # libraries read some of it when they are imported
                context.set_forkserver_preload(["imported"])
                forkserver.ensure_running()
            finally:
                os.environ.clear()
                os.environ.update(before)
        self._process = context.Process(target=_inside, args=(words(command), str(cwd), env, tuple(self._files)))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has said, once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return tuple(Path(file).read_text(encoding="utf-8") for file in self._files)


def fork(command: str, cwd: Path, env: dict) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    process = Forked(command, cwd, env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
