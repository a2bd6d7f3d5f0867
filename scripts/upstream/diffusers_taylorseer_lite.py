"""diffusers: TaylorSeer's lite mode gives wrong outputs for models whose last layer is not called `proj_out`

It skips all blocks and predicts the output of the last layer, which it looks for under that name alone. Where there is none, blocks are
skipped and nothing is predicted. Here diffusers' DiT, given the methods of `CacheMixin`, sees the same input at every step, so that each
output has to be that of the first step.

dydit: `enable_cache` names the last layer itself (`dydit_cli/families/caching.py`).
"""

import torch
from diffusers import DiTTransformer2DModel, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin


class CachedDiT(DiTTransformer2DModel, CacheMixin):
    pass


torch.manual_seed(0)
model = CachedDiT(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
model.enable_cache(TaylorSeerCacheConfig(use_lite_mode=True, cache_interval=3, disable_cache_before_step=1))
sample, labels = torch.randn(1, 4, 8, 8), torch.tensor([1])
outputs = []
for _ in range(4):
    with torch.no_grad(), model.cache_context("steps"):
        outputs.append(model(sample, timestep=torch.tensor([500]), class_labels=labels).sample)
for step, output in enumerate(outputs):
    print(f"step {step}: largest difference from step 0: {(output - outputs[0]).abs().max():.3f}")
