"""Make renders.png: what the demo's LoRA draws at several strengths, beside the base. Two minutes on two cores.

python examples/renders.py
"""

import argparse
import tempfile
from pathlib import Path

from lora_mvp.config import load_config
from lora_mvp.data.prepare import prepare_data
from lora_mvp.demo import demo_folder
from lora_mvp.infer import load_run, render
from lora_mvp.screen import set_up_output
from lora_mvp.sheets import Tile, contact_sheet
from lora_mvp.train.loop import train

THINGS = ["fox face", "penguin", "owl", "red apple", "rocket", "sailboat"]  # none was among the training pictures
STRENGTHS = [0, 0.5, 1, 1.5]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path(__file__).with_name("renders.png"))
parser.add_argument("--steps", type=int, help="fewer training steps, for a quick look")
args = parser.parse_args()
set_up_output()

with tempfile.TemporaryDirectory() as temp:
    folder = Path(temp) / "demo"
    demo_folder(folder)
    changes = {} if args.steps is None else {"training.max_train_steps": args.steps, "training.lr_warmup_steps": 0}
    config = load_config(
        folder / "config.yaml", overrides=changes | {"training.save_pipeline": False, "training.sample_every": 0}
    )
    prepare_data(config)
    train(config, folder / "processed" / "manifest.json")
    run = load_run(folder / "lora")
    prompts, seeds, how = [f"a picture of {thing}" for thing in THINGS], [1] * len(THINGS), (20, 3.0)
    columns = [render(run, prompts, seeds, strength, *how) for strength in STRENGTHS]

rows = [[Tile(picture) for picture in row] for row in zip(*columns, strict=True)]
heads = ["the base" if strength == 0 else f"strength {strength:g}" for strength in STRENGTHS]
contact_sheet(rows, side=96, heads=heads, names=THINGS).save(args.out, optimize=True)
print(args.out)
