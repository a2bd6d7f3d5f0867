"""diffusers: a LoRA's keys that its converter does not know are dropped

Here a kohya file with one layer under another trainer's prefix: what comes back has the other layer alone, and nothing is raised.

dydit: `convert --lora` looks for such keys itself and refuses the file with their names (`dydit_cli/conversion/lora.py`).
"""

import torch
from diffusers.loaders import FluxLoraLoaderMixin

layers = ("lora_unet_double_blocks_0_img_mlp_0", "lycoris_double_blocks_1_img_mlp_0")
file = {}
for layer in layers:
    file[f"{layer}.lora_down.weight"] = torch.randn(4, 3072)
    file[f"{layer}.lora_up.weight"] = torch.randn(12288, 4)
    file[f"{layer}.alpha"] = torch.tensor(4.0)
converted = FluxLoraLoaderMixin.lora_state_dict(file)
print(f"{len(layers)} layers in the file; after conversion:")
print(*sorted(converted), sep="\n")
