"Metrics: other implementations, closed forms, and simulations in which the truth is known."

import numpy as np
import pytest
import torch

from lora_mvp.eval.metrics import (
    alignment,
    diversity,
    frechet_distance,
    frechet_halves,
    gap_values,
    mmd2_interval,
    mmd2_unbiased,
    nearest,
    similarity,
    unit_rows,
)
from lora_mvp.stats import paired_test


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
    found = []
    for _ in range(200):
        rows = rng.permutation(400)
        found.append(mmd2_unbiased(population[rows[:20]], population[rows[20:50]], 3.0))
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)


def test_intervals_of_distances_hold_the_truth(rng):
    truth = mmd2_unbiased(rng.normal(size=(2500, 8)), rng.normal(size=(2500, 8)) + 0.4, 3.0)
    found = [mmd2_interval(rng.normal(size=(20, 8)), rng.normal(size=(40, 8)) + 0.4, 3.0, 300, k) for k in range(200)]
    assert 0.88 <= np.mean([e.low <= truth <= e.high for e in found]) <= 1
    assert np.mean([e.low > truth for e in found]) < 0.06  # the ordinary bootstrap has 0.13 here and more


def test_few_pictures_have_no_interval_of_their_distance(rng):
    x, y = rng.normal(size=(5, 8)), rng.normal(size=(30, 8))
    for few in (x, x[:2]):
        for e in (mmd2_interval(few, y), mmd2_interval(y, few)):
            assert np.isfinite(e.value) and np.isnan([e.low, e.high]).all()
    e = mmd2_interval(y[:6], y[6:])
    assert e.low < e.value < e.high


def test_real_pictures_lie_as_far_from_each_other_as_a_perfect_model_from_them(rng):
    real, perfect, worse = (rng.normal(size=(n, 48)) + s for n, s in ((24, 0.0), (60, 0.0), (60, 0.6)))
    alike = frechet_halves(real)
    assert frechet_halves(real, perfect) == pytest.approx(alike, rel=0.1)
    assert frechet_halves(real, worse) > 1.15 * alike
    assert np.isnan(frechet_halves(real[:3])) and np.isnan(frechet_halves(real, perfect[:1]))
    assert frechet_halves(real, perfect) == frechet_halves(real, perfect)


# -- the gap: a distance with a value for each prompt -------------------------------------------------------------------


def test_gap_values_by_hand_and_by_the_jackknife(rng):
    real, drawn, prompts = rng.normal(size=(9, 5)) + 1, rng.normal(size=(13, 5)), list("aaabbccccdeef")
    x, y = unit_rows(drawn), unit_rows(real)
    means = np.array([x[[p == name for p in prompts]].mean(0) for name in "abcdef"])

    def gap(m):
        own = [m[i] @ m[j] for i in range(len(m)) for j in range(len(m)) if i != j]
        theirs = [y[i] @ y[j] for i in range(9) for j in range(9) if i != j]
        return 100 * (np.mean(own) + np.mean(theirs) - 2 * (m @ y.T).mean())

    values = gap_values(drawn, real, prompts)
    assert values.mean() == pytest.approx(gap(means))
    pseudo = [6 * gap(means) - 5 * gap(np.delete(means, k, 0)) for k in range(6)]
    assert np.mean(pseudo) == pytest.approx(values.mean()) and np.corrcoef(pseudo, values)[0, 1] > 0.95
    assert gap_values(7 * drawn, 0.1 * real, prompts) == pytest.approx(values)  # lengths do not count
    with pytest.raises(ValueError, match="two prompts"):
        gap_values(drawn, real, ["a"] * 13)


def test_one_picture_for_all_prompts_does_not_win_the_gap(rng):
    style = 2 * np.eye(16)[0]
    real, perfect = rng.normal(size=(24, 16)) + style, rng.normal(size=(24, 16)) + style
    collapsed = [gap_values(np.repeat(real[k : k + 1], 24, 0), real).mean() for k in range(24)]
    assert abs(gap_values(perfect, real).mean()) < 15 < min(collapsed)


@pytest.mark.parametrize("n, seeds, n_real", [(8, 1, 8), (12, 4, 24), (24, 1, 8)])
def test_the_paired_test_of_gaps_keeps_its_level_and_its_interval_holds(rng, n, seeds, n_real):
    style, found, names = np.array([1.5, 1.0, 1.0] + [0.0] * 13), [], np.repeat(np.arange(n), seeds).tolist()

    def look(subjects, shift, k=seeds):
        return (subjects[:, None] + shift * style + 0.6 * rng.normal(size=(len(subjects), k, 16))).reshape(-1, 16)

    centres = [unit_rows(look(rng.normal(size=(20_000, 16)), s, 1)).mean(0) for s in (0.2, 0.6)]
    for _ in range(200):
        real, subjects = look(rng.normal(size=(n_real, 16)), 1.0, 1), rng.normal(size=(n, 16))
        first, again, closer = (gap_values(look(subjects, s), real, names) for s in (0.2, 0.2, 0.6))
        mean = unit_rows(real).mean(0)
        truth = np.subtract(*[100 * (c @ c - 2 * c @ mean) for c in centres[::-1]])
        d = paired_test(first, closer)
        found.append((paired_test(first, again).p < 0.05, d.low <= truth <= d.high))
    level, held = np.mean(found, axis=0)
    assert level <= 0.09 and held >= 0.89


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
