"""diffusers: `DiTPipeline` sends class 1000 for "no class" whatever the number of classes

A model of 10 classes has its null class at 10. The pipeline knows the model's configuration and does not ask it.

dydit: its models take every label from `num_classes` upwards for the null class ([conventions.md](conventions.md)).
"""

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

transformer = DiTTransformer2DModel(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    sample_size=4,
    num_embeds_ada_norm=10,
)
pipeline = DiTPipeline(transformer, AutoencoderKL(block_out_channels=(32,)), DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)
try:
    pipeline([3], num_inference_steps=1)
except Exception as error:
    print(type(error).__name__, error)
