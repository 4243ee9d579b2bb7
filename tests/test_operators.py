"""What people do to a service: two servers where one should be, a crash at a bad moment, a stop."""

import configparser
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import api_server
import httpx
import pytest
import stand_in
from api_server import served
from stand_in import HERE, final
from test_faults import LIMIT, Desk, desk, linux, progressed, server, small_disk, wait_for  # noqa: F401  fixtures

from lora_mvp.api.engines import LATE, Gpu
from lora_mvp.api.folders import JobFolder
from lora_mvp.api.ownership import open_jobs
from lora_mvp.api.processes import end_all, find_runners, marked
from lora_mvp.cli import build_parser
from lora_mvp.config import ApiConfig, LoraMvpError, config_yaml

ROOT = Path(__file__).resolve().parent.parent


def client_of(one) -> httpx.Client:
    """A client of a server that is `served`."""
    return httpx.Client(base_url=one.url, timeout=60, limits=httpx.Limits(max_connections=None))


def ask(client: httpx.Client, **more) -> httpx.Response:
    return client.post("/train", json={"manifest": "cats/manifest.json"} | more)


def second_server(root: Path, **api) -> subprocess.CompletedProcess:
    """A server with other settings, run until it ends, which it does at once where it is not refused."""
    file = root / "second.yaml"
    file.write_text(config_yaml(Desk(root, **api).config))
    return subprocess.run(
        [*HERE, "serve", str(file)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
    )


def refused(why: str, root: Path, **api) -> None:
    """What another process holds, or has left, is not opened by this one."""
    with pytest.raises(LoraMvpError) as error:
        open_jobs(Desk(root, **api).config.api)
    assert why in str(error.value)


def test_two_servers_over_one_store_or_one_folder(server):  # noqa: F811
    """The second is refused; what it is told to do works, and harms no job of the first."""
    desk, first = server(max_workers=1)  # noqa: F811
    running, root = first.submit("hold@5"), desk.root
    progressed(desk, running, 4)
    done = second_server(root, db_path=root / "mine.json")
    assert done.returncode and "Stop that one first, or give this one an api." in done.stderr, done.stderr
    for other in ({"db_path": root / "mine.db"}, {"jobs_dir": root / "mine"}):
        refused("Stop that one first, or give this one an api.", root, **other)
    assert not (root / "mine.json").exists() and not (root / "mine.db").exists()  # nothing was taken over
    open_jobs(Desk(root, jobs_dir=root / "mine", db_path=root / "mine.json").config.api).close()
    desk.go(running)
    wait_for(lambda: (desk.folder(running).last_state() or {}).get("status") == "succeeded", "end of the job")
    assert desk.folder(running).current_attempt() == 1
    desk.exact_files(running)
    first.kill()
    refused("Set api.db_path back", root, db_path=root / "mine.json")  # one after the other is no better


@linux
def test_what_a_dead_server_started_is_known_before_anything_is_started(tmp_path):
    """A server is killed between the start of a runner and the note of it; neither place nor card is given twice."""
    desk = Desk(tmp_path, max_workers=2)  # noqa: F811
    desk.gpus = [Gpu(f"GPU-{uuid4()}", "a card")]
    desk.open()
    try:
        ids = [desk.submit("hold@5", gpus=1), desk.submit(gpus=1)]
        desk.close()
        file = tmp_path / "config.yaml"
        file.write_text(config_yaml(desk.config))
        env = os.environ | {"TEST_DIES": "1", "TEST_CARDS": desk.gpus[0].uuid}
        with subprocess.Popen([*HERE, "serve", str(file)], stdin=subprocess.PIPE, env=env) as dying:
            assert dying.wait(LIMIT) == -signal.SIGKILL
        desk.open()
        assert [job.engine_ref for job in desk.service.page()] == [None, None]
        for _ in range(3):
            desk.service.tick()
            assert [desk.service.get(id).status for id in ids][1] == "queued"
            assert len(find_runners(desk.config.api.jobs_dir)) == 1
        desk.go(ids[0])
        assert [desk.until(id).attempt for id in ids] == [1, 1]
        for id in ids:
            desk.exact(id)
    finally:
        desk.close()
        for id in desk.taken:
            end_all(f"{id}:")


@linux
def test_two_services_on_one_machine_do_not_share_a_card(tmp_path):
    desks, card = [Desk(tmp_path / name).open() for name in "ab"], Gpu(f"GPU-{uuid4()}", "a card")
    try:
        for desk in desks:  # noqa: F402
            desk.service.engine.gpus = [card]
        ids = [desk.submit("hold@3") for desk in desks]
        desks[0].until_step(ids[0], 2)
        desks[1].service.tick()
        assert desks[1].service.get(ids[1]).status == "queued"
        desks[0].processes(ids[0])[0].kill()  # the runner; the card is free when its trainer is gone as well
        assert desks[1].until(ids[1], "starting", "running").attempt == 1
        for desk, id in zip(desks, ids, strict=True):
            desk.go(id)
        for desk, id in zip(reversed(desks), reversed(ids), strict=True):
            desk.until(id)
            desk.exact(id)
    finally:
        for desk in desks:
            desk.close()
            for id in desk.taken:
                end_all(f"{id}:")


@linux
@pytest.mark.parametrize(
    "stops", [[(5, "server")], pytest.param([(5, "all"), (9, "server")], marks=pytest.mark.slow)], ids=["once", "twice"]
)
def test_a_stopped_service_saves_what_runs_and_goes_on_later(tmp_path, stops):
    """SIGTERM to everything, as systemd may send it, and to the server alone, as the init of a container does."""
    command, api = [sys.executable, stand_in.__file__, "http"], {"max_attempts": 1, "max_workers": 1}
    asked = {"training.max_train_steps": 20, "training.sample_prompts": [f"hold@{held}" for held, _ in stops]}
    job = None
    for held, whom in stops:
        with served(tmp_path, command, **api) as one, client_of(one) as client:
            job = job or ask(client, config=asked).json()["job_id"]
            folder = JobFolder(tmp_path / "jobs" / job)
            wait_for(lambda: (folder.progress() or {"step": 0})["step"] == held - 1, "step before the hold")  # noqa: B023
            time.sleep(0.1)
            for process in [*(marked(f"{job}:") if whom == "all" else []), one.process]:
                process.send_signal(signal.SIGTERM)
            one.process.wait(60)
            assert marked(f"{job}:") == [] and folder.read_result().outcome == "stopped"
            assert (folder.run / f"checkpoint-{held}").is_dir() and folder.last_state()["status"] == "queued"
    (folder.root / "go").touch()
    with served(tmp_path, command, **api) as last, client_of(last) as client:
        wait_for(lambda: client.get(f"/status/{job}").json()["status"] == "succeeded", "end of the job")
    assert (folder.run / "adapter.txt").read_text() == final(20)
    done = [line.split(",") for line in (folder.run / "loss_history.csv").read_text().split()]
    assert [int(step) for step, _ in done] == list(range(1, 21))  # none was done twice
    ends = [int(step) for (step, attempt), (_, later) in pairwise(done) if attempt != later]
    assert ends == [held for held, _ in stops]


@linux
def test_a_job_that_is_stopped_while_it_loads_has_not_failed(desk):  # noqa: F811
    desk = desk(max_attempts=1)
    id = desk.submit("load")
    wait_for(lambda: desk.job(id).status == "running" and len(desk.processes(id)[1]) == 1, "trainer")
    wait_for(lambda: b"begins" not in desk.folder(id).log() and desk.processes(id)[1], "trainer that loads")
    desk.service.loop.draining = True
    desk.service.stop_jobs()
    job = desk.service.get(id)
    assert (job.status, job.stops, job.error) == ("queued", 1, None)
    desk.service.loop.draining = False
    desk.go(id)
    assert desk.until(id).attempt == 2
    desk.exact(id)


def test_the_queue_holds_its_limit_and_no_request_is_too_much(tmp_path):
    """Forty submits at once; settings that no machine can do; a pattern without an end; prompts without an end."""
    with served(tmp_path, max_queued=10) as one, client_of(one) as client:
        with ThreadPoolExecutor(40) as pool:
            answers = [answer.status_code for answer in pool.map(lambda _: ask(client), range(40))]
        assert Counter(answers) == {202: 10, 429: 30}
        jobs = client.get("/v1/jobs?limit=100").json()["data"]
        assert len(jobs) == 10
        client.post(f"/v1/jobs/{jobs[0]['job_id']}/cancel")  # there is room for one
        for key, value in (
            ("training.batch_size", 10**9),
            ("training.gradient_accumulation", 10**9),
            ("training.max_train_steps", 10**12),
            ("training.lora_rank", 10**6),
            ("training.lora_targets", r"(?:\w+\.?)+!"),
            ("training.lora_targets", "a|" * 200),
            ("training.sample_prompts", ["a cat " * 150_000]),
            ("training.sample_prompts", ["a cat"] * 65),
            ("evaluation.prompts", ["a cat " * 600] * 250),
            ("data.trigger", "x" * 900_000),
        ):
            began = time.monotonic()
            answer = ask(client, config={key: value})
            assert answer.status_code == 422 and answer.json()["code"] == "invalid_request", answer.text[:300]
            assert len(answer.text) < 2000 and time.monotonic() - began < 30
        assert ask(client, config={"training.lora_targets": r".*attn1\.to_[qkv]"}).status_code == 202


FAULTS = {
    "another": lambda jobs: (jobs.rename(jobs.with_name("away")), jobs.mkdir()),  # as after an unmount
    "gone": lambda jobs: jobs.rename(jobs.with_name("away")),
    "a file": lambda jobs: (jobs.rename(jobs.with_name("away")), jobs.write_text("")),
    "not to be written": lambda jobs: jobs.chmod(0o500),
    "not to be read": lambda jobs: jobs.chmod(0),
    "full": lambda jobs: stand_in.fill_disk(jobs),
}
PLAIN = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]  # root is no more than an owner then


def mend(fault: str, jobs: Path) -> None:
    """Put things right again."""
    if fault.startswith("not to be"):
        jobs.chmod(0o700)
    elif fault == "full":
        (jobs / "filler").unlink()
    else:
        jobs.unlink() if jobs.is_file() else None
        jobs.rmdir() if jobs.is_dir() else None  # nothing was written there
        jobs.with_name("away").rename(jobs)


@linux
def test_a_disk_that_fails_is_said_in_one_form_and_over_when_it_is_mended(tmp_path):
    """No answer is a 500, whatever is asked; /readyz knows before a client finds out."""
    disk, faults = tmp_path / "disk", list(FAULTS)
    command = [*(PLAIN if os.geteuid() == 0 else []), sys.executable, api_server.__file__]
    with ExitStack() as stack:
        try:
            stack.enter_context(small_disk(disk, "1m"))
        except pytest.skip.Exception:  # nobody here may mount one, and that of the tests is not filled
            faults.remove("full")
        one = stack.enter_context(served(tmp_path, command, jobs_dir=str(disk / "jobs")))
        client = stack.enter_context(client_of(one))
        for fault in faults:
            try_out(client, fault, disk / "jobs")


def try_out(client: httpx.Client, fault: str, jobs: Path) -> None:
    """Let the disk fail, ask for everything, and put it right again."""
    job = ask(client).json()["job_id"]
    assert client.get("/readyz").status_code == 200
    with contextlib.suppress(OSError):  # of the disk that becomes full
        FAULTS[fault](jobs)
    ready = client.get("/readyz")
    assert ready.status_code == 503 and "jobs_dir" in [part["param"] for part in ready.json()["errors"]]
    asked = [("POST", "/train"), ("GET", "/v1/jobs"), ("GET", "/metrics"), ("POST", f"/v1/jobs/{job}/cancel")]
    asked += [("GET", f"/v1/jobs/{job}/{what}") for what in ("events", "logs", "artifacts", "checkpoints")]
    asked += [("GET", f"/status/{job}"), ("POST", f"/v1/jobs/{job}/retry"), ("DELETE", f"/v1/jobs/{job}")]
    for method, path in asked:
        answer = ask(client) if path == "/train" else client.request(method, path)
        assert answer.status_code != 500, (method, path, answer.text)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == "application/problem+json", (method, path)
            assert str(jobs.parent.parent) not in answer.text
        if path == "/train":
            assert answer.status_code == 503
    mend(fault, jobs)
    wait_for(lambda: client.get("/readyz").status_code == 200, "next turn of the loop", 10)
    assert ask(client).status_code == 202


def test_the_unit_of_systemd_gives_a_stop_its_time():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(ROOT / "docker" / "lora-mvp.service")
    service = unit["Service"]
    assert int(service["TimeoutStopSec"]) >= ApiConfig().grace_seconds + LATE + 10  # 10: for clients
    assert service["KillMode"] == "process" and service["RestartPreventExitStatus"] == "2"
    program, *arguments = service["ExecStart"].split()
    assert program.endswith("/bin/lora-mvp") and build_parser().parse_args(arguments).port == 8000
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(ROOT / "docker" / "lora-mvp.service")], capture_output=True, text=True
        )
        wrong = [line for line in done.stderr.splitlines() if "lora-mvp" in line and "not executable" not in line]
        assert not wrong, wrong
