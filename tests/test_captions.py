"""Captions: what a person wrote is safe, what a model says is kept."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.captioners import AutoCaptioner, AutoCaptions, caption_images, find_captioner, random_blip
from lora_mvp.data.captions import caption_of, caption_tokenizer, words_and_marks
from lora_mvp.data.prepare import check_data, prepare_data


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return random_blip(tmp_path_factory.mktemp("captioner") / "blip")


@pytest.fixture
def images(tmp_path):
    """Seven drawings by the hash of their bytes."""
    found = {}
    for k, colour in enumerate(["crimson", "royalblue", "gold", "black", "white", "green", "pink"]):
        picture = Image.new("RGB", (60 + k, 40), "white")
        ImageDraw.Draw(picture).ellipse((5, 5, 35 + 3 * k, 35), fill=colour)
        path = tmp_path / "raw" / "disc" / f"{colour}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        found[hashlib.sha256(path.read_bytes()).hexdigest()] = path
    return found


def test_importing_captions_loads_no_torch():
    code = "import lora_mvp.data.captions, sys; lora_mvp.data.captions.too_long(['a'], None)"
    code += "\nassert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_counting_the_tokens_of_a_base_loads_no_torch():
    code = "import sys\nfrom lora_mvp.data.captions import caption_tokenizer, too_long\nprint(too_long(['penguin'] * 2, caption_tokenizer('tiny'), 2))"
    code += "\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[(0, 3), (1, 3)]"


@pytest.fixture(scope="module")
def clip_split():
    """Words and marks as CLIP's own rules separate them: the embedded tokenizer has CLIP's rules, if few words."""
    backend = caption_tokenizer("tiny").backend_tokenizer
    normal, split = backend.normalizer.normalize_str, backend.pre_tokenizer.pre_tokenize_str
    return lambda text: [part for part, _ in split(normal(text)) if part.strip("Ġ")]


# Not all of Unicode: Python and tokenizers know different versions of it.
LETTERS = st.characters(max_codepoint=0x2FFF, exclude_categories=("Cc", "Cs", "Cn", "Co"))


@settings(deadline=None, max_examples=300)
@given(text=st.text(LETTERS, max_size=40))
def test_words_and_marks_never_counts_too_many(clip_split, text):
    assert words_and_marks(text) <= len(clip_split(text))


def test_captions_are_the_same_twice_and_asked_once(blip, images, tmp_path):
    captioner = AutoCaptioner(blip)
    stores = [AutoCaptions(tmp_path / name / "captions.json", captioner) for name in ("one", "two")]
    assert [store.fill(images, batch_size=3) for store in stores] == [7, 7]
    assert stores[0].file.read_bytes() == stores[1].file.read_bytes()
    assert len({stores[0].get(sha256) for sha256 in images}) > 1
    again = AutoCaptioner(blip)
    assert AutoCaptions(stores[0].file, again).fill(images) == 0
    assert "_loaded" not in vars(again)  # nothing was missing, so no weights were read


def test_only_what_is_new_is_asked(blip, images, tmp_path):
    captioner = AutoCaptioner(blip)
    first = dict(list(images.items())[:4])
    AutoCaptions(tmp_path / "captions.json", captioner).fill(first)
    store = AutoCaptions(tmp_path / "captions.json", captioner)
    assert store.missing(images) == list(images)[4:]
    assert store.fill(images) == 3


def test_changed_weights_are_another_captioner(blip, images, tmp_path):
    copy = shutil.copytree(blip, tmp_path / "elsewhere" / "blip")
    store = AutoCaptions(tmp_path / "captions.json", AutoCaptioner(blip))
    store.fill(images)
    assert AutoCaptions(store.file, AutoCaptioner(copy)).missing(images) == []  # where it lies makes no difference
    random_blip(copy, seed=1)
    assert AutoCaptions(store.file, AutoCaptioner(copy)).missing(images) == list(images)
    assert str(tmp_path) not in store.file.read_text()


def test_a_persons_text_wins_and_stays(blip, images, tmp_path):
    by_hand = {
        path: path.with_suffix(ending) for path, ending in zip(images.values(), (".txt", ".caption"), strict=False)
    }
    for file in by_hand.values():
        file.write_text("by hand")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in by_hand.values()}
    store = AutoCaptions(tmp_path / "captions.json", AutoCaptioner(blip))
    store.fill(images)
    for sha256, path in images.items():
        caption, source, warning, _ = caption_of(path, "{label}", "disc", "sks", store.get(sha256))
        assert warning is None
        assert (caption, source) == (
            ("by hand", "sidecar") if path in by_hand else (f"sks, {store.get(sha256)}", "automatic")
        )
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in by_hand.values()} == before
    assert len(list((tmp_path / "raw").rglob("*.*"))) == len(images) + len(by_hand)


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_mvp.data.captioners import AutoCaptions

class Stand_in:  # a model that takes the process down in its third batch
    record = {"model": "stand-in", "revision": "1", "params": {}}
    batches = 0
    def __call__(self, images):
        self.batches += 1
        if self.batches == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return [f"{image.width} wide" for image in images]

paths = sorted(Path(sys.argv[1]).rglob("*.png"))
AutoCaptions(sys.argv[2], Stand_in()).fill({path.stem: path for path in paths}, batch_size=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_killed_run_loses_one_batch(images, tmp_path):
    file = tmp_path / "out" / "captions.json"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "raw"), str(file)])
    assert done.returncode == -signal.SIGKILL
    assert len(json.loads(file.read_text())["captioners"][0]["captions"]) == 4
    assert [path.name for path in file.parent.iterdir()] == ["captions.json"]


def test_the_files_of_older_models_are_read(blip, images, tmp_path):
    """Models on the hub have preprocessor_config.json and vocab.txt, and none of the newer files."""
    old = shutil.copytree(blip, tmp_path / "old")
    settings = json.loads((old / "processor_config.json").read_text())["image_processor"]
    (old / "preprocessor_config.json").write_text(json.dumps(settings))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    for name in ("processor_config.json", "tokenizer.json", "generation_config.json"):
        (old / name).unlink()
    paths = list(images.values())
    assert list(caption_images(paths, AutoCaptioner(old))) == list(caption_images(paths, AutoCaptioner(blip)))


def test_what_cannot_be_used_is_said(blip, images, tmp_path):
    with pytest.raises(LoraMvpError, match="could not be fetched from the hub") as error:
        AutoCaptioner("nobody/nothing")
    assert error.value.code == "captioner_not_found"
    pickled = shutil.copytree(blip, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(LoraMvpError, match="no safetensors weights") as error:
        AutoCaptioner(pickled)
    assert error.value.code == "captioner_unsafe"
    for change, code in [({"model_type": "clip"}, "unsupported"), ({"auto_map": {"AutoModel": "x.Y"}}, "unsupported")]:
        other = shutil.copytree(blip, tmp_path / next(iter(change)))
        config = json.loads((other / "config.json").read_text()) | change
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(LoraMvpError) as error:
            AutoCaptioner(other)
        assert error.value.code == f"captioner_{code}"


def test_damaged_or_incomplete_weights_are_refused(blip, images, tmp_path):
    from safetensors.torch import load_file, save_file

    first = next(iter(images.values()))
    cut = shutil.copytree(blip, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((blip / "model.safetensors").read_bytes()[:-100])
    less = shutil.copytree(blip, tmp_path / "less")
    weights = load_file(blip / "model.safetensors")
    gone = next(name for name in weights if "crossattention" in name)
    del weights[gone]
    save_file(weights, less / "model.safetensors", {"format": "pt"})
    for folder, says in [(cut, "could not be read"), (less, f"lacks 1 weights, such as {gone}")]:
        with pytest.raises(LoraMvpError, match=says) as error:
            list(caption_images([first], AutoCaptioner(folder)))
        assert error.value.code == "captioner_unreadable"


def test_a_hub_id_is_recorded_with_its_commit(blip, images, tmp_path, monkeypatch):
    import huggingface_hub

    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    shutil.copytree(blip, cache / "models--someone--small-blip" / "snapshots" / commit)
    (cache / "models--someone--small-blip" / "refs").mkdir()
    (cache / "models--someone--small-blip" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", partial(huggingface_hub.snapshot_download, cache_dir=cache)
    )
    captioner, paths = AutoCaptioner("someone/small-blip"), list(images.values())
    assert (captioner.record["model"], captioner.record["revision"]) == ("someone/small-blip", commit)
    assert find_captioner("someone/small-blip", revision=commit).name == commit
    assert list(caption_images(paths, captioner)) == list(caption_images(paths, AutoCaptioner(blip)))


def random_florence(folder: Path) -> Path:
    """A Florence-2 with letters for words."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import BartTokenizer, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
    vocab = {token: k for k, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    tokenizer = BartTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    vision = {"depths": (1,), "patch_size": (7,), "patch_stride": (8,), "patch_padding": (3,), "num_heads": (2,)}
    vision |= {"patch_prenorm": (False,), "embed_dim": (16,), "num_groups": (2,), "window_size": 2}
    vision |= {"projection_dim": 16, "max_position_embeddings": 10, "drop_path_rate": 0.0}
    text = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in [("layers", 1), ("ffn_dim", 16)]}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(vocab), "d_model": 16}
    text |= {"model_type": "bart", "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    marks = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    model = Florence2ForConditionalGeneration(
        Florence2Config(vision_config=vision, text_config=text | marks, image_token_id=5, **marks)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_seq_length=17)
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def test_florence_2(images, tmp_path):
    captioner = AutoCaptioner(random_florence(tmp_path / "florence"))
    assert captioner.kind == "florence2"
    assert captioner.record["params"]["prompt"] == "<CAPTION>"
    said = list(caption_images(images.values(), captioner, batch_size=4))
    assert [path for path, _ in said] == list(images.values())
    assert all(caption for _, caption in said)
    assert said == list(caption_images(images.values(), captioner, batch_size=4))


def test_a_model_describes_what_nobody_has(tmp_path):
    "prepare-data asks the model about images without a text, once; its words stand behind the trigger."
    for k in range(3):
        (tmp_path / "raw" / "cat").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 80 + k), 80).convert("RGB").save(tmp_path / "raw" / "cat" / f"{k}.png")
    (tmp_path / "raw" / "cat" / "0.txt").write_text("by hand")
    data = {"raw_data_dir": tmp_path / "raw", "processed_dir": tmp_path / "out", "min_resolution": 32, "trigger": "zwx"}
    data |= {"image_size": 64, "captioner": random_blip(tmp_path / "blip")}
    config = load_config(overrides={f"data.{key}": value for key, value in data.items()})
    assert {row.caption_source for row in check_data(config).images} == {"sidecar", "template"}
    assert not (tmp_path / "out").exists()  # a check asks no model and keeps nothing
    first = prepare_data(config)
    assert [row.caption_source for row in first.images] == ["sidecar", "automatic", "automatic"]
    assert first.images[0].caption == "by hand" and all(row.caption.startswith("zwx, ") for row in first.images[1:])
    assert first.captioner["model"] == "blip" and first.captioner["revision"].startswith("sha256:")
    said = (tmp_path / "out" / "captions.json").read_bytes()
    assert prepare_data(config) == first and (tmp_path / "out" / "captions.json").read_bytes() == said
    assert [row.caption for row in check_data(config).images] == [row.caption for row in first.images]
