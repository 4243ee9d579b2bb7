"""Curating: the decisions, the gallery over them, and a hand at work in JupyterLab."""

import concurrent.futures
import os

import numpy as np
import pytest
from browser import browse, wait_for
from lab import jupyterlab, run_all
from PIL import Image, ImageDraw

import lora_mvp.data.curator
from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.curator import PAGE, Curation, Curator, about, placeholder, select, thumbnail
from lora_mvp.data.manifest import Manifest, ManifestImage, read_manifest
from lora_mvp.data.overrides import Override, read_overrides, write_overrides
from lora_mvp.data.prepare import check_data, prepare_data

BAD = "<img src=x onerror=document.title='run'>"


def draw(file, k, side=96):
    """A picture unlike the others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(k)
    image = Image.new("RGB", (side, side), tuple(int(c) for c in rng.integers(60, 250, 3)))
    for _ in range(6):
        x, y, size = (int(n) for n in rng.integers(4, side // 2, 3))
        ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), tuple(int(c) for c in rng.integers(0, 255, 3)))
    image.save(file)


@pytest.fixture
def config(tmp_path):
    """Nine pictures: two too small, one under two names, one with a name that looks like HTML; and a broken file."""
    raw = tmp_path / "raw"
    for k in range(4):
        draw(raw / f"cat/{k}.png", k)
    draw(raw / f"dog/{BAD}.png", 4)
    for k in (5, 6):
        draw(raw / f"dog/{k}.png", k, side=32)
    draw(raw / "dog/7.png", 7)
    (raw / "dog/8.png").write_bytes((raw / "dog/7.png").read_bytes())
    (raw / "dog/broken.png").write_bytes(b"no picture")
    (raw / "cat/0.txt").write_text("a cat that sits")
    settings = {"raw_data_dir": raw, "processed_dir": tmp_path / "data", "image_size": 64, "min_resolution": 48}
    return load_config(overrides={f"data.{k}": v for k, v in (settings | {"blur_threshold": 0}).items()})


def item_of(curation, path):
    return next(item for item in curation.items if item.path == path)


def sources(manifest):
    return [row.source for row in manifest.images]


def test_what_cannot_be_decoded_cannot_be_kept(config):
    curation = Curation(prepare_data(config))
    assert [item.path for item in curation.items] == [
        *(f"cat/{k}.png" for k in range(4)),
        *(f"dog/{k}.png" for k in range(5, 9)),
        f"dog/{BAD}.png",
    ]


def test_prepare_data_does_what_was_decided(config):
    curation = Curation(prepare_data(config))
    curation.keep(item_of(curation, "dog/5.png"), True)
    curation.keep(item_of(curation, "cat/1.png"), False)
    curation.describe(item_of(curation, "cat/0.png"), "a cat\n that  runs ")
    curation.save()
    manifest = prepare_data(config)
    assert "dog/5.png" in sources(manifest) and "cat/1.png" not in sources(manifest)
    row = next(row for row in manifest.images if row.source == "cat/0.png")
    assert (row.caption, row.caption_source) == ("a cat that runs", "curated")
    again = Curation(manifest)
    assert again.unsaved() == set()
    for path in ("dog/5.png", "cat/1.png"):
        again.keep(item_of(again, path), None)
    again.describe(item_of(again, "cat/0.png"), "")
    again.save()
    assert read_overrides(config.data.processed_dir) == {}
    manifest = prepare_data(config)
    assert "dog/5.png" not in sources(manifest) and "cat/1.png" in sources(manifest)
    assert next(row for row in manifest.images if row.source == "cat/0.png").caption == "a cat that sits"


def test_it_can_be_curated_before_anything_is_written(config):
    curation = Curation(check_data(config))
    assert not config.data.processed_dir.exists()
    assert placeholder("cannot be opened") not in {thumbnail(item) for item in curation.items}
    curation.keep(item_of(curation, "cat/2.png"), False)
    curation.save()
    assert "cat/2.png" not in sources(prepare_data(config))


def test_filters(config):
    curation = Curation(prepare_data(config))

    def found(**filters):
        return {item.path for item in select(curation, **filters)}

    curation.keep(item_of(curation, "dog/5.png"), True)
    assert found(status="changed") == {"dog/5.png"}
    assert found(status="rejected") == {"dog/6.png", "dog/8.png"}
    assert found(status="accepted", label="dog") == {"dog/5.png", "dog/7.png", f"dog/{BAD}.png"}
    assert found(reason="too_small") == {"dog/5.png", "dog/6.png"}
    assert found(part="THAT SITS") == {"cat/0.png"}
    curation.save()
    curation.keep(item_of(curation, "dog/5.png"), None)
    assert found(status="changed") == {"dog/5.png"}


def test_what_another_program_decided_is_not_lost(config):
    curator = Curator(prepare_data(config))
    one, other = (item_of(curator.curation, f"cat/{k}.png") for k in (0, 1))
    curator.curation.keep(one, False)
    write_overrides(config.data.processed_dir, {other.sha256: Override(keep=False), "0" * 64: Override(caption="x")})
    curator.save()
    assert "changed by another program" in curator.message.value and "1 change not saved" in curator.message.value
    assert one.sha256 not in read_overrides(config.data.processed_dir)
    assert curator.cards[1].choice.value == "reject"
    curator.save()
    assert set(read_overrides(config.data.processed_dir)) == {one.sha256, other.sha256, "0" * 64}
    (config.data.processed_dir / "overrides.json").write_text("{")
    curator.keep_shown(False)
    curator.save()
    assert "is not a list of decisions" in curator.message.value
    assert (config.data.processed_dir / "overrides.json").read_text() == "{"


def test_names_and_captions_are_text(config):
    curator = Curator(prepare_data(config))
    card = next(card for card in curator.cards if BAD in card.item.path)
    assert "&lt;img src=x" in card.about.value and "<img" not in card.about.value
    hostile = item_of(curator.curation, "cat/0.png")._replace(label=BAD, path=f'a/"{BAD}', caption=BAD)
    assert "<img" not in about(hostile, curator.curation)


def test_pictures_come_from_the_raw_folder_or_the_stored_file(config):
    item = item_of(Curation(prepare_data(config)), "cat/0.png")
    seen = thumbnail(item)
    item.files[0].unlink()
    stored = thumbnail(item)
    item.files[1].unlink()
    assert len({seen, stored, thumbnail(item)}) == 3


def test_a_manifest_cannot_show_files_from_elsewhere(config):
    manifest = prepare_data(config)
    secret = config.data.raw_data_dir.parent / "secret.png"
    draw(secret, 9)
    for path in ("../secret.png", str(secret)):
        row = manifest.images[0].model_copy(update={"source": path, "file": path})
        other = manifest.rejected[0].model_copy(update={"path": path})
        curation = Curation(manifest.model_copy(update={"images": [row], "rejected": [other]}))
        assert [item.files for item in curation.items] == [[], []]


def test_a_plain_list_has_nothing_to_curate(tmp_path):
    draw(tmp_path / "a.png", 0)
    (tmp_path / "list.json").write_text('[{"image": "a.png", "caption": "a", "split": "train"}]')
    with pytest.raises(LoraMvpError) as e:
        Curator(read_manifest(tmp_path / "list.json"))
    assert e.value.code == "plain_list"


def test_of_2000_pictures_a_page_is_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(lora_mvp.data.curator, "thumbnail", lambda item: opened.append(item.path) or b"")
    size = {"width": 9, "height": 9, "sha256": "", "split": "train"}
    rows = [
        ManifestImage(
            file="", source=f"a/{k:04}.png", label=f"l{k % 2}", caption=f"number {k}", source_sha256=f"{k:064}", **size
        )
        for k in range(2000)
    ]
    curator = Curator(Manifest(config={"raw_data_dir": "raw"}, images=rows, folder=tmp_path))
    steps = [
        lambda: None,
        lambda: curator.pages.next.click(),
        lambda: setattr(curator.pages.page, "value", 84),
        lambda: setattr(curator.filters.label, "value", "l1"),
        lambda: setattr(curator.filters.part, "value", "number 19"),
    ]
    for step in steps:
        step()
        concurrent.futures.wait(curator.pictures.loading)
        assert len(opened) <= PAGE and len(curator.cards) == PAGE
        opened.clear()
    assert (
        curator.pages.page.value == 1 and len(curator.pages.chosen) == 56
    )  # 19, 190 to 199, 1900 to 1999; the odd ones
    curator.pages.back.click()
    curator.keep_shown(False)
    concurrent.futures.wait(curator.pictures.loading)
    assert opened == [] and len(curator.curation.unsaved()) == PAGE


CELL = """from lora_mvp.data.curator import Curator
from lora_mvp.data.manifest import read_manifest

curator = Curator(read_manifest("data/manifest.json"))
curator.view"""


@pytest.fixture
def lab(config, tmp_path):
    """The address of a JupyterLab with a notebook that shows the gallery."""
    with jupyterlab(tmp_path, [CELL]) as address:
        yield address


CARDS = "document.querySelector('.widget-gridbox').children"


def test_a_hand_at_work_in_jupyterlab(lab, config, tmp_path):
    manifest = prepare_data(config)
    overrides = config.data.processed_dir / "overrides.json"
    hashes = {item.path: item.sha256 for item in Curation(manifest).items}
    wanted = {
        hashes["dog/5.png"]: Override(keep=True, caption="a small dog <b>"),
        hashes["cat/1.png"]: Override(keep=False),
    }
    with browse(lab, tmp_path / "chromium") as page:
        run_all(page)
        page.wait(f"document.querySelector('.widget-gridbox') && {CARDS}.length == 9")
        page.wait(f"[...{CARDS}].every(e => e.querySelector('img')?.naturalWidth > 0)")
        page.wait(
            "[...document.querySelectorAll('.widget-gridbox img')].filter(e => e.naturalWidth != 192).length == 9"
        )
        small = f"[...{CARDS}].find(e => e.innerText.includes('5.png'))"
        cat = f"[...{CARDS}].find(e => e.innerText.includes('1.png'))"

        def button(card, word):
            return f"[...{card}.querySelectorAll('button')].find(e => e.innerText.trim() == '{word}')"

        selects = "document.querySelectorAll('.widget-dropdown select')"
        assert page.js(f"[...{selects}].map(e => e.selectedOptions[0]?.innerText)") == ["all"] * 3
        choose = "(e => { e.value = e.options[INDEX].value; e.dispatchEvent(new Event('change', {bubbles: true})) })"
        page.js(choose.replace("INDEX", "2") + f"({selects}[2])")
        page.wait(f"{CARDS}.length == 2 && {selects}[2].selectedOptions[0].innerText.startsWith('too_small')")
        page.js(choose.replace("INDEX", "0") + f"({selects}[2])")
        page.wait(f"{CARDS}.length == 9")
        assert page.js(f"{small}.innerText").count("rejected") == 1
        page.click(button(small, "keep"))
        page.wait(f"{small}.innerText.includes('not saved') && {small}.innerText.includes('accepted')")
        page.click(button(cat, "reject"))
        page.wait(f"{cat}.innerText.includes('rejected')")
        page.click(f"{small}.querySelector('textarea')")
        page.wait(f"document.activeElement == {small}.querySelector('textarea')")
        page.type("a small dog <b>")
        page.wait(f"{small}.querySelector('textarea').value == 'a small dog <b>'")
        assert not overrides.exists()
        page.click(button("document", "save"))
        wait_for(overrides.exists)
        page.wait("document.body.innerText.includes('Saved in overrides.json')")

        def saved():  # ipykernel may hand over the caption after the click; then the button can be pressed again
            if page.js(f"!{button('document', 'save')}.disabled"):
                page.click(button("document", "save"))
            return read_overrides(config.data.processed_dir) == wanted

        wait_for(saved)
        if "LORA_MVP_SCREENSHOT" in os.environ:
            page.js("document.querySelector('.widget-dropdown').scrollIntoView()")
            page.screenshot(os.environ["LORA_MVP_SCREENSHOT"])
        assert page.js("document.title") != "run"
        assert page.js("document.querySelectorAll('.widget-gridbox [onerror]').length") == 0
    assert read_overrides(config.data.processed_dir) == wanted
    again = prepare_data(config)
    assert "dog/5.png" in sources(again) and "cat/1.png" not in sources(again)
