"""Batches, steps and epochs: the order of the data, and one arithmetic that the report, the doctor and training share."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.data.report import report_html
from lora_mvp.data.steps import Plan, count_steps, plan_arithmetic
from lora_mvp.train.diagnosis import base_multiple, doctor
from lora_mvp.train.loop import Trainer

# ---- order


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from([(8, 8), (6, 10), (10, 6), (4, 16)]), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.integers(0, 50),
)
def test_every_picture_once_per_epoch(shapes, batch_size, seed, epoch):
    plan = Plan(shapes, batch_size, seed)
    n = plan.batches_per_epoch
    batches = [plan.batch(i) for i in range(epoch * n, (epoch + 1) * n)]
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    assert all(len({shapes[i] for i in batch}) == 1 for batch in batches)
    sizes = Counter((shapes[batch[0]], len(batch)) for batch in batches)
    for shape, count in Counter(shapes).items():  # full batches and at most one smaller
        assert sizes[shape, batch_size] == count // batch_size
        assert count % batch_size == 0 or sizes[shape, count % batch_size] == 1
    assert {plan.epoch_of(i) for i in range(epoch * n, (epoch + 1) * n)} == {epoch}
    k = epoch * n + seed % n
    assert Plan(shapes, batch_size, seed).batch(k) == batches[k - epoch * n]  # from anywhere, without state


def test_order_differs_between_epochs_and_seeds():
    plan, other = Plan([(8, 8)] * 20, 3, 1), Plan([(8, 8)] * 20, 3, 2)
    orders = {str([p.batch(7 * e + k) for k in range(7)]) for p in (plan, other) for e in range(10)}
    assert len(orders) == 20
    first = Counter(plan.batch(7 * e)[0] for e in range(400))
    assert len(first) == 20 and max(first.values()) < 50  # no picture is always first
    assert {len(plan.batch(7 * e)) for e in range(60)} == {2, 3}  # nor is the smaller batch always last


def test_arithmetic():
    plan = Plan([(8, 8)] * 5 + [(6, 10)] * 4, 2, 42)
    numbers = plan_arithmetic(plan, accumulation=2, processes=1, steps=10)
    assert (numbers.batches_per_epoch, numbers.smaller_batches, numbers.steps_per_epoch) == (5, 1, 2.5)
    assert numbers.epochs == 4 and "9 images in 2 buckets, 2 per batch: 5 batches an epoch" in str(numbers)
    with pytest.raises(LoraMvpError, match="9 images // 10 per batch = 0") as e:
        plan_arithmetic(Plan(plan.shapes, 10, 42), 1, 1, 10)
    assert e.value.code == "batch_larger_than_data"
    plan_arithmetic(Plan(plan.shapes, 9, 42), 1, 1, 10)  # more than any bucket has, but not more than there are
    with pytest.raises(LoraMvpError, match="there are no pictures"):
        Plan([], 1, 42)


def test_example_of_the_golden_order():
    "The order is a promise: a checkpoint of one version goes on in the next with the same data."
    assert [Plan([(8, 8)] * 5, 2, 42).batch(i) for i in range(3)] == [[0], [4, 3], [1, 2]]


# ---- one arithmetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of sixteen sizes, none of them square, all with a side below the resolution."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "raw" / "cat").mkdir(parents=True)
    for k in range(16):
        size = (72 + 4 * k, 40 + k % 8)
        picture = Image.effect_noise(size if k % 2 else size[::-1], 60).convert("RGB")
        picture.save(folder / "raw" / "cat" / f"{k}.png")
    return folder


def run_of(folder, buckets):
    places = {"data.raw_data_dir": folder / "raw", "data.processed_dir": folder / "out"}
    keys = {name: str(path) for name, path in places.items()} | {"data.train_ratio": 0.99, "data.min_resolution": 16}
    keys |= {"data.near_duplicate_bits": None, "data.image_size": 64, "data.max_aspect": 4.0}
    keys |= {"training.pretrained_model": "tiny", "training.resolution": 64, "training.aspect_buckets": buckets}
    keys |= {"training.batch_size": 4, "training.gradient_accumulation": 2, "training.max_train_steps": 50}
    keys |= {"training.lr_warmup_steps": 5, "training.output_dir": str(folder / "run")}
    return load_config(overrides=keys)


@pytest.mark.parametrize("buckets", [False, True])
def test_report_doctor_and_training_count_alike(folder, buckets):
    config = run_of(folder, buckets)
    manifest = prepare_data(config, copy=False)  # the pictures keep their shapes
    t, rows = config.training, manifest.rows("train")
    sums = count_steps(rows, t, base_multiple(t))
    assert len({(row.width, row.height) for row in rows}) == len(rows)  # counted by their sizes, each would be a batch
    assert sums.batches_per_epoch < len(rows)

    page = report_html(manifest, folder / "raw", t, base_multiple(t))
    assert f"{sums.batches_per_epoch} batches / 2" in page
    unknown = report_html(manifest, folder / "raw", t)  # which base it will be is not said
    assert ("depends on the base" in unknown) is buckets and (" batches / 2" in unknown) is not buckets
    said = [finding.text for finding in doctor(config, folder / "out", device="cpu", memory=64e9)]
    assert f"{sums}." in said
    trainer = Trainer(config, manifest)
    assert trainer.data.streams[0].plan.batches_per_epoch == sums.batches_per_epoch
    epochs = [trainer.step().epoch for _ in range(2)]
    assert epochs == [round(n * 2 / sums.batches_per_epoch, 4) for n in (1, 2)]

    enlarged = [text for text in said if "enlarged" in text]  # as squares all of them, in their buckets none
    assert bool(enlarged) is not buckets


def test_the_arithmetic_needs_no_torch():
    code = "import sys, lora_mvp.data.steps; assert not {'torch', 'diffusers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
