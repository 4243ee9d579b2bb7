"What the data chapters promise and a notebook cannot show: hostile files, time limits, foreign files, other processes."

import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pytest
import skimage
import survey_looks
from PIL import Image, ImageCms, ImageFilter

from lora_mvp.config import DataConfig, LoraMvpError, load_config
from lora_mvp.data import prepare
from lora_mvp.data.advice import suggestions
from lora_mvp.data.arrays import as_array
from lora_mvp.data.assess import deal, group_images
from lora_mvp.data.images import REASONS, decode, open_rgb
from lora_mvp.data.looks import ImageRecord, facts_of, inspect_image, perceptual_hashes
from lora_mvp.data.manifest import manifest_schema, parse_manifest, read_manifest
from lora_mvp.data.overrides import Override, write_overrides
from lora_mvp.data.prepare import check_data, prepare_data
from lora_mvp.data.raw import scan
from lora_mvp.data.splits import near_duplicates
from lora_mvp.data.storage import crop_to, locked, portable_name
from lora_mvp.data.tables import summary

FLAT = facts_of(Image.new("RGB", (8, 8)))
STRICT = {"blurry": "reject"}
LOOSE = DataConfig(
    min_resolution=64, checks=STRICT | {"rotated": "warn", "had_alpha": "warn", "16bit": "warn", "cmyk": "warn"}
)


def picture(seed=0, size=(96, 80)):
    "Sharp random blocks: different for each seed."
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def fill(raw, **labels):
    "A raw folder with so many pictures per label."
    for label, n in labels.items():
        (raw / label).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            picture(zlib.crc32(label.encode()) + i).save(raw / label / f"{label}_{i}.png")
    return raw


def load_image(path, size):
    "The centre square of a picture, as training reads it."
    return as_array(crop_to(open_rgb(path), size, size))


def settings(tmp_path, **keys):
    "A configuration for `tmp_path/raw` and `tmp_path/out`."
    base = {"raw_data_dir": str(tmp_path / "raw"), "processed_dir": str(tmp_path / "out")}
    base |= {"image_size": 32, "min_resolution": 64} | keys
    return load_config(overrides={f"data.{k}": v for k, v in base.items()})


def tree(folder):
    "Every file of a folder with the hash of its bytes; what prepare_data keeps for itself does not count."
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".prepare" not in p.parts)
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def code(f, *args, **kwargs):
    "The code of the user error a call raises; its text must be a sentence."
    with pytest.raises(LoraMvpError) as e:
        f(*args, **kwargs)
    assert len(str(e.value)) > 20
    return e.value.code


def png_header(width, height, bits=1, color=0):
    "A PNG of any claimed size, with almost no data."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def encoded(im, fmt="PNG", **kwargs):
    "A picture as the bytes of a file."
    buffer = io.BytesIO()
    im.save(buffer, fmt, **kwargs)
    return buffer.getvalue()


# ---- one image


def text_bomb(png):
    "A PNG whose compressed comment unpacks to 200 MB."
    body = b"zTXtComment\0\0" + zlib.compress(bytes(200_000_000))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:33] + chunk + png[33:]


@functools.cache
def zoo():
    "Hostile files: name -> bytes, expected reason."
    im, other = picture(0), picture(1)
    jpeg, png = encoded(im, "JPEG", quality=95), encoded(im)
    return {
        "good.png": (png, None),
        "good.jpg": (jpeg, None),
        "good.webp": (encoded(im, "WEBP", lossless=True), None),
        "good.bmp": (encoded(im, "BMP"), None),
        "good.gif": (encoded(im, "GIF"), None),
        "good.tif": (encoded(im, "TIFF"), None),
        "cmyk.jpg": (encoded(im.convert("CMYK"), "JPEG", quality=95), None),
        "palette.png": (encoded(im.convert("P")), None),
        "no_ending": (png, None),
        "wrong_ending.jpg": (png, None),
        "empty.png": (b"", "empty_file"),
        "text.png": (b"hello", "unreadable"),
        "page.jpg": (b"<html>404</html>", "unreadable"),
        "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        "notes.md": (b"# notes", "not_an_image"),
        "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        "cut_end.jpg": (jpeg[:-200], "unreadable"),
        "cut_half.jpg": (jpeg[: len(jpeg) // 2], "unreadable"),
        "cut_half.png": (png[: len(png) // 2], "unreadable"),
        "cut_head.png": (png[:20], "unreadable"),
        "cut_head.jpg": (jpeg[:20], "unreadable"),
        "restarts.jpg": (jpeg[: len(jpeg) // 2] + jpeg, "unreadable"),
        "bomb.png": (png_header(20_000, 20_000), "too_large"),
        "big_bomb.png": (png_header(1_000_000, 1_000_000), "too_large"),
        "just_too_large.png": (png_header(8001, 8000), "too_large"),
        "no_pixels.png": (png_header(0, 0), "unreadable"),
        "lies_about_size.png": (png_header(500, 500, 8, 2), "unreadable"),
        "moves.gif": (encoded(im, "GIF", save_all=True, append_images=[other]), "animated"),
        "moves.png": (encoded(im, "PNG", save_all=True, append_images=[other]), "animated"),
        "moves.webp": (encoded(im, "WEBP", save_all=True, append_images=[other]), "animated"),
        "pages.tif": (encoded(im, "TIFF", save_all=True, append_images=[other]), "animated"),
        "float.tif": (encoded(Image.new("F", (96, 96)), "TIFF"), "unsupported_mode"),
        "int32.tif": (encoded(Image.new("I", (96, 96), 70000), "TIFF"), "unsupported_mode"),
        "small.png": (encoded(picture(0, (96, 40))), "too_small"),
        "dot.png": (encoded(Image.new("RGB", (1, 1))), "too_small"),
        "soft.png": (encoded(im.filter(ImageFilter.GaussianBlur(8))), "blurry"),
        "flat.png": (encoded(Image.new("RGB", (96, 96), "red")), "blurry"),
        "broken_exif.jpg": (encoded(im, "JPEG", exif=b"Exif\0\0garbage"), None),
        "broken_icc.png": (encoded(im, icc_profile=b"not a profile"), None),
        "good.avif": (encoded(im, "AVIF", quality=95), None),
        "good.ppm": (encoded(im, "PPM"), None),
        "grey.png": (encoded(im.convert("L")), None),
        "one_bit.png": (encoded(im.convert("1")), None),
        "see_through.png": (encoded(Image.new("RGBA", (96, 96), (9, 9, 9, 0))), "blurry"),
        "animation_of_one.gif": (encoded(im, "GIF", save_all=True), None),
        "lab.tif": (encoded(Image.new("LAB", (96, 96)), "TIFF"), "unsupported_mode"),
        "strip.png": (encoded(picture(0, (640, 80))), "too_oblong"),
        "zeros.jpg": (bytes(5000), "unreadable"),
        "noise.png": (np.random.default_rng(0).bytes(5000), "unreadable"),
        "._photo.jpg": (b"\0\5\x16\7" + bytes(100), "hidden"),
        "Thumbs.db": (b"\xd0\xcf\x11\xe0" + bytes(100), "hidden"),
        "text_bomb.png": (text_bomb(png), "unreadable"),
        "bad_checksum.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "unreadable"),
        "no_end.jpg": (jpeg[:-2], "unreadable"),
    }


def test_zoo(tmp_path):
    assert len(zoo()) >= 48
    for name, (data, expected) in zoo().items():
        (tmp_path / name).write_bytes(data)
        record = inspect_image(tmp_path / name, data=LOOSE)
        assert (name, record.reason) == (name, None if expected == "hidden" else expected) or name[0] in ".T", record
        assert expected is None or (record.detail and expected in REASONS)
        assert str(tmp_path) not in (record.detail or "") and "0x" not in (record.detail or "")
        if expected is not None and expected not in ("too_small", "too_oblong", "blurry", "hidden"):
            assert code(open_rgb, tmp_path / name) in (expected, "unreadable")


def test_details_hold_value_and_threshold(tmp_path):
    for name, parts in {
        "small.png": ("40", "64"),
        "soft.png": ("100",),
        "bomb.png": ("400,000,000", "64,000,000"),
    }.items():
        (tmp_path / name).write_bytes(zoo()[name][0])
        record = inspect_image(tmp_path / name, data=LOOSE)
        assert all(part in record.detail for part in parts), record.detail


def test_notes(tmp_path):
    "What had to be done to a good image is remembered."
    rgba = picture(0).convert("RGBA")
    rgba.putalpha(200)
    exif = Image.Exif()
    exif[0x0112] = 8
    grey16 = Image.fromarray(np.asarray(picture(0).convert("L")).astype(np.uint16) * 257)
    cases = {
        "alpha.png": (encoded(rgba), ["had_alpha"], (96, 80)),
        "turned.jpg": (encoded(picture(0), "JPEG", exif=exif), ["rotated"], (80, 96)),
        "grey16.png": (encoded(grey16), ["16bit"], (96, 80)),
        "cmyk.jpg": (encoded(picture(0).convert("CMYK"), "JPEG"), ["cmyk"], (96, 80)),
        "really_png.jpg": (encoded(picture(0)), ["extension_mismatch"], (96, 80)),
    }
    for name, (data, notes, size) in cases.items():
        (tmp_path / name).write_bytes(data)
        record = inspect_image(tmp_path / name, data=LOOSE)
        assert (record.reason, record.warnings, (record.facts.width, record.facts.height)) == (None, notes, size)


def wide_gamut():
    "An RGB profile whose red and green primaries are exchanged: sRGB with the two columns of its matrix swapped."
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile).replace(b"s\0R\0G\0B", b"X\0X\0X\0X")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profile_is_applied(mode):
    "Red in a profile whose primaries are exchanged is green."
    red = Image.new("RGB", (64, 64), "red").convert(mode)
    rgb, notes = decode(encoded(red, icc_profile=wide_gamut()))
    assert rgb.getpixel((0, 0))[1] > 250 > 5 > rgb.getpixel((0, 0))[0]
    assert "icc_converted" in notes
    assert "icc_converted" not in decode(encoded(red))[1]


def ink_profile():
    "A small profile of a printer: four inks, two steps each, to lightness; the more black ink, the darker."
    text = b"four inks\0"
    desc = b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78)
    steps = bytes(range(256))
    inks = b"".join(bytes([255 * (1 - (i & 1)), 128, 128]) for i in range(16))  # the last ink is black
    table = (
        b"mft1" + struct.pack(">IBBBB", 0, 4, 3, 2, 0) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    )
    table += steps * 4 + inks + steps * 3
    place, tags, body = 132 + 3 * 12, b"", b""
    white = b"XYZ " + struct.pack(">I3i", 0, 63190, 65536, 54061)
    for name, content in [(b"desc", desc), (b"A2B0", table), (b"wtpt", white)]:
        content += bytes(-len(content) % 4)
        tags += name + struct.pack(">II", place + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s12s4s", place + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"", b"acsp"
    )
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", 3) + tags + body


def test_print_colours_with_a_profile():
    "Both what it was and that its profile was used is noted."
    for black, grey in [(0, 255), (255, 0)]:
        rgb, notes = decode(encoded(Image.new("CMYK", (64, 64), (0, 0, 0, black)), "TIFF", icc_profile=ink_profile()))
        assert notes == ["cmyk", "icc_converted"]
        assert all(abs(value - grey) < 12 for value in rgb.getpixel((0, 0)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    "All eight orientations give the same upright picture (PNG: exact)."
    upright = picture(3)
    undo = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Pillow's transpose that a camera would have stored
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got, notes = decode(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(got), np.asarray(upright))
    assert notes == ([] if orientation == 1 else ["rotated"])


def test_not_regular(tmp_path):
    "Pipes, links, link loops, folders and devices are refused, as are 20,000 x 20,000 pixels: in time, in 50 MB."
    os.mkfifo(tmp_path / "pipe.png")
    picture().save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    names = ["pipe.png", "link.png", "loop.png", "folder.png", "/dev/zero", "bomb.png"]
    script = (  # `before` is the most memory so far, kilobytes
        "import resource, sys; from lora_mvp.data.looks import inspect_image;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; found = [inspect_image(f) for f in sys.argv[1:]];"
        "print(*(r.reason for r in found), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)"
    )
    paths = [tmp_path / name for name in names]
    got = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, timeout=60)
    assert got.stdout.split() == [*["not_a_file"] * 5, "too_large", "True"], got.stderr


def test_import_without_torch():
    script = "import sys, lora_mvp.data.prepare; print([m for m in ('torch', 'diffusers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def photographs():
    "The pictures that come with scikit-image: name -> path."
    folder = Path(skimage.__file__).parent / "data"
    return {p.name: p for p in sorted(folder.iterdir()) if p.suffix in (".png", ".jpg", ".tif")}


def test_photographs():
    "Good photos are taken, soft ones and small ones are not, and of two views of one scene it is known."
    records = {name: inspect_image(path) for name, path in photographs().items()}
    good = ["astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"]
    assert [records[name].status for name in good] == ["accepted"] * 7
    assert [records[name].reason for name in ("text.png", "multipage.tif")] == ["too_small", "animated"]
    assert records["color.png"].warnings == ["blurry"]
    known = [name for name, record in records.items() if record.facts]
    pairs = near_duplicates([records[name].facts.phashes for name in known])
    assert {(known[i], known[j]) for i, j, _ in pairs} == {
        ("chessboard_GRAY.png", "chessboard_RGB.png"),
        ("motorcycle_left.png", "motorcycle_right.png"),
    }


def test_copies_of_photographs():
    "Saved badly, scaled, brighter, mirrored, turned: near-duplicates all of them."
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        im = open_rgb(photographs()[name])
        jpeg, _ = decode(encoded(im, "JPEG", quality=20))
        brighter = Image.fromarray(np.clip(np.asarray(im) * 1.1, 0, 255).astype(np.uint8))
        turned = im.transpose(Image.Transpose.ROTATE_90)
        copies = [im, jpeg, im.reduce(2), brighter, turned, im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
        pairs = near_duplicates([perceptual_hashes(copy) for copy in copies])
        assert {j for i, j, _ in pairs if i == 0} == {1, 2, 3, 4, 5}, name


# ---- a folder


@pytest.mark.parametrize("copy", [True, False])
def test_hostile_folder(tmp_path, copy):
    "Every file is accepted or named with its reason; the raw folder keeps its bytes; a second run changes nothing."
    raw, files = tmp_path / "raw", zoo()
    (raw / "zoo").mkdir(parents=True)
    for name, (data, _) in files.items():
        (raw / "zoo" / name).write_bytes(data)
    os.mkfifo(raw / "zoo" / "pipe.png")
    (raw / "zoo" / ".DS_Store").write_bytes(b"x")
    (raw / "linked_label").symlink_to(raw / "zoo", target_is_directory=True)
    (raw / ".git").mkdir()
    (raw / ".git" / "config").write_text("x")
    picture(99).save(raw / "lost.png")
    before = tree(raw)
    manifest = prepare_data(settings(tmp_path, checks=STRICT), copy=copy)
    assert tree(raw) == before
    seen = [r.path for r in [*manifest.rejected, *manifest.ignored]] + [row.source for row in manifest.images]
    expected = {f"zoo/{n}" for n in [*files, "pipe.png", ".DS_Store"]} | {"linked_label", ".git", "lost.png"}
    assert sorted(seen) == sorted(expected)
    reasons = {r.path: r.reason for r in [*manifest.rejected, *manifest.ignored]}
    for name, (_, reason) in files.items():
        assert reasons.get(f"zoo/{name}") in (reason, "duplicate"), name
    assert reasons["lost.png"] == "no_label" and reasons["linked_label"] == reasons["zoo/pipe.png"] == "not_a_file"
    assert reasons[".git"] == reasons["zoo/.DS_Store"] == "hidden"
    assert set(reasons.values()) <= set(REASONS)
    text = summary(manifest)
    assert all(r.reason in text for r in manifest.rejected) and "zoo/bomb.png" in text
    ignored = Counter(r.reason for r in manifest.ignored)
    assert f"ignored ({ignored['not_an_image']}): files that are no images" in text
    assert f"ignored ({ignored['hidden']}): hidden files" in text
    assert {row.stored for row in manifest.images} == ({"processed"} if copy else {"linked"})
    after = tree(tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("[!.]*/**/*.*")}
    assert (
        prepare_data(settings(tmp_path, checks=STRICT), copy=copy)
        == manifest
        == read_manifest(tmp_path / "out" / "manifest.json")
    )
    assert tree(tmp_path / "out") == after
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    for row in manifest.images:
        path = manifest.path_of(row)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row.sha256
        assert open_rgb(path).size == (row.width, row.height)
        assert np.array_equal(load_image(path, 32), load_image(raw / row.source, 32))


def test_manifest_names_no_folder_of_this_machine(tmp_path):
    fill(tmp_path / "raw", cat=3)
    prepare_data(settings(tmp_path))
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["config"]["raw_data_dir"] == "../raw"
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    moved = read_manifest(tmp_path / "elsewhere" / "manifest.json")
    assert all(moved.path_of(row).is_file() for row in moved.images)


def test_same_stem(tmp_path):
    "cat.png, cat.jpg, Cat.png and a name that looks like ours do not write over each other."
    raw = fill(tmp_path / "raw", cat=0)
    for i, name in enumerate(["cat.png", "cat.jpg", "Cat.png", "cat.bmp"]):
        picture(i).save(raw / "cat" / name)
    (raw / "cat" / "sub").mkdir()
    picture(7).save(raw / "cat" / "sub" / "cat.png")
    sha = hashlib.sha256((raw / "cat" / "cat.png").read_bytes()).hexdigest()
    picture(8).save(raw / "cat" / f"cat-{sha[:12]}.png")
    for copy in (True, False):
        manifest = prepare_data(settings(tmp_path), copy=copy)
        files = [row.file.casefold() for row in manifest.images]
        assert len(files) == len(set(files)) == 6
        for row in manifest.images:
            assert np.array_equal(load_image(manifest.path_of(row), 32), load_image(raw / row.source, 32))


def test_odd_names(tmp_path):
    "Names that are no text, emoji, backslashes, very long names."
    raw = fill(tmp_path / "raw", **{"grüne_katze": 1})
    names = [
        b"caf\xe9.png",
        "😀 smile.png".encode(),
        b"a\\..\\b.png",
        b"x" * 250 + b".png",
        b"what?.png",
        b"{label}.png",
    ]
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(raw / "grüne_katze"), name), "wb") as f:
            f.write(encoded(picture(50 + i)))
    with open(os.path.join(os.fsencode(raw / "grüne_katze"), b"\xff.png"), "wb") as f:
        f.write(b"broken")
    for copy in (True, False):
        manifest = prepare_data(settings(tmp_path, caption_template="{stem}, {label}"), copy=copy)
        assert len(manifest.images) == 7 and len(manifest.rejected) == 1
        assert read_manifest(tmp_path / "out" / "manifest.json") == manifest
        summary(manifest).encode()
    captions = {row.caption for row in manifest.images}
    assert {"😀 smile, grüne katze", "{label}, grüne katze"} <= captions
    assert portable_name("..") == "_"


def test_stale_and_foreign_files(tmp_path):
    "Only what an earlier manifest of ours lists is removed; a foreign file is never replaced."
    raw, out = fill(tmp_path / "raw", cat=4, dog=4), tmp_path / "out"
    first = prepare_data(settings(tmp_path))
    (out / "train" / "cat" / "mine.png").write_bytes(b"foreign")
    (out / "notes.txt").write_text("foreign")
    shutil.rmtree(raw / "dog")
    (raw / "cat" / "cat_0.png").unlink()
    second = prepare_data(settings(tmp_path))
    gone = {row.file for row in first.images} - {row.file for row in second.images}
    assert gone and not any((out / file).exists() for file in gone)
    assert not (out / "train" / "dog").exists() and not (out / "val" / "dog").exists()
    assert (out / "train" / "cat" / "mine.png").read_bytes() == b"foreign" and (out / "notes.txt").exists()
    picture(77).save(raw / "cat" / "mine.png")
    for split in ("train", "val"):
        (out / split / "cat").mkdir(exist_ok=True, parents=True)
        (out / split / "cat" / "mine.png").write_bytes(b"foreign")
    for copy in (True, False):
        assert code(prepare_data, settings(tmp_path), copy=copy) == "output_occupied"
    assert (out / "train" / "cat" / "mine.png").read_bytes() == b"foreign"
    assert parse_manifest(out / "manifest.json") == second  # the failed runs left the manifest alone
    (out / "manifest.json").write_text('{"somebody": "else"}')
    assert code(prepare_data, settings(tmp_path)) == "output_occupied"
    assert (out / "manifest.json").read_text() == '{"somebody": "else"}'


def test_links(tmp_path):
    "Links share the raw file; going back and forth between the modes never writes through one."
    raw = fill(tmp_path / "raw", cat=5)
    before = tree(raw)
    for copy in (False, True, False, True):
        manifest = prepare_data(settings(tmp_path), copy=copy)
        for row in manifest.images:
            assert os.path.samefile(manifest.path_of(row), raw / row.source) != copy
        assert tree(raw) == before
    picture(500).save(raw / "cat" / "cat_0.png")  # changed in place by its owner
    manifest = prepare_data(settings(tmp_path), copy=False)
    assert all(row.stored == "linked" and row.sha256 == row.source_sha256 for row in manifest.images)
    assert read_manifest(tmp_path / "out" / "manifest.json") == manifest


def test_link_falls_back_to_copy(tmp_path, monkeypatch):
    fill(tmp_path / "raw", cat=3)

    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    manifest = prepare_data(settings(tmp_path), copy=False)
    assert {row.stored for row in manifest.images} == {"copied"}
    assert all(manifest.path_of(r).read_bytes() == (tmp_path / "raw" / r.source).read_bytes() for r in manifest.images)
    assert prepare_data(settings(tmp_path), copy=False) == manifest


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_another_file_system(tmp_path):
    "A hard link that cannot be made is a copy, and recorded as one."
    fill(tmp_path / "raw", cat=3)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as out:
        if os.stat(out).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("the same file system")
        manifest = prepare_data(settings(tmp_path, processed_dir=out), copy=False)
    assert {row.stored for row in manifest.images} == {"copied"}


def test_split_depends_on_content_only(tmp_path):
    "Renaming files, adding a label or another order moves nothing."
    raw = fill(tmp_path / "raw", cat=12)
    first = {r.source_sha256: r.split for r in prepare_data(settings(tmp_path)).images}
    for i, path in enumerate(sorted((raw / "cat").iterdir())):
        path.rename(path.with_name(f"{(i * 7) % 12:02}_renamed.png"))
    fill(raw, dog=9)
    second = {r.source_sha256: r.split for r in prepare_data(settings(tmp_path)).images if r.label == "cat"}
    assert second == first and Counter(first.values()) == {"train": 10, "val": 2}
    other = settings(tmp_path, seed=7)
    third = {r.source_sha256: r.split for r in prepare_data(other).images if r.label == "cat"}
    assert third == first  # what was dealt out stays
    fourth = {r.source_sha256: r.split for r in prepare_data(other, resplit=True).images if r.label == "cat"}
    assert fourth != first


def test_near_duplicates_stay_together(tmp_path):
    "Saved again, scaled, mirrored: one group, on one side; a copy that comes later joins it."
    raw = fill(tmp_path / "raw", cat=10)
    turned = picture(zlib.crc32(b"cat") + 3).transpose(Image.Transpose.ROTATE_90)
    turned.resize((160, 192), Image.Resampling.BICUBIC).save(raw / "cat" / "z_turned.jpg", quality=90)
    manifest = prepare_data(settings(tmp_path))
    rows = {row.source: row for row in manifest.images}
    twins = rows["cat/cat_3.png"], rows["cat/z_turned.jpg"]
    assert twins[0].group == twins[1].group and twins[0].split == twins[1].split
    assert len({row.group for row in manifest.images}) == 10
    assert "cat/cat_3.png, cat/z_turned.jpg" in summary(manifest)
    val = next(row for row in manifest.images if row.split == "val" and row not in twins)
    train = next(row for row in manifest.images if row.split == "train" and row not in twins)
    for row in (val, train):  # the file goes, and a copy of it comes back under another name and in another format
        im = open_rgb(raw / row.source)
        (raw / row.source).unlink()
        prepare_data(settings(tmp_path))
        im.save(raw / "cat" / f"back_{row.split}.jpg", quality=80)
        now = {r.source: r for r in prepare_data(settings(tmp_path)).images}
        assert now[f"cat/back_{row.split}.jpg"].split == row.split


def test_split_always_has_both_sides():
    for n in range(1, 30):
        for ratio in (0.01, 0.5, 0.8, 0.9, 0.99):
            facts = [FLAT.model_copy(update={"pixel_sha256": str(i)}) for i in range(n)]
            records = [ImageRecord(path=str(i), label="a", sha256=str(i), facts=facts[i]) for i in range(n)]
            groups = group_images(records, {}, 8)
            counts = Counter(deal(records, groups, {}, DataConfig(train_ratio=ratio), {})[0].values())
            assert counts["train"] >= 1
            assert (counts["val"] >= 1) == (n >= 2)


def test_captions(tmp_path):
    raw = fill(tmp_path / "raw", **{"big-red_dog": 6})
    names = sorted(p.stem for p in (raw / "big-red_dog").iterdir())
    texts = [
        b"by  hand\r\nsecond line",
        b"",
        b"\xef\xbb\xbfwith BOM",
        "ünïcode \u200d ok".encode("utf-16"),
        b"bad \xff byte",
    ]
    for name, data in zip(names, texts, strict=False):
        (raw / "big-red_dog" / f"{name}.txt").write_bytes(data)
    manifest = prepare_data(settings(tmp_path))
    got = [(row.caption, row.caption_source) for row in manifest.images]
    assert got[:5] == [
        ("by hand", "sidecar"),
        ("A photo of big red dog", "template"),
        ("with BOM", "sidecar"),
        ("ünïcode \u200d ok", "sidecar"),
        ("bad ÿ byte", "sidecar"),
    ]
    assert manifest.images[0].other_captions == ["second line"]
    assert "read as cp1252" in manifest.images[4].reasons[-1].detail
    assert manifest.rejected == []  # captions are no images, and no strangers either


def test_caption_files(tmp_path):
    "A .caption file counts like a .txt one, which goes before it; an empty .txt does not hide it."
    raw = fill(tmp_path / "raw", cat=3)
    texts = {
        "cat_0.caption": "zero",
        "cat_1.txt": "one",
        "cat_1.caption": "no",
        "cat_2.txt": " ",
        "cat_2.caption": "two",
    }
    for name, text in texts.items():
        (raw / "cat" / name).write_text(text)
    manifest = prepare_data(settings(tmp_path))
    assert [row.caption for row in manifest.images] == ["zero", "one", "two"] and manifest.rejected == []


@pytest.mark.parametrize("command", ["prepare-data", "check-data"])
def test_when_nothing_is_accepted(tmp_path, capsys, command):
    "Exit code 3, and a report that says of every file why; what was prepared before stays."
    from lora_mvp.cli import main

    raw = fill(tmp_path / "raw", cat=2)
    prepare_data(settings(tmp_path))
    before = tree(tmp_path)
    told = {"prepare-data": tmp_path / "out-report", "check-data": tmp_path / "report"}[command]
    folders = [f"--set=data.raw_data_dir={raw}", f"--set=data.processed_dir={tmp_path / 'out'}"]
    folders += ["--out", str(told)] if command == "check-data" else []
    assert main([command, *folders, "--set=data.min_resolution=512"]) == 3
    said = capsys.readouterr()
    assert "2 too_small" in said.err and "too_small (2)" in said.out
    assert (told / "rejected.csv").read_text().count("too_small") == 2
    assert "cat/cat_1.png" in (told / "report.html").read_text()
    shutil.rmtree(told)
    assert tree(tmp_path) == before
    (tmp_path / "nothing").mkdir()
    assert main([command, f"--set=data.raw_data_dir={tmp_path / 'nothing'}", *folders[1:]]) == 3
    assert (told / "report.html").is_file()
    shutil.rmtree(told)
    (tmp_path / "nothing" / "cat").mkdir()
    assert main([command, f"--set=data.raw_data_dir={tmp_path / 'nothing'}", *folders[1:]]) == 3
    assert (told / "report.html").is_file()
    capsys.readouterr()
    assert main([command, f"--set=data.raw_data_dir={tmp_path / 'nothing'}", *folders[1:]]) == 3
    assert capsys.readouterr().out.splitlines()[1].split() == ["total", "0", "0", "0"]


def test_a_report_that_cannot_be_written(tmp_path, caplog):
    "The product of check-data, a by-product of prepare-data; never in the raw folder."
    from lora_mvp.cli import main

    raw = fill(tmp_path / "raw", cat=2)
    folders = [f"--set=data.raw_data_dir={raw}", f"--set=data.processed_dir={tmp_path / 'out'}"]
    before = tree(raw)
    for place in (raw / "report", raw / "cat" / "cat_0.png" / "x"):
        assert main(["check-data", *folders, "--out", str(place)]) == 2
    (tmp_path / "out-report").touch()
    assert main(["prepare-data", *folders, "--set=data.min_resolution=64"]) == 0
    assert "no report" in caplog.text and tree(raw) == before


def test_duplicates(tmp_path):
    raw = fill(tmp_path / "raw", cat=3, dog=3)
    shutil.copy(raw / "cat" / "cat_1.png", raw / "dog" / "a_cat.png")
    manifest = prepare_data(settings(tmp_path))
    got = [(r.path, r.reason) for r in manifest.rejected]
    assert got == [("cat/cat_1.png", "label_conflict"), ("dog/a_cat.png", "label_conflict")]
    assert "dog/a_cat.png" in manifest.rejected[0].detail and "cat/cat_1.png" in manifest.rejected[1].detail
    (raw / "dog" / "a_cat.png").unlink()
    open_rgb(raw / "cat" / "cat_1.png").save(raw / "cat" / "other_bytes.bmp")
    manifest = prepare_data(settings(tmp_path))
    assert [(r.path, r.reason) for r in manifest.rejected] == [("cat/other_bytes.bmp", "duplicate")]


def test_severities(tmp_path):
    "A check that warns keeps the image and says so; one that is off says nothing."
    raw = fill(tmp_path / "raw", cat=3)
    for name in ("soft.png", "small.png"):
        (raw / "cat" / name).write_bytes(zoo()[name][0])
    manifest = prepare_data(settings(tmp_path, checks={"too_small": "off"}))  # blurry warns by itself
    found = {row.source: [(r.code, r.severity) for r in row.reasons] for row in manifest.images}
    assert found["cat/soft.png"] == [("blurry", "warn")] and found["cat/small.png"] == []
    (reason,) = next(row for row in manifest.images if row.source == "cat/soft.png").reasons
    assert reason.value < reason.threshold == 100
    assert "blurry (1)" in summary(manifest)


@pytest.mark.parametrize("severity", ["reject", "warn", "off"])
def test_severities_of_captions(tmp_path, severity):
    raw = fill(tmp_path / "raw", cat=4)
    (raw / "cat" / "cat_0.txt").write_text("word " * 90)
    (raw / "cat" / "cat_1.txt").write_text("")
    checks = dict.fromkeys(("caption_too_long", "caption_file"), severity)
    manifest = prepare_data(settings(tmp_path, checks=checks))
    everything = [*manifest.images, *manifest.rejected]
    found = {(r.code, r.severity, r.value, r.threshold) for row in everything for r in row.reasons}
    expected = {("caption_too_long", severity, 92, 77), ("caption_file", severity, None, None)}
    assert found == (set() if severity == "off" else expected)
    assert len(manifest.images) == (2 if severity == "reject" else 4)
    assert ("cat/cat_0.png (92 tokens)" in summary(manifest)) == (severity == "warn")
    if severity == "reject":  # a person's decision goes before it
        kept = {r.sha256: Override(keep=True) for r in manifest.rejected}
        write_overrides(tmp_path / "out", kept)
        assert len(prepare_data(settings(tmp_path, checks=checks)).images) == 4


def test_numbers_of_what_is_refused_outright(tmp_path):
    raw = fill(tmp_path / "raw", cat=2)
    for name in ("bomb.png", "just_too_large.png", "moves.gif"):
        (raw / "cat" / name).write_bytes(zoo()[name][0])
    found = {r.path: r.reasons[0] for r in prepare_data(settings(tmp_path)).rejected}
    assert {path: (r.value, r.threshold) for path, r in found.items()} == {
        "cat/bomb.png": (400_000_000, 64_000_000),
        "cat/just_too_large.png": (64_008_000, 64_000_000),
        "cat/moves.gif": (2, 1),
    }


def test_a_caption_without_its_image_is_named(tmp_path):
    raw = fill(tmp_path / "raw", cat=3)
    for name in ("cat_O.txt", "cat_1.TXT", "cat_2.jpg.caption"):
        (raw / "cat" / name).write_text("a caption that would be lost")
    (raw / "notes.txt").write_text("about the folder")
    manifest = prepare_data(settings(tmp_path))
    lone = [r.path for r in manifest.ignored if r.reason == "lone_caption"]
    assert lone == ["cat/cat_2.jpg.caption", "cat/cat_O.txt", "notes.txt"]
    assert manifest.images[1].caption == "a caption that would be lost"  # an ending in capitals is one all the same
    assert f"lone_caption (3): {REASONS['lone_caption']}: {', '.join(lone)}" in summary(manifest)
    assert "ignored (" not in summary(manifest)


@pytest.mark.parametrize("flat", [True, False])
def test_the_same_pixels_never_straddle(tmp_path, flat):
    "Also where near-duplicates are off, for pictures too plain for a hash, and when the first file is gone."
    raw = fill(tmp_path / "raw", cat=0)
    pictures = [Image.new("RGB", (96, 80), (20 * i, 90, 90)) if flat else picture(i) for i in range(10)]
    for i, im in enumerate(pictures):
        for ending in ("png", "bmp"):
            im.save(raw / "cat" / f"{i}.{ending}")
    keys = {"near_duplicate_bits": 8 if flat else None, "blur_threshold": 0.0, "train_ratio": 0.5}
    config = settings(tmp_path, checks={"duplicate": "warn"}, **keys)
    first = {row.source: row.split for row in prepare_data(config).images}
    assert all(first[f"cat/{i}.png"] == first[f"cat/{i}.bmp"] for i in range(10))
    assert Counter(first.values()) == {"train": 10, "val": 10}
    for path in list((raw / "cat").iterdir()):
        path.unlink()
    for i, im in enumerate(pictures):
        im.save(raw / "cat" / f"again_{i}.tif")
    now = {row.source: row.split for row in prepare_data(config).images}
    assert now == {f"cat/again_{i}.tif": first[f"cat/{i}.png"] for i in range(10)}


def test_decisions_of_a_person(tmp_path):
    "What overrides.json says goes before the checks and before every other caption."
    raw = fill(tmp_path / "raw", cat=4)
    (raw / "cat" / "soft.png").write_bytes(zoo()["soft.png"][0])
    (raw / "cat" / "cat_1.txt").write_text("from a file")
    first = prepare_data(settings(tmp_path))
    ids = {row.source: row.source_sha256 for row in first.images} | {r.path: r.sha256 for r in first.rejected}
    decisions = {ids["cat/soft.png"]: Override(keep=True), ids["cat/cat_0.png"]: Override(keep=False)}
    write_overrides(tmp_path / "out", decisions | {ids["cat/cat_1.png"]: Override(caption="by  hand")})
    second = prepare_data(settings(tmp_path))
    rows = {row.source: row for row in second.images}
    assert [(r.path, r.reason) for r in second.rejected] == [("cat/cat_0.png", "left_out")]
    assert (rows["cat/cat_1.png"].caption, rows["cat/cat_1.png"].caption_source) == ("by hand", "curated")
    assert [r.code for r in rows["cat/soft.png"].reasons] == ["blurry"]


def test_a_person_may_keep_a_near_duplicate(tmp_path):
    raw = fill(tmp_path / "raw", cat=2)
    mirrored = open_rgb(raw / "cat" / "cat_0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(raw / "cat" / "z.png")
    config = settings(tmp_path, checks={"near_duplicate": "reject"})
    (refused,) = prepare_data(config).rejected
    assert (refused.path, refused.reason) == ("cat/z.png", "near_duplicate")
    write_overrides(tmp_path / "out", {refused.sha256: Override(keep=True)})
    kept = {row.source: row for row in prepare_data(config).images}
    assert kept["cat/z.png"].split == kept["cat/cat_0.png"].split and len(kept) == 3


def test_background(tmp_path):
    "Transparency is put on the configured colour, also where the bytes would have been kept."
    raw = fill(tmp_path / "raw", cat=2)
    rgba = picture(5).convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 0))
    rgba.paste(picture(6).crop((0, 0, 48, 80)), (0, 0))
    rgba.save(raw / "cat" / "glass.webp", lossless=True)
    for copy in (True, False):
        manifest = prepare_data(settings(tmp_path, background="#ff0000", image_size=64), copy=copy)
        row = next(row for row in manifest.images if row.source == "cat/glass.webp")
        im = open_rgb(manifest.path_of(row))
        assert (row.stored, im.getpixel((im.width - 2, 9))) == ("processed", (255, 0, 0))


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_true_ending(tmp_path, mode):
    raw = fill(tmp_path / "raw", cat=2)
    (raw / "cat" / "wrong.jpg").write_bytes(encoded(picture(9), "WEBP", lossless=True))
    before = tree(raw)
    manifest = prepare_data(settings(tmp_path, materialise=mode))
    assert {row.stored for row in manifest.images} == {"copied" if mode == "copy" else "linked"}
    assert tree(raw) == before
    row = next(row for row in manifest.images if row.source == "cat/wrong.jpg")
    assert row.file.endswith("/wrong.webp") and [r.code for r in row.reasons] == ["extension_mismatch"]


def test_buckets(tmp_path):
    raw = tmp_path / "raw" / "cat"
    raw.mkdir(parents=True)
    for i, size in enumerate([(400, 200), (200, 400), (300, 300), (160, 160)]):
        picture(i, size).save(raw / f"{i}.png")
    manifest = prepare_data(settings(tmp_path, aspect_buckets=True, image_size=256))
    assert [(r.width, r.height) for r in manifest.images] == [(320, 192), (192, 320), (256, 256), (128, 128)]
    assert all(open_rgb(manifest.path_of(r)).size == (r.width, r.height) for r in manifest.images)
    assert "no effect" not in summary(manifest)
    small = prepare_data(settings(tmp_path, aspect_buckets=True, image_size=64))
    text = "data.aspect_buckets has no effect: at data.image_size 64 the bucket of all 4 pictures is a square"
    assert f"shapes: {text}" in summary(small) and any(text in sentence for sentence in suggestions(small))


def test_check_data_writes_nothing(tmp_path):
    raw = fill(tmp_path / "raw", cat=5)
    (raw / "cat" / "soft.png").write_bytes(zoo()["soft.png"][0])
    before = tree(tmp_path)
    seen = check_data(settings(tmp_path))
    assert tree(tmp_path) == before and not (tmp_path / "out").exists()
    made = prepare_data(settings(tmp_path))
    assert seen.counts == made.counts
    assert [(r.source, r.split, r.caption) for r in seen.images] == [
        (r.source, r.split, r.caption) for r in made.images
    ]


EFFECTS = {"open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir"}  # events of Python's audit


def killed_run(config, moment, delay, workers=0):
    "Prepare data in a fork that gets kill -9 so many seconds after its n-th event; False when it ended before."
    if child := os.fork():
        end = time.monotonic() + 120
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            assert time.monotonic() < end, os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        return os.WIFSIGNALED(done[1])
    try:
        events = itertools.count()
        blow = functools.partial(os.kill, os.getpid(), signal.SIGKILL)

        def listen(event, _):
            if event in EFFECTS and next(events) == moment:
                threading.Timer(delay, blow).start() if delay else blow()

        prepare.makers = lambda tasks, targets: workers
        sys.addaudithook(listen)
        prepare_data(config, resplit=True)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tmp_path, kills):
    "Kill -9 again and again, each run going on from what the last one left; the end is that of a run that nothing disturbed."
    raw = fill(tmp_path / "raw", cat=24, dog=24)  # few enough for one worker: starting it is most of the work
    before, out = tree(raw), tmp_path / "out"
    calm = prepare_data(settings(tmp_path, processed_dir=str(tmp_path / "calm")))
    cv2.setNumThreads(1)  # threads do not live on in a fork
    rng, killed, rounds = np.random.default_rng(0), 0, 0
    while killed < kills and rounds < 400:
        if rounds % 10 == 5:
            shutil.rmtree(out, ignore_errors=True)
        config = settings(tmp_path, image_size=(32, 48)[rounds % 2], seed=rounds % 3)  # other files, under other names
        workers = 2 if rounds % 8 == 3 else 0
        killed += killed_run(config, rng.integers(300), rng.choice([0, rng.uniform(0, 0.01)]), workers)
        rounds += 1
        if (out / "manifest.json").exists():
            parse_manifest(out / "manifest.json")
    assert killed == kills
    last = prepare_data(settings(tmp_path), resplit=True)
    assert tree(out) == tree(tmp_path / "calm") and tree(raw) == before
    assert not list((out / ".prepare").glob("new-*"))  # nor what a worker was at
    assert last == calm.model_copy(update={"folder": last.folder})


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    raw = fill(tmp_path / "raw", cat=5)
    picture(9, (200, 120)).save(raw / "cat" / "wide.jpg", quality=95)
    glass = picture(10).convert("RGBA")
    glass.putalpha(128)
    glass.save(raw / "cat" / "glass.png")
    Image.fromarray(np.eye(12, dtype=np.uint8) * 255).resize((200, 120)).save(raw / "cat" / "wide-masklabel.png")
    trees = []
    for materialise, workers in [("process", 0), ("process", 1), ("process", 3), ("copy", 0), ("copy", 2)]:
        monkeypatch.setattr(prepare, "makers", lambda tasks, targets, n=workers: n)
        manifest = prepare_data(settings(tmp_path, background="#ff0000", materialise=materialise))
        assert sum(bool(row.mask) for row in manifest.images) == 1
        trees.append(tree(tmp_path / "out"))
        for place in ("train", "val", "masks"):  # what was looked at stays known
            shutil.rmtree(tmp_path / "out" / place, ignore_errors=True)
        (tmp_path / "out" / "manifest.json").unlink()
    assert trees[0] == trees[1] == trees[2] != trees[3] == trees[4]
    assert len(trees[0]) == 9  # seven pictures, a mask, the manifest


@pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")
def test_a_worker_that_dies_costs_one_picture_at_most(tmp_path, monkeypatch):
    raw = fill(tmp_path / "raw", cat=4)
    for i, name in enumerate(("kill-1.png", "raise-2.png", "once-3.png")):
        picture(i).save(raw / "cat" / name)
    monkeypatch.setattr(prepare, "makers", lambda tasks, targets: 2)
    monkeypatch.setattr(prepare, "make", survey_looks.make)
    manifest = prepare_data(settings(tmp_path))
    found = [(r.path, r.reason, r.detail) for r in manifest.rejected]
    assert found == [
        ("cat/kill-1.png", "decoder_crash", "the decoder ended with signal 9"),
        ("cat/raise-2.png", "decoder_crash", "the decoder raised RuntimeError: no pixels"),
    ]
    assert {row.source for row in manifest.images} == {f"cat/cat_{i}.png" for i in range(4)} | {"cat/once-3.png"}
    assert read_manifest(tmp_path / "out" / "manifest.json") == manifest
    monkeypatch.undo()
    assert len(prepare_data(settings(tmp_path)).images) == 7  # the next run tries again


def test_a_worker_that_cannot_write_says_so(tmp_path, monkeypatch):
    fill(tmp_path / "raw", cat=3)
    monkeypatch.setattr(prepare, "makers", lambda tasks, targets: 1)
    monkeypatch.setattr(prepare, "make", survey_looks.make_nowhere)
    with pytest.raises(LoraMvpError, match="cannot be written|Cannot write") as e:
        prepare_data(settings(tmp_path))
    assert e.value.code == "not_writable"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_runs_at_once(tmp_path):
    fill(tmp_path / "raw", cat=3)
    with locked(tmp_path / "out"):
        assert code(prepare_data, settings(tmp_path)) == "folder_busy"
    prepare_data(settings(tmp_path))


# ---- errors a user can mend


def test_bad_folders(tmp_path):
    config = settings(tmp_path)
    assert code(prepare_data, config) == "raw_missing"
    (tmp_path / "raw").mkdir()
    assert code(prepare_data, config) == "raw_empty"
    (tmp_path / "raw" / ".DS_Store").touch()
    assert code(prepare_data, config) == "raw_empty"
    (tmp_path / "raw" / "a.md").touch()
    assert code(prepare_data, config) == "nothing_accepted"
    (tmp_path / "raw" / "cat").mkdir()
    assert code(prepare_data, config) == "nothing_accepted"
    (tmp_path / "raw" / "cat" / "small.png").write_bytes(zoo()["small.png"][0])
    with pytest.raises(LoraMvpError, match=r"1 too_small.*cat/small.png.*at least 64.*data.min_resolution"):
        prepare_data(config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "file").touch()
    assert code(prepare_data, settings(tmp_path, raw_data_dir=str(tmp_path / "file"))) == "raw_missing"


@pytest.mark.parametrize("where", ["raw", "raw/out", "raw/cat", ".", "link_to_raw/x"])
def test_folders_overlap(tmp_path, where):
    fill(tmp_path / "raw", cat=2)
    (tmp_path / "link_to_raw").symlink_to(tmp_path / "raw", target_is_directory=True)
    before = tree(tmp_path)
    assert code(prepare_data, settings(tmp_path, processed_dir=str(tmp_path / where))) == "folders_overlap"
    assert tree(tmp_path) == before


def test_output_not_writable(tmp_path):
    fill(tmp_path / "raw", cat=2)
    (tmp_path / "file").touch()
    assert code(prepare_data, settings(tmp_path, processed_dir=str(tmp_path / "file" / "out"))) == "not_writable"
    assert code(prepare_data, settings(tmp_path, processed_dir=str(tmp_path / "file"))) == "not_writable"
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert code(prepare_data, settings(tmp_path, processed_dir=str(tmp_path / "locked"))) == "not_writable"


@pytest.mark.parametrize("template", ["{lable}", "{", "{}", "{label.__class__}", "{label[0]}", "{label:d}"])
def test_bad_template(tmp_path, template):
    fill(tmp_path / "raw", cat=2)
    with pytest.raises(LoraMvpError):  # by the configuration or by the chapter, never a KeyError
        prepare_data(settings(tmp_path, caption_template=template))
    assert not (tmp_path / "out").exists()


def test_bad_manifests(tmp_path):
    fill(tmp_path / "raw", cat=3)
    manifest = prepare_data(settings(tmp_path))
    path = tmp_path / "out" / "manifest.json"
    good = json.loads(path.read_text())
    assert code(read_manifest, tmp_path / "no.json") == "manifest_missing"
    assert code(read_manifest, tmp_path / "out") == "manifest_missing"
    for text in ("", "{", "[]", "null", '"x"', '{"schema_version": 1}', '{"images": 3}', "\xff", "[" * 100_000):
        path.write_bytes(text.encode("latin-1"))
        assert code(read_manifest, path) == "manifest_invalid", text[:20]
    path.write_text(json.dumps(good | {"schema_version": 3, "images": "changed"}))
    assert code(read_manifest, path) == "manifest_newer"
    for file in ("../x.png", "train/../../x.png", "/etc/passwd", "C:\\x.png", "..\\x.png", "\\\\host\\x.png", ""):
        path.write_text(json.dumps(good | {"counts": {}, "images": [good["images"][0] | {"file": file}]}))
        assert code(read_manifest, path) == "manifest_escapes", file
    path.write_text(json.dumps(good | {"images": good["images"][:1]}))
    assert code(read_manifest, path) == "manifest_invalid"  # the counts do not add up
    path.write_text(json.dumps(good | {"from_the_future": 1}))
    assert read_manifest(path) == manifest  # unknown keys of the same version are no problem
    manifest.path_of(manifest.images[0]).unlink()
    with pytest.raises(LoraMvpError, match=manifest.images[0].file) as e:
        read_manifest(path)
    assert e.value.code == "manifest_file_gone"


def test_the_shipped_schema_is_that_of_the_manifest(tmp_path):
    shipped = json.loads((Path(__file__).resolve().parent.parent / "docs" / "manifest.schema.json").read_text())
    assert shipped == manifest_schema()
    fill(tmp_path / "raw", cat=3)
    prepare_data(settings(tmp_path))
    jsonschema.validate(json.loads((tmp_path / "out" / "manifest.json").read_text()), shipped)


def test_a_plain_list_is_a_manifest(tmp_path):
    fill(tmp_path / "raw", cat=3)
    rows = [{"image": f"cat/cat_{i}.png", "caption": f"cat {i}", "split": "train" if i else "val"} for i in range(3)]
    (tmp_path / "raw" / "list.json").write_text(json.dumps(rows))
    manifest = read_manifest(tmp_path / "raw" / "list.json")
    assert [(row.caption, row.split) for row in manifest.images] == [
        ("cat 0", "val"),
        ("cat 1", "train"),
        ("cat 2", "train"),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("[]")
    assert code(prepare_data, settings(tmp_path)) == "output_occupied"  # somebody's list is not ours to replace


def test_stopped_in_the_middle(tmp_path, monkeypatch):
    "An error while writing leaves the earlier manifest and its files; the next run completes."
    from lora_mvp.data import storage

    raw = fill(tmp_path / "raw", cat=4)
    first = prepare_data(settings(tmp_path))
    fill(raw, dog=4)
    write, calls = storage.atomic_write, []

    def fail_third(path, content):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(storage, "atomic_write", fail_third)
    with pytest.raises(LoraMvpError, match="No space left") as e:
        prepare_data(settings(tmp_path))
    assert e.value.code == "not_writable"
    assert read_manifest(tmp_path / "out" / "manifest.json") == first
    monkeypatch.setattr(storage, "atomic_write", write)
    assert len(prepare_data(settings(tmp_path)).images) == 8
    assert not [p for p in (tmp_path / "out").glob("[!.]*/**/*") if p.is_file() and p.suffix != ".png"]


def test_manifest_is_always_whole(tmp_path):
    "A reader in another thread sees a whole manifest at every moment of a re-run."
    fill(tmp_path / "raw", cat=6)
    prepare_data(settings(tmp_path))
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(len(parse_manifest(Path(tmp_path / "out" / "manifest.json")).images))

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(3):
        prepare_data(settings(tmp_path, seed=seed), resplit=True)
    stop.set()
    reader.join()
    assert set(seen) == {6}


def test_scan_is_in_order_of_bytes(tmp_path):
    raw = fill(tmp_path / "raw", b=2, a=2)
    (raw / "A").mkdir()
    picture().save(raw / "A" / "z.png")
    paths = [record.path for _, record in scan(raw)[0]]
    assert paths == sorted(paths, key=str.encode)


# ---- a folder that somebody works in meanwhile


def edit(path):
    picture(50).save(path)


def edit_in_place(path):
    with open(path, "r+b") as file:
        file.write(picture(51).tobytes()[:10])


def vanish(path):
    path.unlink()


CHANGES = [("process", edit), ("process", vanish), ("copy", edit_in_place), ("link", edit_in_place), ("link", vanish)]


@pytest.mark.parametrize(("mode", "happens"), CHANGES)
def test_a_picture_that_changes_while_data_is_prepared_costs_that_picture(tmp_path, monkeypatch, mode, happens):
    """It is named, and the record is true of what was stored."""
    raw = fill(tmp_path / "raw", cat=4)
    planned = prepare.plan_files

    def plan_and_change(found, data):
        targets = planned(found, data)
        happens(raw / "cat" / "cat_1.png")
        return targets

    monkeypatch.setattr(prepare, "plan_files", plan_and_change)
    manifest = prepare_data(settings(tmp_path, materialise=mode))
    monkeypatch.setattr(prepare, "plan_files", planned)
    assert [(r.path, r.reason) for r in manifest.rejected] == [("cat/cat_1.png", "changed")]
    assert "cat/cat_1.png" in summary(manifest)
    assert len(manifest.images) == 3 and len(manifest.history) == 3
    for row in read_manifest(tmp_path / "out" / "manifest.json").images:
        assert hashlib.sha256(manifest.path_of(row).read_bytes()).hexdigest() == row.sha256
        assert hashlib.sha256((raw / row.source).read_bytes()).hexdigest() == row.source_sha256
    stored = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")}
    assert stored == {row.file for row in manifest.images}
    if happens is edit:  # the next run takes what is there then
        assert len(prepare_data(settings(tmp_path)).images) == 4


def test_every_picture_changes(tmp_path, monkeypatch):
    raw, planned = fill(tmp_path / "raw", cat=2), prepare.plan_files
    monkeypatch.setattr(prepare, "plan_files", lambda *a: (planned(*a), shutil.rmtree(raw / "cat"))[0])
    with pytest.raises(prepare.NothingAccepted) as e:
        prepare_data(settings(tmp_path))
    assert "2 changed" in str(e.value) and e.value.manifest.counts["rejected"] == 2


def test_pictures_are_stored_again_when_they_are_read_in_another_way(tmp_path):
    """A manifest of a version that read colours otherwise does not vouch for what it stored."""
    fill(tmp_path / "raw", cat=3)
    first = prepare_data(settings(tmp_path))
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    row = content["images"][0]
    pale = encoded(Image.new("RGB", (32, 32), "grey"))
    (tmp_path / "out" / row["file"]).write_bytes(pale)
    row["sha256"], row["facts"]["pixel_sha256"] = hashlib.sha256(pale).hexdigest(), "of another reading"
    path.write_text(json.dumps(content))
    assert prepare_data(settings(tmp_path)).images == first.images


def test_labels_in_numbers_and_with_odd_names(tmp_path):
    "3,000 labels are a table of twenty, empty folders are named, and no file has the name of a device."
    raw = fill(tmp_path / "raw", **{f"label{k:02}": 1 for k in range(30)}, con=1)
    (raw / "dog").mkdir()
    picture(77).save(raw / "con" / "aux.png")
    manifest = prepare_data(settings(tmp_path))
    lines = summary(manifest).splitlines()
    assert len(lines) < 60 and lines[0].split() == ["label", "train", "val", "rejected"]
    assert any(line.startswith("and 11 more") for line in lines) and any(line.startswith("con ") for line in lines)
    assert {row.file.split("/")[1] for row in manifest.images if row.label == "con"} == {"_con"}
    assert "_aux.png" in {Path(row.file).name for row in manifest.images}
    assert "folder: folders without a file: dog" in lines
