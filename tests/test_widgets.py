"""The widgets without a browser, and a hand at work on them in JupyterLab."""

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from browser import browse, wait_for
from lab import button, cell, jupyterlab, pictures, run_all
from PIL import Image

from lora_mvp.config import TrainingConfig, load_config
from lora_mvp.infer import load_run, render
from lora_mvp.models.adapters import adapter_parameters, add_lora, save_adapter
from lora_mvp.models.base import load_base
from lora_mvp.train.loop import train
from lora_mvp.widgets import Compare, Playground, TrainMonitor, enlarged_png

PROMPT, OPTIONS = "penguin, noto style", {"steps": 2, "guidance_scale": 3.0}


def made_up(folder, variant, seed):
    """An adapter that visibly does something, without a training."""
    pipe = load_base("tiny")
    add_lora(pipe, TrainingConfig(lora_rank=2, lora_alpha=2, lora_targets="all", lora_variant=variant))
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(pipe).values()):
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    save_adapter(pipe, folder, base="tiny")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A LoRA and a DoRA."""
    root = tmp_path_factory.mktemp("adapters")
    return made_up(root / "lora", "lora", 1), made_up(root / "dora", "dora", 1000)


def drawn(run, seed=1, strength=1.0):
    return enlarged_png(render(run, [PROMPT], [seed], strength, 2, 3.0)[0])


def test_two_runs_side_by_side(adapters):
    compare = Compare(*adapters, prompt=PROMPT, **OPTIONS)
    assert compare.wait(60)
    runs = [load_run(adapter) for adapter in adapters]
    assert [picture.value for picture in compare.pictures] == [drawn(run) for run in runs]
    assert [title.value for title in compare.titles] == ["lora, strength 1", "dora, strength 1"]
    compare.strength.value = 0
    assert compare.wait(60)
    base = drawn(load_run("tiny"))
    assert [picture.value for picture in compare.pictures] == [base, base]
    fused = Compare(load_run(adapters[1], fuse_scale=1.0), runs[1], prompt=PROMPT, **OPTIONS)
    assert fused.wait(60) and not fused.strength.disabled  # there is still one whose strength can be changed
    left, right = (Image.open(io.BytesIO(picture.value)).convert("RGB") for picture in fused.pictures)
    assert max(abs(a - b) for a, b in zip(left.tobytes(), right.tobytes())) <= 2
    fused.strength.value = 0.5
    assert fused.wait(60) and fused.titles[0].value == "dora, fused at strength 1"
    assert Image.open(io.BytesIO(fused.pictures[0].value)).convert("RGB").tobytes() == left.tobytes()


def test_the_latest_wish_wins(adapters):
    compare = Compare(run := load_run(adapters[0]), prompt=PROMPT, **OPTIONS)
    assert compare.wait(60)
    drawings, draw = [], compare.draw
    compare.draw = lambda *wish: drawings.append(wish[1]) or draw(*wish)
    with run.lock:  # as if something slow were being drawn
        compare.seed.value = 2
        wait_for(lambda: drawings == [2])
        assert all(control.disabled for control in compare.controls)
        for seed in (3, 4, 5):
            compare.seed.value = seed
    assert compare.wait(60)
    assert drawings == [2, 5] and compare.pictures[0].value == drawn(run, seed=5)
    assert not any(control.disabled for control in compare.controls)


def test_what_goes_wrong_is_a_sentence(adapters, tmp_path, caplog):
    play = Playground(tmp_path / "nowhere", **OPTIONS)
    said = []
    play.message.observe(lambda change: said.append(change.new), "value")
    play.button.click()
    assert play.wait(60) and "the prompt is empty" in said[-1]
    play.prompt.value = "<b>"
    play.button.click()
    assert play.wait(60) and "no such folder" in said[-1] and "color" in said[-1]
    play.models = [load_run(adapters[0])]
    play.models[0].pipe.unet = None
    play.button.click()
    assert play.wait(60) and "drawing failed (AttributeError" in said[-1]
    assert "Traceback" in caplog.text
    play.models = [load_run(adapters[0])]
    play.button.click()
    assert play.wait(60) and "drawn in" in said[-1] and len(play.gallery.children) == 1
    assert "&lt;b&gt;" in play.gallery.children[0].children[1].value


def test_models_can_be_loaded_in_several_threads(adapters):
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(load_run, [*adapters, adapters[0]]))
    assert drawn(runs[0]) == drawn(runs[2]) == drawn(load_run(adapters[0]))
    assert drawn(runs[1]) == drawn(load_run(adapters[1]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_monitor_ends_and_says_so(tmp_path):
    before = threading.active_count()
    monitor = TrainMonitor(tmp_path / "run", every=0.05)
    wait_for(lambda: "no such folder yet" in monitor.status.value)
    monitor.close()
    monitor.close()
    assert monitor.wait(0) and "not watched any more" in monitor.status.value
    assert threading.active_count() <= before
    monitor = TrainMonitor(tmp_path / "run", every=0.05)
    monitor.watch.folder = None  # a fault of ours
    assert monitor.wait(60) and "the monitor has failed" in monitor.status.value


CELLS = (
    'from lora_mvp.widgets import TrainMonitor\nmonitor = TrainMonitor("run", every=0.1)\nmonitor.view',
    'from lora_mvp.widgets import Compare, Playground\ncompare = Compare("run", prompt="a disc", steps=2)\ncompare.view',
    'play = Playground("run", prompt="a disc", steps=2, out="kept")\nplay.view',
)


@pytest.mark.slow
def test_a_hand_at_work_in_jupyterlab(drawings, small_run, tmp_path):
    config = load_config(overrides=small_run(tmp_path / "run", sample_prompts=["a disc", "a square"]))
    with jupyterlab(tmp_path, CELLS) as address, browse(address, tmp_path / "chromium") as page:
        run_all(page)
        page.wait(f"{cell(0)}?.innerText.includes('no such folder yet')")
        page.wait(f"{cell(1)}?.innerText.includes('no such folder')")  # a sentence, no traceback
        page.wait(f"{button(2, 'draw')} && !{button(2, 'draw')}.disabled")

        def on_step(report):  # the training goes on in this process, which is not the kernel's
            if report.step == 3:  # taken, and not yet written
                page.wait(f"{cell(0)}.innerText.includes('step 2 of 6')")
                page.wait(f"{pictures(0)} == 5")  # the curve; two samples of the base, two of step 2

        train(config, drawings, on_step=on_step, progress=False)
        page.wait(f"{cell(0)}.innerText.includes('finished') && {cell(0)}.innerText.includes('step 6 of 6')")
        page.wait(
            f"{pictures(0)} == 5 && {cell(0)}.innerText.includes('step 6') && {cell(0)}.innerText.includes('a square')"
        )
        page.click(button(1, "draw"))
        page.wait(f"{pictures(1)} == 2 && {cell(1)}.innerText.includes('drawn in')")
        assert "run, strength 1" in page.js(f"{cell(1)}.innerText")
        sources = f"[...{cell(1)}.querySelectorAll('img')].map(e => e.src).join()"
        before = page.js(sources)
        seed = f"{cell(1)}.querySelector('input[type=number]')"
        page.wait(f"!{seed}.disabled")
        page.click(seed)
        page.wait(f"document.activeElement == {seed}")
        page.js(f"{seed}.select()")
        page.type("7")
        page.press("Enter")
        page.wait(f"{cell(1)}.innerText.includes('seed 7') && {sources} != '{before}' && {pictures(1)} == 2")
        page.click(button(2, "draw"))
        page.wait(f"{pictures(2)} == 1 && !{button(2, 'draw')}.disabled")
        words = f"{cell(2)}.querySelector('input[type=text]')"
        page.click(words)
        page.wait(f"document.activeElement == {words}")
        page.js(f"{words}.select()")
        page.type("a star")
        page.click(button(2, "draw"))  # without Enter: the words and the click arrive together
        page.wait(f"{pictures(2)} == 2 && {cell(2)}.innerText.includes('a star') && !{button(2, 'draw')}.disabled")
        page.click(button(2, "save"))
        page.wait(f"{cell(2)}.innerText.includes('saved as') && {button(2, 'saved')}.disabled")
    (kept,) = (tmp_path / "kept").glob("*.png")
    facts = json.loads(Image.open(kept).text["lora_mvp"])
    again = render(load_run(tmp_path / "run"), ["a star"], [1], 1.0, 2, 7.5)[0]
    assert facts["prompt"] == "a star" and Image.open(kept).tobytes() == again.tobytes()
