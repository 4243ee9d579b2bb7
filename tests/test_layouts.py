"""Folders of other programs: every caption, mask, label, repeat and split that a person wrote is used or named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.handover import export_data
from lora_mvp.data.manifest import read_manifest
from lora_mvp.data.prepare import prepare_data
from lora_mvp.data.steps import count_steps
from lora_mvp.data.tables import summary


def pictures(root: Path, *names: str) -> Path:
    """A folder of pictures that do not look alike."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 64), Image.Resampling.NEAREST).save(root / name)
    return root


def drawn_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8([[0] * 40 + [255] * 40] * 64)).save(path)


def prepare(raw: Path, **data):
    """The manifest of a folder, and what the screen says."""
    keys = {"raw_data_dir": raw, "processed_dir": raw.with_name("out"), "image_size": 64, "min_resolution": 32} | data
    manifest = prepare_data(load_config(overrides={f"data.{key}": value for key, value in keys.items()}))
    return manifest, summary(manifest)


def rows_of(manifest, *fields: str) -> dict:
    return {row.source: tuple(getattr(row, field) for field in fields) for row in manifest.images}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "labels.tsv", "anything.json"])
def test_a_list_beside_the_pictures_is_read(tmp_path, name):
    raw = pictures(tmp_path / "raw", "train/a.png", "train/b.png", "train/c.png", "validation/d.png")
    rows = [("a.png", "a red, \u201cquoted\u201d thing"), ("b.png", "two caf\u00e9s"), ("gone.png", "nobody")]
    if name.endswith("jsonl"):
        text = "\n".join(json.dumps({"file_name": file, "text": words, "label": "thing"}) for file, words in rows)
    elif name.endswith("json"):
        text = json.dumps({file: {"caption": words, "tags": "x"} for file, words in rows})
    else:
        mark = "," if name.endswith("csv") else "\t"
        text = f"file_name{mark}text\n" + "".join(f'{file}{mark}"{words}"\n' for file, words in rows)
    (raw / "train" / name).write_text(text, encoding="utf-8")
    manifest, screen = prepare(raw)
    found = rows_of(manifest, "caption", "caption_source", "split")
    assert found["train/a.png"] == (rows[0][1], "list", "train") and found["train/b.png"] == (
        rows[1][1],
        "list",
        "train",
    )
    assert found["validation/d.png"][2] == "val" and found["train/c.png"][1] == "template"
    assert f"train/{name}: read, captions or labels of 2 pictures, none of 1 other beside it" in screen
    assert "gone.png" in screen and "split by folders: 3 to train on, 1 to validate with" in screen


def test_a_folder_of_kohya(tmp_path):
    dogs, cats = (f"img/10_sks dog/{name}.png" for name in "abc"), (f"img/3_cat/{name}.jpg" for name in "def")
    raw = pictures(tmp_path / "raw", *dogs, *cats, "reg/1_dog/e.png")
    (raw / "img/10_sks dog/a.npz").write_bytes(b"cache")
    (raw / "img/10_sks dog/a.txt").write_text("sks dog, asleep")
    (raw / "meta_clean.json").write_text(json.dumps({"/home/me/img/3_cat/d": {"caption": "a cat", "tags": "cat"}}))
    manifest, screen = prepare(raw)
    found, train = rows_of(manifest, "label", "caption"), manifest.rows("train")
    assert found["img/10_sks dog/a.png"] == ("sks dog", "sks dog, asleep") and found["img/3_cat/d.jpg"] == (
        "cat",
        "a cat",
    )
    assert {(row.label, row.repeats) for row in train} == {("sks dog", 10), ("cat", 3)} and len(found) == 6
    assert "10_sks dog is sks dog, 10 times, 3_cat is cat, 3 times" in screen
    reg = (raw / "reg").as_posix()
    assert f"1 regularisation picture left aside; training.regularization_dir={reg} uses them" in screen
    shown = sum(row.repeats for row in train)
    assert "1 .npz" in screen and f"an epoch shows {shown} images instead of {len(train)}" in screen
    steps = count_steps(train, load_config(overrides=["training.max_train_steps=13"]).training)
    assert steps.shown == steps.batches_per_epoch == shown and f"({shown} with repeats)" in str(steps)


def test_repeats_by_label_and_balance(tmp_path):
    raw = pictures(tmp_path / "raw", "1_cat/a.png", *(f"dog/{k}.png" for k in range(6)))

    def repeats(**data):
        return {row.label: row.repeats for row in prepare(raw, **data)[0].rows("train")}

    dogs = sum(row.label == "dog" for row in prepare(raw)[0].rows("train"))
    assert repeats(balance=True) == {"cat": dogs, "dog": 1}
    assert repeats(repeats={"dog": 3}) == {"cat": 1, "dog": 3}
    with pytest.raises(LoraMvpError, match="'dogs', which no training picture has; there are cat, dog"):
        prepare(raw, repeats={"dogs": 3})


def test_the_dataset_file_of_kohya(tmp_path):
    raw = pictures(tmp_path / "raw", "dogs/a.png", "dogs/b.png", "faces/c.png")
    (raw / "dataset.toml").write_text("""
[general]
shuffle_caption = true
[[datasets]]
resolution = 768
  [[datasets.subsets]]
  image_dir = 'C:\\train\\dogs'
  num_repeats = 7
  class_tokens = 'sks dog'
  [[datasets.subsets]]
  image_dir = '/train/faces'
  is_reg = true
""")
    manifest, screen = prepare(raw)
    assert {(row.caption, row.repeats) for row in manifest.rows("train")} == {("sks dog", 7)}
    assert {row.label for row in manifest.images} == {"dogs"}
    assert "1 regularisation picture left aside" in screen
    assert "resolution = 768 (training.resolution), shuffle_caption = true (training.shuffle_tags)" in screen


def test_masks_follow_their_pictures(tmp_path):
    raw = pictures(tmp_path / "raw", "cat/a.png", "cat/b.jpg", "cat/c.png")
    half = np.uint8([[0] * 40 + [255] * 40] * 64)
    Image.fromarray(half).save(raw / "cat/a-masklabel.png")
    (raw / "cat/masks").mkdir()
    Image.fromarray(half).resize((160, 128), Image.Resampling.NEAREST).save(raw / "cat/masks/b.png")
    Image.fromarray(half).save(raw / "cat/masks/lost.png")
    Image.fromarray(half.T).save(raw / "cat/c_mask.png")
    manifest, screen = prepare(raw)
    found = rows_of(manifest, "mask")
    assert len(found) == 3 and found["cat/c.png"] == ("",)
    for name in ("cat/a.png", "cat/b.jpg"):
        with Image.open(manifest.folder / found[name][0]) as mask:
            assert mask.mode == "L" and mask.size == (64, 64)
            assert (
                np.asarray(mask)[:, :31].max() == 0 and np.asarray(mask)[:, 33:].min() == 255
            )  # cut as the picture was
    assert "c_mask.png: it is 64 x 80, the picture 80 x 64: not the same shape" in str(manifest.images)
    assert "mask_file (1)" in screen and "1 mask without a picture: lost.png" in screen
    assert "2 masks of pictures; training.masked_loss=0.1 uses them" in screen  # and not the third
    assert read_manifest(manifest.folder / "manifest.json").images == manifest.images
    (raw / "cat/a-masklabel.png").unlink()
    again, _ = prepare(raw)
    assert rows_of(again, "mask")["cat/a.png"] == ("",) and not (manifest.folder / found["cat/a.png"][0]).exists()


def test_words_of_every_program_and_every_encoding(tmp_path):
    names = {
        "a.caption": b"one",
        "b.png.txt": b"two\n\nthree\n",
        "c.json": b'{"caption": "four", "width": 3}',
        "d.txt": "猫がソファで寝ている".encode("cp932"),
        "e.txt": "un garçon à côté".encode("cp1252"),
        "f.txt": "北京".encode("gb18030"),  # too short to tell
        "g.txt": "wide".encode("utf-16"),
    }
    raw = pictures(tmp_path / "raw", *(f"cat/{name[0]}.png" for name in names))
    for name, data in names.items():
        (raw / "cat" / name).write_bytes(data)
    manifest, screen = prepare(raw)
    found = [rows_of(manifest, "caption")[f"cat/{name[0]}.png"][0] for name in names]
    assert found == ["one", "two", "four", "猫がソファで寝ている", "un garçon à côté", "A photo of cat", "wide"]
    assert rows_of(manifest, "other_captions")["cat/b.png"] == (["three"],)
    said = {row.source[4]: row.reasons[-1].detail for row in manifest.images if row.reasons}
    assert "read as cp932" in said["d"] and "read as cp1252" in said["e"] and "too short to tell" in said["f"]
    assert "caption_file (4)" in screen and "1 image has several" in screen


@pytest.mark.parametrize("to", ["hf", "kohya"])
def test_what_export_writes_is_read_back(tmp_path, to):
    raw = pictures(tmp_path / "raw", *(f"{label}/{k}.png" for label in ("cat", "con") for k in range(5)))
    (raw / "cat/0.txt").write_text("Mia, asleep\nMia")
    (raw / "repeats").mkdir()
    first, _ = prepare(raw, repeats={"con": 4})  # a label that Windows cannot call a folder
    export_data(first, to, tmp_path / "exported" / "raw")
    second, screen = prepare(tmp_path / "exported" / "raw")

    def stored(manifest):
        names = ("sha256", "label", "caption", "other_captions", "split", "repeats")
        return sorted(tuple(getattr(row, name) for name in names) for row in manifest.images)

    assert stored(first) == stored(second)
    assert "in no label folder" not in screen
    assert "split by folders: 8 to train on, 2 to validate with" in screen


def test_pictures_without_folders_are_one_label(tmp_path):
    raw = pictures(tmp_path / "my cat", "a.png", "b.png")
    (raw / "a.txt").write_text("Mia")
    (raw / "clip.mov").write_bytes(b"film")
    manifest, screen = prepare(raw)
    assert {row.label for row in manifest.images} == {
        "my cat"
    } and "the label is the name of the whole folder, 'my cat'" in screen
    assert "1 .mov" in screen


def test_the_trigger_word_that_nobody_reads_is_named(tmp_path):
    raw = pictures(tmp_path / "raw", *(f"cat/{k}.png" for k in range(4)))
    (raw / "cat/0.txt").write_text("mia on grass")
    (raw / "cat/1.txt").write_text("sks cat on grass")
    for k in (2, 3):
        (raw / f"cat/{k}.txt").write_text("a cat")
    _, screen = prepare(raw, trigger="sks", train_ratio=0.99)
    assert "the trigger word 'sks' is not in 2 of 3 captions to learn" in screen and "data.trigger_in" in screen
    manifest, screen = prepare(raw, trigger="sks", train_ratio=0.99, trigger_in="captions")
    assert all("sks" in row.caption for row in manifest.images) and "trigger" not in screen


def test_tables_that_are_not_read_are_named(tmp_path):
    raw = pictures(tmp_path / "raw", "cat/a.png", "cat/b.png")
    (raw / "captions.parquet").write_bytes(b"PAR1")
    (raw / "prompts.txt").write_text("a cat")
    (raw / "cat" / "other.csv").write_text("file_name,text\nc.png,a dog\n")
    _, screen = prepare(raw)
    assert "captions.parquet" in screen and "prompts.txt" in screen
    assert "cat/other.csv: not used: it has captions, but names no picture that is here (c.png)" in screen


def test_masks_captions_and_repeats_reach_the_training(tmp_path, small_run):
    from lora_mvp.train.loop import Trainer
    from lora_mvp.train.network import answer_losses

    raw = pictures(tmp_path / "raw", *(f"5_cat/{name}.png" for name in "abcde"))
    for name in "abcd":
        Image.fromarray(np.uint8([[0] * 40 + [255] * 40] * 64)).save(raw / f"5_cat/{name}-masklabel.png")
        (raw / f"5_cat/{name}.txt").write_text("one\ntwo")
    manifest, _ = prepare(raw)
    settings = small_run(tmp_path / "lora", masked_loss=0.25, batch_size=4)
    trainer = Trainer(load_config(overrides=settings), manifest)
    stream = trainer.data.streams[0]
    assert len(stream.plan.shown) == 5 * len(manifest.rows("train"))
    batch = stream.images.draw(stream.plan.batch(0), 1, 0, 0, trainer.config.training)
    assert batch.masks.shape == (4, 1, 16, 16) and set(batch.masks.unique().tolist()) <= {0.25, 1.0}
    assert {"one", "two"} <= set(trainer.data.texts.rows)
    error = answer_losses(trainer.network, trainer.learner.question(0, 0, 0))
    stream.images.least = None
    assert error.isfinite().all() and not error.equal(answer_losses(trainer.network, trainer.learner.question(0, 0, 0)))


def test_a_lone_train_folder_and_masks_in_a_tree_of_their_own(tmp_path):
    raw = pictures(tmp_path / "raw", *(f"train/cat/{k}.png" for k in range(5)))
    drawn_mask(raw / "train/masks/cat/0.png")
    (raw / "train" / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "text": "Mia"}\n')
    manifest, screen = prepare(raw)
    assert {row.label for row in manifest.images} == {"cat"} and len(manifest.images) == 5
    assert {row.split for row in manifest.images} == {"train", "val"} and "split by folders" not in screen
    assert [row.source for row in manifest.images if row.mask] == ["train/cat/0.png"]


ODD = [  # a file, what is in it, the captions of a.png, what the screen says of the file
    ("m.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "te\n', "one", "1 row that cannot"),
    ("m.csv", "file_name;Text;text\na.png;x;one, two\n", "one, two", "labels of 1 picture"),
    ("m.csv", "file_name,text\na.png,one, two\nb.png,\n", "one, two", "1 picture without a caption"),
    ("m.csv", "file_name,text,label\na.png,one, two,cat\nb.png,x,\n", None, "1 row that cannot"),
    ("m.jsonl", '{"filename": "a.png", "captions": ["one"]}', "one", "labels of 1 picture"),
    ("m.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}', "one|two", "of 1"),
    ("m.csv", "file_name,Beschreibung\na.png,one\n", None, "without a caption; its columns are file_name, Besch"),
    ("m.json", '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}', None, "unread_list"),
    ("captions.txt", "a.png|one\n", None, "unread_list"),
    ("a.tags", "one", None, "unread_text"),
    ("a.TXT", "one", "one", ""),
    ("a.txt", "one\0two", None, "a.txt cannot be read"),
    ("config.json", '{"LoRA_type": "Standard", "epoch": 1}', None, ""),
]


def test_words_in_odd_places_are_used_or_named(tmp_path):
    raw = pictures(tmp_path / "raw", *(f"k{k}/{name}.png" for k in range(len(ODD)) for name in "ab"))
    for k, (name, text, *_) in enumerate(ODD):
        (raw / f"k{k}" / name).write_bytes(text.encode())
    manifest, screen = prepare(raw)
    rows = {row.source: "|".join([row.caption, *row.other_captions]) for row in manifest.images}
    for k, (name, _, captions, said) in enumerate(ODD):
        assert rows[f"k{k}/a.png"] == (captions or f"A photo of k{k}"), name
        place = f"k{k}/{name if 'cannot be read' not in said else 'a.png'}"
        lines = [line for line in screen.splitlines() if place in line]
        assert any(said in line for line in lines) if said else not lines, (name, lines)
    assert "1 .json" in screen and "LoRA_type" not in screen


def test_lists_that_disagree_are_named(tmp_path):
    raw = pictures(tmp_path / "raw", "a.png", "b.png")
    (raw / "1.csv").write_text("file_name,text\na.png,one\nb.png,same\n")
    (raw / "2.csv").write_text("file_name,text\na.png,two\nb.png,same\n")
    manifest, screen = prepare(raw)
    assert rows_of(manifest, "caption") == {"a.png": ("one",), "b.png": ("same",)}
    assert "2.csv: read, captions or labels of 2 pictures; 1 caption not used, another list has others" in screen


def test_a_picture_without_ending_is_one_of_its_folder(tmp_path):
    raw = pictures(tmp_path / "raw", "3_cat/a.png", "3_cat/b.png")
    (raw / "3_cat/b.png").rename(raw / "3_cat/b")
    (raw / "3_cat/b.txt").write_text("Mia")
    manifest, screen = prepare(raw, train_ratio=0.99)
    assert rows_of(manifest, "label", "caption")["3_cat/b"] == ("cat", "Mia") and "lone_caption" not in screen


def test_masks_of_other_names_are_no_photographs(tmp_path):
    names = ("cat/a", "cat/b", "cat/c", "cat/d", "hat/e", "hat/f", "hat/g", "masks/e")
    raw = pictures(tmp_path / "raw", *(f"{name}.png" for name in names), "cat/d-condlabel.png")
    masks = {
        "cat/a": "cat/a.mask.png",
        "cat/b": "cat/mask_b.png",
        "cat/c": "cat_masks/c.png",
        "hat/f": "mask/hat/f.png",
    }
    for mask in masks.values():
        drawn_mask(raw / mask)
    Image.new("RGB", (80, 64), "red").save(raw / "cat/d_mask.png")
    Image.new("L", (80, 64), 1).save(raw / "hat/g-masklabel.png")
    manifest, screen = prepare(raw)
    found = rows_of(manifest, "mask")
    assert {name[:-4] for name, (mask,) in found.items() if mask} == set(masks)
    assert set(found) == {f"{name}.png" for name in names}  # photographs of masks are a label
    assert "d_mask.png: it is in colours" in screen and "g-masklabel.png: its brightest pixel is 1 of 255" in screen
    assert "1 picture that other programs condition on, not learnt: cat/d-condlabel.png" in screen


def test_the_advice_for_regularisation_pictures_can_be_followed(tmp_path):
    from lora_mvp.train.pictures import regularization_sources

    raw = pictures(tmp_path / "raw", "cat/a.png", "reg/1_big cat/b.png")
    _, screen = prepare(raw)
    assert f"training.regularization_dir={raw / 'reg'} uses them\n" in screen
    assert [source.caption for source in regularization_sources(raw / "reg", None)] == ["big cat"]
    pictures(raw, "dog_reg/c.png")
    _, screen = prepare(raw)
    assert "uses the pictures of one folder" in screen


def test_a_label_of_a_list_is_a_label_without_a_folder(tmp_path):
    raw = pictures(tmp_path / "raw", "cat/a.png", "b.png", "c.png")
    (raw / "m.csv").write_text("file_name,text,label\nb.png,Rex,dog\n")
    manifest, screen = prepare(raw)
    assert rows_of(manifest, "label") == {"b.png": ("dog",), "cat/a.png": ("cat",)}
    assert [record.reason for record in manifest.rejected] == ["no_label"] and "in no label folder" not in screen
