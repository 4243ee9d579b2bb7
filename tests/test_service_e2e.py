"""The promise of the service, whole: a training over HTTP that is killed, goes on, and is what the command line makes."""

import hashlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from browser import wait_for
from live_service import CLI, ENV, Cutter, command, end_jobs, serving, settings, trainers

from lora_mvp.api.client import Client
from lora_mvp.cli import main
from lora_mvp.config import LoraMvpError

SMALL = {"pretrained_model": "tiny", "resolution": 64, "save_pipeline": False, "max_train_steps": 12, "batch_size": 2}
SMALL |= {"gradient_accumulation": 1, "lr_warmup_steps": 1, "checkpointing_steps": 4, "learning_rate": 1e-3}
SMALL |= {"lora_rank": 4, "lora_dropout": 0.1, "sample_prompts": ["a disc"]}
ADAPTER = "lora_adapter/pytorch_lora_weights.safetensors"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory, drawings):
    home = tmp_path_factory.mktemp("service")
    settings(home, drawings.parent.parent, {}, tokens_file=str(home / "tokens"), grace_seconds=20.0)
    yield home
    end_jobs(home / "jobs")


@pytest.fixture(scope="module")
def token(home):
    """A secret, as an operator makes it."""
    done = command("token", "ana", "--scope", "submit", "--config", home / "service.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in (home / "tokens").read_text()
    return done.stdout.strip()


@pytest.fixture(scope="module")
def by_command(home, drawings):
    """The same training by `lora-mvp train`; waits for its end when it is asked for."""
    changes = [f"--set=training.{name}={json.dumps(value)}" for name, value in SMALL.items()]
    changes += ["--set=evaluation.num_inference_steps=2", f"--set=training.output_dir={home / 'by command'}"]
    run = [*CLI, "train", "--manifest", str(drawings), *changes]
    with open(home / "by command.log", "wb") as log:
        training = subprocess.Popen(run, env=ENV, cwd=home, stdout=log, stderr=log)

    def finished() -> Path:
        assert training.wait(300) == 0, (home / "by command.log").read_text()
        return home / "by command"

    yield finished
    training.kill()
    training.wait()


@pytest.fixture(scope="module")
def story(home, token, by_command):
    """What a client saw: submitted over a connection that broke, the trainer killed, the server killed and started again."""
    seen, story, at_step = [], {}, {}
    config = {f"training.{name}": value for name, value in SMALL.items()} | {"evaluation.num_inference_steps": 2}
    with serving(home / "service.yaml") as (server, url):
        port = int(url.rsplit(":", 1)[1])
        broken = Cutter(port)
        broken.cuts = [0]
        with Client(broken.url, token) as client:
            story["job"] = client.train("data/manifest.json", config)
            story["connections"] = broken.connections
            story["jobs"] = [job["job_id"] for job in client.jobs()]
        id = story["job"]["job_id"]
        follower = Client(url, token, patience=120)

        def follow():
            for event in follower.events(id):
                seen.append(event)
                at_step.setdefault((event["attempt"], event.get("step", 0)), threading.Event()).set()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()

        def happened(attempt, step):
            return wait_for(lambda: any((e["attempt"], e["type"]) == (attempt, "progress") and e["step"] >= step for e in seen), 120)

        happened(1, 5)  # the checkpoint of step 4 is there
        for trainer in trainers(id):
            trainer.send_signal(signal.SIGKILL)
        server.kill()
        server.wait()
    with serving(home / "service.yaml", port) as (server, url):
        thread.join(180)
        assert not thread.is_alive(), seen
        story |= {"seen": seen, "end": follower.status(id), "folder": home / "fetched"}
        reached = follower.artifacts(id)
        follower.close()
        cut = Cutter(port)
        size = next(row["size"] for row in reached if row["name"] == ADAPTER)
        with Client(cut.url, token) as client:
            client.artifacts(id)  # over the connection that is kept; the next ones break
            story["files"] = client.download(id, home / "fetched", [row["name"] for row in reached if row["kind"] != "checkpoint"])
        cut.cuts = [size // 2, size // 4]
        with Client(cut.url, token) as client:
            story["again"] = client.download(id, home / "fetched again", [ADAPTER])
        story["listed"] = {row["name"]: row for row in reached}
        yield story | {"url": url, "id": id, "server": server}
        for proxy in (broken, cut):
            proxy.close()
