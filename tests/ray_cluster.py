"""A Ray cluster of several nodes on this machine: real `ray start` processes, which can be killed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())", "start"]
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
ENV = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LORA_MVP_"))}
ENV |= {"PYTHONPATH": str(Path(__file__).resolve().parent.parent), "RAY_USAGE_STATS_ENABLED": "0"}
ENV |= {"RAY_raylet_start_wait_time_s": "120"}  # a busy machine takes more than Ray's half minute


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


class Networks:
    """A network of namespaces, each a machine of its own to whoever runs there: nothing of it is reached by its loopback."""

    def __init__(self, count: int):
        self.tag, self.net = f"lm{os.getpid() % 10**6}", f"10.{50 + os.getpid() % 200}.7"
        self.names = [f"{self.tag}-{k}" for k in range(2, 2 + count)]
        self.home = f"{self.net}.1"  # of this one
        try:
            self.ip("link", "add", self.tag, "type", "bridge")
            self.ip("addr", "add", f"{self.home}/24", "dev", self.tag)
            self.ip("link", "set", self.tag, "up")
            for k, name in enumerate(self.names, 2):
                self.join(f"{self.tag}v{k}", name, f"{self.net}.{k}")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def can() -> bool:
        return (
            os.geteuid() == 0
            and subprocess.run(["sh", "-c", "command -v ip && unshare -n true"], stdout=-3).returncode == 0
        )

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def join(self, cable: str, name: str, address: str) -> None:
        self.ip("netns", "add", name)
        self.ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        self.ip("link", "set", cable, "master", self.tag, "up")
        self.ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            self.ip("-n", name, "link", "set", device, "up")

    def inside(self, k: int) -> dict:
        """Options of a node that is on the k-th machine."""
        return {"before": ["ip", "netns", "exec", self.names[k]], "address": f"{self.net}.{k + 2}"}

    def cut(self, k: int) -> None:
        """Pull the cable."""
        self.ip("link", "set", f"{self.tag}v{k + 2}", "down")

    def mend(self, k: int) -> None:
        self.ip("link", "set", f"{self.tag}v{k + 2}", "up")

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", self.tag], stderr=subprocess.DEVNULL)


class RayNode:
    """A `ray start` process with everything that belongs to the node."""

    def __init__(self, cluster: "RayCluster", name: str, *options: str, before=(), env=()):
        self.cluster, self.name, self.options, self.before, self.env = cluster, name, options, before, dict(env)
        self.begin()

    def begin(self) -> "RayNode":
        small = ["--block", "--object-store-memory", "80000000", "--disable-usage-stats", "--node-name", self.name]
        small += [
            "--min-worker-port",
            "0",
            "--max-worker-port",
            "0",
        ]  # any that is free: nodes of one machine share a range
        command = [*self.before, *RAY, *self.options, *small]
        log = open(self.cluster.root / f"{self.name}.log", "ab")
        self.process = subprocess.Popen(
            command, env=ENV | self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def raylet(self) -> psutil.Process:
        return next(p for p in tree(psutil.Process(self.process.pid)) if p.name() == "raylet")

    def kill(self) -> None:
        """As when somebody pulls the plug."""
        found = tree(psutil.Process(self.process.pid)) if self.process.poll() is None else []
        for process in found:
            try:
                process.suspend()  # so that none can tell the others
            except psutil.Error:
                continue
        kill_all(found)
        self.process.wait()


class RayCluster:
    """A head without slots, and nodes."""

    def __init__(self, home: str | None = None):
        self.root = Path(tempfile.mkdtemp(prefix="lray-", dir="/tmp"))  # a socket's path is short
        self.port, self.nodes = free_port(), {}
        head = ["--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard=false"]
        head += ["--temp-dir", str(self.root / "r"), "--system-config", json.dumps(QUICK)]
        head += ["--node-ip-address", home] if home else []
        ports = ["--dashboard-port", str(free_port())]
        self.address = None
        self.head = RayNode(self, "head", *head, *ports)
        self.until(self.has_head, "head")

    def has_head(self) -> bool:
        assert self.head.process.poll() is None, (self.root / "head.log").read_text()[-3000:]
        text = (self.root / "head.log").read_text()
        if "Ray runtime started" not in text:
            return False
        self.address = text.partition("ray start --address='")[2].partition("'")[0]
        return True

    def add(self, name: str, *options: str, address: str | None = None, **more) -> RayNode:
        """Start another node; `up` waits for it."""
        options = [*options, "--node-ip-address", address] if address else options
        where = [
            "--address",
            self.address,
            "--temp-dir",
            str(self.root / name),
        ]  # nodes that start at once collide in one
        self.nodes[name] = RayNode(self, name, *where, *options, **more)
        return self.nodes[name]

    def until(self, condition, what: str, limit: float = 300.0) -> None:
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end, f"no {what} within {limit} s"
            time.sleep(0.1)

    def up(self, *names: str) -> None:
        """Wait until nodes have joined."""
        for name in names or self.nodes:
            self.until(lambda name=name: self.has_joined(name), f"node {name}")

    def has_joined(self, name: str) -> bool:
        text = (self.root / f"{name}.log").read_text()
        assert self.nodes[name].process.poll() is None, text[-3000:]
        return "Ray runtime started" in text

    def again(self, *names: str) -> None:
        """Start nodes again that were killed."""
        for name in names:
            self.nodes[name].kill()
            (self.root / f"{name}.log").unlink()
            self.nodes[name].begin()
        self.up(*names)

    def close(self) -> None:
        for node in [*self.nodes.values(), self.head]:
            node.kill()
        for process in psutil.process_iter():
            try:
                if any(str(self.root) in word for word in process.cmdline()):
                    process.kill()
            except psutil.Error:
                continue
        shutil.rmtree(self.root, ignore_errors=True)
