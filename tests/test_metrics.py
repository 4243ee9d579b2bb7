"Metrics: other implementations, closed forms, and simulations in which the truth is known."

import numpy as np
import pytest
import torch
from scipy import stats

from lora_mvp.eval.metrics import (
    alignment,
    cubic_kernel,
    detectable_effect,
    diversity,
    frechet_distance,
    holm,
    kid,
    kid_interval,
    mean_interval,
    mmd2_interval,
    mmd2_unbiased,
    nearest,
    paired_test,
    permutation_p,
    similarity,
    unit_rows,
    wilcoxon_p,
    wilson,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- distances between sets, against others ---------------------------------------------------------------------------


class Rows(torch.nn.Module):
    "torchmetrics leaves its extractor in train mode and casts it as it likes; this one has nothing to lose."

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, images):
        return images.flatten(1).float()


@pytest.mark.parametrize("n, m, d", [(20, 30, 64), (300, 400, 16), (12, 500, 48)])
def test_frechet_agrees_with_torchmetrics(n, m, d):
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(n)
    mix = rng.normal(size=(d, d)) / d**0.5
    x, y = np.abs(rng.normal(size=(n, d)) @ mix), np.abs(rng.normal(size=(m, d)) @ mix) * 1.2 + 0.1
    other = FrechetInceptionDistance(feature=Rows(d).eval())
    other.update(torch.tensor(x).view(n, d, 1, 1), real=True)
    other.update(torch.tensor(y).view(m, d, 1, 1), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(other.compute()), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_agrees_with_torchmetrics(rng):
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = np.abs(rng.normal(size=(40, 24))), np.abs(rng.normal(size=(40, 24))) + 0.2
    other = KernelInceptionDistance(feature=Rows(24).eval(), subsets=1, subset_size=40)  # one subset: all pictures
    other.update(torch.tensor(x).view(40, 24, 1, 1), real=True)
    other.update(torch.tensor(y).view(40, 24, 1, 1), real=False)
    assert kid(x, y) == pytest.approx(float(other.compute()[0]), rel=1e-3)


def test_frechet_of_diagonal_gaussians_by_hand(rng):
    x = rng.normal(size=(50, 6))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(49)  # centred, and its covariance is exactly the identity
    scale, shift = np.arange(1.0, 7.0), np.linspace(-1, 1, 6)
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, 3 * x + 1) == pytest.approx(6 * 1 + 6 * 4, rel=1e-9)  # N(0, I) and N(1, 9 I)


def test_frechet_of_fewer_pictures_than_dimensions_by_hand(rng):
    x = np.zeros((9, 40))
    x[:, :8] = np.linalg.qr(rng.normal(size=(9, 8)) - rng.normal(size=(9, 8)).mean(0))[0]
    x -= x.mean(0)
    cov = x.T @ x / 8
    expected = 40 * 0.25 + np.trace(cov) * (1 - 2.0) ** 2  # y has the covariance 4 S
    assert frechet_distance(x, 2 * x + 0.5) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_the_squared_distance_of_mean_embeddings():
    rng = np.random.default_rng(1)
    x, y = unit_rows(rng.normal(size=(400, 32)) + 0.5), unit_rows(rng.normal(size=(400, 32)))
    chance = x.var(0, ddof=1).sum() / 400 + y.var(0, ddof=1).sum() / 400  # what equal sets would show
    expected = 10 * (((x.mean(0) - y.mean(0)) ** 2).sum() - chance)
    assert 1000 * mmd2_unbiased(x, y) == pytest.approx(expected, rel=0.01)


# -- distances between sets, in simulations ---------------------------------------------------------------------------


def test_u_statistics_of_one_population_average_to_zero(rng):
    population = rng.normal(size=(400, 12)) ** 2
    for distance in (lambda x, y: mmd2_unbiased(x, y, 3.0), kid):
        found = []
        for _ in range(200):
            rows = rng.permutation(400)
            found.append(distance(population[rows[:20]], population[rows[20:50]]))
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)


@pytest.mark.parametrize("distance", ["mmd", "kid"])
def test_intervals_of_distances_hold_the_truth(distance, rng):
    point, interval = {
        "mmd": (lambda x, y: mmd2_unbiased(x, y, 3.0), lambda x, y, seed: mmd2_interval(x, y, 3.0, 300, seed)),
        "kid": (kid, lambda x, y, seed: kid_interval(x, y, 300, seed)),
    }[distance]
    truth = point(rng.normal(size=(2500, 8)), rng.normal(size=(2500, 8)) + 0.4)
    found = [interval(rng.normal(size=(20, 8)), rng.normal(size=(40, 8)) + 0.4, k) for k in range(200)]
    assert 0.88 <= np.mean([e.low <= truth <= e.high for e in found]) <= 1
    assert np.mean([e.low > truth for e in found]) < 0.06  # the ordinary bootstrap has 0.13 here and more


def test_the_permutation_test_keeps_its_level_and_has_power(rng):
    found = np.array(
        [
            [permutation_p(x, y + shift, cubic_kernel, repeats=199, seed=k) for shift in (0, 0.8)]
            for k in range(100)
            for x, y in [(rng.normal(size=(20, 4)), rng.normal(size=(50, 4)))]
        ]
    )
    level, power = (found <= 0.05).mean(0)
    assert level < 0.12 and power > 0.6, (level, power)
    assert found[:, 0].mean() == pytest.approx(0.5, abs=0.1)  # uniform where nothing is to be found


# -- cosines ----------------------------------------------------------------------------------------------------------


def test_cosines_do_not_see_lengths(rng):
    x, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    lengths = rng.uniform(0.1, 50, size=(6, 1))
    np.testing.assert_allclose(similarity(x * lengths, y), similarity(x, y), atol=1e-12)
    np.testing.assert_allclose(alignment(x, y), 100 * similarity(x, y).diagonal(), atol=1e-10)
    np.testing.assert_allclose(diversity(x * lengths, "aabbbc"), diversity(x, "aabbbc"), atol=1e-12)
    assert np.isnan(diversity(x, "aabbbc")).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="one text"):
        alignment(x, y[:2])


def test_diversity_falls_to_zero_when_every_seed_gives_the_same(rng):
    face = rng.normal(size=(1, 32))
    spread = [diversity(face + s * rng.normal(size=(8, 32)), [0] * 8)[0] for s in (3, 1, 0.3, 0)]
    assert spread == sorted(spread, reverse=True) and spread[-1] == pytest.approx(0, abs=1e-12)


def test_a_copy_is_nearest_to_its_original(rng):
    train = rng.normal(size=(200, 64))
    copies = train[[50, 199, 0]] + 0.2 * rng.normal(size=(3, 64))
    index, cosine = nearest(np.concatenate([copies, rng.normal(size=(20, 64))]), train)
    assert index[:3].tolist() == [50, 199, 0]
    assert cosine[:3].min() > 0.9 > cosine[3:].max()


# -- pairs ------------------------------------------------------------------------------------------------------------


def pairs(rng, n, effect, seeds=1, lasting=0.0):
    "Scores as measured in design: 3 between prompts, 1.5 of noise; `lasting`: noise that all seeds of a prompt share."
    prompts = rng.normal(25, 3, (n, 1)) + np.zeros((n, seeds))
    noise = rng.normal(0, 1.5, (2, n, seeds)) + lasting * rng.normal(size=(2, n, 1))
    return (prompts + noise[0]).ravel(), (prompts + effect + noise[1]).ravel(), np.repeat(np.arange(n), seeds).tolist()


@pytest.mark.parametrize("n, low, high", [(16, 0.12, 0.32), (32, 0.33, 0.53), (64, 0.63, 0.83)])
def test_power_and_level_of_the_paired_test(n, low, high):
    rng = np.random.default_rng(n)
    found = np.array([[wilcoxon_p(np.subtract(*pairs(rng, n, effect)[:2])) for effect in (0, 0.7)] for _ in range(300)])
    level, power = (found <= 0.05).mean(0)
    assert low < power < high  # 0.20, 0.43 and 0.73, give or take three standard errors
    assert level <= 0.09


def test_a_test_finds_what_it_says_it_could_have_found(rng):
    a, b, _ = pairs(rng, 4000, 0)
    effect = detectable_effect(b - a) * np.sqrt(4000 / 24)  # for 24 pairs, at the true spread
    found = [paired_test(*pairs(rng, 24, effect)[:2]).wilcoxon_p <= 0.05 for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.78, abs=0.1)


def test_intervals_of_means_hold_the_truth_even_for_few_and_crooked_scores(rng):
    for draw, at_least in ((rng.normal, 0.89), (lambda size: rng.exponential(size=size) - 1, 0.83)):
        for n in (6, 12, 32):  # at six the ordinary bootstrap holds the truth in 0.86 and 0.81 of the cases
            found = [mean_interval(draw(size=n), k, repeats=500) for k in range(300)]
            assert np.mean([e.low <= 0 <= e.high for e in found]) >= at_least


def test_seeds_of_one_prompt_are_no_further_evidence(rng):
    together, apart = [], []
    for k in range(150):
        a, b, prompts = pairs(rng, 10, 0, seeds=6, lasting=3)
        for found, clusters in ((together, prompts), (apart, None)):
            d = paired_test(a, b, clusters, k)
            found.append((d.low <= 0 <= d.high, d.wilcoxon_p <= 0.05, d.n))
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
        negated = (-back.mean, -back.median, -back.high, -back.low, -back.effect_size, back.loss, back.tie, back.win)
        np.testing.assert_array_equal(
            [getattr(there, k) for k in "mean median low high effect_size win tie loss".split()], negated
        )
        same = [(r.wilcoxon_p, r.sign_p, r.min_detectable_effect, r.n) for r in (there, back)]
        np.testing.assert_array_equal(*same)
        assert (itself.mean, itself.median, itself.effect_size, itself.tie) == (0, 0, 0, itself.n)
        assert (itself.wilcoxon_p, itself.sign_p) == (1, 1)
        assert itself.n < 6 or (itself.low, itself.high, itself.min_detectable_effect) == (0, 0, 0)
        assert there == pytest.approx(paired_test(a, b, clusters, trial), nan_ok=True, abs=0)


def test_p_values_of_ties_and_zeros(rng):
    d = np.array([0.0, 1, 1, -2, 3, 3, 4, 0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    ranks = stats.rankdata(np.abs(d)) * (d != 0)
    sums = signs @ ranks
    assert wilcoxon_p(d) == pytest.approx(np.mean(np.abs(sums) >= abs(np.sign(d) @ ranks)))
    long = rng.normal(size=80).round(1)
    assert wilcoxon_p(long) == pytest.approx(stats.wilcoxon(long, zero_method="pratt", method="approx").pvalue)
    for n, least in ((4, 0.125), (5, 0.0625), (6, 0.03125)):
        assert wilcoxon_p(np.arange(1.0, n + 1)) == pytest.approx(least)  # below six nothing can be significant


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
