"""What the doctor says of wrong settings, broken bases and too little memory, before anything heavy is loaded."""

import json
import shutil
import time
from pathlib import Path

import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from styles import STYLES, pictures_in

from lora_mvp.config import TrainingConfig, load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.files import asset
from lora_mvp.models.adapters import add_lora
from lora_mvp.models.base import load_base
from lora_mvp.models.families import denoise, denoiser, encode_text, family_of, networks, size_facts, text_parts
from lora_mvp.models.kernels import lean
from lora_mvp.models.miniatures import random_base
from lora_mvp.train.counting import LiveBytes
from lora_mvp.train.diagnosis import base_findings, doctor, doctor_text
from lora_mvp.train.foresight import full_bytes
from lora_mvp.train.memory import MemoryEstimate, advice, skeleton, step_bytes
from lora_mvp.train.objectives import image_losses
from lora_mvp.train.pictures import Source, photo_warning
from lora_mvp.train.streams import load_data

PLENTY = 64e9


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {family: random_base(family, folder / family) for family in ("sd1", "sd2", "sdxl")}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(Image.effect_noise((40, 40), 60), (2 * i, 12))
        (folder / "raw" / "thing").mkdir(parents=True, exist_ok=True)
        image.save(folder / "raw" / "thing" / f"{i}.png")
    keys = {"raw_data_dir": folder / "raw", "processed_dir": folder / "out", "image_size": 64, "min_resolution": 32}
    prepare_data(
        load_config(overrides={f"data.{key}": str(v) if isinstance(v, Path) else v for key, v in keys.items()})
    )
    return folder / "out" / "manifest.json"


@pytest.fixture(scope="module")
def estimates():
    """The memory of bases with the same settings and as many bytes of weights is worked out once for all tests."""
    known = {}

    def estimate(folder, device="cpu", variants=2):
        files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
        content = tuple((p.name, p.read_bytes() if p.suffix == ".json" else p.stat().st_size) for p in files)
        return known.setdefault((device, variants, content), MemoryEstimate(folder, device, variants))

    return estimate


@pytest.fixture
def look(tmp_path, monkeypatch, estimates):
    """The doctor on `tiny` with some settings changed; findings of a level as text."""
    monkeypatch.setattr("lora_mvp.train.diagnosis.MemoryEstimate", estimates)

    def run(manifest=None, memory=PLENTY, device="cpu", **training):
        training = {"pretrained_model": "tiny", "output_dir": tmp_path / "run", "resolution": 64, **training}
        overrides = {f"training.{k}": str(v) if isinstance(v, Path) else v for k, v in training.items()}
        overrides["data.processed_dir"] = str(tmp_path / "none")
        config = load_config(overrides=overrides)
        found = doctor(config, manifest, device=device, memory=memory)
        assert all(f.text and f.level in ("ok", "warn", "error") for f in found)
        assert doctor_text(found)
        assert not (tmp_path / "run").exists()  # nothing is written
        return {level: [f for f in found if f.level == level] for level in ("ok", "warn", "error")}

    return run


def only(findings, topic, *words):
    """The one finding of a list, which must hold these words."""
    assert len(findings) == 1, findings
    assert findings[0].topic == topic
    for word in words:
        assert word in findings[0].text, findings[0].text


def test_a_good_run_has_no_errors_and_is_quick(look, manifest, monkeypatch):
    monkeypatch.setattr("lora_mvp.train.diagnosis.MemoryEstimate", MemoryEstimate)  # with nothing known beforehand
    start = time.process_time()
    found = look(manifest, max_train_steps=60, lr_warmup_steps=5, checkpointing_steps=20)
    assert time.process_time() - start < 10
    assert not found["error"] and not found["warn"], found
    text = " ".join(f.text for f in found["ok"])
    assert "images to train on" in text and "60 steps are" in text and "v_prediction" in text


def test_missing_base(look, tmp_path):
    only(look(pretrained_model=tmp_path / "nowhere")["error"], "base", "nowhere", "does not exist")


def test_base_of_the_hub_that_is_not_here(look):
    found = look(pretrained_model="someone/something-that-is-not-here")
    assert not found["error"]
    assert any("not on this machine" in f.text and "hf download" in f.text for f in found["warn"])


def test_name_that_the_hub_cannot_have(look):
    only(look(pretrained_model="some one/a model")["error"], "base", "some one/a model")


@pytest.mark.parametrize("harm", ["script", "pickle", "foreign class"])
def test_unsafe_base(look, bases, tmp_path, harm):
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    if harm == "script":
        (base / "unet" / "model.py").write_text("import os")
    elif harm == "pickle":
        next((base / "unet").glob("*.safetensors")).rename(base / "unet" / "diffusion_pytorch_model.bin")
    else:
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Evil"]}))
    found = look(pretrained_model=base)["error"]
    assert found[0].topic == "base" and str(base) in found[0].text
    assert not any(f.topic == "memory" for f in found)


def test_weights_missing_or_cut_short(look, bases, tmp_path):
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    file = next((base / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    next((base / "vae").glob("*.safetensors")).unlink()
    found = look(pretrained_model=base)
    only(found["error"], "base", "unet:", "vae has no safetensors weights")
    assert any(f.topic == "memory" for f in found["ok"])  # the arithmetic needs configs only


@pytest.mark.slow  # ten seconds of a core
def test_weights_of_another_size(look, bases, tmp_path):
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 3}))
    only(look(pretrained_model=base)["error"], "base", "unet holds", "numbers")


def test_a_config_that_makes_no_model(look, bases, tmp_path):
    base = shutil.copytree(bases["sd1"], tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": ["NoSuchBlock"]}))
    only(look(pretrained_model=base)["error"], "base", "make no model")


def test_contradicting_objectives(look, bases):
    only(look(prediction_type="epsilon")["error"], "base", "the base predicts v_prediction")
    found = look(pretrained_model=bases["sd1"], zero_terminal_snr=True)["error"]
    only(found, "base", "zero_terminal_snr", "epsilon")


def test_targets_that_match_nothing(look):
    only(look(lora_targets="no_such_layer")["error"], "base", "no_such_layer")


def test_resolution(look):
    tiny = asset("tiny")
    only(look(pretrained_model=tiny, resolution=72)["error"], "base", "no multiple of 16", "use 64")
    assert any("made for 64" in f.text for f in look(pretrained_model=tiny, resolution=128)["warn"])


def test_manifest_missing_or_broken(look, tmp_path):
    only(look(tmp_path / "manifest.json")["error"], "data", "there is no manifest")
    (tmp_path / "manifest.json").write_text("{")
    only(look(tmp_path / "manifest.json")["error"], "data", "not readable JSON")
    assert any("prepare-data" in f.text for f in look()["warn"])


def test_image_gone(look, manifest, tmp_path):
    copy = shutil.copytree(manifest.parent, tmp_path / "copy")
    next((copy / "train").rglob("*.png")).unlink()
    only(look(copy)["error"], "data", "not there")


def test_batch_larger_than_the_data(look, manifest):
    only(look(manifest, batch_size=64)["error"], "data", "training.batch_size is 64")


def test_too_few_and_too_many_epochs(look, manifest):
    assert any("never seen" in f.text for f in look(manifest, max_train_steps=1, gradient_accumulation=1)["warn"])
    assert any("by heart" in f.text for f in look(manifest, max_train_steps=9000, lr_warmup_steps=0)["warn"])


def test_regularisation_folder_missing(look, manifest, tmp_path):
    only(look(manifest, regularization_dir=tmp_path / "no")["error"], "data", "regularization_dir")


def test_settings_that_contradict(look, tmp_path):
    found = look(max_train_steps=10, lr_warmup_steps=10, checkpointing_steps=11, snr_gamma=5.0, zero_terminal_snr=True)
    assert sum(f.topic == "settings" for f in found["warn"]) == 3
    only(look(resume_from=tmp_path / "checkpoint-5")["error"], "settings", "checkpoint-5")


def test_output_folder(look, bases, tmp_path):
    (tmp_path / "file").write_text("")
    only(look(output_dir=tmp_path / "file")["error"], "settings", "is a file")
    only(look(output_dir=tmp_path / "file" / "below")["error"], "settings", "cannot be written")
    only(look(pretrained_model=bases["sd1"], output_dir=bases["sd1"])["error"], "settings", "is the base itself")


@pytest.mark.slow  # ten seconds of a core
def test_half_precision_without_a_gpu(look):
    only(look(mixed_precision="fp16")["error"], "environment", "needs a CUDA GPU")
    assert any("bf16" in f.text for f in look(mixed_precision="bf16")["warn"])


def test_too_little_memory_names_settings_in_order(look):
    found = look(memory=650e6, batch_size=64)["error"]
    only(found, "memory", "650.0 MB are free", "1. training.batch_size", "training.gradient_accumulation")
    only(look(memory=10e6)["error"], "memory", "Even that is not enough")


@pytest.mark.slow
def test_advice_keeps_the_effective_batch_and_ends_where_it_fits():
    estimate, training = (
        MemoryEstimate(asset("tiny"), "cuda"),
        TrainingConfig(resolution=64, batch_size=64, lora_rank=64),
    )
    whole = max(p.total for p in estimate.phases(training))
    for share in (0.9, 0.3):
        memory = 1e9 + share * (whole - 1e9)  # 1e9 is the program
        lines, then = advice(estimate, training, memory)
        assert then <= memory and "training.batch_size" in lines[0]
        batch, accumulation = (int(part.split(": ")[1].split(" ")[0]) for part in lines[0].split(" and "))
        assert batch * accumulation == 64 * training.gradient_accumulation
    assert advice(estimate, training, whole) == ([], whole)


def kept_on_cpu(folder, training):
    """The same count over a real step: real weights, the CPU's own attention and autocast."""
    pipe = load_base(str(folder), dtype=torch.bfloat16 if training.mixed_precision == "bf16" else torch.float32)
    for parameter in (p for part in add_lora(pipe, training).values() for p in part):
        parameter.grad = torch.zeros_like(parameter)
    lean(pipe)
    if training.gradient_checkpointing:
        denoiser(pipe).enable_gradient_checkpointing()
        for encoder in text_parts(pipe).values():
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for part in (denoiser(pipe), *text_parts(pipe).values()):
        part.train()
    modules, n = networks(pipe).values(), training.batch_size
    with torch.no_grad():
        table = encode_text(pipe, ["a"] * n)
    half = torch.autocast("cpu", torch.bfloat16, enabled=training.mixed_precision == "bf16", cache_enabled=False)
    with LiveBytes(*modules) as live, half:
        learns = training.text_encoder_learning_rate is not None
        embeds = encode_text(pipe, ["a"] * n) if learns else {name: value.clone() for name, value in table.items()}
        side = training.resolution // pipe.vae_scale_factor
        latents = torch.randn(n, family_of(pipe).latent_channels, side, side, dtype=denoiser(pipe).dtype)
        sizes = size_facts(pipe, (64, 64), (0, 0), (64, 64))
        prediction = denoise(pipe, latents, torch.zeros(n, dtype=torch.long), embeds, sizes)
        kept = live.now
        image_losses(prediction, torch.zeros_like(prediction)).mean().backward()
    return kept, live.peak


CASES = [
    ("sd1", {"lora_variant": "dora", "lora_targets": "all"}),
    pytest.param("sd2", {"lora_variant": "rslora", "lora_targets": "attention_ff"}, marks=pytest.mark.slow),
    pytest.param("sdxl", {"text_encoder_learning_rate": 1e-4, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("sd1", {"mixed_precision": "bf16"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("family, changes", CASES)
def test_meta_keeps_what_the_cpu_keeps(bases, family, changes):
    training = TrainingConfig(resolution=64, batch_size=2, **changes)
    pipe = skeleton(bases[family], training)
    add_lora(pipe, training)
    lean(pipe)
    (kept, peak), (real_kept, real_peak) = step_bytes(pipe, training), kept_on_cpu(bases[family], training)
    if training.mixed_precision == "no":
        assert kept == real_kept
    assert abs(kept / real_kept - 1) < 0.02 and abs(peak / real_peak - 1) < 0.02


@pytest.mark.slow  # chapter 14 of training counts the same
def test_weights_and_adapter_are_counted_exactly(bases):
    for family in ("sd2", "sdxl"):
        folder, training = bases[family], TrainingConfig(resolution=64, lora_rank=4, text_encoder_learning_rate=1e-4)
        estimate, pipe = MemoryEstimate(folder), load_base(str(folder))
        weights = sum(p.numel() * 4 for m in networks(pipe).values() for p in m.parameters())
        adapter = sum(p.numel() for part in add_lora(pipe, training).values() for p in part)
        phase = next(p for p in estimate.phases(training) if p.name == "train")
        assert (phase.weights, phase.adapter) == (weights, 16 * adapter), family
        assert full_bytes(estimate.pipe(training)[0]) == weights


def rows_of(folder, pictures, suffix):
    """Pictures as sources that can be trained on."""
    folder.mkdir(parents=True)
    found = []
    for k, picture in enumerate(pictures):
        file = folder / f"{k}.{suffix}"
        picture.convert("RGB").save(file, quality=85)
        found.append(Source(file.name, file, "a thing", "", "thing"))
    return found


def test_photographs_are_told_from_drawings(tmp_path):
    """The sentence about `tiny` comes for photographs, and for none of nine drawn styles."""
    names = "astronaut brick camera chelsea coffee coins grass gravel moon motorcycle_left ihc retina rocket".split()
    folder = Path(skimage.__file__).parent / "data"
    photos = [Image.open(next(folder.glob(f"{name}.*"))) for name in names]
    for suffix in ("png", "jpg"):
        taken = rows_of(tmp_path / suffix, photos, suffix)
        said = photo_warning(taken, "tiny")
        assert "cannot learn" in said and "`lora-mvp init`" in said
        assert photo_warning(taken, "runwayml/stable-diffusion-v1-5") is None
        for style in STYLES:
            drawn = rows_of(tmp_path / suffix / style, pictures_in(style, "heldout", slice(None, None, 3))[1], suffix)
            assert photo_warning(drawn, "tiny") is None, (style, suffix)


def test_doctor_and_training_warn_of_photographs_on_tiny(tmp_path, caplog):
    raw = tmp_path / "raw" / "cat"
    raw.mkdir(parents=True)
    cat = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png")
    for k in range(4):
        cat.crop((40 * k, 0, 40 * k + 300, 300)).save(raw / f"{k}.png")
    training = {"pretrained_model": "tiny", "output_dir": tmp_path / "out", "max_train_steps": 1, "lr_warmup_steps": 0}
    values = {f"training.{key}": value for key, value in training.items()}
    values |= {"data.raw_data_dir": tmp_path / "raw", "data.processed_dir": tmp_path / "processed"}
    config = load_config(overrides=values)
    manifest = prepare_data(config)
    found = doctor(config, tmp_path / "processed", device="cpu", memory=PLENTY)
    assert ["photographs" in f.text for f in found if f.level == "warn"].count(True) == 1
    load_data(load_base("tiny"), config, manifest)
    assert "cannot learn those" in caplog.text


def test_the_doctor_reads_variants_and_finds_what_is_no_number(tmp_path):
    folder = random_base("sd1", tmp_path / "base")
    for file in [*folder.glob("*/*.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    settings = TrainingConfig(pretrained_model=str(folder), resolution=64)
    assert not [found for found in base_findings(settings) if found.level == "error"]
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    state = load_file(file)
    state["conv_in.weight"][0, 0, 0, :2] = torch.nan
    save_file(state, file)
    errors = [found.text for found in base_findings(settings) if found.level == "error"]
    assert len(errors) == 1 and "unet.conv_in.weight: 2 NaN" in errors[0]
