"""diffusers: `DDIMScheduler` with "linspace" spacing steps to other timesteps than it visits

The timesteps lie 333 apart, and each step is computed as if the next one were 250 away, because the previous timestep is taken to be
`timestep - num_train_timesteps // num_inference_steps` whatever the spacing. "leading" is not affected, nor is "trailing" where the steps
divide 1,000. Reported as [diffusers#11347](https://github.com/huggingface/diffusers/issues/11347) and
[#12633](https://github.com/huggingface/diffusers/issues/12633).

dydit: builds the scheduler on the betas of the respaced chain, in which every timestep is used, as the original DiT does
(`dydit_cli/sampling/diffusion.py`); exports carry "trailing".
"""

import torch
from diffusers import DDIMScheduler

scheduler = DDIMScheduler(timestep_spacing="linspace", clip_sample=False)
scheduler.set_timesteps(4)
alphas, noise, data = scheduler.alphas_cumprod, torch.tensor([0.5]), torch.tensor([2.0])
time, following = scheduler.timesteps[:2].tolist()
state = alphas[time] ** 0.5 * data + (1 - alphas[time]) ** 0.5 * noise
moved = scheduler.step(noise, time, state).prev_sample  # with the true noise, DDIM is exact
for at in (following, time - 1000 // 4):
    exact = alphas[at] ** 0.5 * data + (1 - alphas[at]) ** 0.5 * noise
    print(f"{time} -> {at}: exact {exact.item():.4f}, step gives {moved.item():.4f}")
print("timesteps:", scheduler.timesteps.tolist())
