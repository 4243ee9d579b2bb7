"""From a folder of pictures to a LoRA, a score and a file for other programs, in Python.

python examples/first_lora.py pictures --steps 400
"""

import argparse
from pathlib import Path

import lora_mvp
from lora_mvp.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pictures", type=Path)
parser.add_argument("--base", default="tiny", help="tiny: the embedded base, 64 px; or any Stable Diffusion")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--out", type=Path, default=Path("outputs/first"))
args = parser.parse_args()

config = lora_mvp.load_config(
    overrides={
        "data.raw_data_dir": args.pictures,
        "data.processed_dir": args.out / "data",
        "training.pretrained_model": args.base,
        "training.max_train_steps": args.steps,
        "training.output_dir": args.out / "run",
    }
)
manifest = lora_mvp.prepare_data(config)
print(len(manifest.images), "pictures accepted")
train(config, args.out / "data" / "manifest.json")
print(lora_mvp.evaluate(config, args.out / "run")["judgement"])
print(lora_mvp.export(args.out / "run" / "lora_adapter", "kohya", args.out / "lora.safetensors"))
