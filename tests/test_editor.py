"""What an editor sees: methods complete, types hold in a user's script, promised names are few."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

ROOT = Path(__file__).resolve().parent.parent


def completions(code: str) -> set[str]:
    """The names that an editor offers at the end of `code`."""
    script = jedi.Script(code, project=jedi.Project(ROOT))
    return {found.name for found in script.complete()}


@pytest.mark.parametrize(
    "module, name, methods",
    [
        ("lora_mvp.train", "Trainer", {"step", "run", "validate", "save"}),
        ("lora_mvp.api.service", "Service", {"submit", "cancel", "tick", "ready"}),
        ("lora_mvp", "Client", {"train", "events", "download"}),
        ("lora_mvp.eval", "Evaluator", {"evaluate", "compare"}),
        ("lora_mvp.api.folders", "JobFolder", {"append", "artifacts"}),
    ],
)
def test_an_editor_completes_the_methods(module, name, methods):
    assert methods <= completions(f"from {module} import {name}\ndef use(it: {name}):\n    it.")


def test_tab_offers_the_doors():
    assert {"load_config", "prepare_data", "Trainer", "evaluate"} <= completions("import lora_mvp\nlora_mvp.")


@pytest.mark.skipif(shutil.which("node") is None, reason="pyright needs node")
def test_a_users_script_passes_pyright_in_basic_mode(tmp_path):
    for script in (ROOT / "examples").glob("*.py"):
        shutil.copy(script, tmp_path)
    wrong = "import lora_mvp\n\nlora_mvp.load_config(no_such=1)\nlora_mvp.prepare_data(3)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    settings = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout)
    told = [(Path(item["file"]).name, item["rule"]) for item in found["generalDiagnostics"]]
    assert {file for file, _ in told} == {"wrong.py"}, found["generalDiagnostics"]  # types are seen, and they hold
    assert len(told) == 2
