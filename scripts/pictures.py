"""Make the pictures of README, tutorials and docs/SERVICE.md anew, on real runs: some minutes, with Chromium.

python scripts/pictures.py
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the browser and the laboratory of the tests

from browser import browse  # noqa: E402
from lab import button, cell, jupyterlab, pictures, run_all  # noqa: E402
from live_service import end_jobs, serving, settings  # noqa: E402

from lora_mvp.api.client import Client  # noqa: E402
from lora_mvp.config import load_config  # noqa: E402
from lora_mvp.demo import run_demo  # noqa: E402
from lora_mvp.train import train  # noqa: E402

IMAGES = ROOT / "nbs" / "images"
HOW = "steps=20, guidance_scale=3"
CELLS = (
    'from lora_mvp.widgets import TrainMonitor\nmonitor = TrainMonitor("watched", every=0.1)\nmonitor.view',
    f'from lora_mvp.widgets import Compare\ncompare = Compare("lora", prompt="a picture of cupcake", {HOW})\ncompare.view',
    f'from lora_mvp.widgets import Playground\nplay = Playground("lora", prompt="a picture of owl", {HOW})\nplay.view',
)
PROMPTS = ("a picture of small airplane", "a picture of turtle")  # after the owl


def shot(page, k: int, name: str) -> None:
    """A picture of a cell's output."""
    page.js(f"{cell(k)}.scrollIntoView({{block: 'start', behavior: 'instant'}})")
    page.js("new Promise(done => setTimeout(done, 500))")
    shown = f"[...{cell(k)}.querySelectorAll('.jp-OutputArea-output')].at(-1)"  # below what libraries said
    page.screenshot(IMAGES / name, f"{shown}.firstElementChild")


def widgets(demo: Path) -> None:
    """TrainMonitor half way through a run; Compare and Playground on the demo's LoRA."""
    changes = {"training.output_dir": demo / "watched", "training.max_train_steps": 60, "training.save_pipeline": False}
    changes |= {"training.checkpointing_steps": 20, "training.lr_warmup_steps": 5}
    changes |= {"training.sample_prompts": ["a picture of fox face", "a picture of rocket"]}
    config = load_config(demo / "config.yaml", overrides=changes)
    with jupyterlab(demo, CELLS) as address, browse(address, demo / "chromium") as page:
        page.resize(1300, 1500)
        run_all(page)

        def on_step(report):
            if report.step == 45:
                page.wait(f"{cell(0)}.innerText.includes('step 44 of 60') && {pictures(0)} == 5")
                shot(page, 0, "watch.png")

        train(config, demo / "processed" / "manifest.json", on_step=on_step, progress=False)
        page.wait(f"{pictures(1)} == 2 && {cell(1)}.innerText.includes('drawn in')")  # it draws at once
        shot(page, 1, "compare.png")
        page.click(button(2, "draw"))
        words = f"{cell(2)}.querySelector('input[type=text]')"
        for k, prompt in enumerate(PROMPTS, 1):
            page.wait(f"{pictures(2)} == {k} && !{button(2, 'draw')}.disabled")
            page.click(words)
            page.js(f"{words}.select()")
            page.type(prompt)
            page.click(button(2, "draw"))
        page.wait(f"{pictures(2)} == {len(PROMPTS) + 1} && !{button(2, 'draw')}.disabled")
        page.click(button(2, "save"))
        page.wait(f"{cell(2)}.innerText.includes('saved as')")
        shot(page, 2, "playground.png")


def service(demo: Path, home: Path) -> None:
    """The page of the service after two trainings."""
    config = settings(home, demo, {}, tokens_file=None)
    changes = {"pretrained_model": "tiny", "max_train_steps": 100, "learning_rate": 8e-4, "batch_size": 8}
    changes |= {"gradient_accumulation": 1, "lr_warmup_steps": 10, "lora_rank": 8, "lora_targets": "all"}
    changes |= {"sample_prompts": [f"a picture of {name}" for name in ("fox face", "strawberry", "owl", "butterfly")]}
    values = {f"training.{k}": v for k, v in changes.items()} | {"evaluation.guidance_scale": 3}
    try:
        with serving(config) as (_, url), Client(url) as client:
            jobs = [client.train("processed/manifest.json", values | {"training.seed": seed}) for seed in (1, 2)]
            for job in jobs:
                client.wait(job["job_id"])
            with browse(url, home / "chromium") as page:
                page.resize(1180, 820)
                page.click("document.querySelector('.job')")
                page.wait("[...document.querySelectorAll('#shown img')].filter(e => e.naturalWidth > 0).length >= 4")
                page.js("scrollTo(0, 0)")
                page.screenshot(ROOT / "docs" / "service_page.png")
    finally:
        end_jobs(home / "jobs")


def main() -> None:
    """All of them."""
    with tempfile.TemporaryDirectory() as temp:
        demo, home = Path(temp) / "demo", Path(temp) / "home"
        home.mkdir()
        run_demo(demo)
        Image.open(demo / "before_after.png").quantize(256).save(ROOT / "docs" / "before_after.png", optimize=True)
        widgets(demo)
        service(demo, home)


if __name__ == "__main__":
    main()
