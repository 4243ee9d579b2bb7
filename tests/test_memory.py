"""The doctor's estimate of each phase beside the bytes of the tensors that live in a real run; its advice, followed."""

import json
import re
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from real_sizes import real_configs

from lora_mvp.config import load_config
from lora_mvp.models.families import networks
from lora_mvp.models.miniatures import random_base
from lora_mvp.train import loop, results
from lora_mvp.train.counting import LiveBytes
from lora_mvp.train.diagnosis import memory_findings
from lora_mvp.train.memory import MemoryEstimate, advice, largest, milder

ROOT = Path(__file__).resolve().parent.parent
QUARTER = {  # of the channels of SD 1.5
    "unet": {"block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16},
    "vae": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2},
}


class Real(LiveBytes):
    """Without shapes on meta, which take no room."""

    def add(self, storage):
        if storage.device.type != "meta":
            super().add(storage)


class Peaks:
    """The most that lives in each phase of a run, weights included."""

    def __init__(self):
        self.optimizer, self.average, self.found = lambda: None, lambda: None, {}

    def tensors(self, pipe) -> list[torch.Tensor]:
        """What is there when a phase begins."""
        parts = networks(pipe).values()
        held = [x for m in parts for p in m.parameters() for x in (p, p.grad) if x is not None]
        held += [b for m in parts for b in m.buffers()]
        optimizer = self.optimizer()
        states = list(optimizer.state.values()) if optimizer else []
        states.append(getattr(self.average(), "learning", None) or {})
        return held + [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]

    def of(self, name: str, function, pipe_of):
        """The function, measured."""

        def run(*args, **kwargs):
            with Real() as live:
                for tensor in self.tensors(pipe_of(*args)):
                    live.add(tensor.untyped_storage())
                made = function(*args, **kwargs)
            self.found[name] = max(self.found.get(name, 0), live.peak)
            return made

        return run

    def trainer_pipe(self, trainer):
        self.optimizer = weakref.ref(trainer.updates.optimizer.optimizer)  # a run lets go of it, so must this
        if trainer.updates.average:
            self.average = weakref.ref(trainer.updates.average)
        return trainer.network.pipe


def measured(config, manifest) -> dict[str, int]:
    """The bytes that live in each phase of a run of two steps, at most."""
    peaks = Peaks()
    plans = [("encode", loop, "load_data", lambda pipe, *_: pipe)]
    methods = {"train": "step", "validate": "validate"}
    plans += [(name, loop.Trainer, method, peaks.trainer_pipe) for name, method in methods.items()]
    plans += [("sample", loop, "mark_pictures", lambda marks, *_: marks.network.pipe)]
    plans += [("certify", results, "certify", lambda pipe, *_: pipe)]
    plans += [("pipeline", results, "export_fused", lambda pipe, *_: pipe)]
    with ExitStack() as stack:
        for name, place, function, pipe_of in plans:
            watched = peaks.of(name, getattr(place, function), pipe_of)
            stack.enter_context(patch.object(place, function, watched))
        loop.train(config, manifest, progress=False)
    return peaks.found


ROWS = [("sdxl", 64, {"text_encoder_learning_rate": 1e-4, "lora_rank": 32, "gradient_checkpointing": True}, {})]
SLOW_ROWS = [
    ("sd1", 64, {"batch_size": 2, "lora_dropout": 0.1}, {}),
    ("sd1", 128, {"batch_size": 4, "masked_loss": 0.1}, QUARTER),
    ("sd1", 128, {"batch_size": 4, "gradient_checkpointing": True}, QUARTER),
    ("sd1", 64, {"batch_size": 2, "lora_variant": "dora", "lora_targets": "all"}, {}),
    ("sd2", 64, {"batch_size": 1, "lora_variant": "rslora", "lora_targets": "attention_ff"}, {}),
    ("sdxl", 64, {"batch_size": 3, "lora_rank": 64}, {}),
    ("sdxl", 64, {"text_encoder_learning_rate": 1e-4, "lora_targets": "all"}, {}),
    ("sd3", 128, {"batch_size": 2, "lora_rank": 16, "lora_targets": "all"}, {}),
    ("flux", 128, {"batch_size": 4, "gradient_checkpointing": True}, {"transformer": {"num_attention_heads": 8}}),
    ("flux", 128, {"lora_rank": 64, "optimizer": "prodigy", "learning_rate": 1.0}, {}),
    ("sdxl", 64, {"lora_rank": 64, "optimizer": "schedulefree", "lr_scheduler": "constant"}, {}),
    ("flux", 128, {"base_quant": "int8"}, {"transformer": {"num_attention_heads": 8}}),
]
ALL = [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_ROWS)]


@pytest.mark.parametrize("family, size, changes, parts", ALL)
def test_every_phase_holds_what_the_doctor_says(drawings, small_run, tmp_path, family, size, changes, parts):
    """Within a tenth, the weights of the base apart, which are known exactly."""
    options = {"resolution": size, "max_train_steps": 2, "sample_prompts": list("abcd"), "save_pipeline": True}
    options["lora_dropout"] = 0.0
    base = random_base(family, tmp_path / "base", **parts)
    settings = small_run(tmp_path / "run", pretrained_model=base, **options | changes)
    config = load_config(overrides=settings | {"training.gradient_accumulation": 2})
    data = shutil.copytree(drawings.parent, tmp_path / "data")  # where nothing has been encoded yet
    found, estimate = measured(config, data / drawings.name), MemoryEstimate(base, "cpu", variants=2)
    said = {phase.name: phase for phase in estimate.phases(config.training)}
    for one, other in (("sample", "decode"), ("encode", "captions")):  # a run knows them as one
        said[one] = max((said.pop(name) for name in (one, other) if name in said), key=lambda phase: phase.total)
    assert said.keys() == found.keys()
    rows = {name: (phase.adapter + phase.working, found[name] - phase.weights) for name, phase in said.items()}
    for name, (guess, here) in rows.items():
        print(
            f"{family} {size} {changes} {name}: {guess / 1e6:.2f} MB said, {here / 1e6:.2f} MB, {guess / here - 1:+.1%}"
        )
    assert {name: guess for name, (guess, _) in rows.items()} == pytest.approx(
        {name: here for name, (_, here) in rows.items()}, rel=0.1
    )


def flux(folder: Path, changes: dict) -> MemoryEstimate:
    """Of the published size, or with fewer layers."""
    real_configs("flux", folder)
    for part, change in changes.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return MemoryEstimate(folder, "cuda")


FEW = {"transformer": {"num_layers": 1, "num_single_layers": 2}, "text_encoder_2": {"num_layers": 1}}
CARDS = [(2.9e9, "int8", FEW), (2.4e9, "nf4", FEW)]
CARDS += [
    pytest.param(c, bits, {}, marks=pytest.mark.slow) for c, bits in ((24e9, "int8"), (16e9, "nf4"), (12e9, "nf4"))
]


@pytest.mark.parametrize("card, bits, changes", CARDS)
def test_a_card_that_is_too_small_for_flux_is_told_to_pack_it(tmp_path, card, bits, changes):
    """What is advised is enough, and nothing else is given up."""
    estimate = flux(tmp_path / "flux", changes)
    t = load_config(ROOT / "examples" / "flux.yaml", {"training.base_quant": "none"}).training
    t = t if not changes else t.model_copy(update={"sample_every": 0, "resolution": 256})
    lines, need = advice(estimate, t, card)
    assert need < card and set(re.findall(r"training\.\w+", " ".join(lines))) == {"training.base_quant"}
    assert f'training.base_quant: "{bits}"' in lines[-1]
    dora, most = t.model_copy(update={"lora_variant": "dora"}), largest(estimate.phases(t))
    assert not any("base_quant" in change for change in milder(dora, most, card, estimate, []))


def test_advice_is_followed_and_the_run_fits(tmp_path):
    """What the doctor says of a card that is too small, given back to it as settings."""
    base = random_base("sd1", tmp_path / "base")
    settings = {"pretrained_model": str(base), "resolution": 64, "batch_size": 64, "output_dir": str(tmp_path / "run")}
    estimate = MemoryEstimate(base, "cuda")

    def look(changes, memory):
        values = {f"training.{key}": value for key, value in (settings | changes).items()}
        found = memory_findings(estimate, load_config(overrides=values).training, memory)
        return [f.text for f in found if f.topic == "memory" and f.level == "error"]

    config = load_config(overrides={f"training.{key}": value for key, value in settings.items()})
    needs = sorted(phase.total for phase in estimate.phases(config.training))
    memory = needs[0] + 0.3 * (needs[-1] - needs[0])
    (text,) = look({}, memory)
    assert "Even that is not enough" not in text
    changes = {key: yaml.safe_load(value) for key, value in re.findall(r"training\.(\w+): (\S+)", text)}
    assert changes["batch_size"] * changes["gradient_accumulation"] == 64 * config.training.gradient_accumulation
    assert look(changes, memory) == []
