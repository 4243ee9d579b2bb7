"""The container files, as far as that goes without a container engine: their schema, and that they fit together."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from lora_mvp.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
COMPOSE = {name: yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.cpu.yaml")}


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
    assert last["USER"].isdecimal() and int(last["USER"]) > 0
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


def test_settings_lie_in_what_is_mounted():
    api = load_config(DOCKER / "config.yaml").api
    service = COMPOSE["compose.cpu.yaml"]["services"]["service"]
    mounts = {Path(volume["target"]): volume for volume in service["volumes"]}
    kept = {"db_path": api.db_path, "jobs_dir": api.jobs_dir, "tokens_file": api.tokens_file}
    for name, path in kept.items():
        inside = Path("/app") / Path(path).relative_to(DOCKER)
        mount = next(volume for target, volume in mounts.items() if inside.is_relative_to(target))
        assert not mount.get("read_only"), name
    assert mounts[Path("/app/data")]["read_only"] and mounts[Path("/app/config.yaml")]["read_only"]
    assert (DOCKER / mounts[Path("/app/config.yaml")]["source"]).is_file()
    assert api.tokens_file and api.grace_seconds + 20 <= int(service["stop_grace_period"].removesuffix("s"))


def test_both_compose_files_harden_and_publish_the_proxy_only():
    services = COMPOSE["compose.cpu.yaml"]["services"]
    for name in ("service", "proxy"):
        assert services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"]
        assert services[name]["security_opt"] == ["no-new-privileges:true"]
        assert COMPOSE["compose.yaml"]["services"][name]["extends"] == {"file": "compose.cpu.yaml", "service": name}
    assert "ports" not in services["service"] and services["service"]["init"]
    assert services["proxy"]["ports"] == ["${LORA_MVP_PORTS:-127.0.0.1:8000:8000}"]
    gpu = COMPOSE["compose.yaml"]["services"]["service"]
    assert gpu["build"]["target"] == "cuda" and gpu["deploy"]["resources"]["reservations"]["devices"]
    for part in ("networks", "volumes"):  # top-level parts are not taken along by `extends`
        assert set(COMPOSE["compose.yaml"][part]) == set(COMPOSE["compose.cpu.yaml"][part])


def test_the_proxy_has_timeouts_and_lets_events_through():
    text = (DOCKER / "Caddyfile").read_text()
    for needed in ("read_header 10s", "read_body", "flush_interval -1", "max_size"):
        assert needed in text
