"""The promise of `train.checkpoints`: whatever stops a run, going on ends in the same bytes.

Runs are real processes that are really killed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainings import PROVED, Run, training_server, wait_for

STEPS = 12


@pytest.fixture(scope="module")
def server():
    return training_server()


@pytest.fixture(scope="module")
def left_alone(server, drawings, small_run, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("left_alone") / "run"
    run = Run(server, drawings, small_run(folder, max_train_steps=STEPS))
    assert run.finish() == 0, run.said()
    return run


@pytest.mark.parametrize("planned", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_the_bytes_are_the_same(server, drawings, small_run, left_alone, tmp_path, planned):
    rng, kills, in_a_write, in_a_row, whole = random.Random(5), 0, 0, 0, 0
    run = fresh = None
    while kills < planned or fresh is not None:
        if fresh is None:
            run = Run(server, drawings, small_run(tmp_path / f"run-{whole}", max_train_steps=STEPS))
        process = run.start(*(["--resume"] if fresh else []))
        fresh, before = True, kills
        if kills < planned:
            if rng.random() < 0.4:  # in the middle of a checkpoint
                if wait_for(lambda folder=run.folder: any(folder.glob(".checkpoint-*")), process, 60):
                    time.sleep(rng.random() * 0.01 if in_a_write else 0)  # at once until one is hit
                    in_a_write += any(run.folder.glob(".checkpoint-*"))
            else:
                process.join(rng.random() * 2.5)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.join(120)
        if process.exitcode == 0:
            assert run.bytes() == left_alone.bytes()
            assert not list(run.folder.glob(".checkpoint-*"))
            shutil.rmtree(run.folder)
            whole, fresh = whole + 1, None
        else:
            assert process.exitcode == -signal.SIGKILL, run.said()
            in_a_row += kills > before
    print(f"{kills} kills, {in_a_write} inside a checkpoint, over {whole} runs")
    assert in_a_write >= planned // 6 and in_a_row >= 2 and whole >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_asked_to_stop_it_saves_within_a_step(server, drawings, small_run, left_alone, tmp_path, number):
    run = Run(server, drawings, small_run(tmp_path / "run", max_train_steps=STEPS))
    process = run.start()
    history = run.folder / "loss_history.csv"
    assert wait_for(lambda: history.is_file() and history.read_text().count("\n") >= 4, process, 60), run.said()
    steps = history.read_text().count("\n") - 1
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 130 and "--resume" in run.said()
    newest = max(int(p.name.split("-")[1]) for p in run.folder.glob("checkpoint-*"))
    assert steps <= newest <= steps + 2  # the step that was going on, and one that ended while the signal travelled
    assert run.finish("--resume") == 0, run.said()
    assert run.bytes() == left_alone.bytes()


def test_asked_to_stop_while_it_draws_it_draws_later(server, drawings, small_run, left_alone, tmp_path):
    """A picture can take longer than a service or a machine waits; the step before it is saved at once."""
    folder = tmp_path / "run"
    shutil.copytree(left_alone.folder, folder)
    (folder / "run.json").unlink()
    for step in (10, 12):
        shutil.rmtree(folder / f"checkpoint-{step}")
        for picture in folder.glob(f"samples/step-{step:06d}-*"):
            picture.unlink()
    history = folder / "loss_history.csv"
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:9]))  # as it was after step 8
    run = Run(server, drawings, small_run(folder, max_train_steps=STEPS))
    few, run.settings["evaluation.num_inference_steps"] = run.settings["evaluation.num_inference_steps"], 1000
    process = run.start("--resume")
    assert wait_for(lambda: history.read_text().count("\n") == 11, process, 100), run.said()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 130 and f"stopped after step 10 of {STEPS}" in run.said(), run.said()
    assert (folder / "checkpoint-10").is_dir() and not list(folder.glob("samples/step-000010-*"))
    run.settings["evaluation.num_inference_steps"] = few
    assert run.finish("--resume") == 0, run.said()
    assert list(folder.glob("samples/step-000010-0.png")) and run.bytes() == left_alone.bytes()


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(server, drawings, small_run, left_alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(left_alone.folder, folder)
    (folder / "run.json").unlink()
    weights = folder / f"checkpoint-{STEPS}" / "optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    run = Run(server, drawings, small_run(folder, max_train_steps=STEPS))
    assert run.finish("--resume") == 0, run.said()
    assert f"checkpoint-{STEPS} is damaged (optimizer.safetensors has changed" in run.said()
    assert run.bytes() == left_alone.bytes()


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"training.lora_rank": 8}, "lora_rank was 4, is now 8"),
        ({"training.seed": 1}, "seed was 42, is now 1"),
        ({"training.snr_gamma": 5.0}, "snr_gamma was null, is now 5.0"),
        ({"training.max_train_steps": STEPS + 2}, "To train longer, use --extend"),
    ],
)
def test_another_run_is_refused_with_what_differs(server, drawings, left_alone, changed, said):
    run = Run(server, drawings, left_alone.settings | changed)
    assert run.finish("--resume") == 2
    assert said in run.said()


def test_other_data_is_refused(server, drawings, left_alone, tmp_path):
    shutil.copytree(drawings.parent, tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("disc, number 3", "a round thing"))
    run = Run(server, manifest, left_alone.settings)
    assert run.finish("--resume") == 2
    assert "dataset was" in run.said()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_intact(server, drawings, small_run, tmp_path, small_disk):
    settings = small_run(small_disk / "run", max_train_steps=STEPS, lora_rank=32)
    settings["training.cache_dir"] = tmp_path / "cache"
    run = Run(server, drawings, settings)
    run.log = tmp_path / "run.log"
    process = run.start()
    assert wait_for(lambda: (run.folder / "checkpoint-2").exists(), process, 60), run.said()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    process.join(60)
    assert process.exitcode == 2, run.said()
    assert "No space left on device" in run.said() and "is intact" in run.said() and "Traceback" not in run.said()
    filler.unlink()
    assert run.finish("--resume") == 0, run.said()
    undisturbed = Run(server, drawings, settings | {"training.output_dir": tmp_path / "undisturbed"})
    assert undisturbed.finish() == 0
    assert run.bytes() == undisturbed.bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs signals on a parent's death, which only Linux has")
def test_the_service_ends_in_the_same_bytes_as_the_command_line(left_alone, tmp_path):
    """Server, trainer and runner are killed in turn and a checkpoint is damaged, and it does not show."""
    from lora_mvp.api.folders import JobFolder
    from lora_mvp.api.jobs import JobSpec
    from lora_mvp.api.processes import end_all, marked
    from lora_mvp.config import config_yaml, load_config

    api = {"db_path": tmp_path / "jobs.json", "jobs_dir": tmp_path / "jobs", "data_dir": left_alone.manifest.parent}
    api |= {"models_dir": tmp_path, "poll_interval": 0.1, "min_free_gb": 0.0}
    config = load_config(overrides={f"api.{key}": value for key, value in api.items()})
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    settings = {key: value for key, value in left_alone.settings.items() if key != "training.output_dir"}
    (tmp_path / "spec.json").write_text(JobSpec(manifest=left_alone.manifest.name, config=settings).model_dump_json())
    program = Path(__file__).with_name("real_server.py")
    log = open(tmp_path / "server.log", "w")

    def serve():
        return subprocess.Popen([sys.executable, program, tmp_path], stdout=log, stderr=log)

    def until(condition):
        end = time.monotonic() + 180
        while not (found := condition()):
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
            time.sleep(0.01)
        return found

    def made(step, attempt):
        until(lambda: (folder.progress(attempt) or {"step": 0})["step"] >= step)

    def of(kind):
        return next(p for p in marked(f"{folder.root.name}:") if f"lora_mvp.api.{kind}" in p.cmdline())

    server, folder = serve(), None
    try:
        folder = JobFolder(until(lambda: list(tmp_path.glob("jobs/*/attempt")))[0].parent)
        made(3, 1)
        server.kill()
        server.wait()
        server = serve()
        made(7, 1)
        of("work").kill()
        damaged = max(folder.run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        weights = (damaged / "adapter.safetensors").read_bytes()
        (damaged / "adapter.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        made(9, 2)
        of("runner").kill()
        until(lambda: (folder.last_state() or {}).get("status") == "succeeded")
    finally:
        server.kill()
        server.wait()
        end_all(f"{folder.root.name}:" if folder else "none")
    assert folder.last_state()["attempt"] == 3
    assert {name: (folder.run / name).read_bytes() for name in PROVED} == left_alone.bytes()
    said = folder.log().decode()
    assert f"{damaged.name} is damaged" in said
    firsts = [event["step"] for _, event in folder.events() if event["type"] == "progress"]
    assert firsts[0] == 1 and firsts[-1] == STEPS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs signals on a parent's death, which only Linux has")
def test_two_processes_under_the_service(drawings, small_run, tmp_path):
    """A real torchrun: two processes train, save themselves on a cancel, and a retry goes on from there."""
    from lora_mvp.api.engines import Gpu, LocalEngine
    from lora_mvp.api.jobs import TERMINAL, JobSpec
    from lora_mvp.api.processes import end_all, marked
    from lora_mvp.api.service import Service
    from lora_mvp.api.stores import open_store
    from lora_mvp.config import load_config

    api = {"db_path": tmp_path / "jobs.json", "jobs_dir": tmp_path / "jobs", "data_dir": drawings.parent}
    api |= {"models_dir": tmp_path, "poll_interval": 0.1, "min_free_gb": 0.0}
    config = load_config(overrides={f"api.{key}": value for key, value in api.items()})
    cards = [Gpu("GPU-none-1", "no card"), Gpu("GPU-none-2", "no card")]  # the processes find none and use the CPU
    service = Service(config, open_store(config.api), LocalEngine(config.api, gpus=cards))

    def until(condition):
        end = time.monotonic() + 300
        while not (found := condition()):
            service.tick()
            assert time.monotonic() < end, service.folder(job).log().decode()
            time.sleep(0.01)
        return found

    settings = small_run("none", max_train_steps=2000, checkpointing_steps=1000)
    del settings["training.output_dir"]
    job, _ = service.submit("train", JobSpec(manifest=drawings.name, config=settings, gpus=2))
    try:
        until(lambda: (service.folder(job).progress() or {"step": 0})["step"] >= 3)
        service.cancel(job.id)
        assert until(lambda: (ended := service.get(job.id)).status in TERMINAL and ended).status == "cancelled"
        saved = service.folder(job).progress()["step"]
        assert (service.folder(job).run / f"checkpoint-{saved}").is_dir()
        job, _ = service.retry(job.id)
        until(lambda: (service.folder(job).progress() or {"step": 0})["step"] > saved)
        assert service.folder(job).events()[-1][1]["step"] >= saved
        first = [event for _, event in service.folder(job).events() if event["type"] == "progress"][0]
        assert first["step"] == saved + 1
        service.cancel(job.id)
        assert until(lambda: (ended := service.get(job.id)).status in TERMINAL and ended).status == "cancelled"
        until(lambda: not marked(f"{job.id}:"))
    finally:
        end_all(f"{job.id}:")
        service.store.close()
