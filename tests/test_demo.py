"""The demo keeps its promises: it shows the bad files, learns the style, keeps the subject, repeats to the byte.

The whole demo takes minutes beside other tests, so it is slow; CI runs a shorter one from the wheel.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "lora_mvp" / "assets" / "demo"
WEIGHTS = Path("lora", "lora_adapter", "pytorch_lora_weights.safetensors")


def demo(out: Path, *arguments: str) -> str:
    """Run `lora-mvp demo` as a user does; what it printed."""
    command = [sys.executable, "-m", "lora_mvp.cli", "demo", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One whole demo: its folder, what it printed and the peak memory of the process in bytes."""
    out = tmp_path_factory.mktemp("demo") / "run"
    printed = demo(out)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return out, printed, peak


def metrics(out: Path) -> dict:
    """What was measured; the demo's own folder is called OUT in it."""
    text = (out / "demo.json").read_text().replace(out.as_posix(), "OUT")
    return json.loads(text)["metrics"]


@pytest.mark.slow
def test_bad_files_are_named_with_their_reason(full):
    out, printed, _ = full
    rejected = {
        Path(r["path"]).name: r["reasons"][0]["code"]
        for r in json.loads((out / "processed" / "manifest.json").read_text())["rejected"]
    }
    assert rejected == {"broken-download.png": "unreadable", "out-of-focus.png": "blurry", "thumbnail.png": "too_small"}
    assert all(name in printed for name in rejected)


@pytest.mark.slow
def test_everything_is_left_behind(full):
    out, printed, _ = full
    for name in (
        "before_after.png",
        "evaluation/report.html",
        "lora/loss_curve.png",
        "lora/samples.png",
        "lora/run.json",
        "lora/model_index.json",
    ):
        assert (out / name).is_file(), name
    assert (out / WEIGHTS).is_file()
    assert min(Image.open(out / "before_after.png").size) > 850  # 24 prompts, three pictures each


@pytest.mark.slow
def test_memory(full):
    assert full[2] < 1.5e9


def test_no_held_out_thing_is_trained_on():
    names = {part: {p.stem for p in (DEMO / part).rglob("*.png")} for part in ("raw", "heldout")}
    assert len(names["raw"]) >= 40 and not names["raw"] & names["heldout"]


@pytest.mark.slow  # in CI the chapter on repeating a run compares the bytes of a shorter one
def test_trained_again_the_adapter_is_the_same(full):
    """The training of the demo, repeated from its record."""
    command = [sys.executable, "-m", "lora_mvp.cli", "reproduce", str(full[0] / "lora")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0 and "byte for byte" in done.stdout, done.stdout + done.stderr
    again = full[0] / "lora-reproduced" / WEIGHTS.relative_to("lora")
    assert again.read_bytes() == (full[0] / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_two_runs_give_the_same_adapter(full, tmp_path):
    demo(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (full[0] / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "again") == metrics(full[0])


@pytest.mark.slow
def test_the_style_is_learnt_and_the_subject_kept(full):
    """The bars that the demo promises; the figures of one run are in README.md."""
    scores = metrics(full[0])["scores"]
    assert metrics(full[0])["copies"]["LoRA"]["copied"] == 0
    gap, alignment = scores["gap[tiny-clip]"], scores["clip_score[tiny-clip]"]
    assert gap["change"]["high"] < 0 and gap["lora"]["value"] <= 0.5 * gap["base"]["value"], gap
    judgement = metrics(full[0])["judgement"]
    assert "gap" in judgement["won"] and "closer to the real pictures" in judgement["why"], judgement["why"]
    kept = scores["kept[edges]"]
    assert kept["lora"]["value"] > 3 * kept["anchors"]["wrong"], kept
    assert alignment["lora"]["value"] >= 0.9 * alignment["base"]["value"], alignment
    losses = list(json.loads((full[0] / "lora" / "run.json").read_text())["validation_loss"].values())
    assert losses[-1] < losses[0]
