"""An adapter does the same wherever it goes: judged by diffusers' loaders and by kohya's rule applied by hand."""

import json
import math
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_mvp import __version__
from lora_mvp.config import TrainingConfig
from lora_mvp.errors import LoraMvpError
from lora_mvp.models.adapters import (
    WEIGHTS,
    adapter_layers,
    adapter_parameters,
    add_lora,
    load_public,
    save_adapter,
    set_scale,
)
from lora_mvp.models.base import load_base
from lora_mvp.models.exports import export_adapter, export_fused
from lora_mvp.models.families import networks
from lora_mvp.models.inspection import describe, inspect_adapter
from lora_mvp.models.kohya import kohya_state, write_kohya
from lora_mvp.models.miniatures import random_base
from lora_mvp.models.proof import certify, differences, probe
from lora_mvp.models.reading import load_lora
from lora_mvp.train.counting import LiveBytes

KOHYA_WEIGHTS = "lora_kohya.safetensors"
SGM = {  # SDXL's blocks in Stability's code and in diffusers, written down one by one
    "input_blocks_1_0": "down_blocks.0.resnets.0",
    "input_blocks_2_0": "down_blocks.0.resnets.1",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0": "down_blocks.1.resnets.0",
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_0": "down_blocks.1.resnets.1",
    "input_blocks_5_1": "down_blocks.1.attentions.1",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks_7_0": "down_blocks.2.resnets.0",
    "input_blocks_7_1": "down_blocks.2.attentions.0",
    "input_blocks_8_0": "down_blocks.2.resnets.1",
    "input_blocks_8_1": "down_blocks.2.attentions.1",
    "middle_block_0": "mid_block.resnets.0",
    "middle_block_1": "mid_block.attentions.0",
    "middle_block_2": "mid_block.resnets.1",
    "output_blocks_0_0": "up_blocks.0.resnets.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_1_0": "up_blocks.0.resnets.1",
    "output_blocks_1_1": "up_blocks.0.attentions.1",
    "output_blocks_2_0": "up_blocks.0.resnets.2",
    "output_blocks_2_1": "up_blocks.0.attentions.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_3_0": "up_blocks.1.resnets.0",
    "output_blocks_3_1": "up_blocks.1.attentions.0",
    "output_blocks_4_0": "up_blocks.1.resnets.1",
    "output_blocks_4_1": "up_blocks.1.attentions.1",
    "output_blocks_5_0": "up_blocks.1.resnets.2",
    "output_blocks_5_1": "up_blocks.1.attentions.2",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_6_0": "up_blocks.2.resnets.0",
    "output_blocks_7_0": "up_blocks.2.resnets.1",
    "output_blocks_8_0": "up_blocks.2.resnets.2",
}
INNER = {"conv1": "in_layers_2", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A small random base of each family."""
    return {family: str(random_base(family, tmp_path_factory.mktemp(family))) for family in ("sd1", "sdxl")}


def trained(base: str, dtype=torch.float32, by=0.05, **keys):
    """A base with an adapter that has values, as after training; alpha differs from the rank."""
    pipe = load_base(base, dtype=dtype)
    settings = {"lora_rank": 4, "lora_alpha": 6, "lora_targets": "attention", "text_encoder_learning_rate": 1e-4}
    add_lora(pipe, TrainingConfig(**settings | keys))
    with torch.no_grad():
        for i, parameter in enumerate(adapter_parameters(pipe).values()):
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return pipe


def at(pipe, scale):
    """The trained pipeline's outputs at a strength."""
    set_scale(pipe, scale)
    return probe(pipe)


def close(one, other, share=1e-5):
    """Whether outputs agree to a share of their size."""
    return all(value <= share * float(one[name].abs().max()) for name, value in differences(one, other).items())


def kohya_modules(pipe, two: bool) -> dict[str, torch.nn.Module]:
    """Modules of a base by the names of kohya's files, without the package's own code."""
    found = {}
    for name, module in pipe.unet.named_modules():
        if two:
            for sgm, block in SGM.items():
                if name == block or name.startswith(f"{block}."):
                    rest = name.removeprefix(block).removeprefix(".")
                    rest = INNER.get(rest, rest).replace(".", "_")
                    found[f"lora_unet_{sgm}_{rest}".rstrip("_")] = module
        else:
            found[f"lora_unet_{name.replace('.', '_')}"] = module
    texts = {"lora_te1": pipe.text_encoder, "lora_te2": pipe.text_encoder_2} if two else {"lora_te": pipe.text_encoder}
    for prefix, encoder in texts.items():
        for name, module in encoder.named_modules():
            name = name if name.startswith("text_model.") else f"text_model.{name}"
            found[f"{prefix}_{name.replace('.', '_')}"] = module
    return found


@torch.no_grad()
def apply_by_hand(pipe, file, strength: float, two: bool, comfyui: bool = False) -> None:
    """W += strength * alpha / rank * up @ down, with LyCORIS' rule for .dora_scale, or a twin of ComfyUI's."""
    tensors, modules = load_file(file), kohya_modules(pipe, two)
    used = set()
    for name in {key.partition(".")[0] for key in tensors}:
        up, down, alpha = (tensors[f"{name}.{k}"] for k in ("lora_up.weight", "lora_down.weight", "alpha"))
        used |= {f"{name}.{k}" for k in ("lora_up.weight", "lora_down.weight", "alpha")}
        weight = modules[name].weight
        delta = (float(alpha) / len(down) * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if f"{name}.dora_scale" in tensors:
            used.add(f"{name}.dora_scale")
            total = weight + delta
            rows = (weight if comfyui else total).flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
            delta = total * tensors[f"{name}.dora_scale"] / rows - weight
        weight += strength * delta
    assert used == set(tensors)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("sd1", {"lora_targets": "all"}),
        pytest.param("sd1", {"lora_variant": "rslora", "text_encoder_learning_rate": None}, marks=pytest.mark.slow),
        ("sdxl", {"lora_targets": "all", "lora_variant": "rslora"}),
    ],
)
def test_every_reader_gives_the_same(roots, tmp_path, family, keys):
    pipe, base = trained(roots[family], **keys), probe(load_base(roots[family]))
    save_adapter(pipe, tmp_path, roots[family])
    kohya = write_kohya(pipe, tmp_path / KOHYA_WEIGHTS)
    wanted = {scale: at(pipe, scale) for scale in (0, 0.5, 1)}
    assert differences(wanted[0], base) == dict.fromkeys(base, 0.0)  # 0 is the base to the bit, not "not given"
    assert not close(wanted[0.5], wanted[1]) and not close(wanted[0], wanted[0.5])
    for file in (tmp_path / WEIGHTS, kohya):
        fresh = load_base(roots[family])
        load_public(fresh, file)
        for scale, expected in wanted.items():
            fresh.set_adapters(["default"], [float(scale)])
            assert close(expected, probe(fresh)), (file, scale)
    for scale in (0.5, 1):
        fresh = load_base(roots[family])
        apply_by_hand(fresh, kohya, scale, family == "sdxl")
        assert close(wanted[scale], probe(fresh), 1e-4), scale


@pytest.mark.slow  # in every run of the checks the next one has a DoRA in both forms
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_dora(roots, tmp_path, family):
    pipe = trained(roots[family], lora_variant="dora", lora_targets="attention_ff")
    save_adapter(pipe, tmp_path, roots[family])
    kohya = write_kohya(pipe, tmp_path / KOHYA_WEIGHTS)
    wanted = probe(pipe)
    by_hand, own, public = (load_base(roots[family]) for _ in range(3))
    apply_by_hand(by_hand, kohya, 1, family == "sdxl")
    load_lora(own, kohya)
    load_public(public, tmp_path / WEIGHTS)
    assert close(wanted, probe(by_hand), 1e-4) and close(wanted, probe(own)) and close(wanted, probe(public))
    certificate = certify(pipe, tmp_path, kohya)
    assert "ComfyUI (as of commit a125cd84)" in certificate.forms["kohya"].remark
    assert not certificate.forms["diffusers"].remark
    assert certificate.forms["kohya"].read_by == {"lora_mvp": __version__, "peft": version("peft")}
    assert not any(inspect_adapter(kohya).readers.values())


@torch.no_grad()
def apply_differences(pipe, file, strength: float, two: bool) -> None:
    """W += strength * diff, as every program that knows `.diff` has it."""
    modules = kohya_modules(pipe, two)
    for name, value in load_file(file).items():
        modules[name.removesuffix(".diff")].weight += strength * value


def test_dora_as_whole_differences(roots, tmp_path):
    """One form has two readings, the other one has one."""
    pipe = trained(roots["sdxl"], lora_variant="dora", lora_targets=r".*mid_block.*(to_q|ff.net.2|conv1)")
    save_adapter(pipe, tmp_path / "run", roots["sdxl"])
    diff = export_adapter(tmp_path / "run", "diff", tmp_path / "diff.safetensors")
    kohya = write_kohya(pipe, tmp_path / "kohya.safetensors")
    by_hand, comfyui = (load_base(roots["sdxl"]) for _ in range(2))
    base, wanted = probe(by_hand), probe(pipe)
    apply_by_hand(comfyui, kohya, 1, True, comfyui=True)
    assert differences(wanted, probe(comfyui))["unet"] > 0.01 * differences(wanted, base)["unet"]
    apply_differences(by_hand, diff, 1, True)
    assert close(wanted, probe(by_hand), 1e-4)
    apply_differences(by_hand, diff, -1, True)
    assert close(base, probe(by_hand), 1e-4)
    load_lora(by_hand, diff)
    assert close(wanted, probe(by_hand), 1e-4)
    facts = inspect_adapter(diff)
    assert facts.readers == {"diffusers": False, "ComfyUI": True, "A1111": True, "Forge": True} and not facts.remarks
    assert "a125cd84" in describe(inspect_adapter(kohya))


@pytest.mark.slow  # ten seconds of a core
def test_mixed_ranks(roots, tmp_path):
    """A file with its own rank and alpha in each layer, as resizing tools write, keeps each layer's strength."""
    state = kohya_state(trained(roots["sdxl"]))
    for i, name in enumerate(sorted({key.partition(".")[0] for key in state})):
        rank = 1 + i % 3
        state[f"{name}.lora_down.weight"] = state[f"{name}.lora_down.weight"][:rank].contiguous()
        state[f"{name}.lora_up.weight"] = state[f"{name}.lora_up.weight"][:, :rank].contiguous()
        state[f"{name}.alpha"] = torch.tensor(1.0 + i % 2)
    mixed = tmp_path / "mixed.safetensors"
    save_file(state, mixed)
    facts = inspect_adapter(mixed)
    assert set(facts.ranks) == {1, 2, 3} and set(facts.alphas) == {1.0, 2.0} and facts.strength == (1 / 3, 2.0)
    by_hand = load_base(roots["sdxl"])
    apply_by_hand(by_hand, mixed, 1, True)
    export_adapter(mixed, "diffusers", tmp_path / "peft", base=roots["sdxl"])
    fresh = load_base(roots["sdxl"])
    load_public(fresh, tmp_path / "peft" / WEIGHTS)
    assert close(probe(by_hand), probe(fresh), 1e-4)
    assert inspect_adapter(tmp_path / "peft").strength == facts.strength
    again = load_base(roots["sdxl"])
    load_lora(again, mixed)
    back = kohya_state(again)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_certificate(roots, tmp_path):
    pipe = trained(roots["sd1"], torch.bfloat16)
    save_adapter(pipe, tmp_path, roots["sd1"])
    kohya = write_kohya(pipe, tmp_path / KOHYA_WEIGHTS, {"trigger": "sks", "base": roots["sd1"]})
    assert roots["sd1"] not in str(inspect_adapter(kohya).metadata)
    certificate = certify(pipe, tmp_path, kohya)
    assert certificate.model_dump(mode="json") == json.loads((tmp_path / "certificate.json").read_text())
    assert min(certificate.adapter_effect.values()) > 0.01
    judges = {"diffusers": version("diffusers"), "peft": version("peft")}
    assert {form: check.read_by for form, check in certificate.forms.items()} == dict.fromkeys(
        ("diffusers", "kohya"), judges
    )
    first = (tmp_path / "certificate.json").read_bytes()
    certify(pipe, tmp_path, kohya)
    assert (tmp_path / "certificate.json").read_bytes() == first
    (tmp_path / "certificate.json").unlink()
    save_file({name: 0.9 * value for name, value in load_file(kohya).items()}, kohya)
    with pytest.raises(LoraMvpError, match="does not do what was trained") as caught:
        certify(pipe, tmp_path, kohya)
    assert caught.value.code == "export_unfaithful" and not (tmp_path / "certificate.json").exists()


def test_certificate_of_an_adapter_that_learned_nothing(roots, tmp_path):
    pipe = trained(roots["sd1"], by=0)
    save_adapter(pipe, tmp_path, roots["sd1"])
    certificate = certify(pipe, tmp_path, write_kohya(pipe, tmp_path / KOHYA_WEIGHTS))
    assert set(certificate.adapter_effect.values()) == {0.0}


def test_fused(roots, tmp_path):
    pipe = trained(roots["sdxl"], lora_variant="dora")
    save_adapter(pipe, tmp_path / "run", roots["sdxl"])
    out = export_adapter(tmp_path / "run", "fused", tmp_path / "fused", dtype=torch.bfloat16)
    names = {name for file in out.rglob("*.safetensors") for name in load_file(file)}
    assert names and not any("lora" in name or "base_layer" in name for name in names)
    assert close(probe(pipe), probe(load_base(str(out))), 0.05)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "fused"}


def test_a_refused_export_leaves_nothing(roots, tmp_path):
    pipe = trained(roots["sd1"], text_encoder_learning_rate=None)
    with torch.no_grad():
        for name, parameter in adapter_parameters(pipe).items():
            parameter.mul_(1e4 if "to_v" in name else 1)  # the sum is more than float16 can hold
    save_adapter(pipe, tmp_path / "run", roots["sd1"])
    with pytest.raises(LoraMvpError) as caught:
        export_fused(load_base(roots["sd1"]), tmp_path / "run", tmp_path / "fused", torch.float16)
    assert caught.value.code == "export_unfaithful"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    for to, out in (("diffusers", "run"), ("kohya", "run/adapter_config.json")):
        with pytest.raises(LoraMvpError):
            export_adapter(tmp_path / "run", to, tmp_path / out)
    (tmp_path / "file").write_text("")
    for to, out in (("diffusers", "file/adapter"), ("kohya", "file/deeper/adapter.safetensors")):
        with pytest.raises(LoraMvpError, match="the folder of the export .* cannot be written"):
            export_adapter(tmp_path / "run", to, tmp_path / out)


def test_damaged_and_foreign_files(roots, tmp_path):
    pipe = trained(roots["sdxl"])
    file = write_kohya(pipe, tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    data = file.read_bytes()
    for content in (b"", b"PK\x03\x04 a pickle", data[:100], data[: len(data) // 2], data[:-1], data[8:]):
        bad.write_bytes(content)
        with pytest.raises(LoraMvpError) as caught:
            inspect_adapter(bad)
        assert caught.value.code == "adapter_unreadable"
    state = load_file(file)
    for change in (
        {"lora_unet_input_blocks_9_9_to_q.lora_down.weight": torch.ones(2, 2)},
        {next(k for k in state if k.endswith("lora_up.weight")): torch.ones(3, 3)},
    ):
        save_file(state | change, bad)
        with pytest.raises(LoraMvpError) as caught:
            load_lora(load_base(roots["sdxl"]), bad)
        assert caught.value.code == "adapter_unfit"
    matrices = {"A": torch.ones(4, 1024), "B": torch.ones(320, 4)}
    save_file({f"unet.a.attn2.to_k.lora_{name}.weight": value for name, value in matrices.items()}, bad)
    facts = inspect_adapter(bad)
    assert (facts.form, facts.family, facts.alphas, facts.ranks) == ("diffusers", "sd2", {}, {4: 1})
    assert "alpha equal to the rank" in describe(facts)


def test_strength_in_the_file(roots):
    """alpha / rank of a kohya file is the strength that peft uses, whatever the variant."""
    for variant, strength in (("lora", 6 / 4), ("rslora", 6 / math.sqrt(4)), ("dora", 6 / 4)):
        pipe = trained(roots["sd1"], lora_variant=variant)
        assert {layer.scaling["default"] for layer in adapter_layers(pipe).values()} == {strength}
        state = kohya_state(pipe)
        for name in [key for key in state if key.endswith(".alpha")]:
            assert float(state[name]) / len(state[name.replace("alpha", "lora_down.weight")]) == strength


def test_a_certificate_needs_no_second_base(roots, tmp_path):
    """In half precision, too: beside the base there is one layer in float32, and activations; afterwards nothing is changed."""
    pipe = trained("tiny", torch.bfloat16)
    save_adapter(pipe, tmp_path, "tiny")
    kohya = write_kohya(pipe, tmp_path / KOHYA_WEIGHTS)
    parts = networks(pipe).values()
    before = {name: p.detach().clone() for part in parts for name, p in part.named_parameters()}
    base = sum(p.numel() * p.element_size() for part in parts for p in part.parameters() if not p.requires_grad)
    with LiveBytes(*parts) as live:
        certificate = certify(pipe, tmp_path, kohya)
    assert live.peak < base / 5 and live.now == 0
    after = {name: p for part in parts for name, p in part.named_parameters()}
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value == 0 for form in certificate.forms.values() for value in form.difference.values())
