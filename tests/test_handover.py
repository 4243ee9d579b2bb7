"""Data for other trainers: what a reader with its own rules finds in the folders that export_data wrote."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.handover import export_data, place_of, read_back
from lora_mvp.data.images import open_rgb
from lora_mvp.data.manifest import Manifest, ManifestImage, manifest_schema, read_manifest, rows_of_list
from lora_mvp.data.prepare import prepare_data

FORMS = ("hf", "kohya")


def drawing(seed: int, mode: str = "RGB", size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Blocks of random colours, different for every seed."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.NEAREST).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(size))
    return image


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """A manifest of raw files with names, kinds and captions that other trainers stumble over."""
    root = tmp_path_factory.mktemp("awkward")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    files = [  # place, mode, true format, how it is written, caption beside it
        ("test/a.png", "RGB", "PNG", {}, 'quotes " and \\ and {braces}'),
        ("test/a.jpg", "RGB", "JPEG", {}, "one\u2028two\u0085three"),
        ("test/a.webp", "RGB", "WEBP", {"lossless": True}, "🐈‍⬛ grüße 猫"),
        ("test/turned.jpg", "RGB", "JPEG", {"exif": sideways}, None),
        ("__cache__/clear.png", "RGBA", "PNG", {}, None),
        ("__cache__/__x.tif", "RGB", "TIFF", {}, None),
        ("__cache__/grey.gif", "L", "GIF", {}, None),
        ("Validation/jpeg inside.png", "RGB", "JPEG", {}, None),
        ("Validation/con.png", "L", "PNG", {}, None),
        ("validation/con.png", "RGB", "PNG", {}, None),
        ("validation/100% #1 [x] 'y'.bmp", "RGB", "BMP", {}, "a, b, c"),
        ("emoji 🐈/" + "ü" * 100 + ".png", "RGB", "PNG", {}, None),
        ("emoji 🐈/metadata.png", "CMYK", "JPEG", {}, None),
        (b"emoji \xf0\x9f\x90\x88/caf\xe9.png", "RGB", "PNG", {}, None),  # Latin-1, no UTF-8
    ]
    for seed, (place, mode, kind, how, caption) in enumerate(files):
        path = root / "raw" / os.fsdecode(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            drawing(seed, mode).save(file, kind, **how)
        if caption:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        if place == "test/a.png":  # the three pictures named `a` share one caption file in the raw folder as well
            path.with_suffix(".txt").rename(path.with_suffix(".caption"))
    values = {"raw_data_dir": root / "raw", "processed_dir": root / "data", "blur_threshold": 0, "min_resolution": 32}
    prepare_data(load_config(overrides={f"data.{key}": value for key, value in values.items()}), copy=False)
    manifest = read_manifest(root / "data" / "manifest.json")
    assert len(manifest.images) == len(files) and manifest.rows("val")
    return manifest


def pixels(image: Image.Image) -> bytes:
    return image.tobytes() + repr(image.size).encode()


def expected(manifest: Manifest) -> list[tuple]:
    """What every reader must find: split, caption and pixels of each picture."""
    rows = manifest.images
    return sorted((row.split, row.caption, pixels(open_rgb(manifest.path_of(row)))) for row in rows)


def plainly_opened(path: Path) -> Image.Image:
    """A picture as a reader sees it that knows nothing of orientation, transparency and profiles."""
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.fixture(params=["drawings", "awkward"])
def manifest(request):
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, Manifest) else read_manifest(found)


def test_hf_has_a_line_for_every_picture_and_a_picture_for_every_line(manifest, tmp_path):
    out = export_data(manifest, "hf", tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"train", "val"}
    found = []
    for split in out.iterdir():
        lines = [json.loads(line) for line in (split / "metadata.jsonl").read_bytes().split(b"\n")[:-1]]
        assert len({tuple(line) for line in lines}) == 1, "every line has the same columns"
        assert {line["file_name"] for line in lines} == {path.name for path in split.iterdir()} - {"metadata.jsonl"}
        assert len(lines) == len(list(split.iterdir())) - 1
        found += [(split.name, line["text"], pixels(plainly_opened(split / line["file_name"]))) for line in lines]
        labels = sorted((line["label"], line["source"]) for line in lines)
        assert labels == sorted((row.label, row.source) for row in manifest.rows(split.name))
    assert sorted(found) == expected(manifest)


def test_kohya_finds_every_picture_with_its_caption(manifest, tmp_path):
    """The rules of sd-scripts: library/config_util.py and library/train_util.py."""
    out = export_data(manifest, "kohya", tmp_path / "out")
    found, listed = [], 0
    for folder in out.glob("*/*"):
        repeats, _, label = folder.name.partition("_")
        assert repeats == "1" and label
        for path in folder.iterdir():
            if path.suffix in (".png", ".jpg", ".jpeg", ".webp", ".bmp"):
                lines = Path(os.path.splitext(path)[0] + ".txt").read_text(encoding="utf-8").split("\n")
                assert len(lines) == 2 and not lines[1]
                found.append((folder.parent.name, lines[0].strip(), pixels(plainly_opened(path))))
            listed += 1
    assert sorted(found) == expected(manifest)
    assert listed == 2 * len(found)


def test_the_datasets_library_loads_every_picture(manifest, tmp_path):
    datasets = pytest.importorskip("datasets")
    out = export_data(manifest, "hf", tmp_path / "out")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    splits = {"train": "train", "validation": "val"}
    rows = [(splits[name], row) for name in loaded for row in loaded[name]]
    assert sorted((name, row["text"], pixels(row["image"].convert("RGB"))) for name, row in rows) == expected(manifest)
    assert sorted(row["label"] for _, row in rows) == sorted(row.label for row in manifest.images)


@pytest.mark.parametrize("to", FORMS)
def test_prepared_pictures_go_out_byte_for_byte_and_as_copies(drawings, tmp_path, to):
    manifest = read_manifest(drawings)
    before = {row.file: manifest.path_of(row).read_bytes() for row in manifest.images}
    out = export_data(manifest, to, tmp_path / "out")
    files = [out / file for file in read_back(out, to)]
    assert sorted(path.read_bytes() for path in files) == sorted(before.values())
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in files)
    for path in files:
        path.write_bytes(b"changed")
    assert before == {row.file: manifest.path_of(row).read_bytes() for row in manifest.images}


@pytest.mark.parametrize("to", FORMS)
def test_the_same_manifest_gives_the_same_files(awkward, tmp_path, to):
    trees = []
    for name in ("one", "two"):
        out = export_data(awkward, to, tmp_path / name)
        trees.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert trees[0] == trees[1]


@pytest.mark.parametrize("to", FORMS)
def test_file_names_fit_every_system(awkward, tmp_path, to):
    out = export_data(awkward, to, tmp_path / "out")
    paths = [path.relative_to(out) for path in out.rglob("*")]
    assert len({path.as_posix().casefold() for path in paths}) >= len([p for p in paths if (out / p).is_file()])
    for part in {part for path in paths for part in path.parts}:
        assert len(part.encode()) <= 255
        assert not set(part) & set('\\/:*?"<>|') and part.isprintable() and part == part.strip(" .")
        assert part.split(".")[0].lower() not in ("con", "nul", "aux", "prn")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.sampled_from(["a", "A", "a.b", ".a", "nul", "ä", "ä"])), max_size=12)
)
def test_no_two_pictures_get_one_name(pairs):
    same = {"source": "", "caption": "", "split": "train", "width": 1, "height": 1, "sha256": ""}
    rows = [ManifestImage(file=f"{k}/{stem}.png", label=label, **same) for k, (label, stem) in enumerate(pairs)]
    for to in FORMS:
        taken = defaultdict(set)
        assert len({place_of(row, to, taken).casefold() for row in rows}) == len(rows)


def listed(folder: Path, *rows: dict) -> Manifest:
    return Manifest(images=rows_of_list(list(rows), folder), folder=folder)


@pytest.mark.parametrize("to", FORMS)
def test_odd_captions_and_missing_labels(tmp_path, to):
    for name in ("a", "b"):
        drawing(ord(name)).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "caption": "x", "split": "train"} for name in "ab"]
    manifest = listed(tmp_path, *rows)
    for k, caption in enumerate(["", "two\nlines"]):  # a manifest that somebody else wrote
        manifest.images[k] = manifest.images[k].model_copy(update={"caption": caption})
    out = export_data(manifest, to, tmp_path / "out")
    assert sorted(read_back(out, to).values()) == [[""], ["two lines"]]
    assert not (out / "val").exists()
    if to == "kohya":
        assert (out / "train" / "1_unlabelled" / "a.txt").read_bytes() == b"\n"


def test_a_changed_or_missing_file_is_named_and_nothing_is_left(tmp_path):
    for name in ("a", "b"):
        drawing(ord(name)).save(tmp_path / f"{name}.png")
    manifest = listed(tmp_path, *({"image": f"{name}.png", "caption": "x", "split": "train"} for name in "ab"))
    for spoil, code in [(lambda path: path.write_bytes(b"x"), "image_changed"), (os.remove, "manifest_file_gone")]:
        spoil(tmp_path / "b.png")
        with pytest.raises(LoraMvpError, match=r"b\.png") as caught:
            export_data(manifest, "hf", tmp_path / "out")
        assert caught.value.code == code
        assert not {path.name for path in tmp_path.iterdir()} - {"a.png", "b.png"}


def test_a_disk_that_refuses_leaves_nothing(drawings, tmp_path):
    """Files may grow to 200 bytes only: a real error of the operating system in the middle of the work."""
    resource = pytest.importorskip("resource")
    assert resource
    code = (
        "import resource, sys\nfrom lora_mvp.data.manifest import read_manifest\nfrom lora_mvp.data.handover import export_data\n"
        "manifest = read_manifest(sys.argv[1])\nresource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        "try:\n    export_data(manifest, 'kohya', sys.argv[2])\nexcept Exception as e:\n    print(e.code, e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, drawings, tmp_path / "out"], capture_output=True, text=True, timeout=180
    )
    assert done.stdout.startswith("not_writable cannot write to"), done
    assert not list(tmp_path.iterdir())


def test_only_a_new_or_empty_folder_is_taken(drawings, tmp_path):
    manifest = read_manifest(drawings)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export_data(manifest, "kohya", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read_back(tmp_path / "empty", "kohya")
    (tmp_path / "file").write_text("mine")
    for used in ("empty", "link", "file"):
        with pytest.raises(LoraMvpError) as caught:
            export_data(manifest, "hf", tmp_path / used)
        assert caught.value.code == "output_in_use"
    assert (tmp_path / "file").read_text() == "mine"
    raw = drawings.parent.parent / "raw"
    with pytest.raises(LoraMvpError) as caught:
        export_data(manifest, "hf", raw / "export")
    assert caught.value.code == "folders_overlap" and not (raw / "export").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]


@pytest.mark.parametrize("spoil", ["line", "picture", "caption", "twice", "root"])
@pytest.mark.parametrize("to", FORMS)
def test_reading_back_notices(drawings, tmp_path, to, spoil):
    out = export_data(read_manifest(drawings), to, tmp_path / "out")
    picture = out / next(iter(read_back(out, to)))
    lines = picture.parent / "metadata.jsonl"
    if spoil == "picture":
        picture.unlink()
    elif spoil == "root":
        (out / "metadata.jsonl").write_text("")
    elif to == "kohya" and spoil == "twice":
        picture.with_suffix(".jpg").write_bytes(picture.read_bytes())
    elif to == "kohya":
        picture.with_suffix(".txt").unlink()
    else:
        text = lines.read_text(encoding="utf-8").splitlines(keepends=True)
        changed = {"line": text[1:], "twice": [*text, text[0]], "caption": None}[spoil]
        lines.write_text("".join(changed), encoding="utf-8") if changed else lines.unlink()
    with pytest.raises(LoraMvpError) as caught:
        read_back(out, to)
    assert caught.value.code == "export_incomplete"


def test_a_plain_list_with_any_of_the_names(tmp_path):
    (tmp_path / "sub").mkdir()
    files, texts = ("file", "image", "image_path", "path", "file_name"), ("caption", "text", "prompt")
    splits = ("train", "val", "validation", "test", "Train")
    rows = []
    for k, key in enumerate(files):
        drawing(k, size=(30 + k, 40)).save(tmp_path / "sub" / f"{k} ü.png")
        rows.append({key: f"sub/{k} ü.png", texts[k % 3]: f" caption\n{k} ", "split": splits[k]})
    rows[1]["label"] = 3
    manifest = listed(tmp_path, *rows)
    assert [row.split for row in manifest.images] == ["train", "val", "val", "val", "train"]
    assert [row.caption for row in manifest.images] == [f"caption {k}" for k in range(5)]
    assert [(row.width, row.height) for row in manifest.images] == [(30 + k, 40) for k in range(5)]
    assert [row.label for row in manifest.images] == ["", "3", "", "", ""]
    assert len(read_back(export_data(manifest, "hf", tmp_path / "out"), "hf")) == 5


def test_every_mistake_of_a_list_is_told_with_its_row(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    drawing(1).save(tmp_path / "outside.png")
    drawing(1).save(inside / "good.png")
    (inside / "link.png").symlink_to("good.png")
    (inside / "way").symlink_to(tmp_path)
    (inside / "text.png").write_text("no picture")
    good = {"caption": "x", "split": "train"}
    places = ["../outside.png", str(tmp_path / "outside.png"), "link.png", "way/outside.png", "text.png", "gone.png"]
    places += ["a\x00b", "\ud83d.png", "C:\\x.png", 5, "", None]
    rows = [{"image": place} | good for place in places] + ["good.png", {"image": "good.png"}, good]
    with pytest.raises(LoraMvpError) as caught:
        rows_of_list(rows, inside)
    assert caught.value.code == "manifest_invalid"
    told = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert told == [f"row {k}" for k in [*range(1, 15), 14, 15]]
    str(caught.value).encode()


def test_the_schema_takes_what_is_written_and_refuses_what_is_not(drawings, awkward):
    schema = manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema") and "folder" not in schema["properties"]
    check = jsonschema.Draft202012Validator(schema)
    for path in (drawings, awkward.folder / "manifest.json"):
        check.validate(json.loads(path.read_text(encoding="utf-8")))
    content = json.loads(drawings.read_text(encoding="utf-8"))
    for key, value in [("split", "dev"), ("width", "wide"), ("file", None)]:
        broken = json.loads(json.dumps(content))
        broken["images"][3][key] = value
        assert not check.is_valid(broken)
        del broken["images"][3][key]
        assert not check.is_valid(broken)
    assert not check.is_valid([]) and not check.is_valid({})
