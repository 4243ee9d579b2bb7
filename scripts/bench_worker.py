"""One contestant of bench_vs_peers.py: a trainer that stands still between blocks of steps. It needs torch, and nothing of lora_mvp.

A peer's script runs as it is. Two public hooks surround it: torch's hook after an optimizer step counts steps and waits for
the next order from stdin, and the accelerator's `backward` keeps the losses. Orders are lines: a number of steps, or `count`
for one step whose operators are counted. Each is answered by a line of JSON on the stdout that the process began with.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path


class Gate:
    """Lets an optimizer take as many steps as it was ordered to, and says what they cost."""

    def __init__(self, torch, answers):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.torch, self.answers, self.left, self.taken, self.counter = torch, answers, 3, 0, None  # three to get warm
        self.begun = self.now()
        register_optimizer_step_post_hook(self.stepped)

    @staticmethod
    def now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def say(self, **facts) -> None:
        self.answers.write(json.dumps(facts) + "\n")
        self.answers.flush()

    def stepped(self, *_) -> None:
        """After each optimizer step."""
        self.taken, self.left = self.taken + 1, self.left - 1
        if self.left:
            return
        cpu, wall = (after - before for after, before in zip(self.now(), self.begun, strict=True))
        operators = self.counter.close() if self.counter else None
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
        self.say(cpu_s=cpu, s=wall, steps=self.taken, peak_rss_mb=peak, operators=operators)
        order = sys.stdin.readline().strip()
        if not order:
            os._exit(0)  # wherever the script is
        self.taken, self.counter = 0, Counter(self.torch) if order == "count" else None
        self.left, self.begun = 1 if order == "count" else int(order), self.now()


class Counter:
    """Counts the operators that torch is asked for, without views, until it is closed."""

    def __init__(self, torch):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                Mode.count += not function.is_view
                return function(*args, **(kwargs or {}))

        self.mode, self.kind = Mode(), Mode
        self.mode.__enter__()

    def close(self) -> int:
        self.mode.__exit__(None, None, None)
        return self.kind.count


def run_script(script: Path, flags: list) -> None:
    """A peer's script as its author wrote it."""
    sys.argv = [str(script), *map(str, flags)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def diffusers(job: dict) -> None:
    """diffusers' examples/text_to_image/train_text_to_image_lora.py."""
    flags = ["--pretrained_model_name_or_path", job["base"], "--train_data_dir", job["images"], "--rank", job["rank"]]
    flags += ["--resolution", job["side"], "--train_batch_size", job["batch"], "--max_train_steps", 10**6, "--seed", 0]
    flags += ["--learning_rate", 1e-4, "--lr_warmup_steps", 0, "--lr_scheduler", "constant", "--random_flip"]
    flags += ["--caption_column", "text", "--checkpointing_steps", 10**9, "--output_dir", job["out"]]
    flags += ["--cache_dir", job["out"] + "-cache"]
    run_script(Path(job["checkout"], "examples/text_to_image/train_text_to_image_lora.py"), flags)


def kohya(job: dict) -> None:
    """sd-scripts' train_network.py with its cache of latents, on the attention only, as the others train it."""
    shutil.copytree(Path(job["base"], "tokenizer"), Path(job["out"], "tok", "openai_clip-vit-large-patch14"))
    flags = ["--pretrained_model_name_or_path", job["base"], "--tokenizer_cache_dir", job["out"] + "/tok"]
    flags += ["--train_data_dir", job["kohya_images"], "--caption_extension", ".txt", "--resolution", job["side"]]
    flags += ["--train_batch_size", job["batch"], "--max_train_steps", 10**6, "--network_module", "networks.lora"]
    flags += ["--network_dim", job["rank"], "--network_alpha", job["rank"], "--network_train_unet_only", "--sdpa"]
    flags += ["--learning_rate", 1e-4, "--optimizer_type", "AdamW", "--lr_scheduler", "constant", "--seed", 0]
    flags += ["--mixed_precision", "no", "--flip_aug", "--max_data_loader_n_workers", 0, "--cache_latents"]
    flags += ["--output_dir", job["out"] + "/out", "--output_name", "x", "--save_model_as", "safetensors"]
    flags += ["--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", job["side"]]
    script, config = (
        Path(job["checkout"], "train_network.py"),
        json.loads(Path(job["base"], "unet/config.json").read_text()),
    )
    sys.path.insert(0, str(script.parent))
    import library.original_unet as unet
    import networks.lora

    widths = tuple(config["block_out_channels"])  # its UNet has those of SD 1.5 as constants of the module
    unet.BLOCK_OUT_CHANNELS, unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = widths, widths[0], widths[0] * 4
    unet.LAYERS_PER_BLOCK, unet.LAYERS_PER_BLOCK_UP = config["layers_per_block"], config["layers_per_block"] + 1
    unet.NORM_GROUPS = unet.TRANSFORMER_NORM_NUM_GROUPS = config["norm_num_groups"]
    unet.DOWN_BLOCK_TYPES, unet.UP_BLOCK_TYPES = list(config["down_block_types"]), list(config["up_block_types"])
    networks.lora.LoRANetwork.UNET_TARGET_REPLACE_MODULE = ["CrossAttention"]
    os.chdir(job["out"])
    run_script(script, flags)


def lora_mvp(job: dict) -> None:
    """This package, as `lora-mvp train` runs it."""
    from lora_mvp.config import load_config
    from lora_mvp.train.loop import train

    train(load_config(overrides=job["settings"]), job["manifest"], progress=False)


def bare(job: dict) -> None:
    """What the same work costs with no trainer around it: kept latents and texts, two matmuls a layer, AdamW, clipping."""
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)

    def load(kind, part):
        return kind.from_pretrained(job["base"], subfolder=part).requires_grad_(False)

    unet, vae, text = (
        load(UNet2DConditionModel, "unet"),
        load(AutoencoderKL, "vae"),
        load(CLIPTextModel, "text_encoder"),
    )
    tokens, noising = (
        CLIPTokenizer.from_pretrained(job["base"] + "/tokenizer"),
        DDPMScheduler.from_pretrained(job["base"], subfolder="scheduler"),
    )
    signal, sigma = noising.alphas_cumprod.sqrt(), (1 - noising.alphas_cumprod).sqrt()

    class Pair(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, rank = base, job["rank"]
            self.down = torch.nn.Parameter(torch.randn(rank, base.in_features) / rank)
            self.up = torch.nn.Parameter(torch.zeros(base.out_features, rank))

        def forward(self, x):
            return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    for name, module in list(unet.named_modules()):
        for child, base in list(module.named_children()):
            if isinstance(base, torch.nn.Linear) and f"{name}.{child}".endswith(("to_q", "to_k", "to_v", "to_out.0")):
                setattr(module, child, Pair(base))
    if job["batch"] == 1:
        unet.to(memory_format=torch.channels_last)
    unet.train()
    means, stds, states = [], [], []
    for file, caption in read_images(Path(job["images"])):
        picture = as_tensor(torch, file, job["side"])
        with torch.no_grad():
            latents = vae.encode(torch.stack([picture, picture.flip(-1)])).latent_dist
            ids = tokens([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
            states.append(text(ids)[0])
        means.append(latents.mean)
        stds.append(latents.std)
    means, stds, states = torch.stack(means), torch.stack(stds), torch.cat(states)
    del vae, text
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)
    while True:
        which, flip = torch.randint(0, len(means), (job["batch"],)), torch.randint(0, 2, (job["batch"],))
        latents = torch.addcmul(means[which, flip], stds[which, flip], torch.randn_like(means[which, flip])) * 0.18215
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (job["batch"],))
        noisy = signal[times].view(-1, 1, 1, 1) * latents + sigma[times].view(-1, 1, 1, 1) * noise
        loss = F.mse_loss(unet(noisy, times, states[which]).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def read_images(folder: Path):
    """Files and captions of a folder with metadata.jsonl."""
    rows = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return [(folder / row["file_name"], row["text"]) for row in rows]


def as_tensor(torch, file: Path, side: int):
    """A picture between -1 and 1, (3, side, side)."""
    import numpy as np
    from PIL import Image

    picture = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestant", choices=("lora_mvp", "bare", "diffusers", "kohya"))
    parser.add_argument("job", help="JSON")
    args = parser.parse_args()
    job = json.loads(args.job)
    answers = os.fdopen(os.dup(1), "w")  # what a trainer prints goes to stderr
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    if job.get("shim"):  # after these, or they take a stand-in for torchvision for the real one
        needed = {"peft": [], "accelerate": [], "transformers": ["CLIPTextModel", "CLIPTokenizer"]}
        needed["diffusers"] = ["AutoencoderKL", "StableDiffusionPipeline", "UNet2DConditionModel"]
        for package, names in needed.items():
            for name in names:
                getattr(importlib.import_module(package), name)
        sys.path.insert(0, job["shim"])
    Gate(torch, answers)
    globals()[args.contestant](job)


if __name__ == "__main__":
    main()
