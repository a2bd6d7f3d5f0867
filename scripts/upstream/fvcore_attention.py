"""fvcore: attention counts nothing

There is no entry for `scaled_dot_product_attention`; the operation is left out of the sum, with a log line among others.

dydit: gives it b * q * k * (d + d_v) (`dydit_cli/profiling/counting.py`), with which DiT-XL/2 comes to the paper's 118.69 G.
"""

import torch
from fvcore.nn import FlopCountAnalysis


class Attention(torch.nn.Module):
    def forward(self, q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)


counted = FlopCountAnalysis(Attention(), torch.randn(1, 2, 64, 8))
print("counted:", counted.total(), "| multiply-accumulates:", 2 * 64 * 64 * (8 + 8))
print("left out:", dict(counted.unsupported_ops()))
