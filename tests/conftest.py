"""What several test files need."""

import logging
import os

import pytest
from PIL import Image, ImageDraw


def pytest_runtest_setup(item):
    """No test sees the level of log messages that a command line in another test has set."""
    logging.getLogger("lora_mvp").setLevel(logging.NOTSET)


# Most processor seconds first: with files dealt to workers in this order, none is left with a long one at the end.
LONG = ["evaluator", "faults", "train", "doctor", "data", "exports", "models", "service_e2e", "api", "stores"]


def pytest_collection_modifyitems(items):
    """The files that take longest come first; inside a file the order stays."""
    place = {f"test_{name}": k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


os.environ.setdefault("OMP_NUM_THREADS", "1")  # the machine's cores are shared by the processes that tests start


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """A prepared folder of twelve drawings in two labels; returns the path of its manifest."""
    from lora_mvp.config import load_config
    from lora_mvp.data.prepare import prepare_data

    root = tmp_path_factory.mktemp("drawings")
    for label, colour in [("disc", "crimson"), ("square", "royalblue")]:
        (root / "raw" / label).mkdir(parents=True)
        for k in range(6):
            image = Image.new("RGB", (80 + 8 * k, 96), "white")
            shape = ImageDraw.Draw(image).ellipse if label == "disc" else ImageDraw.Draw(image).rectangle
            shape((10 + 4 * k, 12, 40 + 6 * k, 60 + 3 * k), fill=colour)
            image.save(root / "raw" / label / f"{k}.png")
    data = {"raw_data_dir": root / "raw", "processed_dir": root / "data", "blur_threshold": 0, "min_resolution": 32}
    data |= {"image_size": 64, "caption_template": "{label}, number {stem}"}
    prepare_data(load_config(overrides={f"data.{k}": v for k, v in data.items()}))
    return root / "data" / "manifest.json"


@pytest.fixture(scope="session")
def small_run():
    """The settings of a run of seconds on the embedded base, as overrides; keywords change training keys."""

    def settings(out, **training):
        small = {"pretrained_model": "tiny", "resolution": 64, "output_dir": out, "save_pipeline": False}
        small |= {"max_train_steps": 6, "lr_warmup_steps": 1, "batch_size": 2, "gradient_accumulation": 1}
        small |= {"checkpointing_steps": 2, "learning_rate": 1e-3, "lora_rank": 4, "lora_dropout": 0.1}
        small |= {"sample_prompts": ["a disc"]} | training
        values = {f"training.{key}": value for key, value in small.items()}
        return values | {"evaluation.num_inference_steps": 2}

    return settings


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory):
    """The folder of a CLIP of random weights whose words are single characters."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    characters = [chr(i) for i in range(33, 127)]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    n = len(words)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": n, "max_position_embeddings": 24, "bos_token_id": n - 2, "eos_token_id": n - 1, **shape}
    vision = {"image_size": 32, "patch_size": 8, **shape}
    folder = tmp_path_factory.mktemp("small-clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder
