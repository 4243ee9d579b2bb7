"Metrics: other implementations, closed forms, and simulations in which the truth is known."

import numpy as np
import pytest
import torch

from lora_mvp.eval.metrics import (
    alignment,
    cubic_kernel,
    diversity,
    frechet_distance,
    kid,
    kid_interval,
    mmd2_interval,
    mmd2_unbiased,
    nearest,
    permutation_p,
    similarity,
    unit_rows,
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
