"""What drawing could gain over diffusers' pipeline, as JSON: processor seconds of one picture, ways in turn (A B C, C B A).

    python scripts/bench_sampling.py                           a tiny and a mini Stable Diffusion, random weights
    python scripts/bench_sampling.py --model full --steps 4    SD 1.5's sizes at 256 px, 8 GB of memory

Latents alone, without text and autoencoder. `kept`: keys and values of the text are computed once, not at each step;
`lean`: an adapted layer in two products; `loop`: a plain loop over the family's `denoise` and the scheduler.
A ratio is `pipeline`'s seconds over a way's, inside each round; `apart` is the largest difference of its latents.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial

import torch
from bench_phases import FULL
from bench_vs_peers import MODELS

from lora_mvp.models.adapters import adapter_layers, fuse
from lora_mvp.models.base import load_base
from lora_mvp.models.drawing import draw_latents
from lora_mvp.models.families import denoise, encode_text, size_facts
from lora_mvp.models.kernels import lean
from lora_mvp.models.miniatures import random_base, random_lora

GUIDANCE, PROMPT = 7.5, "a red apple"
SIDES = {"tiny": 64, "mini": 128, "full": 256}


def once(forward, seen: list, x: torch.Tensor) -> torch.Tensor:
    """A layer's output, which is kept as long as it is asked about the very same tensor."""
    if not (seen and seen[0] is x):
        seen[:] = x, forward(x)
    return seen[1]


@contextmanager
def kept(pipe):
    """Keys and values of the text are computed once."""
    layers = [x for n, m in pipe.unet.named_modules() if n.endswith("attn2") for x in (m.to_k, m.to_v)]
    forwards = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(once, layer.forward, [])
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            del layer.forward
            if forward:
                layer.forward = forward


@contextmanager
def leaned(pipe):
    """Adapted layers compute in two products."""
    lean(pipe)
    try:
        yield
    finally:
        for layer in adapter_layers(pipe).values():
            vars(layer).pop("forward", None)


@torch.no_grad()
def loop(pipe, embeds: dict, steps: int, size: int) -> torch.Tensor:
    """What the pipeline does, and no more."""
    scheduler, sizes = deepcopy(pipe.scheduler), size_facts(pipe, (size, size), (0, 0), (size, size))
    scheduler.set_timesteps(steps)
    side, n = size // pipe.vae_scale_factor, 1
    latents = torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([latents, latents]), t)
        empty, wanted = denoise(pipe, both, t.expand(2 * n), embeds, sizes).chunk(2)
        latents = scheduler.step(empty + GUIDANCE * (wanted - empty), t, latents, return_dict=False)[0]
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIDES, action="append")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for model in args.model or ["tiny", "mini"]:
        shapes = FULL if model == "full" else {k: v for k, v in MODELS[model].items() if k != "side"}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            base = str(random_base("sd1", folder, **shapes))
            how = {"lora_rank": 4, "lora_alpha": 4, "lora_targets": "attention"}
            adapted, fused = (random_lora(load_base(base), **how) for _ in range(2))
            fuse(fused)
            texts = {prompt: encode_text(adapted, [prompt]) for prompt in (PROMPT, "")}
        rows.append({"model": model} | compare(adapted, fused, texts, SIDES[model], args))
    machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
    json.dump({"machine": machine, "steps": args.steps, "rows": rows}, sys.stdout, indent=1)
    print()


def compare(adapted, fused, texts: dict, side: int, args) -> dict:
    """Seconds and ratios of each way."""
    both = {name: torch.cat([texts[""][name], texts[PROMPT][name]]) for name in texts[PROMPT]}

    def piped(pipe):
        return draw_latents(pipe, [PROMPT], [0], args.steps, GUIDANCE, side, embed=lambda some: texts[some[0]])

    def looped(pipe):
        return loop(pipe, both, args.steps, side)

    ways = {
        "pipeline": (piped, adapted, []),
        "pipeline, lean": (piped, adapted, [leaned]),
        "pipeline, lean, kept": (piped, adapted, [leaned, kept]),
        "pipeline, fused": (piped, fused, []),
        "pipeline, fused, kept": (piped, fused, [kept]),
        "loop, lean, kept": (looped, adapted, [leaned, kept]),
        "loop, fused, kept": (looped, fused, [kept]),
    }
    seconds, made = {name: [] for name in ways}, {}
    for k in range(args.rounds + 1):
        for name in list(ways)[:: 1 - 2 * (k % 2)]:
            draw, pipe, changes = ways[name]
            with ExitStack() as stack:
                for change in changes:
                    stack.enter_context(change(pipe))
                start = time.process_time()
                made[name] = draw(pipe)
                used = time.process_time() - start
            if k:  # the first round is the warm-up
                seconds[name].append(used)
    found = {}
    for name, used in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["pipeline"], used, strict=True)]
        found[name] = {
            "best_s": round(min(used), 3),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "ratio_of_bests": round(min(seconds["pipeline"]) / min(used), 3),
            "apart": float((made[name] - made["pipeline"]).abs().max()),
        }
    return found


if __name__ == "__main__":
    main()
