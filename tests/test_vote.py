"""A blind vote in a real browser, by a process that is killed on the way."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from browser import browse, process, wait_for
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from lora_mvp.cli import main
from lora_mvp.config import AppConfig, load_config
from lora_mvp.errors import LoraMvpError
from lora_mvp.eval.ballots import Ballot
from lora_mvp.eval.booth import hold_vote, open_box
from lora_mvp.eval.extractors import find_extractor
from lora_mvp.eval.scores import score
from lora_mvp.models.base import load_base
from lora_mvp.models.kohya import write_kohya
from lora_mvp.models.miniatures import random_lora

N, COLOURS = 9, ("crimson", "royalblue")
HOSTILE = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder as an evaluation leaves it, of discs whose files say who drew them."""
    out, images = tmp_path_factory.mktemp("evaluation"), []
    prompts = [f"a disc, number {k}" for k in range(N - 1)] + [HOSTILE]
    for side, colour in zip(("base", "lora"), COLOURS):
        (out / "samples" / side).mkdir(parents=True)
        for k in range(N):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((8, 8 + k, 40 + 2 * k, 52), fill=colour)
            info = PngInfo()
            info.add_text("lora_mvp", json.dumps({"adapter": side}))
            image.save(out / "samples" / side / f"{k}.png", pnginfo=info)
            images.append(image)
    metrics = score(find_extractor("tiny-clip"), prompts, images[:N], images[N:], images[:3])
    for k, sample in enumerate(metrics.samples):
        sample.seed, sample.base_file, sample.lora_file = k, f"samples/base/{k}.png", f"samples/lora/{k}.png"
    (out / "metrics.json").write_text(metrics.model_dump_json())
    return out


def address_in(text):
    return re.search(r"http://127\.0\.0\.1:\S+", text)[0]


def marks(folder):
    return Ballot.model_validate_json((folder / "votes" / "votes.json").read_text()).marks


def test_no_vote_is_lost_and_the_page_tells_nothing(finished, tmp_path, capsys):
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    command = [sys.executable, "-m", "lora_mvp.cli", "vote", str(finished)]
    with process(command, stdout=subprocess.PIPE, text=True) as running:
        address = address_in(running.stdout.readline())
        token = re.search('name="token" value="(.*?)"', ask(address).read().decode())[1]
        for k in (0, 1):
            ask(address + "vote", f"token={token}&pair={k}&mark=left".encode())
        running.kill()
    assert marks(finished) == ["left"] * 2 + [None] * (N - 2)
    said, ended = [], []

    def hold():
        ended.append(hold_vote(open_box(AppConfig(), finished), say=said.append))

    threading.Thread(target=hold, daemon=True).start()  # where the page fails, nobody waits for it
    address = address_in(wait_for(lambda: said)[0])
    with browse(address, tmp_path / "chromium") as page:
        vote_with_keys(page)
        assert marks(finished)[2:] == ["right", "left", "none"] + ["right"] * 4 and not ended
        page.click("document.querySelector('form button')")
        page.wait("!!document.body?.innerText.includes('What was voted')", 60)
        assert "sign test p" in page.js("document.body.innerText") and page.js("document.title") == "Blind vote"
    (found,) = wait_for(lambda: ended)
    assert (found.n, found.neither, found.prefer_a + found.prefer_b) == (N, 1, N - 1)
    assert main(["vote", str(finished)]) == 0  # it is over: no page, the result
    assert f"{found.verdict}: {found.why}" in capsys.readouterr().out


def vote_with_keys(page):
    """From the third pair on, on a phone; nothing that can be seen says who drew what."""
    page.resize(400, 800)
    for k in range(2, N):
        page.wait(f"document.querySelector('[name=pair]')?.value == '{k}' && document.readyState == 'complete'", 60)
        seen = page.js("document.documentElement.outerHTML + location.href + document.title")
        assert not re.search("base|lora|crimson|royalblue|samples|seed", seen, re.IGNORECASE)
        assert page.js("[...document.images].every(i => i.naturalWidth == 64)")
        assert page.js("document.documentElement.scrollWidth") <= 400
        if k == 5:  # a wrong key, and back
            page.press("1")
            page.wait("document.querySelector('[name=pair]')?.value == '6' && document.readyState == 'complete'", 60)
            page.press("Backspace")
            page.wait("!!document.querySelector('#left.given') && document.readyState == 'complete'", 60)
        page.press({3: "1", 4: " "}.get(k, "2"))
    page.wait("!!document.body?.innerText.includes('9 of 9 pairs are voted on')", 60)
    assert page.js("document.title") == "The vote"


def test_left_with_a_key_and_looked_at_again(finished, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(finished, other, ignore=shutil.ignore_patterns("votes"))
    assert main(["vote", str(other), "--result"]) == 2 and "nobody has voted" in capsys.readouterr().err
    command = [sys.executable, "-m", "lora_mvp.cli", "vote", str(other)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    with process(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as running:
        address_in(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0 and "the votes are kept" in running.stdout.read()
    assert main(["vote", str(other), "--result"]) == 0
    assert "insufficient_data: 0 of 9 pairs are voted on" in capsys.readouterr().out
    open_box(AppConfig(), other).mark(0, "left")
    for file in other.glob("samples/lora/*.png"):
        Image.new("RGB", (64, 64), "green").save(file)
    assert main(["vote", str(other)]) == 2 and "are of other pictures" in capsys.readouterr().err


def test_a_file_that_names_no_base_is_voted_on_with_one(tmp_path):
    lora = random_lora(load_base("tiny"), lora_targets="attention", text_encoder_learning_rate=None, by=0.3)
    save_file(load_file(write_kohya(lora, tmp_path / "own.safetensors")), file := tmp_path / "theirs.safetensors")
    config = load_config(
        overrides=["evaluation.prompts=[a cat]", "evaluation.num_samples=1", "evaluation.num_inference_steps=2"]
    )
    with pytest.raises(LoraMvpError, match="name one with --base"):
        open_box(config, file, "base", tmp_path / "out")
    (pair,) = open_box(config, file, "base", tmp_path / "out", base="tiny").ballot.pairs
    assert pair.pixels[0] != pair.pixels[1]
