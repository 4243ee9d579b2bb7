"""Time the training steps of a configuration and print JSON.

python scripts/benchmark.py --manifest data/processed/manifest.json --config config.yaml --steps 50
"""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch

from lora_mvp.config import load_config
from lora_mvp.data.manifest import read_manifest
from lora_mvp.train.loop import Trainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--manifest", required=True)
parser.add_argument("--config")
parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
parser.add_argument("--steps", type=int, default=50, help="timed steps, after --warmup")
parser.add_argument("--warmup", type=int, default=3)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as out:  # a benchmark leaves no run behind
    config = load_config(args.config, overrides=[*args.set, f"training.output_dir={out}"])
    start = time.perf_counter()
    trainer = Trainer(config, read_manifest(args.manifest))
    setup, times = time.perf_counter() - start, []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        trainer.step()  # waits for the loss; what a GPU still does then is the move of the adapter
        times.append(time.perf_counter() - start)
times = times[args.warmup :]
t = config.training
images = t.batch_size * t.gradient_accumulation
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
result = {
    "base": t.pretrained_model,
    "device": str(trainer.accelerator.device),
    "threads": torch.get_num_threads(),
    "batch_size": t.batch_size,
    "gradient_accumulation": t.gradient_accumulation,
    "steps": len(times),
    "setup_s": round(setup, 3),
    "step_s_median": round(statistics.median(times), 4),
    "step_s_min": round(min(times), 4),
    "steps_per_s": round(len(times) / sum(times), 3),
    "images_per_s": round(images * len(times) / sum(times), 3),
    "peak_rss_mb": round(peak / 1024, 1),
    "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if torch.cuda.is_available() else None,
}
print(json.dumps(result))
