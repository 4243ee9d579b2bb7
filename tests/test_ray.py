"""The promise of the service on a Ray cluster: whatever dies, every job that was taken ends once, as if nothing had.

The cluster is real: `ray start` processes, a node each, on this machine. The training is a stand-in (stand_in.py), the
runner, the keeper, the link and the store are the real ones. Started once for the file, since that takes 20 seconds.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from live_service import command, end_jobs, serving
from PIL import Image
from test_faults import Desk, Server, end_all, gone, kill, marked, progressed, wait_for, words

from lora_mvp.api.job_settings import read_settings
from lora_mvp.api.jobs import TERMINAL, JobSpec
from lora_mvp.api.processes import mark_of
from lora_mvp.api.ray_engine import RayEngine, link_to
from lora_mvp.api.service import Service
from lora_mvp.api.stores import open_store
from lora_mvp.config import ApiConfig, LoraMvpError, load_config

pytest.importorskip("ray")
from ray_cluster import Networks, RayCluster, RayNode, free_port, tree  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs signals on a parent's death")
BLIND = 'mount -t tmpfs none {0} && exec "$@"'  # a node that has an empty folder where the jobs are


@pytest.fixture(scope="module")
def jobs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def networks():
    """Where that can be had, each node of the cluster has a network of its own; else all are on this machine's."""
    found = Networks(2) if Networks.can() else None
    yield found
    if found:
        found.close()


@pytest.fixture(scope="module")
def cluster(networks):
    found = RayCluster(networks and networks.home)
    try:
        for k, name in enumerate(("one", "two")):
            has = ["--num-cpus", "2", "--num-gpus", "2", "--memory", "4000000000", "--labels", "role=good"]
            found.add(name, *has, **(networks.inside(k) if networks else {}))
        found.up()
        yield found
    finally:
        found.close()


def test_what_is_missing_or_out_of_reach_is_named(tmp_path, monkeypatch):
    serve = ["serve", "--port", "0", "--set", f"api.jobs_dir={tmp_path}", "--set", f"api.db_path={tmp_path}/jobs.json"]
    done = command(*serve, "--set", "api.engine=ray", "--set", "api.ray_address=127.0.0.1:1")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "api.ray_address is 127.0.0.1:1, and nobody can be reached there: Connection refused" in done.stderr
    with pytest.raises(LoraMvpError, match='"slurm" is not allowed; allowed is one of local, ray'):
        load_config(overrides={"api.engine": "slurm"})
    monkeypatch.setattr("lora_mvp.extras.find_spec", lambda name: None)
    with pytest.raises(LoraMvpError, match=r"ray is not installed; .* pip install 'lora-mvp\[ray\]'"):
        link_to(ApiConfig())


class RayDesk(Desk):
    """A service whose jobs run on the cluster."""

    def __init__(self, root: Path, cluster: RayCluster, **api):
        super().__init__(root, engine="ray", ray_address=cluster.address, **api)

    def close(self):
        super().close()
        self.service.engine.link.close()

    def submit(self, *orders: str, steps: int = 20, **spec) -> str:
        config = {"training.max_train_steps": steps, "training.sample_prompts": list(orders)}
        spec = {"gpus": 0, "node_label": "role=good"} | spec
        job, _ = self.service.submit("train", JobSpec(manifest="m.json", config=config, **spec))
        self.taken.append(job.id)
        return job.id


@pytest.fixture(scope="module")
def desk(cluster, jobs_dir):
    desk = RayDesk(jobs_dir, cluster, jobs_dir=jobs_dir / "jobs", max_attempts=2).open()
    desk.service.engine.patience = 1.0
    yield desk
    desk.close()
    for id in desk.taken:
        end_all(f"{id}:")


def keepers(cluster: RayCluster) -> list[psutil.Process]:
    """The actors of attempts."""
    alive = [node.process.pid for node in cluster.nodes.values() if node.process.poll() is None]
    found = [p for pid in alive for p in tree(psutil.Process(pid))]
    return [p for p in found if words(p)[:1] and words(p)[0].startswith("ray::") and "Keeper" in words(p)[0]]


def test_a_job_gets_the_cards_of_one_node_and_gives_its_place_back(desk, cluster):
    id = desk.submit("hold@8", gpus=1)
    desk.until_step(id, 7)
    (trainer,) = desk.processes(id)[1]
    assert trainer.environ()["CUDA_VISIBLE_DEVICES"] in ("0", "1")
    assert len(keepers(cluster)) == 1
    taken = [node for node in desk.service.engine.nodes() if node.free.gpus == 1]
    assert len(taken) == 1 and taken[0].free.slots == 1
    desk.go(id)
    assert desk.until(id).attempt == 1
    desk.exact(id)
    assert desk.service.engine.running() == {}
    wait_for(lambda: sum(node.free.gpus for node in desk.service.engine.nodes()) == 4, "free cards")
    wait_for(lambda: not keepers(cluster), "end of the keeper")


@pytest.mark.parametrize(
    "spec, why",
    [
        ({"gpus": 3}, "3 GPUs on one node are asked for, and the largest has 2 GPUs and 4 GB of memory"),
        ({"memory_gb": 5}, "0 GPUs and 5 GB of memory on one node are asked for, and the largest has 2 GPUs and 4 GB"),
        ({"node_label": "role=none"}, "no node has the label role=none; there are role=good"),
        ({"nodes": 3}, "3 nodes with 0 GPUs each and the label role=good are asked for, and there are 2 now"),
    ],
)
def test_a_job_that_no_node_can_ever_hold_is_refused(desk, spec, why):
    with pytest.raises(LoraMvpError, match=why):
        desk.submit(**spec)


@pytest.mark.slow  # two more nodes; the keeper's chapter has the same look at a folder
def test_a_node_that_cannot_run_jobs_is_named_with_the_reason(desk, cluster, jobs_dir, tmp_path):
    (tmp_path / "lora_mvp").mkdir()
    (tmp_path / "lora_mvp" / "__init__.py").write_text("raise ImportError('no package of that version')")
    told = {"broken": "The node broken cannot run jobs (ImportError: no package of that version). Install the same"}
    cluster.add("broken", "--num-cpus", "1", "--labels", "role=broken", env={"PYTHONPATH": str(tmp_path)})
    if os.geteuid() == 0:
        told["blind"] = "The node blind does not see the job's folder: api.jobs_dir must be one shared folder"
        apart = ["unshare", "-m", "sh", "-c", BLIND.format(jobs_dir), "sh"]
        cluster.add("blind", "--num-cpus", "1", "--labels", "role=blind", before=apart)
    cluster.up()
    ids = {role: desk.submit(node_label=f"role={role}") for role in told}
    for role, id in ids.items():
        job = desk.until(id)
        assert (job.status, job.attempt, job.error.code) == ("failed", 2, "engine_unavailable")
        assert job.error.message.startswith(told[role]), job.error
        cluster.nodes.pop(role).kill()
    assert desk.service.engine.running() == {}


def test_a_cancel_saves_first_and_leaves_nothing(desk):
    id = desk.submit("pause=0.05", "grandchild", steps=10_000)
    desk.until_step(id, 7)
    desk.service.cancel(id)
    assert desk.until(id).status == "cancelled"
    saved = max(int(path.name.rpartition("-")[2]) for path in desk.folder(id).run.glob("checkpoint-*"))
    assert saved == desk.folder(id).progress()["step"] >= 7
    wait_for(lambda: not marked(f"{id}:"), "end of everything")


class RealDesk:
    """The service as it is, with the real trainer, on the cluster."""

    def __init__(self, root: Path, cluster: RayCluster, data_dir: Path):
        api = {
            "engine": "ray",
            "ray_address": cluster.address,
            "db_path": root / "jobs.json",
            "jobs_dir": root / "jobs",
        }
        api |= {"data_dir": data_dir, "models_dir": root, "poll_interval": 0.1, "min_free_gb": 0.0, "max_attempts": 99}
        self.config = load_config(overrides={f"api.{key}": value for key, value in api.items()})
        self.service = Service(self.config, open_store(self.config.api), RayEngine(self.config.api), backoff=0.0)

    def until(self, id: str, condition):
        """Turn until the job is so."""
        end = time.monotonic() + 300
        while not (found := condition(self.service.get(id))):
            self.service.tick()
            assert time.monotonic() < end, self.service.folder(self.service.get(id)).log().decode()
            time.sleep(0.02)
        return found

    def parts(self, id: str, word: str) -> dict[str, psutil.Process]:
        """The processes of a job that are of one kind, by their mark."""
        found = {mark_of(process): process for process in psutil.process_iter() if word in words(process)}
        return {mark: process for mark, process in found.items() if mark.startswith(f"{id}:")}

    def close(self):
        self.service.store.close()
        self.service.engine.link.close()


@pytest.fixture
def two_nodes(request, cluster, drawings, small_run, tmp_path):
    """A desk, and what a job on two nodes is to give: that of two processes on one machine, undisturbed."""
    settings = small_run("none", max_train_steps=getattr(request, "param", 24), checkpointing_steps=4)
    wanted = settings | {"training.output_dir": str(tmp_path / "wanted" / "run")}
    asked = [part for key, value in wanted.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    run = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "lora_mvp.cli",
        "train",
        "--manifest",
    ]
    subprocess.run([sys.executable, *run, str(drawings), *asked], check=True, timeout=300)
    del settings["training.output_dir"]
    desk = RealDesk(tmp_path, cluster, drawings.parent)
    job, _ = desk.service.submit("train", JobSpec(manifest=drawings.name, config=settings, gpus=0, nodes=2))
    yield desk, job.id, tmp_path / "wanted" / "run"
    desk.service.engine.stop(desk.service.get(job.id).engine_ref or "", 0)
    desk.close()
    end_all(f"{job.id}:")


def same_adapter(run: Path, wanted: Path) -> bool:
    (name,) = (path.name for path in wanted.glob("*.safetensors"))
    return (run / name).read_bytes() == (wanted / name).read_bytes()


def test_one_job_trains_on_two_nodes_and_goes_on_when_a_part_dies(two_nodes, networks):
    desk, id, wanted = two_nodes
    folder = desk.service.folder(desk.service.get(id))
    desk.until(id, lambda job: (folder.progress() or {"step": 0})["step"] >= 6)
    trainers = desk.parts(id, "lora_mvp.api.work")
    assert sorted(trainers) == [f"{id}:1", f"{id}:1/1"]
    if networks:
        assert len({os.readlink(f"/proc/{process.pid}/ns/net") for process in trainers.values()}) == 2
        assert {process.environ()["GLOO_SOCKET_IFNAME"] for process in trainers.values()} == {"eth0"}
    assert [node.free.slots for node in desk.service.engine.nodes() if node.total.slots] == [1, 1]
    trainers[f"{id}:1/1"].kill()
    job = desk.until(id, lambda job: job.status in TERMINAL and job)
    assert (job.status, job.attempt) == ("succeeded", 2), job
    assert same_adapter(folder.run, wanted)
    lost = [event["error"]["message"] for _, event in folder.events() if event.get("error")]
    assert lost == ["One of the processes of the job ended or fell silent, and the others cannot go on without it."]
    wait_for(lambda: not marked(f"{id}:"), "end of everything")
    wait_for(lambda: sum(node.free.slots for node in desk.service.engine.nodes()) == 4, "places of both")
    assert desk.service.engine.running() == {}


PARTS = ["keeper", "runner", "trainer"]


@pytest.mark.slow
@pytest.mark.parametrize("two_nodes", [200], indirect=True)
def test_a_job_on_two_nodes_survives_the_loss_of_every_part(two_nodes, networks, cluster):
    desk, id, wanted = two_nodes
    folder = desk.service.folder(desk.service.get(id))

    def lose(what: str, rank: int) -> None:
        if what == "node":
            cluster.nodes["two"].kill()
        elif what == "cable":
            networks.cut(1)
        elif what == "keeper":
            runner = desk.parts(id, "lora_mvp.api.runner")[mark(rank)]
            runner.parent().kill()
        else:
            word = {"runner": "lora_mvp.api.runner", "trainer": "lora_mvp.api.work"}[what]
            desk.parts(id, word)[mark(rank)].kill()

    def lost() -> list[str]:
        return [event["error"]["message"] for _, event in folder.events(limit=10**6) if event.get("error")]

    def mark(rank: int) -> str:
        return f"{id}:{folder.current_attempt()}" + ("/1" if rank else "")

    for what, rank in [*((part, rank) for part in PARTS for rank in (0, 1)), ("node", 1), ("cable", 1)]:
        done, step = len(lost()), (folder.progress() or {"step": 0})["step"]
        if what == "cable" and not networks:
            continue
        desk.until(id, lambda job: (folder.progress(job.attempt) or {"step": 0})["step"] > step)  # noqa: B023
        begun = time.monotonic()
        lose(what, rank)
        said = desk.until(id, lambda job: lost()[done:])  # noqa: B023
        print(f"{what} of node {rank} gone at step {step}: {said[0]} ({time.monotonic() - begun:.1f} s)", flush=True)
        if what == "cable":
            networks.mend(1)
        if what in ("node", "cable"):
            cluster.again("two")
    job = desk.until(id, lambda job: job.status in TERMINAL and job)
    assert job.status == "succeeded", job
    assert same_adapter(folder.run, wanted)
    wait_for(lambda: not marked(f"{id}:"), "end of everything")


@pytest.mark.slow
def test_a_silent_keeper_is_no_lost_job_and_a_hung_runner_is_one(desk, cluster, monkeypatch):
    id = desk.submit("hold@8")
    desk.until_step(id, 7)
    (keeper,) = keepers(cluster)
    keeper.suspend()
    ref = desk.service.get(id).engine_ref
    wait_for(lambda: desk.service.engine.poll([ref])[ref] == "unknown", "word that nothing is known")
    keeper.resume()
    wait_for(lambda: desk.service.engine.poll([ref])[ref] == "alive", "answer")
    monkeypatch.setattr(desk.service.attempts.hangs, "lease", 3.0)
    runner, (trainer,) = desk.processes(id)
    for process in (runner, trainer):
        process.suspend()
    desk.go(id)
    job = desk.until(id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    desk.exact(id)
    lost = [event["error"]["message"] for _, event in desk.folder(id).events() if event.get("error")]
    assert len(lost) == 1 and "gave no sign of life for too long" in lost[0]
    assert gone(runner) and gone(trainer)


KINDS = ["server", "keeper", "runner", "trainer", "raylet", "node"]
NOW = [("server",), ("keeper", "trainer", "server"), ("runner", "raylet", "node")]  # in three rounds each kind once


def kill_in_cluster(what: str, desk: Desk, server: Server, cluster: RayCluster, chance: random.Random, down: list):
    """Kill -9 one kind of process; `down` gets the node that is gone with it."""
    found = [p for p in psutil.process_iter() if mark_of(p).partition(":")[0] in desk.taken]
    fitting = {"keeper": keepers(cluster)}
    for kind, word in (("runner", "runner"), ("trainer", "work")):
        fitting[kind] = [process for process in found if word in words(process)]
    node = chance.choice([name for name in ("one", "two") if name not in down])
    if what == "server":
        server.kill()
    elif what == "node":
        cluster.nodes[node].kill()
    elif what == "raylet":
        cluster.nodes[node].raylet().kill()
    elif fitting[what]:
        kill(chance.choice(fitting[what]))
    down += [node] if what in ("node", "raylet") else []


@pytest.mark.parametrize("rounds", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_whatever_is_killed_at_any_moment_every_job_ends_once(cluster, tmp_path, rounds):
    desk = RayDesk(tmp_path, cluster, max_attempts=1000)
    server, chance, killed = Server(desk), random.Random(rounds), Counter()
    try:
        for k in range(rounds):
            for _ in range(2):
                before = len(server.answers)
                server.ask(f"submit {chance.randint(20, 50)} pause=0.04")
                wait_for(lambda before=before: len(server.answers) > before, "answer")
                desk.taken.append(server.answers[-1])
            progressed(desk, chance.choice(desk.taken[-2:]), 1, attempt=None)
            down = []
            for what in NOW[k] if rounds == len(NOW) else [chance.choice(KINDS)]:
                time.sleep(chance.uniform(0, 0.8))
                kill_in_cluster(what, desk, server, cluster, chance, down)
                killed[what] += 1
            if server.process.poll() is not None:
                server.begin()
            if k == 0 and rounds == len(NOW):
                for id in desk.taken:
                    wait_for(lambda id=id: desk.folder(id).read_result(), "result of a job that was adopted")
            cluster.again(*down[-1:])  # in the short form the other one stays away
        attempts = []
        for id in desk.taken:  # every one that was answered is there
            wait_for(lambda id=id: (desk.folder(id).last_state() or {})["status"] in TERMINAL, "end of a job")
            desk.exact_files(id, read_settings(desk.folder(id)).training.max_train_steps)
            attempts.append(desk.folder(id).current_attempt())
        assert rounds != len(NOW) or attempts[:2] == [1, 1]
        wait_for(lambda: not keepers(cluster), "end of all keepers")
        print(rounds, "rounds,", len(desk.taken), "jobs,", dict(killed), "attempts", dict(Counter(attempts)))
    finally:
        server.kill()
        for id in desk.taken:
            end_all(f"{id}:")


@pytest.mark.slow
def test_a_head_that_is_gone_takes_no_server_and_no_job_along(tmp_path):
    """Ray ends whatever is connected to a head that does not come back within a minute; so here it is only the link."""
    cluster = RayCluster()
    cluster.add("one", "--num-cpus", "2", "--labels", "role=good")
    cluster.up()
    desk = RayDesk(tmp_path, cluster).open()
    id, turns = desk.submit("hold@8"), []

    def turn():
        begun = time.monotonic()
        desk.service.tick()
        turns.append(time.monotonic() - begun)
        return desk.service.get(id)

    try:
        desk.until_step(id, 7)
        cluster.head.kill()
        wait_for(lambda: turn() and desk.service.ready()["engine"], "word that the cluster is gone")
        assert "the Ray cluster cannot be asked" in desk.service.ready()["engine"]
        assert desk.service.get(id).status == "running"
        desk.go(id)
        wait_for(lambda: turn().status in TERMINAL, "end of the job, of which its folder tells")
        assert desk.service.get(id).attempt == 1
        desk.exact(id)
        end = time.monotonic() + 90  # Ray would have ended the server by now
        while time.monotonic() < end:
            turn()
            time.sleep(0.5)
        print("turns of the loop took at most", round(max(turns), 1), "s")
        assert max(turns) < 15
    finally:
        desk.close()
        cluster.close()
        end_all(f"{id}:")


@pytest.mark.slow
def test_the_commands_of_scale_md_work_as_they_are_written(tmp_path):
    """The recipe for plain machines, two of which are this one; the port, folders and the number of steps are other ones."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "SCALE.md").read_text(encoding="utf-8")
    head, node, serve, submit, over_nodes = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    assert head.startswith("ray start --head ") and serve == "lora-mvp serve --config /srv/lora/config.yaml"
    for k in range(12):
        (tmp_path / "cats" / "cat").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80 + k, 96), 60 + 10 * k).convert("RGB").save(tmp_path / "cats" / "cat" / f"{k}.png")
    (tmp_path / "root").mkdir()
    place, port = SimpleNamespace(root=tmp_path / "root"), free_port()
    apart = Path(tempfile.mkdtemp(prefix="lray-", dir="/tmp"))

    def words_of(line):
        return shlex.split(line.replace("6379", str(port)).replace("HEAD", "127.0.0.1"))[2:]

    nodes = [RayNode(place, "head", *words_of(head), "--temp-dir", str(apart / "h"))]
    log = place.root / "head.log"
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), "head")
        address = log.read_text().partition("ray start --address='")[2].partition("'")[0]
        told = [f"--address={address}" if word.startswith("--address") else word for word in words_of(node)]
        nodes.append(RayNode(place, "node", *told, "--temp-dir", str(apart / "n")))
        wait_for(lambda: "Ray runtime started" in (place.root / "node.log").read_text(), "node")
        (settings,) = re.findall(r"```yaml\n(api:\n.*?)```", text, re.DOTALL)
        (tmp_path / "config.yaml").write_text(settings.replace("HEAD:6379", address) + "  min_free_gb: 0.0\n")
        with serving(tmp_path / "config.yaml") as (_, url):
            asked = [str(tmp_path / word) if word == "cats" else word for word in shlex.split(submit)[1:]]
            few = ["max_train_steps=4", "lr_warmup_steps=1", "checkpointing_steps=2"]
            done = command(*asked, *[part for key in few for part in ("--set", f"training.{key}")], LORA_MVP_URL=url)
            assert done.returncode == 0, done.stderr
            refused = command(*shlex.split(over_nodes.replace("--gpus=8", "--gpus=0"))[1:], LORA_MVP_URL=url)
            assert "2 nodes with 0 GPUs each are asked for, and there is 1 now." in refused.stderr, refused
            shown = command("jobs", "status", done.stdout.split()[0], LORA_MVP_URL=url)
            assert "succeeded" in shown.stdout, shown
    finally:
        end_jobs(tmp_path / "jobs")
        for started in nodes:
            started.kill()
        shutil.rmtree(apart, ignore_errors=True)
