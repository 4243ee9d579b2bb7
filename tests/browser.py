"""Chromium without a window, driven over its DevTools protocol."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from websocket import create_connection

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server --remote-debugging-port=0
--window-size=1300,1500""".split()


def chromium() -> str:
    """Its path; the test is skipped where it is missing, but not on CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and "CI" not in os.environ:
        pytest.skip("Chromium is not installed")
    assert found, "on CI Chromium must be there: apt-get install chromium"
    return found


def wait_for(what, seconds=120):
    """The first true answer of `what()`; fails when there is none in time."""
    end = time.monotonic() + seconds
    while True:
        if answer := what():
            return answer
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.1)


@contextmanager
def process(command, **options):
    """A process that is gone afterwards, with all that it started in its session."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, start_new_session=True, **(quiet | options))
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(running.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        running.wait()


class Between(Exception):
    """The page is on its way from one document to another."""


class Page:
    """One page of the browser."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0

    def call(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        if "default execution context" in answer.get("error", {}).get("message", ""):
            raise Between  # one document is gone and the next is not there yet
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression):
        """The value of an expression, waited for when it is a promise."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression, seconds=120):
        def answer():
            try:
                return self.js(expression)
            except Between:
                return None

        try:
            return wait_for(answer, seconds)
        except AssertionError as e:
            raise AssertionError(f"{expression}: {e}; the page says: {self.js('document.body?.innerText')}") from e

    def click(self, element):
        """Press the mouse in the middle of the element that an expression gives, once it lies still and is on top."""
        self.wait(f"!!({element})")
        target = f"""(async () => {{
            const frame = () => new Promise(requestAnimationFrame), e = {element};
            const middle = () => {{ const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }};
            e.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const before = middle();
            for (let k = 0; k < 5; k++) await frame();
            const [x, y] = middle(), top = document.elementFromPoint(x, y);
            return before[0] == x && before[1] == y && e.contains(top) && [x, y];
        }})()"""
        x, y = wait_for(lambda: self.js(target))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text):
        """Type over what is selected."""
        self.call("Input.insertText", text=text)

    def press(self, key):
        """Press Enter or a letter, say, where the cursor is."""
        code, text = {"Enter": (13, "\r"), "Tab": (9, ""), "Backspace": (8, "")}.get(key) or (ord(key), key)
        options = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **options)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def resize(self, width, height):
        """Another size of the window, in pixels; a narrow one is a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, file, element=None):
        """The window as a PNG file, or what lies around the element that an expression gives."""
        box = f"(b => ({{x: b.x, y: b.y, width: b.width, height: b.height, scale: 1}}))({element}.getBoundingClientRect())"
        clip = {"clip": self.js(box)} if element else {}
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"]))


@contextmanager
def browse(url, folder):
    """A page that shows `url`; `folder` is for the browser's own files."""
    with process([chromium(), *FLAGS, f"--user-data-dir={folder}", url]):
        port = wait_for(
            lambda: (folder / "DevToolsActivePort").is_file() and (folder / "DevToolsActivePort").read_text()
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def page():
            with direct.open(f"http://127.0.0.1:{port.split()[0]}/json") as answer:
                return next((p for p in json.load(answer) if p["type"] == "page"), None)

        address = wait_for(page)["webSocketDebuggerUrl"]
        socket = create_connection(address, suppress_origin=True, timeout=120, http_no_proxy=["*"])
        try:
            yield Page(socket)
        finally:
            socket.close()
