"""What the core install leaves out, and the tutorials that come with it."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request

import nbformat
import pytest
from browser import wait_for

from lora_mvp.lab import put_tutorials

BLOCKED = """
import sys
from lora_mvp.cli import main

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.exit(main({arguments}))
"""


@pytest.mark.parametrize(
    "absent, arguments, extra",
    [
        (["uvicorn", "fastapi"], ["serve"], "service"),
        (["sqlalchemy"], ["serve"], "service"),
        (["jupyterlab"], ["lab"], "notebook"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(tmp_path, absent, arguments, extra):
    code = BLOCKED.format(absent=absent, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith(f"error: {absent[0]} is not installed")
        and f"pip install 'lora-mvp[{extra}]'" in done.stderr
    )


def asked(address: str) -> dict | None:
    """What a server answers; None where it does not listen yet."""
    try:
        return json.loads(urllib.request.urlopen(address, timeout=60).read())
    except urllib.error.URLError:
        return None


def test_lab_opens_the_tutorials_and_keeps_what_is_there(tmp_path):
    """JupyterLab is really started: it lists the tutorials, and every picture that they show is there."""
    new = put_tutorials(tmp_path)
    assert {file.relative_to(tmp_path).parent.as_posix() for file in new} == {".", "images"}
    shown = []
    for file in (f for f in new if f.suffix == ".ipynb"):
        for cell in nbformat.read(file, 4).cells:
            shown += [(file.name, link) for link in re.findall(r"\]\(([^)]+)", cell.source) if "://" not in link]
    assert len(shown) > 3
    assert not [pair for pair in shown if not (tmp_path / pair[1]).is_file()]
    (tmp_path / "01_first_lora.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    command = [sys.executable, "-m", "lora_mvp.cli", "lab", str(tmp_path), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = [process.stdout.readline()]
            while not (found := re.search(r"http://(?:127\.0\.0\.1|localhost):(\d+)/\S*token=(\w+)", said[-1])):
                said.append(process.stdout.readline())
                assert said[-1], "".join(said)
            address = f"http://127.0.0.1:{found[1]}/api/contents?token={found[2]}"
            listed = wait_for(lambda: asked(address))["content"]
        finally:
            process.terminate()
    assert said[0].startswith("0 new files")
    assert {file["name"] for file in listed} == {"images", *(file.name for file in new if file.suffix == ".ipynb")}
    assert not nbformat.read(tmp_path / "01_first_lora.ipynb", 4).cells, "a user's notebook was overwritten"
