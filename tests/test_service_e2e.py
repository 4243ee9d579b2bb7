"""The promise of the service, whole: a training over HTTP that is killed, goes on, and is what the command line makes."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
from browser import process, wait_for
from live_service import CLI, ENV, Cutter, command, end_jobs, serving, settings, trainers

from lora_mvp.api.client import Client
from lora_mvp.api.contract import metrics_schemas
from lora_mvp.api.folders import JobFolder
from lora_mvp.api.main import create_app
from lora_mvp.api.views import EventPage
from lora_mvp.cli import main
from lora_mvp.config import LoraMvpError

SMALL = {"pretrained_model": "tiny", "resolution": 64, "save_pipeline": False, "max_train_steps": 72, "batch_size": 2}
SMALL |= {"gradient_accumulation": 1, "lr_warmup_steps": 1, "checkpointing_steps": 8, "learning_rate": 1e-3}
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


def steps(seen: list[dict], attempt: int) -> list[int]:
    """The steps that a client saw of an attempt."""
    return [event["step"] for event in seen if event["type"] == "progress" and event["attempt"] == attempt]


@pytest.fixture(scope="module")
def story(home, token, by_command):
    """A client's day: the network, the trainer and the server break while a training runs; gives what the client saw."""
    config = {f"training.{name}": value for name, value in SMALL.items()} | {"evaluation.num_inference_steps": 2}
    seen, told = [], {}
    with serving(home / "service.yaml") as (server, url):
        port = int(url.rsplit(":", 1)[1])
        with closing(Cutter(port, cuts=[0])) as network, Client(network.url, token) as client:
            job = client.train("data/manifest.json", config)  # the answer to the first try never arrives
            told |= {"connections": network.connections, "jobs": [row["job_id"] for row in client.jobs()]}
        follower = Client(url, token, patience=120)
        thread = threading.Thread(target=collect, args=(follower, job["job_id"], seen), daemon=True)
        thread.start()
        told["watched"] = watched_until_ctrl_c(url, token, job["job_id"], home)
        found = wait_for(lambda: trainers(job["job_id"]), 120)
        folder = JobFolder(home / "jobs" / job["job_id"])  # quicker than the network
        wait_for(lambda: (folder.progress() or {"step": 0})["step"] > 8, 180)  # beyond the first checkpoint
        for trainer in found:
            trainer.send_signal(signal.SIGKILL)
        server.kill()
        server.wait()
    with serving(home / "service.yaml", port) as (server, url):
        thread.join(480)  # the service lets trainers be less urgent than all else on the machine
        assert not thread.is_alive(), seen
        with follower:
            told |= {"end": follower.status(job["job_id"]), "listed": follower.artifacts(job["job_id"])}
        yield told | {"job": job, "seen": seen, "url": url, "port": port}


def collect(client: Client, job_id: str, seen: list[dict]) -> None:
    """Follow a job, for a thread."""
    for event in client.events(job_id):
        seen.append(event)


def watched_until_ctrl_c(url: str, token: str, job_id: str, home: Path) -> tuple[int, str]:
    """Exit code and words of `lora-mvp jobs status --watch` that was stopped by Ctrl-C."""
    env = ENV | {"LORA_MVP_URL": url, "LORA_MVP_TOKEN": token}
    watch = [*CLI, "jobs", "status", job_id, "--watch"]
    with open(home / "watch.log", "w") as log, process(watch, env=env, stderr=log) as watcher:
        wait_for(lambda: "starting" in (home / "watch.log").read_text(), 120)
        watcher.send_signal(signal.SIGINT)
        return watcher.wait(60), (home / "watch.log").read_text()


@pytest.fixture(scope="module")
def client(story, token):
    with Client(story["url"], token) as client:
        yield client


def test_a_submit_over_a_connection_that_breaks_makes_one_job(story):
    assert story["connections"] == 2
    assert story["jobs"] == [story["job"]["job_id"]]


def test_a_training_survives_its_trainer_and_the_server(story):
    assert story["end"]["status"] == "succeeded" and story["end"]["attempt"] == 2, story["end"]
    first, second = steps(story["seen"], 1), steps(story["seen"], 2)
    assert first == list(range(1, len(first) + 1)) and 9 <= len(first) < 72
    assert second == list(range(second[0], 73))
    assert second[0] in range(9, 73, 8)  # from a checkpoint, not from the start


def test_a_client_sees_every_event_once(story):
    numbers = [event["seq"] for event in story["seen"]]
    assert numbers == sorted(set(numbers))
    states = [event["status"] for event in story["seen"] if event["type"] == "state"]
    assert states == ["queued", "starting", "running", "queued", "starting", "running", "succeeded"]


def test_results_arrive_over_a_network_that_breaks(story, token, home):
    size = next(row["size"] for row in story["listed"] if row["name"] == ADAPTER)
    with closing(Cutter(story["port"])) as network:
        with Client(network.url, token) as client:
            files = client.download(story["job"]["job_id"], home / "whole")
        with Client(network.url, token) as client:
            client.artifacts(story["job"]["job_id"])
            before, network.cuts = network.connections, [size // 2, size // 4]
            client.connection.http.headers["Connection"] = (
                "close"  # so that the list uses up the connection that is kept
            )
            [file] = client.download(story["job"]["job_id"], home / "parts", [ADAPTER])
        assert network.connections == before + 3  # a half, a quarter, the rest
    names = {path.relative_to(home / "whole").as_posix(): sha256(path) for path in files}
    assert names == {row["name"]: row["sha256"] for row in story["listed"] if row["kind"] != "checkpoint"}
    assert sha256(file) == names[ADAPTER]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_the_adapter_has_the_bytes_of_the_command_line(story, by_command, home):
    made = {row["name"]: row["sha256"] for row in story["listed"]}
    assert made[ADAPTER] == sha256(by_command() / ADAPTER)
    assert made["loss_history.csv"] == sha256(by_command() / "loss_history.csv")


def test_what_was_downloaded_draws(story, client, home):
    from lora_mvp.infer import load_run, render

    client.download(story["job"]["job_id"], home / "whole")
    run = load_run(home / "whole", device="cpu")
    with_it, without = (render(run, ["a disc"], [7], scale, num_inference_steps=2)[0] for scale in (1.0, 0.0))
    assert with_it.tobytes() != without.tobytes()


def test_an_evaluation_is_a_job_that_tells_its_scores(story, client, home, lora_mvp):
    config = {"evaluation.prompts": ["a disc"], "evaluation.num_samples": 2, "evaluation.num_inference_steps": 2}
    job = client.wait(client.evaluate(story["job"]["job_id"], config)["job_id"])
    assert job["status"] == "succeeded", job
    [file] = client.download(job["job_id"], home / "evaluation", ["metrics.json"])
    whole, result = json.loads(file.read_text()), job["result"]
    assert result["verdict"] == whole["judgement"]["verdict"] and result["why"]
    assert {name: score["change"] for name, score in result["scores"].items()} == {
        name: score["change"] for name, score in whole["scores"].items()
    }
    assert [event["verdict"] for event in client.events(job["job_id"]) if event["type"] == "result"] == [
        result["verdict"]
    ]
    assert client.connection.ask("GET", f"/v1/jobs/{job['job_id']}/metrics") == whole
    jsonschema.validate(whole, metrics_document())
    kinds = {row["name"]: row["kind"] for row in client.artifacts(job["job_id"])}
    assert (kinds["metrics.json"], kinds["report.html"], kinds["samples.png"]) == ("metrics", "report", "sample")
    assert not {"pipeline", "other"} & set(kinds.values()), kinds
    code, out, _ = lora_mvp("jobs", "status", job["job_id"])
    assert code == 0 and "verdict" in out and all(name in out for name in result["scores"])
    check_events(client, job["job_id"])


def metrics_document() -> dict:
    """The schema of metrics.json, by itself."""
    text = json.dumps(metrics_schemas()).replace("#/components/schemas/", "#/$defs/")
    return {"$ref": "#/$defs/Metrics", "$defs": json.loads(text)}


def check_events(client: Client, job_id: str) -> None:
    """Every event is what the document says."""
    page = client.connection.ask("GET", f"/v1/jobs/{job_id}/events")
    assert page["data"] and EventPage.model_validate(page)


@pytest.mark.slow
def test_a_saved_adapter_is_evaluated(story, client, home):
    shutil.copytree(home / "jobs" / story["job"]["job_id"] / "run" / "lora_adapter", home / "models" / "discs")
    config = {"evaluation.prompts": ["a disc"], "evaluation.num_samples": 2, "evaluation.num_inference_steps": 2}
    config |= {"training.pretrained_model": "tiny"}
    job = client.wait(client.evaluate("discs", config, manifest="data/manifest.json")["job_id"])
    assert job["status"] == "succeeded" and job["result"]["scores"], job


def test_a_generated_client_submits_follows_and_downloads(story, token, home):
    """openapi-python-client makes a package of the document; nothing of it is ours."""
    pytest.importorskip("openapi_python_client")  # needs Python 3.11
    document = home / "openapi.json"
    document.write_text(json.dumps(create_app().openapi()))
    (home / "generator.yaml").write_text("post_hooks: []\npackage_name_override: made_client\n")
    command = [
        sys.executable,
        "-m",
        "openapi_python_client",
        "generate",
        "--meta",
        "none",
        "--overwrite",
        "--fail-on-warning",
    ]
    command += ["--path", document, "--config", home / "generator.yaml", "--output-path", home / "made" / "made_client"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    (home / "user.py").write_text(USER)
    told = [story["url"], token, story["job"]["job_id"], ADAPTER]
    env = ENV | {"PYTHONPATH": str(home / "made")}
    done = subprocess.run([sys.executable, "user.py", *told], capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    made = {row["name"]: row["sha256"] for row in story["listed"]}
    assert json.loads(done.stdout) == {
        "steps": 72,
        "end": "succeeded",
        "sha256": made[ADAPTER],
        "cancelled": "cancelled",
    }


USER = """
import hashlib, json, sys
from made_client import AuthenticatedClient
from made_client.api.files import artifact
from made_client.api.jobs import cancel, events, status, train
from made_client.models import JobConfig, ProgressEvent, StateEvent, TrainRequest

url, token, trained, name = sys.argv[1:]
with AuthenticatedClient(url, token) as client:
    config = JobConfig(training_max_train_steps=5, training_pretrained_model="tiny")
    job = train.sync(client=client, body=TrainRequest(manifest="data/manifest.json", config=config))
    stopped = cancel.sync(job.job_id, client=client)
    page = events.sync(trained, client=client)
    steps = max(event.step for event in page.data if isinstance(event, ProgressEvent))
    end = [event.status for event in page.data if isinstance(event, StateEvent)][-1]
    file = artifact.sync_detailed(trained, name, client=client)
    while stopped.status not in ("cancelled", "succeeded"):
        stopped = status.sync(job.job_id, client=client)
told = {"steps": steps, "end": end, "sha256": hashlib.sha256(file.content).hexdigest(), "cancelled": str(stopped.status)}
print(json.dumps(told))
"""


def test_a_mistake_is_the_sentence_of_the_service(client, story):
    for ask, code in [
        (lambda: client.train("nowhere/manifest.json"), "manifest_missing"),
        (lambda: client.train("../manifest.json"), "path_forbidden"),
        (lambda: client.train("data/manifest.json", {"training.output_dir": "/tmp"}), "invalid_request"),
        (lambda: client.status("01J00000000000000000000000"), "job_not_found"),
        (lambda: client.download(story["job"]["job_id"], "x", ["../job.json"]), "artifact_not_found"),
    ]:
        with pytest.raises(LoraMvpError) as caught:
            ask()
        assert caught.value.code == code
    with Client(story["url"], "lmvp_wrong") as stranger, pytest.raises(LoraMvpError) as caught:
        next(stranger.jobs())
    assert caught.value.code == "token_missing"


# -- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_mvp(story, token, monkeypatch, capsys):
    """A command in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("LORA_MVP_URL", story["url"])
    monkeypatch.setenv("LORA_MVP_TOKEN", token)

    def run(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def test_commands_look_at_jobs(lora_mvp, story, home):
    id = story["job"]["job_id"]
    assert id in lora_mvp("jobs", "list", "--kind", "train")[1]
    code, out, _ = lora_mvp("jobs", "status", id)
    assert code == 0 and "succeeded" in out and "step 72 of 72" in out
    assert json.loads(lora_mvp("jobs", "status", id, "--json")[1])["job_id"] == id
    code, out, err = lora_mvp("jobs", "status", id, "--watch")
    assert code == 0 and "succeeded" in err
    assert "latents" in lora_mvp("jobs", "logs", id, "-f")[1]
    code, out, _ = lora_mvp("jobs", "download", id, "run.json", "--out", home / "one file")
    assert code == 0 and out == f"1 files in {home / 'one file'}\n"
    assert lora_mvp("jobs", "cancel", id)[:2] == (0, "succeeded\n")


def test_ctrl_c_leaves_the_job_alone(story):
    code, said = story["watched"]
    assert code == 130 and f"Job {story['job']['job_id']} goes on" in said, said


def test_serve_refuses_in_a_sentence(lora_mvp, story, home, tmp_path):
    other = settings(tmp_path, tmp_path, {})
    code, _, err = lora_mvp("serve", "--port", story["port"], "--config", other)
    assert code == 2 and f"port {story['port']} is in use" in err
    code, _, err = lora_mvp("serve", "--port", 0, "--config", home / "service.yaml")
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and err.count("error: ") == 1, (
        err
    )  # the store belongs to another server
