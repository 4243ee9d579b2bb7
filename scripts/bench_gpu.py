"""What training and drawing cost on a card, as JSON; nothing is downloaded, and 10 minutes are enough.

    python scripts/bench_gpu.py --out bench_gpu.json           full-size SD 1.5 and SDXL of random weights
    python scripts/bench_gpu.py --kinds sdxl                   one of them
    python scripts/bench_gpu.py --device cpu --tiny            the same script in seconds, to see that it works

The file is written anew after every row. A row that fails says its error, and the next one goes on; a row for which no time is left
says so. `mfu` is useful work over the products measured in row `machine`; `enqueue_ms` near `step_ms` means that the card waits for Python.
"""

import argparse
import gc
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
parser.add_argument("--tiny", action="store_true", help="small bases, few steps")
parser.add_argument("--kinds", nargs="*", choices=("sd15", "sdxl"), default=["sd15", "sdxl"])
parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="no row begins later than this")
parser.add_argument(
    "--dir", type=Path, help="a disk with 30 GB for bases and runs; default: the system's for such files"
)
ARGS = parser.parse_args()
if ARGS.device == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from lora_mvp.config import load_config  # noqa: E402
from lora_mvp.data.manifest import read_manifest  # noqa: E402
from lora_mvp.data.prepare import prepare_data  # noqa: E402
from lora_mvp.data.steps import Plan  # noqa: E402
from lora_mvp.infer import load_run, render  # noqa: E402
from lora_mvp.models.base import load_base  # noqa: E402
from lora_mvp.models.drawing import decode_latents  # noqa: E402
from lora_mvp.models.miniatures import random_base  # noqa: E402
from lora_mvp.train import loop, results  # noqa: E402

CUDA, START = ARGS.device == "cuda", time.perf_counter()
_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
FULL = {  # the published configs but for the vocabulary
    "sd15": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "norm_num_groups": 32,
        },
        "vae": _VAE | {"sample_size": 512},
        "text_encoder": _CLIP,
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "norm_num_groups": 32,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        "vae": _VAE | {"sample_size": 1024},
        "text_encoder": _CLIP,
        "text_encoder_2": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    },
}
GFLOP = {"sd15": 1725, "sdxl": 14188}  # a LoRA step of one image, rank 16 on attention, 512 and 1024 pixels
SIDE = {"sd15": 64, "sdxl": 64} if ARGS.tiny else {"sd15": 512, "sdxl": 1024}
BATCHES = {"sd15": (1, 4), "sdxl": (1,)} if ARGS.tiny else {"sd15": (1, 4, 8, 16), "sdxl": (1, 4)}
REPORT = {"settings": {k: str(v) for k, v in vars(ARGS).items()}, "rows": {}}


def save() -> None:
    """Write what is known by now."""
    REPORT["seconds"] = round(time.perf_counter() - START, 1)
    ARGS.out.write_text(json.dumps(REPORT, indent=1) + "\n")


def row(name: str, function, *args) -> None:
    """Run one row, whatever comes of it."""
    start = time.perf_counter()
    if start - START > ARGS.budget:
        REPORT["rows"][name] = {"error": "no time left"}
    else:
        try:
            REPORT["rows"][name] = function(*args)
        except Exception as error:  # one row's trouble is not the next one's
            REPORT["rows"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        REPORT["rows"][name]["row_s"] = round(time.perf_counter() - start, 1)
    print(
        f"{time.perf_counter() - START:6.1f} s  {name}: {json.dumps(REPORT['rows'][name])}", file=sys.stderr, flush=True
    )
    save()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def wait() -> None:
    """Until the device has done what was ordered."""
    if CUDA:
        torch.cuda.synchronize()


def peak() -> float | None:
    """Gigabytes, the most that was allocated since `forget`."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if CUDA else None


def forget() -> None:
    """Let the peak begin anew."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def seconds_of(function, repeats: int) -> float:
    """Seconds of one call, the median of five windows of `repeats`."""
    windows = []
    for _ in range(1 if ARGS.tiny else 5):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        windows.append((time.perf_counter() - start) / repeats)
    return statistics.median(windows)


def machine() -> dict:
    """What the machine can do at best: products of squares, copies."""
    side, facts = (256 if ARGS.tiny else 8192), {"torch": torch.__version__, "python": platform.python_version()}
    facts |= {"device": torch.cuda.get_device_name() if CUDA else platform.processor(), "cuda": torch.version.cuda}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(side, side, device=ARGS.device).to(dtype)
        a @ a
        spent = seconds_of(lambda a=a: a @ a, 1 if ARGS.tiny else 10)
        facts[f"{side}_cube_{str(dtype).removeprefix('torch.')}_tflops"] = round(2 * side**3 / spent / 1e12, 2)
    block = torch.empty((2**20 if ARGS.tiny else 2**31), dtype=torch.uint8, device=ARGS.device)
    spent = seconds_of(lambda: block.clone(), 2)
    return facts | {"copy_GB_s": round(2 * block.numel() / spent / 1e9, 1)}


def make_base(kind: str, root: Path) -> Path:
    """A base with random weights, made on the device and in float16, in which such bases are published."""
    family = {"sd15": "sd1", "sdxl": "sdxl"}[kind]
    default = torch.get_default_dtype()
    with torch.device(ARGS.device):
        torch.set_default_dtype(torch.float16 if CUDA else default)
        try:
            return random_base(family, root / kind, **({} if ARGS.tiny else FULL[kind]))
        finally:
            torch.set_default_dtype(default)


def configured(kind: str, root: Path, **training):
    """The settings of a run on noise."""
    side, raw = SIDE[kind], root / "raw" / str(SIDE[kind])
    if not raw.is_dir():
        (raw / "noise").mkdir(parents=True)
        for k in range(8 if ARGS.tiny else 24):
            Image.effect_noise((side, side), 60 + k).convert("RGB").save(raw / "noise" / f"{k}.png")
    settings = {"data.raw_data_dir": raw, "data.processed_dir": root / f"data-{side}", "data.min_resolution": 32}
    settings |= {"data.image_size": side, "training.pretrained_model": root / kind, "training.resolution": side}
    settings |= {"training.lora_rank": 16, "training.lora_alpha": 16, "training.gradient_accumulation": 1}
    settings |= {"training.lr_warmup_steps": 0, "training.output_dir": root / f"{kind}-run"}
    settings |= {"training.sample_prompts": ["noise"], "evaluation.num_inference_steps": 2 if ARGS.tiny else 30}
    config = load_config(overrides=settings | {f"training.{key}": value for key, value in training.items()})
    manifest = root / f"data-{side}" / "manifest.json"
    if not manifest.is_file():
        prepare_data(config)
    return config, manifest


@contextmanager
def timed(phases: dict, places: dict):
    """The functions named in `places` are timed while they run, and their peaks noted."""

    def around(name, function):
        def call(*args, **kwargs):
            wait()
            forget()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                spent = round(time.perf_counter() - start, 2)
                held = phases.get(name, {"s": 0, "peak_GB": 0})
                most = None if peak() is None else max(peak(), held["peak_GB"])
                phases[name] = {"s": round(held["s"] + spent, 2), "peak_GB": most}

        return call

    def get(owner, key):
        return owner[key] if isinstance(owner, dict) else getattr(owner, key)

    def put(owner, key, value):
        owner.__setitem__(key, value) if isinstance(owner, dict) else setattr(owner, key, value)

    kept = {name: get(*place) for name, place in places.items()}
    for name, place in places.items():
        put(*place, around(name, kept[name]))
    try:
        yield
    finally:
        for name, place in places.items():
            put(*place, kept[name])


def whole_run(kind: str, root: Path) -> dict:
    """A whole run by its phases: seconds and the most that was allocated; the certificate and the fused pipeline are the last ones."""
    steps = 2 if ARGS.tiny else 20
    config, manifest = configured(kind, root, max_train_steps=steps, checkpointing_steps=steps)
    phases, places = {}, {"load": (loop, "Network"), "encode": (loop, "load_data")}
    places |= {"steps": (loop.Trainer, "step"), "validate": (loop, "mark_losses"), "samples": (loop, "mark_pictures")}
    places |= {f"end: {form}": (results.FORMS, form) for form in results.FORMS}
    start = time.perf_counter()
    with timed(phases, places):
        record = loop.train(config, manifest, overwrite=True, progress=False)
    certificate = json.loads((Path(config.training.output_dir) / "lora_adapter" / "certificate.json").read_text())
    facts = {"s": round(time.perf_counter() - start, 1), "steps": record.steps, "phases": phases}
    return facts | {
        "certificate": sorted(certificate["forms"]),
        "precision": record.config["training"]["mixed_precision"],
    }


class Bench:
    """A trainer whose batch and mode are changed between rows."""

    def __init__(self, kind: str, root: Path):
        config, manifest = configured(
            kind, root, sample_every=0, save_pipeline=False, output_dir=root / f"{kind}-bench"
        )
        self.kind, self.trainer = kind, loop.Trainer(config, read_manifest(manifest))
        self.trainer.network.forget_autoencoder()
        self.work = None

    def deal(self, batch: int) -> None:
        """Batches of another size from now on."""
        stream = self.trainer.data.streams[0]
        shapes = stream.plan.shapes
        stream.plan, self.trainer.learner.ahead = Plan(shapes, batch, 0, [16] * len(shapes)), {}  # no batch is smaller

    def gflop(self) -> float:
        """The work of one image."""
        if not ARGS.tiny:
            return GFLOP[self.kind]
        if self.work is None:
            self.deal(1)
            with FlopCounterMode(display=False) as counted:
                self.trainer.learner.learn(self.trainer.state.step)
            self.trainer.updates.optimizer.zero_grad()
            self.work = counted.get_total_flops() / 1e9
        return self.work

    def enqueue(self) -> float:
        """Seconds until a step's forward and backward pass are ordered; a full queue makes it the time of the card."""
        wait()
        start = time.perf_counter()
        self.trainer.learner.learn(self.trainer.state.step)
        self.trainer.updates.limit_gradients()
        spent = time.perf_counter() - start
        self.trainer.updates.optimizer.zero_grad()
        wait()
        return spent

    def steps(self, batch: int) -> dict:
        """Images per second and what stands in their way."""
        work = self.gflop()
        self.deal(batch)
        forget()
        first = time.perf_counter()
        self.trainer.step()
        wait()
        first = time.perf_counter() - first
        warm, spent = time.perf_counter(), []
        while len(spent) < (1 if ARGS.tiny else 20) and (time.perf_counter() - warm < 5 or len(spent) < 3):
            start = time.perf_counter()
            self.trainer.step()
            spent.append(time.perf_counter() - start)
        repeats = 1 if ARGS.tiny else max(3, min(50, int(2 / statistics.median(spent))))
        step = seconds_of(self.trainer.step, repeats)
        enqueue = statistics.median(self.enqueue() for _ in range(1 if ARGS.tiny else 5))
        facts = {"batch": batch, "images_s": round(batch / step, 2), "step_ms": round(1000 * step, 2)}
        facts |= {"enqueue_ms": round(1000 * enqueue, 2), "first_step_s": round(first, 1), "peak_GB": peak()}
        best = REPORT["rows"].get("machine", {})
        best = max((v for k, v in best.items() if k.endswith("16_tflops")), default=0)
        tflops = batch * work / 1000 / step
        facts |= {"tflops": round(tflops, 2), "steps_a_window": repeats}
        return facts | ({"mfu": round(tflops / best, 4), "mfu_of_989": round(tflops / 989, 4)} if best else {})

    def compiled(self, batch: int) -> dict:
        """The same with the denoiser's blocks compiled for this batch; how long that took, and how far the gradients are from eager ones."""
        torch._dynamo.reset()
        self.deal(batch)
        self.trainer.network.set_mode(True)
        start = time.perf_counter()
        apart = self.trainer.compile()
        facts = {"compile_s": round(time.perf_counter() - start, 1), "gradients_apart": round(apart, 5)}
        return facts | self.steps(batch)


def trained(kind: str, root: Path) -> None:
    """The rows of training steps, eager first: what is compiled stays so."""
    bench = []
    row(
        f"{kind} trainer",
        lambda: bench.append(Bench(kind, root)) or {"images": len(bench[0].trainer.data.streams[0].images)},
    )
    for batch in BATCHES[kind] if bench else ():
        row(f"{kind} batch {batch}", bench[0].steps, batch)
    for batch in (BATCHES[kind][-1], 1) if bench and not ARGS.tiny else ():  # a tiny one would take g++ a minute
        row(f"{kind} batch {batch} compiled", bench[0].compiled, batch)


def drawn(kind: str, root: Path, batch: int, fused: bool) -> dict:
    """From texts to pictures, with the adapter of the whole run in its place or fused."""
    run = load_run(root / f"{kind}-run", device=ARGS.device, fuse_scale=1.0 if fused else None)
    steps, prompts = (2 if ARGS.tiny else 50), ["noise"] * batch
    how = {"guidance_scale": 7.5, "size": SIDE[kind], "batch_size": batch}
    render(run, prompts, list(range(batch)), num_inference_steps=2, **how)
    forget()
    wait()
    start = time.perf_counter()
    render(run, prompts, list(range(batch)), num_inference_steps=steps, **how)
    wait()
    spent = time.perf_counter() - start
    facts = {"s": round(spent, 3), "forwards_s": round(2 * batch * steps / spent, 1), "peak_GB": peak()}
    return facts | {"dtype": str(run.pipe.unet.dtype), "scheduler": type(run.pipe.scheduler).__name__}


def decoded(kind: str, root: Path, dtype: torch.dtype) -> dict:
    """A base loaded in half precision decodes latents to finite pixels, under autocast too."""
    pipe, side = load_base(str(root / kind), ARGS.device, dtype), SIDE[kind] // 8
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(ARGS.device, dtype)
    forget()
    start = time.perf_counter()
    with torch.autocast(ARGS.device, dtype):
        (picture,) = decode_latents(pipe, 10 * latents)  # raises where a pixel is not finite
    return {
        "s": round(time.perf_counter() - start, 2),
        "vae": str(pipe.vae.dtype),
        "size": picture.size,
        "peak_GB": peak(),
    }


def main() -> None:
    logging.getLogger("lora_mvp").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="lora-mvp-gpu-", dir=ARGS.dir) as temp:
        root = Path(temp)
        row("machine", machine)
        for kind in ARGS.kinds:
            row(f"{kind} base", lambda kind=kind: {"made": make_base(kind, root).name})
            row(f"{kind} whole run", whole_run, kind, root)
            for name in ("float16", "bfloat16"):
                row(f"{kind} decode {name}", decoded, kind, root, getattr(torch, name))
            for batch, fused in ((1, False), (1, True), (4, True)) if kind == "sd15" else ((1, True),):
                row(f"{kind} draw {batch}{' fused' if fused else ''}", drawn, kind, root, batch, fused)
            trained(kind, root)
            shutil.rmtree(root / f"{kind}-run", ignore_errors=True)
    save()
    bad = [name for name, facts in REPORT["rows"].items() if "error" in facts]
    print(
        f"{ARGS.out}: {len(REPORT['rows'])} rows in {REPORT['seconds']} s"
        + (f"; not measured: {', '.join(bad)}" if bad else "")
    )


if __name__ == "__main__":
    main()
