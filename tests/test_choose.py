"""Choosing a checkpoint: a run that learns its pictures by heart is stopped where it still draws new ones."""

import json
import shutil

import numpy as np
import pytest
import yaml
from evaluation_runs import CALLED, HELD_OUT, prepare, run, settings
from PIL import Image

from lora_mvp.config import LoraMvpError
from lora_mvp.eval.choice import Choice, choice_text
from lora_mvp.eval.columns import data_of
from lora_mvp.eval.evaluator import Evaluator
from lora_mvp.eval.selection import choose
from lora_mvp.eval.strengths import Grid, grid, grid_text
from lora_mvp.eval.verdicts import confirms
from lora_mvp.infer import load_run, render

LAST = 48
CALL = [
    "3d style",
    "a 3d style",
    "a thing, 3d style",
    "a photo, 3d style",
    "a picture, 3d style",
    "something, 3d style",
]
CALL += ["3d style, on white", "an animal, 3d style"]  # close to the one caption of the training
PROMPTS = CALL + [prompt for k, prompt in enumerate(CALLED) if k % 3]


def steep_run(root, pictures, last, every, **training):
    """Few pictures, one caption, a high rate and rank: the longer, the more it draws the few whatever it is asked for."""
    manifest = prepare(root, pictures, "3d style")
    steep = {"learning_rate": 1e-3, "lora_rank": 32, "lora_alpha": 32} | training
    out = run(manifest, root / "lora", max_train_steps=last, checkpointing_steps=every, max_checkpoints=99, **steep)
    for step in range(2 * every, last, every):  # two are enough to choose from, and need fewer pictures
        shutil.rmtree(out / f"checkpoint-{step}")
    (root / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    return root


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    root, four = tmp_path_factory.mktemp("overfitted"), ["whale", "crab", "duck", "bear-face", "horse"]
    return steep_run(root, four, LAST, 12, lr_scheduler="constant", batch_size=4)


@pytest.fixture(scope="module")
def copier(tmp_path_factory):
    """Trained on one duck until it draws that duck; the horse is held out. For slow tests."""
    root = tmp_path_factory.mktemp("copier")
    return steep_run(root, ["duck", "horse"], 400, 20, lr_scheduler="cosine", batch_size=1)


@pytest.fixture(scope="module")
def choice(overfitted):
    return choose(settings(overfitted / "prompts.yaml"), overfitted / "lora", HELD_OUT)


@pytest.mark.slow
def test_what_copies_is_not_chosen(copier):
    choice = choose(settings(copier / "prompts.yaml"), copier / "lora", HELD_OUT)
    by_step = {score.step: score for score in choice.scores}
    assert list(by_step) == [0, 20, 400]
    last = by_step[400]
    assert last.out and last.out.startswith("it copies") and last.copies.low > 0.05, choice_text(choice)
    assert last.copies.copied > by_step[20].copies.copied and by_step[0].copies is None, "a base cannot copy"
    assert choice.step != 400 and by_step[choice.step].out is None
    assert choice.runner_up != 400


@pytest.mark.slow
def test_what_copies_is_named_by_evaluate_and_compare_too(copier, tmp_path):
    evaluator = Evaluator(settings(copier / "prompts.yaml"), HELD_OUT)
    found = evaluator.evaluate(copier / "lora", tmp_path / "one").judgement
    assert "copies" in found.lost and found.verdict in ("a_better", "trade_off"), found.why
    assert "LoRA gives back training pictures: " in found.why and not confirms(found)[0]
    for old, new in (("base", "a"), ("lora", "b")):
        shutil.copytree(tmp_path / "one" / "samples" / old, tmp_path / "two" / "samples" / new)
    beside = evaluator.ab_test("base", copier / "lora", tmp_path / "two").judgement
    assert "copies" in beside.lost and "lora gives back training pictures: " in beside.why


@pytest.mark.slow  # in every run of the checks, tutorial 04 chooses, and chapter 17 takes its choices apart
def test_the_choice_is_explained_and_can_be_used(choice, overfitted):
    root = overfitted / "lora"
    kept = Choice.model_validate_json((root / "best.json").read_text())
    assert kept == choice and str(kept.step) in kept.why
    assert [score.step for score in choice.scores] == [0, 12, LAST] and "chosen:" in choice_text(choice)
    folder = root / "evaluation" / "checkpoints"
    for name in ("metric_vs_step.png", "samples.png", "report.html", "plan.json"):
        assert (folder / name).is_file(), name
    assert len(data_of(root / "best_adapter").train.images) == 4, "an adapter inside a run has the run's data"
    if choice.step:  # the adapter that is handed on draws what was judged
        row = json.loads((folder / "plan.json").read_text())["rows"][0]
        drawn = render(load_run(root / choice.adapter), [row["prompt"]], [row["seed"]], 1.0, 4, 3.0)[0]
        judged = Image.open(folder / "samples" / f"step-{choice.step:06d}" / row["prompt_id"] / f"{row['seed']}.png")
        assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(judged, dtype=int)).max() <= 1


@pytest.mark.slow
def test_an_unfinished_run_can_be_chosen_from_and_a_damaged_checkpoint_is_named(choice, overfitted, tmp_path):
    root = tmp_path / "lora"
    shutil.copytree(overfitted / "lora", root)  # with its pictures, so that nothing is drawn again
    (root / "run.json").unlink()
    weights = root / "checkpoint-12" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"none")
    config = settings(overfitted / "prompts.yaml")
    found = choose(config, root, HELD_OUT, overfitted / "data" / "manifest.json")
    assert [score.step for score in found.scores] == [0, LAST]
    assert found.scores[-1].copies == choice.scores[-1].copies
    assert (found.step, found.path, found.adapter) == (0, None, None) and not (root / "best_adapter").exists()
    assert "no checkpoint is better than the base" in found.why
    assert {"checkpoint_damaged", "few_checkpoints"} <= {w.code for w in found.warnings}


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    with pytest.raises(LoraMvpError, match="holds no checkpoint") as e:
        choose(settings(tmp_path / "prompts.yaml"), tmp_path, HELD_OUT)
    assert e.value.code == "no_checkpoints"


@pytest.mark.slow
def test_every_checkpoint_at_two_strengths(choice, overfitted, monkeypatch):
    root, config = overfitted / "lora", settings(overfitted / "prompts.yaml")
    judged = root / "evaluation" / "checkpoints" / "samples" / "step-000012"
    before = {file: file.stat().st_mtime_ns for file in judged.glob("*/*.png")}
    found = grid(config, root, [1.0, 0.5], HELD_OUT)
    assert [(cell.step, cell.strength) for cell in found.cells] == [(12, 0.5), (12, 1.0), (LAST, 0.5), (LAST, 1.0)]
    assert {file: file.stat().st_mtime_ns for file in judged.glob("*/*.png")} == before, "drawn again"
    full = {score.step: score for score in choice.scores}
    for cell in found.cells[1::2]:
        assert (cell.copies, cell.out) == (full[cell.step].copies, full[cell.step].out), grid_text(found)
    assert found.cells[2].scores != found.cells[3].scores
    out = root / "evaluation" / "grid"
    assert Grid.model_validate_json((out / "grid.json").read_text()) == found
    with Image.open(out / "grid.png") as sheet:
        assert sheet.width > 2 * 192 and sheet.height > 3 * 192
    assert found.best is None or (found.best.out is None and found.confirm and (out / "adapter").is_dir())

    def no_more(*_, **__):
        raise AssertionError("a picture was drawn again")

    monkeypatch.setattr("lora_mvp.eval.columns.render", no_more)
    assert grid(config, root, [1.0, 0.5], HELD_OUT) == found
    with pytest.raises(LoraMvpError, match="twelve numbers above 0"):
        grid(config, root, [0.0], HELD_OUT)
