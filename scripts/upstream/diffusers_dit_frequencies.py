"""diffusers: `DiTTransformer2DModel` embeds timesteps with other frequencies than the DiT whose weights it loads

The original divides the exponents by 128, diffusers by 127. The published weights were trained with the former. The MLP's LayerNorm has
an epsilon of 1e-5 by default, too, where the original's is 1e-6.

dydit: keeps both numbers in the configuration (`frequency_shift`, `mlp_norm_eps`), so that a converted model computes what its source
computes, whichever that was ([checkpoints.md](checkpoints.md#dit-from-diffusers)).
"""

import math

import torch
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=16, num_layers=1, sample_size=4)
norms = model.transformer_blocks[0]
timestep = torch.tensor([500])
theirs = norms.norm1.emb.time_proj(timestep)
frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
original = torch.cat([torch.cos(500 * frequencies), torch.sin(500 * frequencies)])[None]
print(
    f"largest difference of the embeddings of t = 500, which lie in [-1, 1]: {(theirs - original).abs().max():.3f}"
)
print("eps of the LayerNorm before the MLP:", norms.norm3.eps)
