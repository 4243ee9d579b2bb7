"""Pictures that other programs drew: what is read from them, what becomes of it, and what is said of what is missing."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_mvp.cli import main
from lora_mvp.data.images import open_rgb
from lora_mvp.files import asset

FILES = sorted(asset("demo", "heldout").glob("*/*.png"))[:8]
NAMES = [f"{file.stem.replace('-', ' ')}, flat style" for file in FILES]
REAL = str(asset("demo", "raw") / "animals" / "*.png")
ASK = ["--set", "evaluation.clip_model=tiny", "--real-glob", REAL]


def webui(prompt, seed):
    """The text that A1111's webui writes."""
    return {
        "parameters": f"{prompt}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: {seed}, "
        'Size: 64x64, Model hash: 12ab, Lora hashes: "plush: 34cd", Version: v1.10.1'
    }


def comfy(prompt, seed):
    """The graph that ComfyUI writes."""
    nodes = {
        "3": ("KSampler", {"seed": seed, "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}),
        "5": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "6": ("CLIPTextEncode", {"text": ["11", 0], "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "blurry", "clip": ["4", 1]}),
        "8": ("VAEDecode", {"samples": ["3", 0]}),
        "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
        "11": ("PrimitiveStringMultiline", {"value": prompt}),
    }
    return {"prompt": json.dumps({k: {"class_type": kind, "inputs": inputs} for k, (kind, inputs) in nodes.items()})}


def fill(folder, notes, turned=False):
    """A folder of pictures; `notes` makes the texts of each from its prompt and number."""
    folder.mkdir()
    for k, (file, prompt) in enumerate(zip(FILES, NAMES, strict=True)):
        info, picture = PngInfo(), open_rgb(file).resize((64, 64))
        for name, text in notes(prompt, k).items():
            info.add_text(name, text)
        picture = Image.eval(picture, lambda v: 255 - v) if turned else picture
        picture.save(folder / f"{7 - k if turned else k:05d}.png", pnginfo=info)
    return folder


def ask(capsys, *arguments):
    """What `evaluate` answers: exit code, stdout, stderr."""
    code = main(["evaluate", *map(str, arguments), *ASK])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_two_folders_become_pairs_and_a_verdict(tmp_path, capsys):
    base = fill(tmp_path / "base", lambda p, k: webui(p, k + 5))
    lora = fill(tmp_path / "lora", lambda p, k: comfy(f"{p} <lora:plush:0.8>", k + 5), turned=True)
    code, out, _ = ask(capsys, "--pictures", lora, "--baseline", base)
    assert code == 0 and "8 pairs of 8 prompts" in out and "verdict: " in out and "%" not in out.split("verdict")[0]
    record = json.loads((tmp_path / "lora-evaluation" / "metrics.json").read_text())
    assert {s["prompt"] for s in record["samples"]} == set(NAMES)
    assert [s["seed"] for s in record["samples"]] == list(range(5, 13))
    kept = record["scores"]["kept[edges]"]
    assert kept["lora"]["value"] > 99 > 60 > kept["anchors"]["wrong"]  # an inverted picture has the same edges
    for sample in record["samples"]:
        assert (tmp_path / "lora-evaluation" / sample["lora_file"]).is_file()


def test_one_folder_gets_anchors_and_no_verdict(tmp_path, capsys):
    lora = fill(tmp_path / "lora", webui)
    code, out, _ = ask(capsys, "--pictures", lora, "--out", tmp_path / "found")
    assert code == 0 and "No verdict" in out and "wrong prompts" in out and "--baseline FOLDER" in out
    record = json.loads((tmp_path / "found" / "metrics.json").read_text())
    assert "judgement" not in record and record["kind"] == "one_set"
    again = ask(capsys, "--pictures", lora, "--out", lora / "inside")[1]
    assert again.replace(str(lora / "inside"), str(tmp_path / "found")) == out
    assert ask(capsys, "--pictures", lora, "--out", lora / "inside")[1] == again  # its own files are no pictures


def test_what_is_left_out_is_named(tmp_path, capsys):
    base, lora = fill(tmp_path / "base", webui), fill(tmp_path / "lora", webui)
    (lora / "00001.png").write_bytes((lora / "00001.png").read_bytes()[:200])
    (lora / "again.png").write_bytes((lora / "00002.png").read_bytes())
    Image.new("RGB", (64, 64), "teal").save(lora / "bare.jpg")
    code, out, _ = ask(capsys, "--pictures", lora, "--baseline", base)
    assert code == 0 and "7 pairs" in out
    for said in ("pictures: 00001.png", "pictures: again.png", "pictures: bare.jpg", "base: 00001.png"):
        assert said in out, said


def test_a_table_says_what_the_files_do_not(tmp_path, capsys):
    base, lora = (fill(tmp_path / name, lambda p, k: {}) for name in ("base", "lora"))
    rows = "".join(f'{k:05d}.png;"{prompt}"\n' for k, prompt in enumerate(NAMES))
    (tmp_path / "p.csv").write_text("\ufefffile;prompt\n" + rows, encoding="utf-8")
    code, out, _ = ask(capsys, "--pictures", lora, "--baseline", base, "--prompts", tmp_path / "p.csv")
    assert code == 0 and "8 pairs of 8 prompts" in out and "what was kept is not measured" in out and "kept[" not in out


WRONG = {
    "nothing there": (["--pictures", "none"], "there is no folder"),
    "empty": (["--pictures", "empty"], "holds no pictures"),
    "no notes": (["--pictures", "bare"], "--prompts TABLE.csv"),
    "no pairs": (["--pictures", "other", "--baseline", "bare"], "--by-name"),
    "only broken": (["--pictures", "broken"], "the first: cut.png"),
    "a file too many": (["--pictures", "bare", "--prompts", "more.csv"], "the first: b.jpg"),
    "other columns": (["--pictures", "bare", "--prompts", "columns.csv"], "it has name, text"),
    "no table": (["--pictures", "bare", "--prompts", "none.csv"], "none.csv cannot be read"),
    "a baseline alone": (["--model-path", "tiny", "--baseline", "bare"], "go with --pictures"),
    "a strength": (["--pictures", "bare", "--lora-scale", "0.5"], "draws nothing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_answered(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bare", "broken", "other"):
        (tmp_path / folder).mkdir()
    for file in ("bare/a.jpg", "bare/c.jpg", "other/x.png", "other/y.png"):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / file)
    (tmp_path / "broken" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "more.csv").write_text("file,prompt\na.jpg,x\nb.jpg,y\n")
    (tmp_path / "columns.csv").write_text("name,text\na.jpg,x\n")
    arguments, message = WRONG[name]
    code, out, err = ask(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err and not out
