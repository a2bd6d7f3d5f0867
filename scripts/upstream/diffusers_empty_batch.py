"""diffusers: rotary embeddings of an empty batch fail

Everything else of a FLUX block passes a batch of none, which is what is left where every sample of a group is switched off.

dydit: leaves the block out then (`dydit_cli/execution/streams_dense.py`).
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb

rope = (torch.ones(6, 8), torch.zeros(6, 8))
for batch in (1, 0):
    try:
        print(
            "batch",
            batch,
            "->",
            tuple(apply_rotary_emb(torch.randn(batch, 6, 2, 8), rope, sequence_dim=1).shape),
        )
    except Exception as error:
        print("batch", batch, "->", type(error).__name__, error)
