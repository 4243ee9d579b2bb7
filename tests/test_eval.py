"Evaluation: what is scored, what is refused, and what an evaluation leaves behind."

import json

import numpy as np
import pytest
from PIL import Image

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.eval import columns as drawn_columns
from lora_mvp.eval import evaluator as evaluation
from lora_mvp.eval.copies import find_real
from lora_mvp.eval.evaluator import evaluate
from lora_mvp.eval.extractors import ClipExtractor
from lora_mvp.eval.records import Metrics, table
from lora_mvp.eval.samples import read_plan
from lora_mvp.eval.scores import score
from lora_mvp.infer import LoadedRun


@pytest.fixture(scope="module")
def scorer(small_clip):
    return ClipExtractor(small_clip, name="small", device="cpu")


TWO = "evaluation.prompts=[A photo of a cat, A futuristic cityscape at sunset]"


def noise_pictures(n, seed, size=(40, 32), bright=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (n, 5, 5, 3)) + bright
    return [Image.fromarray(c.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC) for c in coarse]


# -- scores -----------------------------------------------------------------------------------------------------------


def test_a_model_that_comes_closer_is_seen_to(scorer):
    real, base = noise_pictures(40, 1, bright=50), noise_pictures(32, 2, bright=0)
    lora = [Image.blend(b, r, 0.6) for b, r in zip(base, noise_pictures(32, 3, bright=50), strict=True)]
    prompts = [f"thing {k // 2}" for k in range(32)]
    m = score(scorer, prompts, base, lora, real)
    assert (m.n_pairs, m.n_prompts, m.n_real) == (32, 16, 40)
    assert m.scores["gap[small]"].change.high < 0
    assert m.scores["clip_score[small]"].n == 16
    back = score(scorer, prompts, lora, base, real)
    assert back.scores["clip_score[small]"].change.value == pytest.approx(-m.scores["clip_score[small]"].change.value)
    assert score(scorer, prompts, base, lora, real) == m
    assert not any(name.startswith("fid") for name in m.scores)


def test_json_holds_no_nan(scorer):
    pictures = noise_pictures(3, 1)
    m = score(scorer, ["a", "b", "c"], pictures, pictures[::-1], pictures)

    def refuse(name):
        raise AssertionError(name)

    text = m.model_dump_json()
    json.loads(text, parse_constant=refuse)
    assert Metrics.model_validate_json(text) == m
    assert {w.code for w in m.warnings} >= {"n_too_small", "too_few_pairs", "no_interval"}
    assert "note:" in table(m)


def test_a_newer_record_is_refused(scorer):
    pictures = noise_pictures(2, 1)
    record = score(scorer, ["a", "b"], pictures, pictures, pictures).model_dump()
    with pytest.raises(ValueError, match="schema_version"):
        Metrics.model_validate(record | {"schema_version": 3})


# -- evaluate, with drawing replaced ----------------------------------------------------------------------------------


@pytest.fixture
def drawing(monkeypatch, scorer):
    "`evaluate` with pictures that depend on prompt, seed, model and strength, and no diffusion."
    loaded = []

    def load(path, base=None, device=None, partial=False):
        loaded.append(str(path))
        return LoadedRun(pipe=None, base="tiny", adapter=path)

    def render(run, prompts, seeds, lora_scale=1.0, **options):
        bright = int(50 * lora_scale) if "baseline" not in str(run.adapter) else 20
        return [noise_pictures(1, s + len(p), bright=bright)[0] for p, s in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(drawn_columns, "load_run", load)
    monkeypatch.setattr(drawn_columns, "render", render)
    monkeypatch.setattr(drawn_columns, "cut_prompts", lambda pipe, prompts: [])  # there is no pipeline to ask
    monkeypatch.setattr(evaluation, "find_run", lambda path, base=None: ("tiny", path))
    monkeypatch.setattr(evaluation, "scorer_for", lambda base, config: scorer)
    monkeypatch.setattr(drawn_columns, "model_facts", lambda run, scale: {"base": f"{run.adapter} at {scale}"})
    return loaded


@pytest.fixture
def real(tmp_path):
    for k, picture in enumerate(noise_pictures(6, 9)):
        file = tmp_path / "real" / f"label{k % 2}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return str(tmp_path / "real" / "**" / "*")


def test_what_an_evaluation_leaves_behind(drawing, real, tmp_path):
    (tmp_path / "real" / "label0" / "notes.txt").write_text("no picture")
    config = load_config(overrides=[TWO, "evaluation.num_samples=3"])
    result = evaluate(config, tmp_path / "run", real)
    out = tmp_path / "run" / "evaluation"
    assert json.loads((out / "metrics.json").read_text()) == result
    assert result["columns"] == ["base", "LoRA"] and result["n_pairs"] == 6 and result["n_real"] == 6
    seeds = [row.seed for row in read_plan(out / "plan.json").rows]
    assert [s["seed"] for s in result["samples"]] == seeds and len(set(seeds)) == 6
    assert "real_unreadable" in [w["code"] for w in result["warnings"]]
    files = [s[column] for s in result["samples"] for column in ("base_file", "lora_file")]
    assert len(set(files)) == 12
    for file in files:
        assert json.loads(Image.open(out / file).text["lora_mvp"])["seed"] in seeds
    assert min(Image.open(out / "samples.png").size) > 256
    assert len(drawing) == 1
    assert not list(out.glob(".*")) and not list(out.glob("*.tmp"))


def test_strength_zero_is_the_base(drawing, real, tmp_path):
    result = evaluate(load_config(overrides=[TWO]), tmp_path / "run", real, tmp_path / "out", lora_scale=0.0)
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert [s["base_score"] for s in result["samples"]] == [s["lora_score"] for s in result["samples"]]
    assert all(s["change"]["value"] in (0.0, None) for s in result["scores"].values())


def test_another_model_as_baseline(drawing, real, tmp_path):
    config = load_config(overrides=[TWO, f"evaluation.baseline_model_path={tmp_path / 'baseline'}"])
    result = evaluate(config, tmp_path / "run", real)
    assert result["columns"] == ["baseline", "model"]
    assert sorted(drawing) == [str(tmp_path / "baseline"), str(tmp_path / "run")]


def test_user_mistakes(drawing, real, tmp_path, monkeypatch):
    config = load_config(overrides=[TWO])
    blank = load_config(overrides=['evaluation.prompts=[" "]'])
    file = tmp_path / "file"
    file.write_text("")
    for code, arguments in {
        "no_real_images": (config, tmp_path, str(tmp_path / "nowhere" / "*.png")),
        "prompts_empty": (blank, tmp_path, real),
        "output_not_writable": (config, tmp_path, real, file / "out"),
    }.items():
        with pytest.raises(LoraMvpError) as e:
            evaluate(*arguments)
        assert e.value.code == code
    monkeypatch.undo()
    with pytest.raises(LoraMvpError) as e:
        evaluate(config, tmp_path / "nowhere", real)
    assert e.value.code == "model_not_found"


def test_real_pictures_come_in_the_order_of_their_names(tmp_path):
    for name, colour in {"b": "red", "a": "blue"}.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    found = find_real(str(tmp_path / "*"))
    assert [p.getpixel((0, 0)) for p in found.images] == [(0, 0, 255), (255, 0, 0)] and found.refused == []
