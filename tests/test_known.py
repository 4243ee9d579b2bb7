"What a run knows of its files: a resumed one neither reads nor hashes what has not changed, and finds what has."

import hashlib
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data import workers
from lora_mvp.files import asset
from lora_mvp.train.known import KnownFiles

OPENED: list[str] | None = None  # paths, while somebody listens


def listen(event, arguments):
    if event == "open" and OPENED is not None and isinstance(arguments[0], str | bytes):
        OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(listen)


@pytest.fixture
def hashed(monkeypatch):
    """How many bytes each module has hashed."""
    counts, make = Counter(), hashlib.sha256

    class Counted:
        def __init__(self, data=b"", **_):
            self.who, self.inner = sys._getframe(1).f_globals["__name__"].removeprefix("lora_mvp."), make()
            self.update(data)

        def update(self, data):
            counts[self.who] += memoryview(data).nbytes
            self.inner.update(data)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(hashlib, "sha256", Counted)
    return counts


def stop_at(step):
    """A watcher of a run that ends it."""

    def watch(report):
        if report.step == step:
            raise KeyboardInterrupt

    return watch


@pytest.fixture
def begun(drawings, small_run, tmp_path, monkeypatch):
    """A run on its own copies of pictures and base, stopped after three steps of five; returns what goes on with it."""
    from lora_mvp.train.loop import train

    monkeypatch.setattr(workers, "RACY", 0)  # nobody waits two seconds here
    shutil.copytree(drawings.parent, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    shutil.copytree(drawings.parent.parent / "raw" / "square", tmp_path / "class")
    shutil.copytree(asset("tiny"), tmp_path / "base")
    settings = {
        "pretrained_model": str(tmp_path / "base"),
        "regularization_dir": tmp_path / "class",
        "max_train_steps": 5,
    }
    settings |= {"regularization_prompt": "square", "sample_every": 0}

    def go(name="run", pipeline=False, **how):
        config = load_config(overrides=small_run(tmp_path / name, save_pipeline=pipeline, **settings))
        return train(config, tmp_path / "data" / "manifest.json", progress=False, **how)

    with pytest.raises(KeyboardInterrupt):
        go(on_step=stop_at(3))
    go.root = tmp_path
    return go


def exchanged(path: Path, place: int) -> None:
    """Another byte in a file, which is as long and as old as before."""
    times, content = (path.stat().st_atime_ns, path.stat().st_mtime_ns), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1]


def test_a_resumed_run_reads_and_hashes_nothing_that_has_not_changed(begun, hashed):
    global OPENED
    OPENED = []
    try:
        resumed = begun(resume=True)
    finally:
        opened, OPENED = OPENED, None
    assert hashed["models.base"] < 1000 and hashed["train.pictures"] == 0  # the former joins hashes
    assert hashed["train.cache"] < 200_000  # names, no tensors
    ours = [path for path in opened if path.startswith((f"{begun.root}/data/", f"{begun.root}/class/"))]
    assert [path for path in ours if path.endswith(".png")] == [] and f"{begun.root}/data/cache/known.json" in ours

    from lora_mvp.models.base import load_base, part_hashes

    (begun.root / "data" / "cache" / "known.json").unlink()
    hashed.clear()
    fresh = begun("fresh", pipeline=True)
    assert (begun.root / "fresh" / "model_index.json").is_file()  # for which the base was loaded again
    whole = hashed.pop("models.base")
    part_hashes(load_base("tiny"))
    assert hashed["models.base"] <= whole < hashed["models.base"] + 1000  # and yet hashed once
    assert hashed["train.pictures"] > 0
    assert (resumed.adapter_sha256, resumed.history_sha256) == (fresh.adapter_sha256, fresh.history_sha256)


def test_a_resumed_run_hashes_its_checkpoint_once(begun, hashed, monkeypatch):
    from lora_mvp.train import checkpoints

    newest, *_ = reversed(checkpoints.checkpoints(begun.root / "run"))
    monkeypatch.setattr(checkpoints, "_COMPARED", KnownFiles())  # as in another process
    size = sum(path.stat().st_size for path in newest.iterdir() if path.name != "checkpoint.json")
    read = []
    begun(resume=True, on_step=lambda report: read.append(hashed["files"]))  # it is looked for, named, restored
    assert read[0] == size
    exchanged(newest / "adapter.safetensors", -1)  # and is believed no longer than it is the same
    assert "adapter.safetensors has changed" in checkpoints.damage(newest)


def test_what_has_changed_is_found(begun, hashed):
    picture, other = sorted((begun.root / "data").glob("**/*.png"))[:2]
    weights = begun.root / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    for path, place, said in [
        (picture, 60, "has changed since"),
        (begun.root / "class" / "0.png", 60, "cannot be used|regularization_images was"),
        (weights, -2, "base was"),
    ]:
        hashed.clear()
        exchanged(path, place)
        with pytest.raises(LoraMvpError, match=said):
            begun(resume=True)
        exchanged(path, place)
    os.utime(other)  # of another date, and the same: looked at again, alone
    hashed.clear()
    with pytest.raises(KeyboardInterrupt):
        begun(resume=True, on_step=stop_at(4))
    assert hashed["train.pictures"] == other.stat().st_size
