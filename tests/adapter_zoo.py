"""Small adapters as other programs write them, and with the accidents that happen to files: a zoo for tests.

Each plain animal is made of the layers of a base, so that it can be loaded, and comes with the change of each weight that it
stands for, computed here by the formulas of its algorithm.
"""

import json
import struct

import torch
from safetensors.torch import save, save_file

RANK, ALPHA = 4, 2.0
META = "lora_adapter_metadata"  # where diffusers keeps peft's settings


def layers_of(pipe) -> dict[str, torch.nn.Module]:
    """A few layers of each kind by `part.module`, text encoders with the `text_model.` of everybody's files."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, part, None)
        for name, layer in module.named_modules() if module is not None else ():
            name = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            if name.startswith(("down_blocks.1.attentions.0", "down_blocks.0.attentions.0")):
                wanted = name.endswith(("attn1.to_q", "attn2.to_k", "attn2.to_v", "to_out.0", "ff.net.0.proj"))
            else:
                wanted = name.endswith(
                    (
                        "down_blocks.0.resnets.0.conv1",
                        "layers.0.self_attn.q_proj",
                        "layers.0.self_attn.out_proj",
                        "layers.1.mlp.fc1",
                    )
                )
            if wanted:
                found[f"{part}.{name}"] = layer
    return found


def rand(*shape, by=0.05):
    return torch.randn(shape) * by


class Zoo:
    """Writes animals of a base into a folder; `deltas` holds what each does to each layer's weight."""

    def __init__(self, pipe, folder):
        torch.manual_seed(0)
        self.layers, self.folder, self.deltas = layers_of(pipe), folder, {}
        self.two = hasattr(pipe, "text_encoder_2")
        self.pairs = {}
        for name, layer in self.layers.items():
            o, i, *kernel = layer.weight.shape
            self.pairs[name] = (rand(RANK, i, *kernel), rand(o, RANK, *[1] * len(kernel)))

    def linear(self):
        return {name: pair for name, pair in self.pairs.items() if pair[0].ndim == 2}

    def kohya_name(self, name):
        part, _, module = name.partition(".")
        start = {"unet": "unet", "text_encoder": "te1" if self.two else "te", "text_encoder_2": "te2"}[part]
        return f"lora_{start}_{module.replace('.', '_')}"

    def write(self, animal, tensors, metadata=None, deltas=None):
        file = self.folder / f"{animal}.safetensors"
        metadata = {"ss_base_model_version": "sdxl_base_v1-0" if self.two else "sd_v1"} | (metadata or {})
        save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
        if deltas is not None:
            self.deltas[animal] = deltas
        return file

    def delta(self, name, scale=1.0):
        down, up = self.pairs[name]
        return scale * (up.flatten(1) @ down.flatten(1)).reshape(self.layers[name].weight.shape)

    def kohya(self, animal="kohya", dtype=torch.float32, alpha=ALPHA, names=None, more=None, metadata=None):
        """sd-scripts: `lora_down`, `lora_up` and `alpha` under names with underscores."""
        tensors, names = {}, names or list(self.pairs)
        for name in names:
            key, (down, up) = self.kohya_name(name), self.pairs[name]
            tensors |= {f"{key}.lora_down.weight": down.to(dtype), f"{key}.lora_up.weight": up.to(dtype)}
            tensors |= {} if alpha is None else {f"{key}.alpha": torch.as_tensor(alpha)}
        scale = 1.0 if alpha is None else float(torch.as_tensor(alpha).flatten()[0]) / RANK
        deltas = {name: self.delta(name, scale) for name in names} if dtype == torch.float32 and not more else None
        return self.write(animal, tensors | (more or {}), metadata, deltas)

    def dotted(self, animal, prefix="", down=".lora_A.weight", up=".lora_B.weight", metadata=None, **where):
        """diffusers, peft and their older selves: names with dots."""
        tensors, names = (
            {},
            where.get("names") or [name for name in self.linear() if where.get("text", True) or name[:5] == "unet."],
        )
        for name in names:
            key = name.partition(".")[2] if where.get("bare") else name
            for old, new in where.get("rename", {}).items():
                key = key.replace(old, new)
            tensors |= {f"{prefix}{key}{down}": self.pairs[name][0], f"{prefix}{key}{up}": self.pairs[name][1]}
        return self.write(
            animal, tensors, metadata, {name: self.delta(name, where.get("scale", 1.0)) for name in names}
        )

    def loha(self):
        """LyCORIS' LoHa: the Hadamard product of two products."""
        tensors, deltas = {}, {}
        for name in self.linear():
            o, i = self.layers[name].weight.shape
            a, b, c, d = rand(o, RANK, by=0.3), rand(RANK, i, by=0.3), rand(o, RANK, by=0.3), rand(RANK, i, by=0.3)
            key = self.kohya_name(name)
            tensors |= {f"{key}.hada_w1_a": a, f"{key}.hada_w1_b": b, f"{key}.hada_w2_a": c, f"{key}.hada_w2_b": d}
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
            deltas[name] = ALPHA / RANK * (a @ b) * (c @ d)
        return self.write("loha", tensors, None, deltas)

    def lokr(self, whole=False):
        """LyCORIS' LoKr: a Kronecker product, of which the second factor may be a product."""
        tensors, deltas = {}, {}
        for name in self.linear():
            o, i = self.layers[name].weight.shape
            one, two = rand(4, 4, by=0.3), rand(o // 4, i // 4, by=0.3)
            a, b, key = rand(o // 4, RANK, by=0.3), rand(RANK, i // 4, by=0.3), self.kohya_name(name)
            tensors |= {f"{key}.lokr_w1": one, f"{key}.alpha": torch.tensor(ALPHA)}
            tensors |= {f"{key}.lokr_w2": two} if whole else {f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
            deltas[name] = torch.kron(one, two) if whole else ALPHA / RANK * torch.kron(one, a @ b)
        return self.write("lokr_whole" if whole else "lokr", tensors, None, deltas)

    def tucker(self):
        """LyCORIS' LoCon with a middle matrix: down 1x1, middle with the kernel, up 1x1."""
        (name,) = (name for name, pair in self.pairs.items() if pair[0].ndim == 4)
        o, i, *kernel = self.layers[name].weight.shape
        down, mid, up = rand(RANK, i, 1, 1, by=0.3), rand(RANK, RANK, *kernel, by=0.3), rand(o, RANK, 1, 1, by=0.3)
        key = self.kohya_name(name)
        tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
        delta = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
        return self.write("tucker", tensors, None, {name: delta / RANK})

    def dora(self, rows: bool):
        """DoRA: the sum's rows, or its columns, get a length of their own."""
        tensors, deltas = {}, {}
        convolution = next(name for name, layer in self.layers.items() if layer.weight.ndim == 4)
        for name in [*self.linear(), convolution]:
            weight, key = self.layers[name].weight.detach(), self.kohya_name(name)
            total = weight + self.delta(name, ALPHA / RANK)
            axes = [axis for axis in range(weight.ndim) if axis != (0 if rows else 1)]
            length = weight.square().sum(axes, keepdim=True).sqrt() * (1 + rand(1, by=0.1))
            down, up = self.pairs[name]
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": length}
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
            deltas[name] = total * length / total.square().sum(axes, keepdim=True).sqrt() - weight
        return self.write("dora_rows" if rows else "dora_cols", tensors, None, deltas)

    def full(self):
        """Whole differences."""
        deltas = {name: self.delta(name) for name in self.linear()}
        return self.write(
            "full", {f"{self.kohya_name(name)}.diff": value for name, value in deltas.items()}, None, deltas
        )

    def readable(self):
        """All that this package reads into a base, by name."""
        text = [name for name in self.linear() if not name.startswith("unet.")]
        old = {"attn1.": "attn1.processor.", "attn2.": "attn2.processor.", "to_out.0": "to_out"}
        attention = [name for name in self.linear() if "attn" in name and name.startswith("unet.")]
        several = {}
        files = [
            self.kohya(),
            self.kohya("kohya_noalpha", alpha=None),
            self.kohya("kohya_vector_alpha", alpha=[ALPHA]),
            self.kohya("text_only", names=text),
            self.dotted("diffusers"),
            self.dotted("linear_layer", down=".lora_linear_layer.down.weight", up=".lora_linear_layer.up.weight"),
            self.dotted(
                "linear_layer_unet",
                down=".lora_linear_layer.down.weight",
                up=".lora_linear_layer.up.weight",
                text=False,
            ),
            self.dotted("peft", "base_model.model.", text=False),
            self.dotted("peft_bare", "base_model.model.", text=False, bare=True),
            self.dotted("peft_default", down=".lora_A.default.weight", up=".lora_B.default.weight"),
            self.dotted("bare", bare=True, text=False),
            self.dotted("processors", down="_lora.down.weight", up="_lora.up.weight", rename=old, names=attention),
            self.dotted(
                "processors_bare",
                down="_lora.down.weight",
                up="_lora.up.weight",
                rename=old,
                names=attention,
                bare=True,
            ),
            self.loha(),
            self.lokr(),
            self.lokr(whole=True),
            self.tucker(),
            self.dora(rows=True),
            self.dora(rows=False),
            self.full(),
        ]
        names = list(self.linear())
        for k, name in enumerate(names):
            several[f"{self.kohya_name(name)}.lora_down.weight"] = self.pairs[name][0]
            several[f"{self.kohya_name(name)}.lora_up.weight"] = self.pairs[name][1]
            several[f"{self.kohya_name(name)}.alpha"] = torch.tensor(1.0 + k % 3)
        deltas = {name: self.delta(name, (1.0 + k % 3) / RANK) for k, name in enumerate(names)}
        files.append(self.write("several_alphas", several, None, deltas))
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
            files.append(self.kohya(str(dtype).removeprefix("torch."), dtype=dtype))
            rounded = {name: (down.to(dtype).float(), up.to(dtype).float()) for name, (down, up) in self.pairs.items()}
            self.deltas[files[-1].stem] = {
                name: ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).reshape(self.layers[name].weight.shape)
                for name, (down, up) in rounded.items()
            }
        return {file.stem: file for file in files}


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


__all__ = ["ALPHA", "META", "RANK", "Zoo", "layers_of", "rand", "raw", "save"]
