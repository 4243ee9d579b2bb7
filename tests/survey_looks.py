"""Functions that look, badly, for test_survey.py: a worker imports them by name."""

import os
import re
import sys
import time
from hashlib import sha256
from pathlib import Path

from lora_mvp.data import storage
from lora_mvp.data.looks import Look
from lora_mvp.data.workers import name_bytes


def misbehave(word):
    if word == "kill":
        os.kill(os.getpid(), 9)
    if word == "segfault":
        os.kill(os.getpid(), 11)
    if word == "exit":
        os._exit(3)
    if word == "hang":
        time.sleep(1000)
    if word == "spin":  # in C, with no chance for another thread
        re.match(r"(a+)+$", "a" * 64 + "b")
    if word == "allocate":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        bytearray(2**40)
    if word == "raise":
        raise RuntimeError("no pixels")
    if word == "quit":
        sys.exit("enough")
    if word == "print":
        os.write(1, b'{"look": {"sha256": "wrong"}}\n')
        print("a warning", file=sys.stderr)


def look(path, log=None):
    """The file's own words say what to do: the part of its name before the dash."""
    if log:
        with open(log, "a") as file:
            file.write(name_bytes(Path(path)) + "\n")
    misbehave(Path(path).name.split("-")[0])
    data = Path(path).read_bytes()
    return Look(sha256=sha256(data).hexdigest(), bytes=len(data), detail=data.decode())


def make(path, *, new, **how):
    """As for `look`; `once` dies the first time only."""
    word, mark = Path(path).name.split("-")[0], Path(new).with_suffix(".died")
    if word == "once" and not mark.exists():
        mark.touch()
        word = "kill"
    misbehave(word)
    return storage.make(path, new=new, **how)


def make_nowhere(path, *, new, **how):
    return storage.make(path, new="/proc/self/nowhere/x.png", **how)
