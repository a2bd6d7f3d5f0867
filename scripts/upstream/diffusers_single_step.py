"""diffusers: one step with "linspace" spacing starts at timestep 0

Pure noise is handed to the model as a clean image; "trailing" gives 999.

dydit: a single step stands at 999 (`dydit_cli/sampling/diffusion.py`).
"""

from diffusers import DDIMScheduler, DDPMScheduler

for scheduler in (DDPMScheduler, DDIMScheduler):
    one = scheduler(timestep_spacing="linspace")
    one.set_timesteps(1)
    print(scheduler.__name__, one.timesteps.tolist())
