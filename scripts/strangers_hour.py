"""A stranger's first hour: the commands of README and the guides, typed in their order in fresh folders, with the pages on the way.

python scripts/strangers_hour.py [--out hour]      some ten minutes; hour/index.html has each command, what it said, its seconds

The commands are read out of the texts. Nothing is downloaded, so the base is `tiny` and the photos are drawings; `LESS` is what else
differs from what the texts say. Pictures of the pages need Chromium. Ends with 1 where a command or a page failed.
"""

import argparse
import html
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the browser of the tests

from browser import browse, wait_for  # noqa: E402

TEXTS = {name: ROOT / name for name in ("docs/install.md", "docs/guides/object.md", "README.md", "docs/SERVICE.md")}
RUN = {"training.max_train_steps": 60, "training.checkpointing_steps": 20, "training.lr_warmup_steps": 3}
DRAW = {"evaluation.num_inference_steps": 6, "evaluation.num_samples": 1}
LESS = {"demo": {}, "doctor": RUN | DRAW, "train": RUN | DRAW}
LESS |= dict.fromkeys(("choose", "grid", "generate", "evaluate"), DRAW)
PROMPTS = 4  # of each group in prompts.yaml
WIDTH, LONGEST = 1200, 2600  # of a picture of a page, in pixels


class Step(NamedTuple):
    """A command and the folder it is typed in, below the one that the text starts in."""

    folder: str
    words: list[str]


def steps(text: str) -> list[Step]:
    """What the blocks of a text tell a reader to type, `cd` followed."""
    found, folder = [], ""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    for line in blocks.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            folder = words[1]
        elif words[:1] == ["lora-mvp"]:
            found.append(Step(folder, words))
    return found


def tried(words: list[str], less: dict[str, dict] = LESS) -> list[str]:
    """The command as it is typed here: on `tiny`, and with less to do."""
    changes = [f"--set={key}={value}" for key, value in less.get(words[1], {}).items()]
    return [*words, *(["--base", "tiny"] if words[1] == "init" else []), *changes]


def teapots(folder: Path, n: int = 15) -> None:
    """Drawings in place of photos: a teapot in front of two colours."""
    for k in range(n):
        rng = np.random.default_rng(k)
        wall, table = (tuple(map(int, rng.integers(90, 256, 3))) for _ in range(2))
        x, y, r = map(int, rng.integers((250, 250, 110), (390, 300, 150)))
        image = Image.new("RGB", (640, 512), wall)
        pen = ImageDraw.Draw(image)
        pen.rectangle((0, y + r / 2, 640, 512), fill=table)
        pen.arc((x + 0.6 * r, y - 0.6 * r, x + 1.6 * r, y + 0.5 * r), -120, 120, fill="#780000", width=r // 5)
        pen.line((x - 0.7 * r, y + 0.3 * r, x - 1.5 * r, y - 0.6 * r), fill="#c1121f", width=r // 4)
        pen.ellipse((x - r, y - 0.8 * r, x + r, y + 0.9 * r), fill="#c1121f")
        pen.ellipse((x - 0.6 * r, y - 0.5 * r, x - 0.2 * r, y), fill="#ffb3b3")
        image.save(folder / f"{k}.jpg", quality=92)


def fewer_prompts(file: Path, n: int = PROMPTS) -> None:
    """The first prompts of each group, as a reader may leave out some."""
    groups = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump({group: prompts[:n] for group, prompts in groups.items()}), encoding="utf-8")


def ready(project: Path, n: int = PROMPTS) -> None:
    """What a person does after `init`: photos go where it said."""
    (raw,) = (project / "data" / "raw").iterdir()
    teapots(raw)
    fewer_prompts(project / "prompts.yaml", n)


class Hour:
    """What was typed and seen."""

    def __init__(self, out: Path):
        self.out, self.parts, self.failed = out, [], []
        self.browser = shutil.which("chromium") or shutil.which("chromium-browser")
        self.env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        self.env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def head(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def type(self, words: list[str], cwd: Path) -> str:
        """Type a command and wait for its end."""
        start = time.monotonic()
        command = [sys.executable, "-m", "lora_mvp.cli", *words[1:]]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, cwd=cwd, env=self.env, text=True, **streams)
        self.record(words, done.stdout, time.monotonic() - start, done.returncode)
        return done.stdout

    def record(self, words: list[str], said: str, seconds: float, code: int) -> None:
        """Keep what a command said; a bar that redraws its line counts as its last state."""
        said = "\n".join(line.rsplit("\r", 1)[-1] for line in said.splitlines())
        line, place = shlex.join(words), str(self.out.absolute())
        said = said.replace(place, "...")
        if code:
            self.failed.append(f"{line}: exit code {code}")
        head = f"<code>{html.escape(line)}</code> {seconds:.1f} s" + (f", <b>exit code {code}</b>" if code else "")
        self.parts.append(f"<p>{head}</p><pre>{html.escape(said)}</pre>")
        print(f"{seconds:6.1f} s  {line}", flush=True)

    def see(self, name: str, url: str, ready: str = "document.readyState == 'complete'") -> None:
        """A picture of a page; it must not scroll sideways, and all its pictures must be there."""
        if not self.browser:
            self.parts.append(f"<p>{name}: no picture, since Chromium is not installed</p>")
            return
        file = f"{re.sub('[^a-z]+', '-', name.lower())}.png"
        with tempfile.TemporaryDirectory() as temp, browse(url, Path(temp)) as page:
            page.resize(WIDTH, 900)
            page.wait(ready)
            wide = page.js("document.documentElement.scrollWidth")
            broken = page.js("[...document.images].filter(i => i.complete && !i.naturalWidth).length")
            page.resize(WIDTH, min(LONGEST, max(900, page.js("document.documentElement.scrollHeight"))))
            page.js("new Promise(done => setTimeout(done, 300))")
            page.screenshot(self.out / file)
        if wide > WIDTH or broken:
            self.failed.append(f"{name}: {wide} pixels wide, {broken} broken pictures")
        self.parts.append(f'<p>{html.escape(name)}</p><img src="{file}" alt="{html.escape(name)}">')

    def write(self) -> Path:
        """The page of the hour."""
        style = "body{font:16px sans-serif;max-width:1240px;margin:2em auto;padding:0 1em}img{max-width:100%;border:1px solid #aaa}"
        style += "pre{background:#f4f4f4;padding:.6em;overflow:auto;max-height:30em}code{font-weight:bold}"
        failed = "".join(f"<li>{html.escape(line)}</li>" for line in self.failed)
        head = f"<h1>A stranger's hour</h1><p>{html.escape(__doc__.splitlines()[0])}</p><ul>{failed}</ul>"
        file = self.out / "index.html"
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>A stranger\'s hour</title><style>{style}</style>'
        file.write_text(f"{page}{head}{''.join(self.parts)}</html>", encoding="utf-8")
        return file


def demo(hour: Hour) -> None:
    """The first command there is."""
    hour.head("docs/install.md")
    for step in steps(TEXTS["docs/install.md"].read_text(encoding="utf-8")):
        hour.type(tried(step.words), hour.out)
    hour.see("Report of the evaluation", (hour.out / "demo" / "evaluation" / "report.html").as_uri())


def photos(hour: Hour) -> Path:
    """The guide for an object, from the empty folder to the best checkpoint; the project's folder."""
    hour.head("docs/guides/object.md")
    for step in steps(TEXTS["docs/guides/object.md"].read_text(encoding="utf-8")):
        hour.type(tried(step.words), hour.out / step.folder)
        if step.words[1] == "init":
            project = hour.out / step.words[2]
            ready(project)
    hour.see("Report of the pictures", (project / "data" / "processed-report" / "report.html").as_uri())
    hour.see("Page of the run", next(project.glob("outputs/*/run.html")).as_uri())
    return project


def use(hour: Hour, project: Path) -> None:
    """What README says about a run that is there."""
    hour.head("README.md")
    (run,) = (project / "outputs").iterdir()
    text = TEXTS["README.md"].read_text(encoding="utf-8")
    inline = [shlex.split(line) for line in re.findall(r"`(lora-mvp evaluate [^`]+)`", text)]
    drawn = [step.words for step in steps(text) if step.words[1] == "generate"]
    for words in (*drawn, *inline):
        there = f"outputs/{run.name}"
        hour.type(tried([re.sub("^outputs/teapot$", there, word) for word in words]), project)
    hour.see("Report of the evaluation of the run", (run / "evaluation" / "report.html").as_uri())


def service(hour: Hour) -> None:
    """The first blocks of the text on the service, until the list of jobs."""
    hour.head("docs/SERVICE.md")
    folder = hour.out / "service"
    (folder / "cats" / "cat").mkdir(parents=True)
    teapots(folder / "cats" / "cat")
    serve, *client = [step.words for step in steps(TEXTS["docs/SERVICE.md"].read_text(encoding="utf-8"))][:4]
    log = folder / "serve.log"
    command, start = [sys.executable, "-m", "lora_mvp.cli", *serve[1:], "--port", "0"], time.monotonic()
    with log.open("w") as file, subprocess.Popen(command, cwd=folder, env=hour.env, stdout=file, stderr=file) as server:
        try:
            found = wait_for(lambda: re.search(r"listens on (\S+)", log.read_text()))
            hour.record(serve, log.read_text(), time.monotonic() - start, 0)
            hour.env["LORA_MVP_URL"] = found[1]
            for words in client:
                hour.type(words, folder)
            shown = "[...document.querySelectorAll('img')].some(i => i.naturalWidth > 0)"
            hour.see("Page of the service", found[1], f"(document.querySelector('.job')?.click(), {shown})")
        finally:
            server.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hour"), help="a new folder (default: hour)")
    out = parser.parse_args().out.absolute()
    out.mkdir(parents=True)
    hour, start = Hour(out), time.monotonic()
    demo(hour)
    use(hour, photos(hour))
    service(hour)
    site = ROOT / "_docs" / "tutorials" / "your_photos.html"
    hour.head("The site")
    if site.is_file():
        hour.see("A tutorial on the site", site.as_uri())
    else:
        hour.parts.append("<p>There is no site here: python scripts/build_site.py</p>")
    print(f"{hour.write()}: {(time.monotonic() - start) / 60:.0f} minutes", *hour.failed, sep="\n")
    return int(bool(hour.failed))


if __name__ == "__main__":
    sys.exit(main())
