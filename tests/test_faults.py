"""The promise of the service: whatever dies, every job that was taken ends once, with nothing left behind.

Processes are real and really killed. The training in them is a stand-in (stand_in.py), but for the one in
test_resume.py; rows are those of the fault table that the service was designed with.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest
from stand_in import HERE, final, service_of

from lora_mvp.api.engines import Gpu
from lora_mvp.api.folders import JobFolder
from lora_mvp.api.jobs import TERMINAL, JobSpec
from lora_mvp.api.processes import MARK, RUNNER, end_all, leads, mark_of, marked, ref_of
from lora_mvp.config import LoraMvpError, config_yaml, load_config

LIMIT = 120  # seconds that anything here may take on a busy machine
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs signals on a parent's death, which only Linux has")


def wait_for(condition, what: str, limit: float = LIMIT):
    """Wait until `condition` gives something true, and give that back."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {limit} s"
        time.sleep(0.02)
    return found


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return  # it died of another's death


def words(process: psutil.Process) -> list[str]:
    """The command line of a process; none when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Desk:
    """A service in a folder of its own; the test turns its wheel."""

    def __init__(self, root: Path, **api):
        (root / "data").mkdir(parents=True, exist_ok=True)
        (root / "data" / "a.png").write_bytes(b"a picture that nobody opens")
        (root / "data" / "m.json").write_text('[{"image": "a.png"}]')
        places = {"db_path": root / "jobs.json", "jobs_dir": root / "jobs", "data_dir": root / "data"}
        quick = {"poll_interval": 0.05, "grace_seconds": 30.0, "min_free_gb": 0.0, "max_workers": 2}
        keys = {f"api.{key}": value for key, value in (places | {"models_dir": root} | quick | api).items()}
        training = {"pretrained_model": "tiny", "checkpointing_steps": 5}
        self.config = load_config(overrides=keys | {f"training.{key}": value for key, value in training.items()})
        self.root, self.gpus, self.taken = root, (), []

    def open(self):
        def service():
            try:
                return service_of(self.config, self.gpus)
            except LoraMvpError as error:  # a child of a killed server holds the lock until it is started
                assert error.code == "store_in_use"

        self.service = wait_for(service, "store")
        return self

    def close(self):
        self.service.drain()
        self.service.store.close()

    def submit(self, *orders: str, steps: int = 20, gpus=None) -> str:
        config = {"training.max_train_steps": steps, "training.sample_prompts": list(orders)}
        job, _ = self.service.submit("train", JobSpec(manifest="m.json", config=config, gpus=gpus))
        self.taken.append(job.id)
        return job.id

    def folder(self, id: str) -> JobFolder:
        return JobFolder(self.config.api.jobs_dir / id)

    def job(self, id: str):
        self.service.tick()
        return self.service.get(id)

    def until(self, id: str, *status: str):
        """Turn until a job has one of these states; any final one when none is named."""
        return wait_for(lambda: (job := self.job(id)).status in (status or TERMINAL) and job, f"{status} of a job")

    def until_step(self, id: str, step: int, attempt: int = 1) -> dict:
        """Turn until an attempt has made a step."""

        def found():
            self.service.tick()
            progress = self.folder(id).progress(attempt)
            return progress and progress["step"] >= step and progress

        return wait_for(found, f"step {step}")

    def processes(self, id: str) -> tuple[psutil.Process, list[psutil.Process]]:
        """The runner of a job, and all it started."""
        found = marked(f"{id}:")
        runner = [p for p in found if "runner" in words(p)]
        return runner[0], [p for p in found if p not in runner]

    def go(self, id: str) -> None:
        """Let a job go on that holds."""
        (self.folder(id).root / "go").touch()

    def states(self, id: str) -> list[str]:
        return [event["status"] for _, event in self.folder(id).events() if event["type"] == "state"]

    def exact(self, id: str, steps: int = 20) -> None:
        """The job ended once, well, and as if nobody had disturbed it."""
        assert self.service.get(id).status == "succeeded"
        self.exact_files(id, steps)

    def exact_files(self, id: str, steps: int = 20) -> None:
        """As `exact`, by the files alone."""
        assert (self.folder(id).run / "adapter.txt").read_text() == final(steps)
        assert Counter(self.states(id))["succeeded"] == 1 and self.states(id)[-1] == "succeeded"
        wait_for(lambda: not marked(f"{id}:"), "end of the runner")


@pytest.fixture
def desk(tmp_path):
    made = []

    def make(**api) -> Desk:
        made.append(Desk(tmp_path, **api).open())
        return made[-1]

    yield make
    for desk in made:
        desk.close()
        for id in desk.taken:
            end_all(f"{id}:")


def test_a_killed_trainer_goes_on_from_its_checkpoint(desk):  # row 1
    desk = desk()
    id = desk.submit("hold@8")
    desk.until_step(id, 7)
    runner, (trainer,) = desk.processes(id)
    trainer.kill()
    desk.go(id)
    lost = desk.until(id, "queued", "starting")
    assert (lost.attempt, lost.status) == (2, "starting") or lost.error.code == "worker_lost"
    assert desk.until(id).attempt == 2
    desk.exact(id)
    assert desk.folder(id).read_result().attempt == 2
    history = (desk.folder(id).run / "loss_history.csv").read_text().split()
    assert history.count("5,1") == 1 and history.count("6,2") == 1  # the second began after the checkpoint
    assert "attempt 2 begins after step 5" in desk.folder(id).log().decode()


@linux
def test_a_killed_runner_takes_its_trainer_and_what_that_started_along(desk):  # row 2
    desk = desk()
    id = desk.submit("hold@3", "grandchild")
    desk.until_step(id, 2)
    runner, started = desk.processes(id)
    assert len(started) == 2
    trainer = next(p for p in started if "work" in words(p))
    runner.kill()
    wait_for(lambda: gone(trainer), "end of the trainer, though nobody has looked yet")
    desk.go(id)
    assert desk.until(id).attempt == 2
    desk.exact(id)
    assert all(gone(process) for process in started)


@pytest.mark.parametrize("whom", ["runner", pytest.param("trainer", marks=pytest.mark.slow)])
def test_who_is_told_to_end_saves_first_and_has_not_failed(desk, whom):  # 28, as when the machine is shut down
    desk = desk(max_attempts=1)
    id = desk.submit("hold@8", steps=30)
    desk.until_step(id, 7)
    runner, (trainer,) = desk.processes(id)
    (runner if whom == "runner" else trainer).terminate()
    desk.until(id, "queued", "starting")
    assert (ended := desk.until(id)).attempt == 2 and ended.stops == 1
    desk.exact(id, 30)
    steps = [event["step"] for _, event in desk.folder(id).events() if event["type"] == "progress"]
    assert steps == list(range(1, 31))  # none was done twice
    assert "attempt 2 begins after step 8" in desk.folder(id).log().decode()


def test_a_poison_job_stops_after_its_attempts_while_another_runs(desk):  # row 27
    desk = desk(max_attempts=2)
    poison, other = desk.submit("poison@3"), desk.submit("pause=0.05")
    job = desk.until(poison)
    assert (job.status, job.attempt, job.error.code) == ("failed", 2, "worker_lost")
    assert desk.states(poison).count("failed") == 1
    assert desk.until(other).attempt == 1
    desk.exact(other)


def test_every_way_to_fail_has_its_code_and_frees_its_place(desk):  # rows 11 and 30
    desk = desk(max_workers=1)
    codes = {"nan@3": "loss_not_finite", "memory@3": "out_of_memory", "bug@3": "internal", "quiet@3": "internal"}
    bad, good = {order: desk.submit(order) for order in codes}, desk.submit(steps=3)
    assert desk.until(good).status == "succeeded"
    for order, id in bad.items():
        job = desk.service.get(id)
        assert (job.status, job.attempt, job.error.code) == ("failed", 1, codes[order])
        assert "/srv" not in job.error.message and "secret" not in job.error.message
    wait_for(lambda: desk.service.engine.nodes()[0].free.slots == 1, "free place")


def test_what_hangs_is_stopped_whenever_it_does_and_what_is_at_work_is_not(desk):  # row 30
    desk = desk(max_workers=4, stall_seconds=10.0, grace_seconds=0.5)
    hanging = [desk.submit(order) for order in ("load", "hang@3", "hang@end")]
    busy = desk.submit("busy@3", steps=5)  # twelve seconds without a step, as in a validation
    for id in hanging:
        job = desk.until(id)
        assert (job.status, job.error.code) == ("failed", "stalled"), desk.folder(id).log()
    assert desk.until(busy).status == "succeeded"
    wait_for(lambda: desk.service.engine.nodes()[0].free.slots == 4, "free places")


def test_a_training_that_takes_too_long_is_stopped_and_has_saved_itself(desk):  # row 30
    desk = desk(max_workers=1, max_runtime=8.0)  # more than a good one takes beside other tests
    long, good = desk.submit("pause=0.1", steps=10_000), desk.submit(steps=3)
    assert desk.until(good).status == "succeeded"
    assert desk.service.get(long).error.code == "deadline_exceeded"
    assert (desk.folder(long).run / f"checkpoint-{desk.folder(long).progress()['step']}").is_dir()


def test_a_cancel_leaves_nothing_even_of_a_job_that_resists(desk):  # row 7
    desk = desk(grace_seconds=0.5)
    id = desk.submit("deaf", "grandchild", "pause=0.05", steps=10_000)
    desk.until_step(id, 1)
    assert len(desk.processes(id)[1]) == 2
    begun = time.monotonic()
    assert desk.service.cancel(id).status == "cancelling"
    assert desk.until(id).status == "cancelled"
    assert time.monotonic() - begun < 60
    wait_for(lambda: not marked(f"{id}:"), "end of everything")
    assert desk.states(id)[-2:] == ["cancelling", "cancelled"]


def test_a_cancel_saves_first_and_touches_no_other_job(desk):  # row 9
    desk = desk()
    id, other, waiting = desk.submit("pause=0.05", steps=10_000), desk.submit("hold@3", steps=40), desk.submit()
    desk.until_step(id, 7)
    desk.until_step(other, 1)
    assert desk.service.cancel(waiting).status == "cancelled"
    desk.service.cancel(id)
    assert desk.until(id).status == "cancelled"
    saved = max(int(path.name.rpartition("-")[2]) for path in desk.folder(id).run.glob("checkpoint-*"))
    assert saved == desk.folder(id).progress()["step"] >= 7
    assert not desk.folder(waiting).run.exists()
    desk.go(other)
    assert desk.until(other).attempt == 1
    desk.exact(other, 40)
    again, _ = desk.service.retry(id)
    desk.taken.append(again.id)
    desk.until_step(again.id, saved + 1)
    assert f"begins after step {saved}" in desk.folder(again.id).log().decode()
    desk.service.cancel(again.id)
    assert desk.until(again.id).status == "cancelled"


def test_a_storm_of_cancels_gives_one_end(desk):  # row 8
    desk = desk(max_workers=3)
    ids, answers = [desk.submit("pause=0.01", steps=10 + 10 * k) for k in range(3)], []
    desk.until_step(ids[0], 8)

    def storm(id):
        answers.append(desk.service.cancel(id).status)

    threads = [threading.Thread(target=storm, args=(ids[k % 3],)) for k in range(99)]
    for thread in threads:
        thread.start()
    for id in ids:
        desk.until(id)
    for thread in threads:
        thread.join()
    assert len(answers) == 99 and set(answers) <= {"cancelling", *TERMINAL}
    for id in ids:
        ends = [status for status in desk.states(id) if status in TERMINAL]
        assert ends == [desk.service.get(id).status] and ends[0] in ("cancelled", "succeeded")


@linux
def test_an_attempt_that_was_given_up_writes_no_byte(desk):  # row 10
    desk = desk()
    id = desk.submit("hold@8", steps=60)
    desk.until_step(id, 7)
    folder, first, runner = desk.folder(id), desk.service.get(id), desk.processes(id)[0]
    frozen = [*desk.processes(id)[1], runner]
    for process in frozen:
        process.suspend()
    while list(folder.root.glob(".heartbeat*")):  # not in the middle of a heartbeat
        runner.resume()
        time.sleep(0.2)
        runner.suspend()
    desk.go(id)
    folder.claim_attempt(2)  # as a service does that cannot reach the machine of the first
    command = [*HERE, "runner", str(folder.root), "--attempt", "2"]
    done = subprocess.run(command, env={**os.environ, MARK: f"{id}:2"}, timeout=LIMIT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (folder.run / "adapter.txt").read_text() == final(60)
    files = {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}
    for process in frozen:
        process.resume()
    popen = desk.service.engine.places[first.engine_ref].process
    assert popen.wait(LIMIT) == 75
    assert not marked(f"{id}:")
    assert {path: path.read_bytes() for path in folder.root.rglob("*") if path.is_file()} == files


class Server:
    """A server in a process of its own, that can be killed."""

    def __init__(self, desk: Desk):
        self.desk, self.file = desk, desk.root / "config.yaml"
        self.file.write_text(config_yaml(desk.config))
        self.begin()

    def begin(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        errors = open(self.desk.root / "server.log", "a")
        self.process = subprocess.Popen([*HERE, "serve", str(self.file)], stderr=errors, **pipes)
        process, answers = self.process, []
        threading.Thread(target=lambda: answers.extend(map(str.strip, process.stdout)), daemon=True).start()
        wait_for(lambda: answers or process.poll() is not None, "server")
        self.answers = answers
        if not answers:  # a child of the server that was killed held the store until it was started
            assert "in use by another server" in (self.desk.root / "server.log").read_text()
            self.begin()

    def ask(self, line: str) -> None:
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it was killed; what it did not answer it need not have done

    def submit(self, *orders: str, steps: int = 20) -> str:
        known = len(self.answers)
        self.ask(" ".join(["submit", str(steps), *orders]))
        wait_for(lambda: len(self.answers) > known, "answer")
        self.desk.taken.append(self.answers[-1])
        return self.answers[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    made = []

    def make(**api) -> tuple[Desk, Server]:
        desk = Desk(tmp_path, **api)
        made.append(Server(desk))
        return desk, made[-1]

    yield make
    for server in made:
        server.kill()
        for id in server.desk.taken:
            end_all(f"{id}:")


def progressed(desk: Desk, id: str, step: int, attempt: int = 1) -> None:
    wait_for(lambda: (desk.folder(id).progress(attempt) or {"step": -1})["step"] >= step, f"step {step}")


def test_a_killed_server_finds_its_jobs_again(server):  # row 3
    desk, server = server(max_workers=1)
    running, waiting = server.submit("pause=0.05", "hold@30", steps=60), server.submit()
    progressed(desk, running, 3)
    runner, _ = desk.processes(running)
    server.kill()
    progressed(desk, running, 29)  # it goes on without a server
    desk.open()
    try:
        assert [job.id for job in desk.service.page(oldest_first=True)] == [running, waiting]
        assert desk.job(running).status == "running" and runner.is_running()
        desk.go(running)
        assert desk.until(waiting).status == "succeeded"
        assert desk.service.get(running).attempt == 1
        desk.exact(running, 60)
        steps = [event["step"] for _, event in desk.folder(running).events() if event["type"] == "progress"]
        assert steps == list(range(1, 61))
    finally:
        desk.close()


@linux
def test_after_everything_was_killed_a_job_goes_on_once(server):  # row 4
    desk, server = server()
    id = server.submit("hold@8", "grandchild")
    progressed(desk, id, 7)
    server.process.send_signal(signal.SIGSTOP)  # so that it does not see the others die
    runner, started = desk.processes(id)
    for process in (runner, *started):
        kill(process)
    server.kill()
    desk.go(id)
    desk.open()
    try:
        assert desk.until(id).attempt == 2
        desk.exact(id)
        assert desk.states(id).count("starting") == 2
    finally:
        desk.close()


def test_a_number_that_was_given_to_another_process_is_left_alone(desk):  # row 6
    desk = desk()
    id = desk.submit("pause=0.05", steps=10_000)
    desk.until_step(id, 1)
    desk.service.drain()
    desk.service.store.close()
    end_all(f"{id}:")
    unrelated = subprocess.Popen(["sleep", "600"])
    try:
        desk.open()
        job = desk.service.get(id)
        ref = ref_of(unrelated.pid, f"{id}:1")  # even the time of its start is the same
        desk.service.store.swap(job, job.model_copy(update={"engine_ref": ref, "version": job.version + 1}))
        desk.service.tick()
        lost = [event for _, event in desk.folder(id).events() if event.get("error")]
        assert [(event["status"], event["error"]["code"]) for event in lost] == [("queued", "worker_lost")]
        desk.service.engine.stop(ref, 0)
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()


def test_fewer_places_after_a_restart(desk):  # row 31
    desk = desk(max_workers=3)
    ids = [desk.submit("pause=0.1", steps=25) for _ in range(3)]
    for id in ids:
        desk.until_step(id, 1)
    desk.close()
    fewer = Desk(desk.root, max_workers=1).open()
    try:
        last = fewer.submit()
        desk.taken.append(last)
        most = 0
        while fewer.job(last).status not in TERMINAL:
            running = [job for job in fewer.service.page() if job.status in ("starting", "running")]
            if any(job.id == last for job in running):
                most = max(most, len(running))
        assert most == 1
        for id in ids:
            assert fewer.service.get(id).attempt == 1
            fewer.exact(id, 25)
    finally:
        fewer.close()


def test_a_drained_service_takes_nothing_and_its_jobs_go_on(desk):  # row 28
    desk = desk(max_workers=1)
    desk.service.start()
    id, waiting = desk.submit("pause=0.05", steps=40), desk.submit()
    progressed(desk, id, 1)
    desk.service.drain()
    with pytest.raises(LoraMvpError, match="takes no more jobs"):
        desk.submit()
    assert desk.service.ready()["draining"]
    desk.service.store.close()
    wait_for(lambda: desk.folder(id).read_result(), "result")
    desk.open()
    assert desk.job(id).status == "succeeded"
    desk.exact(id, 40)
    assert desk.until(waiting).status == "succeeded"


def test_a_clock_that_jumps_changes_nothing(desk, monkeypatch):  # row 29
    desk, real, jumps = desk(max_runtime=600.0), time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + jumps[-1])
    monkeypatch.setattr("lora_mvp.api.jobs.now", lambda: datetime.fromtimestamp(time.time(), timezone.utc))
    monkeypatch.setattr("lora_mvp.api.service.now", lambda: datetime.fromtimestamp(time.time(), timezone.utc))
    ids = []
    for jump in (0.0, 3600.0, -3600.0):
        jumps.append(jump)
        ids.append(desk.submit("pause=0.02"))
        desk.until_step(ids[-1], 1)
    for id in ids:
        assert desk.until(id).attempt == 1
        desk.exact(id)
    assert ids == sorted(ids) == [job.id for job in desk.service.page(oldest_first=True)]
    created = [desk.service.get(id).created_at for id in ids]
    assert created[1] > created[0] > created[2]


@contextmanager
def small_disk(folder: Path, size: str):
    """A disk of its own for a folder."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@linux
def test_a_full_disk_is_said_and_over_when_there_is_room(tmp_path):  # row 12
    with small_disk(tmp_path / "disk", "2m"):
        desk = Desk(tmp_path, jobs_dir=tmp_path / "disk" / "jobs").open()
        try:
            id = desk.submit("full@7", "pause=0.01")
            job = desk.until(id)
            assert (job.status, job.error.code, job.attempt) == ("failed", "disk_full", 1)
            assert [path.name for path in desk.folder(id).run.glob("checkpoint-*")] == ["checkpoint-5"]
            (desk.folder(id).run / "filler").unlink()
            again = desk.submit(steps=5)
            assert desk.until(again).status == "succeeded"
        finally:
            desk.close()


@linux
def test_events_that_do_not_fit_are_dropped_and_counted(tmp_path):  # rows 12 and 15
    with small_disk(tmp_path / "disk", "256k"):
        folder, filler = JobFolder(tmp_path / "disk"), tmp_path / "disk" / "filler"
        assert folder.append("state", 1, status="running")
        with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)
        written = [folder.append("progress", 1, step=k, note="x" * 200) for k in range(100)]  # the last block fills up
        assert not written[-1]
        filler.unlink()
        assert folder.append("progress", 1, step=100)
        events = [event for _, event in folder.events()]
        assert events[-1] == events[-1] | {"step": 100, "dropped": written.count(False)}
        assert len(events) == 2 + written.count(True)
        assert folder.events(after=folder.events()[-2][0])[0][1]["step"] == 100


def ranks(desk: Desk, id: str) -> list[psutil.Process]:
    """The processes that train, not the launcher."""
    return [p for p in marked(f"{id}:") if words(p)[2:3] == ["work"]]


@linux
def test_a_killed_runner_takes_all_processes_of_torchrun_along(desk):  # row 2
    desk = desk(max_attempts=1)
    cards = [f"GPU-{name}-{os.getpid()}" for name in "ab"]  # of this test alone
    desk.service.engine.gpus = [Gpu(uuid, "a card") for uuid in cards]
    id = desk.submit("pause=0.05", steps=10_000, gpus=2)
    desk.until_step(id, 1)
    both = wait_for(lambda: len(found := ranks(desk, id)) == 2 and found, "two processes")
    assert {p.environ()["CUDA_VISIBLE_DEVICES"] for p in both} == {",".join(cards)}
    assert {p.environ()["WORLD_SIZE"] for p in both} == {"2"}
    desk.processes(id)[0].kill()
    wait_for(lambda: all(gone(process) for process in both), "end of both")
    assert desk.until(id).error.code == "worker_lost"
    wait_for(lambda: not marked(f"{id}:"), "end of everything")


def test_a_job_that_must_wait_for_cards_is_passed_by_one_that_wants_none(desk):
    desk = desk(max_workers=3)
    desk.service.engine.gpus = [Gpu(f"GPU-{name}-{os.getpid()}", "a card") for name in "ab"]
    first, large, small = desk.submit("hold@3", gpus=1), desk.submit(gpus=2), desk.submit(gpus=0)
    desk.until_step(first, 2)
    assert desk.until(small).attempt == 1
    assert desk.service.get(large).status == "queued"
    desk.service.cancel(large)
    desk.go(first)
    desk.until(first)
    with pytest.raises(LoraMvpError, match="3 GPUs on one node are asked for, and the largest has 2 GPUs"):
        desk.submit(gpus=3)


def kill_something(desk: Desk, server: Server, chance: random.Random) -> str:
    """Kill -9 one kind of process at a random moment; the server is there again afterwards."""
    what = chance.choice(["server", "server", "runner", "trainer", "all"])
    time.sleep(chance.uniform(0, 0.8))
    if what in ("server", "all"):
        server.kill()
    found = [p for p in psutil.process_iter() if mark_of(p).partition(":")[0] in desk.taken]
    wanted = {"server": [], "all": found}
    for kind, word in (("runner", "runner"), ("trainer", "work")):
        fitting = [process for process in found if word in words(process)]
        wanted[kind] = fitting and [chance.choice(fitting)]
    for process in wanted[what]:
        kill(process)
    if what in ("server", "all"):
        server.begin()
    return what


def at_work(desk: Desk) -> dict[str, str]:
    """The cards of the jobs of which there is a runner now; none of either is given twice."""
    found = [p for p in psutil.process_iter() if leads(p) and mark_of(p, RUNNER).startswith(str(desk.root))]
    told = [(mark_of(p).partition(":")[0], mark_of(p, "CUDA_VISIBLE_DEVICES")) for p in found]
    told = [(job, cards) for job, cards in told if job]  # the others have ended meanwhile
    assert len(told) <= 3 and len(dict(told)) == len(set(dict(told).values())) == len(told), told
    return dict(told)


@linux
@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_whatever_is_killed_at_any_moment_every_job_ends_once(server, rounds, monkeypatch):  # row 5
    cards = [f"GPU-{name}-{os.getpid()}" for name in "abcd"]
    monkeypatch.setenv("TEST_CARDS", " ".join(cards))
    desk, server = server(max_workers=3, max_attempts=1000)
    chance = random.Random(rounds)
    killed, cancelled = Counter(), set()
    for _ in range(rounds):
        before = len(server.answers)
        if chance.random() < 0.7:
            server.ask(f"submit {chance.randint(1, 40)} pause=0.01")
        if desk.taken and chance.random() < 0.3:
            cancelled.add(id := chance.choice(desk.taken))
            server.ask(f"cancel {id}")
        answers, known = server.answers, set(desk.taken)
        killed[kill_something(desk, server, chance)] += 1
        at_work(desk)
        desk.taken += [id for id in dict.fromkeys(answers[before:]) if len(id) == 26 and id not in known]
    assert desk.taken, "no job was taken"
    server.kill()
    desk.open()
    try:
        for id in desk.taken:  # every one that was answered is there
            job = desk.until(id)
            ends = [status for status in desk.states(id) if status in TERMINAL]
            assert ends == [job.status], (id, desk.states(id))
            assert job.status == "succeeded" or (job.status == "cancelled" and id in cancelled), job
            if job.status == "succeeded":
                desk.exact(id, desk.service.get(id).spec.config["training.max_train_steps"])
    finally:
        desk.close()
    print(rounds, "rounds,", len(desk.taken), "jobs,", dict(killed))
