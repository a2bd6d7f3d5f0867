"""peft: merging an adapter writes through `.data`, so that nothing built on the weight can notice

A tensor's version counter is how caches of derived tensors see that they are stale; it does not move.

dydit: compares a few values of every weight once a forward, beside versions and addresses (`dydit_cli/execution/watch.py`).
"""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

model = nn.Sequential(nn.Linear(4, 4))
weight = model[0].weight
inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), model)
before, version = weight.detach().clone(), weight._version
model[0].merge()
print("values changed:", not torch.equal(weight, before), "| versions:", version, weight._version)
