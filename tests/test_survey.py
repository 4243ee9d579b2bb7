"""Many files, bad decoders, damaged caches: one bad file costs one file, and a known file costs nothing."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import survey_looks
from browser import wait_for

import lora_mvp.data.looks
import lora_mvp.data.workers
from lora_mvp.config import LoraMvpError
from lora_mvp.data.survey import sealed, survey, unsealed

HERE = Path(__file__).parent
BAD = {
    "kill": "the decoder ended with signal 9",
    "segfault": "the decoder ended with signal 11",
    "exit": "the decoder ended with exit code 3",
    "quit": "the decoder raised SystemExit: enough",
    "hang": "no answer after 1.5 s",
    "spin": "no answer after 1.5 s",
    "raise": "the decoder raised RuntimeError: no pixels",
    "allocate": "the decoder raised MemoryError: ",
}


def files(folder, names):
    """One file per name, its content its name."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(os.fsencode(path.name))
    return paths


OTHERS = set()  # children that earlier tests of this process have left


def children():
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def _others():
    OTHERS.clear()
    OTHERS.update(children())


def running():
    """The children that the test started, zombies included."""
    return sorted(children() - OTHERS)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


class Seen:
    """A folder of twelve files and its cache; counts what is really looked at."""

    def __init__(self, tmp_path):
        self.log, self.cache = tmp_path / "log", tmp_path / "cache" / "inspection.jsonl"
        self.paths = files(tmp_path / "raw", [f"fine-{i:02}.png" for i in range(12)])

    def survey(self, **options):
        self.log.write_text("")
        found = list(survey(self.paths, self.cache, look=survey_looks.look, log=str(self.log), **options))
        self.looked = len(self.log.read_text().splitlines())
        assert [look.detail for look in found] == [path.read_text() for path in self.paths]
        return found


@pytest.fixture
def seen(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_mvp.data.workers, "RACY", 0)
    return Seen(tmp_path)


@pytest.fixture
def no_workers(monkeypatch):
    """Call it, and from then on a worker that is started fails the test."""

    def forbid(*args):
        raise AssertionError("a worker was started")

    return lambda: monkeypatch.setattr(lora_mvp.data.workers, "Worker", forbid)


@pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as Linux has them")
def test_one_bad_file_costs_one_file(tmp_path):
    names = [f"fine-{i:02}" for i in range(20)]
    for i, word in enumerate(BAD):
        names.insert(2 * i + 1, f"{word}-{i}")
    paths = files(tmp_path, [*names, "print-1", "kill-2"])
    found = list(survey(paths, workers=3, look=survey_looks.look, time_limit=1.5, log=str(tmp_path / "log")))
    assert len(found) == len(paths)
    for path, look in zip(paths, found):
        word = path.name.split("-")[0]
        expected = (None, path.name) if word in ("fine", "print") else ("decoder_crash", BAD[word])
        assert (look.code, look.detail) == expected
    looked = (tmp_path / "log").read_text().splitlines()
    assert sorted(looked) == sorted(str(path) for path in paths)  # each once
    assert not running()


def test_the_first_file_hangs_and_the_others_go_on(tmp_path):
    paths = files(tmp_path, ["hang-0", *(f"fine-{i}" for i in range(20))])
    log = tmp_path / "log"
    log.touch()
    stream = survey(paths, workers=2, look=survey_looks.look, log=str(log))

    def all_looked_at():
        wait_for(lambda: len(log.read_text().splitlines()) == len(paths))
        for pid in running():
            os.kill(pid, 9)

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(all_looked_at)
        assert next(stream).code == "decoder_crash"
        ended.result()  # the others were looked at while the first one hung
    found = [look.detail for look in stream]
    assert len(found) == 20 and found[:-1] == [path.name for path in paths[1:-1]]  # the last answer may be lost


def test_a_survey_that_is_dropped_leaves_nothing(tmp_path):
    paths = files(tmp_path, [f"fine-{i}" for i in range(8)] + ["hang-0", "hang-1"])
    stream = survey(paths, workers=2, look=survey_looks.look, log=str(tmp_path / "log"))
    next(stream)
    assert running()
    stream.close()
    assert not running()


def test_a_slow_reader_is_not_blamed_on_the_files(tmp_path):
    paths = files(tmp_path, [f"fine-{i}" for i in range(4)])
    for look, path in zip(survey(paths, workers=2, look=survey_looks.look, time_limit=1.5), paths):
        time.sleep(1.6 if path == paths[0] else 0)
        assert look.detail == path.name


def test_an_idle_worker_that_is_killed_costs_no_file(tmp_path, monkeypatch):
    paths, boxes = files(tmp_path, [f"fine-{i}" for i in range(6)]), []

    class Watched(lora_mvp.data.workers.Worker):
        def __init__(self, arguments, inbox, errors):
            boxes.append(inbox)
            super().__init__(arguments, inbox, errors)

    monkeypatch.setattr(lora_mvp.data.workers, "Worker", Watched)
    stream = survey(paths, workers=1, look=survey_looks.look, log=str(tmp_path / "log"))
    found = [next(stream)]
    wait_for(lambda: boxes[0].qsize() == 1)  # it has answered, and nobody has asked it again
    for pid in running():
        os.kill(pid, 9)
    wait_for(lambda: boxes[0].qsize() == 2)  # its end is known
    found += stream
    assert len(boxes) == 2
    assert [look.detail for look in found] == [path.name for path in paths]


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.append({here!r})
import survey_looks
from lora_mvp.data.survey import survey

for look in survey(sorted(Path({folder!r}).glob("*-*")), Path({cache!r}), workers=2, look=survey_looks.look, time_limit={limit}):
    print(look.detail, flush=True)
print("done")
"""  # no guard around the main program


def script(tmp_path, limit=60.0):
    place = tmp_path / "script.py"
    texts = {"here": str(HERE), "folder": str(tmp_path / "raw"), "cache": str(tmp_path / "cache.jsonl")}
    place.write_text(SCRIPT.format(limit=limit, **texts))
    return place


@pytest.mark.parametrize("how", ["file", "standard input"])
def test_a_script_without_a_guard(tmp_path, how):
    files(tmp_path / "raw", ["fine-1", "fine-2"])
    place = script(tmp_path)
    command = [sys.executable, "-" if how == "standard input" else str(place)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, input=place.read_text(), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split() == ["fine-1", "fine-2", "done"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("word", ["hang", "spin"])
def test_workers_end_with_a_killed_parent(tmp_path, word):
    files(tmp_path / "raw", ["fine-1", f"{word}-1"])
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    with subprocess.Popen(
        [sys.executable, str(script(tmp_path, 60 if word == "hang" else 0.8))], stdout=subprocess.PIPE, env=env
    ) as parent:
        parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.send_signal(signal.SIGKILL)
    assert len(children) == 2
    wait_for(lambda: not any(map(alive, children)))  # a hanging one by its input, a spinning one by its time


def test_workers_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_mvp.data.workers, "START", "import no_such_module")
    with pytest.raises(LoraMvpError, match="no_such_module") as caught:
        list(survey(files(tmp_path, ["fine-1"]), look=survey_looks.look))
    assert caught.value.code == "workers_fail"


def test_odd_names_and_odd_files(tmp_path):
    paths = files(tmp_path, ["fine-line\nbreak", "fine-😀", os.fsdecode(b"fine-\xff\xfe"), "fine-" + "x" * 240])
    (tmp_path / "link").symlink_to(paths[0])
    os.mkfifo(tmp_path / "fifo")
    odd = [tmp_path / "absent", tmp_path / "link", tmp_path / "fifo", tmp_path, Path("zero\0byte")]
    cache = tmp_path / "inspection.jsonl"
    for _ in range(2):
        found = list(survey([*paths, *odd], cache))  # the real function that looks
        assert [look.code for look in found[:4]] == ["unreadable"] * 4 and all(look.sha256 for look in found[:4])
        assert [look.code for look in found[4:]] == ["unreadable", *["not_a_file"] * 3, "unreadable"]
    assert list(survey([])) == []


def test_the_second_run_reads_nothing(seen, no_workers):
    first = seen.survey()
    assert seen.looked == 12
    no_workers()
    before = seen.cache.read_bytes()
    assert seen.survey() == first and seen.looked == 0
    assert seen.cache.read_bytes() == before


def test_what_changed_is_looked_at_again(seen):
    seen.survey()
    seen.paths[0].rename(seen.paths[0].with_name("renamed"))
    seen.paths[0] = seen.paths[0].with_name("renamed")
    os.utime(seen.paths[1])
    seen.paths[2].chmod(0o600)
    seen.survey()
    assert seen.looked == 0  # hashed, not looked at
    info = seen.paths[3].stat()
    seen.paths[3].write_text("FINE-03.png")  # same size, same mtime, same inode
    os.utime(seen.paths[3], ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (seen.paths[3].stat().st_size, seen.paths[3].stat().st_mtime_ns) == (info.st_size, info.st_mtime_ns)
    seen.paths[4].write_text("another content")
    seen.survey()
    assert seen.looked == 2
    seen.survey()
    assert seen.looked == 0


def test_other_options_other_looks(seen, tmp_path):
    seen.survey()
    other = tmp_path / "other log"
    found = list(survey(seen.paths, seen.cache, look=survey_looks.look, log=str(other)))
    assert len(found) == len(other.read_text().splitlines()) == 12
    seen.survey()
    assert seen.looked == 0  # both are kept


def test_another_version_of_the_code_looks_again(seen, monkeypatch):
    seen.survey()
    monkeypatch.setattr(lora_mvp.data.looks, "LOOK_VERSION", -1)
    seen.survey()
    assert seen.looked == 12


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path, no_workers, monkeypatch):
    seen, now = Seen(tmp_path), time.time_ns()  # with the real two seconds, but another clock
    monkeypatch.setattr(lora_mvp.data.workers, "time", SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: now))
    seen.survey()
    assert b'"stamp"' not in seen.cache.read_bytes()
    now = max(path.stat().st_ctime_ns for path in seen.paths) + 2 * 10**9 + 1
    seen.survey()
    assert seen.looked == 0 and seen.cache.read_bytes().count(b'"stamp"') == 12
    no_workers()
    seen.survey()


def test_a_crash_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_mvp.data.workers, "RACY", 0)
    paths = files(tmp_path, ["fine-1", "kill-1", "raise-1"])
    log = tmp_path / "log"
    for _ in range(2):
        codes = [x.code for x in survey(paths, tmp_path / "c", look=survey_looks.look, log=str(log))]
        assert codes == [None, "decoder_crash", "decoder_crash"]
    assert sorted(Path(line).name for line in log.read_text().splitlines()) == [
        "fine-1",
        *["kill-1"] * 2,
        *["raise-1"] * 2,
    ]


def test_a_cache_cut_anywhere(seen):
    first = seen.survey()
    whole = seen.cache.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 2):
        seen.cache.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        looks = sum(b'"settings"' in line for line in whole.splitlines()[:lines])
        assert seen.survey() == first and seen.looked == 12 - looks
        assert seen.cache.read_bytes().count(b"\n") == 24 and seen.cache.read_bytes().startswith(
            whole[:cut].rpartition(b"\n")[0]
        )


@pytest.mark.parametrize("damage", ["garbage", "flipped", "no json", "zeros"])
def test_a_damaged_cache(seen, damage, caplog):
    first = seen.survey()
    whole = seen.cache.read_bytes()
    spoilt = {
        "garbage": random.Random(1).randbytes(5000),
        "flipped": whole.replace(b'"bytes": 11', b'"bytes": 12', 1),
        "no json": b"hello\n" + whole,
        "zeros": whole[:700] + bytes(600) + whole[1300:],
    }
    seen.cache.write_bytes(spoilt[damage])
    with caplog.at_level(logging.WARNING):
        assert seen.survey() == first
    assert "thrown away" in caplog.text
    assert seen.looked == 12 if damage == "garbage" else seen.looked <= 3
    caplog.clear()
    assert seen.survey() == first and seen.looked == 0
    assert not caplog.text


@pytest.mark.parametrize("place", ["/dev/full", "a folder", "under a file"])
def test_a_cache_that_cannot_be_written(seen, place, tmp_path, caplog):
    seen.cache = {"a folder": tmp_path, "under a file": seen.log / "cache"}.get(place, Path(place))
    with caplog.at_level(logging.WARNING):
        seen.survey()
    assert ("cannot be written" if place == "under a file" else "is no file") in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="resource limits")
def test_a_disk_that_fills_up(seen, caplog):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        seen.survey()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in caplog.text and len(caplog.records) == 1
    first = seen.survey()
    assert 0 < seen.looked < 12
    assert seen.survey() == first and seen.looked == 0


def test_the_cache_does_not_grow_for_ever(seen):
    seen.survey()
    seen.cache.write_bytes(seen.cache.read_bytes() * 50)
    seen.survey()
    assert seen.looked == 0 and seen.cache.read_bytes().count(b"\n") == 24


def test_kill_9_again_and_again(tmp_path):
    paths = files(tmp_path / "raw", [f"fine-{i:03}" for i in range(300)])
    place, rng = script(tmp_path), random.Random(2)
    for _ in range(3):
        with subprocess.Popen([sys.executable, str(place)], stdout=subprocess.PIPE) as parent:
            parent.stdout.readline()
            time.sleep(rng.random() * 0.05)
            parent.kill()
    found = list(survey(paths, tmp_path / "cache.jsonl", look=survey_looks.look))
    assert [look.detail for look in found] == [path.name for path in paths]
    records = [unsealed(line) for line in (tmp_path / "cache.jsonl").read_bytes().splitlines(keepends=True)]
    assert all(records) and sum("look" in record for record in records) == 300  # none twice


def test_lines_are_plain_json():
    assert json.loads(sealed({"file": "é"}))["file"] == "é"
    line = sealed({"look": {"sha256": "ab" * 32}})
    rng = random.Random(3)
    for _ in range(300):
        spoilt = bytearray(line)
        spoilt[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        assert unsealed(bytes(spoilt)) is None
