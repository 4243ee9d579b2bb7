"""A PostgreSQL server of Debian's packages, for the time of some tests."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
import sqlalchemy as sa

SETTINGS = "listen_addresses= fsync=on shared_buffers=16MB max_connections=40 dynamic_shared_memory_type=mmap".split()


def programs() -> Path:
    """The folder of its programs; the test is skipped where there is none, but not on CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    if not found and "CI" not in os.environ:
        pytest.skip("PostgreSQL is not installed")
    assert found, "on CI PostgreSQL must be there: apt-get install postgresql"
    return found[-1].parent


class Postgres:
    """A server that listens on a socket in its own folder, and nowhere else."""

    def __init__(self, folder: Path):
        self.programs, self.folder, self.running = programs(), folder, None
        self.user = {}
        if os.geteuid() == 0:  # it refuses to run as root; the package makes a user for it
            shutil.chown(folder, "postgres", "postgres")
            self.user = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}
        command = [self.programs / "initdb", "-D", folder / "data", "-U", "tester", "-A", "trust", "--no-sync"]
        subprocess.run([*command, "-E", "UTF8", "--locale=C.UTF-8"], check=True, capture_output=True, **self.user)
        self.admin = sa.create_engine(self.url(), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def url(self, schema: str = "public") -> str:
        where = f"host={quote(str(self.folder))}&options={quote(f'-csearch_path={schema}')}"
        return f"postgresql+psycopg://tester:geheim@/postgres?{where}"

    def start(self) -> None:
        settings = [word for setting in SETTINGS for word in ("-c", setting)]
        command = [self.programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *settings]
        with open(os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w") as log:
            self.running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **self.user)
        end = time.monotonic() + 60
        while not self.answers():
            assert self.running.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return self.sql("SELECT 1") == 1
        except sa.exc.OperationalError:
            return False

    def sql(self, text: str):
        with self.admin.connect() as connection:
            result = connection.exec_driver_sql(text)
            return result.scalar() if result.returns_rows else None

    def cut_connections(self) -> int:
        others = "pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        return self.sql(f"SELECT count(pg_terminate_backend(pid)) FROM {others}")

    def stop(self) -> None:
        """At once, as in a crash."""
        self.running.send_signal(signal.SIGQUIT)
        try:
            self.running.wait(60)
        finally:
            if self.running.poll() is None:
                os.killpg(self.running.pid, signal.SIGKILL)
                self.running.wait()


@contextmanager
def postgres():
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # the name of a socket may not be longer than 107 bytes
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)
