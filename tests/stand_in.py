"""A trainer of milliseconds for tests/test_faults.py, and a server without HTTP.

The runner, the job's folder, fencing and how an end is told are the real ones; only the training is a stand-in. It
loads no torch. What it should do is in its sample prompts, which go the way of all settings of a job:
`pause=0.01` seconds a step, `deaf` to SIGTERM, `grandchild`, or one of `orders_at` such as `hang@5`;
`hold@5` waits there for a file `go` in the job's folder, `load` before it hears a signal; `busy@5` is at work for
twelve seconds beside the steps, and says so; `hang@end` hangs when the steps are done.

    python stand_in.py runner FOLDER --attempt N     what an engine starts
    python stand_in.py work FOLDER --attempt N ...   what the runner starts
    python stand_in.py serve CONFIG                  a server; takes "submit STEPS ORDER..." and "cancel ID" lines
    python stand_in.py http                          the real server, as LORA_MVP_CONFIG says
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lora_mvp.api.folders import JobFolder
from lora_mvp.api.job_settings import read_settings
from lora_mvp.api.jobs import Job, JobSpec
from lora_mvp.api.reporter import Reporter
from lora_mvp.config import AppConfig, LoraMvpError, load_config
from lora_mvp.screen import sign_of_life

HERE = [sys.executable, os.path.abspath(__file__)]
GRANDCHILD = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Step:
    """What training reports of a step."""

    def __init__(self, step: int):
        self.step, self.epoch, self.loss, self.learning_rate = step, step / 10, 1 / step, 1e-4


def link(chain: str, step: int) -> str:
    """The state after a step: it depends on every step before."""
    return hashlib.sha256(f"{chain} {step}".encode()).hexdigest()


def final(steps: int) -> str:
    """The state after all steps, done once each and in order."""
    chain = ""
    for step in range(1, steps + 1):
        chain = link(chain, step)
    return chain


def save(run: Path, step: int, chain: str) -> None:
    staging, published = run / f".checkpoint-{step}", run / f"checkpoint-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / "state.json").write_text(json.dumps([step, chain]))
    shutil.rmtree(published, ignore_errors=True)
    staging.rename(published)


def restore(run: Path) -> tuple[int, str]:
    found = sorted(run.glob("checkpoint-*/state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    step, chain = json.loads(found[-1].read_text()) if found else (0, "")
    return step, chain


def fill_disk(run: Path) -> None:
    with open(run / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 2**16)


def orders_at(step: int, run: Path, stopped: list) -> dict:
    """What can happen at a step, by name."""

    def hang() -> None:
        time.sleep(600)

    def hold() -> None:  # until the test has done what it wants to do in the middle of a training
        while not stopped and not (run.parent / "go").exists():
            time.sleep(0.01)

    def busy() -> None:
        for _ in range(240):
            sign_of_life()
            time.sleep(0.05)

    def poison() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        hang()

    def nan() -> None:
        raise LoraMvpError("loss_not_finite", f"the loss became nan at step {step}.")

    def memory() -> None:
        raise MemoryError

    def bug() -> None:
        raise ZeroDivisionError("with a secret in /srv/private/file")

    return {
        "busy": busy,
        "hang": hang,
        "hold": hold,
        "nan": nan,
        "memory": memory,
        "bug": bug,
        "full": lambda: fill_disk(run),
        "quiet": lambda: os._exit(0),
        "poison": poison,
    }


def do(folder: JobFolder, job: Job, attempt: int) -> None:
    """Count to max_train_steps, as training does: fence and report, then write; save on the way and when stopped."""
    t, run = read_settings(folder).training, folder.run
    orders = {name: value for name, _, value in (order.partition("=") for order in t.sample_prompts)}
    stopped = []
    while "load" in orders and not (run.parent / "go").exists():
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in orders else lambda *_: stopped.append(True))
    if "grandchild" in orders:
        subprocess.Popen([sys.executable, "-c", GRANDCHILD])
    run.mkdir(exist_ok=True)
    report, (step, chain) = Reporter(folder, attempt, t.max_train_steps, 1), restore(run)
    print(f"attempt {attempt} begins after step {step}", flush=True)
    if os.environ.get("RANK", "0") != "0":
        time.sleep(600)
    while step < t.max_train_steps:
        step, chain = step + 1, link(chain, step + 1)
        time.sleep(float(orders.get("pause", "0.002")))
        for name, action in orders_at(step, run, stopped).items():
            if f"{name}@{step}" in orders:
                action()
        report(Step(step))
        with open(run / "loss_history.csv", "a") as file:
            file.write(f"{step},{attempt}\n")
        if step % t.checkpointing_steps == 0 or stopped:
            save(run, step, chain)
        if stopped and step < t.max_train_steps:
            raise LoraMvpError("interrupted", f"stopped after step {step}")
    if "hang@end" in orders:
        time.sleep(600)
    report.fence()
    (run / "adapter.txt").write_text(chain)


def engine_of(config: AppConfig, gpus=()):
    """This machine, with cards that are names, or a cluster; TEST_DIES ends the server between a start and the note of it."""
    from lora_mvp.api.engines import Gpu, LocalEngine
    from lora_mvp.api.ray_engine import RayEngine

    if config.api.engine == "ray":
        return RayEngine(config.api, [*HERE, "runner"])

    class Mortal(LocalEngine):
        def start(self, job, folder, node):
            ref = super().start(job, folder, node)
            os.kill(os.getpid(), signal.SIGKILL if "TEST_DIES" in os.environ else 0)
            return ref

    cards = [*gpus, *(Gpu(uuid, "a card") for uuid in os.environ.get("TEST_CARDS", "").split())]
    return Mortal(config.api, [*HERE, "runner"], cards)


def service_of(config: AppConfig, gpus=()):
    """A service over the store of a configuration, its trainings stand-ins."""
    from lora_mvp.api.ownership import open_jobs
    from lora_mvp.api.service import Service

    return Service(config, open_jobs(config.api), engine_of(config, gpus), backoff=0.0)


def http() -> None:
    import uvicorn

    from lora_mvp.api.main import create_app, server_config

    uvicorn.run(create_app(engine=engine_of(server_config())), port=0, timeout_graceful_shutdown=20)


def serve(path: str) -> None:
    service = service_of(load_config(path))
    service.start()
    print("ready", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        if command == "submit":
            config = {"training.max_train_steps": int(words[0]), "training.sample_prompts": words[1:]}
            job, _ = service.submit("train", JobSpec(manifest="m.json", config=config))
        else:
            job = service.cancel(words[0])
        print(job.id, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "runner":
        from lora_mvp.api import runner

        sys.exit(runner.run_attempt(sys.argv[2:], [*HERE, "work"], patience=0.5))
    if sys.argv[1] == "work":
        from lora_mvp.api import work

        sys.exit(work.do_attempt(sys.argv[2:], do))
    if sys.argv[1] == "http":
        sys.exit(http())
    serve(sys.argv[2])
