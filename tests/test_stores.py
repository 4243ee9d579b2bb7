"""The promise of `Store` in lora_mvp.api.jobs: a store that has answered has it on the disk, whatever happens next.

One suite of what every store must do runs over the JSON file, SQLite and a real PostgreSQL server. What can only happen
to files is done to files: processes are killed, disks are full, files are cut off.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from postgres import over_tcp, postgres
from store_clients import example, new_id, open_and_say, submit_until_killed

from lora_mvp.api import state_file
from lora_mvp.api.jobs import Job, JobSpec, moved, noted, now, transition
from lora_mvp.api.json_store import JsonStore
from lora_mvp.api.sql_store import SqlStore
from lora_mvp.api.state_file import StateFile, pack_jobs, unpack_jobs
from lora_mvp.api.stores import open_store
from lora_mvp.config import ApiConfig, LoraMvpError

STRANGE = {"a": 'quote " slash \\ line\nend', "nul": "\0", "smile": "\U0001f600", "big": 2**70, "list": [None, 1.5, []]}


def code_of(call) -> str:
    with pytest.raises(LoraMvpError) as caught:
        call()
    assert "Traceback" not in caught.value.message and "\n" not in caught.value.message
    return caught.value.code


class Place:
    """Where a store is, so that it can be opened again."""

    def __init__(self, url: str):
        self.url, self.opened = url, []

    def open(self, rebuild=tuple):
        self.opened.append(open_store(ApiConfig(db_path=self.url), rebuild))
        return self.opened[-1]


@pytest.fixture(scope="module")
def server():
    with postgres() as running:
        yield running


def make_place(kind: str, folder: Path, request) -> Place:
    if kind != "postgresql":
        return Place(str(folder / "state" / f"jobs{kind}"))
    server = request.getfixturevalue("server")
    user = f"u{new_id().lower()}"
    server.new_user(user)
    return Place(server.url(user))


@pytest.fixture(params=[".json", ".db", "postgresql"])
def place(request, tmp_path):
    place = make_place(request.param, tmp_path, request)
    yield place
    for store in place.opened:
        store.close()


@pytest.fixture(params=[".json", ".db"])
def file_place(request, tmp_path):
    place = make_place(request.param, tmp_path, request)
    yield place
    for store in place.opened:
        store.close()


# What every store does


def test_a_job_comes_back_as_it_was(place):
    store = place.open()
    job = example(owner="me", key="k", key_digest="d", spec=JobSpec(config=STRANGE), retry_of="x" * 26)
    assert store.create(job) == (job, True)
    failed = moved(moved(job, "starting"), "failed", engine_ref="4711:1")
    assert store.swap(job, failed)
    store.close()
    assert place.open().get(job.id) == failed


def test_pages(place):
    store = place.open()
    jobs = [example(kind=("train", "evaluate")[k % 3 == 0]) for k in range(12)]
    for job in random.Random(0).sample(jobs, 12):
        store.create(job)
    jobs[1:6:2] = [transition(store, job, "cancelled") for job in jobs[1:6:2]]
    assert store.page() == jobs[::-1]
    assert store.page(oldest_first=True, limit=5) == jobs[:5]
    assert store.page(oldest_first=True, after=jobs[4].id, limit=5) == jobs[5:10]
    assert store.page(after=jobs[4].id, limit=3) == jobs[3:0:-1]
    assert (
        store.page(after=jobs[0].id) == store.page(status=set()) == store.page(kind="evaluate", status={"failed"}) == []
    )
    assert store.page(status={"cancelled", "running"}) == jobs[5:0:-2]
    assert store.page(kind="evaluate", status={"queued"}, oldest_first=True) == [jobs[0], jobs[6], jobs[9]]
    assert store.page(after="0", oldest_first=True) == jobs and store.page(after="zzz") == jobs[::-1]
    assert store.counts() == {("train", "queued"): 6, ("train", "cancelled"): 2, ("evaluate", "queued"): 3} | {
        ("evaluate", "cancelled"): 1
    }
    for job in jobs[::2]:
        store.delete(job.id)
        store.delete(job.id)
    assert store.page(oldest_first=True) == jobs[1::2]
    assert code_of(lambda: store.get(jobs[0].id)) == "job_not_found"


@pytest.mark.parametrize(
    "name", ["", "nothing", "\0", "\ud800", "é" * 26, "'; DROP TABLE lora_mvp_jobs; --", "x" * 100_000]
)
def test_names_of_no_job(place, name):
    store = place.open()
    assert code_of(lambda: store.get(name)) == "job_not_found"
    store.delete(name)
    if name.isascii() and name.isprintable():
        assert store.page(after=name) == []
    else:
        assert code_of(lambda: store.page(after=name)) == "invalid_request"


def test_only_the_version_that_was_read_is_replaced(place):
    store = place.open()
    job = example()
    store.create(job)
    first = noted(store, job, engine_ref="1")
    assert noted(store, job, engine_ref="2") is None
    assert store.get(job.id) == first
    for old, new in [(first, first), (first, job), (first, example(version=5))]:
        with pytest.raises(ValueError, match="cannot follow"):
            store.swap(old, new)
    with pytest.raises(ValueError, match="there already"):
        store.create(job)
    store.delete(job.id)
    assert noted(store, first, engine_ref="3") is None
    assert store.page() == []


def test_what_a_caller_does_to_a_job_stays_with_the_caller(place):
    store = place.open()
    job = example()
    store.create(job)[0].spec.config["training.seed"] = 1
    job.spec.config["training.seed"] = 2
    store.get(job.id).spec.config["training.seed"] = 3
    store.page()[0].spec.config["training.seed"] = 4
    assert store.get(job.id).spec.config == {"training.max_train_steps": 20}


def test_of_many_swaps_at_once_one_wins(place):
    store = place.open()
    job = example()
    store.create(job)
    barrier, rounds, wins = threading.Barrier(6), 8, []

    def work(name):
        for _ in range(rounds):
            barrier.wait()
            read = store.get(job.id)
            barrier.wait()
            if noted(store, read, engine_ref=name):
                wins.append((read.version, name))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, "abcdef"))
    assert sorted(version for version, _ in wins) == list(range(rounds))
    assert (store.get(job.id).version, store.get(job.id).engine_ref) == (rounds, dict(wins)[rounds - 1])


def test_one_key_makes_one_job(place):
    store = place.open()

    def submit(n, owner="me", digest="d", **fields):
        return store.create(example(owner=owner, key="k", key_digest=digest, **fields))

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(submit, range(50)))
    assert [created for _, created in answers].count(True) == 1
    (job,) = store.page()
    assert {answer.id for answer, _ in answers} == {job.id}
    assert code_of(lambda: submit(0, digest="other")) == "key_reused"
    other, created = submit(0, owner="you", digest="other")
    assert created and store.create(example(owner="me"))[1] and store.create(example(owner="me"))[1]
    job = transition(store, job, "cancelled")
    store.close()

    store = place.open()
    assert submit(0) == (job, False) and submit(0, owner="you", digest="other") == (other, False)
    assert code_of(lambda: submit(0, digest="other")) == "key_reused"
    for hours in (-500_000, -1, 25, 500_000):  # the clock jumps, and the key is still the job's
        assert submit(0, created_at=now() + timedelta(hours=hours)) == (job, False)
    store.delete(job.id)
    newer, created = submit(0, digest="third")
    assert created and submit(0, digest="third") == (newer, False)


def test_a_second_server_is_told_at_once(place):
    store = place.open()
    job = example()
    store.create(job)
    with pytest.raises(LoraMvpError, match="in use by another server") as caught:
        place.open()
    assert caught.value.code == "store_in_use" and "geheim" not in caught.value.message
    assert "geheim" in place.url or place.url in caught.value.message
    assert store.get(job.id) == job and noted(store, job, engine_ref="1") and store.problem is None
    store.close()
    assert place.open().page()[0].engine_ref == "1"


def test_a_closed_store_says_so(place):
    store = place.open()
    job = example()
    store.create(job)
    store.close()
    store.close()
    for call in (lambda: store.create(example()), lambda: noted(store, job), lambda: store.delete(job.id)):
        assert code_of(call) == "store_failed"


def test_a_store_that_is_gone_is_made_again_from_the_folders(place):
    jobs = [example(), moved(example(), "starting")]
    store = place.open(rebuild=lambda: iter(jobs))
    assert store.page(oldest_first=True) == jobs and "2 jobs recovered" in store.recovered and store.problem is None
    store.close()
    store = place.open(rebuild=lambda: pytest.fail("nothing is lost"))
    assert store.recovered is None and store.page(oldest_first=True) == jobs
    for job in jobs:
        store.delete(job.id)
    store.close()
    assert place.open(rebuild=lambda: jobs).page() == []


# Against a model


class StoreMachine(RuleBasedStateMachine):
    """Any order of calls, and of crashes, gives what a dict gives."""

    ending = ".json"

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.jobs: dict[str, Job] = {}
        self.stale: list[Job] = []
        self.clock, self.moment = 0, datetime(2030, 1, 1, tzinfo=timezone.utc)

    @initialize()
    def begin(self):
        self.place = self.root / f"{self.clock}"
        self.store = open_store(ApiConfig(db_path=str(self.place / f"jobs{self.ending}")))

    @rule(kind=st.sampled_from(["train", "evaluate"]))
    def submit(self, kind):
        job = example(kind=kind)
        assert self.store.create(job) == (job, True)
        self.jobs[job.id] = job

    @rule(
        key=st.sampled_from("kl"), owner=st.sampled_from("ab"), digest=st.sampled_from("de"), hours=st.integers(-40, 40)
    )
    def submit_with_key(self, key, owner, digest, hours):
        self.moment += timedelta(hours=hours)
        job = example(key=key, owner=owner, key_digest=digest, created_at=self.moment)
        recent = [j for j in self.jobs.values() if (j.owner, j.key) == (owner, key)]
        old = max(recent, key=lambda j: j.id, default=None)
        if old is None:
            assert self.store.create(job) == (job, True)
            self.jobs[job.id] = job
        elif old.key_digest == digest:
            assert self.store.create(job) == (old, False)
        else:
            assert code_of(lambda: self.store.create(job)) == "key_reused"

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), to=st.sampled_from(["starting", "running", "queued", "cancelled", "succeeded"]))
    def swap(self, data, to):
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        try:
            new = moved(job, to)
        except ValueError:
            return
        assert self.store.swap(job, new)
        self.jobs[job.id] = new
        self.stale.append(job)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def swap_late(self, data):
        job = data.draw(st.sampled_from(self.stale))
        assert noted(self.store, job, engine_ref="late") is None

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def forget(self, data):
        id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.store.delete(id)
        del self.jobs[id]

    @rule()
    def crash(self):
        """The files as they are at this moment are all that is left."""
        old, self.clock = self.place, self.clock + 1
        shutil.copytree(old, self.root / f"{self.clock}")
        self.store.close()
        self.begin()
        assert self.store.recovered is None

    @rule()
    def write_all_anew(self):
        if self.ending == ".json":
            self.store._change.file.due = True

    @rule()
    def restart(self):
        self.store.close()
        self.begin()

    @rule(
        status=st.none() | st.sets(st.sampled_from(["queued", "starting", "cancelled"])),
        kind=st.sampled_from([None, "train"]),
        oldest_first=st.booleans(),
        limit=st.integers(1, 4),
        data=st.data(),
    )
    def page(self, status, kind, oldest_first, limit, data):
        after = data.draw(st.sampled_from([None, *sorted(self.jobs)]))
        fit = [j for j in self.jobs.values() if (not kind or j.kind == kind) and (status is None or j.status in status)]
        fit = sorted(fit, key=lambda j: j.id, reverse=not oldest_first)
        fit = [j for j in fit if after is None or (j.id > after if oldest_first else j.id < after)]
        assert self.store.page(status, kind, after, limit, oldest_first) == fit[:limit]

    @invariant()
    def the_same(self):
        if hasattr(self, "store"):
            assert self.store.page(oldest_first=True, limit=1000) == sorted(self.jobs.values(), key=lambda j: j.id)
            assert sum(self.store.counts().values()) == len(self.jobs)

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.root)


class SqliteMachine(StoreMachine):
    ending = ".db"


quick = settings(max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
StoreMachine.TestCase.settings = SqliteMachine.TestCase.settings = quick
TestJsonModel, TestSqliteModel = StoreMachine.TestCase, SqliteMachine.TestCase


# Killed at any moment


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "lora_mvp.api.stores"])
    return context


def kill_rounds(forks, folder: Path, ending: str, rounds: int, longest: float) -> int:
    """How many answers were held against the store; each round goes on with the store of the one before."""
    chance, answers, said = random.Random(rounds), 0, {}
    for k in range(rounds):
        said = said if k % 20 else {}
        url, log = str(folder / f"{k // 20}" / f"jobs{ending}"), folder / f"answered-{k}"
        log.touch()
        process = forks.Process(target=submit_until_killed, args=(url, str(log)))
        process.start()
        end = time.monotonic() + 60
        while not log.stat().st_size and k % 5:  # each fifth dies while it begins
            assert process.is_alive() and time.monotonic() < end, "the process made nothing"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, longest))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        lines = log.read_text().splitlines()
        said |= dict(line.split() for line in lines)
        answers += len(lines)
        store = open_store(ApiConfig(db_path=url))
        assert store.recovered is None
        kept = {job.id: job for job in store.page(limit=100_000)}
        for id, version in said.items():
            if version == "gone":
                assert id not in kept, f"round {k}: a deleted job is back"
            else:  # a version later where the answer was on its way, or a deletion
                assert id in kept or version == "2", f"round {k}: a job that was answered for is lost"
                assert id not in kept or int(version) <= kept[id].version <= int(version) + 1
        store.close()
    return answers


@pytest.mark.parametrize("ending", [".json", ".db"])
def test_what_was_answered_survives_kill_9(forks, tmp_path, ending):
    assert kill_rounds(forks, tmp_path, ending, 20, 0.06) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".json", ".db"])
def test_what_was_answered_survives_kill_9_two_hundred_times(forks, tmp_path, ending):
    answers = kill_rounds(forks, tmp_path, ending, 200, 0.3)
    print(ending, "answers held against the store:", answers)


def test_a_second_process_is_refused_and_the_first_is_unharmed(forks, file_place):
    store = file_place.open()
    job = example()
    store.create(job)
    here, there = forks.Pipe()
    process = forks.Process(target=open_and_say, args=(file_place.url, there))
    process.start()
    assert here.poll(60)
    code, message = here.recv()
    process.join(60)
    assert code == "store_in_use" and file_place.url in message
    assert noted(store, job, engine_ref="1") and store.page()[0].engine_ref == "1"


# Full and broken disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("ending", [".json", ".db"])
def test_a_full_disk_stops_nothing_but_changes(small_disk, ending):
    place = Place(str(small_disk / f"jobs{ending}"))
    store = place.open()
    jobs = [example() for _ in range(5)]
    for job in jobs:
        store.create(job)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(LoraMvpError, match="space left|disk is full") as caught:
        for _ in range(1000):  # SQLite has some room in files that it has already
            job, created = store.create(example())
            jobs.append(job)
    assert caught.value.code == "store_failed" and str(small_disk) in caught.value.message
    assert store.problem and store.page(limit=2000, oldest_first=True) == jobs
    assert code_of(lambda: transition(store, jobs[0], "starting")) == "store_failed"
    assert store.get(jobs[0].id) == jobs[0]
    survivors = shutil.copytree(small_disk, small_disk.parent / "copy", ignore=lambda *_: ["filler"])
    filler.unlink()
    assert store.problem is None
    jobs[0] = transition(store, jobs[0], "starting")
    jobs.append(store.create(example())[0])
    store.close()
    store = place.open()
    assert store.page(limit=2000, oldest_first=True) == jobs and store.recovered is None
    store.close()
    assert not list(small_disk.glob("*.tmp"))
    left = Place(str(survivors / f"jobs{ending}")).open()  # had the machine died while the disk was full
    assert [job.id for job in left.page(limit=2000, oldest_first=True)] == [job.id for job in jobs[:-1]]
    left.close()


@pytest.mark.parametrize("step", ["the folder of a new journal", "a line", "the folder of a new file"])
def test_a_step_that_fails_late_is_undone(tmp_path, monkeypatch, step):
    store = JsonStore(tmp_path / "jobs.json")
    jobs = [store.create(example())[0]]
    store._change.file.due = (
        step != "a line"
    )  # so that the next change is in the file, and the one after begins a journal
    jobs.append(store.create(example())[0])
    store._change.file.due = step == "the folder of a new file"
    before = {file.name: file.read_bytes() for file in tmp_path.glob("jobs.json*") if file.suffix != ".bak"}
    sync = os.fsync
    with monkeypatch.context() as patch:
        broken = os.path.isfile if step == "a line" else os.path.isdir
        patch.setattr(os, "fsync", lambda n: bad_disk() if broken(f"/proc/self/fd/{n}") else sync(n))
        assert code_of(lambda: store.create(example())) == "store_failed"
        assert before.items() <= {file.name: file.read_bytes() for file in tmp_path.glob("jobs.json*")}.items()
        assert store.page(oldest_first=True) == jobs
        assert "Input/output error" in store.problem
    assert store.problem is None and noted(store, jobs[0], engine_ref="1")
    store.close()
    assert JsonStore(tmp_path / "jobs.json").get(jobs[0].id).engine_ref == "1"


def bad_disk():
    raise OSError(5, "Input/output error")


DAMAGE = {
    "truncated": lambda raw: raw[: len(raw) * 2 // 3],
    "empty": lambda raw: b"",
    "random": lambda raw: random.Random(0).randbytes(len(raw)),
    "nested": lambda raw: b"[" * 200_000,
    "other": lambda raw: json.dumps({"jobs": [{"id": 1}]}).encode(),
    "wrong schema": lambda raw: raw.replace(b'"schema_version": 2', b'"schema_version": 7'),
    "wrong checksum": lambda raw: raw.replace(b"cats", b"dogs"),
    "folder": None,
}
SQLITE_DAMAGE = ["truncated", "empty", "random", "other", "folder"]


def damage(file: Path, how: str) -> bytes | None:
    """What is now in its place; None for a folder."""
    if DAMAGE[how] is None:
        file.unlink()
        file.mkdir()
        return None
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    return file.read_bytes()


@pytest.mark.parametrize("how", DAMAGE)
def test_a_broken_state_file_is_moved_aside_and_its_jobs_come_back(tmp_path, how):
    file = tmp_path / "jobs.json"
    store = JsonStore(file)
    jobs = [example() for _ in range(3)]
    for job in jobs:
        store.create(job)
    started = transition(store, jobs[0], "starting")
    last = store.create(example())[0]  # the backup is from before it, and its journal has it
    store.close()
    broken = damage(file, how)
    with_folders = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-folders") / "jobs.json"

    store = JsonStore(file)
    assert store.page(oldest_first=True) == [started, *jobs[1:], last]
    assert str(file) in store.recovered and "from what could be read" in store.recovered and store.problem is None
    (aside,) = tmp_path.glob("jobs.json.corrupt-*")
    assert aside.is_dir() if broken is None else aside.read_bytes() == broken
    assert noted(store, started, engine_ref="1")
    store.close()
    assert JsonStore(file).recovered is None

    for journal in with_folders.parent.glob("*.journal-*"):
        journal.unlink()
    store = JsonStore(with_folders, rebuild=lambda: [started, *jobs[1:], last])
    assert store.page(oldest_first=True) == [started, *jobs[1:], last]
    store.close()


def killed_with_a_journal(folder: Path, jobs: int = 4) -> tuple[list[Job], Path]:
    """Jobs of a server that was killed, one written into the file and the others into the journal; the journal."""
    (folder / "alive").mkdir()
    store = JsonStore(folder / "alive" / "jobs.json")
    made = [store.create(example())[0]]
    store._change.file.due = True
    made += [store.create(example())[0] for _ in range(jobs - 1)]
    made.append(store.create(example())[0])
    shutil.copytree(folder / "alive", folder / "left")
    store.close()
    return made, next((folder / "left").glob("jobs.json.journal-2-*"))


def test_a_line_that_was_cut_off_at_any_byte_costs_nothing_but_itself(tmp_path):
    jobs, journal = killed_with_a_journal(tmp_path)
    raw = journal.read_bytes()
    lines = [k for k, byte in enumerate(raw) if byte == 10]
    assert len(lines) == 3
    for end in [0, 1, 17, *lines, *(k + 1 for k in lines), len(raw) - 5, *range(3, len(raw), 53)]:
        folder = shutil.copytree(tmp_path / "left", tmp_path / f"{end}", dirs_exist_ok=True)
        (folder / journal.name).write_bytes(raw[:end])
        store = JsonStore(folder / "jobs.json", rebuild=lambda: pytest.fail("nothing is lost"))
        assert store.page(oldest_first=True) == jobs[: 2 + raw[:end].count(b"\n")] and store.recovered is None
        new = store.create(example())[0]
        store.close()
        assert JsonStore(folder / "jobs.json").page(limit=1) == [new]


def test_a_journal_that_was_changed_is_moved_aside_and_the_rest_of_it_read(tmp_path):
    jobs, journal = killed_with_a_journal(tmp_path)
    raw = journal.read_bytes()
    second = raw.index(b"\n") + 1
    third = raw.index(b"\n", second) + 1
    kinds = {f"bit {k}": raw[:k] + bytes([raw[k] ^ 1]) + raw[k + 1 :] for k in range(second, third - 1, 61)}
    kinds |= {"a line less": raw[:second] + raw[third:], "a disk block": raw[:second] + bytes(40) + raw[second + 40 :]}
    for name, wrong in kinds.items():
        folder = shutil.copytree(tmp_path / "left", tmp_path / name)
        (folder / journal.name).write_bytes(wrong)
        with_folders = shutil.copytree(folder, tmp_path / f"{name} and folders")
        store = JsonStore(folder / "jobs.json")
        assert store.page(oldest_first=True) == [*jobs[:3], jobs[4]], name
        assert journal.name in store.recovered and len(list(folder.glob("*.corrupt-*"))) == 1
        store.close()
        store = JsonStore(with_folders / "jobs.json", rebuild=lambda: jobs)
        assert store.page(oldest_first=True) == jobs, name
        store.close()


def test_a_journal_of_another_file_is_not_applied(tmp_path, caplog):
    jobs, journal = killed_with_a_journal(tmp_path)
    earlier = tmp_path / "left" / "jobs.json.bak"
    earlier.replace(tmp_path / "left" / "jobs.json")  # as if somebody had put an old copy back
    store = JsonStore(tmp_path / "left" / "jobs.json")
    assert store.page(oldest_first=True) == jobs[:0] + store.page(oldest_first=True)
    assert not {job.id for job in jobs[2:]} & {job.id for job in store.page()}
    assert f"{journal.name} belongs to another jobs.json" in caplog.text and journal.exists()
    store.close()


def test_a_file_of_the_version_before_journals_is_taken_over(tmp_path):
    file, jobs = tmp_path / "jobs.json", [example() for _ in range(3)]
    raw = pack_jobs(41, [job.model_dump_json().encode() for job in jobs])
    old = raw.replace(b'"schema_version": 2', b'"schema_version": 1')
    file.write_bytes(old)
    store = JsonStore(file, rebuild=lambda: pytest.fail("nothing is lost"))
    assert store.page(oldest_first=True) == jobs and store.recovered is None
    assert (tmp_path / "jobs.json.bak").read_bytes() == old and unpack_jobs(file.read_bytes()).schema == 2
    started = transition(store, jobs[0], "starting")
    store.close()
    assert JsonStore(file).page(oldest_first=True) == [started, *jobs[1:]]


def test_the_file_is_whole_when_no_server_runs_and_journals_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(state_file, "LEAST_JOURNAL", 2000)
    store = JsonStore(tmp_path / "jobs.json")
    for _ in range(60):
        job = transition(store, store.create(example())[0], "starting")
        store.delete(transition(store, job, "succeeded").id)
        assert len(list(tmp_path.glob("*.journal-*"))) <= 2
    (last,) = [store.create(example())[0]]
    assert unpack_jobs((tmp_path / "jobs.json").read_bytes()).number > 10
    store.close()
    assert unpack_jobs((tmp_path / "jobs.json").read_bytes()).jobs == [last]


def test_the_checksum_covers_every_byte_of_the_jobs():
    raw = pack_jobs(1, [example().model_dump_json().encode() for _ in range(3)])
    start = raw.index(b"[\n") + 2
    for k in range(start, len(raw), 97):
        changed = raw[:k] + bytes([raw[k] ^ 1]) + raw[k + 1 :]
        with pytest.raises(ValueError):
            unpack_jobs(changed)


@pytest.mark.parametrize("ending, how", [(".json", how) for how in DAMAGE] + [(".db", how) for how in SQLITE_DAMAGE])
def test_without_a_backup_jobs_come_from_folders_or_the_store_is_refused(tmp_path, ending, how):
    place = Place(str(tmp_path / f"jobs{ending}"))
    file = Path(place.url)
    store = place.open()
    jobs = [example() for _ in range(30)]
    for job in jobs:
        store.create(job)
    store.close()
    for backup in [*tmp_path.glob("*.bak"), *tmp_path.glob("*.journal-*")]:
        backup.unlink()
    broken = damage(file, how)
    for _ in range(2):
        with pytest.raises(LoraMvpError, match="no backup and no job folder") as caught:
            place.open()
        assert caught.value.code == "store_failed" and str(file) in caught.value.message
        assert file.is_dir() if broken is None else file.read_bytes() == broken
    store = place.open(rebuild=lambda: jobs[:20])
    assert store.page(oldest_first=True, limit=100) == jobs[:20]
    assert store.recovered and list(tmp_path.glob(f"jobs{ending}.corrupt-*"))
    store.close()
    assert place.open().recovered is None
    place.opened[-1].close()


def test_a_broken_backup_is_moved_aside_too(tmp_path):
    store = JsonStore(tmp_path / "jobs.json")
    jobs = [store.create(example())[0] for _ in range(3)]
    store.close()
    (tmp_path / "jobs.json").write_bytes(b"")
    (tmp_path / "jobs.json.bak").write_bytes(b"x")
    for journal in tmp_path.glob("*.journal-*"):
        journal.unlink()
    store = JsonStore(tmp_path / "jobs.json", rebuild=lambda: jobs)
    assert store.page(oldest_first=True) == jobs
    assert len(list(tmp_path.glob("jobs.json.corrupt-*"))) == len(list(tmp_path.glob("*.bak.corrupt-*"))) == 1
    store.close()


def test_a_log_of_a_lost_database_is_not_applied_to_the_new_one(tmp_path):
    """SQLite's write-ahead log outlives a killed process, and the file that it belongs to may not."""
    store = SqlStore(f"sqlite:///{tmp_path / 'old' / 'jobs.db'}")
    store.create(example())
    folder = shutil.copytree(tmp_path / "old", tmp_path / "new")
    store.close()
    assert (folder / "jobs.db-wal").stat().st_size
    (folder / "jobs.db").write_bytes(bytes(100))
    job = example()
    store = SqlStore(f"sqlite:///{folder / 'jobs.db'}", rebuild=lambda: [job])
    assert store.page() == [job] and len(list(folder.glob("jobs.db-wal.corrupt-*"))) == 1
    store.close()


def test_a_database_of_another_program_or_layout_is_left_alone(tmp_path):
    file = tmp_path / "jobs.db"
    for statement in (
        "CREATE TABLE theirs (x)",
        "CREATE TABLE lora_mvp_schema (version); INSERT INTO lora_mvp_schema VALUES (9)",
    ):
        with sqlite3.connect(file) as connection:
            connection.executescript(statement)
        connection.close()
        before = file.read_bytes()
        assert code_of(lambda: SqlStore(f"sqlite:///{file}")) == "store_failed"
        assert file.read_bytes() == before


def test_a_state_file_that_may_not_be_written_can_still_be_replaced(tmp_path):
    """Its folder decides; only a folder without write access stops the service."""
    store = JsonStore(tmp_path / "jobs.json")
    job = store.create(example())[0]
    store.close()
    (tmp_path / "jobs.json").chmod(0o400)
    store = JsonStore(tmp_path / "jobs.json")
    assert store.page() == [job] and noted(store, job, engine_ref="1") and store.recovered is None
    store.close()
    assert (tmp_path / "jobs.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("ending", [".json", ".db"])
def test_a_read_only_disk_is_named(small_disk, ending):
    place = Place(str(small_disk / f"jobs{ending}"))
    store = place.open()
    store.create(example())
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(LoraMvpError, match="Read-only file system") as caught:
        place.open()
    assert caught.value.code == "store_failed" and str(small_disk) in caught.value.message


# Many jobs


def test_a_state_file_has_a_limit_and_names_the_way_out(tmp_path):
    jobs = [example() for _ in range(10_000)]
    StateFile(tmp_path / "jobs.json").write(job.model_dump_json().encode() for job in jobs)
    written = (tmp_path / "jobs.json").stat().st_ino
    store = JsonStore(tmp_path / "jobs.json")
    with pytest.raises(LoraMvpError, match="10,000 jobs.*SQLite") as caught:
        store.create(example())
    assert caught.value.code == "store_full"
    assert noted(store, jobs[5000], engine_ref="1")
    store.delete(jobs[0].id)
    assert store.create(example())[1]
    assert code_of(lambda: store.create(example())) == "store_full"
    assert store.page(oldest_first=True, limit=1)[0] == jobs[1]
    assert (tmp_path / "jobs.json").stat().st_ino == written, "a change does not write 10,000 jobs"
    assert sum(file.stat().st_size for file in tmp_path.glob("*.journal-*")) < 3000
    store.close()


def test_many_clients_share_a_write(tmp_path, monkeypatch):
    store = JsonStore(tmp_path / "jobs.json")
    really_append, begun, all_wait = StateFile.append, threading.Event(), threading.Event()

    def append_when_all_wait(file, jobs, gone):
        begun.set()
        assert all_wait.wait(60)
        really_append(file, jobs, gone)

    monkeypatch.setattr(StateFile, "append", append_when_all_wait)
    with ThreadPoolExecutor(41) as pool:
        answers = [pool.submit(store.create, example())]
        assert begun.wait(60)
        answers += [pool.submit(store.create, example()) for _ in range(40)]
        end = time.monotonic() + 60
        while store._change.waiting.qsize() < 40:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert store.page() == [] and not any(answer.done() for answer in answers), "no answer before the write"
        all_wait.set()
    assert all(answer.result()[1] for answer in answers)
    assert store._change.file.journal.count == 2
    store.close()


def test_the_database_looks_things_up_and_does_not_search(tmp_path):
    store = SqlStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    asked = []
    sa.event.listen(sa.Engine, "before_cursor_execute", note := lambda *a: asked.append((a[2], a[3])))
    try:
        job, _ = store.create(example(owner="me", key="k"))
        job = transition(store, job, "starting")
        store.page(status={"queued"}, limit=5, oldest_first=True)
        store.page(limit=50, after=job.id)
        store.counts()
        store.delete(job.id)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    store.close()
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        plans = {
            text: str(connection.execute(f"EXPLAIN QUERY PLAN {text}", given).fetchall())
            for text, given in asked
            if "lora_mvp" in text
        }
    connection.close()
    assert len(plans) == 8
    for text, plan in plans.items():
        assert "SCAN" not in plan or "COVERING INDEX" in plan, (text, plan)
        assert "TEMP B-TREE" not in plan, (text, plan)


# PostgreSQL


def test_a_connection_that_breaks_is_made_anew(server, request):
    place = make_place("postgresql", None, request)
    store = place.open()
    job = store.create(example())[0]
    assert server.cut_connections() >= 1
    assert store.get(job.id) == job
    assert noted(store, job, engine_ref="1") and store.problem is None
    assert code_of(place.open) == "store_in_use", "the new connection holds the lock again"
    store.close()


def test_a_connection_that_is_reset_is_made_anew(server, request, caplog):
    user = sa.make_url(make_place("postgresql", None, request).url).username
    with over_tcp(server) as line:
        store = SqlStore(line.url(user))
        job, engine = store.create(example())[0], store._database.engine
        for connection in [engine.connect() for _ in range(3)]:  # so many wait in the pool
            connection.close()
        for _ in range(2):
            line.cut()
            assert store.get(job.id) == job and store.page() == [job]
        line.cut()
        assert (job := noted(store, job, engine_ref="1")) and store.problem is None
        sa.event.listen(engine, "before_cursor_execute", cut := lambda *a: "INSERT" in a[2] and line.cut())
        with pytest.raises(LoraMvpError, match="Connection reset by peer|Broken pipe") as caught:
            store.create(example())
        sa.event.remove(engine, "before_cursor_execute", cut)
        assert caught.value.code == "store_failed" and "geheim" not in caught.value.message
        assert store.problem is None and store.page() == [job] and store.create(example())[1]
        store.close()
    told = [record for record in caplog.records if record.levelname != "DEBUG"]
    assert told and all(record.name == "lora_mvp.api.sql_store" and not record.exc_info for record in told)
    assert "geheim" not in caplog.text


def test_a_server_that_lost_its_lock_writes_no_more(server, request):
    place = make_place("postgresql", None, request)
    store = place.open()
    job = store.create(example())[0]
    server.cut_connections()
    other = place.open()
    assert code_of(lambda: noted(store, job, engine_ref="1")) == "store_in_use"
    assert "in use by another server" in store.problem
    assert other.get(job.id) == job and noted(other, job, engine_ref="2")
    other.close()
    assert store.problem is None and store.get(job.id).engine_ref == "2"
    store.close()


def test_the_database_goes_away_and_comes_back(server, request):
    place = make_place("postgresql", None, request)
    store = place.open()
    job = store.create(example())[0]
    server.stop()
    try:
        assert code_of(lambda: store.create(example())) == "store_failed"
        assert code_of(lambda: store.get(job.id)) == code_of(store.page) == code_of(store.counts) == "store_failed"
        assert store.problem and "geheim" not in store.problem
        assert code_of(place.open) == "store_failed"
    finally:
        server.start()
    assert store.problem is None and store.page() == [job]
    assert noted(store, job, engine_ref="1") and store.create(example())[1]
    store.close()
    assert len(place.open().page()) == 2
    place.opened[-1].close()


def test_another_layout_in_the_database_is_refused(server, request):
    place = make_place("postgresql", None, request)
    place.open().close()
    user = sa.make_url(place.url).username
    server.sql(f"UPDATE {user}.lora_mvp_schema SET version = 9")
    with pytest.raises(LoraMvpError, match="layout 9") as caught:
        place.open()
    assert caught.value.code == "store_failed" and "geheim" not in caught.value.message


@pytest.mark.parametrize(
    "change, said",
    [
        ({"password": "falsch"}, "password authentication failed"),
        ({"password": None}, "password authentication failed"),
        ({"database": "nothing"}, 'database "nothing" does not exist'),
        ({"query": {"sslmode": "require"}}, "unexpected keyword argument 'sslmode'"),
        ({"query": {"unix_sock": "/nowhere"}}, "No such file"),
    ],
)
def test_what_the_database_refuses_is_said_in_its_words(server, change, said):
    url = sa.make_url(server.url())._replace(**change).render_as_string(hide_password=False)
    with pytest.raises(LoraMvpError, match=said) as caught:
        SqlStore(url)
    assert caught.value.code == "store_failed" and "{" not in caught.value.message
    assert "geheim" not in caught.value.message and "falsch" not in caught.value.message


def test_addresses_that_lead_nowhere_are_named_without_their_password(monkeypatch):
    url = "postgresql+pg8000://me:geheim@127.0.0.1:1/jobs"
    with pytest.raises(LoraMvpError, match=r"me:\*\*\*@127.0.0.1:1/jobs: .*Connection refused") as caught:
        SqlStore(url)
    assert caught.value.code == "store_failed" and "geheim" not in caught.value.message
    monkeypatch.setitem(sys.modules, "pg8000", None)
    with pytest.raises(LoraMvpError, match=r"lora-mvp\[postgres\]"):
        SqlStore(url)
