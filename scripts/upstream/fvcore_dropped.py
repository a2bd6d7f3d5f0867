"""fvcore: what is computed and then read on the host is not counted

The model is traced, and a trace drops what no output depends on: here a router whose decision becomes a Python number.

dydit: the forward that is counted returns the routers' logits as well (`dydit_cli/profiling/counting.py`).
"""

import torch
from fvcore.nn import FlopCountAnalysis


class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.layer = torch.nn.Linear(8, 4), torch.nn.Linear(8, 8)

    def forward(self, x):
        kept = int((self.router(x) > -9).sum())
        return self.layer(x) * kept


counted = FlopCountAnalysis(Routed(), torch.randn(1, 8)).unsupported_ops_warnings(False)
print(dict(counted.by_module()))
