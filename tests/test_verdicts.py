"""What a verdict says, held against what is true: collapse, perfect pictures, luck, trade-offs, faults and rare failures."""

from typing import get_args

import numpy as np
import pytest
from styles import STYLES, pictures_in

from lora_mvp.api.outcomes import VerdictWord
from lora_mvp.eval.extractors import find_extractor
from lora_mvp.eval.scores import Terms, score
from lora_mvp.eval.verdicts import Fault, Margin, Verdict, compare_scores, confirms, judge_scores
from lora_mvp.infer import load_run, render


@pytest.fixture(scope="module")
def scorer():
    return find_extractor("tiny-clip")


# -- pictures whose quality is known --------------------------------------------------------------------------------------


def some(*quick):
    """All styles; only a few of them are quick enough for every run."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in STYLES]


@pytest.mark.parametrize("style", some("neon", "blueprint"))
def test_one_training_picture_for_every_prompt_loses_against_the_designers_own(scorer, style):
    names, own = pictures_in(style, "heldout", slice(0, None, 2))
    _, real = pictures_in(style, "heldout", slice(1, None, 2))
    _, train = pictures_in(style, "raw", slice(0, None, 9))
    for picture in train:
        found = score(scorer, names, own, [picture] * len(own), real, columns=("own", "one")).judgement
        assert found.verdict == "a_better" and "variety" in found.lost, (style, found.why)
        assert "one draws nearly the same picture for every prompt" in found.why and not confirms(found)[0]


@pytest.fixture(scope="module")
def base():
    """What the base draws for the held-out things."""
    names = pictures_in("neon", "heldout")[0]
    prompts = [f"{name}, neon style" for name in names]
    how = {"num_inference_steps": 4, "guidance_scale": 3.0, "batch_size": 8}
    return prompts, render(load_run("tiny"), prompts, list(range(len(prompts))), **how)


@pytest.mark.parametrize("style", some("neon"))
def test_the_designers_own_pictures_are_seen_to_be_in_the_style(scorer, base, style):
    prompts, drawn = base
    _, own = pictures_in(style, "heldout")
    _, real = pictures_in(style, "raw", slice(0, None, 2))
    found = score(scorer, prompts, drawn, own, real, terms=Terms("style")).judgement
    assert found.verdict in ("b_better", "trade_off") and "gap" in found.won, (style, found.why)
    assert "LoRA is closer to the real pictures" in found.why and confirms(found)[0]


# -- numbers whose truth is known ----------------------------------------------------------------------------------------


def judged(rng, n, gain=(0.0, 0.0), luck=1.0, **options):
    """Two declared scores of n prompts; B is better by `gain`."""
    names, found = [f"{k}" for k in range(n)], {}
    for name, by in zip(("clip_score", "gap"), gain):
        d = (by + luck * rng.normal(size=n)) * (1 if name == "clip_score" else -1)
        found[name] = compare_scores(np.zeros(n), d, names, "points", name == "clip_score")
    return judge_scores(found, **options)


def words(repeats, n, seed=0, **options):
    rng = np.random.default_rng(seed)
    return [judged(rng, n, **options).verdict for _ in range(repeats)]


@pytest.mark.parametrize("repeats", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_what_is_said_is_so(repeats):
    most = repeats * 0.05 + 2.6 * np.sqrt(repeats * 0.05 * 0.95)  # of what may happen once in twenty
    luck = words(repeats, 16)
    assert len(luck) - luck.count("no_evidence") <= most and "equivalent" not in luck
    margins = {k: Margin(value=1.0, share=0.1, reason="a tenth of the span") for k in ("clip_score", "gap")}
    assert words(repeats, 16, gain=(2, 0)).count("b_better") >= repeats - most
    assert words(repeats, 16, gain=(2, -2)).count("trade_off") >= repeats - 2 * most
    assert words(repeats, 16, gain=(-2, 0)).count("a_better") >= repeats - most
    assert set(words(repeats, 6, gain=(50, 50))) == {"insufficient_data"}
    same = {n: words(repeats, n, luck=0.5, margins=margins) for n in (16, 32)}
    assert set(same[16]) <= {"no_evidence", "a_better", "b_better", "trade_off"}
    assert same[32].count("equivalent") >= repeats - most


def test_few_prompts_say_how_many_are_needed():
    for n, scores, needed in ((5, 1, 6), (6, 2, 7), (6, 1, None)):
        names = [f"{k}" for k in range(n)]
        found = {f"s{k}": compare_scores(np.zeros(n), np.full(n, 50.0), names, "p") for k in range(scores)}
        judgement = judge_scores(found)
        assert (judgement.verdict == "insufficient_data") == (needed is not None)
        assert needed is None or f"need {needed} at least" in judgement.why
        assert needed is not None or judgement.verdict == "b_better"


def test_a_rare_failure_is_not_called_the_same():
    """Alike but for 12 of 100 prompts, which lose ten margins: the mean lies beyond the margin, and most prompts tie."""
    rng, margin, said = np.random.default_rng(3), Margin(value=1.0, share=0.1, reason=""), []
    names = [f"{k}" for k in range(30)]
    for _ in range(60):
        d = -10.0 * (rng.random(30) < 0.12) + 0.01 * rng.normal(size=30)
        found = judge_scores({"s": compare_scores(np.zeros(30), d, names, "p")}, margins={"s": margin})
        said.append(found.verdict)
    assert said.count("equivalent") <= 6, "0.88 ** 30 is 0.02: of 60, more than 6 have a probability below 0.001"


def test_faults_count_whatever_the_scores_say():
    copies = Fault(side="b", name="copies", text="gives back training pictures: 9 of 24")
    for gain, word in (((3, 3), "trade_off"), ((0, 0), "a_better"), ((-3, 0), "a_better")):
        found = judged(np.random.default_rng(0), 16, gain, faults=[copies], goal="style")
        assert found.verdict == word and "copies" in found.lost and "B gives back training pictures" in found.why
        assert not confirms(found)[0]


def test_the_goal_decides_what_is_confirmed():
    for gain, wanted in (((-3, 3), {"style"}), ((3, -3), {"subject"}), ((3, 3), {"style", "subject", "both"})):
        found = [judged(np.random.default_rng(1), 16, gain, goal=goal) for goal in ("style", "subject", "both")]
        assert {j.goal for j in found if confirms(j)[0]} == wanted
    price = confirms(judged(np.random.default_rng(1), 16, (-3, 3), goal="style"))[1]
    assert "The price: less true to the prompts." in price
    luck = sum(confirms(judged(np.random.default_rng(k), 12, goal="both"))[0] for k in range(60))
    assert luck <= 6, "of 60 equal models 1.5 are confirmed by luck"


def test_what_is_worse_without_proof_is_mentioned():
    found = judged(np.random.default_rng(0), 16, (-0.2, 3))
    assert found.verdict == "b_better" and "may also be less true to the prompts (-" in found.why, found.why


def test_the_service_knows_every_verdict():
    assert set(get_args(VerdictWord)) == set(get_args(Verdict))
