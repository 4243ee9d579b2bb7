"""What `forks` has imported before it forks; nothing of this package."""

import accelerate  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch._dynamo  # noqa: F401
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401
