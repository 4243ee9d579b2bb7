"""The service's page in a real browser, on a real training whose data has a hostile name."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import browse, wait_for
from live_service import command, end_jobs, serving, settings, trainers

from lora_mvp.api.client import Client

HOSTILE = "<img src=x onerror=\"document.title='run'\"> \N{RIGHT-TO-LEFT OVERRIDE}gnp.exe"
PAGE = Path(__file__).resolve().parent.parent / "lora_mvp" / "assets" / "web" / "index.html"
SMALL = {
    "pretrained_model": "tiny",
    "resolution": 64,
    "save_pipeline": False,
    "max_train_steps": 100_000,
    "batch_size": 1,
}
SMALL |= {"gradient_accumulation": 1, "lr_warmup_steps": 1, "checkpointing_steps": 20, "sample_prompts": [HOSTILE]}
WATCH = "addEventListener('securitypolicyviolation', e => (window.refused ??= []).push(e.violatedDirective))"
WITHOUT_STREAM = """{
  const whole = fetch, stream = how => how?.headers?.Accept === 'text/event-stream';
  window.held = 0;
  window.fetch = (where, how) => stream(how) ? Promise.reject(new TypeError(`held ${++held}`)) : whole(where, how);
}"""
PHONE, DESKTOP = (390, 844), (1300, 1000)


@pytest.mark.parametrize("file", [PAGE, PAGE.with_name("docs.html")])
def test_the_page_is_one_file_that_cannot_be_told_to_run_anything(file):
    page = file.read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\"'\s)]*", page)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"<[^>]*\s(on\w+|style)=", page)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|setTimeout\([\"']", page
    )


@pytest.fixture(scope="module")
def service(tmp_path_factory, drawings):
    """A service with a token, at work on a training that does not end by itself."""
    home = tmp_path_factory.mktemp("page")
    (home / "data" / HOSTILE).mkdir(parents=True)
    rows = json.loads(drawings.read_text())["images"][:2]
    for row in rows:
        shutil.copy(drawings.parent / row["file"], home / "data" / HOSTILE / Path(row["file"]).name)
    listed = [{"image": Path(row["file"]).name, "caption": HOSTILE, "split": "train"} for row in rows]
    (home / "data" / HOSTILE / "list.json").write_text(json.dumps(listed))
    config = settings(home, home / "data", {}, tokens_file=str(home / "tokens"), grace_seconds=20.0)
    secret = command("token", "ana", "--scope", "submit", "--config", config).stdout.strip()
    changes = {f"training.{name}": value for name, value in SMALL.items()} | {"evaluation.num_inference_steps": 2}
    try:
        with serving(config) as (_, url), Client(url, secret) as client:
            job = client.train(f"{HOSTILE}/list.json", changes)
            yield SimpleNamespace(url=url, secret=secret, client=client, id=job["job_id"])
    finally:
        end_jobs(home / "jobs")


def find(text):
    """The button that says `text`, as an expression."""
    return f"[...document.querySelectorAll('button')].find(b => b.textContent === '{text}' && b.offsetParent)"


@pytest.fixture(scope="module")
def page(service, tmp_path_factory):
    """The page, with the token typed in and the job chosen."""
    with browse("about:blank", tmp_path_factory.mktemp("browser")) as page:
        page.resize(*DESKTOP)
        page.call("Page.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        page.call("Page.navigate", url=service.url)
        page.wait("document.querySelector('#key')?.open")
        page.js("document.querySelector('#secret').focus()")
        page.type(service.secret)
        page.click(find("Use it"))
        page.click("document.querySelector('.job')")
        yield page


def no_sideways_scroll(page):
    return page.js("document.documentElement.scrollWidth <= innerWidth")


def test_progress_arrives_by_itself(page):
    page.wait("/^step \\d+ of 100000, loss/.test(document.querySelector('#pace').textContent)", 180)
    page.js("window.stayed = true")
    step = "Number(document.querySelector('#pace').textContent.split(' ')[1])"
    before = page.js(step)
    page.wait(f"{step} > {before} + 3")
    page.wait("document.querySelectorAll('#curve path').length >= 5")
    assert page.js("window.stayed")


def test_progress_arrives_where_a_proxy_lets_no_stream_through(page):
    cut = page.call("Page.addScriptToEvaluateOnNewDocument", source=WITHOUT_STREAM)
    page.call("Page.reload")
    page.wait("window.held > 1 && document.querySelectorAll('#curve path').length >= 5")  # points come as events only
    last = "document.querySelector('#curve svg').lastChild.previousSibling.getAttribute('d').length"
    before = page.js(last)
    page.wait(f"{last} > {before}")
    page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=cut["identifier"])
    page.call("Page.reload")
    page.wait("window.held === undefined && document.querySelectorAll('#curve path').length >= 5")


def test_sample_pictures_are_shown(page):
    page.wait("[...document.querySelectorAll('#samples img')].some(i => i.naturalWidth >= 64)", 120)
    assert page.js("document.querySelector('#samples img').src").startswith("blob:")
    steps = "[...document.querySelectorAll('#samples figcaption')].map(c => Number(c.textContent.match(/^step (\\d+), prompt 1$/)[1]))"
    page.wait(f"{steps}.length > 1", 120)
    assert page.js(steps) == sorted(page.js(steps), reverse=True)


def test_log_and_files_are_shown(page):
    page.wait("document.querySelector('#log').textContent.includes('latents:')")
    page.wait("document.querySelector('#files').innerText.includes('samples/step-000000-0.png')")


def test_a_hostile_name_is_text(page):
    assert "<img src=x onerror=" in page.js("document.querySelector('#title').textContent")
    assert "<img src=x onerror=" in page.js("document.querySelector('.job .name').textContent")
    assert "<img src=x onerror=" in page.js("document.querySelector('#facts').textContent")
    assert page.js("document.title") == "lora_mvp jobs"
    assert not page.js("[...document.images].some(i => i.getAttribute('src') === 'x')")
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page.js("document.body.textContent")


def test_a_phone_needs_no_sideways_scroll(page):
    page.resize(*PHONE)
    try:
        page.wait("document.querySelector('#shown').offsetParent && !document.querySelector('#jobs').offsetParent")
        assert no_sideways_scroll(page)
        page.click(find("All jobs"))
        page.wait("document.querySelector('#jobs').offsetParent && !document.querySelector('#detail').offsetParent")
        assert no_sideways_scroll(page)
        page.click("document.querySelector('.job')")
        page.wait("!!document.querySelector('#shown').offsetParent")
    finally:
        page.resize(*DESKTOP)


def test_cancel_asks_and_then_cancels(page, service):
    page.click(find("Cancel"))
    page.click(find("No"))
    page.wait("!document.querySelector('#ask').open")
    assert service.client.status(service.id)["status"] == "running"
    page.click(find("Cancel"))
    page.click(find("Yes"))
    page.wait("document.querySelector('#status').textContent === 'cancelled'", 120)
    assert service.client.status(service.id)["status"] == "cancelled"
    wait_for(lambda: not trainers(service.id))


def test_retry_makes_a_job_that_goes_on(page, service):
    page.click(find("Retry"))
    page.click(find("Yes"))
    page.wait("document.querySelectorAll('.job').length === 2")
    page.wait(f"document.querySelector('#facts').textContent.includes('retry of{service.id}')")
    again = page.js("location.hash.slice(1)")
    assert service.client.status(again)["retry_of"] == service.id
    env = {"LORA_MVP_URL": service.url, "LORA_MVP_TOKEN": service.secret}
    assert command("jobs", "cancel", again, **env).stdout.strip() in ("cancelling", "cancelled")
    page.wait("document.querySelector('#status').textContent === 'cancelled'", 120)  # the page hears of it


def test_nothing_was_refused_by_the_policy(page):
    assert page.js("window.refused ?? null") is None
    page.js(
        "setTimeout(() => { document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'})); })"
    )
    page.wait("window.refused")  # what has another hash does not run
    assert page.js("window.ran ?? null") is None


def test_the_page_of_the_routes_lets_try_them(page, service):
    page.call("Page.navigate", url=f"{service.url}/docs")
    page.wait("document.querySelectorAll('details').length > 30")  # the token of the tab is used
    page.js("[...document.querySelectorAll('summary')].find(s => s.textContent.includes('/v1/models')).click()")
    page.click(find("Send"))
    page.wait("[...document.querySelectorAll('pre')].some(p => p.textContent.includes('tiny'))")
    assert page.js("window.refused ?? null") is None
    assert page.js("performance.getEntriesByType('resource').every(e => new URL(e.name).origin === location.origin)")
