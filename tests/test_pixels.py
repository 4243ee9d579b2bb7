"""Pictures as a colour-managed viewer shows them, and formats that are not read."""

import base64
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import colour_cases as cases
import numpy as np
import pytest
from browser import browse
from PIL import Image

from lora_mvp.data.images import decode
from lora_mvp.data.looks import inspect_image
from lora_mvp.errors import LoraMvpError

LINEAR, AS_IS = (99, 137, 188), (32, 64, 128)


def ramp(data):
    """The columns 32, 64 and 128, red channel; the notes."""
    rgb, notes = decode(data)
    return tuple(rgb.getpixel((x, 2))[0] for x in (32, 64, 128)), notes


def near(found, expected, by=1):
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= by


@pytest.mark.parametrize(
    ("name", "expected", "note"),
    [("lin.png", LINEAR, "icc_converted"), ("wiz16.tif", (223, 191, 127), "16bit"), ("gama.png", LINEAR, "icc_converted"), ("pq.png", (5, 30, 132), "hdr")],
)  # fmt: skip
def test_pictures_whose_right_value_is_known(name, expected, note):
    found, notes = ramp((cases.PICTURES / name).read_bytes())
    assert near(found, expected) and note in notes


EXPECTED = {  # what Chromium 156 shows
    "plain.png": AS_IS, "linear profile.png": LINEAR, "P3 profile.png": AS_IS, "broken profile, gAMA.png": LINEAR,
    "profile, gAMA.png": LINEAR, "sRGB and profile.png": LINEAR, "gAMA 1.png": LINEAR, "gAMA 1, sRGB.png": AS_IS,
    "gAMA 0.png": AS_IS, "gAMA 1/2.2.png": AS_IS, "gAMA 0.47.png": AS_IS, "gAMA 0.5.png": (34, 71, 137),
    "gAMA 0.43.png": (22, 56, 124), "gAMA 1/2.2, cHRM.png": (26, 62, 129), "gAMA 1/2.2, cHRM P3.png": (26, 62, 129),
    "cHRM alone.png": AS_IS, "cICP over profile.png": AS_IS, "cICP unspecified.png": AS_IS,
    "cICP half unspecified.png": AS_IS, "cICP 1 1.png": (20, 54, 121), "cICP 1 4.png": (26, 62, 129),
    "cICP 1 5.png": (10, 40, 106), "cICP 1 7.png": (50, 81, 141), "cICP 1 8.png": LINEAR, "cICP 1 13.png": AS_IS,
    "cICP 1 16.png": (5, 30, 132), "cICP 1 17.png": (15, 48, 118), "cICP 1 18.png": (14, 43, 99),
    "nclx 1 1.avif": AS_IS, "nclx 1 8.avif": LINEAR, "nclx 9 16.avif": (5, 30, 132), "nclx 2 2.avif": AS_IS,
    "grey, RGB profile.png": LINEAR, "grey gAMA.png": LINEAR, "grey cICP.png": LINEAR, "16-bit grey.png": AS_IS,
    "16-bit grey gAMA.png": LINEAR, "16-bit RGB profile.png": LINEAR, "16-bit grey, 64 transparent.png": (32, 255, 128),
    "grey, 64 transparent.png": (32, 255, 128), "grey with alpha, profile.png": LINEAR, "RGBA, profile.png": LINEAR,
    "profile.jpg": LINEAR, "grey, RGB profile.jpg": LINEAR, "profile.webp": LINEAR, "profile.avif": LINEAR,
}  # fmt: skip
PATCHES = {  # the first three patches, where primaries matter
    "P3 profile.png": [(218, 24, 40), (0, 204, 0), (50, 50, 208)],
    "cICP 4 13.png": [(236, 37, 35), (0, 196, 22), (0, 75, 206)],
    "cICP 9 13.png": [(248, 0, 41), (0, 211, 0), (0, 46, 210)],
    "cICP 11 13.png": [(213, 24, 41), (0, 204, 0), (49, 48, 208)],
    "nclx 12 13.avif": [(218, 24, 39), (0, 204, 0), (49, 51, 207)],
}


def test_colours():
    files = cases.colour_cases()
    wrong = {
        name: (ramp(files[name])[0], right) for name, right in EXPECTED.items() if not near(ramp(files[name])[0], right)
    }
    assert wrong == {}
    for name, right in PATCHES.items():
        rgb, _ = decode(files[name])
        found = [rgb.getpixel(point) for point in cases.POINTS[4:7]]
        assert all(near(f, r, 3) for f, r in zip(found, right, strict=True)), (name, found)


def test_what_cannot_be_shown_right_is_noted():
    notes = {name: decode(data)[1] for name, data in cases.colour_cases().items()}
    assert {name for name, found in notes.items() if "hdr" in found} == {
        "cICP 1 16.png", "cICP 1 18.png", "nclx 9 16.avif", "nclx 9 18.avif"}  # fmt: skip
    assert notes["RGB, grey profile.png"] == ["icc_invalid"]
    for codes in ((1, 12), (99, 13)):
        assert decode(cases.png(cases.RGB, cases.cicp(*codes)))[1] == ["colour_unknown"]


def test_which_way_up():
    for name, (data, right) in cases.turn_cases().items():
        rgb, notes = decode(data)
        corners = [rgb.getpixel((x, y)) for y in (2, rgb.height - 3) for x in (2, rgb.width - 3)]
        assert cases.letters(corners) == right, name
        assert ("rotated" in notes) == (right != "RGBW"), name
    notes = {name: decode(data)[1] for name, (data, _) in cases.turn_cases().items()}
    assert {name for name, found in notes.items() if "orientation_ignored" in found} == {
        "EXIF 6 as a long.jpg", "XMP 6.jpg", "eXIf after the pixels.png", "eXIf with the mark of JPEG.png",
        "eXIf 1, eXIf 6.png", "text of ImageMagick.png", "XMP.png", "EXIF.webp", "XMP.webp"}  # fmt: skip


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_which_way_up_a_tiff_is(compression):
    """Its tag counts, once, and XMP does not; the 16-bit forms of it count from the right side."""
    for orientation in range(1, 9):
        options = {"tiffinfo": {274: orientation, 700: cases.xmp(3)}, "compression": compression}
        rgb, notes = decode(cases.saved(cases.CORNERS, "TIFF", **options))
        corners = [rgb.getpixel((x, y)) for y in (2, rgb.height - 3) for x in (2, rgb.width - 3)]
        assert cases.letters(corners) == cases.UPRIGHT[orientation]
        assert notes == ([] if orientation == 1 else ["rotated"])
    assert "rotated" not in decode(cases.saved(cases.CORNERS, "TIFF", tiffinfo={700: cases.xmp(3)}))[1]


SHOW = """(async (b, mime, points) => {
    const image = new Image(), bytes = Uint8Array.from(atob(b), c => c.charCodeAt(0));
    image.src = URL.createObjectURL(new Blob([bytes], {type: mime}));
    await image.decode();
    const canvas = document.createElement('canvas'), w = canvas.width = image.naturalWidth, h = canvas.height = image.naturalHeight;
    const view = canvas.getContext('2d', {willReadFrequently: true});
    view.fillStyle = '#fff'; view.fillRect(0, 0, w, h); view.drawImage(image, 0, 0);
    const places = points || [[2, 2], [w - 3, 2], [2, h - 3], [w - 3, h - 3]];
    return places.map(p => Array.from(view.getImageData(p[0], p[1], 1, 1).data).slice(0, 3));
})"""


@pytest.mark.slow
def test_chromium_shows_the_same(tmp_path):
    """Every case above, shown by the browser itself; for HDR the grey axis alone, since tone mapping differs elsewhere."""

    def shown(page, name, data, points):
        content, mime = base64.b64encode(data).decode(), cases.MIME[Path(name).suffix]
        return page.js(f"{SHOW}({json.dumps(content)}, {json.dumps(mime)}, {json.dumps(points)})")

    wrong = {}
    with browse("about:blank", tmp_path) as page:
        for name, data in cases.colour_cases().items():
            rgb, notes = decode(data)
            points = (
                [(x, 2) for x in range(0, 256, 15)] if "hdr" in notes or name.startswith("shared") else cases.POINTS
            )
            found, ours = shown(page, name, data, points), [rgb.getpixel(tuple(p)) for p in points]
            by = np.abs(np.array(found) - np.array(ours)).max()
            if by > (3 if "hdr" in notes else 2):
                wrong[name] = (int(by), found, ours)
        for name, (data, right) in cases.turn_cases().items():
            if cases.letters(shown(page, name, data, None)) != right:
                wrong[name] = right
    assert wrong == {}


# ---- formats

KINDS = {
    "a.jxl": (b"\xff\x0a" + bytes(99), "JPEG XL"),
    "b.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "JPEG 2000"),
    "c.psd": (b"8BPS\0\1" + bytes(99), "Photoshop"),
    "d.cr3": (b"\0\0\0\x18ftypcrx " + bytes(99), "camera raw"),
    "e.raf": (b"FUJIFILMCCD-RAW 0201" + bytes(99), "camera raw"),
    "f.orf": (b"IIRO\x08\0\0\0" + bytes(99), "camera raw"),
    "g.tga": (b"\0\0\2" + bytes(99), "Targa"),
    "h.exr": (b"v/1\x01" + bytes(99), "OpenEXR"),
    "without_ending": (b"8BPS\0\1" + bytes(99), "Photoshop"),
    "named.jpg": (b"\xff\x0a" + bytes(99), "JPEG XL"),
}


def test_formats_that_are_not_read_are_named(tmp_path):
    raw = Image.new("RGB", (96, 96), "red")
    files = KINDS | {
        "i.dng": (cases.saved(np.asarray(raw), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "camera raw"),
        "j.tif": (cases.saved(np.asarray(raw), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "camera raw"),
        "k.nef": (cases.saved(np.asarray(raw), "TIFF"), "camera raw"),
    }
    for name, (data, kind) in files.items():
        (tmp_path / name).write_bytes(data)
        record = inspect_image(tmp_path / name)
        assert (record.status, record.reason) == ("rejected", "unread_format"), name
        assert kind in record.detail and "save it as" in record.detail or "export it" in record.detail
    (tmp_path / "k.nef").unlink()
    (tmp_path / "broken.nef").write_bytes(b"hello")
    assert inspect_image(tmp_path / "broken.nef").reason == "unreadable"


def test_heic_without_its_reader():
    """Named, with the extra; the ending alone is enough for a caption beside it to be no lone one."""
    script = """if True:
        import sys
        sys.modules["pillow_heif"] = None
        from lora_mvp.data.images import decode
        from lora_mvp.errors import LoraMvpError
        try:
            decode(b"\\0\\0\\0\\x18ftypheic" + bytes(40))
        except LoraMvpError as e:
            print(e.code, e)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("unread_format HEIC: ") and "lora-mvp[heic]" in done.stdout, done.stderr


def test_heic(tmp_path):
    """Its turn and its colours are applied once."""
    heif = pytest.importorskip("pillow_heif")

    def heic(pixels, **options):
        buffer = io.BytesIO()
        heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=-1, chroma=444, **options)
        return buffer.getvalue()

    for orientation in range(1, 9):
        im = Image.fromarray(cases.CORNERS)
        buffer = io.BytesIO()
        heif.register_heif_opener()
        im.save(buffer, "HEIF", quality=95, exif=b"Exif\0\0" + cases.exif(orientation))
        rgb, _ = decode(buffer.getvalue())
        corners = [rgb.getpixel((x, y)) for y in (2, rgb.height - 3) for x in (2, rgb.width - 3)]
        assert cases.letters(corners) == cases.UPRIGHT[orientation]
    assert near(ramp(heic(cases.RGB))[0], AS_IS, 3)
    found, notes = ramp(heic(cases.RGB, icc_profile=cases.LINEAR))
    assert near(found, LINEAR, 3) and notes == ["icc_converted"]
    (tmp_path / "IMG_0001.HEIC").write_bytes(heic(cases.RGB))
    record = inspect_image(tmp_path / "IMG_0001.HEIC")
    assert record.format == "HEIF" and "extension_mismatch" not in record.warnings
    (tmp_path / "cut.heic").write_bytes(heic(cases.RGB)[:200])
    assert inspect_image(tmp_path / "cut.heic").reason == "unreadable"


def test_grey_tiffs():
    """12 bits, WhiteIsZero and big-endian: the same grey."""
    values = np.array([[0, 2048, 4095] * 2] * 2, np.uint16)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    tags = [(256, 3, 1, 6), (257, 3, 1, 2), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, len(packed))]  # fmt: skip
    body = packed + bytes(len(packed) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    rgb, notes = decode(b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory)
    assert [rgb.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255] and notes == ["16bit"]
    big = Image.fromarray(cases.DEEP.astype(">u2"))
    assert ramp(cases.saved(cases.DEEP.astype(">u2"), "TIFF"))[0] == AS_IS, big.mode


def test_a_tiff_of_another_kind_says_so():
    with pytest.raises(LoraMvpError) as e:
        decode(b"II*\0\x08\0\0\0\0\0" + bytes(20))
    assert e.value.code == "unsupported_mode" and "TIFF" in str(e.value)
