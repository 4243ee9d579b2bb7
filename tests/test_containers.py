"""The container files, as far as that goes without a container engine: their schema, and that they fit together."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
import yaml
from browser import process, wait_for

from lora_mvp.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
COMPOSE = {name: yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml")}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, with continued lines put together."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; a stage has those of the stages it is made from."""
    found = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = re.fullmatch(r"(\S+)( AS (\S+))?", rest).groups()
            found[name] = list(found.get(base, []))
        found[name].append((word, rest))
    return found


def test_compose_files_have_the_form_of_the_specification():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, *(str(DOCKER / name) for name in COMPOSE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_the_service_without_root(target):
    last = dict(stages()[target])
    assert last["USER"] == "10001:10001" and json.loads(last["ENTRYPOINT"]) == ["/app/entrypoint.sh"]
    assert json.loads(last["CMD"])[:2] == ["lora-mvp", "serve"]
    assert "/healthz" in last["HEALTHCHECK"] and json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    assert last["EXPOSE"] == "8000"


def test_both_images_differ_in_torch_alone():
    cpu, cuda = ([(w, re.sub("-(cpu|cuda)", "", r)) for w, r in stages()[name]] for name in ("cpu", "cuda"))
    assert [i for i in cuda if i not in cpu and i[0] != "FROM"] == [i for i in cuda if "NVIDIA" in i[1]]
    assert [i for i in cpu if i not in cuda and i[0] != "FROM"] == []


def test_what_is_copied_is_there_and_reaches_the_builder():
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    names = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    for name in {name.removeprefix("./") for found in names for name in found}:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in let_in), f"{name} is left out by Dockerfile.dockerignore"
    assert {word for word in let_in if (ROOT / word).exists()} == set(let_in)


def test_only_torch_is_looked_for_at_the_index_of_torch():
    """It has no other package in the tested version, and pip would look for all of them there."""
    (line,) = [rest for word, rest in stages()["build-cpu"] if word == "RUN" and "TORCH_INDEX" in rest]
    at_index, rest = line.split("; fi")
    assert "--no-deps" in at_index and at_index.rstrip().endswith('--index-url "$TORCH_INDEX" torch')
    assert "index" not in rest and "--constraint constraints.txt" in rest


def test_settings_lie_in_volumes_that_belong_to_the_user_of_the_image():
    api = load_config(DOCKER / "config.yaml").api
    service = COMPOSE["compose.yaml"]["services"]["service"]
    volumes = [volume for volume in service["volumes"] if isinstance(volume, str)]
    found = {
        Path(target): name for name, target in (re.fullmatch(r"\$\{\w+:-(\w+)\}:(.+)", v).groups() for v in volumes)
    }
    kept = {"db_path": api.db_path, "jobs_dir": api.jobs_dir, "tokens_file": api.tokens_file}
    kept |= {"data_dir": api.data_dir, "models_dir": api.models_dir}
    for name, path in kept.items():
        inside = Path("/app") / Path(path).relative_to(DOCKER)
        assert any(inside.is_relative_to(target) for target in found), name
    assert set(found.values()) <= set(COMPOSE["compose.yaml"]["volumes"])
    (made,) = [rest for word, rest in stages()["cpu"] if word == "RUN" and "install -d" in rest]
    owned = made.partition("install -d -o lora -g lora ")[2].split()
    assert {target.name for target in found} == set(owned) and "--uid 10001" in made and "--gid 10001" in made
    assert service["user"] == "${LORA_MVP_USER:-10001:10001}"
    (config,) = [volume for volume in service["volumes"] if volume not in volumes]
    assert config["read_only"] and (DOCKER / config["source"]).is_file()
    assert api.grace_seconds + 20 <= int(service["stop_grace_period"].removesuffix("s"))


def test_the_compose_files_harden_and_publish_the_proxy_only():
    services = COMPOSE["compose.yaml"]["services"]
    for service in services.values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    assert services["proxy"]["ports"] == ["${LORA_MVP_PORTS:-127.0.0.1:8000:8000}"]
    assert services["service"]["init"] and services["service"]["networks"] == ["inside"]
    assert COMPOSE["compose.yaml"]["networks"]["inside"] == {"internal": True}
    fetch = services["fetch"]
    assert fetch["profiles"] == ["fetch"] and fetch["entrypoint"] == ["lora-mvp", "fetch"]
    assert fetch["volumes"] == services["service"]["volumes"] and "inside" not in fetch["networks"]


def test_the_gpus_are_an_addition():
    gpu, plain = (COMPOSE[name]["services"] for name in ("compose.gpu.yaml", "compose.yaml"))
    assert gpu["service"]["deploy"]["resources"]["reservations"]["devices"]
    assert set(gpu) == {name for name, service in plain.items() if service.get("image") == "lora-mvp:cpu"}
    assert all(service["build"]["target"] == "cuda" and service["image"] == "lora-mvp:cuda" for service in gpu.values())


# What the container does when it starts, in a folder that is as the image makes it


@pytest.fixture
def app(tmp_path):
    """The folder /app, and how its user becomes the one of the image, where that is possible."""
    shutil.copy(DOCKER / "config.yaml", tmp_path)
    as_user = []
    if os.geteuid() == 0 and shutil.which("setpriv"):
        other = ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
        start = [
            "sh",
            "-c",
            'exec "$0" --version',
            Path(sys.executable).with_name("lora-mvp"),
        ]  # as the entrypoint does
        reads = subprocess.run([*other, *start], capture_output=True, cwd=ROOT)
        as_user = other if reads.returncode == 0 else []  # a Python in the folder of root is for root alone
    for name in ("data", "models", "outputs", "state"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, *((10001, 10001) if as_user else (-1, -1)))
    for folder in [tmp_path, *tmp_path.parents[:2]]:  # of pytest, for the one who runs it
        folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path, as_user


def started(app, *command, device="/dev/null", **env):
    folder, as_user = app
    start = [*as_user, DOCKER / "entrypoint.sh", *command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"LORA_MVP_CONFIG": str(folder / "config.yaml"), "PATH": path, "PYTHONPATH": str(ROOT)} | env
    return start, {
        "cwd": folder,
        "env": env | {"NVIDIA_DEVICE": device, "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"},
    }


@pytest.mark.parametrize("closed", ["data", "state"])
def test_a_folder_of_another_user_is_told_and_the_rest_is_left_to_the_command(app, closed):
    folder, _ = app
    if os.geteuid() == 0 and shutil.which("setpriv"):  # the shell needs no Python
        app = folder, ["setpriv", "--reuid=10001", "--regid=10001", "--clear-groups"]
        for name in ("data", "models", "outputs", "state"):
            os.chown(folder / name, *((0, 0) if name == closed else (10001, 10001)))
        user = "10001:10001"
    else:
        (folder / closed).rmdir()
        user = f"{os.getuid()}:{os.getgid()}"
    start, how = started(app, "lora-mvp", "serve")
    done = subprocess.run(start, **how, capture_output=True, text=True)
    assert done.returncode == 2 and "LORA_MVP_USER" in done.stderr
    assert f"{folder}/{closed} cannot be written by the user {user}." in done.stderr
    start, how = started(app, "echo", "serve")
    assert subprocess.run(start, **how, capture_output=True, text=True, check=True).stdout == "serve\n"


def test_a_first_start_is_healthy_and_shows_a_token_once(app):
    folder, _ = app
    tokens = []
    for first in (True, False):
        start, how = started(app, "lora-mvp", "serve", "--host", "0.0.0.0", "--port", "0", device="/nowhere")
        with open(folder / "log", "wb") as log, process(start, **how, stdout=log, stderr=log) as running:
            wait_for(
                lambda: (
                    running.poll() is not None
                    or re.search(r"listens on http://\S+:([0-9]+)", (folder / "log").read_text())
                )
            )
            assert running.poll() is None, (folder / "log").read_text()
            url = f"http://127.0.0.1:{re.search(r'listens on .*:([0-9]+)', (folder / 'log').read_text())[1]}"
            assert httpx.get(f"{url}/healthz", timeout=60).json() == {"status": "ok"}
            assert httpx.get(f"{url}/v1/jobs", timeout=60).status_code == 401
            shown = re.findall(r"lmvp_[\w-]{20,}", (folder / "log").read_text())
            assert bool(shown) == first and "There is no GPU in this container" in (folder / "log").read_text()
            tokens += shown
            answer = httpx.get(f"{url}/readyz", timeout=60, headers={"Authorization": f"Bearer {tokens[0]}"})
            assert answer.status_code == 200, answer.text
    assert tokens[0] not in "".join(file.read_text() for file in (folder / "state").glob("tokens*"))


def test_the_proxy_has_timeouts_and_lets_events_through():
    text = (DOCKER / "Caddyfile").read_text()
    for needed in ("read_header 10s", "read_body", "flush_interval -1", "max_size"):
        assert needed in text
