"""How well a Ray cluster is kept at work: many small jobs on three nodes of this machine, as JSON.

python scripts/bench_ray.py --jobs 1000    half an hour on two cores

The cluster is real (`ray start`, three nodes of two slots), the training is the stand-in of the tests: a fifth of a second of
steps, so nearly all that is measured is starting and ending. Every third job wants a card, of which one node has two. Of every
turn of the service's loop is noted which nodes had a free slot while a job waited that could have had it.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ray_cluster import RayCluster
from test_ray import RayDesk

from lora_mvp.api.jobs import TERMINAL
from lora_mvp.api.places import find_place


def measured(desk: RayDesk, jobs: int) -> dict:
    """Run many jobs, and look after every turn."""
    service, took, idle, longest, turns = desk.service, 0.0, Counter(), 0.0, 0
    ids = [desk.submit(steps=20, gpus=int(k % 3 == 0), node_label=None) for k in range(jobs)]
    begun = last = time.monotonic()
    free_since: dict[str, float] = {}
    while any(service.counts().get(("train", status), 0) for status in ("queued", "starting", "running")):
        service.tick()
        now, nodes, turns = time.monotonic(), service.engine.nodes(), turns + 1
        took, last = now - last, now
        waiting = service.page(status={"queued"}, oldest_first=True, limit=1000)
        wanted = {job.spec.gpus: job.spec for job in waiting}.values()
        could = {node.name for spec in wanted for node in [find_place(spec, nodes, {})] if node}
        free_since = {name: free_since.get(name, now) for name in could}
        for name in could:
            idle[name] += took
            longest = max(longest, now - free_since[name])
        time.sleep(service.api.poll_interval)
    seconds = time.monotonic() - begun
    ended = Counter(service.get(id).status for id in ids)
    attempts = Counter(service.get(id).attempt for id in ids)
    assert set(ended) <= TERMINAL
    share = max(idle.values(), default=0.0) / seconds
    return {
        "jobs": jobs,
        "seconds": round(seconds, 1),
        "jobs_per_minute": round(60 * jobs / seconds, 1),
        "turns": turns,
    } | {
        "ended": dict(ended),
        "attempts": dict(attempts),
        "worst_node_free_while_a_fitting_job_waits": {"share": round(share, 5), "longest_s": round(longest, 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    args = parser.parse_args()
    cluster = RayCluster()
    try:
        cluster.add("cards", "--num-cpus", "2", "--num-gpus", "2")
        for name in ("plain", "other"):
            cluster.add(name, "--num-cpus", "2")
        cluster.up()
        with tempfile.TemporaryDirectory() as folder:
            desk = RayDesk(Path(folder), cluster, poll_interval=0.2).open()
            try:
                print(json.dumps(measured(desk, args.jobs), indent=2))
            finally:
                desk.close()
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
