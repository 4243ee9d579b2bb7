"""Picture files whose right look is known: what Chromium 156 shows of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lora_mvp.data.colours import CURVES, PRIMARIES, made_profile

PICTURES = Path(__file__).parent / "pictures"
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}
PATCHES = [
    (200, 50, 50),
    (50, 200, 50),
    (50, 50, 200),
    (255, 0, 0),
    (250, 240, 40),
    (20, 30, 10),
    (128, 0, 200),
    (9, 9, 9),
]
POINTS = [(32, 2), (64, 2), (128, 2), (230, 2), *((32 * k + 16, 12) for k in range(8))]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels, *chunks):
    """Grey, grey with alpha, RGB or RGBA, of 8 or 16 bits, with chunks before the pixels."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8 * pixels.dtype.itemsize, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(pixels, form, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


GREY = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
RGB = np.stack([GREY] * 3, 2)
for k, colour in enumerate(PATCHES):
    RGB[8:, 32 * k : 32 * k + 32] = colour
DEEP = GREY.astype(np.uint16) * 257
HALF = np.full_like(GREY, 255)
LINEAR, P3 = made_profile("RGB", CURVES[8]), made_profile("RGB", CURVES[13], PRIMARIES[12])
GREY_LINEAR = made_profile("GRAY", CURVES[8])


def icc(profile):
    return b"iCCP", b"x\0\0" + zlib.compress(profile)


def gamma(value):
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def primaries(code):
    red, green, blue, white = PRIMARIES[code]
    return b"cHRM", struct.pack(">8I", *(round(v * 100_000) for v in (*white, *red, *green, *blue)))


def cicp(*codes):
    return b"cICP", bytes([*codes, 0, 1])


def avif(primaries=1, curve=13, **options):
    """With other codes in its box `colr`."""
    data = saved(RGB, "AVIF", quality=100, subsampling="4:4:4", **options)
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, curve) + data[at + 4 :]


def colour_cases():
    """Name with its ending -> bytes."""
    lossless = {"quality": 100, "subsampling": 0}
    cases = {f"shared {name}": (PICTURES / name).read_bytes() for name in ("lin.png", "gama.png")}
    cases |= {f"{name}.png": png(RGB, *chunks) for name, chunks in {
        "plain": [], "linear profile": [icc(LINEAR)], "P3 profile": [icc(P3)], "broken profile, gAMA": [icc(b"x"), gamma(1)],
        "profile, gAMA": [icc(LINEAR), gamma(0.45455)], "sRGB and profile": [(b"sRGB", b"\0"), icc(LINEAR)],
        "gAMA 1": [gamma(1)], "gAMA 1, sRGB": [gamma(1), (b"sRGB", b"\0")], "gAMA 0": [gamma(0)],
        "gAMA 1/2.2": [gamma(0.45455)], "gAMA 0.47": [gamma(0.47)], "gAMA 0.5": [gamma(0.5)], "gAMA 0.43": [gamma(0.43)],
        "gAMA 1/2.2, cHRM": [gamma(0.45455), primaries(1)], "gAMA 1/2.2, cHRM P3": [gamma(0.45455), primaries(12)],
        "cHRM alone": [primaries(12)], "cICP over profile": [cicp(1, 13), icc(LINEAR)],
        "cICP unspecified": [cicp(2, 2)], "cICP half unspecified": [cicp(2, 8)],
    }.items()}  # fmt: skip
    cases |= {
        f"cICP {a} {b}.png": png(RGB, cicp(a, b)) for a, b in [(p, 13) for p in PRIMARIES] + [(1, t) for t in CURVES]
    }
    cases |= {
        f"nclx {a} {b}.avif": avif(a, b)
        for a, b in [(12, 13), (9, 13), (1, 8), (1, 1), (1, 6), (1, 4), (2, 2), (9, 16), (9, 18)]
    }
    cases |= {
        "grey, RGB profile.png": png(GREY, icc(LINEAR)),
        "grey, grey profile.png": png(GREY, icc(GREY_LINEAR)),
        "RGB, grey profile.png": png(RGB, icc(GREY_LINEAR)),
        "grey gAMA.png": png(GREY, gamma(1)),
        "grey cICP.png": png(GREY, cicp(12, 8)),
        "16-bit grey.png": png(DEEP),
        "16-bit grey gAMA.png": png(DEEP, gamma(1)),
        "16-bit grey, grey profile.png": png(DEEP, icc(GREY_LINEAR)),
        "16-bit RGB profile.png": png(RGB.astype(np.uint16) * 257, icc(LINEAR)),
        "16-bit grey, 64 transparent.png": png(DEEP, (b"tRNS", struct.pack(">H", 64 * 257))),
        "grey, 64 transparent.png": png(GREY, (b"tRNS", b"\0\x40")),
        "grey with alpha, profile.png": png(np.dstack([GREY, HALF]), icc(LINEAR)),
        "RGBA, profile.png": png(np.dstack([RGB, HALF]), icc(LINEAR)),
        "profile.jpg": saved(RGB, "JPEG", icc_profile=LINEAR, **lossless),
        "P3.jpg": saved(RGB, "JPEG", icc_profile=P3, **lossless),
        "grey, RGB profile.jpg": saved(GREY, "JPEG", quality=100, icc_profile=LINEAR),
        "profile.webp": saved(RGB, "WEBP", lossless=True, icc_profile=LINEAR),
        "P3.webp": saved(RGB, "WEBP", lossless=True, icc_profile=P3),
        "profile.avif": saved(RGB, "AVIF", quality=100, subsampling="4:4:4", icc_profile=LINEAR),
    }
    return cases


# ---- which way up

CORNERS = np.zeros((32, 64, 3), np.uint8)
CORNERS[:16, :32, 0] = CORNERS[:16, 32:, 1] = CORNERS[16:, :32, 2] = CORNERS[16:, 32:] = 255
UPRIGHT = ["RGBW", "RGBW", "GRWB", "WBGR", "BWRG", "RBGW", "BRWG", "WGBR", "GWRB"]  # by EXIF orientation


def exif(orientation, kind=3, order="<"):
    """A TIFF with one tag; `kind` 3 is a short, which alone is valid."""
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    return head + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4)


def xmp(orientation):
    return f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'.encode()


def jpeg(*parts):
    """With APP1 segments at its start."""
    data = saved(CORNERS, "JPEG", quality=95, subsampling=0)
    return data[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts) + data[2:]


def in_exif(*arguments, **options):
    return b"Exif\0\0" + exif(*arguments, **options)


def in_xmp(orientation):
    return b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation)


def turn_cases():
    """Name with its ending -> bytes, the corners that a viewer shows."""
    plain, late = png(CORNERS), chunk(b"eXIf", exif(6))
    raw = b"\nexif\n%8d\n%s\n" % (len(in_exif(6)), in_exif(6).hex().encode())
    empty = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"
    cases = {f"EXIF {o}.jpg": (jpeg(in_exif(o)), UPRIGHT[o]) for o in range(9)}
    cases |= {f"irot {o}.avif": (saved(CORNERS, "AVIF", quality=95, exif=exif(o)), UPRIGHT[o]) for o in range(2, 9)}
    return cases | {
        "EXIF 9.jpg": (jpeg(in_exif(9)), UPRIGHT[1]),
        "EXIF 6 big-endian.jpg": (jpeg(in_exif(6, order=">")), UPRIGHT[6]),
        "EXIF 6 as a long.jpg": (jpeg(in_exif(6, kind=4)), UPRIGHT[1]),
        "XMP 6.jpg": (jpeg(in_xmp(6)), UPRIGHT[1]),
        "EXIF 1, XMP 6.jpg": (jpeg(in_exif(1), in_xmp(6)), UPRIGHT[1]),
        "XMP 6, EXIF 3.jpg": (jpeg(in_xmp(6), in_exif(3)), UPRIGHT[3]),
        "EXIF 6, EXIF 3.jpg": (jpeg(in_exif(6), in_exif(3)), UPRIGHT[6]),
        "EXIF 1, EXIF 6.jpg": (jpeg(in_exif(1), in_exif(6)), UPRIGHT[1]),
        "empty EXIF, EXIF 6.jpg": (jpeg(empty, in_exif(6)), UPRIGHT[1]),
        "eXIf.png": (png(CORNERS, (b"eXIf", exif(6))), UPRIGHT[6]),
        "eXIf after the pixels.png": (plain[:-12] + late + plain[-12:], UPRIGHT[1]),
        "eXIf with the mark of JPEG.png": (png(CORNERS, (b"eXIf", in_exif(6))), UPRIGHT[1]),
        "eXIf 1, eXIf 6.png": (png(CORNERS, (b"eXIf", exif(1)), (b"eXIf", exif(6))), UPRIGHT[1]),
        "text of ImageMagick.png": (png(CORNERS, (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))), UPRIGHT[1]),
        "XMP.png": (png(CORNERS, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))), UPRIGHT[1]),
        "EXIF.webp": (saved(CORNERS, "WEBP", lossless=True, exif=exif(6)), UPRIGHT[1]),
        "XMP.webp": (saved(CORNERS, "WEBP", lossless=True, xmp=xmp(6)), UPRIGHT[1]),
    }  # fmt: skip


def letters(corners):
    """Four colours as letters."""
    names = {(255, 0, 0): "R", (0, 255, 0): "G", (0, 0, 255): "B", (255, 255, 255): "W"}
    return "".join(names[tuple(255 * (v > 127) for v in colour[:3])] for colour in corners)
