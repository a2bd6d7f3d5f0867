"""Token routers of blocks with a text stream: they see every image token, the text's mean and the conditioning.

`LowRankTokenRouter` (ours) is what conversions get. `FullTokenRouter` is that of the authors' dynamic FLUX, read for their files:
its four C x C modulations add 1.74 B parameters to an 8 B model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydit_cli.dynamic.routers import fp32_linear, in_fp32

RANK_DIVISOR = 48
"""C / 48 is a rank of 64 for FLUX's 3072 channels."""
LOW_RANK_BIAS = 15.0
FULL_BIAS = 5.0
LOW_RANK_EPS = 1e-6


class LowRankTokenRouter(nn.Module):
    """SDT through a small rank r: what a token needs is compared with what the time and the prompt ask for [ours].

    With x_i an image token, y the text tokens, c the conditioning vector (time, guidance and pooled text) and RMS the division by
    the root mean square::

        h_i   = silu((1 + a) * W RMS(x_i) + b + V mean_j RMS(y_j))       (a, b) = U silu(c)
        logit = w . h_i + bias

    W and V are (r, C), U is (2r, C), w is (r,): about 4rC parameters. The norm bounds the logits' spread, so that a bias of 15
    (as of the width routers) starts with every token kept; the raw residual that the paper's router reads needs its 35.

    Args:
        hidden_size: C.
        rank: r; None means C / 48.
    """

    def __init__(self, hidden_size: int, rank: int | None = None) -> None:
        super().__init__()
        rank = rank or max(1, hidden_size // RANK_DIVISOR)
        self.reduce = nn.Linear(hidden_size, rank)
        self.text = nn.Linear(hidden_size, rank)
        self.time = nn.Linear(hidden_size, 2 * rank)
        self.score = nn.Linear(rank, 1)

    @staticmethod
    def macs(hidden_size: int, rank: int | None, image: int) -> float:
        """Multiply-accumulates for one sample with ``image`` tokens."""
        rank = rank or max(1, hidden_size // RANK_DIVISOR)
        return float(image * (hidden_size * rank + rank) + 3 * hidden_size * rank)

    def reset_parameters(self) -> None:
        """Xavier weights and a last bias at which every token is kept."""
        for layer in (self.reduce, self.text, self.time, self.score):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.score.bias, LOW_RANK_BIAS)

    def shift(self, amount: float) -> None:
        """Add ``amount`` to all logits."""
        self.score.bias.add_(amount)

    def forward(self, image: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """(B, N, C) image tokens, (B, T, C) text tokens, (B, C) conditioning -> (B, N) fp32 logits."""
        scale, shift = fp32_linear(self.time, F.silu(conditioning.float()))[:, None].chunk(2, dim=2)
        prompt = fp32_linear(self.text, rms_norm(text).mean(dim=1, keepdim=True))
        reduced = fp32_linear(self.reduce, rms_norm(image))
        hidden = F.silu(torch.addcmul(shift + prompt, reduced, 1 + scale))
        return fp32_linear(self.score, hidden).squeeze(-1)


class FullTokenRouter(nn.Module):
    """The token router of the authors' dynamic FLUX.

    With one affine LayerNorm of eps 1e-5 for both streams::

        (shift, scale, shift', scale') = W silu(c)
        logit_i = w . (LN(x_i) * (1 + scale) + shift + mean_j(LN(y_j) * (1 + scale') + shift')) + bias

    Source: the authors' released code for DyDiT++ (arXiv 2504.06803).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_t = nn.Linear(hidden_size, 4 * hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.router = nn.Linear(hidden_size, 1)

    @staticmethod
    def macs(hidden_size: int, image: int) -> float:
        """Multiply-accumulates for one sample with ``image`` tokens."""
        return float(4 * hidden_size**2 + image * hidden_size)

    def reset_parameters(self) -> None:
        """Xavier weights and the authors' bias of 5, at which most tokens are kept."""
        for layer in (self.linear_t, self.router):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.constant_(self.router.bias, FULL_BIAS)

    def shift(self, amount: float) -> None:
        """Add ``amount`` to all logits."""
        self.router.bias.add_(amount)

    def forward(self, image: Tensor, text: Tensor, conditioning: Tensor) -> Tensor:
        """(B, N, C) image tokens, (B, T, C) text tokens, (B, C) conditioning -> (B, N) fp32 logits."""
        modulation = fp32_linear(self.linear_t, F.silu(conditioning.float()))[:, None]
        shift, scale, text_shift, text_scale = modulation.chunk(4, dim=2)
        prompt = (self._normed(text) * (1 + text_scale) + text_shift).mean(dim=1, keepdim=True)
        tokens = self._normed(image) * (1 + scale) + shift
        return fp32_linear(self.router, tokens + prompt).squeeze(-1)

    def _normed(self, tokens: Tensor) -> Tensor:
        weight, bias = in_fp32(self.norm.weight, tokens), in_fp32(self.norm.bias, tokens)
        return F.layer_norm(tokens.float(), self.norm.normalized_shape, weight, bias, self.norm.eps)


def rms_norm(tokens: Tensor) -> Tensor:
    """Tokens over their root mean square, in fp32."""
    return F.rms_norm(tokens.float(), tokens.shape[-1:], eps=LOW_RANK_EPS)
