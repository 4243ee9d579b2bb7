"""Stable Diffusion 3, FLUX and Z-Image: what is refused, what the published ones need, and that only `models` knows families."""

import ast
import tokenize
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from real_sizes import real_configs
from safetensors.torch import save_file

from lora_mvp.cli import main
from lora_mvp.config import TrainingConfig, load_config
from lora_mvp.errors import LoraMvpError
from lora_mvp.models.adapters import adapter_layers, adapter_parameters, add_lora, save_adapter
from lora_mvp.models.base import load_base
from lora_mvp.models.contents import open_adapter
from lora_mvp.models.drawing import sample
from lora_mvp.models.families import denoiser, networks
from lora_mvp.models.inspection import inspect_adapter
from lora_mvp.models.kohya import write_kohya
from lora_mvp.models.matrices import matrices
from lora_mvp.models.miniatures import random_base, random_lora
from lora_mvp.models.names import taken_apart
from lora_mvp.models.packed import weight_sizes
from lora_mvp.models.proof import differences, probe
from lora_mvp.models.reading import Factors, layer_names, put_factors, read_factors
from lora_mvp.train.flow import objective_of
from lora_mvp.train.memory import MemoryEstimate, skeleton

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"tiny", "sd1", "sd2", "sdxl", "sd3", "flux", "zimage"}
# Doors that offer bases to people by short names, and what reads other people's files.
MAY_NAME = {"presets.py", "start.py", "demo.py"}


@pytest.fixture(scope="module", params=["sd3", "flux", "zimage"])
def base(request, tmp_path_factory):
    return random_base(request.param, tmp_path_factory.mktemp(request.param))


def test_only_models_names_a_family_or_a_part_of_one():
    """Elsewhere a family's name or the name of its denoiser is neither a string nor an attribute."""
    for path in sorted((ROOT / "lora_mvp").rglob("*.py")):
        if path.parent.name == "models" or path.name in {*MAY_NAME, "_modidx.py"}:
            continue
        with tokenize.open(path) as file:
            tokens = list(tokenize.generate_tokens(file.readline))
        texts = {ast.literal_eval(t.string) for t in tokens if t.type == tokenize.STRING and t.string[0] in "\"'"}
        names = {t.string for t in tokens if t.type == tokenize.NAME}
        assert not texts & ((FAMILIES - {"tiny"}) | {"unet", "transformer"}), path
        assert not names & {"unet", "transformer"}, path


@pytest.mark.parametrize(
    "setting", [{"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"zero_terminal_snr": True}, {"prediction_type": "epsilon"}]
)
def test_settings_of_the_other_objective_are_refused(base, setting):
    with pytest.raises(LoraMvpError, match=f"training.{next(iter(setting))} is for bases .* Take the setting out"):
        objective_of(load_base(str(base)).scheduler, TrainingConfig(**setting))


def test_frozen_text_encoders_are_said_to_be(base):
    with pytest.raises(LoraMvpError, match="text_encoder_learning_rate: the text encoders of .* are not trained here"):
        add_lora(load_base(str(base)), TrainingConfig(text_encoder_learning_rate=1e-4))
    with pytest.raises(LoraMvpError, match="training.lora_variant: dora is not made for .* Use lora or rslora"):
        add_lora(load_base(str(base)), TrainingConfig(lora_variant="dora"))


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch):
    from lora_mvp.models.packed import check_packing
    from lora_mvp.train.optimizers import make_optimizer
    from lora_mvp.train.trackers import check_trackers

    monkeypatch.setattr("lora_mvp.extras.find_spec", lambda module: None)
    with pytest.raises(LoraMvpError, match=r"pip install 'lora-mvp\[optimizers\]'"):
        check_packing(TrainingConfig(base_quant="nf4"), "cpu")
    for name in ("adamw8bit", "prodigy", "schedulefree"):
        with pytest.raises(LoraMvpError, match=r"pip install 'lora-mvp\[optimizers\]'"):
            make_optimizer(TrainingConfig(optimizer=name), [])
    for name in ("tensorboard", "wandb"):
        with pytest.raises(LoraMvpError, match=rf"pip install 'lora-mvp\[{name}\]'"):
            check_trackers(TrainingConfig(trackers=[name]))


def test_captions_are_counted_as_the_base_reads_them(base):
    """By data preparation, which loads no weights; of a language model 512 tokens are read."""
    from lora_mvp.data.captions import caption_tokenizer, too_long

    tokenizer = caption_tokenizer(str(base))
    assert too_long(["a cat"], tokenizer) == [] and too_long(["x y " * 300], tokenizer)[0][0] == 0
    assert tokenizer.model_max_length == (512 if "zimage" in str(base) else 77)


def test_prodigy_is_told_its_rate():
    from lora_mvp.train.optimizers import check_optimizer

    with pytest.raises(LoraMvpError, match="prodigy finds the rate by itself and multiplies it by this, and 0.0001"):
        check_optimizer(TrainingConfig(optimizer="prodigy"))


def test_a_base_without_t5(tmp_path):
    pipe = load_base(str(random_base("sd3", tmp_path, text_encoder_3=None, tokenizer_3=None)))
    assert "text_encoder_3" not in networks(pipe)
    assert sample(pipe, ["a cat"], [1], 2, 3.0, size=64)[0].size == (64, 64)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_both_files_are_read_at_the_trained_strength_by_diffusers(base, tmp_path, variant):
    """By a pipeline that has never seen the adapter; the file for other programs holds no alpha to be overlooked."""
    pipe = random_lora(load_base(str(base)), lora_variant=variant)
    save_adapter(pipe, tmp_path, str(base))
    file = write_kohya(pipe, tmp_path / "other.safetensors")
    wanted = sample(pipe, ["a cat"], [1], 2, 3.0, size=64)[0]
    before = sample(load_base(str(base)), ["a cat"], [1], 2, 3.0, size=64)[0]
    for place in (tmp_path / "pytorch_lora_weights.safetensors", file):
        fresh = load_base(str(base))
        fresh.load_lora_weights(place.parent, weight_name=place.name)
        drawn = sample(fresh, ["a cat"], [1], 2, 3.0, size=64)[0]
        far, apart = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).float() for x in (before, drawn))
        ours = torch.frombuffer(bytearray(wanted.tobytes()), dtype=torch.uint8).float()
        assert (apart - ours).abs().max() <= 1 < (far - ours).abs().max()
    facts = inspect_adapter(file)
    assert facts.readers["diffusers"] is not False and not facts.alphas and facts.strength == (1.0, 1.0)
    assert all(taken_apart(name) for name in adapter_parameters(pipe))


@pytest.mark.parametrize("to", ["diff", "fused"])
def test_other_forms_do_what_was_trained(base, tmp_path, to):
    """The command proves it, or it ends with an error."""
    adapter = tmp_path / "adapter"
    save_adapter(random_lora(load_base(str(base))), adapter, str(base))
    out = tmp_path / ("other.safetensors" if to == "diff" else "other")
    assert main(["export", str(adapter), "--to", to, "--out", str(out)]) == 0 and out.exists()


def test_the_form_of_kohya_does_what_was_trained(base, tmp_path, capsys):
    """Also that of all layers, rsLoRA, and with what is said of diffusers."""
    pipe = random_lora(load_base(str(base)), lora_targets="all", lora_variant="rslora")
    adapter, out = tmp_path / "adapter", tmp_path / "other.safetensors"
    save_adapter(pipe, adapter, str(base))
    assert main(["export", str(adapter), "--to", "kohya", "--out", str(out)]) == 0
    facts, said = inspect_adapter(out), capsys.readouterr().out
    assert facts.family == base.name[:-1] and facts.form == "kohya" and facts.readers["ComfyUI"]
    assert facts.strength == pytest.approx((3, 3)) and facts.metadata["ss_network_module"].endswith(facts.family)
    assert ("sd-scripts" in said) is (facts.family != "zimage")
    fresh = load_base(str(base))
    with suppress(AssertionError):  # of sizes that are not FLUX's
        fresh.load_lora_weights(tmp_path, weight_name=out.name)
    assert (differences(probe(pipe), probe(fresh))["transformer"] < 1e-4) is facts.readers["diffusers"]


def test_diffusers_reads_the_form_of_kohya_for_the_published_flux(tmp_path):
    """All kinds of layers, joined ones of equal and of different ranks, compared by what they make of a vector."""
    pipe = skeleton(real_configs("flux", tmp_path / "flux"), TrainingConfig())
    modules, state = dict(denoiser(pipe).named_modules()), {}
    kinds = ("double_blocks.18.", "single_blocks.37.")
    for i, (name, matrix) in enumerate((n, m) for n, m in matrices(pipe).items() if n.startswith(kinds)):
        key, own = f"lora_unet_{name.replace('.', '_')}", [modules[layer] for layer in matrix.layers]
        ups = [torch.randn(layer.out_features, 2 - (i + k) % 2 * (i % 3 > 0)) for k, layer in enumerate(own)]
        rank = sum(up.shape[1] for up in ups)
        state[f"{key}.lora_down.weight"] = torch.randn(rank, own[0].in_features) / 50
        state |= {f"{key}.lora_up.weight": torch.block_diag(*ups), f"{key}.alpha": torch.tensor(1.5 * rank)}
    save_file(state, tmp_path / "file.safetensors")
    assert inspect_adapter(tmp_path / "file.safetensors").readers["diffusers"]
    ours, left = read_factors(pipe, open_adapter(tmp_path / "file.safetensors"))
    theirs = FluxPipeline.lora_state_dict(state)
    assert not left and len(theirs) == 2 * len(ours)
    for name, f in ours.items():
        x = torch.randn(f.down.shape[1])
        up, down = (theirs[f"{name}.lora_{kind}.weight"] for kind in "BA")
        assert torch.allclose(up @ (down @ x), f.alpha / f.rank * f.up @ (f.down @ x), atol=1e-3)


SIDE = "attn_qkv attn_proj mlp_fc1 mlp_fc2 adaLN_modulation_1"
STREAM = "attn_qkv attn_proj mlp_0 mlp_2 mod_lin"
NEXT = "attention_qkv attention_out feed_forward_w1 feed_forward_w2 feed_forward_w3"
THEIR_NAMES = {  # blocks of a miniature, and its layers there, as sd-scripts' networks name them, and for Z-Image ComfyUI
    "sd3": [
        ("joint_blocks_0_x_block_", f"{SIDE} attn2_qkv attn2_proj"),
        (
            "joint_blocks_1_x_block_ joint_blocks_2_x_block_ joint_blocks_0_context_block_ joint_blocks_1_context_block_",
            SIDE,
        ),
        ("joint_blocks_2_context_block_", "attn_qkv adaLN_modulation_1"),
        ("t_embedder_mlp_ y_embedder_mlp_", "0 2"),
        ("", "context_embedder x_embedder_proj final_layer_adaLN_modulation_1 final_layer_linear"),
    ],
    "flux": [
        ("double_blocks_0_img_ double_blocks_0_txt_ double_blocks_1_img_ double_blocks_1_txt_", STREAM),
        ("single_blocks_0_ single_blocks_1_", "linear1 linear2 modulation_lin"),
        ("time_in_ vector_in_ guidance_in_", "in_layer out_layer"),
        ("", "img_in txt_in"),
    ],
    "zimage": [
        ("layers_0_ layers_1_ noise_refiner_0_", f"{NEXT} adaLN_modulation_0"),
        ("context_refiner_0_", NEXT),
        (
            "",
            "x_embedder cap_embedder_1 t_embedder_mlp_0 t_embedder_mlp_2 final_layer_linear final_layer_adaLN_modulation_1",
        ),
    ],
}


def test_layers_are_named_as_other_programs_name_them(base):
    wanted = [
        (start, end)
        for starts, ends in THEIR_NAMES[base.name[:-1]]
        for start in starts.split(" ")
        for end in ends.split()
    ]
    pipe = load_base(str(base))
    found = [name.replace(".", "_") for name in matrices(pipe)]
    assert sorted(found) == sorted(start + end for start, end in wanted)
    plain = {name for part, name in layer_names(pipe) if part == "transformer"}  # musubi-tuner's for Z-Image
    assert plain | {*found} == {name for part, name in layer_names(pipe) if part == "unet"}


@pytest.mark.parametrize("family, layer", [("flux", "norm_out.linear"), ("sd3", None)])
def test_what_has_no_place_in_the_form_of_kohya_is_named(tmp_path, capsys, family, layer):
    """A layer that sd-scripts would pass over, and DoRA, which another program may have trained."""
    base = str(random_base(family, tmp_path / "base"))
    pipe = random_lora(load_base(base), **({"lora_targets": "norm_out.linear"} if layer else {}))
    if layer is None:
        name, lora = next(iter(adapter_layers(pipe).items()))
        factors = Factors(
            lora.lora_A["default"].weight, lora.lora_B["default"].weight, 4.0, torch.ones(lora.out_features)
        )
        pipe = load_base(base)
        put_factors(pipe, {name: factors})
    save_adapter(pipe, tmp_path / "adapter", base)
    assert main(["export", str(tmp_path / "adapter"), "--to", "kohya", "--out", str(tmp_path / "x.safetensors")]) == 2
    said = capsys.readouterr().err
    assert (layer or name) in said and "--to diff" in said and not (tmp_path / "x.safetensors").exists()


# Parameters of the denoiser and of the largest text encoder, as published.
SIZES = {"sd3": (2.25e9, 4.76e9), "flux": (11.9e9, 4.76e9), "zimage": (6.15e9, 4.02e9)}
EXAMPLES = {"sd3": ("sd35.yaml", 16), "flux": ("flux.yaml", 24), "zimage": ("zimage.yaml", 12)}  # and the card, GB


@pytest.mark.parametrize("family", SIZES)
def test_the_published_ones_are_counted(family, tmp_path):
    folder = real_configs(family, tmp_path / family)
    example, card = EXAMPLES[family]
    t = load_config(ROOT / "examples" / example).training
    pipe = skeleton(folder, t)
    large = [sum(weight_sizes(part)) for part in (denoiser(pipe), list(networks(pipe).values())[-1])]
    assert large == pytest.approx(SIZES[family], rel=0.01)
    phases = {phase.name: phase.total / 1e9 for phase in MemoryEstimate(folder, "cuda").phases(t)}
    most = max(phases.values())
    assert card / 2 < most < card, f"docs/guides/families.md says a card of {card} GB: {phases}"
