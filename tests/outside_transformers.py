"""What another program makes of an adapter for a transformer, by that program's own code; for a process of its own.

    python tests/outside_transformers.py comfyui|sd-scripts CHECKOUT BASE FILE OUT

Puts the weights of the base in the folder BASE into the model class of the program in the folder CHECKOUT, lets the program change
them by the adapter, and writes answers to OUT: `bare` and `changed` are its model's before and after, `moved` is what diffusers' model
says with the changed weights. Z-Image is younger than the judged ComfyUI: there only the weights are changed by it, in its class for
Lumina, which has the names of Z-Image's attention and feed-forward. Where there is no FILE, sd-scripts writes one with random numbers.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from lora_mvp.models.base import load_base
from lora_mvp.models.families import denoiser, family_of
from lora_mvp.models.matrices import Matrix, matrices
from lora_mvp.models.proof import probe

WORDS = {"q": "norm_added_q", "k": "norm_added_k"}
PICTURE = {"q": "norm_q", "k": "norm_k"}


def norms(pipe) -> dict[str, str]:
    """What is no matrix: its name there -> in diffusers."""
    found, network = {}, denoiser(pipe)
    if family_of(pipe).name == "sd3":
        found["pos_embed"] = "pos_embed.pos_embed"
        for i in range(len(network.transformer_blocks)):
            for side, kind, own in (("x", "attn", PICTURE), ("x", "attn2", PICTURE), ("context", "attn", WORDS)):
                for x, name in own.items():
                    key = f"joint_blocks.{i}.{side}_block.{kind}.ln_{x}.weight"
                    found[key] = f"transformer_blocks.{i}.{kind}.{name}.weight"
    if family_of(pipe).name == "flux":
        for i in range(len(network.transformer_blocks)):
            for side, own in (("img", PICTURE), ("txt", WORDS)):
                for x, name in (("query", own["q"]), ("key", own["k"])):
                    key = f"double_blocks.{i}.{side}_attn.norm.{x}_norm.scale"
                    found[key] = f"transformer_blocks.{i}.attn.{name}.weight"
        for i in range(len(network.single_transformer_blocks)):
            for x, name in (("query", "norm_q"), ("key", "norm_k")):
                key = f"single_blocks.{i}.norm.{x}_norm.scale"
                found[key] = f"single_transformer_blocks.{i}.attn.{name}.weight"
    return {theirs: ours for theirs, ours in found.items() if ours in network.state_dict()}


def whole(pipe) -> dict[str, Matrix]:
    """The matrices, and FLUX's last two layers, which have no place in kohya's form."""
    last = {"final_layer.adaLN_modulation.1": Matrix(("norm_out.linear",), True)}
    last["final_layer.linear"] = Matrix(("proj_out",))
    return matrices(pipe) | (last if family_of(pipe).name == "flux" else {})


def theirs(pipe) -> dict[str, torch.Tensor]:
    """The base's weights as the original code has them."""
    state = denoiser(pipe).state_dict()
    found = {name: state[ours] for name, ours in norms(pipe).items()}
    for name, matrix in whole(pipe).items():
        for end in ("weight", "bias"):
            if f"{matrix.layers[0]}.{end}" in state:
                found[f"{name}.{end}"] = matrix.turned(torch.cat([state[f"{layer}.{end}"] for layer in matrix.layers]))
    return found


def answer(program: str, pipe, model, asked: dict) -> torch.Tensor:
    """What the program's model says to what diffusers' was asked."""
    args, how = asked["args"], asked["kwargs"]
    if family_of(pipe).name == "sd3":
        noisy, words, pooled, times = args
        return model(noisy, times, y=pooled, context=words)
    patches, words, pooled = args
    places = [how[name].expand(len(words), *how[name].shape) for name in ("img_ids", "txt_ids")]
    ask = model if program == "sd-scripts" else model.forward_orig
    return ask(patches, places[0], words, places[1], how["timestep"], y=pooled, guidance=how["guidance"])


def sd_scripts_model(pipe):
    """Its model for a base."""
    c = denoiser(pipe).config
    if family_of(pipe).name == "sd3":
        from library.sd3_models import SD3Params, create_sd3_mmdit

        most = c.pos_embed_max_size
        texts = (c.joint_attention_dim, c.caption_projection_dim)
        deep = (list(c.dual_attention_layers), *texts, "sd3")
        return create_sd3_mmdit(
            SD3Params(2, c.num_layers, most**2, most, c.pooled_projection_dim, "rms", *deep), "torch"
        )
    from library.flux_models import Flux, FluxParams

    return Flux(FluxParams(**flux_facts(c)))


def flux_facts(c) -> dict:
    """What both programs call a FLUX."""
    heads, width = c.num_attention_heads, c.num_attention_heads * c.attention_head_dim
    facts = {"in_channels": 64, "vec_in_dim": c.pooled_projection_dim, "context_in_dim": c.joint_attention_dim}
    facts |= {"hidden_size": width, "mlp_ratio": 4, "num_heads": heads, "depth": c.num_layers, "theta": 10000}
    facts |= {"depth_single_blocks": c.num_single_layers, "axes_dim": list(c.axes_dims_rope), "qkv_bias": True}
    return facts | {"guidance_embed": True}


def write_own(networks: ModuleType, model, file: str) -> None:
    """An adapter as sd-scripts makes it, with random numbers."""
    torch.manual_seed(0)
    tensors = {}
    for lora in networks.create_network(1.0, 4, 3.0, None, [], model).unet_loras:
        tensors[f"{lora.lora_name}.alpha"] = lora.alpha
        for kind in ("lora_down", "lora_up"):
            tensors[f"{lora.lora_name}.{kind}.weight"] = torch.randn(getattr(lora, kind).weight.shape) / 5
    save_file(tensors, file)


def sd_scripts(pipe, model, file: str) -> None:
    """As its merging does it."""
    networks = import_module(f"networks.lora_{family_of(pipe).name}")
    if not Path(file).exists():
        write_own(networks, model, file)
    network, tensors = networks.create_network_from_weights(1.0, file, None, [], model, for_inference=True)
    there = {lora.lora_name for lora in network.unet_loras}
    assert there == {name.partition(".")[0] for name in tensors}, "it has no place for some of the file's layers"
    network.merge_to([], model, tensors, torch.float32, "cpu")


def comfyui_model(pipe):
    """Its model for a base."""
    import comfy.ops

    c, own = denoiser(pipe).config, {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32}
    if family_of(pipe).name == "sd3":
        from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

        embedder = {"in_features": c.joint_attention_dim, "out_features": c.caption_projection_dim}
        own["context_embedder_config"] = {"target": "torch.nn.Linear", "params": embedder}
        own |= {"pos_embed_max_size": c.pos_embed_max_size, "num_patches": c.pos_embed_max_size**2, "in_channels": 16}
        own |= {"adm_in_channels": c.pooled_projection_dim, "x_block_self_attn_layers": list(c.dual_attention_layers)}
        return MMDiT(input_size=None, depth=c.num_layers, qk_norm="rms", **own)
    if family_of(pipe).name == "flux":
        from comfy.ldm.flux.model import Flux

        facts = flux_facts(c) | {"in_channels": 16, "out_channels": 16, "patch_size": 2}
        return Flux(image_model=None, final_layer=True, **facts, **own)
    from comfy.ldm.lumina.model import NextDiT

    hidden = denoiser(pipe).layers[0].feed_forward.w1.out_features
    own |= {
        "multiple_of": 1,
        "ffn_dim_multiplier": hidden / (4 * c.dim),
        "cap_feat_dim": c.cap_feat_dim,
        "qk_norm": True,
    }
    own |= {"n_layers": c.n_layers, "n_refiner_layers": c.n_refiner_layers, "n_heads": c.n_heads, "in_channels": 16}
    return NextDiT(dim=c.dim, axes_dims=c.axes_dims, axes_lens=c.axes_lens, **own)


def comfyui(pipe, model, file: str) -> None:
    """Names, reading and arithmetic are ComfyUI's."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_base

    c, kind = denoiser(pipe).config, {"sd3": "SD3", "flux": "Flux", "zimage": "Lumina2"}[family_of(pipe).name]
    held = torch.nn.Module.__new__(getattr(comfy.model_base, kind))
    torch.nn.Module.__init__(held)
    held.diffusion_model = model
    config = {"depth": getattr(c, "num_layers", 0), "depth_single_blocks": getattr(c, "num_single_layers", 0)}
    config |= {"hidden_size": getattr(model, "hidden_size", 0)}
    held.model_config = SimpleNamespace(unet_config=config)
    tensors = comfy.lora_convert.convert_lora(load_file(file))
    weights, told = held.state_dict(), comfy.lora.model_lora_keys_unet(held, {})
    patches = comfy.lora.load_lora(tensors, told)
    assert {name for patch in patches.values() for name in patch.loaded_keys} == set(tensors), "it leaves tensors out"
    for key, patch in patches.items():
        name, offset, turn = (*([key] if isinstance(key, str) else key), None, None)[:3]
        weights[name] = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, turn)], weights[name].clone(), name)
        held.load_state_dict(weights)


def moved(pipe, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """What diffusers' model says with the program's weights."""
    state = denoiser(pipe).state_dict()
    for name, matrix in whole(pipe).items():
        if f"{name}.weight" in weights:
            rows = matrix.turned(weights[f"{name}.weight"]).split([len(state[f"{x}.weight"]) for x in matrix.layers])
            state |= {f"{layer}.weight": own for layer, own in zip(matrix.layers, rows, strict=True)}
    denoiser(pipe).load_state_dict(state)
    return probe(pipe)["transformer"]


@torch.no_grad()
def judged(program: str, base: str, file: str) -> dict[str, torch.Tensor]:
    """The answers before and after."""
    pipe, asked = load_base(base), {}
    handle = denoiser(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: asked.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    probe(pipe)
    handle.remove()
    model = {"comfyui": comfyui_model, "sd-scripts": sd_scripts_model}[program](pipe).eval()
    change, weights = {"comfyui": comfyui, "sd-scripts": sd_scripts}[program], theirs(pipe)
    if family_of(pipe).name == "zimage":
        weights = {name: value for name, value in weights.items() if ".attention." in name or ".feed_forward." in name}
        assert weights.keys() <= model.state_dict().keys()
        model.load_state_dict(weights, strict=False)
        change(pipe, model, file)
        found = {}
    else:
        model.load_state_dict(weights)
        found = {"bare": answer(program, pipe, model, asked)}
        change(pipe, model, file)
        found["changed"] = answer(program, pipe, model, asked)
    state = model.state_dict()
    return found | {"moved": moved(pipe, {name: state[name] for name in weights})}


if __name__ == "__main__":
    program, checkout, base, file, out = sys.argv[1:]
    sys.path.insert(0, checkout)
    sys.modules["torchvision"] = ModuleType("torchvision")  # both import it, and none of this uses it
    sys.modules["torchvision"].transforms = None
    if program == "comfyui":
        from comfy.cli_args import args as options

        options.cpu = True  # before the rest of it looks for a card
    save_file({name: value.contiguous() for name, value in judged(program, base, file).items()}, out)
