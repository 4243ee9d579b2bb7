"""The accidents of a long run, made to happen: two trainings at once, a kill at the end, a full disk, a last step that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import PROVED, Run, training_server, wait_for

from lora_mvp.config import LoraMvpError, load_config

STEPS = 4
HEAVY = ["n.safetensors", "lora_adapter/certificate.json", "model_index.json", "samples.png", "loss_curve.png"]
# A schedule with nothing but a warm-up, whose end diffusers cannot compute, and all forms of the result.
ALL = {"max_train_steps": STEPS, "lr_warmup_steps": STEPS, "lr_scheduler": "polynomial", "save_pipeline": True}


@pytest.fixture(scope="module")
def server():
    return training_server()


@pytest.fixture(scope="module")
def whole(server, drawings, small_run, tmp_path_factory):
    """A run that nothing disturbed, in a folder whose name leaves no room for a temporary file's ending."""
    run = Run(server, drawings, small_run(tmp_path_factory.mktemp("whole") / ("n" * 231), **ALL))
    assert run.finish() == 0, run.said()
    return run


def files(run: Run) -> dict[str, bytes]:
    """All that a finished run leaves and that does not tell the time; its adapter's file under one name."""
    found = {str(file.relative_to(run.folder)): file for file in run.folder.rglob("*") if file.is_file()}
    return {
        name.replace(f"{run.folder.name}.", "n."): file.read_bytes()
        for name, file in found.items()
        if not name.startswith("checkpoint-") and name not in ("run.json", "lora_adapter/certificate.json")
    }


# -- one run, one folder, one owner -----------------------------------------------------------------------------------


def test_of_two_trainings_at_once_one_has_the_folder(server, drawings, small_run, tmp_path):
    settings = small_run(tmp_path / "run", max_train_steps=STEPS)
    runs = [Run(server, drawings, settings | {"training.seed": seed}) for seed in (1, 2)]
    for run in runs:
        run.log = tmp_path / f"{run.settings['training.seed']}.log"
    processes = [run.start("--overwrite") for run in runs]
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode for process in processes) == [0, 2], [run.said() for run in runs]
    winner, loser = sorted(zip(processes, runs, strict=True), key=lambda pair: pair[0].exitcode)
    assert f"is in use by process {winner[0].pid} on " in loser[1].said()
    seed = winner[1].settings["training.seed"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["training"]["seed"] == seed
    owners = [json.loads(file.read_text())["identity"]["seed"] for file in tmp_path.glob("run/*/checkpoint.json")]
    assert len(owners) == 2 and set(owners) == {str(seed)}
    said = winner[1].said()
    assert f"step {STEPS} of {STEPS}, loss" in said and "\r" not in said and "it/s" not in said  # a log, not a terminal
    assert not (tmp_path / "run" / "owner.json").exists()


def test_nothing_of_another_run_is_removed_or_reported(server, drawings, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    record = json.loads((folder / "run.json").read_text())
    record["config"]["training"]["seed"] = 1
    (folder / "run.json").write_text(json.dumps(record))
    run = Run(server, drawings, whole.settings | {"training.output_dir": folder})
    before = files(run)
    assert run.finish("--resume") == 2
    assert "run.json belongs to another run: seed was 1, is now 42." in run.said()
    shutil.rmtree(folder / "lora_adapter")
    (folder / "run.json").unlink()
    strange = json.loads((folder / "checkpoint-2" / "checkpoint.json").read_text())
    strange["identity"]["seed"] = "1"
    (folder / "checkpoint-2" / "checkpoint.json").write_text(json.dumps(strange))
    assert run.finish("--resume") == 2
    assert "checkpoint-2 belongs to another run: seed was 1" in run.said()
    assert {name: data for name, data in before.items() if not name.startswith("lora_adapter")} == files(run)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_an_end_that_is_killed_leaves_the_adapter_and_can_be_finished(server, drawings, whole, tmp_path):
    from lora_mvp.infer import load_run
    from lora_mvp.models.adapters import adapter_layers

    run = Run(server, drawings, whole.settings | {"training.output_dir": tmp_path / "run"})
    process = run.start()
    assert wait_for((run.folder / "run.json").exists, process, 120), run.said()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run.bytes() == whole.bytes() and not (run.folder / "model_index.json").exists()
    assert adapter_layers(load_run(run.folder).pipe)  # and any command that takes a run can use it
    assert run.finish("--resume") == 0, run.said()
    assert "is already finished (4 steps): nothing to train." in run.said()
    assert f"taken over from process {process.pid} on " in run.said()
    assert [name for name in HEAVY if name not in files(run) and "certificate" not in name] == []
    same = [name for name in files(whole) if name not in ("n.safetensors", "start.json")]  # these name the folder
    assert {name: files(run)[name] for name in same} == {name: files(whole)[name] for name in same}


@pytest.mark.slow
def test_an_end_that_cannot_be_written_says_how_to_go_on(server, drawings, whole, tmp_path):
    run = Run(server, drawings, whole.settings | {"training.output_dir": tmp_path / "run"})
    process = run.start(largest=10_000_000)  # more than the adapter takes, less than the pipeline's UNet
    process.join(120)
    said = run.said()
    assert process.exitcode == 2 and "Traceback" not in said, said
    assert "File too large" in said and f"`lora-mvp finish {run.folder}` writes what is still missing" in said
    assert run.bytes() == whole.bytes() and not list(run.folder.glob(".*"))
    finish = run.call("finish", str(run.folder))
    finish.join(120)
    assert finish.exitcode == 0 and f"wrote pipeline in {run.folder}" in run.said(), run.said()
    assert (run.folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 10_000_000


@pytest.mark.parametrize("step", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3)), STEPS])
def test_a_step_that_fails_leaves_the_last_whole_one(drawings, small_run, whole, tmp_path, step):
    from lora_mvp.train.loop import train

    settings = small_run(tmp_path / "run", **(ALL | {"save_pipeline": False}))
    config = load_config(overrides=settings)

    def fails(report):
        if report.step == step:
            raise RuntimeError("the GPU has fallen off the bus")

    with pytest.raises(RuntimeError, match="fallen off the bus"):
        train(config, drawings, on_step=fails, progress=False)
    assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    train(config, drawings, resume=True, progress=False)
    assert {name: (tmp_path / "run" / name).read_bytes() for name in PROVED} == whole.bytes()


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_foreseen(drawings, small_run, tmp_path):
    from lora_mvp.train.loop import train

    much = {"max_train_steps": 10**7, "checkpointing_steps": 1, "max_checkpoints": 10**8}
    config = load_config(overrides=small_run(tmp_path / "run", **much))
    with pytest.raises(LoraMvpError, match="the run will take about .* GB .*, and .* are free; free some") as caught:
        train(config, drawings, progress=False)
    assert caught.value.code == "disk_too_small" and not (tmp_path / "run").exists()


SMALL_DISK = """
set -e
mkdir -p {disk}; mount -t tmpfs -o size=$1 tmpfs {disk}; cd {disk}
shift
exec "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="a small disk is mounted in a name space of its own")
@pytest.mark.parametrize("size, said", [("8m", "the run will take about"), ("64m", None)])
def test_a_really_small_disk(drawings, small_run, tmp_path, size, said):
    settings = small_run(tmp_path / "disk" / "run", save_pipeline=True) | {"training.cache_dir": tmp_path / "cache"}
    sets = [f"--set={key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    script = SMALL_DISK.format(disk=tmp_path / "disk")
    train = [sys.executable, "-m", "lora_mvp.cli", "train", "--manifest", drawings, *sets]
    command = ["unshare", "-rm", "bash", "-c", script, "bash", size, *map(str, train)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    )
    if "mount" in done.stderr:
        pytest.skip("a small file system cannot be mounted here")
    assert done.returncode == (2 if said else 0), done.stderr
    assert (said or "step 6 of 6") in done.stderr and ("step 1 of" in done.stderr) == (said is None)
