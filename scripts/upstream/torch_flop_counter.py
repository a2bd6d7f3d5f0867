"""torch: `FlopCounterMode` counts no attention on a CPU

`scaled_dot_product_attention` takes a fused kernel there, of which the counter's table has no entry; nothing is said. Reported as
[pytorch#195460](https://github.com/pytorch/pytorch/issues/195460).

dydit: counts with the mathematical kernel (`dydit_cli/profiling/counting.py`).
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

q = torch.randn(1, 2, 64, 8)
with FlopCounterMode(display=False) as fused:
    scaled_dot_product_attention(q, q, q)
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mathematical:
    scaled_dot_product_attention(q, q, q)
print("fused kernel:", fused.get_total_flops(), "| mathematical:", mathematical.get_total_flops())
