"""What a job may touch, tried by somebody who means no good; the chapter has the plain cases."""

import json
import os
import pickle
import subprocess
import sys
import threading

import pytest

from lora_mvp.api import access, paths
from lora_mvp.api.tokens import Tokens, new_token
from lora_mvp.config import ApiConfig, LoraMvpError


@pytest.fixture
def api(tmp_path):
    for name in ("data/cats", "models", "elsewhere/cats"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/cats/file").write_text("ours")
    (tmp_path / "elsewhere/cats/file").write_text("the neighbour's")
    return ApiConfig(data_dir=tmp_path / "data", models_dir=tmp_path / "models", models=["tiny"])


def read(root, name):
    with open(paths.open_confined(root, name)) as file:
        return file.read()


def test_a_folder_that_turns_into_a_link_while_it_is_looked_at_leads_nowhere(api, tmp_path):
    """The race that resolve() and is_relative_to() lose: somebody swaps a folder for a link all the time."""
    cats, away, link = tmp_path / "data/cats", tmp_path / "data/away", tmp_path / "data/link"
    os.symlink(tmp_path / "elsewhere/cats", link)
    done, answers = threading.Event(), {"ours": 0, "refused": 0}

    def swap():
        while not done.is_set():
            os.rename(cats, away)
            os.rename(link, cats)
            os.rename(cats, link)
            os.rename(away, cats)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(10_000):  # a check of the resolved path before the file is opened fails in a few of these
            try:
                answers[read(tmp_path / "data", "cats/file")] += 1
            except LoraMvpError:
                answers["refused"] += 1
    finally:
        done.set()
        thread.join()
    assert answers["ours"] and answers["refused"], answers  # both happened, the neighbour's was never read


def test_pipes_and_devices_do_not_hold_the_reader_up(api, tmp_path):
    os.mkfifo(tmp_path / "data/pipe")
    os.mkfifo(tmp_path / "models/pipe.safetensors")
    os.symlink("/dev/zero", tmp_path / "data/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(LoraMvpError, match="regular file|link"):
            paths.confined(tmp_path / "data", name)
    with pytest.raises(LoraMvpError) as error:
        access.check_model("pipe.safetensors", None, api)
    assert error.value.code == "path_forbidden"
    with pytest.raises(LoraMvpError) as error:  # a device as the root itself, and a file in place of a folder
        paths.confined(tmp_path / "data/cats/file", "x")
    assert error.value.code == "path_missing"


def test_no_sentence_names_a_place_of_this_machine(api, tmp_path):
    asked = [
        "../x",
        "/etc/passwd",
        "cats",
        "cats/none",
        "cats/file/x",
        "a" * 5000,
        "cats/" + "b" * 300,
        "\0",
        "ü/\ud800",
    ]
    for name in asked:
        for look in (lambda n: access.check_manifest(n, api), lambda n: access.check_model(n, None, api)):
            with pytest.raises(LoraMvpError) as error:
                look(name)
            assert str(tmp_path) not in error.value.message and len(error.value.message) < 700, name


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


SAFE = (2).to_bytes(8, "little") + b"{}"
HOSTILE = {
    "pickle": {"unet/diffusion_pytorch_model.bin": None},
    "pickle beside safetensors": {"unet/diffusion_pytorch_model.ckpt": None, "unet/model.safetensors": SAFE},
    "pickle by another name": {"unet/diffusion_pytorch_model.safetensors": None},
    "script": {"unet/unet.py": b"open(CANARY, 'w')"},
    "compiled": {"unet/__init__.pyc": b"x"},
    "library": {"unet/plugin.so": b"x"},
    "hidden": {"unet/.hidden/model.pt": None},
    "class": {"model_index.json": b'{"_class_name": ["pipeline", "Canary"]}'},
    "part": {"unet/config.json": b'{"_class_name": ["unet", "Canary"]}'},
    "code": {"text_encoder/config.json": b'{"auto_map": {"AutoModel": "me/mine--modeling.Canary"}}'},
    "shards": {"unet/model.safetensors.index.json": b'{"weight_map": {"a": "../../../secret.safetensors"}}'},
    "bomb": {"unet/config.json": b"[" * 100_000},
    "empty": {"unet/model.safetensors": b""},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_model_is_refused_and_nothing_of_it_runs(api, tmp_path, name):
    canary = tmp_path / "canary"
    folder = tmp_path / "models" / "base"
    for file, content in {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', **HOSTILE[name]}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        content = (
            pickle.dumps(Canary(canary)) if content is None else content.replace(b"CANARY", repr(str(canary)).encode())
        )
        (folder / file).write_bytes(content)
    for key in sorted(access.MODEL_KEYS):
        with pytest.raises(LoraMvpError) as error:
            access.check_overrides({key: "base"}, api)
        assert error.value.code == "unsafe_weights"
    assert not canary.exists()


def test_a_model_that_does_no_harm_is_taken(api, tmp_path):
    folder = tmp_path / "models" / "base" / "unet"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "model.safetensors").write_bytes(SAFE)
    (folder / "config.json").write_text("{}")
    found = access.check_overrides({"training.pretrained_model": "base"}, api)
    assert found == {"training.pretrained_model": str(folder.parent), "training.revision": None}
    for broken in ("link", "hard"):
        (os.symlink if broken == "link" else os.link)(tmp_path / "elsewhere/cats/file", folder / f"{broken}.json")
        with pytest.raises(LoraMvpError) as error:
            access.check_model("base", None, api)
        assert error.value.code == "path_forbidden"
        os.unlink(folder / f"{broken}.json")


def test_a_manifest_with_a_picture_elsewhere_is_refused(api, tmp_path):
    def rows(*names):
        (tmp_path / "data/cats/manifest.json").write_text(json.dumps([{"image": name} for name in names]))

    rows("file")
    access.check_manifest("cats/manifest.json", api)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/cats/sub")
    for name in ("sub/cats/file", "../../elsewhere/cats/file", str(tmp_path / "elsewhere/cats/file"), "sub", ""):
        rows("file", name)
        with pytest.raises(LoraMvpError) as error:
            access.check_manifest("cats/manifest.json", api)
        assert error.value.code == "path_forbidden", name


def test_a_token_is_worth_nothing_once_its_line_is_gone(tmp_path):
    file = tmp_path / "tokens"
    secrets = {name: new_token(file, name, "submit") for name in ("ana", "bob")}
    tokens = Tokens(file)
    assert {name: tokens.check(f"Bearer {secret}").id for name, secret in secrets.items()} == {n: n for n in secrets}
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[1])
    assert tokens.check(f"Bearer {secrets['ana']}") is None
    assert tokens.check(f"Bearer {secrets['bob']}").id == "bob"
    os.unlink(file)
    assert tokens.check(f"Bearer {secrets['bob']}") is None and tokens


def test_access_is_light():
    code = "import sys, lora_mvp.api.access; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "PIL", "cv2", "numpy"} & set(done.stdout.split())
