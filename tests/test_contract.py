"""What a client is told: tokens, hosts, origins, the OpenAPI document, uploads, and the commands of docs/SERVICE.md."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import httpx
import pytest
from api_server import places, served
from browser import process, wait_for
from live_service import CLI, ENV, ROOT, command, end_jobs
from PIL import Image
from test_api import ASKED, NONE, job, problem, root, running  # noqa: F401  fixtures among them

from lora_mvp.api.contract import job_config
from lora_mvp.api.datasets import publish
from lora_mvp.api.tokens import new_token, revoke_token
from lora_mvp.cli import build_parser, main
from lora_mvp.config import AppConfig
from lora_mvp.errors import LoraMvpError


@pytest.fixture(scope="module")
def client(root):  # noqa: F811
    with running(root, requests_per_minute=10**6) as found:
        yield found


# -- settings in effect ------------------------------------------------------------------------------------------------


def test_a_base_that_jobs_cannot_use_is_refused_at_once(tmp_path, capsys):
    chosen = {"training": {"pretrained_model": "some/base"}}
    for more, said in (({}, "not in api.models"), ({"models": ["some/base"]}, "not on the service's machine")):
        file = tmp_path / "service.yaml"
        file.write_text(json.dumps({"api": places(tmp_path, **more), **chosen}))
        assert main(["serve", "--port", "0", "--config", str(file)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1, error
    config = AppConfig.model_validate({"api": places(tmp_path)})  # nobody chose a base: jobs name theirs
    from api_server import Resting
    from fastapi.testclient import TestClient

    from lora_mvp.api.main import create_app

    with TestClient(create_app(config, Resting()), base_url="http://localhost") as client:
        body = problem(client.post("/train", json={"manifest": "cats/manifest.json"}), 403, "model_forbidden")
        assert "training.pretrained_model" in body["detail"] and "tiny" in body["detail"]
        named = {**ASKED, "config": {"training.pretrained_model": "tiny"}}
        assert client.post("/train", json=named).status_code == 202


def test_no_error_of_a_job_names_what_the_service_sets_itself():
    from huggingface_hub.errors import OfflineModeIsEnabled

    from lora_mvp.api.failures import job_error

    hub = "Cannot reach https://x/y: offline mode is enabled. To disable it, please unset the `HF_HUB_OFFLINE` environment variable."
    for error in (
        OfflineModeIsEnabled(hub),
        LoraMvpError("base_unreachable", f"the base x could not be fetched ({hub})."),
    ):
        said = job_error(error).message
        assert "unset" not in said and "HF_HUB_OFFLINE" not in said, said


# -- the promised command ----------------------------------------------------------------------------------------------


def test_the_promised_command_is_safe_and_works_for_everybody(tmp_path):
    """`uvicorn lora_mvp.api.main:app --host 0.0.0.0`: the first start makes a token, shows it once and keeps its hash."""
    promised = (sys.executable, "-m", "uvicorn", "lora_mvp.api.main:app", "--host", "0.0.0.0", "--port", "0")
    env = {"PYTHONPATH": str(ROOT)}
    (tmp_path / "config.yaml").write_text(json.dumps({"api": places(tmp_path)}))
    env = os.environ | env | {"LORA_MVP_CONFIG": str(tmp_path / "config.yaml"), "OMP_NUM_THREADS": "1"}
    shown = []
    for start in range(2):
        log = tmp_path / f"{start}.log"
        with open(log, "wb") as file, process([*promised], env=env, stdout=file, stderr=file):
            port = wait_for(lambda log=log: re.findall(r"running on http://0\.0\.0\.0:([0-9]+)", log.read_text()))[0]
            shown += re.findall(r"lmvp_\S+", log.read_text())
            url, head = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {shown[0]}"}
            assert httpx.get(f"{url}/v1/jobs").status_code == 401
            for host in (f"127.0.0.1:{port}", f"192.0.2.7:{port}", f"{socket.gethostname()}:{port}"):
                assert httpx.get(f"{url}/v1/jobs", headers=head | {"Host": host}).status_code == 200
            other = httpx.get(f"{url}/v1/jobs", headers=head | {"Host": "gpu.example.org"})
            assert "api.allowed_hosts" in problem(other, 400, "host_unknown")["detail"]
    assert len(shown) == 1  # the second start says nothing
    kept = (tmp_path / "tokens").read_text()
    assert shown[0] not in kept and '"scope":"admin"' in kept and (tmp_path / "tokens").stat().st_mode & 0o077 == 0


def test_tokens_are_listed_and_revoked(tmp_path, capsys):
    where = ["--set", f"api.tokens_file={tmp_path / 'tokens'}"]
    assert main(["token", "ana", "--scope", "submit", *where]) == 0 and capsys.readouterr().out.startswith("lmvp_")
    assert main(["token", "list", *where]) == 0 and capsys.readouterr().out == "submit ana\n"
    assert main(["token", "revoke", "bob", *where]) == 2
    assert "there is no token 'bob'; there are ana" in capsys.readouterr().err
    assert main(["token", "revoke", "ana", *where]) == 0 and (tmp_path / "tokens").read_text() == ""


def test_a_stream_ends_when_its_token_is_revoked(tmp_path):
    secret = new_token(tmp_path / "tokens", "ana", "submit")
    head = {"Authorization": f"Bearer {secret}"}
    with served(tmp_path, tokens_file=str(tmp_path / "tokens")) as server:
        id = httpx.post(f"{server.url}/train", json=ASKED, headers=head).json()["job_id"]
        stream = {**head, "Accept": "text/event-stream"}
        with httpx.stream("GET", f"{server.url}/v1/jobs/{id}/events", headers=stream, timeout=20) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: state"
            revoke_token(tmp_path / "tokens", "ana")
            assert 'data: {"reason": "token_revoked"}' in list(lines)
        assert httpx.get(f"{server.url}/v1/jobs/{id}", headers=head).status_code == 401


def test_a_retry_with_a_key_makes_one_job(client, job):  # noqa: F811
    client.post(f"/v1/jobs/{job}/cancel")
    key = {"Idempotency-Key": "again"}
    answers = [client.post(f"/v1/jobs/{job}/retry", headers=key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    problem(client.post(f"/v1/jobs/{job}/retry", json={"fresh": True}, headers=key), 422, "key_reused")


def test_a_page_of_another_origin_changes_nothing(client):
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost", 404)):
        problem(client.post(f"/v1/jobs/{NONE}/cancel", headers={"Origin": origin}), status)


def test_a_forwarded_address_counts_only_from_a_known_proxy(tmp_path, monkeypatch):
    from test_api import logged

    for trusted, seen in (([], "127.0.0.1"), (["127.0.0.0/8"], "203.0.113.9")):
        with running(tmp_path, trusted_proxies=trusted) as client:
            client._transport.client = ("127.0.0.1", 5000)
            lines = logged(monkeypatch)
            client.get("/v1/jobs", headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.9"})
            assert f'"client": "{seen}"' in lines[-1]


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_document_says_what_there_is(client):
    document = client.app.openapi()
    schemas = document["components"]["schemas"]
    assert schemas["TrainRequest"]["properties"]["config"]["$ref"] == "#/components/schemas/JobConfig"
    steps = schemas["JobConfig"]["properties"]["training.max_train_steps"]
    assert steps["type"] == "integer" and "default" not in steps and steps["description"]
    assert set(schemas["EventPage"]["properties"]["data"]["items"]["discriminator"]["mapping"]) == {
        "state",
        "progress",
        "checkpoint",
        "sample",
        "result",
    }
    assert "metrics" in json.dumps(schemas["ArtifactView"]["properties"]["kind"])
    assert {"judgement", "scores"} <= schemas["Metrics"]["properties"].keys()
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            security, answers = about.get("security"), about["responses"]
            assert security == (None if path == "/healthz" else [{"HTTPBearer": []}, {}]), path
            assert "405" not in answers and ("413" in answers) == ("requestBody" in about), (method, path)
            assert ("404" in answers) == ("{" in path or path == "/evaluate"), (method, path)
            if "429" in answers:
                assert "Retry-After" in answers["429"]["headers"]
    taken, seen = (
        document["paths"]["/train"]["post"]["responses"],
        document["paths"]["/status/{job_id}"]["get"]["responses"],
    )
    assert "Location" in taken["202"]["headers"] and "Location" in taken["200"]["headers"]
    assert "ETag" in seen["200"]["headers"] and "422" not in seen


def test_every_setting_that_a_job_may_change_is_described_and_no_other():
    from lora_mvp.api.access import offered

    assert list(job_config()["properties"]) == offered()
    assert all(schema.get("description") for schema in job_config()["properties"].values())


def test_the_page_of_the_routes_needs_nothing_from_elsewhere(client):
    answer = client.get("/docs")
    assert answer.status_code == 200 and "script-src 'sha256-" in answer.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", answer.text) and "fetch(" in answer.text


def test_models_and_manifests_are_listed(client, root):  # noqa: F811
    assert {"name": "tiny", "kind": "base", "here": True} in client.get("/v1/models").json()["data"]
    assert {"manifest": "cats/manifest.json", "train": 1, "val": 0} in client.get("/v1/datasets").json()["data"]


def test_a_saved_model_is_evaluated_with_a_manifest(client, root):  # noqa: F811
    adapter = root / "models" / "mine"
    adapter.mkdir(exist_ok=True)
    (adapter / "pytorch_lora_weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    body = problem(
        client.post("/evaluate", json={"model": "mine", "manifest": "cats/manifest.json"}), 422, "too_few_images"
    )
    assert "0 for val" in body["detail"]
    rows = [{"image": "1.png", "caption": "a cat", "split": "val"}] * 2
    (root / "data" / "cats" / "real.json").write_text(json.dumps(rows))
    taken = client.post("/evaluate", json={"model": "mine", "manifest": "cats/real.json"})
    assert taken.status_code == 202 and taken.json()["spec"]["model"] == "mine" and taken.json()["result"] is None
    assert "manifest" in problem(client.post("/evaluate", json={"model": "mine"}), 422)["detail"]
    problem(client.post("/evaluate", json={"model": "yours", "manifest": "cats/manifest.json"}), 403, "model_forbidden")
    problem(
        client.post("/evaluate", json={"model": "../data", "manifest": "cats/manifest.json"}), 403, "path_forbidden"
    )


# -- uploads -----------------------------------------------------------------------------------------------------------


def pictures(folder: Path, number: int = 5) -> Path:
    """A raw folder of pictures that differ, and one that is none."""
    (folder / "discs").mkdir(parents=True)
    for n in range(number):
        noise = Image.effect_noise((80, 80), 20 + 40 * n).convert("RGB")
        noise.paste(("red", "teal", "gold", "navy", "plum")[n % 5], (5, 5, 20 + 5 * n, 60))
        noise.save(folder / "discs" / f"{n}.png")
        (folder / "discs" / f"{n}.txt").write_text(f"a disc, number {n}")
    (folder / "discs" / "cut.png").write_bytes((folder / "discs" / "0.png").read_bytes()[:90])
    return folder


def zipped(files: dict[str, bytes]) -> bytes:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return box.getvalue()


def linked() -> bytes:
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w") as made:
        info = tarfile.TarInfo("out")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        made.addfile(info)
    return box.getvalue()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """A server that takes small uploads."""
    root = tmp_path_factory.mktemp("uploads")  # noqa: F811
    with served(root, requests_per_minute=10**6, max_upload_gb=0.002) as found:
        found.root = root
        yield found


def send(server, name: str, body: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/datasets", params={"name": name}, content=body, timeout=120)


def test_a_folder_is_sent_checked_and_ready_for_a_training(uploads, tmp_path):
    folder = pictures(tmp_path / "my discs")
    argv = ["jobs", "--url", uploads.url, "submit", str(folder), "--set", "training.max_train_steps=2"]
    done = command(*argv)
    assert done.returncode == 0 and "cut.png" in done.stderr and "pictures to train on" in done.stderr, done.stderr
    job = httpx.get(f"{uploads.url}/v1/jobs/{done.stdout.strip()}").json()  # noqa: F811
    name = job["spec"]["manifest"].split("/")[0]
    assert name.startswith("my-discs-")
    found = httpx.get(f"{uploads.url}/v1/datasets/{name}").json()
    assert found["train"] + found["val"] == 5 and found["rejected"][0]["file"] == "discs/cut.png"
    rows = json.loads((uploads.root / "data" / name / "manifest.json").read_text())["images"]
    assert sorted(row["caption"] for row in rows) == [f"a disc, number {n}" for n in range(5)]
    assert not [path for path in (uploads.root / "data").iterdir() if path.name.startswith(".")]
    assert str(uploads.root) not in json.dumps(found)
    assert command(*argv).stdout.strip() != done.stdout.strip()  # another job of the same pictures
    assert [row["manifest"] for row in httpx.get(f"{uploads.url}/v1/datasets").json()["data"]].count(
        job["spec"]["manifest"]
    ) == 1
    problem(send(uploads, name, zipped({"1.png": b""})), 409, "dataset_exists")
    refused = command("jobs", "--url", uploads.url, "datasets", "--delete", name)
    assert refused.returncode == 2 and "cancel it, or wait" in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    "body, status, code",
    [
        (zipped({"../1.png": b"x"}), 403, "path_forbidden"),
        (zipped({"/etc/1.png": b"x"}), 403, "path_forbidden"),
        (linked(), 422, "archive_invalid"),
        (zipped({"bomb.png": bytes(10**7)}), 413, "archive_too_large"),
        (zipped({"1.png": b"no picture"}), 422, "nothing_accepted"),
        (zipped({f"{'x' * 300}.png": b"x"}), 422, "archive_invalid"),
        (b"no archive", 422, "archive_invalid"),
        (os.urandom(2**21), 413, None),
    ],
)
def test_a_hostile_archive_leaves_nothing(uploads, body, status, code):
    before = sorted(path.name for path in (uploads.root / "data").iterdir())
    problem(send(uploads, "hostile", body), status, code)
    assert sorted(path.name for path in (uploads.root / "data").iterdir()) == before
    assert not (uploads.root / "1.png").exists()


def test_an_upload_is_removed_by_its_sender_once_no_job_needs_it(tmp_path):
    secrets = {name: new_token(tmp_path / "tokens", name, "submit") for name in ("ana", "bob")}
    ana, bob = ({"Authorization": f"Bearer {secret}"} for secret in secrets.values())
    left = tmp_path / "data" / ".upload-1"  # by a server that was killed
    (tmp_path / "prepared").mkdir()
    with running(tmp_path, tokens_file=str(tmp_path / "tokens")) as client:
        left.mkdir()
        os.utime(left, (0, 0))
        owner = client.post("/train", json=ASKED, headers=ana).json()["owner"]
        shutil.copytree(tmp_path / "data" / "cats", tmp_path / "prepared", dirs_exist_ok=True)
        publish(tmp_path, "dogs", "1", {}, client.app.state.backend.config.api, owner)
    with running(tmp_path, tokens_file=str(tmp_path / "tokens")) as client:
        assert not left.exists()
        waiting = client.post("/train", json={**ASKED, "manifest": "dogs/manifest.json"}, headers=ana).json()["job_id"]
        problem(client.delete("/v1/datasets/dogs", headers=bob), 403, "not_yours")
        assert waiting in problem(client.delete("/v1/datasets/dogs", headers=ana), 409, "dataset_in_use")["detail"]
        client.post(f"/v1/jobs/{waiting}/cancel", headers=ana)
        assert client.delete("/v1/datasets/dogs", headers=ana).status_code == 204
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cats"]
        for name in ("dogs", "cats"):  # gone; put there by hand
            problem(client.delete(f"/v1/datasets/{name}", headers=ana), 404, "dataset_not_found")


@pytest.mark.parametrize("name", ["jobs.json", "jobs.db"])
def test_a_store_that_is_removed_under_the_service_makes_it_not_ready(tmp_path, name):
    with running(tmp_path, db_path=str(tmp_path / name)) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        waiting = client.post("/train", json=ASKED).json()["job_id"]
        (tmp_path / name).unlink()
        (part,) = problem(client.get("/readyz"), 503, "not_ready")["errors"]
        assert part["param"] == "store" and "was removed while the service ran; start it anew" in part["message"]
    with running(tmp_path, db_path=str(tmp_path / name)) as client:  # as it is said
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert client.get(f"/v1/jobs/{waiting}").json()["status"] == "queued"


def test_names_of_uploads_stay_in_their_folder(uploads):
    for name in ("../x", ".hidden", "a/b", "", "a" * 200):
        problem(send(uploads, name, zipped({"1.png": b""})), 422, "invalid_request")
    for name in ("..", "%2e%2e", "cats", ".upload-1"):
        assert httpx.get(f"{uploads.url}/v1/datasets/{name}").status_code in (404, 200 if name == ".." else 404)


# -- docs/SERVICE.md ---------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The commands of docs/SERVICE.md, in order, without comments and prompts."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "SERVICE.md").read_text(), re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in blocks]
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_documented_command_is_one():
    ours = [words for words in map(shlex.split, documented()) if words[0] == "lora-mvp"]
    assert len(ours) > 10
    for words in ours:
        build_parser().parse_args(words[1:])


@pytest.mark.slow
def test_the_documented_commands_work_word_for_word(tmp_path):
    """The first section, as somebody types it in a folder with nothing but pictures."""
    pictures(tmp_path / "cats", 12)
    ours = [line for line in documented() if line.startswith("lora-mvp")]
    first = ours.index("lora-mvp serve")
    last = next(n for n, line in enumerate(ours) if line.startswith("lora-mvp jobs download"))
    env = {name: value for name, value in ENV.items() if name != "CUDA_VISIBLE_DEVICES"} | {"CUDA_VISIBLE_DEVICES": ""}

    def typed(line: str, job: str = "") -> list[str]:  # noqa: F811
        return [*CLI, *(job if word == "JOB" else word for word in shlex.split(line)[1:])]

    log = tmp_path / "serve.log"
    with open(log, "wb") as file, process(typed(ours[first]), env=env, cwd=tmp_path, stdout=file, stderr=file):
        wait_for(lambda: "listens on http://127.0.0.1:8000" in log.read_text(), 60)
        names = []
        for line in ours[first + 1 : last + 1]:
            done = subprocess.run(
                typed(line, names[0] if names else ""),
                env=env,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, (line, done.stderr)
            names += [done.stdout.split()[0]] if " submit " in line else []
            if " evaluate " in line:
                assert "verdict" in done.stderr + done.stdout
    assert (tmp_path / "cats-lora" / "lora_adapter").is_dir()
    end_jobs(tmp_path / "state" / "jobs")
