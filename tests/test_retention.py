"""What goes after a while, and what a server that was killed leaves behind."""

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from api_server import Resting, places

from lora_mvp.api import retention
from lora_mvp.api.jobs import JobSpec
from lora_mvp.api.service import Service
from lora_mvp.api.stores import open_store
from lora_mvp.config import AppConfig, LoraMvpError

ASKED = JobSpec(manifest="cats/manifest.json")


class Server:
    """A service without HTTP, whose store is a JSON file or SQLite."""

    def __init__(self, root: Path, ending: str, **api):
        config = {"api": places(root, db_path=str(root / f"jobs{ending}"), **api)}
        config["training"] = {"pretrained_model": "tiny"}
        self.config = AppConfig.model_validate(config)
        self.store = open_store(self.config.api)
        self.service = Service(self.config, self.store, Resting())
        self.folders = self.config.api.jobs_dir

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.store.close()

    def ended(self, key=None):
        job = self.service.submit("train", ASKED, "me", key)[0]
        (self.service.folder(job).run).mkdir()
        (self.service.folder(job).run / "samples.png").write_bytes(b"picture")
        return self.service.cancel(job.id)

    def kept(self) -> set[str]:
        return {job.id for job in self.service.page(limit=1000)}

    def known_folders(self) -> set[str]:
        return {path.name for path in self.folders.iterdir()}


@pytest.fixture
def ending():
    return ".json"


BOTH = pytest.mark.parametrize("ending", [".json", ".sqlite"])


def killed(action):
    """A process that is killed, as by `kill -9`, in the middle of an action."""
    child = os.fork()
    if not child:
        action()
        os._exit(0)  # it was not killed
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@BOTH
def test_only_ended_jobs_beyond_the_number_go_with_their_folders(tmp_path, ending):
    with Server(tmp_path, ending, keep_jobs=2) as server:
        jobs = [server.ended() for _ in range(4)]
        keyed, waiting = server.ended(key="K"), server.service.submit("train", ASKED)[0]
        server.service.tick()
        left = {keyed.id, jobs[-1].id, waiting.id}
        assert server.kept() == server.known_folders() == left
        assert server.service.folder(keyed).run.joinpath("samples.png").read_bytes() == b"picture"
        assert server.service.submit("train", ASKED, "me", "K") == (keyed, False)
    with Server(tmp_path, ending) as server:  # without settings nothing goes
        server.service.tick()
        assert server.kept() == left


def test_old_jobs_go_and_those_that_another_needs_stay(tmp_path, ending):
    with Server(tmp_path, ending, keep_days=30) as server:
        old = [server.ended() for _ in range(3)]
        month = timedelta(days=31)
        for job in old:  # as if it had been then
            then = {"created_at": job.created_at - month, "finished_at": job.finished_at - month}
            assert server.store.swap(job, job.model_copy(update={"version": job.version + 1} | then))
        new = server.ended()
        again, _ = server.service.retry(old[1].id)
        server.service.tick()
        assert server.kept() == server.known_folders() == {old[1].id, new.id, again.id}


def test_many_at_once_go_a_few_at_a_time(tmp_path):
    with Server(tmp_path, ".json", keep_jobs=1) as server:
        for _ in range(7):
            server.ended()
        prune = partial(retention.prune, server.service.records, server.config.api, most=3)
        assert [prune(), prune()] == [True, True] and len(server.kept()) == 1
        assert not prune()


def test_a_job_whose_folder_cannot_be_removed_is_told_and_removed_later(tmp_path, ending, monkeypatch, caplog):
    with Server(tmp_path, ending, keep_jobs=1) as server:
        jobs = [server.ended() for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(retention.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
            server.service.tick()
        assert "cannot be tidied" in caplog.text and server.kept() == {jobs[1].id}
    with Server(tmp_path, ending, keep_jobs=1) as server:
        server.service.tick()
        assert server.kept() == server.known_folders() == {jobs[1].id}


@BOTH
@pytest.mark.parametrize("moment", ["before the record", "before the folder was told", "after the record"])
def test_a_submit_that_was_killed_is_whole_or_gone(tmp_path, ending, moment):
    def submit():
        with Server(tmp_path, ending) as server:
            service, create = server.service, server.store.create
            if moment == "before the record":
                server.store.create = kill
            elif moment == "before the folder was told":
                service.records.say = kill
            else:
                server.store.create = lambda job: (create(job), kill())
            service.submit("train", ASKED, "me", "K")

    killed(submit)
    with Server(tmp_path, ending) as server:
        assert len(server.known_folders()) == len(server.kept()) == (moment != "before the folder was told")
        job, created = server.service.submit("train", ASKED, "me", "K")  # the client asks again
        assert created == (moment == "before the folder was told")
        assert server.kept() == server.known_folders() == {job.id}
        assert server.service.folder(job).settings.exists() and job.status == "queued"


def test_a_removal_that_was_killed_is_finished_by_the_next_server(tmp_path, ending):
    with Server(tmp_path, ending) as server:
        jobs = [server.ended() for _ in range(2)]

    def remove():
        with Server(tmp_path, ending) as server:
            retention.shutil.rmtree = lambda path, **_: path.exists() and kill()
            server.service.delete(jobs[0].id, artifacts=True)

    killed(remove)
    assert [path.name for path in (tmp_path / "jobs").glob(".*")] == [f".gone-{jobs[0].id}"]
    with Server(tmp_path, ending) as server:
        server.service.tick()
        assert server.kept() == server.known_folders() == {jobs[1].id}


@BOTH
def test_what_a_client_kept_stays_and_what_was_lost_comes_back(tmp_path, ending):
    with Server(tmp_path, ending) as server:
        jobs = [server.ended() for _ in range(3)]
        server.service.delete(jobs[0].id)  # the record alone
        server.store.delete(jobs[1].id)  # as if the disk had lost it
    with Server(tmp_path, ending) as server:
        server.service.tick()
        assert server.kept() == {jobs[1].id, jobs[2].id}
        assert server.service.get(jobs[1].id).status == "cancelled"
        assert server.known_folders() == {job.id for job in jobs}
        assert (server.folders / jobs[0].id / "run" / "samples.png").exists()
        with pytest.raises(LoraMvpError):
            server.service.get(jobs[0].id)


def test_folders_that_are_no_jobs_are_left_alone(tmp_path, ending):
    with Server(tmp_path, ending) as server:
        job = server.ended()
        (server.folders / "notes").mkdir()
        (server.folders / "0123456789ABCDEFGHJKMNPQRS").write_text("a file")
        (server.folders / "readme.txt").write_text("mine")
    with Server(tmp_path, ending, keep_jobs=1) as server:
        server.service.tick()
        assert server.known_folders() == {job.id, "notes", "0123456789ABCDEFGHJKMNPQRS", "readme.txt"}
