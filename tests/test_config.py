"""What is written as a configuration reads back the same, whatever a person types into it."""

import subprocess
import sys

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_mvp.config import AppConfig, LoraMvpError, config_schema, config_yaml, load_config, resolve_model_name

printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
numbers = st.floats(1e-12, 1, exclude_min=True)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(prompts=st.lists(printable, min_size=1), rate=numbers, seed=st.integers(0, 2**32 - 1))
@example(
    prompts=["no", "1e-4", "null", "~", "a: b #c", "two\n\nlines ", "\x85", "\ufeff", "- x", "'", '"\\'],
    rate=1e-05,
    seed=0,
)
def test_any_value_survives_the_file(tmp_path_factory, prompts, rate, seed):
    chosen = {"evaluation.prompts": prompts, "training.learning_rate": rate, "data.seed": seed}
    config = load_config(overrides=chosen)
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(config_yaml(config), encoding="utf-8", newline="")
    assert load_config(file) == config


@settings(deadline=None, max_examples=60, derandomize=True)
@given(text=st.text(st.sampled_from("ab:-{}[]&*!|>'\"#, \n\t0.1e%@`~"), max_size=40))
def test_any_text_loads_or_is_explained(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        load_config(file)
    except LoraMvpError as error:
        assert error.code == "config_invalid"
        assert "line " in str(error)


def test_the_schema_takes_what_config_writes_and_no_more():
    schema = config_schema()
    values = AppConfig().model_dump(mode="json")
    jsonschema.validate(values, schema)
    values["training"]["resolution"] = 100
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, schema)


def test_a_moved_model_is_said_in_one_line(caplog):
    resolve_model_name("runwayml/stable-diffusion-v1-5")
    assert len(caplog.records) == 1 and "deleted" in caplog.text


def test_tiny_says_that_it_sets_the_sizes(caplog):
    with caplog.at_level("INFO", logger="lora_mvp"):
        load_config(overrides=["training.pretrained_model=tiny"])
    assert [record.getMessage() for record in caplog.records] == [
        "tiny draws 64 px pictures: image_size, min_resolution, resolution set to 64"
    ]


def test_yaml_cannot_run_code(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"data: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(LoraMvpError, match="tag"):
        load_config(file)
    assert not (tmp_path / "made").exists()


def test_aliases_that_grow_are_refused_at_once(tmp_path):
    file = tmp_path / "config.yaml"
    rows = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    file.write_text("\n".join(rows))
    with pytest.raises(LoraMvpError, match="anchors"):
        load_config(file)


def test_the_global_yaml_loader_is_left_alone():
    assert yaml.safe_load("a: no") == {"a": False}
    code = "import lora_mvp.config, yaml; assert yaml.safe_load('no') is False"
    subprocess.run([sys.executable, "-c", code], check=True)
