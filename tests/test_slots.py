"""Scorers of others at their published size, with random weights; the chapters on slots and preferences prove the rest on small ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_mvp.eval.extractors import find_extractor


def large_tower() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the picture tower of CLIP ViT-L/14 as OpenAI's code names them."""
    n = 1024
    shapes = {"class_embedding": (n,), "positional_embedding": (257, n), "conv1.weight": (n, 3, 14, 14)}
    shapes |= {f"{name}.{end}": (n,) for name in ("ln_pre", "ln_post") for end in ("weight", "bias")}
    block = {"attn.in_proj_weight": (3 * n, n), "attn.in_proj_bias": (3 * n,), "attn.out_proj.weight": (n, n)}
    block |= {"mlp.c_fc.weight": (4 * n, n), "mlp.c_fc.bias": (4 * n,), "mlp.c_proj.weight": (n, 4 * n)}
    block |= {f"{name}.{end}": (n,) for name in ("ln_1", "ln_2") for end in ("weight", "bias")}
    block |= {"attn.out_proj.bias": (n,), "mlp.c_proj.bias": (n,)}
    return shapes | {f"transformer.resblocks.{k}.{name}": s for k in range(24) for name, s in block.items()}


@pytest.mark.slow
def test_a_csd_of_the_published_size_is_read_and_used(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = {f"module.backbone.{name}": 0.02 * torch.randn(s, generator=g) for name, s in large_tower().items()}
    weights |= {f"module.last_layer_{head}": torch.randn(1024, 768, generator=g) for head in ("style", "content")}
    assert len(weights) == 297  # as in the published file
    torch.save({"model_state_dict": weights, "iter": 1}, tmp_path / "pytorch_model.bin")
    csd = find_extractor(f"csd:{tmp_path}")
    rows = csd.image_features([Image.new("RGB", (300, 240), colour) for colour in ("teal", "red")])
    assert rows.shape == (2, 768) and np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.abs(rows[0] - rows[1]).max() > 1e-4
