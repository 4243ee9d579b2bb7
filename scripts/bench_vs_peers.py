"""Time training steps of this package beside its peers', all started once and taking turns; prints JSON. For a CPU, under Linux.

    python scripts/bench_vs_peers.py                                  this package and a bare loop
    python scripts/bench_vs_peers.py --diffusers CHECKOUT --kohya CHECKOUT --python PEERS_PYTHON --shim FOLDER

Each contestant trains on one random Stable Diffusion of `--model`'s size and the same pictures: side, rank 4 on the
attention, AdamW, float32, one thread. They are let go in turn, A B C then C B A, a block of steps at a time, and the
processor time of the block is taken; a ratio is taken inside each round. Peers run unedited from checkouts that you name,
in `--python`'s environment (diffusers' script needs `datasets`; sd-scripts has pins of its own: `--kohya-python`). Where
torchvision cannot be imported, `--shim` names a folder with a stand-in package that holds the transforms both scripts use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lora_mvp.config import load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.models.miniatures import random_base

WORKER = Path(__file__).with_name("bench_worker.py")
MODELS = {
    "tiny": {
        "side": 64,
        "unet": {
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 64,
            "norm_num_groups": 32,
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        },
        "vae": {
            "block_out_channels": (32, 64, 64),
            "norm_num_groups": 16,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
        "text_encoder": {"hidden_size": 64, "intermediate_size": 256},
    },
    "mini": {
        "side": 128,
        "unet": {"block_out_channels": (80, 160, 320, 320), "cross_attention_dim": 192, "norm_num_groups": 16},
        "vae": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_num_groups": 32},
        "text_encoder": {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
        },
    },
}


class Contestant:
    """A trainer in a process of its own."""

    def __init__(self, name: str, python: str, job: dict, log: Path):
        self.name, self.log = name, log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, str(WORKER), name, json.dumps(job, default=str)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=env,
        )
        self.first = self.answer()  # the warm-up, with everything before it

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def ask(self, order: str) -> dict:
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def make_images(root: Path, side: int, count: int = 32) -> None:
    """The same pictures in the layouts of all: imagefolder, kohya's, and a raw folder."""
    rows = []
    for k in range(count):
        picture = Image.effect_noise((side + side // 4,) * 2, 50 + k).convert("RGB")
        ImageDraw.Draw(picture).ellipse((k, k, side // 2 + k, side // 2 + k), fill=(8 * k, 255 - 8 * k, 90))
        rows.append({"file_name": f"{k:02}.png", "text": f"a red circle number {k}"})
        for folder in ("images", "kohya/1_shapes", "raw/shapes"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{k:02}.png")
        for folder in ("kohya/1_shapes", "raw/shapes"):
            (root / folder / f"{k:02}.txt").write_text(rows[-1]["text"])
    (root / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def for_older_readers(tokenizer: Path) -> None:
    """The vocabulary as transformers before 5 wants it."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = (" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))


def jobs(root: Path, args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    """Name -> the Python that runs it, and what it is told."""
    model = MODELS[args.model]
    base = random_base("sd1", root / "base", **{part: c for part, c in model.items() if part != "side"})
    for_older_readers(base / "tokenizer")
    make_images(root, model["side"])
    common = {"base": str(base), "side": model["side"], "batch": args.batch, "rank": 4, "shim": args.shim}
    common |= {"images": str(root / "images"), "kohya_images": str(root / "kohya")}
    settings = {"data.raw_data_dir": root / "raw", "data.processed_dir": root / "data", "data.train_ratio": 0.97}
    settings |= {"data.image_size": model["side"], "data.min_resolution": 32, "data.blur_threshold": 0}
    training = {"pretrained_model": base, "output_dir": root / "out", "resolution": model["side"], "lora_rank": 4}
    training |= {"lora_alpha": 4, "batch_size": args.batch, "gradient_accumulation": 1, "max_train_steps": 10**6}
    training |= {"lora_targets": "attention", "sample_every": 0, "validate_every": 10**6, "mixed_precision": "no"}
    training |= {"checkpointing_steps": 10**6, "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()} | {
        f"training.{k}": str(v) if isinstance(v, Path) else v for k, v in training.items()
    }
    prepare_data(load_config(overrides=settings))
    ours = {"settings": settings, "manifest": str(root / "data" / "manifest.json")}
    found = {"lora_mvp": (sys.executable, ours), "bare": (sys.executable, common)}
    for name, python in (("diffusers", args.python), ("kohya", args.kohya_python or args.python)):
        if checkout := getattr(args, name):
            (root / f"of-{name}").mkdir()
            found[name] = (python, common | {"checkout": checkout, "out": str(root / f"of-{name}")})
    return found


def rounds(contestants: list[Contestant], count: int, steps: int) -> dict[str, list[float]]:
    """Name -> processor seconds of a step, a figure a round."""
    found = {contestant.name: [] for contestant in contestants}
    for k in range(count):
        for contestant in contestants if k % 2 == 0 else reversed(contestants):
            found[contestant.name].append(contestant.ask(str(steps))["cpu_s"] / steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--diffusers", help="a checkout of huggingface/diffusers")
    parser.add_argument("--kohya", help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--python", default=sys.executable, help="runs the peers")
    parser.add_argument("--kohya-python", help="runs sd-scripts, where --python does not")
    parser.add_argument("--shim", help="folder with a stand-in for torchvision")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-mvp-peers-") as temp:
        root = Path(temp)
        contestants = [
            Contestant(name, python, job, root / f"{name}.log") for name, (python, job) in jobs(root, args).items()
        ]
        seconds = rounds(contestants, args.rounds, args.steps)
        ours, rows = seconds["lora_mvp"], []
        for contestant in contestants:
            counted = contestant.ask("count")
            ratios = sorted(other / own for other, own in zip(seconds[contestant.name], ours, strict=True))
            rows.append(
                {
                    "name": contestant.name,
                    "step_cpu_ms_median": round(1000 * statistics.median(seconds[contestant.name]), 1),
                    "step_cpu_ms_best": round(1000 * min(seconds[contestant.name]), 1),
                    "over_ours_median": round(statistics.median(ratios), 2),
                    "over_ours_range": [round(ratios[0], 2), round(ratios[-1], 2)],
                    "over_ours_best": round(min(seconds[contestant.name]) / min(ours), 2),
                    "operators": counted["operators"],
                    "peak_rss_mb": counted["peak_rss_mb"],
                    "before_s": round(contestant.first["cpu_s"], 1),
                }
            )
            contestant.end()
    machine = {"torch": torch.__version__, "cores": os.cpu_count(), "threads": 1}
    asked = {"model": args.model, "batch": args.batch, "rounds": args.rounds, "steps": args.steps}
    print(json.dumps({**asked, "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
