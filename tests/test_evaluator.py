"""The evaluator on real, short trainings: what is better is called better, what is the same is not, and nothing is lost."""

import json
import shutil

import numpy as np
import pytest
import yaml
from evaluation_runs import CALLED as ALL
from evaluation_runs import HELD_OUT, PLAIN, prepare, run, settings
from PIL import Image

from lora_mvp.api.contract import metrics_schemas
from lora_mvp.cli import main
from lora_mvp.config import LoraMvpError
from lora_mvp.data.images import open_rgb
from lora_mvp.data.manifest import read_manifest
from lora_mvp.eval import columns as drawing
from lora_mvp.eval.copies import find_real, read_pictures, real_of_split, trained_on
from lora_mvp.eval.evaluator import Evaluator
from lora_mvp.eval.extractors import find_extractor
from lora_mvp.eval.metrics import alignment
from lora_mvp.eval.records import Metrics
from lora_mvp.eval.scores import compare_values, prompt_scores, sample_scores
from lora_mvp.eval.verdicts import judge_scores
from lora_mvp.infer import load_run, render

STEPS = 32
CALLED = [prompt for k, prompt in enumerate(ALL) if k % 3]  # two thirds are enough to see it


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A good run on all of the demo's pictures, and one that has hardly begun."""
    root = tmp_path_factory.mktemp("evaluator")
    manifest = prepare(root, ["*"], "{stem}, 3d style")
    run(manifest, root / "good", max_train_steps=STEPS, learning_rate=1e-3, batch_size=4)
    run(manifest, root / "undertrained", max_train_steps=3, learning_rate=1e-4)
    groups = {"called": CALLED, "without_trigger": PLAIN}
    (root / "prompts.yaml").write_text(yaml.safe_dump(groups))
    (root / "few.yaml").write_text(yaml.safe_dump({"called": CALLED[:8], "without_trigger": PLAIN[:2]}))
    return root


@pytest.fixture(scope="module")
def evaluator(root):
    return Evaluator(settings(root / "prompts.yaml"), HELD_OUT)


@pytest.fixture(scope="module")
def good(root, evaluator):
    """The good run against its base."""
    return evaluator.evaluate(root / "good")


def hand_on(source, target) -> None:
    """Pictures that another evaluation has drawn: they are found there and not drawn again."""
    shutil.copytree(source, target)


@pytest.fixture(scope="module")
def better(root, evaluator, good):
    """The good run against the other."""
    hand_on(root / "good" / "evaluation" / "samples" / "lora", root / "better" / "samples" / "a")
    return evaluator.ab_test(root / "good", root / "undertrained", root / "better")


def rows(out) -> list[dict]:
    return [json.loads(line) for line in (out / "per_sample.jsonl").read_text().splitlines()]


# -- told apart -------------------------------------------------------------------------------------------------------


def test_the_good_one_has_the_style_and_the_price_is_named(good):
    """A short training in a far style comes close to it and draws less clearly; both is said."""
    found = good.judgement
    assert found.verdict == ("trade_off" if found.lost else "b_better"), found.why
    assert not found.lost or "less true to the prompts" in found.why
    gap = found.comparisons["gap"]
    assert gap.high < 0 and gap.p_holm < 0.01 and gap.n == len(CALLED)
    assert "gap" in found.won and set(gap.anchors) == {"real", "train"} and "closer to the real pictures" in found.why
    assert good.copies["LoRA"].low < 0.05, "it is no copier"
    assert good.scores["gap[tiny-clip]"].change.value < 0 and good.scores["fd_tiny_clip"].change.value < 0
    assert good.forgetting.n == len(PLAIN)


@pytest.mark.slow
def test_three_steps_of_training_are_no_better_than_the_base_and_worse_than_many(root, evaluator, better):
    hand_on(root / "good" / "evaluation" / "samples" / "base", root / "nothing" / "samples" / "a")
    hand_on(root / "better" / "samples" / "b", root / "nothing" / "samples" / "b")
    nothing = evaluator.ab_test("base", root / "undertrained", root / "nothing").judgement
    assert nothing.verdict in ("equivalent", "no_evidence"), nothing.why
    assert nothing.comparisons["gap"].detectable < 8
    assert "gap" in better.judgement.lost and "gap" not in better.judgement.won, better.judgement.why
    assert better.judgement.verdict == ("trade_off" if better.judgement.won else "a_better"), better.judgement.why
    assert better.columns == ("good", "undertrained")


@pytest.mark.slow  # test_verdicts.py simulates the same with numbers
def test_two_sets_of_one_model_are_called_different_no_more_often_than_the_level_says(root):
    """A pool of pictures of the base, four of each prompt, is dealt into two sets of two again and again."""
    scorer, pool = find_extractor("tiny-clip"), 4
    prompts = CALLED[:12]
    names = [p for p in prompts for _ in range(pool)]
    pictures = render(
        load_run("tiny"), names, list(range(len(names))), num_inference_steps=4, guidance_scale=3.0, batch_size=8
    )
    features = scorer.image_features(pictures).reshape(len(prompts), pool, -1)
    texts, real = scorer.text_features(prompts), scorer.image_features(find_real(HELD_OUT).images)
    rng, verdicts = np.random.default_rng(0), []
    for repeat in range(100):
        deal = np.stack([rng.permutation(pool) for _ in prompts])
        sides = [np.take_along_axis(features, deal[:, part, None], 1) for part in (slice(0, 2), slice(2, 4))]
        twice, values = [p for p in prompts for _ in range(2)], []
        for seen in (f.reshape(-1, f.shape[-1]) for f in sides):
            match = alignment(seen, texts.repeat(2, 0))
            values.append(sample_scores(match, seen) | prompt_scores(seen, real, twice))
        found = judge_scores(compare_values(*values, twice, repeat), alpha=0.05)
        verdicts.append(found.verdict in ("a_better", "b_better", "trade_off"))
    assert sum(verdicts[:20]) <= 3, "of 20, at a level of 0.05, 4 or more have a probability of 0.016"
    assert sum(verdicts) <= 11, "of 100, 5 are expected and 12 or more have a probability of 0.004"


# -- the same is the same, and the other way round is the other way round -----------------------------------------------


@pytest.mark.slow  # ten seconds of a core
def test_a_model_against_itself_shows_exactly_nothing(root, evaluator, better):
    hand_on(root / "better" / "samples" / "a", root / "same" / "samples" / "a")  # B is drawn by itself
    same = evaluator.ab_test(root / "good", root / "good", root / "same")
    assert same.judgement.verdict == "equivalent"
    assert same.columns == ("good (A)", "good (B)")
    for c in same.judgement.comparisons.values():
        assert (c.difference, c.low, c.high, c.p, c.wins_a, c.wins_b) == (0, 0, 0, 1, 0, 0)
    assert all(s.change.value in (0, None) for s in same.scores.values())


@pytest.mark.slow  # ten seconds of a core
def test_exchanging_the_models_negates_everything(root, evaluator, better):
    there = Metrics.model_validate_json((root / "better" / "metrics.json").read_text())
    assert there == better
    for old, new in ("ab", "ba"):
        hand_on(root / "better" / "samples" / old, root / "back" / "samples" / new)
    back = evaluator.ab_test(root / "undertrained", root / "good", root / "back")
    assert (there.judgement.won, there.judgement.lost) == (back.judgement.lost, back.judgement.won)
    turned = {"a_better": "b_better", "b_better": "a_better"}
    assert back.judgement.verdict == turned.get(there.judgement.verdict, there.judgement.verdict)
    assert there.plan_sha256 == back.plan_sha256
    for name, c in there.judgement.comparisons.items():
        other = back.judgement.comparisons[name]
        assert (c.difference, c.low, c.high) == (-other.difference, -other.high, -other.low)
        assert (c.p, c.wins_a, c.wins_b) == (other.p, other.wins_b, other.wins_a)


def test_a_second_evaluation_draws_nothing_and_writes_the_same(root, evaluator, good, monkeypatch):
    out = root / "good" / "evaluation"
    before = {
        name: (out / name).read_bytes() for name in ("metrics.json", "per_sample.jsonl", "plan.json", "report.html")
    }

    def refuse(*args, **options):
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawing, "render", refuse)
    assert evaluator.evaluate(root / "good") == good
    assert {name: (out / name).read_bytes() for name in before} == before


# -- what is left behind ------------------------------------------------------------------------------------------------


def test_every_picture_has_a_row_and_every_number_its_extractor(root, good):
    out = root / "good" / "evaluation"
    found = rows(out)
    assert len(found) == 2 * (len(CALLED) + len(PLAIN))
    assert all(Image.open(out / row["file"]).size == (64, 64) for row in found)
    called = [row for row in found if row["column"] == "LoRA" and row["group"] == "called"]
    mean = np.mean([row["clip_score"] for row in called])
    assert mean == pytest.approx(good.scores["clip_score[tiny-clip]"].lora.value, abs=1e-4)
    assert all(row["train_file"].startswith("train/") and 0 <= row["bits"] <= 64 for row in called)
    assert len(good.extractor.weights_sha256) == 64 and good.extractor.preprocess.filter == "bicubic"
    for name in ("samples.png", "contact_lora.png", "nearest_train.png", "env.json"):
        assert (out / name).is_file(), name
    assert json.loads((out / "plan.json").read_text())["sha256"] == good.plan_sha256
    page = (out / "report.html").read_text()
    assert (
        good.judgement.why[1:-1] in page and "<script" not in page and page.count("data:image/jpeg") >= 2 * len(CALLED)
    )


def test_markup_in_a_prompt_stays_text(root, tmp_path, monkeypatch):
    prompts = tmp_path / "p.yaml"
    prompts.write_text(yaml.safe_dump([f"<img src=x onerror=alert({k})> " + "long " * 40 for k in range(6)]))
    monkeypatch.setattr(drawing, "render", lambda run, prompts, seeds, scale, **how: noise(seeds))
    found = Evaluator(settings(prompts), HELD_OUT).evaluate(root / "good", tmp_path / "out")
    assert "prompt_truncated" in [w.code for w in found.warnings]
    assert "<img src=x" not in (tmp_path / "out" / "report.html").read_text()


# -- what goes wrong ------------------------------------------------------------------------------------------------


def noise(seeds) -> list[Image.Image]:
    return [Image.fromarray(np.random.default_rng(s).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for s in seeds]


def test_what_cannot_be_drawn_is_counted_and_left_out_of_both(root, tmp_path, monkeypatch):
    def draw(run, prompts, seeds, scale, **how):
        if scale and CALLED[0] in prompts:
            raise RuntimeError("CUDA out of memory")
        return [
            Image.new("RGB", (64, 64)) if p == CALLED[1] and scale else picture
            for p, picture in zip(prompts, noise(seeds))
        ]

    monkeypatch.setattr(drawing, "render", draw)
    found = Evaluator(settings(root / "few.yaml"), HELD_OUT).evaluate(root / "good", tmp_path / "out")
    assert (found.n_pairs, found.failed) == (8 - 2, {"base": 0, "LoRA": 2})
    assert {"samples_missing", "n_mismatch_between_runs"} <= {w.code for w in found.warnings}
    errors = [row["error"] for row in rows(tmp_path / "out") if row["error"]]
    assert errors == ["out of memory", "a picture of a single colour"]
    assert found.judgement.verdict == "insufficient_data" and "need 7 at least" in found.judgement.why


def test_an_interrupted_evaluation_goes_on_where_it_was(root, tmp_path, monkeypatch):
    drawn = []

    def draw(run, prompts, seeds, scale, **how):
        if len(drawn) == 8:
            drawn.append(None)
            raise KeyboardInterrupt
        drawn.extend(prompts[: 8 - len(drawn)] if None not in drawn else prompts)
        return noise(seeds)

    monkeypatch.setattr(drawing, "render", draw)
    once = Evaluator(settings(root / "few.yaml", fid_batch_size=4), HELD_OUT)
    with pytest.raises(KeyboardInterrupt):
        once.evaluate(root / "good", tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("samples/*/*/*.png")}
    assert len(kept) == 8
    once.evaluate(root / "good", tmp_path / "out")
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert len(drawn) == 1 + 2 * (8 + 2)


def test_training_pictures_as_real_ones_are_called_what_they_are(root, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "render", lambda run, prompts, seeds, scale, **how: noise(seeds))
    pattern = str(root / "data" / "train" / "**" / "*.png")
    found = Evaluator(settings(root / "few.yaml"), pattern).evaluate(root / "good", tmp_path / "out")
    assert "real_equals_train" in [w.code for w in found.warnings]
    own = Evaluator(settings(root / "few.yaml")).evaluate(root / "good", tmp_path / "own")  # the manifest's own split
    assert 0 < own.n_real < 10 and "real_equals_train" not in [w.code for w in own.warnings]


def test_a_training_picture_is_recognised_in_every_form(root, tmp_path):
    """The raw file, what training saw, and each of them saved again; and what was held out is not."""
    manifest = read_manifest(root / "data" / "manifest.json")
    train, raw = real_of_split(manifest, "train"), manifest.folder / manifest.config["raw_data_dir"]

    def forms(rows):
        files = [path for row in rows for path in (raw / row.source, manifest.path_of(row))]
        for k, file in enumerate(files[:]):
            im = open_rgb(file)
            im.resize((2 * im.width, 2 * im.height)).save(tmp_path / f"{k}.jpg", quality=70)
            files.append(tmp_path / f"{k}.jpg")
        return read_pictures([str(file) for file in files])

    seen = forms(manifest.rows("train")[:5])
    assert len(seen.images) >= 15 and trained_on(seen, train) == list(range(len(seen.images)))
    held_out = forms(manifest.rows("val"))
    assert held_out.images and trained_on(held_out, train) == []


def test_mistakes_are_named_before_anything_is_drawn(root, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("called: [a {thing}]")
    good, prompts, alone = root / "good", root / "prompts.yaml", tmp_path / "alone"
    shutil.copytree(good / "lora_adapter", alone)  # away from its run nobody knows its data
    for code, call in {
        "prompts_invalid": lambda: Evaluator(settings(bad), HELD_OUT).evaluate(good, tmp_path / "x"),
        "model_not_found": lambda: Evaluator(settings(prompts), HELD_OUT).ab_test(
            good, root / "nowhere", tmp_path / "x"
        ),
        "nothing_to_compare": lambda: Evaluator(settings(prompts)).ab_test("base", "base", tmp_path / "x"),
        "manifest_missing": lambda: Evaluator(settings(prompts), None, root / "no.json").evaluate(good, tmp_path / "x"),
        "no_real_images": lambda: Evaluator(settings(prompts)).ab_test("tiny", alone, tmp_path / "x"),
        "extractor_unknown": lambda: Evaluator(settings(prompts, extractor="vgg"), HELD_OUT).evaluate(
            good, tmp_path / "x"
        ),
    }.items():
        with pytest.raises(LoraMvpError) as e:
            call()
        assert e.value.code == code
    assert not (tmp_path / "x").exists()


# -- the command line -------------------------------------------------------------------------------------------------


def test_compare_on_the_command_line(root, better, capsys):
    sets = ["num_samples=1", "num_inference_steps=4", "guidance_scale=3", "fid_batch_size=8"]
    options = [
        part for text in [*sets, f"prompt_file={root / 'prompts.yaml'}"] for part in ("--set", f"evaluation.{text}")
    ]
    models = [str(root / "good"), str(root / "undertrained")]
    assert main(["compare", *options, "--real-glob", HELD_OUT, "--out", str(root / "better"), *models]) == 0
    text = capsys.readouterr().out
    why, verdict = better.judgement.why, better.judgement.verdict
    assert f". {why[0].upper()}{why[1:]}" in text.splitlines()[0] and f"{verdict}: {why}" in text, text
    assert "forgetting: " in text and "copies, good: " in text


@pytest.mark.parametrize(
    "arguments",
    [
        "compare base nowhere",
        "choose nowhere",
        "evaluate --model-path nowhere",
        "evaluate --model-path nowhere --checkpoints",
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "nowhere" in said, said
    assert not list(tmp_path.iterdir())


def test_the_schema_of_metrics_that_ships_is_that_of_the_record():
    whole = Metrics.model_json_schema(ref_template="#/components/schemas/{model}")
    assert metrics_schemas() == whole.pop("$defs") | {"Metrics": whole}  # python scripts/api_docs.py --metrics
