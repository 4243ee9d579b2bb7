"""What each phase of a run costs, as JSON: processor seconds, seconds, and the highest resident memory (Linux).

    python scripts/bench_phases.py                         a random SD 1.5 of full size, one step at 128 px
    python scripts/bench_phases.py --base tiny --steps 100 --resolution 64

Resident memory counts pages of the weights' files as they are read; `before` is what a phase began with.
"""

import argparse
import json
import logging
import os
import re
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from lora_mvp.config import load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.models.miniatures import random_base
from lora_mvp.train import loop, results

FULL = {  # Stable Diffusion 1.5 but for its vocabulary
    "unet": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "norm_num_groups": 32},
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
ROWS = []


def resident(kind: str) -> float:
    """Gigabytes: `VmRSS` now, `VmHWM` at most."""
    return round(int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6, 2)


def measured(name: str, function, *args, **kwargs):
    """The function's value; a row about it is kept."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest value begins anew
    before, start, used = resident("VmRSS"), time.perf_counter(), time.process_time()
    try:
        return function(*args, **kwargs)
    finally:
        seconds = {"cpu_s": round(time.process_time() - used, 1), "s": round(time.perf_counter() - start, 1)}
        ROWS.append({"phase": name, **seconds, "before_GB": before, "peak_GB": resident("VmHWM")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a folder or `tiny`; default: a random SD 1.5 of full size")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    args = parser.parse_args()
    logging.getLogger("lora_mvp").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="lora-mvp-phases-") as temp:
        root = Path(temp)
        (root / "raw" / "noise").mkdir(parents=True)
        for k in range(args.images):
            side = args.resolution + 8 * k
            Image.effect_noise((side, side), 60 + k).convert("RGB").save(root / "raw" / "noise" / f"{k}.png")
        settings = {"data.raw_data_dir": root / "raw", "data.processed_dir": root / "data", "data.min_resolution": 32}
        settings |= {"training.pretrained_model": args.base or random_base("sd1", root / "base", **FULL)}
        settings |= {"training.output_dir": root / "out", "training.max_train_steps": args.steps}
        settings |= {"training.resolution": args.resolution, "data.image_size": args.resolution}
        settings |= {"training.lr_warmup_steps": 0, "training.gradient_accumulation": 1}
        settings |= {"training.mixed_precision": args.precision, "evaluation.num_inference_steps": 2}
        settings |= (
            {"training.sample_prompts": ["noise"]} if args.steps == 1 else {"evaluation.num_inference_steps": 30}
        )
        config = load_config(overrides=settings)
        prepare_data(config)
        loop.Network = partial(measured, "load and hash", loop.Network)
        loop.load_data = partial(measured, "encode", loop.load_data)
        loop.Trainer.run = (lambda run: lambda *a, **k: measured("steps and marks", run, *a, **k))(loop.Trainer.run)
        results.save_result = partial(measured, "adapter and record", results.save_result)
        for form, function in results.FORMS.items():
            results.FORMS[form] = partial(measured, form, function)
        measured("whole run", loop.train, config, root / "data" / "manifest.json", progress=False)
    machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
    most = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    json.dump({"settings": vars(args), "machine": machine, "phases": ROWS, "peak_GB": most}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
