"""The service over HTTP: what clients may rely on, and what they must not be able to do."""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import api_server
import httpx
import httpx2
import pytest
from api_server import Resting, places, raw, served
from browser import wait_for
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans
from PIL import Image
from test_access import Canary

from lora_mvp.api import downloads, edge, hashes, main
from lora_mvp.api.jobs import TERMINAL
from lora_mvp.api.tokens import SCOPES, new_token
from lora_mvp.config import AppConfig

ASKED = {"manifest": "cats/manifest.json", "config": {"training.max_train_steps": 20}}
PROBLEM = "application/problem+json"
NONE = "0" * 26  # no job has this id


def running(root, host="localhost", engine=Resting, **api):
    """A client of the service in this process, below `root`; `engine=None` runs jobs."""
    config = AppConfig.model_validate({"api": places(root, **api), "training": {"pretrained_model": "tiny"}})
    app = main.create_app(config, engine and engine())
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(root):
    with running(root, requests_per_minute=10**6) as found:
        yield found


@pytest.fixture
def job(client):
    """The id of a job in the queue."""
    return client.post("/train", json=ASKED).json()["job_id"]


def folder_of(client, job):
    service = client.app.state.backend.service
    return service.folder(service.get(job))


def problem(answer, status, code=None):
    """An error in the form that all have, with nothing in it that is not for clients."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == PROBLEM
    body = answer.json()
    assert {"type", "title", "status", "detail", "code", "request_id"} <= body.keys() and body["status"] == status
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and "/tmp/" not in answer.text and "lmvp_" not in answer.text
    assert code is None or body["code"] == code, body
    return body


def test_every_error_has_the_same_form(client, job):
    problem(client.get("/none"), 404, "not_found")
    problem(client.get("/v1/jobs/" + NONE), 404, "job_not_found")
    for odd in ("x", "%00", "a" * 26, "..%2f..", NONE + "0", "%ff"):
        problem(client.get("/v1/jobs/" + odd), 404)
    problem(client.put("/train", json=ASKED), 405, "method_not_allowed")
    problem(client.request("BREW", "/train"), 405, "method_not_allowed")
    problem(
        client.post("/train", content=b"x" * 2**21, headers={"Content-Type": "application/json"}), 413, "body_too_large"
    )
    problem(client.post("/train", content=b"a: b", headers={"Content-Type": "application/yaml"}), 415, "not_json")
    problem(client.get("/healthz/", headers={"Host": "rebound.example"}), 400, "host_unknown")
    body = problem(client.post("/train", json={"manifest": 7, "colour": "red"}), 422, "invalid_request")
    assert {part["param"] for part in body["errors"]} == {"body.manifest", "body.colour"}
    body = problem(client.get("/v1/jobs?limit=1000&status=lost"), 422, "invalid_request")
    assert {part["param"] for part in body["errors"]} == {"query.limit", "query.status.0"}
    problem(client.delete(f"/v1/jobs/{job}"), 409, "job_not_terminal")
    problem(client.post(f"/v1/jobs/{job}/retry"), 409, "job_not_terminal")


HOSTILE = {
    "deep": b"[" * 100_000,
    "deep settings": b'{"manifest": "x", "config": {"a":' + b"[" * 50 + b"]" * 50 + b"}}",
    "wide settings": b'{"manifest": "x", "config": {"a": [' + b"0," * 20_000 + b"0]}}",
    "nan": b'{"manifest": "cats/manifest.json", "config": {"training.learning_rate": NaN}}',
    "infinite": b'{"manifest": "cats/manifest.json", "config": {"training.learning_rate": 1e999}}',
    "digits": b'{"manifest": "cats/manifest.json", "config": {"training.max_train_steps": ' + b"9" * 5000 + b"}}",
    "huge": b'{"manifest": "cats/manifest.json", "config": {"training.max_train_steps": ' + b"9" * 40 + b"}}",
    "zero": b'{"manifest": "cats\\u0000/manifest.json"}',
    "half a character": b'{"manifest": "cats/manifest.json", "config": {"training.sample_prompts": ["\\ud800"]}}',
    "bytes": b"\xff\xfe\x00",
    "cut": b'{"manifest": "ca',
    "pattern": b'{"manifest": "cats/manifest.json", "config": {"training.lora_targets": "' + b"(" * 900 + b'"}}',
    "yaml": b"a: &a [x]\nb: [*a, *a]",
    "no object": b"[]",
    "other section": b'{"manifest": "cats/manifest.json", "config": {"api.db_path": "x.json"}}',
    "output": b'{"manifest": "cats/manifest.json", "config": {"training.output_dir": "/tmp/x"}}',
    "wrong value": b'{"manifest": "cats/manifest.json", "config": {"training.lora_rank": "many"}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_the_clients_mistake(client, name):
    answer = client.post("/train", content=HOSTILE[name], headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    problem(answer, answer.status_code)


@pytest.mark.parametrize(
    "key, name",
    [
        ("manifest", "../secret"),
        ("manifest", "/etc/passwd"),
        ("manifest", "out/secret"),
        ("manifest", "zero"),
        ("manifest", "pipe"),
        ("manifest", "hard"),
        ("training.regularization_dir", "out"),
        ("training.pretrained_model", "../data"),
        ("training.pretrained_model", "someone/elses"),
        ("evaluation.clip_model", "/etc"),
    ],
)
def test_a_hostile_name_is_refused_when_it_comes(client, root, key, name):
    (root / "secret").write_text("[]")
    for file, target in {"out": root, "zero": "/dev/zero"}.items():
        if not (root / "data" / file).is_symlink():
            os.symlink(target, root / "data" / file)
    if not (root / "data" / "pipe").exists():
        os.mkfifo(root / "data" / "pipe")
        os.link(root / "secret", root / "data" / "hard")
    body = ASKED | {"manifest": name} if key == "manifest" else {**ASKED, "config": {key: name}}
    body = problem(client.post("/train", json=body), 403)
    assert body["code"] in ("path_forbidden", "model_forbidden")


def test_a_key_makes_one_job(root, tmp_path):
    with running(tmp_path) as client:
        head = {"Idempotency-Key": "monday"}
        with ThreadPoolExecutor(50) as threads:
            answers = list(threads.map(lambda _: client.post("/train", json=ASKED, headers=head), range(50)))
        assert len({answer.json()["job_id"] for answer in answers}) == 1
        assert sorted({answer.status_code for answer in answers}) == [200, 202]
        assert [answer.status_code for answer in answers].count(202) == 1
        assert answers[0].headers["location"] == f"/v1/jobs/{answers[0].json()['job_id']}"
        other = ASKED | {"config": {}}
        problem(client.post("/train", json=other, headers=head), 422, "key_reused")
        for key in ("a b", "k" * 129, ""):
            problem(client.post("/train", json=ASKED, headers={"Idempotency-Key": key}), 422, "invalid_request")
    with running(tmp_path) as client:  # the server has been restarted
        again = client.post("/train", json=ASKED, headers=head)
        assert (again.status_code, again.json()["job_id"]) == (200, answers[0].json()["job_id"])
        assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_status_is_answered_again_only_when_it_changed(client, job):
    for path in (f"/status/{job}", f"/v1/jobs/{job}"):
        first = client.get(path)
        head = {"If-None-Match": first.headers["etag"]}
        same = client.get(path, headers=head)
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", first.headers["etag"])
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200  # it had not started, so it is over at once
    assert client.get(path, headers=head).json()["status"] == "cancelled"
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200
    problem(client.post(f"/v1/jobs/{NONE}/cancel"), 404, "job_not_found")


def test_a_view_holds_nothing_of_the_services_own(client, job):
    view = client.get(f"/status/{job}").json()
    assert not {"key", "key_digest", "engine_ref", "version"} & view.keys()
    assert view["queue_position"] >= 1 and view["links"]["cancel"] == f"/v1/jobs/{job}/cancel"


def test_pages_hold_every_job_once(client):
    made = {client.post("/train", json=ASKED).json()["job_id"] for _ in range(7)}
    seen, after = [], None
    while True:
        page = client.get(
            "/v1/jobs", params={"limit": 3, "status": "queued"} | ({"after": after} if after else {})
        ).json()
        seen += [row["job_id"] for row in page["data"]]
        assert len(page["data"]) <= 3 and page["has_more"] == (page["next"] is not None)
        if not page["has_more"]:
            break
        after = page["next"]
    assert seen == sorted(set(seen), reverse=True) and made <= set(seen)
    assert client.get("/v1/jobs?kind=evaluate").json() == {"data": [], "has_more": False, "next": None}
    two = client.get("/v1/jobs", params={"status": ["queued", "cancelled"], "limit": 100}).json()["data"]
    assert {row["status"] for row in two} <= {"queued", "cancelled"}


def test_retry_and_delete_need_a_job_that_is_over(client, job):
    client.post(f"/v1/jobs/{job}/cancel")
    again = client.post(f"/v1/jobs/{job}/retry", json={"fresh": True})
    assert (again.status_code, again.json()["retry_of"], again.json()["status"]) == (201, job, "queued")
    assert again.headers["location"] == f"/v1/jobs/{again.json()['job_id']}"
    assert client.delete(f"/v1/jobs/{job}").status_code == 204
    problem(client.get(f"/v1/jobs/{job}"), 404, "job_not_found")
    problem(client.delete(f"/v1/jobs/{job}"), 404, "job_not_found")


def test_an_evaluation_needs_a_training_that_succeeded(client, job):
    problem(client.post("/evaluate", json={"model": NONE}), 404, "job_not_found")
    problem(client.post("/evaluate", json={"model": job}), 409, "job_not_terminal")
    client.post(f"/v1/jobs/{job}/cancel")
    assert "succeeded" in problem(client.post("/evaluate", json={"model": job}), 422)["detail"]
    problem(
        client.post("/evaluate", json={"model": "../../etc", "manifest": "cats/manifest.json"}), 403, "path_forbidden"
    )


def sse(text):
    """The events of a stream as (event, id, data)."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], lines.get("id"), json.loads(lines["data"])))
    return found


def test_a_reader_that_comes_back_misses_no_event(client, job):
    folder = folder_of(client, job)
    known = client.get(f"/v1/jobs/{job}/events").json()["next"]
    for step in range(5):
        folder.append("progress", 1, step=step, loss=float("nan") if step == 3 else 0.5)
    page = client.get(f"/v1/jobs/{job}/events", params={"after": known, "limit": 2}).json()
    assert [row["step"] for row in page["data"]] == [0, 1] and page["next"] == page["data"][-1]["seq"]
    rest = client.get(f"/v1/jobs/{job}/events", params={"after": page["next"]}).json()
    assert [row["step"] for row in rest["data"]] == [2, 3, 4] and rest["data"][1]["loss"] is None
    nothing = client.get(f"/v1/jobs/{job}/events", params={"after": rest["next"]}).json()
    assert nothing == {"data": [], "next": rest["next"]}
    client.post(f"/v1/jobs/{job}/cancel")
    head = {"Accept": "text/event-stream"}
    answer = client.get(f"/v1/jobs/{job}/events", headers=head)
    assert answer.headers["content-type"].startswith("text/event-stream")
    everything = sse(answer.text)
    assert everything[-1] == ("end", None, {"reason": "finished", "status": "cancelled"})
    assert [data["step"] for event, _, data in everything if event == "progress"] == [0, 1, 2, 3, 4]
    middle = next(number for _, number, data in everything if data.get("step") == 2)
    later = sse(client.get(f"/v1/jobs/{job}/events", headers=head | {"Last-Event-ID": middle}).text)
    assert later == everything[[number for _, number, _ in everything].index(middle) + 1 :]
    for odd in ("x", "-1", "9" * 40):  # no number of ours: from the start
        assert sse(client.get(f"/v1/jobs/{job}/events", headers=head | {"Last-Event-ID": odd}).text) == everything


def test_parts_of_a_log(client, job):
    assert client.get(f"/v1/jobs/{job}/logs").content == b""
    folder_of(client, job).log_file.write_bytes(b"0123456789")
    whole = client.get(f"/v1/jobs/{job}/logs")
    assert (whole.content, whole.headers["x-log-size"]) == (b"0123456789", "10")
    assert client.get(f"/v1/jobs/{job}/logs?offset=4&limit=3").content == b"456"
    assert client.get(f"/v1/jobs/{job}/logs?offset=40").content == b""
    tail = client.get(f"/v1/jobs/{job}/logs", headers={"Range": "bytes=-3"})
    assert (tail.status_code, tail.content, tail.headers["content-range"]) == (206, b"789", "bytes 7-9/10")
    problem(client.get(f"/v1/jobs/{job}/logs", headers={"Range": "bytes=10-"}), 416, "range_not_satisfiable")


def test_artifacts_are_served_whole_or_in_parts(client, job):
    content, name = os.urandom(3 * 2**20 + 5), "lora_adapter/pytorch weights ü.safetensors"
    place = folder_of(client, job).run / name
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    os.symlink("/etc/passwd", place.parent / "link.json")
    (place.parent.parent / "checkpoint-000004").mkdir()
    (place.parent.parent / "checkpoint-000004" / "unet.safetensors").write_bytes(b"12345")
    rows = client.get(f"/v1/jobs/{job}/artifacts").json()["data"]
    row = next(row for row in rows if row["name"] == name)
    assert row["sha256"] == hashlib.sha256(content).hexdigest() and not any("link" in row["name"] for row in rows)
    found = client.get(f"/v1/jobs/{job}/checkpoints").json()["data"]
    assert found == [{"step": 4, "size": 5, "artifacts": ["checkpoint-000004/unet.safetensors"]}]

    whole = client.get(row["url"])
    assert whole.content == content and whole.headers["etag"] == f'"{row["sha256"]}"'
    assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''pytorch%20weights%20%C3%BC.safetensors"
    part = client.get(row["url"], headers={"Range": "bytes=1048570-", "If-Range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, content[1048570:])
    assert part.headers["content-range"] == f"bytes 1048570-{len(content) - 1}/{len(content)}"
    other = client.get(row["url"], headers={"Range": "bytes=5-", "If-Range": '"another"'})
    assert (other.status_code, other.content) == (200, content)
    assert client.get(row["url"], headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    problem(client.get(row["url"], headers={"Range": f"bytes={len(content)}-"}), 416, "range_not_satisfiable")
    head = client.head(row["url"])
    assert (head.status_code, head.headers["etag"]) == (200, whole.headers["etag"])
    assert int(head.headers["content-length"]) == len(content) and not head.content
    assert client.head("/healthz").status_code == client.head("/").status_code == 200
    assert client.head(f"/v1/jobs/{job}/events").status_code == 405  # it has no end
    problem(client.get(f"/v1/jobs/{job}/metrics"), 404, "artifact_not_found")
    hostile = (
        "../job.json",
        "..%2Fjob.json",
        "/etc/passwd",
        "lora_adapter/link.json",
        "none",
        "lora_adapter",
        "%00",
        "a\\b",
    )
    for wrong in hostile:
        problem(client.get(f"/v1/jobs/{job}/artifacts/{wrong}"), 404)


def test_a_file_costs_the_hash_of_no_other_and_its_own_once(client, job, monkeypatch):
    run = folder_of(client, job).run
    (run / "checkpoint-000004").mkdir(parents=True, exist_ok=True)
    for name, size in {"samples.png": 10, "checkpoint-000004/unet.safetensors": 2**31, "unet.safetensors": 3}.items():
        with open(run / name, "wb") as file:
            file.truncate(size)  # 2 GiB that take no room
        os.utime(run / name, (10**9, 10**9))
    hashed, entered = [], threading.Barrier(8)

    def slowly(path):
        hashed.append(path.name)
        time.sleep(0.3)  # until all have asked
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def ask(_):
        entered.wait()
        return client.get(f"/v1/jobs/{job}/artifacts/samples.png")

    monkeypatch.setattr(hashes, "file_sha256", slowly)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert {answer.headers["ETag"] for answer in answers} == {f'"{hashlib.sha256(bytes(10)).hexdigest()}"'}
    assert client.get(f"/v1/jobs/{job}/checkpoints").json()["data"][0]["size"] >= 2**31
    assert hashed == ["samples.png"]
    os.unlink(run / "checkpoint-000004/unet.safetensors")
    for _ in range(2):  # the second time everything is known, also to the next server: it is on the disk
        assert len(client.get(f"/v1/jobs/{job}/artifacts").json()["data"]) >= 2
        assert sorted(hashed[:2]) == ["samples.png", "unet.safetensors"] and len(hashed) == len(set(hashed))
    os.utime(run / "samples.png", (10**9, 10**9 + 1))
    assert client.get(f"/v1/jobs/{job}/artifacts/samples.png").status_code == 200
    assert hashed.count("samples.png") == 2


def test_a_file_that_goes_or_changes_is_not_sent_as_if_it_had_not(client, job, monkeypatch):
    folder = folder_of(client, job)
    folder.run.mkdir(parents=True, exist_ok=True)
    (folder.run / "samples.png").write_bytes(b"picture")
    listed = folder.artifacts()
    (folder.run / "samples.png").write_bytes(b"another")  # as long, and its time is put back
    monkeypatch.setattr(downloads, "find_artifact", lambda run, name: listed[0])
    with pytest.raises(EOFError):  # through a server the connection breaks; here is the reason
        list(downloads.pieces(open(folder.run / "samples.png", "rb"), 0, 7, listed[0].sha256))
    os.unlink(folder.run / "samples.png")
    problem(client.get(f"/v1/jobs/{job}/artifacts/samples.png"), 410, "artifact_gone")
    os.symlink("/etc/passwd", folder.run / "samples.png")
    problem(client.get(f"/v1/jobs/{job}/artifacts/samples.png"), 410, "artifact_gone")


def test_a_bug_is_said_to_be_one_and_says_no_more(client, job, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("at /tmp/x with hf_abcdefghijklmnopqrstuvwxyz")

    monkeypatch.setattr(type(client.app.state.backend.service), "get", broken)
    lines = logged(monkeypatch)
    body = problem(client.get(f"/status/{job}", headers={"X-Request-ID": "mine-1"}), 500, "internal")
    assert body["request_id"] == "mine-1"
    line = json.loads(lines[-1])
    assert line["request"] == "mine-1" and line["job"] == job and "RuntimeError" in line["stack"]
    assert "hf_abc" not in lines[-1]
    assert client.get("/healthz").json() == {"status": "ok"}


def logged(monkeypatch):
    """The lines that the service writes into its log from now on."""
    lines = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    handler = Kept()
    handler.setFormatter(edge.JsonLines())
    monkeypatch.setattr(logging.getLogger("lora_mvp.api"), "handlers", [handler])
    return lines


def test_healthz_answers_when_everything_else_is_gone(tmp_path):
    with running(tmp_path) as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        client.app.state.backend.service.ready = lambda: {"store": "broken", "disk": None}
        answer = client.get("/readyz")
        assert problem(answer, 503, "not_ready")["errors"] == [{"param": "store", "message": "broken"}]
        backend = client.app.state.backend
        kept, backend.service, backend.tokens = (backend.service, backend.tokens), None, None
        healthy = client.get("/healthz", headers={"Host": "10.1.2.3"})
        backend.service, backend.tokens = kept
        assert (healthy.status_code, healthy.json()) == (200, {"status": "ok"})


def test_metrics_name_no_job(client, job):
    client.get(f"/status/{job}")
    client.post(
        f"/v1/jobs/{client.post('/train', json=ASKED).json()['job_id']}/cancel"
    )  # one that has come into a state
    client.request("BREW", "/none")
    text = client.get("/metrics").text
    queued = next(line for line in text.splitlines() if line.startswith('lora_jobs{kind="train",status="queued"}'))
    assert float(queued.split()[-1]) >= 1 and job not in text and "BREW" not in text
    for name in (
        "lora_http_requests_total",
        "lora_job_transitions_total",
        "lora_http_request_seconds_count",
        "lora_disk_free_bytes",
        "lora_ready",
        "lora_slots_free",
    ):
        assert f"\n{name}" in text
    assert '/status/{job_id}"' in text


def test_too_many_requests(tmp_path):
    with running(tmp_path, requests_per_minute=3) as client:
        codes = [client.get("/v1/jobs").status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        answer = client.get("/v1/jobs")
        problem(answer, 429, "rate_limited")
        assert int(answer.headers["retry-after"]) > 0 and client.get("/healthz").status_code == 200


def routes(client):
    """Every route of the service, with a job that there is none of."""
    for path, methods in client.app.openapi()["paths"].items():
        for method in methods:
            yield method, path.replace("{job_id}", NONE).replace("{name}", "x")


def test_tokens_close_everything_that_is_not_open(tmp_path, monkeypatch):
    file = tmp_path / "tokens"
    secrets = {scope: new_token(file, f"{scope}-1", scope) for scope in SCOPES}
    head = {scope: {"Authorization": f"Bearer {secret}"} for scope, secret in secrets.items()}
    with running(tmp_path, tokens_file=str(file)) as client:
        lines = logged(monkeypatch)
        for method, path in [*routes(client), ("get", "/openapi.json"), ("get", "/none")]:
            if path == "/healthz":
                continue
            for wrong in ({}, {"Authorization": "Bearer lmvp_wrong"}, {"Authorization": secrets["admin"]}):
                answer = client.request(method, path, headers=wrong)
                problem(answer, 401, "token_missing")
                assert answer.headers["www-authenticate"] == "Bearer"
            problem(client.request(method, f"{path}?token={secrets['admin']}"), 401, "token_missing")
            with_read = client.request(method, path, headers=head["read"], json=ASKED if method == "post" else None)
            assert with_read.status_code != 401
            if method != "get":
                assert with_read.status_code in (403, 422), (method, path)
        assert [client.get(path).status_code for path in ("/healthz", "/", "/docs")] == [200] * 3

        problem(client.post("/train", json=ASKED, headers=head["read"]), 403, "scope_missing")
        taken = client.post("/train", json=ASKED, headers=head["admin"])
        job = taken.json()["job_id"]
        assert (taken.status_code, taken.json()["owner"]) == (202, "admin-1")
        for method, path in (
            ("post", f"/v1/jobs/{job}/cancel"),
            ("post", f"/v1/jobs/{job}/retry"),
            ("delete", f"/v1/jobs/{job}"),
        ):
            problem(client.request(method, path, headers=head["submit"]), 403, "not_yours")
        key = {"Idempotency-Key": "one"}
        mine = client.post("/train", json=ASKED, headers=head["submit"] | key)
        theirs = client.post("/train", json=ASKED, headers=head["admin"] | key)
        assert (mine.status_code, theirs.status_code) == (202, 202)  # a key belongs to its token
        assert client.post(f"/v1/jobs/{mine.json()['job_id']}/cancel", headers=head["admin"]).status_code == 200
        log = "\n".join(lines)
        assert '"token": "read-1"' in log and job in log and not any(secret in log for secret in secrets.values())


def test_without_tokens_only_this_machine_is_answered(tmp_path):
    for host, status in (("10.1.2.3", 403), ("127.0.0.1", 200)):
        with running(tmp_path, host=host, allowed_hosts=["10.1.2.3", "127.0.0.1"]) as client:
            assert client.get("/v1/jobs").status_code == status
            assert client.get("/healthz").status_code == 200
    file = tmp_path / "tokens"
    head = {"Authorization": f"Bearer {new_token(file, 'ana', 'read')}"}
    with running(tmp_path, host="10.1.2.3", allowed_hosts=["10.1.2.3"], tokens_file=str(file)) as client:
        assert client.get("/v1/jobs", headers=head).status_code == 200


def test_nothing_is_opened_to_other_origins(client):
    answer = client.get("/v1/jobs", headers={"Origin": "https://example.org"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    for site, status in {"cross-site": 403, "same-site": 403, "same-origin": 404, "none": 404}.items():
        answer = client.post(f"/v1/jobs/{NONE}/cancel", headers={"Sec-Fetch-Site": site})
        problem(answer, status)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_app_is_light_and_opens_nothing_before_it_starts(tmp_path):
    code = "import sys, lora_mvp.api.main; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"ray", "torch", "diffusers", "transformers", "peft", "accelerate", "cv2", "matplotlib"} & set(
        done.stdout.split()
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_schemathesis_finds_no_500(client, job, monkeypatch, examples):
    """Requests made from the OpenAPI document, well-formed and not, to every route; answers are as the document says."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as openapi

    monkeypatch.setattr(logging.getLogger("lora_mvp.api"), "handlers", [logging.NullHandler()])
    monkeypatch.setattr(downloads, "LOOK_SECONDS", 0.01)
    client.post(f"/v1/jobs/{job}/cancel")
    folder_of(client, job).run.mkdir(parents=True, exist_ok=True)
    (folder_of(client, job).run / "x").write_bytes(b"0123456789")
    document = client.app.openapi()
    conform = [openapi.status_code_conformance, openapi.content_type_conformance, openapi.response_schema_conformance]
    seen, checks = set(), [not_a_server_error, openapi.response_headers_conformance, *conform]
    for operation in (found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()):
        explore(operation.as_strategy(schemathesis.GenerationMode.POSITIVE), examples, client, job, checks, seen)
        if list(operation.iter_parameters()) or operation.body:  # else there is nothing to get wrong
            explore(operation.as_strategy(schemathesis.GenerationMode.NEGATIVE), examples, client, job, checks, seen)
    assert seen == {(method, path) for path, methods in document["paths"].items() for method in methods}


def explore(strategy, examples, client, job, checks, seen):
    quick = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @quick
    @given(case=strategy, known=booleans())
    def each(case, known):
        if known and "job_id" in case.path_parameters:
            case.path_parameters["job_id"] = job
        sent = case.as_transport_kwargs(base_url="http://localhost")
        sent.pop("cookies", None)
        if isinstance(sent.get("data"), bytes | str):
            sent["content"] = sent.pop("data")
        try:
            answer = client.request(**sent)
        except (httpx2.InvalidURL, UnicodeEncodeError):  # the client has a standard, too
            return
        seen.add((case.method.lower(), case.operation.path))
        case.validate_response(answer, checks=checks)

    each()


# --- a server in a process of its own ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that waits one second for a body, with a job in its queue."""
    root = tmp_path_factory.mktemp("server")
    with served(root, env={"TEST_BODY_SECONDS": "1"}, requests_per_minute=10**6) as found:
        found.job = httpx.post(f"{found.url}/train", json=ASKED).raise_for_status().json()["job_id"]
        found.root = root
        yield found


def head(method, path, *lines, host="127.0.0.1"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


JSON = "Content-Type: application/json"


def test_a_slow_body_is_not_waited_for(server):
    began = time.monotonic()
    answer = raw(server.port, head("POST", "/train", JSON, "Content-Length: 100"), b'{"manifest": ')
    assert answer.startswith(b"HTTP/1.1 408") and b"body_too_slow" in answer and PROBLEM.encode() in answer
    assert time.monotonic() - began >= 1
    answer = raw(server.port, head("POST", "/train", JSON, "Transfer-Encoding: chunked"), b"1\r\n{\r\n")
    assert answer.startswith(b"HTTP/1.1 408")


def peak(process):
    """Most memory that a process has ever held, in MiB."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize("length", [f"Content-Length: {300 * 2**20}", "Transfer-Encoding: chunked"])
def test_a_body_of_300_mib_is_refused_and_not_kept(server, length):
    before, mib = peak(server.process), b" " * 2**20
    chunk = b"100000\r\n" + mib + b"\r\n" if "chunked" in length else mib
    answer = raw(server.port, head("POST", "/train", JSON, length), *[chunk] * 300)
    # the server answers and closes while the client still sends: the answer may be lost on the way, the memory not
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer)
    assert peak(server.process) - before < 20
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    answer = raw(server.port, head("POST", "/train", JSON, length), chunk * 2)
    assert answer.startswith(b"HTTP/1.1 413") and PROBLEM.encode() in answer


def test_no_secret_comes_into_the_log(server):
    for path in ("/v1/jobs?token=lmvp_" + "q" * 43, "/hf_" + "q" * 34):
        httpx.get(server.url + path, headers={"Authorization": "Bearer lmvp_" + "b" * 43})
    text = server.log.read_text()
    assert "q" * 30 not in text and "b" * 30 not in text and '"path": "/v1/jobs"' in text
    lines = [line for line in text.splitlines() if line.startswith("{")]
    assert all(
        {"time", "level", "request", "path", "status"} <= json.loads(line).keys() for line in lines if '"path"' in line
    )


def test_a_file_that_changes_while_it_is_sent_breaks_the_connection(server):
    place = server.root / "jobs" / server.job / "run" / "samples.png"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(bytes(64 * 2**20))
    url = f"{server.url}/v1/jobs/{server.job}/artifacts/samples.png"
    with pytest.raises(httpx.RemoteProtocolError), httpx.stream("GET", url) as answer:
        for number, _ in enumerate(answer.iter_raw()):
            if number == 0:
                with open(place, "r+b") as file:  # in place; one that is replaced stays what it was
                    file.seek(-1, os.SEEK_END)
                    file.write(b"x")
    promised, got = httpx.get(url, headers={"Range": "bytes=0-0"}).headers["etag"], hashlib.sha256()
    with httpx.stream("GET", url) as answer:
        for number, part in enumerate(answer.iter_raw()):
            got.update(part)
            if number == 0:
                place.with_name("new").write_bytes(b"new")
                os.replace(place.with_name("new"), place)
    assert f'"{got.hexdigest()}"' == promised


def test_a_second_server_says_why_it_does_not_start(server):
    env = os.environ | {"LORA_MVP_CONFIG": str(server.root / "config.yaml")}
    done = subprocess.run([sys.executable, api_server.__file__], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr
    assert "in use" in done.stderr or "another" in done.stderr
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_stop_ends_streams_and_loses_nothing(tmp_path):
    """SIGTERM while a stream is read and jobs come in: the stream says so, and every job that was taken is there."""
    with served(tmp_path, max_queued=10**6, requests_per_minute=10**6) as server:
        job = httpx.post(f"{server.url}/train", json=ASKED).json()["job_id"]
        taken, refused = [job], []

        def keep_submitting():
            with httpx.Client(base_url=server.url) as client:
                while True:
                    try:
                        answer = client.post("/train", json=ASKED)
                    except httpx.TransportError:  # it has stopped
                        return
                    if answer.status_code == 202:
                        taken.append(answer.json()["job_id"])
                    else:
                        refused.append(answer)

        threads = [threading.Thread(target=keep_submitting) for _ in range(4)]
        stream = httpx.stream("GET", f"{server.url}/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(120)]
        for number, connection in enumerate(idle):  # readers that never read, and some that do not even ask
            line = head("GET", f"/v1/jobs/{job}/events", "Accept: text/event-stream")
            connection.sendall(line if number < 100 else line[:20])
        with stream as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: state"
            for thread in threads:
                thread.start()
            wait_for(lambda: len(taken) > 20)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        server.process.wait(60)
        for thread in threads:
            thread.join()
        for connection in idle:
            connection.close()
    assert sse("\n".join(rest).split("\n\n", 1)[1])[-1] == ("end", None, {"reason": "draining"})
    for answer in refused:
        problem(answer, 503, "draining")
    assert "Traceback" not in server.log.read_text() and "timeout graceful" not in server.log.read_text()
    with running(tmp_path, max_queued=10**6, requests_per_minute=10**6) as client:
        assert [client.get(f"/status/{job}").status_code for job in taken] == [200] * len(taken)


def test_the_promised_command_serves_and_stops(tmp_path):
    with served(tmp_path, command=(sys.executable, "-m", "uvicorn", "lora_mvp.api.main:app", "--port", "0")) as server:
        assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
        head = {"Authorization": f"Bearer {re.search('lmvp_[A-Za-z0-9_-]+', server.log.read_text())[0]}"}
        wait_for(lambda: httpx.get(f"{server.url}/readyz", headers=head).status_code == 200)
        assert httpx.get(f"{server.url}/readyz", headers=head).json()["engine"]["name"] == "local"
        server.process.send_signal(signal.SIGTERM)
        assert (
            server.process.wait(60) == -signal.SIGTERM
        )  # as uvicorn does: it stops in order, then lets the signal act


def swapped(link, target):
    """Put a link in the place of a file or folder."""
    os.rename(link, f"{link}-before")
    os.symlink(target, link)


def test_what_is_swapped_after_the_submit_is_refused_by_the_job(tmp_path):
    """The service has looked and said yes; then files change, and only then the jobs start, in processes of their own."""
    elsewhere, data, canary = tmp_path / "elsewhere", tmp_path / "data", tmp_path / "canary"
    token = "hf_" + "q" * 34
    unsafe = pickle.dumps(Canary(canary))
    asked = {
        "link": {**ASKED, "manifest": "cats/manifest.json"},
        "pictures": {**ASKED, "manifest": "bad/manifest.json"},
    }
    asked["model"] = {
        "manifest": "dogs/manifest.json",
        "config": {"training.pretrained_model": "base/unet.safetensors"},
    }
    places(tmp_path)
    for name in ("bad", "dogs"):
        (data / name).mkdir()
    pictures = ("bomb.png", "cut.jpg", "drawing.png", f"{token}.png")
    for folder, files in {"bad": pictures, "dogs": ("1.png",)}.items():
        rows = [{"image": file, "caption": "a dog", "split": "train"} for file in files]
        (data / folder / "manifest.json").write_text(json.dumps(rows))
        for file in files:
            (data / folder / file).write_bytes(b"")
    Image.new("RGB", (96, 96), "red").save(data / "dogs" / "1.png")
    Image.new("1", (20_000, 20_000)).save(data / "bad" / "bomb.png")
    Image.effect_noise((96, 96), 50).save(data / "bad" / "whole.jpg")
    (data / "bad" / "cut.jpg").write_bytes((data / "bad" / "whole.jpg").read_bytes()[:900])
    (data / "bad" / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "models" / "base").mkdir()
    (tmp_path / "models" / "base" / "unet.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with running(tmp_path) as client:
        jobs = {name: client.post("/train", json=body).json()["job_id"] for name, body in asked.items()}
    shutil.copytree(data / "cats", elsewhere)
    swapped(data / "cats", elsewhere)
    (tmp_path / "models" / "base" / "unet.safetensors").write_bytes(unsafe)
    with running(tmp_path, engine=None, data_dir=str(data)) as client:
        ended = {name: wait_for(lambda job=job: over(client, job), 180) for name, job in jobs.items()}
        said = [client.get(f"/v1/jobs/{job}/{part}").text for job in jobs.values() for part in ("logs", "events")]
    assert {name: job["error"]["code"] for name, job in ended.items()} == {
        "link": "path_forbidden",
        "model": "unsafe_weights",
        "pictures": "invalid_request",
    }
    assert not canary.exists()
    assert all(name in ended["pictures"]["error"]["message"] for name in pictures[:3])
    everything = "\n".join([*said, json.dumps(ended)])
    assert token not in everything and "***" in everything and str(tmp_path) not in json.dumps(ended)


def over(client, job):
    """The job, once it has ended."""
    found = client.get(f"/status/{job}").json()
    return found["status"] in TERMINAL and found


@pytest.mark.slow  # test_editor.py asks the same of the classes that users import
@pytest.mark.parametrize(
    "module, name, methods",
    [
        ("service", "Service", {"submit", "cancel", "retry", "delete", "tick", "start", "drain", "ready"}),
        ("client", "Client", {"train", "evaluate", "status", "events", "logs", "wait", "download"}),
        ("runner", "Runner", {"run", "start", "beat", "look", "press", "conclude"}),
        ("engines", "LocalEngine", {"nodes", "start", "poll", "why", "stop", "forget", "describe"}),
    ],
)
def test_an_editor_completes_the_methods(module, name, methods):
    jedi = pytest.importorskip("jedi")
    code = f"from lora_mvp.api.{module} import {name}\ndef f(it: {name}):\n    it."
    assert methods <= {found.name for found in jedi.Script(code).complete(3, 7)}
