"""Choosing a checkpoint: a run that learns its pictures by heart is stopped where it still draws new ones."""

import json
import shutil

import numpy as np
import pytest
import yaml
from evaluation_runs import CALLED, HELD_OUT, prepare, run, settings

from lora_mvp.config import LoraMvpError
from lora_mvp.eval.choice import Choice, choice_text
from lora_mvp.eval.columns import data_of
from lora_mvp.eval.evaluator import Evaluator
from lora_mvp.eval.selection import choose
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


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """Four pictures, one caption, a high rate and rank: at the end it draws the four whatever it is asked for."""
    root = tmp_path_factory.mktemp("overfitted")
    manifest = prepare(root, ["whale", "crab", "duck", "bear-face", "horse"], "3d style")
    steep = {"learning_rate": 1e-3, "lr_scheduler": "constant", "lora_rank": 32, "lora_alpha": 32, "batch_size": 4}
    out = run(manifest, root / "lora", max_train_steps=LAST, checkpointing_steps=12, max_checkpoints=9, **steep)
    for step in (24, 36):  # two are enough to choose from, and need fewer pictures
        shutil.rmtree(out / f"checkpoint-{step}")
    (root / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    return root


@pytest.fixture(scope="module")
def choice(overfitted):
    return choose(settings(overfitted / "prompts.yaml"), overfitted / "lora", HELD_OUT)


def test_what_copies_is_not_chosen(choice):
    by_step = {score.step: score for score in choice.scores}
    assert list(by_step) == [0, 12, LAST]
    last = by_step[LAST]
    assert last.out and last.out.startswith("it copies") and last.copies.low > 0.05, choice_text(choice)
    assert last.copies.copied > by_step[0].copies.copied, "the base, which cannot copy, seems to copy as often"
    assert choice.step != LAST and by_step[choice.step].out is None
    assert choice.runner_up != LAST


def test_what_copies_is_named_by_evaluate_and_compare_too(overfitted, tmp_path):
    evaluator = Evaluator(settings(overfitted / "prompts.yaml"), HELD_OUT)
    found = evaluator.evaluate(overfitted / "lora", tmp_path / "one").judgement
    assert "copies" in found.lost and found.verdict in ("a_better", "trade_off"), found.why
    assert "LoRA gives back training pictures: " in found.why and not confirms(found)[0]
    for old, new in (("base", "a"), ("lora", "b")):
        shutil.copytree(tmp_path / "one" / "samples" / old, tmp_path / "two" / "samples" / new)
    beside = evaluator.ab_test("base", overfitted / "lora", tmp_path / "two").judgement
    assert "copies" in beside.lost and "lora gives back training pictures: " in beside.why


def test_the_choice_is_explained_and_can_be_used(choice, overfitted):
    root = overfitted / "lora"
    kept = Choice.model_validate_json((root / "best.json").read_text())
    assert kept == choice and str(kept.step) in kept.why
    assert "chosen:" in choice_text(choice) and f"out: {choice.scores[-1].out}" in choice_text(choice)
    folder = root / "evaluation" / "checkpoints"
    for name in ("metric_vs_step.png", "samples.png", "report.html", "plan.json"):
        assert (folder / name).is_file(), name
    assert len(data_of(root / "best_adapter").train.images) == 4, "an adapter inside a run has the run's data"
    if choice.step:  # the adapter that is handed on draws what was judged
        row = json.loads((folder / "plan.json").read_text())["rows"][0]
        drawn = render(load_run(root / choice.adapter), [row["prompt"]], [row["seed"]], 1.0, 4, 3.0)[0]
        from PIL import Image

        judged = Image.open(folder / "samples" / f"step-{choice.step:06d}" / row["prompt_id"] / f"{row['seed']}.png")
        assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(judged, dtype=int)).max() <= 1


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
    assert "every checkpoint is out" in found.why
    assert {"checkpoint_damaged", "few_checkpoints"} <= {w.code for w in found.warnings}


def test_a_folder_without_checkpoints_is_refused(overfitted, tmp_path):
    with pytest.raises(LoraMvpError, match="holds no checkpoint") as e:
        choose(settings(overfitted / "prompts.yaml"), tmp_path, HELD_OUT)
    assert e.value.code == "no_checkpoints"
