"""Files: what happens when another process holds a folder or is killed in the middle of a write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_mvp import files
from lora_mvp.files import LoraMvpError, atomic_write, folder_lock, make_folder

HOLD = """
import sys, time
from lora_mvp.files import folder_lock
with folder_lock(sys.argv[1], "busy"):
    print("held", flush=True)
    time.sleep(60)
"""

WRITE = """
import sys
from lora_mvp.files import atomic_write
print("go", flush=True)
for k in range(10_000):
    atomic_write(sys.argv[1], bytes([k % 256]) * 1_000_000)
"""


def started(code: str, path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() in ("held", "go")
    return process


def test_a_lock_holds_against_other_processes_and_ends_with_them(tmp_path):
    process = started(HOLD, tmp_path)
    try:
        with (
            pytest.raises(LoraMvpError, match="wait until it has ended") as error,
            folder_lock(tmp_path, "another one writes there; wait until it has ended", "my_code"),
        ):
            pass
        assert error.value.code == "my_code"
    finally:
        process.kill()
        process.wait()
    with folder_lock(tmp_path, "busy"):
        pass


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a kill that cannot be caught")
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    file = atomic_write(tmp_path / "a.bin", b"\0" * 1_000_000)
    for pause in (0.0, 0.003, 0.01, 0.03, 0.06):
        process = started(WRITE, file)
        time.sleep(pause)
        process.kill()
        process.wait()
        content = file.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="a folder that root may not write does not exist")
def test_a_folder_of_somebody_else_is_refused_at_once(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    with pytest.raises(LoraMvpError, match="training.output_dir .*theirs cannot be written: Permission denied"):
        make_folder(tmp_path / "theirs", "training.output_dir")


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoraMvpError, match="Cannot write .*: No space left on device"):
        atomic_write(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_synced_where_the_system_forbids_it(tmp_path, monkeypatch):
    """Windows opens no folder, and syncs no file that is open for reading only."""
    opened = os.open

    def on_windows(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        assert flags & (os.O_RDWR | os.O_WRONLY), "Bad file descriptor"
        return opened(path, flags, *args, **kwargs)

    file = atomic_write(tmp_path / "file", "kept")
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.os, "open", on_windows)
    files.sync(file)
    files.sync(tmp_path)
