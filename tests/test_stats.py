"Statistics: closed forms, and simulations in which the truth is known."

import numpy as np
import pytest
from scipy import stats

from lora_mvp.stats import (
    detectable_effect,
    holm,
    mean_interval,
    paired_test,
    pairs_needed,
    sign_flip_p,
    smallest_p,
    unseen_share,
    wilson,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- pairs ------------------------------------------------------------------------------------------------------------


def pairs(rng, n, effect, seeds=1, lasting=0.0):
    "Scores as measured in design: 3 between prompts, 1.5 of noise; `lasting`: noise that all seeds of a prompt share."
    prompts = rng.normal(25, 3, (n, 1)) + np.zeros((n, seeds))
    noise = rng.normal(0, 1.5, (2, n, seeds)) + lasting * rng.normal(size=(2, n, 1))
    return (prompts + noise[0]).ravel(), (prompts + effect + noise[1]).ravel(), np.repeat(np.arange(n), seeds).tolist()


@pytest.mark.parametrize("n, low, high", [(16, 0.12, 0.32), (32, 0.33, 0.53), (64, 0.63, 0.83)])
def test_power_and_level_of_the_paired_test(n, low, high):
    rng = np.random.default_rng(n)
    found = np.array(
        [[sign_flip_p(np.subtract(*pairs(rng, n, effect)[:2])) for effect in (0, 0.7)] for _ in range(300)]
    )
    level, power = (found <= 0.05).mean(0)
    assert low < power < high  # 0.20, 0.43 and 0.73 by Wilcoxon's test, give or take three standard errors
    assert level <= 0.09


@pytest.mark.parametrize("n, scores", [(8, 1), (8, 2), (12, 3), (24, 2)])
def test_a_test_finds_what_it_says_it_could_have_found(rng, n, scores):
    spread = np.resize([-1.0, 1.0], n) * np.sqrt((n - 1) / n)  # of 1
    trials = rng.normal(size=(250, scores, n))
    trials[:, 0] += detectable_effect(spread, 0.05 / scores)
    found = [holm([sign_flip_p(d) for d in trial])[0] < 0.05 for trial in trials]
    assert np.mean(found) == pytest.approx(0.80, abs=0.09)


def heavy(rng, kind, size):
    "Values of mean 0 of a named kind."
    if kind == "exponential":
        return rng.exponential(size=size) - 1
    if kind == "log-normal":
        return np.exp(rng.normal(size=size)) - np.exp(0.5)
    if kind == "catastrophe":  # one in twenty loses 20
        return rng.normal(size=size) + 1 - 20 * (rng.random(size) < 0.05)
    return rng.standard_t(3, size=size) if kind == "t3" else rng.normal(size=size)


@pytest.mark.parametrize(
    "kind, at_least", [("normal", 0.92), ("t3", 0.90), ("exponential", 0.895), ("log-normal", 0.85)]
)
def test_intervals_of_means_hold_the_truth_even_for_few_and_crooked_values(rng, kind, at_least):
    for n in (6, 12, 32):  # Student's interval holds 0.83 of the log-normal ones at six
        found = [mean_interval(row) for row in heavy(rng, kind, (600, n))]
        assert np.mean([e.low <= 0 <= e.high for e in found]) >= at_least


def test_a_rare_catastrophe_is_in_no_interval_of_few_prompts_and_the_share_that_may_be_unseen_says_so(rng):
    found = [mean_interval(row) for row in heavy(rng, "catastrophe", (400, 12))]
    assert np.mean([e.low <= 0 <= e.high for e in found]) < 0.65
    unseen = np.mean([not (rng.random(12) < unseen_share(12)).any() for _ in range(4000)])
    assert unseen == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("kind, at_most", [("normal", 0.08), ("t3", 0.08), ("exponential", 0.09), ("log-normal", 0.12)])
def test_a_mean_of_zero_is_found_no_more_often_than_the_level_says(rng, kind, at_most):
    found = [sign_flip_p(row) <= 0.05 for row in heavy(rng, kind, (400, 24))]
    assert np.mean(found) <= at_most  # by ranks: 0.145 of the exponential and 0.28 of the log-normal ones


def test_p_value_and_interval_agree(rng):
    for n in (12, 24):
        d = rng.exponential(size=(100, n)) - rng.uniform(0.3, 1.7, size=(200, 1))
        for row in d:
            p, e = sign_flip_p(row), mean_interval(row)
            assert 0.01 < p < 0.12 or (e.low <= 0 <= e.high) == (p > 0.05)  # they differ only near the level


def test_seeds_of_one_prompt_are_no_further_evidence(rng):
    together, apart = [], []
    for k in range(150):
        a, b, prompts = pairs(rng, 10, 0, seeds=6, lasting=3)
        for found, clusters in ((together, prompts), (apart, None)):
            d = paired_test(a, b, clusters, k)
            found.append((d.low <= 0 <= d.high, d.p <= 0.05, d.n))
    together, apart = np.mean(together, axis=0), np.mean(apart, axis=0)
    assert (together[2], apart[2]) == (10, 60)
    assert together[0] >= 0.89 and together[1] <= 0.10
    assert apart[0] < 0.75 and apart[1] > 0.25  # what would be claimed without clusters


def test_swapping_negates_and_itself_is_nothing(rng):
    for trial in range(40):
        n = int(rng.integers(1, 60))
        a, b = rng.normal(size=(2, n)).round(int(rng.integers(0, 6)))  # with few digits there are ties and zeros
        clusters = rng.integers(0, 20, n).tolist() if trial % 2 else None
        there, back, itself = (paired_test(*p, clusters, trial) for p in ((a, b), (b, a), (a, a)))
        negated = (-back.mean, -back.median, -back.high, -back.low, back.loss, back.tie, back.win)
        np.testing.assert_array_equal([getattr(there, k) for k in "mean median low high win tie loss".split()], negated)
        same = [(r.p, r.sign_p, r.detectable, r.n) for r in (there, back)]
        np.testing.assert_array_equal(*same)
        assert (itself.mean, itself.median, itself.tie) == (0, 0, itself.n)
        assert (itself.p, itself.sign_p) == (1, 1)
        assert itself.n < 6 or (itself.low, itself.high, itself.detectable) == (0, 0, 0)
        assert there == pytest.approx(paired_test(a, b, clusters, trial), nan_ok=True, abs=0)


def test_the_mean_that_is_reported_is_tested(rng):
    for _ in range(30):
        n = int(rng.integers(1, 60))
        d = (rng.exponential(size=n) - 0.7).round(int(rng.integers(0, 4)))
        found = sign_flip_p(d)
        signs = rng.choice([-1, 1], size=(20_000, n))
        flipped = np.concatenate([d[None], signs * d])
        w = flipped.mean(1) / np.maximum(flipped.std(1), 1e-5 * np.abs(d).max() + 1e-300)
        u = np.maximum(w * stats.skew(flipped, axis=1, nan_policy="omit"), -1.5)
        corrected = np.abs(w * (1 + u / 3 + u**2 / 27))
        by_hand = np.mean(corrected[1:] >= corrected[0] * (1 - 1e-9)) if d.any() and d.std() > 0 else found
        assert found == pytest.approx(by_hand, abs=0.02)
        assert found == sign_flip_p(-d) and (d.sum() != 0 or found == 1)
        assert found >= smallest_p(n)
    won_and_lost = np.array([1.0] * 22 + [-20.0] * 2)  # most prompts better, the mean worse
    assert won_and_lost.mean() < 0 and sign_flip_p(won_and_lost) > 0.2


def test_what_n_pairs_can_show_at_best():
    for tests in (1, 2, 3, 5):
        n = pairs_needed(tests)
        best = sign_flip_p(np.arange(1.0, n + 1))
        assert holm([best] + [1.0] * (tests - 1))[0] < 0.05
        assert tests * smallest_p(n - 1) >= 0.05
        assert np.isnan(detectable_effect(np.arange(1.0, n), 0.05 / tests))
        assert detectable_effect(np.arange(1.0, n + 1), 0.05 / tests) > 0


# -- several scores, and shares ---------------------------------------------------------------------------------------


def test_holm_keeps_the_level_of_a_family(rng):
    p = rng.uniform(size=(4000, 5))
    any_found = np.mean([holm(row).min() <= 0.05 for row in p])
    assert any_found == pytest.approx(0.05, abs=0.012)
    assert holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([]).size == 0
    order = rng.permutation(5)
    assert holm(p[0][order]) == pytest.approx(holm(p[0])[order])


def test_wilson_ends_are_where_the_score_test_rejects():
    for k, n in ((1, 20), (7, 20), (19, 20), (3, 500)):
        e = wilson(k, n)
        for end in (e.low, e.high):
            assert abs(e.value - end) / np.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, rel=1e-5)
    assert (wilson(0, 20).low, wilson(20, 20).high) == (0, 1)
    assert np.isnan(wilson(0, 0)).all()
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)
