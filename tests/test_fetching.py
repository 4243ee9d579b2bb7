"""`lora-mvp fetch` against a server that speaks as the hub does."""

import shutil

import pytest
from fake_hub import hub
from huggingface_hub import constants

from lora_mvp.api.access import check_model
from lora_mvp.api.fetching import fetch_model
from lora_mvp.config import ApiConfig, LoraMvpError
from lora_mvp.files import asset

NAME = "organisation/small-diffusion"


@pytest.fixture
def model(tmp_path):
    """What the hub has: the embedded base, with more beside it."""
    folder = tmp_path / "hub"
    shutil.copytree(asset("tiny"), folder, ignore=shutil.ignore_patterns("clip", "names.txt"))
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half precision")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"all of it once more, as a pickle")
    (folder / "everything.safetensors").write_bytes(b"all of it once more")
    (folder / "convert.py").write_text("print('hello')")
    return folder


@pytest.fixture
def online(model, monkeypatch):
    with hub(NAME, model) as (url, asked):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked


def refused(call) -> LoraMvpError:
    with pytest.raises(LoraMvpError) as caught:
        call()
    return caught.value


def test_a_model_is_fetched_and_a_job_may_use_it(tmp_path, online):
    api = ApiConfig(models_dir=tmp_path / "models")
    folder = fetch_model(NAME, api)
    assert folder == tmp_path / "models" / "small-diffusion"
    assert check_model("small-diffusion", None, api) == (str(folder), None)
    unwanted = {"v1-5-pruned.ckpt", "everything.safetensors", "convert.py"}
    assert "unet/diffusion_pytorch_model.safetensors" in online
    assert not unwanted & set(online) and not [name for name in online if "fp16" in name or name.endswith(".bin")]
    assert [path.name for path in folder.parent.iterdir()] == ["small-diffusion"]  # nothing half done beside it
    assert refused(lambda: fetch_model(NAME, api)).code == "model_exists"
    assert fetch_model(NAME, api, name="again").name == "again"


@pytest.mark.parametrize(
    "spoil, code",
    [
        (lambda folder: (folder / "model_index.json").unlink(), "base_unreadable"),
        (lambda folder: (folder / "unet" / "config.json").write_text('{"auto_map": {}}'), "base_unsafe"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "unsafe_weights"),
    ],
)
def test_what_will_not_do_is_not_kept(tmp_path, model, online, spoil, code):
    spoil(model)
    api = ApiConfig(models_dir=tmp_path / "models")
    assert refused(lambda: fetch_model(NAME, api)).code == code
    assert list((tmp_path / "models").iterdir()) == []


def test_a_model_that_is_not_there_is_told_in_a_sentence(tmp_path, online):
    error = refused(lambda: fetch_model("organisation/none", ApiConfig(models_dir=tmp_path / "models")))
    assert error.code == "model_unreachable" and "organisation/none" in error.message and "\n" not in error.message
    assert list((tmp_path / "models").iterdir()) == []
