"""Load a trained LoRA, fuse it at a chosen strength and draw.

python examples/inference.py --model-path outputs/lora --prompt "A photo of a cat" --lora-scale 0.8
"""

import argparse
import logging

from lora_mvp.infer import generate, load_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model-path", required=True)
parser.add_argument("--prompt", required=True)
parser.add_argument("--lora-scale", type=float, default=1.0)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--guidance-scale", type=float, default=7.5)
parser.add_argument("--out", default="outputs/pictures")
args = parser.parse_args()

logging.basicConfig(level=logging.INFO, format="%(message)s")
run = load_run(args.model_path, fuse_scale=args.lora_scale)
logging.info("adapter %s fused into %s at scale %s", run.adapter, run.base, args.lora_scale)
for file in generate(run, [args.prompt], args.seed, args.out, 1, args.lora_scale, args.steps, args.guidance_scale):
    print(file)
