"""An adapter in ComfyUI and in sd-scripts, judged by their own code, which stays outside of this repository.

LORA_MVP_COMFYUI and LORA_MVP_SD_SCRIPTS name checkouts, and what these import beside torch, diffusers and transformers
(einops and torchsde for ComfyUI) has to be there. Without them nothing is judged.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_exports import apply_by_hand, close, trained

from lora_mvp.models.adapters import save_adapter
from lora_mvp.models.base import load_base
from lora_mvp.models.exports import export_adapter
from lora_mvp.models.kohya import write_kohya
from lora_mvp.models.miniatures import random_base
from lora_mvp.models.proof import comfyui_dora_error, differences, probe

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
