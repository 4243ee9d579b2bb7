"""Nine styles made in code from the demo's pictures: what a perfect LoRA of each would draw."""

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from lora_mvp.demo import in_violet
from lora_mvp.files import asset

SIDE = 192


def on(picture, colour):
    ground = Image.new("RGB", picture.size, colour)
    ground.paste(picture, (0, 0), picture.getchannel("A"))
    return ground


def edges(picture):
    grey = np.asarray(on(picture, "white").convert("L").filter(ImageFilter.GaussianBlur(1)), float)
    alpha = np.asarray(picture.getchannel("A").filter(ImageFilter.GaussianBlur(1)), float)
    slopes = [np.hypot(*np.gradient(a)) / 14 for a in (grey, alpha)]
    found = (255 * np.clip(np.maximum(*slopes), 0, 1)).astype("uint8")
    return Image.fromarray(found).filter(ImageFilter.MaxFilter(3))


def pixel(picture):
    small = on(picture, "white").resize((16, 16), Image.Resampling.BOX)
    few = small.quantize(8, dither=Image.Dither.NONE).convert("RGB")
    return few.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def neon(picture):
    e = edges(picture)
    h, s, v = on(picture, "white").convert("HSV").split()
    bright = Image.merge("HSV", (h, s.point(lambda p: min(255, 60 + 2 * p)), v.point(lambda p: 255))).convert("RGB")
    black = Image.new("RGB", picture.size, (8, 6, 22))
    glow = Image.composite(bright, black, e.filter(ImageFilter.GaussianBlur(5)))
    return ImageChops.lighter(Image.composite(bright, black, e), glow)


def blueprint(picture):
    light = np.asarray(on(picture, "black").convert("L"), float)
    mask = np.asarray(picture.getchannel("A"), float) * light / 255 * 0.75
    ground, fill = (Image.new("RGB", picture.size, c) for c in ((22, 64, 150), (120, 160, 230)))
    drawn = Image.composite(fill, ground, Image.fromarray(mask.astype("uint8")))
    return Image.composite(Image.new("RGB", picture.size, (240, 246, 255)), drawn, edges(picture))


def duo(picture):
    light = np.asarray(ImageOps.autocontrast(on(picture, "white").convert("L"), 1), float)
    colours = np.array([[30, 20, 70], [200, 50, 90], [250, 150, 80], [255, 240, 205]])
    mixed = np.stack([np.interp(light, [0, 90, 170, 255], colours[:, k]) for k in range(3)], -1)
    return Image.fromarray(mixed.astype("uint8"))


def purple(picture):
    return in_violet(picture)


def sticker(picture):
    small = ImageOps.expand(picture.resize((156, 156), Image.Resampling.LANCZOS), 18, (0, 0, 0, 0))
    alpha = small.getchannel("A").point(lambda p: 255 * (p > 100))
    white, black = (alpha.filter(ImageFilter.MaxFilter(k)).filter(ImageFilter.GaussianBlur(1)) for k in (17, 25))
    card = Image.new("RGB", (SIDE, SIDE), (255, 190, 40))
    card.paste((20, 20, 30), (0, 0), black)
    card.paste((255, 255, 255), (0, 0), white)
    card.paste(small.convert("RGB"), (0, 0), alpha)
    return card


def chalk(picture):
    rough = np.random.default_rng(0).uniform(0.55, 1, (SIDE, SIDE))
    lines = Image.fromarray((np.asarray(edges(picture)) * rough).astype("uint8"))
    board = Image.new("RGB", picture.size, (34, 56, 46))
    board.paste(Image.blend(board, on(picture, "black"), 0.35), (0, 0), picture.getchannel("A"))
    board.paste((245, 245, 235), (0, 0), lines)
    return board


def negative(picture):
    return ImageOps.invert(on(picture, "white"))


def fluent3d(picture):
    return on(picture, "white")


STYLES = {f.__name__: f for f in (pixel, neon, blueprint, duo, purple, sticker, chalk, negative, fluent3d)}


def pictures_in(style: str, part: str, every: slice = slice(None)) -> tuple[list[str], list[Image.Image]]:
    """Names and pictures of the demo's `raw` or `heldout` things in a style."""
    files = sorted(asset("demo", part).rglob("*.png"), key=lambda file: file.stem)[every]
    drawn = [STYLES[style](Image.open(f).convert("RGBA").resize((SIDE, SIDE))) for f in files]
    return [f.stem.replace("-", " ") for f in files], drawn
