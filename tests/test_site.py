"""The way in for readers: README is short and true, the commands are all described, and the site's own checks can fail."""

import argparse
import ast
import inspect
import re
from pathlib import Path

import build_site  # scripts/build_site.py
import nbformat
import pytest
from nbdev import serve_drv
from nbdev.processors import FilterDefaults

from lora_mvp.cli import build_parser
from lora_mvp.config import load_config
from lora_mvp.models.miniatures import random_base
from lora_mvp.train.diagnosis import doctor

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The subcommands of the command line."""
    return next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_readme_is_short():
    assert len(README.split()) <= 900


def test_links_of_readme_work_on_the_page_of_the_package():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)


def test_the_settings_in_readme_are_taken_by_the_doctor(drawings, tmp_path, monkeypatch):
    """All of them but the base, which here is a small one of the same family: SD 1.5 would be a download."""
    monkeypatch.setattr(
        "lora_mvp.train.diagnosis.estimate_for", lambda config, device: None
    )  # of a large UNet; seconds
    (block,) = blocks("yaml")
    file = tmp_path / "config.yaml"
    file.write_text(block)
    base = random_base("sd1", tmp_path / "base")
    config = load_config(file, overrides={"training.pretrained_model": base})
    found = doctor(config, drawings, device="cpu", memory=64e9)
    assert found and not [finding.text for finding in found if finding.level == "error"]


def test_the_python_in_readme_calls_what_there_is():
    (block,) = blocks("python")
    names = {}
    for node in ast.parse(block).body:
        if isinstance(node, ast.ImportFrom):
            exec(ast.unparse(node), names)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert len(calls) >= 4
    for call in calls:
        signature = inspect.signature(names[call.func.id])
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


@pytest.mark.parametrize(
    "text", [README, (ROOT / "docs/guides/commands.md").read_text(encoding="utf-8")], ids=["README", "guide"]
)
def test_commands_and_options_in_the_texts_exist(text):
    typed = re.findall(r"(?m)^lora-mvp ([\w-]+)(.*)$", text) + re.findall(r"(?m)^\| `([\w-]+)` \| (.*?) \| ", text)
    assert len(typed) >= 5
    for name, rest in typed:
        have = {option for action in commands()[name]._actions for option in action.option_strings}
        assert set(re.findall(r"(?<!\S)\[?(--[\w-]+)", rest.split("#")[0])) <= have, name


def test_every_command_is_in_the_guide():
    text = (ROOT / "docs/guides/commands.md").read_text(encoding="utf-8")
    assert set(commands()) == set(re.findall(r"(?m)^\| `([\w-]+)` \|", text))


def test_every_extra_is_on_the_page_that_says_how_to_install():
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    extras = {name.replace("_", "-") for name in re.findall(r"(?m)^(\w+)_requirements *=", settings)}
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert "heic" in extras and extras <= set(re.findall(r"(?m)^\| `([\w-]+)` \|", text))


def test_a_long_name_in_a_table_may_be_folded():
    page = "<td>see <code>training.lora_rank</code>, 0.1</td><code>a_b</code><td><a href='a_b.html'>a_b</a></td>"
    folded = "<td>see <code>training.<wbr>lora_<wbr>rank</code>, 0.1</td>"
    assert build_site.foldable(page) == folded + page.partition("</td>")[2]


def test_a_broken_link_on_the_site_is_found(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "index.html").write_text('<a href="part/">a</a><a href="part/index.html#there">b</a><img src="data:,">')
    (tmp_path / "part/index.html").write_text(
        '<h1 id="there"></h1><a href="../index.html">c</a><a href="https://x.org">'
    )
    assert build_site.broken_links(tmp_path) == []
    (tmp_path / "part/index.html").write_text(
        f'<img src="gone.png"><a href="../index.html#gone">a</a><a href="{build_site.ADDRESS}gone.html">b</a>'
    )
    found = build_site.broken_links(tmp_path)
    assert len(found) == 4 and "part/index.html: gone.png" in found
    assert [line for line in found if line.startswith("index.html: part/index.html#there")]


def test_pages_stand_where_nbdev_says_and_link_to_each_other():
    assert build_site.place(ROOT / "nbs/1_data/09_manifest.ipynb").as_posix() == "1_data/manifest.html"
    assert build_site.place(ROOT / "docs/SERVICE.md").as_posix() == "SERVICE.html"
    assert build_site.place(ROOT / "setup.py") is None
    text = (
        "[a](../../docs/SERVICE.md#on-one-machine) [b](../../setup.py) [`x`](" + build_site.ADDRESS + "config.html#x)"
    )
    page = build_site.for_page(text, ROOT / "nbs/1_data/09_manifest.ipynb")
    assert page == f"[a](../SERVICE.html#on-one-machine) [b]({build_site.FILES}setup.py) [`x`](../config.html#x)"
    link = f"[`x`]({build_site.ADDRESS}config.html#x)"
    assert build_site.for_page(f"```python\ny: int  # of {link}\n```\n{link}", ROOT / "nbs/index.ipynb") == (
        "```python\ny: int  # of `x`\n```\n[`x`](config.html#x)"
    )
    with pytest.raises(SystemExit, match="no nbs/gone.md"):
        build_site.for_page("[a](../gone.md)", ROOT / "nbs/1_data/09_manifest.ipynb")


def test_what_stands_below_a_title_comes_to_the_site(tmp_path, monkeypatch):
    """nbdev alone drops it."""
    source, target = ROOT / "nbs/02a_screen.ipynb", tmp_path / "page.ipynb"
    title, _, opening = nbformat.read(source, 4).cells[1].source.split("\n\n")[:3]
    seen = []
    for read in (serve_drv.read_nb, build_site.title_apart):
        monkeypatch.setattr(serve_drv, "read_nb", read)
        serve_drv.exec_nb(source, target, FilterDefaults)
        cells = nbformat.read(target, 4).cells
        assert f"title: {title[2:]}" in cells[0].source
        seen.append(any(cell.source.startswith(opening[:30]) for cell in cells))
    assert seen == [False, True]
