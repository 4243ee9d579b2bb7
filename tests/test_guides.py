"""The guides say what is so: their settings load and run, the names in them exist, the program prints what they quote."""

import json
import re
import shlex
import sys
import types
from pathlib import Path

import jsonschema
import pytest
import strangers_hour  # scripts/strangers_hour.py
import yaml
from PIL import Image

from lora_mvp.cli import build_parser, main
from lora_mvp.config import AppConfig, config_schema, load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.models.miniatures import random_base
from lora_mvp.plain_yaml import read_yaml
from lora_mvp.presets import KINDS, Wish, preset, preset_yaml
from lora_mvp.train.diagnosis import doctor

ROOT = Path(__file__).resolve().parent.parent
GUIDES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "guides").glob("*.md"))}
KEYS = {f"{name}.{key}" for name, section in AppConfig.model_fields.items() for key in section.annotation.model_fields}
MAPPINGS = [name for name in GUIDES if name.startswith("from_")]


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDES[guide], re.DOTALL)


def test_the_guides_are_there():
    assert {*KINDS, "from_kohya", "from_hf", "from_onetrainer", "bad_result"} <= set(GUIDES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty pictures of two shapes, and a small base."""
    root = tmp_path_factory.mktemp("guides")
    for k in range(20):
        size = (600, 512) if k % 2 else (512, 600)
        coarse = Image.effect_noise((size[0] // 20, size[1] // 20), 90).convert("RGB")
        picture = coarse.resize(size, Image.Resampling.NEAREST)
        (root / "raw" / "thing").mkdir(parents=True, exist_ok=True)
        picture.save(root / "raw" / "thing" / f"{k}.jpg")
    return root, random_base("sd1", root / "base")


@pytest.fixture(params=["quick", pytest.param("with its memory", marks=pytest.mark.slow)])
def memory(request, monkeypatch):
    """What a step needs at 512 pixels takes seconds to work out, and says nothing of a guide; a slow run asks for it."""
    if request.param == "quick":
        monkeypatch.setattr("lora_mvp.train.diagnosis.estimate_for", lambda config, device: None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_of_a_guide_are_those_of_init_and_the_doctor_takes_them(kind, data, memory, tmp_path):
    root, base = data
    block, for_sdxl = blocks(kind, "yaml")
    wish = Wish(kind, KINDS[kind].example)
    assert block.strip() == preset_yaml(wish).strip(), "the guide and `init` say different things"
    jsonschema.validate(read_yaml(block)[0], config_schema())
    file = tmp_path / "config.yaml"
    file.write_text(block)
    config = load_config(file, overrides={"training.pretrained_model": base})
    caption = config.data.caption_template.format(trigger=config.data.trigger)
    rows = [
        {"image": f"raw/thing/{k}.jpg", "caption": caption, "split": "train" if k < 16 else "val"} for k in range(20)
    ]
    (root / f"{kind}.json").write_text(json.dumps(rows))
    found = doctor(config, root / f"{kind}.json", device="cpu", memory=64e9)
    assert not [f for f in found if f.level == "error"], found
    told = [f.text for f in found if f.level == "warn"]
    assert all("made for 64" in text or "no GPU" in text for text in told), (
        told
    )  # the small base is for smaller pictures
    both = {name: dict(section) for name, section in read_yaml(block)[0].items()}
    for name, section in read_yaml(for_sdxl)[0].items():
        both[name] |= section
    assert both == preset(wish._replace(base="sdxl")), "the lines for SDXL are not what `init --base sdxl` writes"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_setting_and_command_in_a_guide_exists(guide):
    text = GUIDES[guide]
    named = set(re.findall(r"\b((?:data|training|evaluation|api)\.[a-z_0-9]+)", text))
    assert named <= KEYS, named - KEYS
    parser = build_parser()
    typed = [line for block in blocks(guide, "bash") for line in block.splitlines() if line.startswith("lora-mvp")]
    typed += [code for code in re.findall(r"`(lora-mvp [^`]*)`", text) if " " in code.removeprefix("lora-mvp ").strip()]
    for line in typed:
        parser.parse_args(shlex.split(line)[1:])
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("http") or (ROOT / "docs" / "guides" / target).exists(), target


@pytest.mark.parametrize("guide", MAPPINGS)
def test_a_setting_of_another_program_has_one_of_ours_or_none(guide):
    rows = [row.strip("|").split("|") for row in re.findall(r"^\|.*`.*\|$", GUIDES[guide], re.MULTILINE)]
    assert len(rows) > 30
    seen = []
    for theirs, ours, _ in rows:
        seen += re.findall("`([^`]+)`", theirs)
        assert ours.strip() == "no such setting" or set(re.findall("`([^`]+)`", ours)) <= KEYS, ours
        assert ours.strip() == "no such setting" or "`" in ours
    assert len(seen) == len(set(seen)), [name for name in seen if seen.count(name) > 1]


def test_what_the_guides_quote_is_what_the_program_says():
    sources = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "lora_mvp").rglob("*.py"))
    quoted = re.findall("“([^”]+)”", GUIDES["bad_result"])
    assert len(quoted) > 12
    assert not [words for words in quoted if words not in sources]


def test_a_dataset_of_the_hub_becomes_a_folder_that_is_read(tmp_path, monkeypatch):
    """The guide's own code, with rows as `datasets` gives them, and then our reading of the folder."""
    (code,) = blocks("from_hf", "python")
    rows = [{"image": Image.effect_noise((300, 300), 60 + k), "text": f"picture {k}, “quoted”"} for k in range(6)]
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda name, split: rows
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    changes = {"data.raw_data_dir": tmp_path / "pictures", "data.processed_dir": tmp_path / "out"}
    manifest = prepare_data(load_config(overrides=changes | {"data.near_duplicate_bits": None}))
    assert {row.caption for row in manifest.images} == {row["text"] for row in rows}


def test_prompts_of_a_guide_are_read(tmp_path):
    for name in ("face", "style", "default"):
        groups = yaml.safe_load((ROOT / "lora_mvp" / "assets" / "prompts" / f"{name}.yaml").read_text())
        calling = [prompt for group, prompts in groups.items() for prompt in prompts if "{subject}" in prompt]
        assert len(calling) >= 16 and len(set(calling)) == len(calling) and len(groups["without_trigger"]) == 8
        json.dumps(groups)


@pytest.mark.parametrize("last", ["open", pytest.param("grid", marks=pytest.mark.slow)])
def test_the_commands_of_a_guide_do_their_work_in_their_order(last, tmp_path, monkeypatch):
    """From the empty folder to the chosen checkpoint, on `tiny`, with as little as possible of everything."""
    monkeypatch.setattr("lora_mvp.train.diagnosis.estimate_for", lambda config, device: None)  # takes seconds
    run = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0, "sample_prompts": ["a teapot"]}
    run = {f"training.{name}": json.dumps(value) for name, value in run.items()}
    draw = {"evaluation.num_inference_steps": 1, "evaluation.num_samples": 1}
    less = {"doctor": run | draw, "train": run | draw, "choose": draw, "grid": draw}
    done = []
    for step in strangers_hour.steps(GUIDES["object"]):
        monkeypatch.chdir(tmp_path / step.folder)
        words = strangers_hour.tried(step.words, less)[1:]
        assert main([*words, *(["--no-browser"] if words[0] == "open" else [])]) == 0, words
        if words[0] == "init":
            strangers_hour.ready(tmp_path / words[1], 1)
        done.append(words[0])
        if words[0] == last:
            break
    everything = ["init", "prepare-data", "doctor", "train", "open", "choose", "grid"]
    assert done == everything[: everything.index(last) + 1]
    made = {"open": ["run.html", "zkr-teapot.safetensors"], "grid": ["best_adapter", "evaluation/grid/grid.png"]}
    assert all((tmp_path / "my-teapot" / "outputs" / "zkr-teapot" / name).exists() for name in made[last])


def test_the_table_of_cards_is_what_was_counted():
    """docs/guides/gpu_sizes.md against what the chapter on memory printed."""
    chapter = json.loads((ROOT / "nbs" / "3_train" / "14_memory.ipynb").read_text(encoding="utf-8"))
    said = "".join("".join(o.get("text", [])) for cell in chapter["cells"] for o in cell.get("outputs", []))
    counted = re.findall(r"^ ?(\d+ GB) +(sd1|sd2|sdxl) +\d+ px +(\d+) +(\d+)", said, re.MULTILINE)
    rows = re.findall(
        r"^\| (\d+ GB) \| (\d+), (\d+) \| (\d+), (\d+) \| (\d+), (\d+) ", GUIDES["gpu_sizes"], re.MULTILINE
    )
    told = [
        (card, family, *row[2 * k : 2 * k + 2])
        for card, *row in rows
        for k, family in enumerate(("sd1", "sd2", "sdxl"))
    ]
    assert len(told) == 12 and sorted(told) == sorted(counted)
