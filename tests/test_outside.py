"""An adapter in ComfyUI and in sd-scripts, judged by their own code, which stays outside of this repository.

LORA_MVP_COMFYUI and LORA_MVP_SD_SCRIPTS name checkouts, and what these import beside torch, diffusers and transformers
(einops and torchsde for ComfyUI) has to be there. Without them nothing is judged.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from safetensors.torch import load_file
from test_exports import apply_by_hand, close, trained

from lora_mvp.models.adapters import save_adapter
from lora_mvp.models.base import load_base
from lora_mvp.models.exports import export_adapter
from lora_mvp.models.fused import write_fused
from lora_mvp.models.kohya import write_kohya
from lora_mvp.models.miniatures import random_base, random_lora
from lora_mvp.models.proof import comfyui_dora_error, differences, probe
from lora_mvp.models.reading import load_lora

pytestmark = pytest.mark.slow
PROGRAMS = {"comfyui": "LORA_MVP_COMFYUI", "sd-scripts": "LORA_MVP_SD_SCRIPTS"}
THERE = {
    program: pytest.mark.skipif(not os.environ.get(name), reason=f"{name} names no checkout")
    for program, name in PROGRAMS.items()
}


@pytest.fixture
def files(tmp_path):
    """Base, trained pipeline, and its adapter in both forms for other programs."""

    def make(family, variant):
        base = str(random_base(family, tmp_path / "base"))
        keys = {"lora_variant": variant, "lora_targets": "attention_ff", "text_encoder_learning_rate": None}
        pipe = trained(base, **keys)
        save_adapter(pipe, tmp_path / "run", base)
        return base, pipe, write_kohya(pipe, tmp_path / "kohya.safetensors"), tmp_path

    return make


def judged(program: str, base: str, file: Path, out: Path) -> dict:
    """The answers of a base that a program has changed as it reads the file."""
    checkout = os.environ[PROGRAMS[program]]
    script = Path(__file__).with_name("outside_judges.py")
    subprocess.run([sys.executable, script, program, checkout, base, file, out], check=True)
    pipe = load_base(base)
    pipe.unet.load_state_dict(load_file(out))
    return probe(pipe)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize(
    "program, family",
    [
        pytest.param(program, family, marks=THERE[program])
        for program, family in (("comfyui", "sd1"), ("comfyui", "sdxl"), ("sd-scripts", "sd1"))
    ],
)
def test_a_lora_does_there_what_was_trained(files, program, family, variant):
    base, pipe, kohya, folder = files(family, variant)
    assert close(probe(pipe), judged(program, base, kohya, folder / "out"), 1e-4)


@THERE["comfyui"]
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_dora_in_comfyui(files, family):
    """As whole differences it is what was trained; in kohya's form its rows have the lengths that the certificate names."""
    base, pipe, kohya, folder = files(family, "dora")
    wanted, bare = probe(pipe), probe(load_base(base))
    diff = export_adapter(folder / "run", "diff", folder / "diff.safetensors")
    assert close(wanted, judged("comfyui", base, diff, folder / "out"), 1e-4)
    theirs, twin = judged("comfyui", base, kohya, folder / "out"), load_base(base)
    apply_by_hand(twin, kohya, 1, family == "sdxl", comfyui=True)
    assert close(probe(twin), theirs, 1e-4)
    assert differences(wanted, theirs)["unet"] > 0.01 * differences(wanted, bare)["unet"]
    assert comfyui_dora_error(pipe) > 0.01


@THERE["sd-scripts"]
def test_a_dora_in_sd_scripts(files):
    """Its lengths are left out, as diffusers leaves them out, and whole differences are left out altogether."""
    base, pipe, kohya, folder = files("sd1", "dora")
    wanted, bare = probe(pipe), probe(load_base(base))
    diff = export_adapter(folder / "run", "diff", folder / "diff.safetensors")
    assert close(bare, judged("sd-scripts", base, diff, folder / "out"))
    theirs = judged("sd-scripts", base, kohya, folder / "out")
    assert not close(bare, theirs, 1e-4) and not close(wanted, theirs, 1e-4)


# Both programs take the size of a head of Stable Diffusion 3 for known.
HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128}
# FLUX: layers beside the blocks and some in them; kohya has no name for its norm_out.
BESIDE = r".*_embedder.*|transformer_blocks\.0\.attn\.to_q"
SMALL = {
    "sd3": {"transformer": HEADS | {"dual_attention_layers": ()}},
    "sd3.5": {"transformer": HEADS},
    "flux": {},
    "zimage": {},
}


def answers(program: str, base: str, file: Path, out: Path) -> dict:
    """What a program's own model says before and after it took the file, and diffusers' model with its weights."""
    script = Path(__file__).with_name("outside_transformers.py")
    subprocess.run([sys.executable, script, program, os.environ[PROGRAMS[program]], base, file, out], check=True)
    told = load_file(out)
    packed = {name: value for name, value in told.items() if value.ndim == 3}
    return told | {name: FluxPipeline._unpack_latents(value, 128, 128, 8) for name, value in packed.items()}


@pytest.mark.parametrize("form", ["fused", "plain"])
@pytest.mark.parametrize(
    "family, targets", [("sd3", "all"), ("sd3.5", ".*"), ("flux", "all"), ("flux", BESIDE), ("zimage", "attention_ff")]
)
@pytest.mark.parametrize("program", [pytest.param(program, marks=THERE[program]) for program in PROGRAMS])
def test_an_adapter_for_a_transformer(tmp_path, program, family, targets, form):
    """The form with joined matrices in both programs; the one with diffusers' names in ComfyUI."""
    if (program, form) == ("sd-scripts", "plain") or (family == "zimage" and (program, form) != ("comfyui", "fused")):
        pytest.skip("the program does not know these names")
    base = str(random_base(family[:3] if "sd3" in family else family, tmp_path / "base", **SMALL[family]))
    pipe = random_lora(load_base(base), lora_targets=targets, lora_variant="rslora")
    file = {"fused": write_fused, "plain": write_kohya}[form](pipe, tmp_path / "other.safetensors")
    told, wanted, bare = answers(program, base, file, tmp_path / "out"), probe(pipe), probe(load_base(base))
    assert off(told["moved"], wanted, bare) < 1e-5
    if (program, family) == ("sd-scripts", "sd3.5"):
        return  # its model takes the number of heads for their size in the second attention
    if family != "zimage":
        assert off(told["bare"], bare, wanted) < 1e-5 and off(told["changed"], wanted, bare) < 1e-5


def off(told, wanted: dict, other: dict) -> float:
    """How far an answer is from what was wanted, as a share of what the adapter does."""
    return float((told - wanted["transformer"]).norm() / (wanted["transformer"] - other["transformer"]).norm())


@THERE["sd-scripts"]
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_what_sd_scripts_writes_is_read(tmp_path, family):
    base = str(random_base(family, tmp_path / "base", **SMALL[family]))
    told = answers("sd-scripts", base, tmp_path / "theirs.safetensors", tmp_path / "out")
    pipe = load_base(base)
    load_lora(pipe, tmp_path / "theirs.safetensors")
    assert off(told["changed"], probe(pipe), probe(load_base(base))) < 1e-5
