"""torch: fused optimisers change parameters without a new version

The plain optimiser raises the counter, the fused one does not, so that a cache of derived tensors sees nothing.

dydit: compares a few values of every weight once a forward, beside versions and addresses (`dydit_cli/execution/watch.py`).
"""

import torch

for fused in (False, True):
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    weight.grad = torch.ones(3)
    version = weight._version
    optimiser.step()
    print(f"fused={fused}: weight {weight[0].item():.2f}, versions {version} -> {weight._version}")
