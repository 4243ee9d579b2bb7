"""`lora-mvp push` against a server that takes uploads as the hub does."""

import json

import pytest
import yaml
from fake_hub import shelf
from huggingface_hub import constants

from lora_mvp.cli import main
from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.files import file_sha256
from lora_mvp.train.runs import RunFolder


@pytest.fixture
def models(monkeypatch):
    with shelf() as (url, models):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield models


def test_a_certified_run_goes_up_and_comes_back_whole(drawings, small_run, tmp_path, models, capsys):
    from lora_mvp.models.proof import Certificate
    from lora_mvp.train.loop import train

    folder = RunFolder(tmp_path / "zkr")
    train(load_config(overrides=small_run(folder.root, max_train_steps=1)), drawings, progress=False)
    run = str(folder.root)

    certificate = (folder.adapter / "certificate.json").rename(tmp_path / "aside")
    assert main(["push", run, "me/zkr"]) == 2 and not models
    assert f"`lora-mvp finish {run}` writes it" in capsys.readouterr().err
    certificate.rename(folder.adapter / "certificate.json")

    assert main(["push", run, "me/zkr", "--license", "mit"]) == 0
    assert "/me/zkr/commit/" in capsys.readouterr().out and models["me/zkr"]["private"] is True
    back = tmp_path / "back"
    for name, content in models["me/zkr"]["files"].items():
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        (back / name).write_bytes(content)
        assert str(tmp_path).encode() not in content, f"{name} tells where it was made"
    for form in Certificate.model_validate_json(
        (back / "lora_adapter" / "certificate.json").read_bytes()
    ).forms.values():
        assert file_sha256(back / "lora_adapter" / form.file) == form.sha256
    assert {"run.json", "samples.png", "zkr.safetensors", "lora_adapter/adapter_config.json"} <= set(
        models["me/zkr"]["files"]
    )
    _, facts, text = (back / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(facts)
    assert facts["license"] == "mit" and "base_model" not in facts and "1 steps on" in text
    assert json.loads((back / "run.json").read_text())["config"]["training"]["output_dir"] == "zkr"

    models["me/open"] = {"private": False, "files": {}}
    assert main(["push", run, "me/open"]) == 2 and not models["me/open"]["files"]
    assert "Give --public if that is meant" in capsys.readouterr().err
    assert main(["push", run, "me/open", "--public"]) == 0 and models["me/open"]["files"]
    assert "license" not in models["me/open"]["files"]["README.md"].decode().split("---")[1]


def test_a_hub_that_is_not_there_is_one_sentence(tmp_path, monkeypatch, capsys):
    from lora_mvp.train.push import push_run

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("lora_mvp.train.push.pushed_files", lambda *_: {"README.md": b"# a model"})
    with pytest.raises(LoraMvpError, match="could not be written .* HF_TOKEN with the right to write") as caught:
        push_run(tmp_path, "me/zkr")
    assert caught.value.code == "push_failed"
