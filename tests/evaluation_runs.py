"""Short trainings on the demo's pictures that evaluation must tell apart."""

import shutil
import tempfile
from pathlib import Path

from lora_mvp.config import load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.demo import demo_folder
from lora_mvp.files import asset
from lora_mvp.train.loop import train

_KEPT = tempfile.TemporaryDirectory(prefix="lora-mvp-demo-")  # gone with the process
DEMO = Path(_KEPT.name) / "demo"  # made by the first `prepare`
HELD_OUT = str(DEMO / "heldout" / "**" / "*.png")
NAMES = [p.stem.replace("-", " ") for p in sorted(asset("demo", "heldout").glob("*/*.png"))]
CALLED = [f"{name}, 3d style" for name in NAMES]  # the base does not know this style, the scorer does
PLAIN = [
    "owl, flat style",
    "bus, noto style",
    "rose, flat style",
    "red apple, noto style",
    "rocket, noto style",
    "fish, flat style",
]


def prepare(root: Path, pictures: list[str], caption: str) -> Path:
    """A prepared folder of some of the demo's pictures; the path of its manifest."""
    if not DEMO.exists():
        demo_folder(DEMO)
    for file in [f for name in pictures for f in (DEMO / "raw").glob(f"*/{name}.png")]:
        (root / "raw" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "raw" / file.parent.name)
    data = {"raw_data_dir": root / "raw", "processed_dir": root / "data", "caption_template": caption}
    data |= {"image_size": 64, "min_resolution": 32, "blur_threshold": 20, "train_ratio": 0.9}
    prepare_data(load_config(overrides={f"data.{k}": v for k, v in data.items()}))
    return root / "data" / "manifest.json"


def run(manifest: Path, out: Path, **training) -> Path:
    """A finished run; keywords change training keys."""
    keys = {"pretrained_model": "tiny", "resolution": 64, "output_dir": out, "save_pipeline": False}
    keys |= {"lr_warmup_steps": 1, "batch_size": 8, "gradient_accumulation": 1, "lora_rank": 8, "lora_alpha": 8}
    keys |= {
        "lora_dropout": 0,
        "lora_targets": "all",
        "sample_every": 0,
        "checkpointing_steps": 1000,
    } | training
    values = {f"training.{key}": value for key, value in keys.items()} | {"evaluation.num_inference_steps": 2}
    train(load_config(overrides=values), manifest, progress=False)
    return out


def settings(prompts: Path, **evaluation):
    """A configuration that draws the prompts of a file quickly."""
    keys = {
        "num_samples": 1,
        "num_inference_steps": 4,
        "guidance_scale": 3,
        "fid_batch_size": 8,
        "prompt_file": prompts,
    }
    values = {f"evaluation.{key}": value for key, value in (keys | evaluation).items()}
    return load_config(overrides={"training.pretrained_model": "tiny"} | values)
