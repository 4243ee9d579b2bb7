"Metrics and evaluation: comparisons with other implementations, hostile folders, and what an evaluation leaves behind."

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lora_mvp import eval as evaluation
from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.eval import Metrics, Preprocess, Scorer, evaluate, find_clip, find_real, score, table, to_pixels
from lora_mvp.images import open_rgb
from lora_mvp.infer import LoadedRun
from lora_mvp.metrics import frechet_distance, mmd2_unbiased
from lora_mvp.models import asset


def small_clip(folder, tokenizer=True, **save):
    "A CLIP of random weights whose words are single characters."
    characters = [chr(i) for i in range(33, 127)]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    n = len(words)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": n, "max_position_embeddings": 24, "bos_token_id": n - 2, "eos_token_id": n - 1, **shape}
    vision = {"image_size": 32, "patch_size": 8, **shape}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(folder, **save)
    if tokenizer:
        CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-clip")
    small_clip(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(clip_folder):
    return Scorer(clip_folder, name="small", device="cpu")


def noise_pictures(n, seed, size=(40, 32), bright=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (n, 5, 5, 3)) + bright
    return [Image.fromarray(c.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC) for c in coarse]


# -- metrics against others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, m, d", [(20, 30, 64), (300, 400, 16), (12, 500, 48)])
def test_frechet_agrees_with_torchmetrics(n, m, d):
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(n)
    mix = rng.normal(size=(d, d)) / d**0.5
    x, y = np.abs(rng.normal(size=(n, d)) @ mix), np.abs(rng.normal(size=(m, d)) @ mix) * 1.2 + 0.1

    class Rows(torch.nn.Module):
        num_features = d

        def forward(self, images):
            return images.flatten(1).float()

    other = FrechetInceptionDistance(feature=Rows().eval())
    other.update(torch.tensor(x).view(n, d, 1, 1), real=True)
    other.update(torch.tensor(y).view(m, d, 1, 1), real=False)
    assert frechet_distance(x, y) == pytest.approx(float(other.compute()), rel=1e-3)


def test_frechet_of_diagonal_gaussians_by_hand():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(49)  # centred, and its covariance is exactly the identity
    scale, shift = np.arange(1.0, 7.0), np.linspace(-1, 1, 6)
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(x, x * scale + shift) == pytest.approx(expected, rel=1e-9)


def test_mmd_is_the_squared_distance_of_mean_embeddings():
    from lora_mvp.metrics import unit_rows

    rng = np.random.default_rng(1)
    x, y = unit_rows(rng.normal(size=(400, 32)) + 0.5), unit_rows(rng.normal(size=(400, 32)))
    chance = x.var(0, ddof=1).sum() / 400 + y.var(0, ddof=1).sum() / 400  # what equal sets would show
    expected = 10 * (((x.mean(0) - y.mean(0)) ** 2).sum() - chance)
    assert 1000 * mmd2_unbiased(x, y) == pytest.approx(expected, rel=0.01)


# -- the scorer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (33, 57), (20, 90)])
def test_preprocessing_is_that_of_transformers(size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = module.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    picture = noise_pictures(1, 3, size)[0]
    expected = np.asarray(theirs(picture, return_tensors="np").pixel_values)[0]
    np.testing.assert_allclose(to_pixels(picture, Preprocess(edge=32, size=(32, 32))), expected, atol=1e-5)


def test_scores_are_those_of_the_model(clip_folder, scorer):
    model = CLIPModel.from_pretrained(clip_folder).eval()
    texts, pictures = ["a cat", "two dogs!", "a much longer"], noise_pictures(3, 1)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    pixels = torch.tensor(np.stack([to_pixels(p, scorer.preprocess) for p in pictures]))
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(scorer.similarity(pictures, texts), 100 * logits.diag(), atol=1e-3)


def test_features_do_not_depend_on_the_batch(clip_folder, scorer):
    pictures = noise_pictures(5, 2)
    single = Scorer(clip_folder, device="cpu", batch_size=1)
    np.testing.assert_allclose(single.image_features(pictures), scorer.image_features(pictures), atol=1e-5)
    assert scorer.image_features(pictures).shape == (5, 16)
    assert not scorer.model.training
    assert single.weights_sha256() == scorer.weights_sha256()


def test_texts_over_the_limit_are_cut_and_reported(scorer):
    long = "x" * 200
    assert scorer.text_features([long, "x"]).shape == (2, 16)
    assert scorer.too_long(["x", long]) == [long]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    small_clip(tmp_path, tokenizer=False)
    with pytest.raises(LoraMvpError, match="could not be loaded") as e:
        find_clip(str(tmp_path))
    assert e.value.code == "clip_not_found"


def test_pickled_weights_are_not_read(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoraMvpError) as e:
        find_clip(str(tmp_path))
    assert e.value.code == "clip_not_found"


def test_code_next_to_a_model_is_not_run(tmp_path):
    small_clip(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass M: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.M", "AutoConfig": "evil.M", "AutoTokenizer": ["evil.M", None]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    Scorer(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_an_unreachable_hub_is_said_at_once(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(evaluation.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(LoraMvpError, match="no route to the hub.*hf download nobody/no-clip") as e:
        find_clip("nobody/no-clip")
    assert e.value.code == "clip_not_found"
    assert time.monotonic() - start < 10


# -- scores -----------------------------------------------------------------------------------------------------------


def test_a_model_that_comes_closer_is_seen_to(scorer):
    real, base = noise_pictures(40, 1, bright=50), noise_pictures(32, 2, bright=0)
    lora = [Image.blend(b, r, 0.6) for b, r in zip(base, noise_pictures(32, 3, bright=50), strict=True)]
    prompts = [f"thing {k // 2}" for k in range(32)]
    m = score(scorer, prompts, base, lora, real)
    assert (m.n_pairs, m.n_prompts, m.n_real) == (32, 16, 40)
    assert m.scores["mmd[small]"].change.high < 0
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
        Metrics.model_validate(record | {"schema_version": 2})


# -- evaluate, with drawing replaced ----------------------------------------------------------------------------------


@pytest.fixture
def drawing(monkeypatch, scorer):
    "`evaluate` with pictures that depend on prompt, seed, model and strength, and no diffusion."
    loaded = []

    def load(path, base=None, device=None):
        loaded.append(str(path))
        return LoadedRun(pipe=None, base="tiny", adapter=path)

    def render(run, prompts, seeds, lora_scale=1.0, **options):
        bright = int(50 * lora_scale) if "baseline" not in str(run.adapter) else 20
        return [noise_pictures(1, s + len(p), bright=bright)[0] for p, s in zip(prompts, seeds, strict=True)]

    monkeypatch.setattr(evaluation, "load_run", load)
    monkeypatch.setattr(evaluation, "render", render)
    monkeypatch.setattr(evaluation, "find_run", lambda path: ("tiny", path))
    monkeypatch.setattr(evaluation, "scorer_for", lambda base, config: scorer)
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
    config = load_config(overrides=["evaluation.num_samples=3"])
    result = evaluate(config, tmp_path / "run", real)
    out = tmp_path / "run" / "evaluation"
    assert json.loads((out / "metrics.json").read_text()) == result
    assert result["columns"] == ["base", "LoRA"] and result["n_pairs"] == 6 and result["n_real"] == 6
    assert [s["seed"] for s in result["samples"]] == [42, 43, 44] * 2
    assert "real_unreadable" in [w["code"] for w in result["warnings"]]
    files = [s[column] for s in result["samples"] for column in ("base_file", "lora_file")]
    assert len(set(files)) == 12
    for file in files:
        assert json.loads(Image.open(out / file).text["lora_mvp"])["seed"] in (42, 43, 44)
    assert min(Image.open(out / "samples.png").size) > 256
    assert len(drawing) == 1
    assert not list(out.glob(".*")) and not list(out.glob("*.tmp"))


def test_strength_zero_is_the_base(drawing, real, tmp_path):
    result = evaluate(load_config(), tmp_path / "run", real, tmp_path / "out", lora_scale=0.0)
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert [s["base_score"] for s in result["samples"]] == [s["lora_score"] for s in result["samples"]]
    assert all(s["change"]["value"] in (0.0, None) for s in result["scores"].values())


def test_another_model_as_baseline(drawing, real, tmp_path):
    config = load_config(overrides={"evaluation.baseline_model_path": str(tmp_path / "baseline")})
    result = evaluate(config, tmp_path / "run", real)
    assert result["columns"] == ["baseline", "model"]
    assert drawing == [str(tmp_path / "run"), str(tmp_path / "baseline")]


def test_user_mistakes(drawing, real, tmp_path, monkeypatch):
    config = load_config()
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
    pictures, refused = find_real(str(tmp_path / "*"))
    assert [p.getpixel((0, 0)) for p in pictures] == [(0, 0, 255), (255, 0, 0)] and refused == []


# -- the embedded CLIP ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not asset("tiny", "clip").is_dir(), reason="the embedded CLIP is not built yet")
def test_the_embedded_clip_knows_its_emoji():
    scorer = evaluation.scorer_for("tiny", load_config(overrides=["training.pretrained_model=tiny"]))
    assert scorer.name == "tiny-clip"
    files = sorted(asset("demo", "heldout").glob("*/*.png"))
    images = scorer.image_features([open_rgb(f) for f in files])
    texts = scorer.text_features([f.stem.replace("-", " ") for f in files])
    hits = ((images @ texts.T).argmax(1) == np.arange(len(files))).mean()
    assert hits > 5 / len(files), f"{hits:.0%} of {len(files)} found"
