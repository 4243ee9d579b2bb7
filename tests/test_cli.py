"""The command line as a user meets it: real processes, real files, real signals."""

import csv
import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from forks import Forked, fork, words
from PIL import Image, ImageDraw

from lora_mvp.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "lora_mvp" / "assets" / "tiny"
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PYTHONUTF8": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",  # equal bytes are promised for the CPU
    "OMP_NUM_THREADS": "1",  # commands run side by side
}
STEPS = 40  # enough that the signals below come long before the end
CONFIG = f"""
data: {{raw_data_dir: my photos, processed_dir: processed}}
training:
  pretrained_model: tiny
  output_dir: lora
  max_train_steps: {STEPS}
  lr_warmup_steps: 5
  learning_rate: 1e-2
  gradient_accumulation: 1
  checkpointing_steps: 10
  sample_prompts: [a disc]
evaluation: {{prompts: [A photo of a disc, A photo of a square], num_inference_steps: 2, guidance_scale: 3}}
"""
TRAIN = "lora-mvp train --config config.yaml --manifest processed/manifest.json"
DRAW = "--prompt 'A photo of a disc' --seed 7"


def run(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command to its end, in a process that is started anew."""
    return subprocess.run(words(command), cwd=cwd, capture_output=True, timeout=300, encoding="utf-8", env=ENV)


def printed(done: subprocess.CompletedProcess) -> str:
    """What a command printed; it must have ended well."""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def contents(folder: Path) -> dict:
    """Every file below a folder with the hash of its bytes."""
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), dtype=int)


@pytest.fixture(scope="module")
def pool():
    """Commands that do not need each other run side by side, one for each core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield pool


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with twelve photos and a config.yaml; its name holds spaces and a letter outside ASCII."""
    home, rng = tmp_path_factory.mktemp("a naïve new user"), np.random.default_rng(0)
    for k in range(12):
        file = home / "my photos" / ("disc", "square")[k % 2] / f"photo {k // 2}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        texture = rng.integers(0, 256, (26, 30, 3), dtype=np.uint8)
        photo = Image.fromarray(texture).resize((300, 260), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(photo)
        (draw.rectangle if k % 2 else draw.ellipse)((60, 40, 200 + 4 * k, 200), fill=(200, 20 * k, 40))
        photo.save(file, quality=90)
    (home / "config.yaml").write_text(CONFIG)
    return home


@pytest.fixture(scope="module")
def prepared(home):
    """What `prepare-data` printed; it left the photos as they were."""
    photos = contents(home / "my photos")
    text = printed(run("lora-mvp prepare-data --config config.yaml", home))
    assert contents(home / "my photos") == photos
    return text


@pytest.fixture(scope="module")
def trained(home, prepared):
    """`train`, finished."""
    done = fork(TRAIN, home, ENV)
    assert printed(done)
    return done


# -- a newcomer's walk ------------------------------------------------------------------------------------------------

USES = {
    "evaluate": "lora-mvp evaluate --config config.yaml --model-path lora --real-glob 'processed/**/*.png'",
    "generate": f"lora-mvp generate --config config.yaml --model-path lora {DRAW} --lora-scale 0.8 --count 2 --out on",
    "base": f"lora-mvp generate --config config.yaml --model-path lora/lora_adapter {DRAW} --lora-scale 0 --out off",
    "fuse": f"lora-mvp generate --config config.yaml --model-path lora {DRAW} --fuse --out fused",
    "plain": "{home}/plain.py lora plain.png",
    "plain base": f"{{home}}/plain.py {shlex.quote(str(TINY))} plain-base.png",
    "example": f"examples/inference.py --model-path lora {DRAW} --steps 2 --lora-scale 0.8 --out example",
    "benchmark": "scripts/benchmark.py --config config.yaml --manifest processed/manifest.json --steps 2",
    "resume": "lora-mvp train --config config.yaml --manifest processed --resume",
}
PLAIN = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
how = dict(num_inference_steps=2, guidance_scale=3.0, height=64, width=64, generator=torch.Generator().manual_seed(7))
pipe("A photo of a disc", **how).images[0].save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def used(home, trained, interrupted, pool):
    """Everything that one does with a trained run; name -> finished process. (`interrupted` goes on meanwhile.)."""
    (home / "plain.py").write_text(PLAIN)
    commands = [command.replace("{home}", shlex.quote(str(home))) for command in USES.values()]
    return dict(zip(USES, pool.map(lambda command: fork(command, home, ENV), commands)))


def test_prepare_says_what_it_found(home, prepared):
    lines = prepared.splitlines()
    assert [line.split() for line in lines][3] == ["total", "10", "2", "0"]
    assert lines[-2] == f"wrote {home / 'processed' / 'manifest.json'}"
    assert lines[-1] == "next: lora-mvp doctor --config config.yaml --manifest processed/manifest.json"
    manifest = json.loads((home / "processed" / "manifest.json").read_text())
    assert {row["caption"] for row in manifest["images"]} == {"A photo of disc", "A photo of square"}


def test_train_leaves_a_whole_run(home, trained):
    lines, folder = trained.stdout.splitlines(), home / "lora"
    assert lines[0].startswith(f"trained {STEPS} steps on 10 images, ")
    assert lines[1].startswith("validation loss at step 0: ") and lines[-1] == "next: lora-mvp open lora"
    names = "lora_adapter/pytorch_lora_weights.safetensors lora_adapter/adapter_config.json loss_curve.png samples.png"
    names += (
        f" samples/step-000000-0.png samples/step-0000{STEPS}-0.png checkpoint-{STEPS}/checkpoint.json model_index.json"
    )
    assert not [name for name in names.split() if not (folder / name).is_file()]
    assert len(list(folder.glob("checkpoint-*"))) == 3  # training.max_checkpoints
    rows = list(csv.DictReader((folder / "loss_history.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(float(row["grad_norm"]) > 0 for row in rows)
    assert json.loads((folder / "run.json").read_text())["config"]["training"]["max_train_steps"] == STEPS
    assert not list(folder.rglob(".*")), "something half-written is left"


def test_pictures_say_how_they_were_made(home, used):
    files = [home / line for line in printed(used["generate"]).splitlines()]
    assert len(files) == 2 and all(Image.open(file).size == (64, 64) for file in files)
    facts = json.loads(Image.open(files[1]).text["lora_mvp"])
    expected = {"prompt": "A photo of a disc", "seed": 8, "steps": 2, "guidance_scale": 3, "size": 64, "base": "tiny"}
    assert facts == {**expected, "lora_scale": 0.8, "fused": False, "adapter": str(Path("lora", "lora_adapter"))}
    assert "Seed: 8" in Image.open(files[1]).text["parameters"]


def test_the_saved_pipeline_opens_anywhere_and_draws_the_same(home, used):
    fused, base = (pixels(home / printed(used[name]).strip()) for name in ("fuse", "base"))
    assert abs(fused - base).max() > 8, "the adapter does nothing, so this test shows nothing"
    printed(used["plain"])
    assert abs(fused - pixels(home / "plain.png")).max() <= 1


def test_the_embedded_base_opens_anywhere_and_strength_zero_is_the_base(home, used):
    printed(used["plain base"])
    assert abs(pixels(home / printed(used["base"]).strip()) - pixels(home / "plain-base.png")).max() <= 1


def test_evaluate_prints_the_table_and_says_where_it_is(home, used):
    text = printed(used["evaluate"])
    assert all(name in text for name in ("clip_score[tiny-clip]", "gap[tiny-clip]", "fd_tiny_clip"))
    assert "8 pairs of 2 prompts, 12 real pictures" in text
    assert text.splitlines()[-1].startswith(f"wrote {Path('lora', 'evaluation')}")
    metrics = json.loads((home / "lora" / "evaluation" / "metrics.json").read_text())
    assert all((home / "lora" / "evaluation" / s["lora_file"]).is_file() for s in metrics["samples"])


def test_the_example_and_the_benchmark_run(home, used):
    assert (home / printed(used["example"]).strip()).is_file()
    assert "fused into tiny at scale 0.8" in used["example"].stderr
    result = json.loads(printed(used["benchmark"]))
    assert result["steps"] == 2 and min(result[k] for k in ("steps_per_s", "images_per_s", "peak_rss_mb")) > 0


def test_a_finished_run_is_not_trained_again(used):
    assert printed(used["resume"]).startswith(f"trained {STEPS} steps")
    assert f"already finished ({STEPS} steps)" in used["resume"].stderr


def test_no_noise(trained, used):
    noise = ("Warning", "deprecated", "torchvision", "No LoRA keys", "pipeline components", "model shards", "`to()`")
    noise += ("Pipelines loaded",)
    said = {"train": trained.stderr, **{name: used[name].stderr for name in ("evaluate", "generate", "fuse")}}
    assert not [(name, word) for name, text in said.items() for word in noise if word in text], said
    one_line = "tiny draws 64 px pictures: image_size, min_resolution, resolution set to 64"
    assert said["generate"].splitlines() == [one_line]


# -- mistakes ---------------------------------------------------------------------------------------------------------

PREPARE = "lora-mvp prepare-data --config config.yaml"
ELSEWHERE = f"{TRAIN} --set training.output_dir=elsewhere"
MISTAKES = {  # name -> command, what its sentence must hold
    "no such folder": (f"{PREPARE} --set data.raw_data_dir=nowhere", "nowhere", "does not exist"),
    "empty folder": (f"{PREPARE} --set data.raw_data_dir=empty", "empty", "one sub-folder per label"),
    "no manifest": ("lora-mvp train --manifest nowhere.json", "nowhere.json", "prepare-data"),
    "newer manifest": ("lora-mvp train --manifest newer.json", "newer.json", "schema version 99"),
    "file gone": ("lora-mvp train --manifest gone/manifest.json", "gone/manifest.json", "train/disc/photo"),
    "base not there": (f"{ELSEWHERE} --set training.pretrained_model=./none", "none", "does not exist", "`tiny`"),
    "base of the hub": (f"{ELSEWHERE} --set training.pretrained_model=no/one", "no/one", "hf download", "`tiny`"),
    "size": (f"{ELSEWHERE} --set training.resolution=100", "training.resolution", "100", "multiple of 8"),
    "batch": (f"{ELSEWHERE} --set training.batch_size=11", "training.batch_size is 11", "10 training images"),
    "not writable": (f"{TRAIN} --set training.output_dir=config.yaml/x", "config.yaml/x", "cannot be written"),
    "another run": (f"{TRAIN} --resume --set training.seed=7", "checkpoint-", "seed was 42, is now 7"),
    "run in the way": (TRAIN, "already holds a run", "--resume", "--overwrite"),
    "misspelt key": (f"{TRAIN} --set training.max_train_stps=3", "max_train_stps", "did you mean max_train_steps?"),
    "both": (f"{TRAIN} --resume --overwrite", "--overwrite", "not allowed with"),
    "no model": (f"lora-mvp generate {DRAW} --model-path processed", "processed", "run.json", "--resume"),
    "no path": (f"lora-mvp generate {DRAW} --model-path nowhere", "nowhere", "does not exist"),
    "cut off": (f"lora-mvp generate {DRAW} --model-path damaged", "damaged", "cut off or damaged", "download it again"),
    "no steps": (f"lora-mvp generate {DRAW} --model-path lora --steps 0", "--steps", "at least 1"),
    "no pictures": ("lora-mvp evaluate --model-path lora --real-glob 'none/*.png'", "none/*.png", "no picture"),
    "demo in the way": ("lora-mvp demo --out processed", "processed", "not an empty folder"),
}


REAL = ("no such folder", "no path")  # in processes; the others run in this one


def run_here(command: str) -> subprocess.CompletedProcess:
    """Run a command of the console script in this process and folder."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(shlex.split(command)[1:])
        except SystemExit as left:
            code = left.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def mistaken(home, used, pool):
    """All of them made, beside a finished run that they must leave alone; name -> finished process."""
    (home / "empty").mkdir()
    manifest = json.loads((home / "processed" / "manifest.json").read_text())
    (home / "newer.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    shutil.copytree(home / "processed", home / "gone")
    next(home.glob("gone/train/disc/*")).unlink()
    shutil.copytree(home / "lora" / "lora_adapter", home / "damaged")
    weights = home / "damaged" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    before = contents(home)  # a report is written beside what was prepared, also where nothing was
    real = {name: pool.submit(run, MISTAKES[name][0], home) for name in REAL}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HF_HUB_OFFLINE", "1")
        done = {name: run_here(command) for name, (command, *_) in MISTAKES.items() if name not in REAL}
    done |= {name: future.result() for name, future in real.items()}
    assert {f: c for f, c in contents(home).items() if f.parent.name != "processed-report"} == {
        f: c for f, c in before.items() if f.parent.name != "processed-report"
    }
    return done


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_sentence(mistaken, name):
    done = mistaken[name]
    nothing = name == "empty folder"  # to be told from a mistake in a command: there is no picture yet
    assert done.returncode == (3 if nothing else 2) and (nothing or done.stdout == ""), done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.split("error:")[1]
    assert not [part for part in MISTAKES[name][1:] if part not in sentence], done.stderr


# -- signals ----------------------------------------------------------------------------------------------------------


def stop(command: str, folder: Path, number: int, after: int) -> tuple[int, str]:
    """Send a signal to a training once `after` steps are written; its exit code and the last line it said."""
    process = Forked(command, folder, ENV)
    history, end = folder / "lora" / "loss_history.csv", time.monotonic() + 200
    while not history.is_file() or len(history.read_bytes().splitlines()) <= after:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, (said.splitlines() or [""])[-1]


def stop_again_and_again(folder: Path, manifest: Path) -> list:
    """The same training as that of `home`, stopped in three ways and finished by a fourth process."""
    shutil.copy(manifest.parent.parent / "config.yaml", folder)
    train = f"lora-mvp train --config config.yaml --manifest {shlex.quote(str(manifest))}"
    return [
        stop(train, folder, signal.SIGINT, after=3),
        stop(f"{train} --resume", folder, signal.SIGTERM, after=8),
        stop(f"{train} --resume", folder, signal.SIGKILL, after=13),
        fork(f"{train} --resume", folder, ENV),
    ]


@pytest.fixture(scope="module")
def interrupted(home, prepared, pool, tmp_path_factory):
    """A folder, and what `stop_again_and_again` will say about it."""
    folder = tmp_path_factory.mktemp("interrupted")
    return folder, pool.submit(stop_again_and_again, folder, home / "processed" / "manifest.json")


@pytest.mark.skipif(os.name == "nt", reason="these are signals of POSIX")
def test_a_run_that_was_stopped_ends_in_the_same_bytes(home, trained, interrupted):
    folder, future = interrupted
    *asked, killed, finished = future.result()
    for code, said in asked:
        assert code == 130 and "stopped after step " in said and "--resume" in said
    assert killed[0] == -signal.SIGKILL
    assert printed(finished)
    for name in ("lora_adapter/pytorch_lora_weights.safetensors", "loss_history.csv"):
        assert (folder / "lora" / name).read_bytes() == (home / "lora" / name).read_bytes(), name


@pytest.mark.parametrize("words", [["--url", "http://a:1", "list"], ["list", "--url", "http://a:1"]])
def test_the_address_of_a_service_may_stand_on_both_sides_of_the_action(words):
    assert build_parser().parse_args(["jobs", *words]).url == "http://a:1"
