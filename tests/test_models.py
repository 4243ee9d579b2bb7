"Base models: what is refused before it is loaded, every family from disk to the UNet's answer, one file against a folder."

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lora_mvp.errors import LoraMvpError
from lora_mvp.files import asset
from lora_mvp.models.base import base_revision, find_base, load_base, part_hashes, unpacked, weights_hash
from lora_mvp.models.drawing import sample
from lora_mvp.models.families import (
    FAMILIES,
    denoise,
    denoiser,
    encode_text,
    family_of,
    granularity,
    native_size,
    networks,
    size_facts,
    text_parts,
    workings,
)
from lora_mvp.models.layouts import check_folder
from lora_mvp.models.miniatures import random_base
from lora_mvp.models.proof import differences, probe

SINGLE = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    "A small random base of every family, on disk."
    folder = tmp_path_factory.mktemp("bases")
    return {name: random_base(name, folder / name) for name in FAMILIES}


@pytest.fixture
def folder(bases, tmp_path):
    "A sound SD 1.x folder to spoil."
    return Path(shutil.copytree(bases["sd1"], tmp_path / "base"))


def refusal(name, **how) -> LoraMvpError:
    with pytest.raises(LoraMvpError) as caught:
        load_base(str(name), **how)
    return caught.value


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def is_frozen(pipe) -> bool:
    parts = networks(pipe).values()
    return not any(m.training for m in parts) and not any(p.requires_grad for m in parts for p in m.parameters())


# ---------------------------------------------------------------- refused before loading


@pytest.mark.parametrize("part, safe", [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pkl"])
def test_pickle_weights_are_refused(folder, part, safe, suffix):
    weights = folder / part / f"{safe}.safetensors"
    weights.rename(weights.with_suffix(suffix))
    error = refusal(folder)
    assert error.code == "base_unsafe" and f"{safe}{suffix}" in error.message and "pickle" in error.message


def test_a_stray_pickle_beside_the_parts_is_not_read(folder):
    (folder / "weights.ckpt").write_bytes(b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00falsetR.")
    assert load_base(str(folder)).unet


def test_pickles_beside_safetensors_are_not_read(folder):
    before = weights_hash(load_base(str(folder)).unet)
    for twin in (
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ):
        (folder / twin).write_bytes(
            b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00falsetR."
        )  # would run `false` if it were read
    assert weights_hash(load_base(str(folder)).unet) == before


@pytest.mark.parametrize("script", ["pipeline.py", "unet/my_unet.py", "extra/deep/tool.py"])
def test_python_files_are_refused(folder, script):
    (folder / script).parent.mkdir(parents=True, exist_ok=True)
    (folder / script).write_text("raise SystemExit('this ran')")
    error = refusal(folder)
    assert error.code == "base_unsafe" and Path(script).name in error.message


@pytest.mark.parametrize(
    "config, key",
    [
        ("text_encoder/config.json", "auto_map"),
        ("tokenizer/tokenizer_config.json", "auto_map"),
        ("unet/config.json", "trust_remote_code"),
        ("scheduler/scheduler_config.json", "auto_map"),
        ("unet/config.json", "_class_name"),
    ],
)
def test_hints_at_code_are_refused(folder, config, key):
    edit(folder / config, **{key: ["my_code", "Model"]})
    error = refusal(folder)
    assert error.code == "base_unsafe" and key in error.message and Path(config).name in error.message


@pytest.mark.parametrize(
    "change, said",
    [
        ({"_class_name": ["my_pipeline", "MyPipeline"]}, "_class_name"),
        ({"unet": ["my_unet", "MyUNet"]}, "my_unet"),
        ({"unet": [["my_code", "diffusers"], "UNet2DConditionModel"]}, "my_code"),
        ({"scheduler": ["os", "system"]}, "scheduler"),
        ({"safety_checker": ["stable_diffusion", "SomethingElse"]}, "SomethingElse"),
        ({"extra": ["my_extra", "Extra"]}, "my_extra"),
    ],
)
def test_foreign_classes_are_refused(folder, change, said):
    edit(folder / "model_index.json", **change)
    error = refusal(folder)
    assert error.code == "base_unsafe" and said in error.message and "model_index.json" in error.message


def test_the_index_of_a_real_sd15_folder_passes(folder):
    index = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],  # no longer in transformers, and not needed
        "_diffusers_version": "0.6.0",
    }
    edit(folder / "model_index.json", **index)
    pipe = load_base(str(folder))
    assert pipe.safety_checker is None and pipe.feature_extractor is None


@pytest.mark.parametrize(
    "kind",
    ["SanaPipeline", "Flux2Pipeline", "StableDiffusionInpaintPipeline", "StableDiffusionXLImg2ImgPipeline"],
)
def test_other_kinds_are_refused_by_name(folder, kind):
    edit(folder / "model_index.json", _class_name=kind)
    error = refusal(folder)
    assert error.code == "base_unsupported" and kind in error.message and "SDXL" in error.message


def test_other_parts_are_refused(folder):
    edit(folder / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    error = refusal(folder)
    assert error.code == "base_unsupported" and "T5EncoderModel" in error.message


@pytest.mark.parametrize("channels, said", [(9, "inpainting"), (8, "editing"), (5, "depth")])
def test_more_input_channels_are_refused(tmp_path, channels, said):
    error = refusal(random_base("sd1", tmp_path, unet={"in_channels": channels}))
    assert error.code == "base_unsupported" and said in error.message and str(channels) in error.message


def test_channel_wise_latent_scales_are_refused(tmp_path):
    error = refusal(random_base("sdxl", tmp_path, vae={"latents_mean": [0.1] * 4, "latents_std": [1.0] * 4}))
    assert error.code == "base_unsupported" and "latents_mean" in error.message


def test_damaged_folders_say_so(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not a model")
    assert refusal(folder).code == "base_unreadable"
    (folder / "unet" / "config.json").write_text("{")
    error = refusal(folder)
    assert error.code == "base_unreadable" and "config.json" in error.message
    (folder / "model_index.json").write_text("[]")
    assert refusal(folder).code == "base_unreadable"


@pytest.mark.parametrize(
    "file, lost",
    [
        ("unet/diffusion_pytorch_model", "mid_block.attentions.0.proj_in.weight"),
        ("vae/diffusion_pytorch_model", "decoder.conv_in.weight"),
        ("text_encoder/model", "encoder.layers.1.mlp.fc1.weight"),
    ],
)
def test_folders_with_holes_are_refused(folder, file, lost):
    path = folder / f"{file}.safetensors"
    save_file({k: v for k, v in load_file(path).items() if not k.endswith(lost)}, path, {"format": "pt"})
    error = refusal(folder)
    assert error.code == "base_unreadable" and lost in error.message and "missing" in error.message


def test_text_encoders_under_their_older_names_are_read(bases, folder):
    path = folder / "text_encoder" / "model.safetensors"
    save_file(
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}, path, {"format": "pt"}
    )
    assert weights_hash(load_base(str(folder)).text_encoder) == weights_hash(load_base(str(bases["sd1"])).text_encoder)


def test_names_that_lead_nowhere(tmp_path):
    for suffix in (".ckpt", ".pt", ".bin", ".pkl"):
        file = tmp_path / f"model{suffix}"
        file.touch()
        error = refusal(file)
        assert error.code == "base_unsafe" and file.name in error.message and "pickle" in error.message
    (tmp_path / "notes.txt").touch()
    for name in ("notes.txt", "none.safetensors", "none", ""):
        assert refusal(tmp_path / name).code == "base_not_found"
    assert (
        refusal("owner/none.safetensors").code == "base_not_found"
    )  # a file's name, although it has the form of a hub id
    error = refusal("nobody/not-there")
    assert error.code == "base_unreachable" and "hf download nobody/not-there" in error.message


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_family_from_disk_to_the_answer_of_the_denoiser(bases, name):
    pipe = load_base(str(bases[name]))
    family = family_of(pipe)
    assert family is FAMILIES[name] and is_frozen(pipe) and list(text_parts(pipe)) == list(family.text_encoders)
    assert native_size(pipe) == {"flux": 1024, "zimage": 1024}.get(name, 64)
    embeds = encode_text(pipe, ["a cat", "", "a dog"])
    assert ("pooled" in embeds) == (name in ("sdxl", "sd3", "flux"))
    sizes = size_facts(pipe, (80, 60), (3, 5), (64, 64))
    assert (sizes is None) == (name != "sdxl")
    side = granularity(pipe) // pipe.vae_scale_factor
    noisy = torch.randn(3, family.latent_channels, side, 2 * side, generator=torch.Generator().manual_seed(0))
    answer = denoise(pipe, noisy, torch.tensor([0, 500, 999]), embeds, sizes)
    assert answer.shape == noisy.shape and answer.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_denoiser_gets_what_the_pipeline_itself_passes(bases, name):
    pipe, prompts, seen = load_base(str(bases[name])), ["a red apple", "a blue boat, flat style"], []
    forward = inspect.signature(type(denoiser(pipe)).forward)

    def look(module, args, kwargs):
        seen.append(dict(forward.bind(module, *args, **kwargs).arguments))

    hook = denoiser(pipe).register_forward_pre_hook(look, with_kwargs=True)
    told = {"original_size": (90, 70), "crops_coords_top_left": (4, 6), "target_size": (64, 64)}
    how = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64, "output_type": "latent"}
    how |= {"guidance_scale": 0.0} if name == "zimage" else {}  # 1 asks twice there
    how |= {"max_sequence_length": workings(pipe).tokens(pipe)} if name == "flux" else told if name == "sdxl" else {}
    pipe([*prompts], **how)  # a list may be changed
    theirs = seen.pop()
    noisy = theirs.get("sample", theirs.get("hidden_states"))
    noisy = torch.stack(theirs["x"]).squeeze(2) if name == "zimage" else workings(pipe).drawn(pipe, noisy, 64)
    told_time = "t" if name == "zimage" else "timestep"
    times = theirs[told_time].expand(2) * (1000 if name == "flux" else 1)
    times = 1000 - 1000 * times if name == "zimage" else times
    with torch.no_grad():
        denoise(pipe, noisy, times, encode_text(pipe, prompts), size_facts(pipe, *told.values()))
    hook.remove()
    (ours,) = seen
    for key in set(theirs) - {"self", told_time, "return_dict"}:
        if isinstance(theirs[key], torch.Tensor | list) or theirs[key] not in (None, {}):
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)
    torch.testing.assert_close(ours[told_time].expand(2).float(), theirs[told_time].expand(2).float())


@pytest.mark.parametrize(
    "name, predicts", [("tiny", "v_prediction"), ("sd1", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon")]
)
def test_the_prediction_type_is_that_of_the_scheduler_config(bases, name, predicts):
    assert load_base(str(bases[name])).scheduler.config.prediction_type == predicts


def test_the_prediction_type_is_never_assumed_from_the_family(tmp_path):
    for name, predicts in (("sd1", "v_prediction"), ("sd2", "epsilon"), ("sdxl", "v_prediction")):
        base = random_base(name, tmp_path / name, scheduler={"prediction_type": predicts})
        assert load_base(str(base)).scheduler.config.prediction_type == predicts


def test_families_are_told_apart_by_width_where_it_is_known(tmp_path):
    widths = {"hidden_size": 768, "intermediate_size": 32, "num_hidden_layers": 1}
    base = random_base(
        "sd1", tmp_path / "1", unet={"cross_attention_dim": 768, "use_linear_projection": True}, text_encoder=widths
    )
    assert family_of(load_base(str(base))).name == "sd1"
    widths["hidden_size"] = 1024
    base = random_base("sd2", tmp_path / "2", unet={"cross_attention_dim": 1024}, text_encoder=widths)
    assert family_of(load_base(str(base))).name == "sd2"
    assert family_of(load_base("tiny")).name == "tiny"


def test_gradients_reach_the_text_encoders(bases):
    pipe = load_base(str(bases["sdxl"]))
    for encoder in text_parts(pipe).values():
        encoder.requires_grad_(True)
    embeds = encode_text(pipe, ["a cat"])
    (embeds["prompt_embeds"].sum() + embeds["pooled"].sum()).backward()
    for encoder in text_parts(pipe).values():
        assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_of_every_family_and_under_an_adapter(bases, name, dtype):
    pipe = load_base(str(bases[name]), dtype=dtype)
    assert denoiser(pipe).dtype == dtype and pipe.vae.dtype == (FAMILIES[name].vae_dtype or dtype)
    prompts, seeds = ["a cat", "a dog", "a bird"], [1, 2, 3]
    state = torch.get_rng_state()
    before = sample(pipe, prompts, seeds, 2, 3.0, size=64, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.size for p in before] == [(64, 64)] * 3
    denoiser(pipe).add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    after = sample(pipe, prompts, seeds, 2, 3.0, size=64, batch_size=2)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after))


def test_float_samples_equal_the_pipelines_own_pictures(bases):
    for name in FAMILIES:
        pipe = load_base("tiny" if name == "tiny" else str(bases[name]))
        generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        pipe.vae.enable_slicing()  # one picture at a time, as here
        how = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
        how |= {"max_sequence_length": workings(pipe).tokens(pipe)} if name == "flux" else {}
        theirs = pipe(["x", "y"], generator=generators, **how).images
        ours = sample(pipe, ["x", "y"], [1, 2], 2, 3.0, size=64)
        for a, b in zip(ours, theirs):
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_random_bases_follow_from_their_seed(bases, tmp_path):
    state = torch.get_rng_state()
    same, other = random_base("sd1", tmp_path / "a"), random_base("sd1", tmp_path / "b", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    pipes = [load_base(str(f)) for f in (bases["sd1"], same, other)]
    for part in ("unet", "vae", "text_encoder"):
        first, again, different = (weights_hash(getattr(pipe, part)) for pipe in pipes)
        assert first == again != different


def test_the_hash_ignores_an_adapter_and_nothing_else(bases):
    unet = load_base(str(bases["sdxl"])).unet
    before = weights_hash(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True))
    assert weights_hash(unet) == before
    assert weights_hash(unet.to(torch.bfloat16)) != before
    with torch.no_grad():
        unet.float().conv_in.bias[0] += 1e-6
    assert weights_hash(unet) != before


# ---------------------------------------------------------------- the hub's cache


def in_cache(cache: Path, hub_id: str, base: Path, commit: str):
    "Lay a folder out as the hub's cache does."
    home = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(base, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)


def test_a_hub_model_comes_from_the_cache_with_its_commit(bases, tmp_path):
    commit, settings = "0123456789abcdef" * 2 + "01234567", tmp_path / "settings"
    in_cache(tmp_path / "cache", "me/small-xl", bases["sdxl"], commit)
    shutil.copytree(bases["sd1"], settings, ignore=shutil.ignore_patterns("*.safetensors"))
    in_cache(tmp_path / "cache", FAMILIES["sd1"].hub_id, settings, commit)
    one_file(bases["sd1"], "sd1", tmp_path / "alone.safetensors")
    code = f"""
from lora_mvp.models.base import base_revision, load_base, weights_hash
from lora_mvp.models.families import family_of
for revision in (None, "main", "{commit}"):
    pipe = load_base("me/small-xl", revision=revision)
    assert base_revision(pipe) == base_revision("me/small-xl", revision) == "{commit}", base_revision(pipe)
assert family_of(pipe).name == "sdxl"
try:
    load_base("me/small-xl", revision="other")
except LoraMvpError as e:
    assert e.code == "base_unreachable", e
else:
    raise AssertionError("a revision that is not in the cache was loaded")
pipe = load_base({str(tmp_path / "alone.safetensors")!r})
print(weights_hash(pipe.unet), base_revision(pipe))
"""
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    code = "from lora_mvp.config import LoraMvpError" + code
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [weights_hash(load_base(str(bases["sd1"])).unet), "None"]


def test_local_bases_have_no_commit(bases):
    assert base_revision(load_base(str(bases["sd1"]))) is None and base_revision(str(bases["sd1"])) is None


# ---------------------------------------------------------------- one file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, config) -> str:
    "The original name of a UNet's tensor: a flat list of input blocks, a middle block and a flat list of output blocks."
    module, kind = key.rsplit(".", 1)
    if module in ENDS:
        return f"{ENDS[module]}.{kind}"
    per_block = config["layers_per_block"] + 1
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", module):
        side, block, what, layer, rest = found.groups()
        block, layer = int(block), int(layer)
        rest = RESNET.get(rest, rest) if what == "resnets" else rest
        if side == "down":
            place = 1 + per_block * block + (per_block - 1 if what == "downsamplers" else layer)
            return f"input_blocks.{place}.{int(what == 'attentions')}.{'op' if what == 'downsamplers' else rest}.{kind}"
        place = per_block * block + (per_block - 1 if what == "upsamplers" else layer)
        has_attention = config["up_block_types"][block].startswith("CrossAttn")
        slot = {"resnets": 0, "attentions": 1, "upsamplers": 1 + has_attention}[what]
        return f"output_blocks.{place}.{slot}.{rest}.{kind}"
    what, layer, rest = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", module).groups()
    place = 1 if what == "attentions" else 2 * int(layer)
    return f"middle_block.{place}.{RESNET.get(rest, rest) if what == 'resnets' else rest}.{kind}"


def vae_name(key: str, levels: int) -> str:
    "The original name of an autoencoder's tensor; the decoder's levels are counted from the finest."
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        for ours, theirs in ATTENTION.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        return key.replace("mid_block.attentions.0", "mid.attn_1")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", key)


def open_clip(state: dict) -> dict:
    "A CLIP text encoder's tensors under OpenCLIP's names, which keeps query, key and value in one tensor."
    out = {}
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if found := re.match(r"(encoder\.layers\.\d+\.self_attn\.)q_proj\.(weight|bias)", key):
            prefix = "text_model." if f"text_model.{key}" in state else ""
            value = torch.cat([state[f"{prefix}{found[1]}{p}_proj.{found[2]}"] for p in "qkv"])
            key = f"{found[1]}in_proj_{found[2]}"
        elif re.search(r"self_attn\.[kv]_proj", key):
            continue
        for ours, theirs in {
            "encoder.layers.": "transformer.resblocks.",
            "self_attn": "attn",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
            "embeddings.token_embedding": "token_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
            "final_layer_norm": "ln_final",
        }.items():
            key = key.replace(ours, theirs)
        if key == "text_projection.weight":
            key, value = "text_projection", value.T
        out[key] = value.contiguous()
    return out


def one_file(base: Path, name: str, file: Path, metadata=None, drop="-", **extra) -> Path:
    "Write a folder's weights as one checkpoint in the layout of the original code."
    config = json.loads((base / "unet" / "config.json").read_text())
    unet = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    state = {f"model.diffusion_model.{unet_name(k, config)}": v for k, v in unet.items()}
    levels = len(json.loads((base / "vae" / "config.json").read_text())["block_out_channels"])
    for key, value in load_file(base / "vae" / "diffusion_pytorch_model.safetensors").items():
        original = f"first_stage_model.{vae_name(key, levels)}"
        is_linear = ".attn_1." in original and original.endswith("weight") and ".norm." not in original
        state[original] = value[:, :, None, None] if is_linear else value  # a convolution of one pixel there
    first = load_file(base / "text_encoder" / "model.safetensors")
    clip = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in first.items()}
    if name == "sd1":
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in clip.items()}
    if name == "sd2":
        state |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(first).items()}
    if name == "sdxl":
        second = load_file(base / "text_encoder_2" / "model.safetensors")
        state |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in clip.items()}
        state |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(second).items()}
    state = {k: v.contiguous() for k, v in (state | extra).items() if not k.startswith(drop)}
    save_file(state, file, metadata)
    return file


@pytest.mark.parametrize("name", SINGLE)
def test_one_file_equals_the_folder_bit_for_bit(bases, tmp_path, name):
    file = one_file(bases[name], name, tmp_path / "model.safetensors")
    shutil.copytree(bases[name], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    ours, theirs = load_base(str(file)), load_base(str(bases[name]))
    assert family_of(ours) is family_of(theirs) is FAMILIES[name] and is_frozen(ours) and base_revision(ours) is None
    for part in ("unet", "vae", *FAMILIES[name].text_encoders):
        assert weights_hash(getattr(ours, part)) == weights_hash(getattr(theirs, part)), part
    assert ours.scheduler.config == theirs.scheduler.config
    a, b = (sample(pipe, ["a cat"], [1], 2, 3.0, size=64)[0] for pipe in (ours, theirs))
    assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name, shards", [("sd1", 0), ("sdxl", 3)])
def test_a_packed_base_is_the_same_from_a_file_or_from_shards_and_unpacks_to_the_bit(bases, tmp_path, name, shards):
    """And it is known by the weights that it was packed from."""
    folder, plain = Path(shutil.copytree(bases[name], tmp_path / "model")), load_base(str(bases[name]))
    source = folder
    if shards:
        plain.unet.save_pretrained(
            folder / "unet", max_shard_size=f"{sum(p.nbytes for p in plain.unet.parameters()) // shards // 1000}KB"
        )
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
        assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    else:
        source = one_file(bases[name], name, tmp_path / "model.safetensors")
    packed, ours = (load_base(str(place), bits="int8") for place in (source, bases[name]))
    assert part_hashes(packed) == part_hashes(plain)
    state, same = packed.unet.state_dict(), ours.unet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in same.items() if not value.is_meta)
    far = differences(probe(packed), probe(plain))["unet"]
    with unpacked(packed):
        assert differences(probe(packed), probe(plain))["unet"] == 0 < far


def test_a_packed_base_with_holes_or_broken_numbers_is_refused(bases, tmp_path):
    folder = Path(shutil.copytree(bases["sd1"], tmp_path / "model"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("attn1.to_q.weight"))
    for change, code in ((weights[name] * torch.inf, "base_not_finite"), (weights[name][1:], "base_unreadable")):
        save_file(weights | {name: change.contiguous()}, file)
        assert refusal(folder, bits="int8").code == code
    save_file({key: value for key, value in weights.items() if key != name}, file)
    error = refusal(folder, bits="int8")
    assert error.code == "base_unreadable" and name in error.message


def test_one_file_without_settings_says_where_to_put_them(bases, tmp_path):
    for name in SINGLE:
        error = refusal(one_file(bases[name], name, tmp_path / f"{name}.safetensors"))
        assert error.code == "base_unreachable"
        assert FAMILIES[name].hub_id in error.message and str(tmp_path / name) in error.message


@pytest.mark.parametrize("says", [{"metadata": {"modelspec.prediction_type": "v"}}, {"v_pred": torch.zeros(1)}])
def test_one_file_that_contradicts_its_settings_is_refused(bases, tmp_path, says):
    file = one_file(bases["sdxl"], "sdxl", tmp_path / "model.safetensors", **says)
    settings = Path(shutil.copytree(bases["sdxl"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    error = refusal(file)
    assert error.code == "base_unreadable" and "v_prediction" in error.message and "epsilon" in error.message
    edit(settings / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load_base(str(file)).scheduler.config.prediction_type == "v_prediction"


def test_one_file_with_the_settings_of_another_family_is_refused(bases, tmp_path):
    file = one_file(bases["sd1"], "sd1", tmp_path / "model.safetensors")
    shutil.copytree(bases["sdxl"], tmp_path / "model")
    assert "StableDiffusionXLPipeline" in refusal(file).message


def test_settings_beside_a_file_are_checked_too(bases, tmp_path):
    file = one_file(bases["sd1"], "sd1", tmp_path / "model.safetensors")
    shutil.copytree(bases["sd1"], tmp_path / "model")
    (tmp_path / "model" / "pipeline.py").touch()
    assert refusal(file).code == "base_unsafe"


@pytest.mark.parametrize(
    "drop, said",
    [
        ("cond_stage_model.", "no text encoder"),
        ("first_stage_model.", "no autoencoder"),
        ("model.diffusion_model.", "layout"),
    ],
)
def test_a_file_without_one_of_the_parts_is_refused(bases, tmp_path, drop, said):
    error = refusal(one_file(bases["sd1"], "sd1", tmp_path / "model.safetensors", drop=drop))
    assert error.code == "base_unsupported" and said in error.message


@pytest.mark.parametrize(
    "drop, said",
    [
        ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v", "UNet or autoencoder"),
        ("first_stage_model.decoder.mid.attn_1.q", "UNet or autoencoder"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1", "layers.1.mlp.fc1"),
    ],
)
def test_a_file_with_holes_is_refused(bases, tmp_path, drop, said):
    file = one_file(bases["sd1"], "sd1", tmp_path / "model.safetensors", drop=drop)
    shutil.copytree(bases["sd1"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    error = refusal(file)
    assert error.code == "base_unreadable" and said in error.message and "missing" in error.message


def weights_of(pipe) -> list[str]:
    return [weights_hash(part) for part in networks(pipe).values()]


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_under_the_name_of_a_variant_are_read(folder, variant):
    wanted = weights_of(load_base(str(folder)))
    parts = ("unet", "vae", "text_encoder") if variant == "fp16" else ("unet",)
    for file in [file for part in parts for file in (folder / part).glob("*.safetensors")]:
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    pipe = load_base(str(folder))
    assert weights_of(pipe) == wanted and pipe.config._name_or_path == str(folder)


def test_half_precision_on_the_disk_is_kept_where_it_is_wanted(folder):
    for file in [*folder.glob("*/*.safetensors")]:
        save_file(
            {name: value.half() for name, value in load_file(file).items()}, file.with_suffix(".fp16.safetensors")
        )
        file.unlink()
    pipe = load_base(str(folder), dtype=torch.float16)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in pipe.unet.state_dict().items())


def test_a_byte_order_mark_in_front_of_configs_is_read_over(folder):
    for file in [*folder.glob("*.json"), *folder.glob("*/*.json")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_base(str(folder)).unet


def test_a_missing_tokenizer_is_found_before_anything_is_loaded(folder):
    shutil.rmtree(folder / "tokenizer")
    error = refusal(folder)
    assert error.code == "base_unreadable" and "its tokenizer is missing" in error.message


def test_numbers_that_are_none_are_named(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, file)
    error = refusal(folder)
    assert error.code == "base_not_finite" and "1 of the" in error.message and "unet.conv_in.weight" in error.message


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in SINGLE[1:])])
def test_single_files_under_other_names_are_the_same_base(bases, tmp_path, name):
    file = one_file(bases[name], name, tmp_path / "model.safetensors")
    shutil.copytree(bases[name], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    wanted, state = weights_of(load_base(str(file))), load_file(file)
    unet = "model.diffusion_model."
    ema = {
        ("model_ema." + k.removeprefix("model.").replace(".", "") if k.startswith(unet) else k): v
        for k, v in state.items()
    }
    bare = {k.replace(".transformer.text_model.", ".transformer."): v for k, v in state.items()}
    for other in ({f"state_dict.{k}": v for k, v in state.items()}, ema | {"model_ema.decay": torch.ones(1)}, bare):
        save_file(other, file)
        assert weights_of(load_base(str(file))) == wanted


def test_other_files_are_refused(bases, tmp_path):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = one_file(bases["sd1"], "sd1", tmp_path / "inpaint.safetensors", **{first: torch.zeros(16, 9, 3, 3)})
    assert refusal(inpainting).code == "base_unsupported" and "9 channels" in refusal(inpainting).message
    names = {
        "flux": "double_blocks.0.img_attn.norm.key_norm.scale",
        "sd3": "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias",
        "lora": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    }
    for name, key in names.items():
        save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        assert refusal(tmp_path / f"{name}.safetensors").code == "base_unsupported"
    refiner = {first: torch.zeros(8, 4, 3, 3), "conditioner.embedders.0.model.text_projection": torch.zeros(4, 4)}
    save_file(refiner, tmp_path / "refiner.safetensors")
    assert "refiner" in refusal(tmp_path / "refiner.safetensors").message
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04not a model")
    assert refusal(tmp_path / "broken.safetensors").code == "base_unreadable"


def test_the_package_holds_to_its_own_rules():
    assert find_base("tiny") == str(asset("tiny"))
    assert check_folder(asset("tiny")) is FAMILIES["tiny"]
