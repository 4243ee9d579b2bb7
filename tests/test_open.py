"""`lora-mvp open`: the page of a run that is finished, goes on, has stopped, or is none."""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import browse
from PIL import Image

from lora_mvp.cli import main
from lora_mvp.config import load_config
from lora_mvp.run_page import see_run
from lora_mvp.train.loop import train
from lora_mvp.train.owner import claimed
from lora_mvp.train.runs import RunFolder

EVIL = "a disc <img src=x onerror=alert(1)> & <b>bold</b>"


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawings, small_run):
    """A finished run of seconds, with markup in a prompt and in the trigger."""
    out = tmp_path_factory.mktemp("a naïve run") / "my lora"
    settings = small_run(out, sample_prompts=["a disc", EVIL]) | {"data.trigger": "<i>zkr</i>"}
    train(load_config(overrides=settings), drawings, progress=False)
    return out


def opened(root, *more) -> str:
    assert main(["open", str(root), "--no-browser", *more]) == 0
    return (Path(more[1]) if more else root / "run.html").read_text(encoding="utf-8")


def cards(page: str) -> list[str]:
    return re.findall('<section id="(.*?)"', page)


def test_a_finished_run(run, drawings, capsys):
    page = opened(run)
    assert capsys.readouterr().out.strip() == f"wrote {run / 'run.html'}"
    assert cards(page) == ["samples", "curve", "elsewhere", "judged", "proof", "data", "settings"]
    assert "<img src=x" not in page and "<b>bold" not in page and "<i>zkr" not in page
    assert "&lt;i&gt;zkr&lt;/i&gt;" in page and "&lt;img src=x onerror" in page
    assert "diffusers" in page and "models/loras" in page and "&lt;lora:my lora:0.8&gt;" in page
    assert "<pre>from diffusers import StableDiffusionPipeline\n\npipe = " in page  # lines stay lines
    assert "script" not in page and not re.findall(r'(?:src|href)="https?:', page)
    links = [unquote(where) for where in re.findall('href="([^"#]+)"', page)]
    assert links and all((run / where).exists() for where in links)
    assert "my lora.safetensors" in links


def test_the_page_elsewhere_has_links_that_hold(run, tmp_path):
    page = opened(run, "--out", str(tmp_path / "deep" / "page.html"))
    links = [unquote(where) for where in re.findall('href="([^"#]+)"', page)]
    assert links and all((tmp_path / "deep" / where).resolve().exists() for where in links)


def test_another_file_is_not_overwritten(run, tmp_path, capsys):
    mine, page = tmp_path / "mk.py", tmp_path / "page.html"
    mine.write_text("print(1)")
    assert main(["open", str(run), "--no-browser", "--out", str(mine)]) == 2
    assert "mk.py is there and is no page of ours" in capsys.readouterr().err and mine.read_text() == "print(1)"
    assert opened(run, "--out", str(page)) == opened(run, "--out", str(page))


def test_a_run_that_goes_on_and_one_that_has_stopped(run, tmp_path):
    cut = shutil.copytree(run, tmp_path / "cut")
    for name in ("run.json", "cut.safetensors", "lora_adapter", "loss_curve.png"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    page = opened(cut)
    assert cards(page) == ["samples", "curve", "elsewhere", "data"]
    assert see_run(cut).progress.state == "stopped" and "--resume" in page and "checkpoint-6" in page
    with claimed(cut):
        assert see_run(cut).progress.state == "running"
        assert "--resume" not in opened(cut)
    (cut / "loss_history.csv").unlink()
    shutil.rmtree(cut / "samples")
    assert "curve" not in cards(opened(cut))  # nothing but its beginning is there


def test_a_certificate_of_other_files_is_not_shown(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "my lora")
    with open(other / "my lora.safetensors", "ab") as file:
        file.write(b"x")
    page = opened(other)
    assert "does not belong to the files" in page and "SHA-256" not in page and "lora-mvp finish" in page


def test_overwriting_a_run_takes_its_page_along(run, tmp_path, drawings, small_run):
    from lora_mvp.train.runs import run_files

    opened(run)
    assert RunFolder(run).page in run_files(RunFolder(run))


@pytest.mark.parametrize(
    "name, words", [("nowhere", "does not exist"), ("", "did you mean"), ("my lora/lora_adapter", "did you mean")]
)
def test_what_is_no_run(run, capsys, name, words):
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    assert main(["open", str(run.parent / name), "--no-browser"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    if "did you mean" in words:
        assert str(run) in said
    assert before == {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}


def test_a_damaged_record_is_named(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "damaged")
    (other / "run.json").write_text("{")
    assert main(["open", str(other), "--no-browser"]) == 2
    assert "run.json" in capsys.readouterr().err


def test_a_browser_is_opened_where_there_is_a_screen(run, monkeypatch):
    seen = []
    monkeypatch.setattr("webbrowser.open", seen.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["open", str(run)]) == 0 and not seen
    monkeypatch.setenv("DISPLAY", ":0")
    assert main(["open", str(run), "--no-browser"]) == 0 and not seen
    assert main(["open", str(run)]) == 0 and seen == [(run / "run.html").as_uri()]


def test_the_page_in_a_browser(run, tmp_path):
    """It fits a desk and a telephone, loads nothing, and every picture is one."""
    opened(run)
    with browse((run / "run.html").as_uri(), tmp_path) as page:
        page.wait("document.readyState == 'complete' && !!document.querySelector('#settings')")
        for width in (1200, 400):
            page.resize(width, 900)
            assert page.js("document.documentElement.scrollWidth") <= width
            assert page.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert page.js("document.images.length") >= 5  # two prompts at two steps, and the curve
            if shots := os.environ.get("SHOTS"):
                page.resize(width, page.js("document.documentElement.scrollHeight"))
                page.screenshot(Path(shots) / f"run-{width}.png")
                assert Image.open(Path(shots) / f"run-{width}.png").width == width
        assert not page.js("document.querySelectorAll('script').length")
