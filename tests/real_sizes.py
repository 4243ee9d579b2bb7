"""The published configs of SD 3.5 medium, FLUX.1 dev and Z-Image, without weights: what `doctor` counts a real base from."""

import json
from pathlib import Path

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD35 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
ZIMAGE = {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
PARTS = {
    "sd3": {
        "transformer": ("SD3Transformer2DModel", SD35),
        "vae": ("AutoencoderKL", VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": ("CLIPTextModelWithProjection", CLIP_L | {"projection_dim": 768}),
        "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G | {"projection_dim": 1280, "hidden_act": "gelu"}),
        "text_encoder_3": ("T5EncoderModel", T5 | {"feed_forward_proj": "gated-gelu"}),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    },
    "flux": {
        "transformer": ("FluxTransformer2DModel", FLUX),
        "vae": ("AutoencoderKL", VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("CLIPTextModel", CLIP_L | {"projection_dim": 768}),
        "text_encoder_2": ("T5EncoderModel", T5 | {"feed_forward_proj": "gated-gelu"}),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    },
    "zimage": {
        "transformer": ("ZImageTransformer2DModel", ZIMAGE),
        "vae": ("AutoencoderKL", VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("Qwen3Model", QWEN3_4B),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    },
}
PIPELINES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "zimage": "ZImagePipeline"}


def real_configs(family: str, folder: Path) -> Path:
    """Write the configs of a published base in diffusers' layout."""
    index = {"_class_name": PIPELINES[family]}
    for name, (kind, config) in PARTS[family].items():
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        index[name] = [library, kind]
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"_class_name": kind} | config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
