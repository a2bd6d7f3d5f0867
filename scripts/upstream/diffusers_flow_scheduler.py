"""diffusers: `FlowMatchEulerDiscreteScheduler` does not run in `DiTPipeline`

The pipeline calls `scale_model_input`, which the common interface of schedulers has and this one lacks.

dydit: exports a SiT with `DPMSolverMultistepScheduler` of first order on flow sigmas, which is the same method
([export.md](export.md#scheduler-and-guidance)).
"""

from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

transformer = DiTTransformer2DModel(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    sample_size=4,
)
pipeline = DiTPipeline(
    transformer, AutoencoderKL(block_out_channels=(32,)), FlowMatchEulerDiscreteScheduler()
)
pipeline.set_progress_bar_config(disable=True)
try:
    pipeline([3], num_inference_steps=1)
except Exception as error:
    print(type(error).__name__, error)
