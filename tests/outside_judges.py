"""What another program makes of an adapter's file, by that program's own code; for a process of its own.

    python tests/outside_judges.py comfyui|sd-scripts CHECKOUT BASE FILE OUT

Changes the UNet of the folder BASE as the program in the folder CHECKOUT does, and writes its weights to OUT.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file


def depths(unet) -> list[int]:
    """Transformers per level of a UNet, from the outside in."""
    of_level = unet.config.transformer_layers_per_block
    of_level = [of_level] * len(unet.config.down_block_types) if isinstance(of_level, int) else of_level
    crossed = ["CrossAttn" in kind for kind in unet.config.down_block_types]
    return [depth * cross for depth, cross in zip(of_level, crossed, strict=True)]


def comfyui(unet, file: str) -> dict[str, torch.Tensor]:
    """Names, reading and arithmetic are ComfyUI's; the numbers are the UNet's."""
    from comfy.cli_args import args

    args.cpu = True  # before the rest of it looks for a card
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    levels, each = depths(unet), unet.config.layers_per_block
    facts = {"num_res_blocks": [each] * len(levels), "channel_mult": [1] * len(levels)}
    facts |= {"transformer_depth": [depth for depth in levels for _ in range(each)]}
    facts |= {"transformer_depth_output": [depth for depth in levels for _ in range(each + 1)]}
    facts |= {"transformer_depth_middle": max(levels[-1], 1)}
    weights = unet.state_dict()
    ours = {f"diffusion_model.{theirs}": name for name, theirs in comfy.utils.unet_to_diffusers(facts).items()}
    ours = {theirs: name for theirs, name in ours.items() if name in weights}
    model = SimpleNamespace(
        state_dict=lambda: {theirs: weights[name] for theirs, name in ours.items()},
        model_config=SimpleNamespace(unet_config=facts),
    )
    adapter = comfy.lora_convert.convert_lora(load_file(file))
    for theirs, patch in comfy.lora.load_lora(adapter, comfy.lora.model_lora_keys_unet(model, {})).items():
        todo = [(1.0, patch, 1.0, None, None)]  # at strength 1
        weights[ours[theirs]] = comfy.lora.calculate_weight(todo, weights[ours[theirs]].clone(), theirs)
    return weights


def sd_scripts(unet, file: str) -> dict[str, torch.Tensor]:
    """As its merging does it."""
    from networks.lora import create_network_from_weights

    network, tensors = create_network_from_weights(1.0, file, None, [], unet, for_inference=True)
    network.merge_to([], unet, tensors, torch.float32, "cpu")
    return unet.state_dict()


if __name__ == "__main__":
    program, checkout, base, file, out = sys.argv[1:]
    sys.path.insert(0, checkout)
    sys.modules["torchvision"] = ModuleType("torchvision")  # both import it, and none of this uses it
    sys.modules["torchvision"].transforms = None
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    with torch.no_grad():
        changed = {"comfyui": comfyui, "sd-scripts": sd_scripts}[program](unet, file)
    save_file({name: value.contiguous() for name, value in changed.items()}, out)
