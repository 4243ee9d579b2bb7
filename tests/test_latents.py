"Latents: a cache that survives kills, damage and company; buckets; the order of the data; captions that vary."

import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.manifest import read_manifest
from lora_mvp.data.prepare import prepare_data
from lora_mvp.data.steps import Plan
from lora_mvp.data.storage import OBLONG, bucket_of
from lora_mvp.models.base import load_base
from lora_mvp.models.families import denoise, encode_text, granularity
from lora_mvp.models.miniatures import random_base
from lora_mvp.train.cache import cache_folder, unpack_tensors
from lora_mvp.train.latents import LatentSet, encode_images
from lora_mvp.train.pictures import Source, regularization_sources, sources
from lora_mvp.train.streams import load_data
from lora_mvp.train.texts import TextTable, caption_variants

SIZES = [(96, 64), (64, 96), (80, 80), (128, 64), (70, 100), (90, 90), (100, 66), (66, 130)]


def picture(k, size):
    "A smooth picture that no other number gives."
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / 20
    waves = [np.sin(x * (1 + c / 3) + y * (k + 1) / 4 + k) for c in range(3)]
    return Image.fromarray(np.uint8(127.5 + 127 * np.stack(waves, -1)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    "Settings for eight pictures of many shapes."
    home = tmp_path_factory.mktemp("data")
    (home / "raw" / "wave").mkdir(parents=True)
    for k, size in enumerate(SIZES):
        picture(k, size).save(home / "raw" / "wave" / f"{k}.png")
    folders = {"data.raw_data_dir": str(home / "raw"), "data.processed_dir": str(home / "processed")}
    tags = {"data.caption_template": "sks {label}, number {stem}, soft, bright"}
    return load_config(overrides={**folders, **tags, "data.blur_threshold": 0, "training.pretrained_model": "tiny"})


@pytest.fixture(scope="module")
def manifest(config):
    "The data prepared, the files kept as they are."
    return prepare_data(config, copy=False)


@pytest.fixture(scope="module")
def train(manifest):
    return sources(manifest, "train")


@pytest.fixture(scope="module")
def pipe():
    return load_base("tiny")


@pytest.fixture
def training(config):
    return config.training.model_copy(update={"aspect_buckets": True})


class Calls:
    "Counts the real forward passes of a module."

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


@pytest.fixture(scope="module")
def vae_calls(pipe):
    return Calls(pipe.vae.encoder)


def same(a, b):
    pairs = [(part(a, i), part(b, i)) for part in (LatentSet.mean, LatentSet.std) for i in range(len(a))]
    return a.ids == b.ids and a.captions == b.captions and all(torch.equal(x, y) for x, y in pairs)


def entries(cache):
    return sorted((cache / "latents").glob("*.safetensors"))


# ---- the cache


def test_second_run_encodes_nothing_and_has_the_same_bits(pipe, train, training, tmp_path, vae_calls):
    bare = encode_images(pipe, train, training, ["horizontal_flip"], None)
    first = encode_images(pipe, train, training, ["horizontal_flip"], tmp_path)
    before, text = vae_calls.count, Calls(pipe.text_encoder)
    second = encode_images(pipe, train, training, ["horizontal_flip"], tmp_path)
    assert vae_calls.count == before
    assert same(bare, first) and same(bare, second)
    bare_text, first_text = TextTable(pipe, bare.captions, None), TextTable(pipe, bare.captions, tmp_path)
    before = text.count
    second_text = TextTable(pipe, bare.captions, tmp_path)
    assert before == 2 * len(set(bare.captions)) and text.count == before
    for table in (first_text, second_text):
        assert torch.equal(table[bare.captions]["prompt_embeds"], bare_text[bare.captions]["prompt_embeds"])
    for step in range(3):
        one, other = (s.draw([0], 42, step, 1, training) for s in (bare, second))
        assert torch.equal(one.latents, other.latents)


def test_half_precision_is_kept_as_it_was_computed(train, training, tmp_path):
    """A bfloat16 base's numbers have eight bits: kept in half the room, they give the same draws to the bit."""
    half, sizes = load_base("tiny", dtype=torch.bfloat16), {}
    bare, first, second = (encode_images(half, train, training, [], cache) for cache in (None, tmp_path, tmp_path))
    assert same(bare, first) and same(bare, second)
    assert {entry[name].dtype for entry in second.entries for name in ("mean", "std")} == {torch.bfloat16}
    assert second.mean(0).dtype == second.draw([0], 42, 1, 0, training).latents.dtype == torch.float32
    table, again = (TextTable(half, bare.captions, tmp_path)[bare.captions]["prompt_embeds"] for _ in range(2))
    assert table.dtype == torch.bfloat16 and torch.equal(table, again)
    assert torch.equal(table[:1], encode_text(half, bare.captions[:1])["prompt_embeds"])
    for dtype in (torch.bfloat16, torch.float32):
        folder = tmp_path / str(dtype)
        encode_images(load_base("tiny", dtype=dtype), train, training, ["color_jitter"], folder)
        sizes[dtype] = sum(file.stat().st_size for file in entries(folder))
    assert sizes[torch.bfloat16] < 0.55 * sizes[torch.float32]


def test_a_set_that_is_lost_while_it_is_used_ends_in_a_sentence(pipe, train, training, tmp_path):
    data = encode_images(pipe, train, training, [], tmp_path)
    cut, gone = entries(tmp_path)[:2]
    cut.write_bytes(cut.read_bytes()[:-4096])
    gone.unlink()
    lost = 0
    for i in range(len(data)):
        try:
            data.draw([i], 42, 0, 0, training)
        except LoraMvpError as e:
            assert e.code == "cache_lost" and "--resume" in e.message
            lost += 1
    assert lost == 2


def test_images_on_disk_are_left_alone(pipe, train, training, tmp_path):
    before = [(s.path.read_bytes(), s.path.stat().st_mtime_ns) for s in train]
    encode_images(pipe, train, training, ["horizontal_flip", "color_jitter"], tmp_path)
    assert before == [(s.path.read_bytes(), s.path.stat().st_mtime_ns) for s in train]


def test_damaged_entries_are_made_again(pipe, train, training, tmp_path, vae_calls, caplog):
    whole = encode_images(pipe, train, training, [], None)
    encode_images(pipe, train, training, [], tmp_path)
    files = entries(tmp_path)
    good = [file.read_bytes() for file in files]
    middle = bytearray(good[0])
    middle[len(middle) // 2] ^= 4
    header = bytearray(good[1])
    header[3] ^= 255  # the header's length, now absurd
    damage = [bytes(middle), bytes(header), good[2][:-1], b"", None]
    for file, content in zip(files, damage, strict=False):
        file.unlink() if content is None else file.write_bytes(content)
    before = vae_calls.count
    with caplog.at_level(logging.WARNING, "lora_mvp"):
        again = encode_images(pipe, train, training, [], tmp_path)
    assert vae_calls.count - before == len(damage) and same(whole, again)
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 4 and all("is damaged" in text for text in warned)  # one was gone, which is no damage
    assert entries(tmp_path) == files and [file.read_bytes() for file in files] == good


def test_entry_under_another_name_is_not_believed(pipe, train, training, tmp_path, vae_calls):
    whole = encode_images(pipe, train, training, [], None)
    encode_images(pipe, train, training, [], tmp_path)
    a, b = entries(tmp_path)[:2]
    shutil.copy(a, b)
    before = vae_calls.count
    assert same(whole, encode_images(pipe, train, training, [], tmp_path)) and vae_calls.count == before + 1


def test_what_changes_a_latent_changes_its_entry(pipe, train, training, tmp_path, vae_calls):
    def made(augmentations=(), one=train[0], **changes):
        before = vae_calls.count
        changed = training.model_copy(update=changes)
        encode_images(pipe, [one], changed, list(augmentations), tmp_path)
        return vae_calls.count - before

    assert made() == 1 and made() == 0
    assert made(resolution=48) == 1 and made(aspect_buckets=False) == 1
    assert made(["horizontal_flip"]) == 1 and made(["horizontal_flip"], seed=1) == 0  # mirroring needs no seed
    assert made(["color_jitter"]) == 1 and made(["color_jitter"], seed=1) == 1 and made(["color_jitter"]) == 0
    moved = tmp_path / "moved.png"
    shutil.copy(train[0].path, moved)
    assert made(one=Source("other", moved, "other words", train[0].sha256, "")) == 0  # content, not path or caption
    weight = pipe.vae.quant_conv.weight
    old = weight.detach().clone()
    try:
        weight.data[0, 0] += 1e-3
        assert made() == 1
    finally:
        weight.data.copy_(old)
    assert made() == 0


def test_what_changes_an_embedding_changes_its_entry(tmp_path):
    pipe = load_base(random_base("sdxl", tmp_path / "base"))
    calls = Calls(pipe.text_encoder)

    def made(caption="a disc"):
        before = calls.count
        TextTable(pipe, [caption], tmp_path / "cache")
        return calls.count - before

    assert made() == 1 and made() == 0
    assert made("a Disc ") == 1
    pipe.text_encoder_2.text_projection.weight.data[0, 0] += 1e-3
    assert made() == 1 and made() == 0
    pipe.text_encoder.config.hidden_act = "gelu"
    assert made() == 1
    pipe.tokenizer_2.add_tokens(["a new word"])
    assert made() == 1 and made() == 0


def test_picture_exchanged_behind_the_manifest_is_refused(pipe, train, training, tmp_path):
    encode_images(pipe, train[:1], training, [], tmp_path / "cache")
    path = tmp_path / "x.png"
    picture(77, (96, 64)).save(path)
    changed = Source("x.png", path, "x", train[0].sha256, "")
    with pytest.raises(LoraMvpError, match="x.png has changed since") as e:
        encode_images(pipe, [changed], training, [], tmp_path / "cache")
    assert e.value.code == "image_changed"


@pytest.mark.parametrize("place", ["below_a_file", "a_file"])
def test_cache_that_cannot_be_written_costs_one_warning(pipe, train, training, tmp_path, caplog, place):
    (tmp_path / "file").write_text("in the way")
    cache = tmp_path / "file" / "cache" if place == "below_a_file" else tmp_path / "file"
    with caplog.at_level(logging.WARNING, "lora_mvp"):
        encoded = encode_images(pipe, train, training, [], cache)
    assert same(encoded, encode_images(pipe, train, training, [], None))
    assert len(caplog.records) == 1 and "training goes on without" in caplog.records[0].getMessage()
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_leaves_no_half_entry(pipe, train, training, tmp_path, caplog):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with caplog.at_level(logging.WARNING, "lora_mvp"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may grow beyond 1000 bytes
            encoded = encode_images(pipe, train, training, [], tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    assert len(caplog.records) == 1 and list((tmp_path / "latents").iterdir()) == []
    assert same(encoded, encode_images(pipe, train, training, [], None))


ENCODE = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from lora_mvp.config import load_config
from lora_mvp.data.manifest import read_manifest
from lora_mvp.train.latents import encode_images
from lora_mvp.train.pictures import sources
from lora_mvp.models.base import load_base
manifest, cache, out, ready, go = map(Path, sys.argv[1:])
config = load_config(overrides={"training.pretrained_model": "tiny"})
training = config.training.model_copy(update={"aspect_buckets": True})
pipe, train = load_base("tiny"), sources(read_manifest(manifest), "train")
ready.touch()
while not go.exists():
    time.sleep(0.002)
s = encode_images(pipe, train, training, ["color_jitter"], cache)
save_file({f"{k}{i}": x(i) for k, x in (("mean", s.mean), ("std", s.std)) for i in range(len(s))}, out)
"""


@pytest.mark.slow
def test_two_at_once_and_one_of_them_killed(config, manifest, train, training, pipe, tmp_path):
    "Three processes fill two caches; one is killed in the middle; what stands is whole and what comes out is the same."
    go, files = tmp_path / "go", manifest.folder / "manifest.json"

    def start(name, cache):
        out, ready = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.ready"
        arguments = [str(p) for p in (files, cache, out, ready, go)]
        return subprocess.Popen([sys.executable, "-c", ENCODE, *arguments]), out, ready

    shared, struck = tmp_path / "shared", tmp_path / "struck"
    started = [start("one", shared), start("two", shared), start("three", struck)]
    (one, two, third), (out_one, out_two, _), ready = zip(*started, strict=True)
    while not all(file.exists() for file in ready):
        assert all(process.poll() is None for process in (one, two, third))
        time.sleep(0.01)
    go.touch()
    while len(entries(struck)) < 2:
        assert third.poll() in (None, 0)
        time.sleep(0.001)
    third.send_signal(signal.SIGKILL)
    assert [one.wait(), two.wait()] == [0, 0] and third.wait() in (-signal.SIGKILL, 0)
    assert out_one.read_bytes() == out_two.read_bytes()
    for cache in (shared, struck):
        for file in entries(cache):
            unpack_tensors(file.read_bytes(), file.stem)
    assert len(entries(shared)) == len(train) and len(os.listdir(shared / "latents")) == len(train)  # nothing left over
    fresh = encode_images(pipe, train, training, ["color_jitter"], None)
    for cache in (shared, struck):
        assert same(fresh, encode_images(pipe, train, training, ["color_jitter"], cache))


def test_cache_folder(config, manifest, tmp_path):
    assert cache_folder(config.training, manifest) == manifest.folder / "cache"
    assert cache_folder(config.training.model_copy(update={"cache_dir": tmp_path}), manifest) == tmp_path


# ---- encoding


def test_latent_that_is_not_finite_names_the_picture(train, training, tmp_path):
    pipe = load_base("tiny")
    pipe.vae.quant_conv.bias.data[0] = torch.inf
    with pytest.raises(LoraMvpError, match=train[1].id) as e:
        encode_images(pipe, train[1:2], training, [], tmp_path)
    assert e.value.code == "latent_not_finite" and entries(tmp_path) == []


def test_draws_follow_mean_and_std_and_use_every_variant(pipe, train, training):
    data = encode_images(pipe, train[:1], training, ["horizontal_flip"], None)
    mean, std = data.mean(0), data.std(0)
    draws = torch.cat([data.draw([0], 42, step, 0, training).latents for step in range(2000)])
    flipped = (draws - mean[1]).abs().mean((1, 2, 3)) < (draws - mean[0]).abs().mean((1, 2, 3))
    assert 0.45 < flipped.float().mean() < 0.55
    for variant, part in enumerate((draws[~flipped], draws[flipped])):
        z = (part.mean(0) - mean[variant]) / std[variant] * math.sqrt(len(part))
        assert 0.9 < z.std() < 1.1 and z.abs().max() < 6
        assert ((part.std(0) / std[variant]) - 1).abs().max() < 0.2
    assert len({draws[k].numpy().tobytes() for k in range(100)}) == 100  # never the same twice


def test_draw_depends_on_seed_step_and_micro_only(pipe, train, training):
    data = encode_images(pipe, train, training.model_copy(update={"aspect_buckets": False}), ["horizontal_flip"], None)

    def latents(*place):
        torch.manual_seed(sum(place))  # the global stream plays no part
        return data.draw([0, 1], *place, training).latents

    first = latents(42, 5, 1)
    assert torch.equal(first, latents(42, 5, 1))
    assert not any(torch.equal(first, latents(*place)) for place in ((43, 5, 1), (42, 6, 1), (42, 5, 2), (42, 1, 5)))


def test_sdxl_is_encoded_in_float32_and_told_its_sizes(train, training, tmp_path):
    base = random_base("sdxl", tmp_path / "base")
    half, full = load_base(base, dtype=torch.bfloat16), load_base(base)
    training = training.model_copy(update={"resolution": 128})
    data = encode_images(half, train, training, [], tmp_path / "cache")
    assert same(data, encode_images(full, train, training, [], None))  # a bfloat16 run encodes in float32
    for source, times, (h, w) in zip(train, data.time_ids, data.shapes, strict=True):
        width, height = Image.open(source.path).size
        h, w = 8 * h, 8 * w
        scale = max(h / height, w / width)
        crop = [(height * scale - h) / 2, (width * scale - w) / 2]
        assert times[:2].tolist() == [height, width] and times[4:].tolist() == [h, w]
        assert np.abs(times[2:4].numpy() - crop).max() <= 1
    plan = Plan(data.shapes, 3, 42)
    table = TextTable(full, data.captions, tmp_path / "cache")
    for i in range(plan.batches_per_epoch):
        batch = data.draw(plan.batch(i), 42, i, 0, training)
        with torch.no_grad():
            out = denoise(full, batch.latents, torch.tensor(500), table[batch.captions], batch.time_ids)
        assert out.shape == batch.latents.shape and out.isfinite().all()
    embeds = encode_text(full, data.captions)
    for name, tensor in table[data.captions].items():
        assert torch.allclose(tensor, embeds[name], atol=1e-5)


# ---- captions


def test_dropout_and_shuffle_draw_only_what_the_table_holds(pipe, train, training, tmp_path):
    wild = training.model_copy(update={"caption_dropout": 0.3, "shuffle_tags": True, "aspect_buckets": False})
    data = encode_images(pipe, train, wild, [], None)
    table = TextTable(pipe, (v for c in data.captions for v in caption_variants([c], wild)), tmp_path)
    assert "" in table and all(c in table for c in data.captions)
    drawn = [data.draw([0, 1, 2], 42, step, 0, wild).captions for step in range(1500)]
    flat = [caption for captions in drawn for caption in captions]
    assert all(caption in table for caption in flat)
    assert 0.27 < flat.count("") / len(flat) < 0.33
    assert all(caption.startswith("sks wave, ") for caption in flat if caption)  # keep_tags: 1
    assert set(caption_variants([data.captions[0]], wild)) == {captions[0] for captions in drawn}
    assert drawn[:20] == [data.draw([0, 1, 2], 42, step, 0, wild).captions for step in range(20)]
    empty = table[[""]]["prompt_embeds"]
    assert torch.allclose(empty, encode_text(pipe, [""])["prompt_embeds"], atol=1e-5)
    assert not torch.allclose(empty, table[data.captions[:1]]["prompt_embeds"], atol=1e-2)
    assert data.first(0)[1] == data.captions[0] and data.draw([0], 42, 0, 0, training).captions == data.captions[:1]


# ---- regularisation


def test_regularization_folder(tmp_path):
    folder = tmp_path / "class"
    (folder / "a" / "b").mkdir(parents=True)
    picture(0, (70, 70)).save(folder / "a" / "b" / "one.webp")
    picture(1, (70, 70)).save(folder / "two.png")
    (folder / "two.txt").write_text("a {wave}\n")
    (folder / "notes.md").write_text("nothing to see")
    found = regularization_sources(folder, "a wave, {class}")
    assert [(s.id, s.caption) for s in found] == [("a/b/one.webp", "a wave, {class}"), ("two.png", "a {wave}")]
    with pytest.raises(LoraMvpError, match=r"one.webp has no caption.*training.regularization_prompt"):
        regularization_sources(folder, None)
    cut = (folder / "two.png").read_bytes()[:-200]
    (folder / "two.png").write_bytes(cut)
    with pytest.raises(LoraMvpError, match="two.png cannot be used"):
        regularization_sources(folder, "x")


# ---- buckets and order

side = st.integers(1, 3000)


@settings(deadline=None, max_examples=60)
@given(side, side, st.sampled_from([(64, 16), (256, 64), (512, 64), (768, 64), (1024, 32)]))
def test_bucket_is_the_nearest_that_the_picture_fills(width, height, base):
    resolution, multiple = base
    h, w = bucket_of(width, height, resolution, multiple)
    error = abs(math.log(w * height / (h * width)))
    area = resolution**2 // multiple**2
    for b in range(1, min(area, max(1, height // multiple)) + 1):  # no allowed rectangle is nearer and no smaller
        for a in range(1, min(area // b, max(1, width // multiple)) + 1):
            if max(a, b) <= OBLONG * min(a, b) and a * b * multiple**2 >= h * w:
                assert abs(math.log(a * height / (b * width))) >= error - 1e-6


def test_buckets_of_squares_say_that_they_do_nothing(pipe, config, tmp_path, caplog):
    picture(0, (80, 80)).save(tmp_path / "one.png")
    (tmp_path / "list.json").write_text('[{"image": "one.png", "caption": "x", "split": "train"}]')
    bucketed = {"aspect_buckets": True, "cache_dir": tmp_path / "cache"}
    changed = config.model_copy(update={"training": config.training.model_copy(update=bucketed)})
    with caplog.at_level(logging.WARNING, "lora_mvp"):
        load_data(pipe, changed, read_manifest(tmp_path / "list.json"))
    assert "prepare-data --no-copy" in caplog.text and granularity(pipe) == 16


def test_work_stays_in_the_cache_folder(config, manifest, pipe, train, training, tmp_path):
    files = {p for p in Path(manifest.folder).rglob("*")}
    encode_images(pipe, train, training, [], tmp_path / "elsewhere")
    assert files == {p for p in Path(manifest.folder).rglob("*")}
