"""What a card would notice of training, proved without one: where the host waits, what is ordered, in which types, and where it lies."""

import csv
import json
import os
import shutil

import pytest
import torch
from counting import HostReads, Operators, unseen
from forks import ROOT, fork

from lora_mvp.config import LoraMvpError, load_config


@pytest.fixture
def trainer(drawings, small_run, tmp_path):
    """A trainer after its first two steps, by default without dropout."""
    from lora_mvp.train.loop import Trainer

    def make(**training):
        settings = small_run(tmp_path / "run", **{"lora_dropout": 0.0} | training)
        made = Trainer(load_config(overrides=settings), drawings_manifest(drawings))
        for _ in range(2):  # the first ones look at more: whether the adapter moves at all
            made.step()
        return made

    return make


def drawings_manifest(path):
    from lora_mvp.data.manifest import read_manifest

    return read_manifest(path)


def counted_step(trainer):
    """One step: what the host read, and the operators; drawing the next batch on the CPU is left out."""
    trainer.learner.question = unseen(trainer.learner.question)
    with HostReads() as reads, Operators() as operators:
        trainer.step()
    return reads.found, operators


@pytest.mark.parametrize(
    "most, training",
    [
        (1340, {"lora_alpha": 4}),  # 1,292 when this was written, with 56 adapted layers at strength 1
        (5350, {"gradient_accumulation": 3, "snr_gamma": 5.0, "lora_dropout": 0.1}),  # 5,205
        (2480, {"text_encoder_learning_rate": 1e-4, "gradient_checkpointing": True}),  # 2,412
    ],
    ids=["plain", "accumulated", "text-encoder"],
)
def test_the_host_waits_once_in_a_step_and_orders_no_more_than_it_did(trainer, most, training):
    """Below batch 4 or so a card waits for Python: what a read or an operator more costs shows there, and nowhere on a CPU."""
    reads, operators = counted_step(trainer(**training))
    assert sum(operators.calls.values()) <= most
    assert reads == ["tolist"]
    assert not operators.waits
    assert torch.float64 not in operators.types  # Apple's GPUs have none


def test_every_product_of_a_bf16_step_is_taken_in_bf16(trainer):
    """So TF32, which makes float32 products faster, has nothing to act on, and there is no setting for it."""
    _, operators = counted_step(trainer(mixed_precision="bf16"))
    assert set(operators.products) == {torch.bfloat16}


def test_no_part_of_a_step_reads_what_is_on_the_device(trainer):
    """On the meta device nothing can be read or brought back, so what asks for a number there ends in an error."""
    trainer = trainer(snr_gamma=5.0, gradient_accumulation=2)
    network, trainer.learner.ahead = trainer.network, {}
    network.device = torch.device("meta")
    network.pipe.unet.to("meta")
    total, answered = trainer.learner.learn(0)
    assert {total.device.type, *(losses.device.type for _, losses in answered)} == {"meta"}
    learning = [p for p in network.pipe.unet.parameters() if p.requires_grad]
    assert learning and all(p.grad.device.type == "meta" for p in learning)
    (ahead,) = trainer.learner.ahead.values()
    sent = [ahead.times, ahead.noisy, ahead.target, ahead.weights, *ahead.embeds.values()]
    assert {value.device.type for value in sent} == {"meta"} and ahead.timesteps.device.type == "cpu"
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        total.to("cpu")


@pytest.mark.parametrize("kinds", ["", pytest.param("sd15 sdxl", marks=pytest.mark.slow)], ids=["machine", "all"])
def test_the_benchmark_for_a_card_runs_without_one(tmp_path, kinds):
    """Every row of `scripts/bench_gpu.py` gives numbers; those of compiled steps need a card or minutes, and are left out of the small form."""
    command = f"scripts/bench_gpu.py --device cpu --tiny --out rows.json --kinds {kinds}"
    done = fork(command, tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert not [name for name, facts in rows.items() if "error" in facts], done.stderr
    assert rows["machine"]["copy_GB_s"] > 0
    if kinds:
        assert rows["sdxl batch 1"]["images_s"] > 0 and rows["sd15 batch 4"]["peak_GB"] is None
        assert len(rows["sdxl whole run"]["certificate"]) == 2 and "end: pipeline" in rows["sdxl whole run"]["phases"]
        assert rows["sdxl decode float16"]["vae"] == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize("precision, dropout", [("no", 0.1), ("bf16", 0.0)])
def test_compiled_blocks_learn_the_same_and_resume_to_the_byte(drawings, small_run, tmp_path, precision, dropout):
    """In earnest, with a C++ compiler: the curve is that of plain blocks to rounding, and a stop does not show."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    from lora_mvp.train.loop import train

    def run(name, resume=False, on_step=None, **changes):
        settings = small_run(
            tmp_path / name, mixed_precision=precision, lora_dropout=dropout, sample_every=0, **changes
        )
        return train(load_config(overrides=settings), drawings, resume=resume, on_step=on_step, progress=False)

    def losses(name):
        with (tmp_path / name / "loss_history.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    run("plain")
    whole = run("whole", compile=True)
    assert losses("whole") != losses("plain")  # it was compiled
    assert losses("whole") == pytest.approx(losses("plain"), rel=1e-4 if precision == "no" else 2e-2)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", compile=True, on_step=stop)
    resumed = run("stopped", resume=True, compile=True)
    assert (resumed.adapter_sha256, resumed.history_sha256) == (whole.adapter_sha256, whole.history_sha256)
    with pytest.raises(LoraMvpError, match="compile was true, is now false"):
        run("stopped", resume=True, max_train_steps=8)


def test_apples_gpus_are_a_device_like_others(monkeypatch):
    """All that a run decides from the device alone, on a machine that has such a GPU."""
    from lora_mvp.models.base import usual_device, with_precision
    from lora_mvp.train.diagnosis import doctor, doctor_text
    from lora_mvp.train.loop import on_device
    from lora_mvp.train.network import channels_last

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(overrides={"training.pretrained_model": "tiny", "training.resolution": 64})
    assert usual_device() == "mps"
    assert on_device(config).training.mixed_precision == with_precision(config.training, "mps").mixed_precision == "no"
    assert not channels_last(config.training, "mps")
    assert "Apple's GPU" in doctor_text(doctor(config))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_drawing_makes_no_float64_on_the_device(tmp_path, family):
    """Apple's GPUs have none; each family's own scheduler, from text to pixels."""
    from lora_mvp.models.base import load_base
    from lora_mvp.models.drawing import sample
    from lora_mvp.models.miniatures import random_base

    pipe = load_base(str(random_base(family, tmp_path)))
    with Operators() as operators:
        sample(pipe, ["a"], [0], num_inference_steps=2)
    assert torch.float64 not in operators.types


@pytest.mark.parametrize("family, variant", [("tiny", "lora"), ("sdxl", "dora")])
def test_the_certificate_makes_no_float64_on_the_device(tmp_path, family, variant):
    """From the saved files to the last comparison, with text encoders; of a base in half precision, which is widened."""
    from lora_mvp.models.adapters import save_adapter
    from lora_mvp.models.base import load_base
    from lora_mvp.models.kohya import write_kohya
    from lora_mvp.models.miniatures import random_base, random_lora
    from lora_mvp.models.proof import certify

    pipe = load_base(str(random_base(family, tmp_path / "base")), dtype=torch.bfloat16)
    random_lora(pipe, lora_targets="attention", lora_variant=variant)
    with Operators() as operators:
        save_adapter(pipe, tmp_path / "run", "a base")
        certificate = certify(pipe, tmp_path / "run", write_kohya(pipe, tmp_path / "kohya.safetensors"))
    assert torch.float64 not in operators.types and torch.float32 in operators.types
    assert {"unet", "prompt_embeds"} <= certificate.adapter_effect.keys()
