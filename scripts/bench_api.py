"""Time the parts of the job service and print JSON.

python scripts/bench_api.py store --jobs 1000 10000
python scripts/bench_api.py store --jobs 1000 10000 --url postgresql+psycopg://USER@HOST/EMPTY_DATABASE
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_mvp.api.jobs import Job, JobIds, JobSpec, Store, now, transition
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


if __name__ == "__main__":
    args = parser.parse_args()
    result = {"store": bench_store}[args.section](args)
    print(json.dumps({"python": platform.python_version(), args.section: result}, indent=1))
