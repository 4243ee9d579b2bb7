"""What a chapter cannot show of training: other bases, several processes, a curve that must not move."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_mvp.config import LoraMvpError, load_config

HERE = Path(__file__).parent


def losses(folder: Path) -> list[float]:
    with (folder / "loss_history.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


EIGHT_BIT = "adamw8bit" if find_spec("bitsandbytes") else "adafactor"  # an extra that slows every import of peft
HALF = {"mixed_precision": "bf16"}
PACKED = {"base_quant": "nf4" if find_spec("bitsandbytes") else "int8"} | HALF
EVERYTHING = {"text_encoder_learning_rate": 1e-4, "snr_gamma": 5.0, "caption_dropout": 0.3, "shuffle_tags": True}


def the_average_is_the_result(run: Path) -> None:
    """What is exported is the average of the checkpoint, which holds what learned beside it."""
    from safetensors.numpy import load_file

    from lora_mvp.models.keys import public_name

    result = load_file(run / "lora_adapter" / "pytorch_lora_weights.safetensors")
    average, learned = (load_file(run / "checkpoint-4" / f"{name}.safetensors") for name in ("adapter", "learning"))
    assert {public_name(name) for name in average} == set(result)
    assert all((result[public_name(name)] == value).all() for name, value in average.items())
    assert any((learned[name] != value).any() for name, value in average.items())


@pytest.mark.parametrize(
    "family, changes",
    [
        pytest.param(
            "sd1",
            {"noise_offset": 0.1, "gradient_checkpointing": True, "lora_variant": "rslora"} | EVERYTHING,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sd2",
            {"zero_terminal_snr": True, "lora_variant": "dora", "lora_targets": "all", "optimizer": "adafactor"}
            | EVERYTHING,
            marks=pytest.mark.slow,
        ),
        ("sdxl", {"aspect_buckets": True, "lora_alpha": 2, "ema": 0.9} | EVERYTHING),
        pytest.param(
            "sdxl",
            {"caption_dropout": 0.3, "shuffle_tags": True, "mixed_precision": "bf16"},
            marks=pytest.mark.slow,
        ),
        ("sd3", {"lora_targets": "all", "gradient_checkpointing": True, "optimizer": "prodigy", "learning_rate": 1.0}),
        ("flux", {"lora_targets": "attention_ff", "optimizer": EIGHT_BIT, "loss": "huber"} | PACKED),
        ("zimage", {"lora_targets": "all", "batch_size": 2, "caption_dropout": 0.3, "base_quant": "int8"} | HALF),
        ("tiny", {"optimizer": "schedulefree", "lr_scheduler": "constant_with_warmup", "validate_every": 3}),
        pytest.param("sdxl", PACKED | {"gradient_checkpointing": True} | EVERYTHING, marks=pytest.mark.slow),
    ],
    ids=["sd1", "sd2", "sdxl", "sdxl-bf16", "sd3", "flux", "zimage", "schedulefree", "sdxl-packed"],
)
def test_every_family_trains_resumes_and_exports(drawings, small_run, tmp_path, family, changes):
    from lora_mvp.models.miniatures import random_base
    from lora_mvp.train.loop import train

    base = random_base(family, tmp_path / "base")
    options = {"pretrained_model": base, "max_train_steps": 4, **changes}

    def config(name):
        return load_config(overrides=small_run(tmp_path / name, **options))

    whole = train(config("whole"), drawings, progress=False)
    assert (tmp_path / "whole" / "lora_adapter" / "certificate.json").is_file()
    assert (tmp_path / "whole" / "whole.safetensors").is_file()
    if "ema" in changes or changes.get("optimizer") == "schedulefree":
        the_average_is_the_result(tmp_path / "whole")

    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config("stopped"), drawings, on_step=stop, progress=False)
    resumed = train(config("stopped"), drawings, resume=True, progress=False)
    assert (resumed.adapter_sha256, resumed.history_sha256) == (whole.adapter_sha256, whole.history_sha256)


def test_the_prior_counts_with_its_weight_and_nothing_else_changes(drawings, small_run, tmp_path):
    """Before the adapter has moved, the loss is that of the pictures plus the weight times that of the class."""
    from lora_mvp.train.loop import train

    folder = drawings.parent.parent / "raw" / "square"
    prior = {"regularization_dir": folder, "regularization_prompt": "square"}
    first = {}
    for weight in (0, 1, 2):
        options = {
            "max_train_steps": 1,
            "sample_every": 0,
            **(prior | {"prior_weight": float(weight)} if weight else {}),
        }
        train(load_config(overrides=small_run(tmp_path / str(weight), **options)), drawings, progress=False)
        first[weight] = losses(tmp_path / str(weight))[0]
    assert first[1] > first[0]
    assert first[2] - first[0] == pytest.approx(2 * (first[1] - first[0]), rel=1e-4)


@pytest.mark.slow  # the sdxl row of test_memory.py trains with it
def test_gradient_checkpointing_computes_the_same(drawings, small_run, tmp_path):
    from lora_mvp.train.loop import train

    for name, on in (("off", False), ("on", True)):
        options = {"gradient_checkpointing": on, "lora_dropout": 0.0, "max_train_steps": 3}
        train(load_config(overrides=small_run(tmp_path / name, **options)), drawings, progress=False)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)


IMPATIENT = """
import sys, time
from datetime import timedelta
from torch.distributed import init_process_group

init_process_group("gloo", timeout=timedelta(seconds=15))
from lora_mvp.cli import main
from lora_mvp.train import results

pictures = results.FORMS["pictures"]
results.FORMS["pictures"] = lambda ending: (time.sleep(20), pictures(ending))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(drawings, small_run, tmp_path):
    """Two processes with one micro-batch each are one with two; each draws and validates its share, and none waits for a slow end."""
    from lora_mvp.config import config_yaml
    from lora_mvp.train.loop import train

    options = {"max_train_steps": 3, "lora_dropout": 0.0, "batch_size": 3, "sample_prompts": ["a", "b", "c"]}
    one = load_config(overrides=small_run(tmp_path / "one", gradient_accumulation=2, **options))
    train(one, drawings, progress=False)
    two = load_config(overrides=small_run(tmp_path / "two", gradient_accumulation=1, **options))
    (tmp_path / "two.yaml").write_text(config_yaml(two))
    (tmp_path / "train.py").write_text(IMPATIENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [tmp_path / "train.py", "train", "--manifest", drawings, "--config", tmp_path / "two.yaml"]
    done = subprocess.run([str(part) for part in launch], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "run.json").is_file()
    one, two = ((tmp_path / name / "validation.csv").read_text().splitlines() for name in ("one", "two"))
    assert one[0] == two[0] and len(one) == len(two)
    for ours, theirs in zip(one[1:], two[1:], strict=True):
        numbers = [
            [float(cell) for cell in row.split(",") if cell not in ("train", "val", "")] for row in (ours, theirs)
        ]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-5)
    names = [sorted(f.name for f in (tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]


def test_the_golden_curve(tmp_path):
    """Twenty steps on the demo's pictures give the committed losses; rounding differs between machines, a bug more."""
    from lora_mvp.data.prepare import prepare_data
    from lora_mvp.demo import demo_folder
    from lora_mvp.train.loop import train

    demo_folder(tmp_path / "demo")
    config = load_config(tmp_path / "demo" / "config.yaml", overrides={"training.max_train_steps": 20})
    config.training.sample_every, config.training.save_pipeline = 0, False
    config.evaluation.num_inference_steps = 2
    prepare_data(config)
    train(config, tmp_path / "demo" / "processed" / "manifest.json", progress=False)
    golden = [float(line) for line in (HERE / "golden_losses.txt").read_text().split()]
    assert losses(tmp_path / "demo" / "lora") == pytest.approx(golden, rel=2e-3)


def test_a_setting_that_trains_nothing_is_refused(drawings, small_run, tmp_path):
    from lora_mvp.train.loop import train

    with pytest.raises(LoraMvpError, match="batch_size is 50"):
        train(load_config(overrides=small_run(tmp_path / "run", batch_size=50)), drawings, progress=False)


def test_trackers_are_told_of_steps_and_validations(drawings, small_run, tmp_path):
    """By Accelerate's interface, to a small tracker of our own; a real one is asked below, where it is installed."""
    from accelerate.tracking import GeneralTracker

    from lora_mvp.data.manifest import read_manifest
    from lora_mvp.train.curves import ValidationRow, read_table
    from lora_mvp.train.loop import Trainer

    class Table(GeneralTracker):
        name, requires_logging_directory, ended = "table", False, 0

        @property
        def tracker(self):
            return self

        def log(self, values, step, **_):
            rows.extend((step, name, value) for name, value in values.items())

        def finish(self):
            self.ended += 1

    rows, table, folder = [], Table(), tmp_path / "run"
    options = {"max_train_steps": 2, "sample_every": 0, "validate_every": 2}
    trainer = Trainer(load_config(overrides=small_run(folder, **options)), read_manifest(drawings))
    folder.mkdir(exist_ok=True)
    (folder / "loss_history.csv").write_text("step,epoch,loss,learning_rate,grad_norm\n")
    trainer.accelerator.trackers.append(table)
    trainer.catch_up()
    trainer.run(progress=False)
    assert [value for _, name, value in rows if name == "train/loss"] == losses(folder)
    validated = {
        (row.step, f"validation/{row.split}"): row.loss for row in read_table(ValidationRow, folder / "validation.csv")
    }
    told = {(step, name): value for step, name, value in rows if name.startswith("validation/")}
    assert told.keys() == validated.keys() and told == pytest.approx(validated)
    assert table.ended == 1 and not trainer.accelerator.trackers


@pytest.mark.skipif(not find_spec("tensorboard"), reason="an extra, and 50 MB")
def test_tensorboard_has_the_curve(drawings, small_run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lora_mvp.train.loop import train

    options = {"max_train_steps": 2, "sample_every": 0, "trackers": ["tensorboard"]}
    train(load_config(overrides=small_run(tmp_path / "run", **options)), drawings, progress=False)
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "lora-mvp")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert told == [(step + 1, pytest.approx(loss)) for step, loss in enumerate(losses(tmp_path / "run"))]
    assert {"train/learning_rate", "train/grad_norm", "validation/val"} <= set(events.Tags()["scalars"])
