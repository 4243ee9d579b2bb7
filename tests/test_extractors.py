"Extractors: other implementations, hostile folders, a hub that is away, and a cache that does not compute twice."

import hashlib
import json
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from lora_mvp.config import LoraMvpError, load_config
from lora_mvp.data.images import open_rgb
from lora_mvp.eval import extractors
from lora_mvp.eval.extractors import (
    ClipExtractor,
    DinoExtractor,
    FeatureCache,
    Preprocess,
    find_clip,
    find_extractor,
    inception_module,
    scorer_for,
    to_pixels,
    wrap_module,
)
from lora_mvp.eval.metrics import alignment, frechet_distance, similarity
from lora_mvp.files import asset


def noise_pictures(n, seed, size=(40, 32)):
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 5, 5, 3))
    return [Image.fromarray(c.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC) for c in coarse]


@pytest.fixture(scope="module")
def clip(small_clip):
    return ClipExtractor(small_clip, device="cpu")


@pytest.fixture(scope="module")
def small_dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small-dinov2")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 7}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    notes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
    notes |= {
        "image_processor_type": "BitImageProcessor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="module")
def dino(small_dino):
    return DinoExtractor(small_dino, device="cpu")


# -- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (33, 57), (20, 90)])
def test_preprocessing_is_that_of_transformers(size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = module.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    picture = noise_pictures(1, 3, size)[0]
    expected = np.asarray(theirs(picture, return_tensors="np").pixel_values)[0]
    np.testing.assert_allclose(to_pixels(picture, Preprocess(edge=32, size=(32, 32))), expected, atol=1e-5)


def test_scores_are_those_of_the_model(small_clip, clip):
    model = CLIPModel.from_pretrained(small_clip).eval()
    texts, pictures = ["a cat", "two dogs!", "a much longer"], noise_pictures(3, 1)
    tokens = CLIPTokenizer.from_pretrained(small_clip)(texts, padding=True, return_tensors="pt")
    pixels = torch.tensor(np.stack([to_pixels(p, clip.preprocess) for p in pictures]))
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    logits = out.logits_per_image / model.logit_scale.exp()
    np.testing.assert_allclose(clip.image_features(pictures), out.image_embeds, atol=1e-6)
    np.testing.assert_allclose(
        alignment(clip.image_features(pictures), clip.text_features(texts)), 100 * logits.diag().detach(), atol=1e-3
    )


def test_dino_features_are_those_of_the_model_and_its_processor(small_dino, dino):
    module = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    pictures = noise_pictures(3, 1, (60, 45))
    pixels = module.BitImageProcessorPil.from_pretrained(small_dino)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(small_dino).eval()(torch.as_tensor(np.asarray(pixels))).pooler_output
    np.testing.assert_allclose(dino.image_features(pictures), expected, atol=1e-4)
    assert dino.text_features(["a"]) is None and dino.too_long(["a" * 999]) == []


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_features_depend_on_the_picture_alone(name, request):
    extractor, pictures = request.getfixturevalue(name), noise_pictures(5, 2)
    features = extractor.image_features(pictures)
    assert features.dtype == np.float64 and features.shape == (5, extractor.dim)
    np.testing.assert_allclose(extractor.image_features(pictures, batch_size=1), features, atol=1e-5)
    np.testing.assert_allclose(
        extractor.image_features([np.asarray(p) for p in pictures], batch_size=5), features, atol=1e-5
    )
    np.testing.assert_allclose(extractor.image_features(pictures[::-1], 2), features[::-1], atol=1e-5)
    assert not extractor.module.training
    with pytest.raises(ValueError, match="bytes"):
        extractor.image_features([np.asarray(pictures[0]) / 255])  # is it 0 to 1 or 0 to 255? nobody can say


def test_what_is_read_is_what_is_recorded(small_clip, clip, dino):
    again = find_extractor(f"clip:{small_clip}", load_config(overrides=["evaluation.fid_batch_size=2"]))
    assert again.record == clip.record and again.batch_size == 2
    assert clip.record.weights_sha256 != dino.record.weights_sha256
    assert clip.frechet_name.startswith("fd_small_clip")
    with torch.no_grad():
        again.module.logit_scale += 1
    del again.weights_sha256  # kept after the first look
    assert again.record != clip.record


def test_texts_over_the_limit_are_cut_and_reported(clip):
    long = "x" * 200
    assert clip.text_features([long, "x"]).shape == (2, 16)
    assert clip.too_long(["x", long, long]) == [long]
    np.testing.assert_allclose(
        clip.text_features(["x", long, "y"], batch_size=1), clip.text_features(["x", long, "y"]), atol=1e-5
    )


def test_a_module_that_drops_out_is_put_into_evaluation_mode():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5)).train()
    extractor = wrap_module(module, Preprocess(edge=None, size=(8, 8)), "rows", meaningful=False)
    pictures = noise_pictures(4, 1)
    np.testing.assert_array_equal(extractor.image_features(pictures), extractor.image_features(pictures))
    assert frechet_distance(*[extractor.image_features(pictures)] * 2) == pytest.approx(0, abs=1e-9)
    assert not extractor.record.meaningful


# -- hostile folders and a hub that is away ---------------------------------------------------------------------------


def copy_without(folder, to, *names):
    for file in folder.iterdir():
        if file.name not in names:
            (to / file.name).write_bytes(file.read_bytes())


def test_a_folder_without_tokenizer_is_refused(small_clip, tmp_path):
    copy_without(small_clip, tmp_path, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    with pytest.raises(LoraMvpError, match="could not be loaded") as e:
        find_clip(str(tmp_path))
    assert e.value.code == "clip_not_found"


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_pickled_weights_are_not_read(kind, small_clip, small_dino, tmp_path):
    folder, model = {"clip": (small_clip, CLIPModel), "dinov2": (small_dino, Dinov2Model)}[kind]
    copy_without(folder, tmp_path, "model.safetensors")
    torch.save(model.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(LoraMvpError) as e:
        find_extractor(f"{kind}:{tmp_path}")
    assert e.value.code == f"{kind}_not_found"


def test_lost_weights_are_not_replaced_by_random_ones(small_clip, tmp_path):
    copy_without(small_clip, tmp_path, "model.safetensors")
    weights = CLIPModel.from_pretrained(small_clip).state_dict()
    lost = "visual_projection.weight"
    save_file(
        {k: v.contiguous() for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(LoraMvpError, match=lost):
        find_clip(str(tmp_path))


def test_code_next_to_a_model_is_not_run(small_clip, tmp_path):
    copy_without(small_clip, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass M: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.M", "AutoConfig": "evil.M", "AutoTokenizer": ["evil.M", None]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ClipExtractor(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_an_unreachable_hub_is_said_at_once(kind, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(extractors.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(LoraMvpError, match="no route to the hub.*hf download nobody/nothing") as e:
        find_extractor(f"{kind}:nobody/nothing")
    assert e.value.code == f"{kind}_not_found"
    assert time.monotonic() - start < 60  # without asking first, the clients try again and again


def test_names_of_open_clip_are_looked_for_under_their_hub_ids(monkeypatch):
    asked = []

    def unreachable(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(extractors.HfApi, "model_info", unreachable)
    for keys in (["evaluation.clip_model=ViT-L-14", "evaluation.clip_pretrained=laion2b_s32b_b82k"], []):
        with pytest.raises(LoraMvpError):
            scorer_for("sd1", load_config(overrides=keys))
    assert asked == ["laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "openai/clip-vit-base-patch32"]


# -- Inception and EfficientNet ---------------------------------------------------------------------------------------


def by_formula(name, k, shape):
    "Weights that need no random numbers, so that other implementations can have them too."
    n = int(np.prod(shape))
    wave = np.sin(np.arange(n, dtype=np.float64) * 1.7 + k * k * 0.37)
    if name.endswith("running_var"):
        values = 1 + 0.3 * wave
    elif name.endswith("bn.weight"):
        values = 1 + 0.2 * wave
    else:
        values = 0.1 * wave if len(shape) == 1 else wave * (4 / (n / shape[0])) ** 0.5
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


@pytest.fixture(scope="module")
def inception_weights():
    names = {k: v.shape for k, v in inception_module().state_dict().items() if not k.endswith("num_batches_tracked")}
    return {name: by_formula(name, k, names[name]) for k, name in enumerate(sorted(names))}


def test_inception_is_the_network_of_fid(inception_weights, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save(inception_weights | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, file)
    with pytest.raises(LoraMvpError, match="a pickle can run code"):
        find_extractor(f"inception:{file}")
    # The published weights cannot be had here; their hash is replaced by that of these, to see what follows from it.
    monkeypatch.setattr(extractors, "FID_SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    inception = find_extractor(f"inception:{file}")
    assert (inception.name, inception.frechet_name, inception.dim) == ("inception", "fid", 2048)
    y, x = np.mgrid[:299, :299]
    picture = np.stack([(x * (c + 1) + y * y // (c + 7)) % 256 for c in range(3)], axis=-1).astype(np.uint8)
    features = inception.image_features([picture])[0]
    # What the network of torch-fidelity 0.4.0 says to the same weights and the same picture.
    assert (features.mean(), features.std(ddof=1)) == pytest.approx((0.2284, 0.5658), abs=2e-4)
    assert features[[0, 1, -3, -2, -1]] == pytest.approx([1.3171, 0, 2.2920, 2.4378, 1.1165], abs=1e-3)
    assert (features > 0).mean() == pytest.approx(0.6235, abs=2e-3)


def test_unproven_weights_are_not_called_inception(inception_weights, tmp_path):
    save_file(inception_weights, tmp_path / "inception.safetensors")
    found = find_extractor(f"inception:{tmp_path / 'inception.safetensors'}")
    assert (found.name, found.frechet_name) == ("inception-unverified", "fd_inception_unverified")
    (tmp_path / "inception.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(LoraMvpError) as e:
        find_extractor(f"inception:{tmp_path / 'inception.safetensors'}")
    assert e.value.code == "weights_unknown"


lite0 = pytest.mark.skipif(not find_spec("efficientnet_lite_pytorch"), reason="the extra eval-offline is not installed")


@lite0
def test_efficientnet_sees_what_photos_have_in_common():
    data = pytest.importorskip("skimage.data")
    extractor = find_extractor("efficientnet-lite0")
    assert extractor.dim == 1280 and extractor.meaningful and extractor.frechet_name == "fd_efficientnet_lite0"
    photos = [data.chelsea(), data.coffee(), data.astronaut()]  # a cat, a cup, a face
    left, right = ([p[:, s].copy() for p in photos] for s in (slice(None, 300), slice(-300, None)))
    cosines = similarity(extractor.image_features(left), extractor.image_features(right))
    assert cosines.argmax(1).tolist() == [0, 1, 2]
    pixels = torch.from_numpy(np.stack([to_pixels(p, extractor.preprocess) for p in photos]))
    with torch.no_grad():
        classes = extractor.module.net(pixels).argmax(1).tolist()
    assert classes[0] in (281, 282, 285) and classes[1] in (504, 967, 968)  # cats; coffee mug, espresso, cup


@pytest.mark.skipif(bool(find_spec("efficientnet_lite_pytorch")), reason="the extra eval-offline is installed")
def test_a_missing_extra_is_named():
    with pytest.raises(LoraMvpError, match="eval-offline") as e:
        find_extractor("efficientnet-lite0")
    assert e.value.code == "extractor_not_installed"


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(clip):
    "The sizes of the batches that went through the small CLIP."
    sizes = []
    hook = clip.module.vision_model.register_forward_hook(lambda *call: sizes.append(len(call[2].pooler_output)))
    yield sizes
    hook.remove()


def test_no_picture_is_computed_twice(clip, counted, tmp_path):
    pictures = noise_pictures(6, 1)
    first = FeatureCache(tmp_path / "features").features(clip, pictures + pictures[:3])
    assert counted == [6]
    np.testing.assert_array_equal(first[6:], first[:3])
    np.testing.assert_allclose(first[:6], clip.image_features(pictures), atol=1e-6)
    counted.clear()
    cache = FeatureCache(tmp_path / "features")  # as in another process
    np.testing.assert_array_equal(cache.features(clip, pictures[::-1]), first[5::-1])
    assert counted == []
    pictures[2].putpixel((0, 0), (1, 2, 3))
    cache.features(clip, [np.asarray(p) for p in pictures])
    assert counted == [1]
    assert [file.suffix for file in cache.folder.iterdir()] == [".safetensors"]


def test_other_weights_and_other_preprocessing_are_kept_apart(clip, small_clip, tmp_path):
    cache, pictures = FeatureCache(tmp_path), noise_pictures(2, 1)
    first = cache.features(clip, pictures)
    other = ClipExtractor(small_clip, device="cpu")
    with torch.no_grad():
        other.module.visual_projection.weight[0] *= 2
    assert not np.allclose(cache.features(other, pictures), first)
    brighter = ClipExtractor(small_clip, device="cpu")
    brighter.preprocess = brighter.preprocess.model_copy(update={"mean": (0.0, 0.0, 0.0)})
    assert not np.allclose(cache.features(brighter, pictures), first)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x00" * len(b)])
def test_a_broken_file_is_said_and_computed_again(damage, clip, counted, tmp_path, caplog):
    cache, pictures = FeatureCache(tmp_path), noise_pictures(3, 1)
    first = cache.features(clip, pictures)
    cache.file(clip).write_bytes(damage(cache.file(clip).read_bytes()))
    np.testing.assert_array_equal(cache.features(clip, pictures), first)
    assert counted == [3, 3] and "computed again" in caplog.text
    cache.features(clip, pictures)
    assert counted == [3, 3]


def test_a_folder_that_cannot_be_written_is_named(clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraMvpError, match="Cannot write"):
        FeatureCache(tmp_path / "file" / "features").features(clip, noise_pictures(1, 1))


# -- the embedded CLIP ------------------------------------------------------------------------------------------------


def test_the_embedded_clip_knows_its_emoji():
    extractor = scorer_for("tiny", load_config(overrides=["training.pretrained_model=tiny"]))
    assert extractor.name == "tiny-clip" and extractor.source == "lora_mvp/assets/tiny/clip"
    files = sorted(asset("demo", "heldout").glob("*/*.png"))
    images = extractor.image_features([open_rgb(f) for f in files])
    texts = extractor.text_features([f.stem.replace("-", " ") for f in files])
    hits = ((images @ texts.T).argmax(1) == np.arange(len(files))).mean()
    assert hits > 5 / len(files), f"{hits:.0%} of {len(files)} found"
