"""How well a Ray cluster is kept at work: many small jobs on three nodes of this machine, as JSON.

python scripts/bench_ray.py --jobs 1000    forty minutes on two cores

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
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ray_cluster import RayCluster
from test_ray import RayDesk

from lora_mvp.api.jobs import Job
from lora_mvp.api.places import Node, find_places


class Idle:
    """For how long each node had a free slot that a waiting job could have had."""

    def __init__(self):
        self.last, self.took, self.longest, self.since = time.monotonic(), Counter(), 0.0, {}

    def look(self, nodes: list[Node], waiting: list[Job]) -> None:
        """After a turn: what is free now was free since the turn before."""
        now, kinds = time.monotonic(), {job.spec.gpus: job.spec for job in waiting}.values()
        could = {node.name for node in nodes for spec in kinds if find_places(spec, [node], {})}
        self.since = {name: self.since.get(name, self.last) for name in could}
        for name in could:
            self.took[name] += now - self.last
            self.longest = max(self.longest, now - self.since[name])
        self.last = now


def noticed(desk: RayDesk, id: str) -> float:
    """Seconds from the end of a job until the service has noticed it."""
    said = datetime.fromisoformat(desk.folder(id).last_state()["time"]).timestamp()
    return said - desk.folder(id).result_file.stat().st_mtime


def measured(desk: RayDesk, jobs: int, seconds: float) -> dict:
    """Run many jobs, and look after every turn; those that wait when the time is over are cancelled."""
    service = desk.service
    ids = [desk.submit(steps=20, gpus=int(k % 3 == 0), node_label=None) for k in range(jobs)]
    begun, idle, turns, told = time.monotonic(), Idle(), 0, 0
    while any(service.counts().get(("train", status), 0) for status in ("queued", "starting", "running")):
        service.tick()
        turns += 1
        idle.look(service.engine.nodes(), service.page(status={"queued"}, oldest_first=True, limit=1000))
        if time.monotonic() - begun > seconds:
            for job in service.page(status={"queued"}, limit=jobs):
                service.cancel(job.id)
        done = service.counts().get(("train", "succeeded"), 0)
        if done >= told + 50:
            told = done
            print(f"{done} jobs, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        time.sleep(service.api.poll_interval)
    took, ended = time.monotonic() - begun, [service.get(id) for id in ids]
    until = sorted(noticed(desk, job.id) for job in ended if job.status == "succeeded")
    free = {"share_of_worst_node": max(idle.took.values(), default=0.0) / took, "longest_s": idle.longest}
    return {
        "jobs": jobs,
        "seconds": round(took, 1),
        "jobs_per_minute": round(60 * len(until) / took, 1),
        "turns": turns,
        "ended": dict(Counter(job.status for job in ended)),
        "attempts": dict(Counter(job.attempt for job in ended if job.attempt)),
        "end_noticed_after_s": {"median": round(until[len(until) // 2], 3), "longest": round(until[-1], 3)},
        "slot_free_while_a_fitting_job_waits": {name: round(value, 5) for name, value in free.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0, help="cancel what still waits then (default: 60)")
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
                print(json.dumps(measured(desk, args.jobs, 60 * args.minutes), indent=2))
            finally:
                desk.close()
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
