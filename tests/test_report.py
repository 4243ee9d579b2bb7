"""The data report in a real browser, and what a hostile manifest cannot make it do."""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace as Stand

import numpy as np
import pytest
from PIL import Image

from lora_mvp.config import LoraMvpError, TrainingConfig
from lora_mvp.data.charts import METRICS, WIDTH, histogram
from lora_mvp.data.galleries import PER_REASON
from lora_mvp.data.report import rejected_csv, report_html, split_sheet, write_report
from lora_mvp.html import POLICY
from lora_mvp.words import as_words

HOSTILE = [
    "<img src=x onerror=\"top.document.title='run'\">",
    "</style></title><script>top.document.title='run'</script>",
    '" onload="top.document.title=\'run\'" x="',
    "' onclick='x' \N{GRINNING FACE} \N{RIGHT-TO-LEFT OVERRIDE}gnp.exe",
    "--></svg><svg onload=top.document.title='run'>",
    "&lt;b&gt; broken \udcff byte",
    "a_name_without_a_space_" * 12,
]
TRAINING = TrainingConfig(resolution=64, batch_size=4, gradient_accumulation=2, max_train_steps=100)


def reason(code, severity="reject", value=None, threshold=None, detail=""):
    return Stand(code=code, severity=severity, value=value, threshold=threshold, detail=detail)


def facts(path, width=90, height=60):
    return Stand(width=width, height=height, sharpness=50.0, brightness=99.0, pixel_sha256=path)


def manifest_of(images, rejected=(), ignored=(), folder=None, **config):
    content = {
        "images": list(images),
        "rejected": list(rejected),
        "ignored": list(ignored),
        "folder": folder,
        "notes": [],
    }
    found = Stand(**content, config={"min_resolution": 32, "blur_threshold": 40.0, "image_size": 64} | config)
    found.rows = lambda split: [row for row in found.images if row.split == split]
    found.path_of = lambda row: folder / row.file
    return found


def image_row(source, label="cat", split="train", caption="a cat", group="", reasons=()):
    row = {"file": "none.png", "source": source, "label": label, "split": split, "caption": caption, "group": group}
    return Stand(**row, width=64, height=64, repeats=1, reasons=list(reasons), facts=facts(source))


def refused(path, *reasons, label="cat", status="rejected", **more):
    about = {"facts": None, "reason": reasons[0].code if reasons else None} | more
    return Stand(path=path, label=label, status=status, reasons=list(reasons), **about)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Twenty pictures with plain names."""
    raw, rng = tmp_path_factory.mktemp("report") / "raw", np.random.default_rng(0)
    (raw / "cat").mkdir(parents=True)
    for k in range(20):
        pixels = rng.integers(0, 255, (6 + k, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC).save(raw / f"cat/{k}.png")
    return raw


@pytest.fixture(scope="module")
def manifest(raw):
    """Every text that a manifest can hold is hostile somewhere."""
    images = [image_row(f"cat/{k}.png", split="val" if k % 5 == 4 else "train", group=f"g{k // 2}") for k in range(20)]
    for row, bad in zip(images, HOSTILE):
        row.caption, row.label = bad, bad
        row.reasons = [reason("blurry", "warn", 30.0, 40.0, bad)]
    rejected = [refused(bad, reason("unreadable", detail=bad), label=bad) for bad in HOSTILE]
    rejected += [
        refused("cat/3.png", reason("duplicate", detail="the same pixels as cat/4.png"), facts=facts("cat/4.png"))
    ]
    rejected += [refused("cat/5.png", reason(HOSTILE[0], value=1.0, threshold=2.0), facts=facts("x", 20, 500))]
    ignored = [refused(bad, reason("hidden", detail=bad), status="ignored") for bad in HOSTILE]
    return manifest_of(images, rejected, ignored, raw.parent)


@pytest.fixture(scope="module")
def page(manifest, raw):
    return report_html(manifest, raw, TRAINING)


class Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes


def test_the_page_refers_to_nothing_outside_itself(page):
    found = Tags(page)
    allowed = "html head meta title style body main header nav section h1 h2 h3 p a b i div span small bdi ul li "
    allowed += "figure img figcaption svg rect path text table tr th td"
    assert found.tags <= set(allowed.split())
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name.startswith("on")}
    assert all(value.startswith("data:image/jpeg;base64,") for name, value in found.attributes if name == "src")
    assert all(value.startswith("#") for name, value in found.attributes if name == "href")
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert POLICY in page


PROBE = """<!DOCTYPE html><title>quiet</title><body>FRAMES<script>
onload = () => {
  const look = frame => {
    const page = frame.contentDocument, images = [...page.images], root = page.documentElement;
    return {width: root.clientWidth, scroll: root.scrollWidth, images: images.length,
      broken: images.filter(image => !image.naturalWidth).length,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
      scripts: page.scripts.length, styles: page.querySelectorAll("style").length,
      handlers: page.querySelectorAll("[onerror],[onload],[onclick]").length,
      svg: page.querySelectorAll("svg").length, text: page.body.textContent,
      background: getComputedStyle(page.body).backgroundColor,
      cut: [...page.querySelectorAll("section")].filter(e => e.scrollWidth > e.clientWidth).length}
  };
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.body.textContent = JSON.stringify({title: document.title, found});
};
</script>"""


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    """What Chromium makes of the page: on a phone and a desk without the policy that forbids scripts, then with it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None and "CI" not in os.environ:
        pytest.skip("Chromium is not installed")
    assert browser, "on CI Chromium must be there: apt-get install chromium"
    folder = tmp_path_factory.mktemp("chromium")
    bare = re.sub("<meta http-equiv=[^>]*>", "", page)
    assert POLICY not in bare
    frame = '<iframe style="width:{}px;height:800px;border:0" srcdoc="{}"></iframe>'
    views = [(390, bare), (1280, bare), (1280, page)]
    frames = "".join(frame.format(width, html.escape(view)) for width, view in views)
    (folder / "probe.html").write_text(PROBE.replace("FRAMES", frames), encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --virtual-time-budget=4000"
    command = [
        browser,
        *quiet.split(),
        f"--user-data-dir={folder / 'user'}",
        "--dump-dom",
        (folder / "probe.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.S)
    assert body, done.stderr[-2000:]
    return json.loads(html.unescape(body[1]))


def test_it_fits_a_phone_and_a_desk(seen):
    phone, desk, _ = seen["found"]
    assert (phone["width"], desk["width"]) == (390, 1280)
    for view in (phone, desk):
        assert view["scroll"] <= view["width"]
        assert view["cut"] == 0


def test_its_pictures_are_there_and_nothing_is_fetched(seen, page):
    for view in seen["found"]:
        assert view["images"] == page.count("<img ") > 20
        assert (view["broken"], view["fetched"]) == (0, 0)
        assert (view["svg"], view["styles"]) == (4, 1)
        assert view["background"] != "rgba(0, 0, 0, 0)"


def test_hostile_names_are_text(seen):
    assert seen["title"] == "quiet"
    for view in seen["found"]:
        assert (view["scripts"], view["handlers"]) == (0, 0)
        for bad in HOSTILE:
            assert as_words(bad) in view["text"]


def test_files_are_the_same_bytes_wherever_they_lie(manifest, raw, tmp_path):
    shutil.copytree(raw, tmp_path / "elsewhere")
    write_report(manifest, raw, tmp_path / "a", TRAINING)
    write_report(manifest, tmp_path / "elsewhere", tmp_path / "b", TRAINING)
    names = ["contact_train.png", "contact_val.png", "rejected.csv", "report.html"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(raw.parent) not in (tmp_path / "a/report.html").read_text(encoding="utf-8")


def test_counts_add_up_and_the_arithmetic_stands_there(page):
    counts = [int(n) for n in re.findall(r"<div><b>(\d+)</b>", page)]
    assert counts == [36, 20, 9, 7] and counts[0] == sum(counts[1:])
    assert "4 batches / 2" in page and "100 steps / 2" in page


def test_only_pictures_inside_the_raw_folder_are_shown(raw, tmp_path):
    secret = raw.parent / "secret.png"
    shutil.copy(raw / "cat/0.png", secret)
    for path in ("../secret.png", str(secret), "cat/../../secret.png"):
        row = image_row(path)
        row.file = path
        page = report_html(manifest_of([row], [refused(path, reason("blurry"), facts=facts("y"))], folder=raw), raw)
        assert "<img" not in page
    (raw / "link.png").symlink_to(secret)
    assert "<img" not in report_html(manifest_of([image_row("link.png")], folder=tmp_path), raw)
    (raw / "link.png").unlink()


def test_a_file_that_could_not_be_decoded_is_not_opened_again(raw, monkeypatch):
    opened = []
    monkeypatch.setattr("lora_mvp.data.galleries.open_rgb", lambda path: opened.append(path))
    assert "cannot be shown" in report_html(manifest_of([], [refused("cat/0.png", reason("unreadable"))]), raw)
    assert opened == []


def test_galleries_are_capped(raw):
    small = [refused(f"cat/{k % 20}.png", reason("too_small", value=k), facts=facts(f"{k}")) for k in range(500)]
    images = [image_row(f"cat/{k % 20}.png") for k in range(3000)]
    page = report_html(manifest_of(images, small, folder=raw), raw)
    assert page.count('<span class="badge rejected">') == PER_REASON
    assert f"and {500 - PER_REASON} more" in page and "and 2,952 more" in page
    assert len(page) < 1_000_000


def test_pictures_that_are_gone_leave_a_report(tmp_path):
    found = manifest_of([image_row("cat/0.png"), image_row("cat/1.png", split="val")], folder=tmp_path)
    write_report(found, tmp_path / "raw", tmp_path / "report")
    assert split_sheet(found, "train", 4, 32, 10).size == (40, 40)


def test_a_report_never_goes_into_the_raw_folder(manifest, raw):
    before = sorted(raw.rglob("*"))
    for place in (raw, raw / "cat", raw / "cat" / ".." / "new"):
        with pytest.raises(LoraMvpError) as caught:
            write_report(manifest, raw, place)
        assert caught.value.code == "folders_overlap"
    assert sorted(raw.rglob("*")) == before


def test_no_label_of_an_axis_is_cut_off():
    shown = histogram(METRICS[0], [10.0, 1390.0, 1400.0], [], [256.0])
    places = re.findall(r'<text x="([0-9.]+)" y="157"[^>]*>([^<]*)<', shown)
    assert "1,400" in dict((label, x) for x, label in places)
    assert all(4 * len(label) <= float(x) <= WIDTH - 4 * len(label) for x, label in places)


def test_a_spreadsheet_runs_nothing():
    names = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", 'a,"b"\nc', "plain"]
    found = manifest_of([], [refused(name, reason("unreadable", detail=name), label=name) for name in names])
    table = list(csv.DictReader(io.StringIO(rejected_csv(found))))
    for row, name in zip(table, names, strict=True):
        for text in (row["path"], row["label"], row["detail"]):
            assert text == (name if name in names[-2:] else f"'{name}")
    assert list(table[0]) == ["path", "label", "status", "code", "severity", "value", "threshold", "detail"]


def test_odd_numbers_do_not_stop_it(raw):
    odd = image_row("cat/0.png")
    odd.facts.sharpness, odd.facts.brightness = float("nan"), float("inf")
    flat = image_row("cat/1.png")
    flat.facts.height = 0
    page = report_html(manifest_of([odd, flat], folder=raw, min_resolution="x", blur_threshold=None), raw)
    assert "nan" not in page.lower().split("<style>")[0] and page.count("<svg") == 2
