"""Time the parts of the job service and print JSON.

python scripts/bench_api.py store --jobs 1000 10000
python scripts/bench_api.py store --jobs 1000 10000 --url postgresql+pg8000://USER@HOST/EMPTY_DATABASE
python scripts/bench_api.py http --seconds 5 --clients 8 --readers 100
python scripts/bench_api.py growth --jobs 0 1000 10000
"""

import argparse
import http.client
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lora_mvp.api.jobs import Job, JobIds, JobSpec, Store, now, transition
from lora_mvp.api.places import Node, Room
from lora_mvp.api.stores import open_store
from lora_mvp.config import ApiConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
sections = parser.add_subparsers(dest="section", required=True)
store_parser = sections.add_parser("store", help="creates, swaps and reads per second of each store")
store_parser.add_argument(
    "--jobs", type=int, nargs="+", default=[1000, 10_000], help="jobs in the store; JSON holds at most 10000"
)
store_parser.add_argument("--calls", type=int, default=200, help="timed calls of each kind")
store_parser.add_argument("--clients", type=int, default=16, help="threads of the calls that are made together")
store_parser.add_argument("--url", help="a database to time beside JSON and SQLite; its jobs are deleted afterwards")

http_parser = sections.add_parser("http", help="submits and reads per second over HTTP, alone and beside readers")
http_parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
http_parser.add_argument("--clients", type=int, default=8, help="that ask at the same time")
http_parser.add_argument("--readers", type=int, default=100, help="of event streams")
growth_parser = sections.add_parser("growth", help="what a submit over HTTP costs beside jobs that have ended")
growth_parser.add_argument("--jobs", type=int, nargs="+", default=[0, 1000, 10_000], help="jobs in the store")
growth_parser.add_argument("--calls", type=int, default=200, help="timed submits, one after the other")
growth_parser.add_argument("--stores", nargs="+", default=["jobs.json", "jobs.sqlite"], help="names of their files")
sections.add_parser("serve")  # the process that `http` measures


def rate(calls: list[Callable[[], object]], clients: int = 1) -> dict[str, float]:
    """Calls per second, and how long they took, in milliseconds."""

    def timed(call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        took = sorted(pool.map(timed, calls))
    seconds = time.perf_counter() - start
    per_s, last = len(calls) / seconds, took[min(len(took) - 1, int(0.99 * len(took)))]
    return {"per_s": round(per_s, 1), "median_ms": round(took[len(took) // 2], 3), "p99_ms": round(last, 3)}


new_id = JobIds()


def example() -> Job:
    config = {"training.max_train_steps": 1000, "training.lora_rank": 8, "training.learning_rate": 1e-4}
    spec = JobSpec(manifest="cats/manifest.json", config=config)
    return Job(id=new_id(), kind="train", spec=spec, created_at=now(), updated_at=now())


def claim(store: Store) -> None:
    """What the service does to start a job."""
    (job,) = store.page(status={"queued"}, limit=1, oldest_first=True)
    transition(store, job, "starting")


def time_store(url: str, jobs: int, calls: int, clients: int) -> dict:
    there = [example() for _ in range(jobs - 2 * calls)]  # so that the last call meets what was asked for
    store = open_store(ApiConfig(db_path=url), rebuild=lambda: there)
    try:
        result = {
            "creates": rate([lambda: store.create(example())] * calls),
            f"creates_of_{clients}_clients": rate([lambda: store.create(example())] * calls, clients),
            "claims": rate([lambda: claim(store)] * calls),
            "reads": rate([lambda: store.get(there[len(there) // 2].id)] * calls),
            "pages_of_50": rate([lambda: store.page(limit=50, after=there[-1].id)] * calls),
            "counts": rate([store.counts] * calls),
        }
        store.close()
        start = time.perf_counter()
        store = open_store(ApiConfig(db_path=url))
        result["open_s"] = round(time.perf_counter() - start, 3)
        if "://" in url:
            for job in store.page(limit=jobs):
                store.delete(job.id)
    finally:
        store.close()
    return result


def bench_store(args: argparse.Namespace) -> dict:
    results: dict = {}
    for jobs in args.jobs:
        if jobs <= 2 * args.calls:
            parser.error(f"--jobs {jobs}: more than twice --calls are needed")
        with tempfile.TemporaryDirectory(prefix="bench-api-", dir=".") as folder:  # /tmp may be memory
            places = {"json": f"{folder}/jobs.json", "sqlite": f"{folder}/jobs.db"} | (
                {"url": args.url} if args.url else {}
            )
            if jobs > 10_000:
                del places["json"]
            for name, url in places.items():
                results.setdefault(name, {})[jobs] = time_store(url, jobs, args.calls, args.clients)
            size = {file.name: round(file.stat().st_size / 1e6, 2) for file in Path(folder).glob("jobs.*[!k]")}
            results.setdefault("megabytes", {})[jobs] = size
    return results


class Resting:
    """An engine without room: what is measured is the service, not trainings."""

    lease = 30.0

    def nodes(self):
        return [Node("here", Room(1, 0, 1), Room(0, 0, 0))]

    def start(self, job, folder, node):
        raise AssertionError("there is no room")

    def poll(self, refs):
        return dict.fromkeys(refs, "gone")

    def stop(self, ref, grace_s):
        pass

    def describe(self):
        return {"name": "resting", "slots": 0, "gpus": []}


def serve(args: argparse.Namespace) -> dict:
    """The process that is measured."""
    import uvicorn

    from lora_mvp.api.main import create_app

    uvicorn.run(create_app(engine=Resting()), port=0)
    return {}


@contextmanager
def served(root: Path, store: str, there: Iterable[Job] = ()):
    """A server, whose store holds some jobs; its port and its process."""
    open_store(ApiConfig(db_path=str(root / store)), rebuild=lambda: there).close()
    (root / "data").mkdir()
    (root / "data" / "1.png").write_bytes(b"not looked into before a job starts")
    (root / "data" / "manifest.json").write_text(json.dumps([{"image": "1.png", "caption": "a cat", "split": "train"}]))
    api = {"db_path": str(root / store), "jobs_dir": str(root / "jobs"), "data_dir": str(root / "data")}
    api |= {"requests_per_minute": 10**9, "max_queued": 10**6, "min_free_gb": 0.0}
    (root / "config.yaml").write_text(json.dumps({"api": api, "training": {"pretrained_model": "tiny"}}))
    env = os.environ | {"LORA_MVP_CONFIG": str(root / "config.yaml")}
    with open(root / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, __file__, "serve"], env=env, stdout=log, stderr=log)
        try:
            while not (found := re.search(rb"running on http://127\.0\.0\.1:([0-9]+)", (root / "log").read_bytes())):
                assert process.poll() is None, (root / "log").read_text()
                time.sleep(0.05)
            yield int(found[1]), process
        finally:
            process.terminate()
            process.wait()


def timed(port: int, clients: int, seconds: float, ask) -> dict[str, float]:
    """What `ask(connection)` takes when several clients do nothing else."""
    took, end = [], time.perf_counter() + seconds

    def run():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            ask(connection)
            took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(took, n=100)
    return {
        "per_s": round(len(took) / seconds, 1),
        "p50_ms": round(cuts[49] * 1e3, 2),
        "p99_ms": round(cuts[98] * 1e3, 2),
    }


def submit(connection) -> str:
    body = json.dumps({"manifest": "manifest.json", "config": {"training.max_train_steps": 20}})
    connection.request("POST", "/train", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == 202, text
    return json.loads(text)["job_id"]


def get(path: str):
    def ask(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.read() and answer.status == 200

    return ask


def reader(port: int, job: str) -> socket.socket:
    """A connection that reads a stream of events."""
    stream = socket.create_connection(("127.0.0.1", port))
    lines = [f"GET /v1/jobs/{job}/events HTTP/1.1", "Host: 127.0.0.1", "Accept: text/event-stream", "", ""]
    stream.sendall("\r\n".join(lines).encode())
    assert stream.recv(64)
    return stream


def memory(process) -> float:
    """MiB that the server holds."""
    return round(int(re.search(r"VmRSS:\s+([0-9]+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024, 1)


def over_http(store: str, seconds: float, clients: int, readers: int) -> dict:
    """Rates and times of one server."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), store) as (port, process):
        job = submit(http.client.HTTPConnection("127.0.0.1", port))
        found = {"rss_mib": memory(process), "healthz": timed(port, clients, seconds, get("/healthz"))}
        found |= {"submit": timed(port, clients, seconds, submit)}
        found |= {"status": timed(port, clients, seconds, get(f"/status/{job}"))}
        found |= {"list": timed(port, clients, seconds, get("/v1/jobs?limit=20"))}
        streams = [reader(port, job) for _ in range(readers)]
        beside = {"submit": timed(port, clients, seconds, submit)}
        beside |= {"status": timed(port, clients, seconds, get(f"/status/{job}"))}
        found |= {f"beside_{readers}_readers": beside | {"rss_mib": memory(process)}}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/metrics")
        queued = re.search(rb'lora_jobs\{kind="train",status="queued"\} ([0-9.]+)', connection.getresponse().read())
        for stream in streams:
            stream.close()
        return found | {"jobs_at_the_end": int(float(queued[1]))}


def bench_http(args: argparse.Namespace) -> dict:
    return {name: over_http(name, args.seconds, args.clients, args.readers) for name in ("jobs.json", "jobs.sqlite")}


def written(process) -> int:
    """Bytes that the server has written to files so far."""
    return int(re.search(r"wchar: ([0-9]+)", Path(f"/proc/{process.pid}/io").read_text())[1])


def growth(store: str, jobs: int, calls: int) -> dict:
    """Time and bytes of a submit where so many jobs have ended."""
    ended = {"status": "succeeded", "attempt": 1, "finished_at": now()}
    there = (
        example().model_copy(update=ended) for _ in range(max(0, jobs - calls - 1))
    )  # the last call meets all of them
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        served(Path(folder).resolve(), store, there) as (port, process),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        submit(connection)
        before = written(process)
        found = rate([lambda: submit(connection)] * calls)
        return found | {"bytes": (written(process) - before) // calls}


def bench_growth(args: argparse.Namespace) -> dict:
    return {store: {jobs: growth(store, jobs, args.calls) for jobs in args.jobs} for store in args.stores}


if __name__ == "__main__":
    args = parser.parse_args()
    result = {"store": bench_store, "http": bench_http, "growth": bench_growth, "serve": serve}[args.section](args)
    print(json.dumps({"python": platform.python_version(), "cores": os.cpu_count(), args.section: result}, indent=1))
