"""The first hour: four questions, a folder to train in, and the next command until there is a LoRA to look at."""

import json
import os
import pty
import shlex
import sys
from pathlib import Path

import jsonschema
import nbformat
import pytest
from PIL import Image

from lora_mvp.cli import main
from lora_mvp.config import config_schema, load_config
from lora_mvp.files import asset
from lora_mvp.plain_yaml import read_yaml
from lora_mvp.presets import KINDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to stand in, without a terminal and without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    monkeypatch.setattr("lora_mvp.start.gpu_memory", lambda: None)
    return tmp_path


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def init(*more, kind="face", name="zkr woman"):
    return main(["init", "--kind", kind, "--name", name, *more])


@pytest.mark.parametrize("kind, base", [("face", "sd15"), ("style", "tiny"), ("object", "sdxl"), ("face", "some/base")])
def test_what_init_writes_is_what_the_schema_says(home, kind, base):
    assert init("--base", base, kind=kind, name=KINDS[kind].example) == 0
    text = (home / "config.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=./config.schema.json"
    schema = json.loads((home / "config.schema.json").read_text())
    assert schema == config_schema()
    values, _, _ = read_yaml(text)
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | {"training": {"max_train_stps": 3}}, schema)
    config = load_config("config.yaml")
    assert Path(config.evaluation.prompt_file) == home / "prompts.yaml"
    assert config.data.trigger in (home / "prompts.yaml").read_text()


@pytest.mark.parametrize("file", ["lora_mvp/assets/demo/config.yaml", "docs/config.schema.json"])
def test_the_schema_that_ships(file):
    if file.endswith(".json"):
        assert json.loads((ROOT / file).read_text()) == config_schema(), f"write config_schema() into {file}"
    else:
        jsonschema.validate(read_yaml((ROOT / file).read_text())[0], config_schema())


def test_nobody_to_ask(home, capsys):
    assert main(["init"]) == 2
    assert "--kind and --name" in capsys.readouterr().err
    assert main(["init", "--kind", "style"]) == 2
    said = capsys.readouterr().err
    assert "--name" in said and "give --kind" not in said
    assert not contents(home)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kind", "landscape"], "none of face, style, object"),
        (["--name", "{x}"], "no braces"),
        (["--pictures", "nowhere"], "nowhere is no folder"),
        (["--pictures", "."], "overlap"),
        (["--base", "models/sdxl.safetensors"], "is no base"),
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_written(home, capsys, flags, words):
    assert init(*flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert not contents(home)


def test_a_stop_among_the_questions_leaves_nothing_and_says_so(home, capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt  # where the questions are asked

    monkeypatch.setattr("lora_mvp.start.gpu_memory", stopped)
    assert init() == 130
    assert capsys.readouterr().err == "stopped; nothing was written.\n" and not contents(home)


@pytest.mark.parametrize("memory", ["-3", "0", "nan"])
def test_a_card_has_some_memory(home, capsys, memory):
    with pytest.raises(SystemExit, match="2"):
        init(f"--gpu-memory={memory}")
    assert f"{memory} is not a number above 0" in capsys.readouterr().err
    assert not contents(home)


def test_nothing_is_overwritten(home, capsys):
    (home / ".gitignore").write_text("mine\n")
    (home / "prompts.yaml").write_text("mine: [a cat]\n")
    assert init() == 0
    said = capsys.readouterr().out
    assert ".gitignore was there before" in said and "prompts.yaml was there before" in said
    before = contents(home)
    assert before[".gitignore"] == b"mine\n" and before["prompts.yaml"] == b"mine: [a cat]\n"
    assert init(kind="style") == 2
    assert "config.yaml is there already" in capsys.readouterr().err
    assert contents(home) == before


def test_prompts_that_are_none_are_found_before_the_training(home, capsys, no_memory):
    """A file of another program under our name: `init` writes nothing, and the doctor says it of settings made by hand."""
    (home / "prompts.yaml").write_text("p: a cat\n")
    assert init("--base", "tiny") == 2
    said = capsys.readouterr().err
    assert "the group p must be a list of texts. Nothing was written" in said
    assert [*contents(home)] == ["prompts.yaml"]
    assert (
        main(["doctor", "--set", "training.pretrained_model=tiny", "--set", "evaluation.prompt_file=prompts.yaml"]) == 2
    )
    assert "the group p must be a list of texts" in capsys.readouterr().out


def test_init_counts_what_is_learnt(home, capsys, monkeypatch):
    """A folder of kohya's with masks and regularisation pictures: neither makes the training longer."""
    learnt = home / "kohya" / "10_zkr woman"
    for k in range(20):
        for name in (f"{learnt}/{k}.png", f"{learnt}/{k}-masklabel.png", f"{home}/kohya/1_reg/{k}.png"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "white" if "mask" in name else "teal").save(name)
    assert init("--pictures", "kohya") == 0
    assert "400 steps, for 20 pictures" in capsys.readouterr().out


def test_a_refusal_of_all_pictures_is_the_next_thing_to_look_at(home, capsys, no_memory):
    (home / "data" / "raw" / "woman").mkdir(parents=True)
    (home / "data" / "raw" / "woman" / "1.png").write_bytes(b"no picture")
    assert init("--base", "tiny") == 0
    assert main(["prepare-data"]) != 0
    capsys.readouterr()
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "next: data/processed-report/report.html says why no picture was taken; after a change, lora-mvp" in said
    assert (home / "data/processed-report/report.html").is_file()


def test_four_questions_in_a_terminal(tmp_path):
    """A real terminal: wrong answers are asked again, Enter takes what is in brackets."""
    (tmp_path / "my pictures").mkdir()
    answers = ["cat", "o", "", "rexa dog", "nowhere", "my pictures", ""]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": os.defpath}  # no nvidia-smi of this machine's
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-m", "lora_mvp.cli", "init"], env)
    said, waiting = "", list(answers)
    try:
        while piece := os.read(terminal, 4096).decode():
            said += piece
            if said.endswith(": ") and waiting:
                os.write(terminal, f"{waiting.pop(0)}\n".encode())
    except OSError:  # what Linux says at the end of a terminal
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, said
    assert not waiting and "Traceback" not in said
    config = load_config(tmp_path / "config.yaml")
    assert config.data.trigger == "rexa dog" and Path(config.data.raw_data_dir) == tmp_path / "my pictures"
    assert said.count("What do your pictures show") == 2 and said.count("Where are your pictures") == 2


def next_command(said: str) -> list[str]:
    """The words of the command that stands behind `next:`."""
    (line,) = (line for line in said.splitlines() if line.startswith("next: "))
    return shlex.split(line[line.index("lora-mvp") :])[1:]


@pytest.fixture
def no_memory(monkeypatch):
    """What a step needs is not asked here: that takes seconds."""
    monkeypatch.setattr("lora_mvp.train.diagnosis.estimate_for", lambda config, device: None)


@pytest.mark.parametrize("far", ["prepare-data", pytest.param("train", marks=pytest.mark.slow)])
def test_from_nothing_to_a_lora_by_doing_what_is_said(home, capsys, no_memory, far):
    """Every command is the one that the command before it has named."""
    files = sorted(asset("demo", "raw").rglob("*.png"))[:8]
    raw = home / "data" / "raw" / "style"
    assert init("--base", "tiny", kind="style", name="zkr style") == 0
    assert raw.is_dir() and "data/raw/style" in (said := capsys.readouterr().out)
    assert main(next_command(said)) == 0
    assert "put your pictures into data/raw/style, then lora-mvp prepare-data" in capsys.readouterr().out
    for file in files:
        Image.open(file).convert("RGB").save(raw / file.name)
    short = ["--set", "training.max_train_steps=2", "--set", "training.lr_warmup_steps=0"]
    short += ["--set", "training.sample_every=0"]
    for expected in ("prepare-data", "train"):
        assert main(["doctor", *short]) == 0
        command = next_command(capsys.readouterr().out)
        assert command[0] == expected and command[1:7] == short
        assert main(command) == 0
        after = next_command(capsys.readouterr().out)  # that which the command itself names
        assert after[0] == {"prepare-data": "doctor", "train": "open"}[expected] and main(after) == 0
        capsys.readouterr()
        if expected == far:
            break
    assert main(["doctor", *short]) == 0
    expected = {"prepare-data": ["train", *short, "--manifest", "data/processed/manifest.json"]}
    assert next_command(capsys.readouterr().out) == expected.get(far, ["open", "outputs/zkr-style"])


def test_the_doctor_names_no_next_command_before_a_mistake_is_mended(home, capsys, no_memory):
    assert init("--base", "tiny") == 0
    capsys.readouterr()
    assert main(["doctor", "--set", "training.lora_targets=no_such_layer"]) == 2
    said = capsys.readouterr()
    assert "next:" not in said.out and "1 of these must be mended" in said.err


@pytest.mark.slow
def test_the_tutorial_for_photos_runs_on_another_base_by_its_one_line(home, capsys):
    """As a reader does it: the line with the base is changed, the photos lie there, and all cells are run."""
    from lora_mvp.models.miniatures import random_base  # with it comes torch, which the other tests here do without

    base = random_base("sd1", home / "base")
    (home / "my-teapot" / "data" / "raw" / "teapot").mkdir(parents=True)
    for k in range(4):
        photo = Image.effect_noise((30, 25), 90 + k).resize((600, 500), Image.Resampling.NEAREST)
        photo.convert("RGB").save(home / "my-teapot" / "data" / "raw" / "teapot" / f"{k}.jpg")
    cells = nbformat.read(ROOT / "nbs" / "tutorials" / "05_your_photos.ipynb", 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert code.count('BASE = "tiny"') == 1
    exec(code.replace('BASE = "tiny"', f"BASE = {str(base)!r}"), {})
    run = home / "my-teapot" / "outputs" / "zkr-teapot"
    assert json.loads((run / "run.json").read_text())["base"] == str(base)
    assert len([*(home / "my-teapot" / "drawn").glob("*.png")]) == 4
    assert "trigger   zkr teapot" in capsys.readouterr().out
