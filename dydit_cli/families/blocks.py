"""The bricks of DiT, SiT and Latte in the original repositories' layout (keys, shapes and order of operations).

Written from the published architecture (Peebles & Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748); checked
against outputs of the original implementation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating
from dydit_cli.dynamic.layers import WHOLE, DynamicAttention, DynamicMlp, Sequences
from dydit_cli.dynamic.routers import TokenRouter, width_routers
from dydit_cli.dynamic.routing import Decisions
from dydit_cli.execution.compiled import BlockCompiler
from dydit_cli.execution.interface import BlockWidth, BranchModulation, Executor, Modulation, modulate

NORM_EPS = 1e-6
FREQUENCY_SIZE = 256


class PatchEmbedder(nn.Module):
    """Cuts an image into patches and projects each: (B, C_in, h, w) -> (B, N, C)."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, N, C), rows of patches first."""
        patches: Tensor = self.proj(images)
        # Contiguous, because token gathering flattens batch and tokens in every block.
        return patches.flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, then an MLP; its output is the E_t that width routers read.

    Args:
        hidden_size: C.
        frequency_shift: Taken from the number of frequencies before the exponents are divided by it: 0 in the original, 1 in
            diffusers' DiT, which is another function of t.
    """

    def __init__(self, hidden_size: int, frequency_shift: float = 0.0) -> None:
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) t -> (B, C)."""
        half = FREQUENCY_SIZE // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * exponents / (half - self.frequency_shift))
        angles = timestep.float()[:, None] * frequencies[None]
        sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        embedding: Tensor = self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))
        return embedding


class LabelEmbedder(nn.Module):
    """A table of class embeddings whose last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B, C). Labels of ``num_classes`` and above mean the null class: stock pipelines send 1000."""
        embedding: Tensor = self.embedding_table(labels.clamp(max=self.num_classes))
        return embedding


class FinalLayer(nn.Module):
    """adaLN and the projection to patches of pixels: (B, N, C) -> (B, N, patch * patch * C_out)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, tokens: Tensor, condition: Tensor | None, modulation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """(B, N, C) tokens and (B, C) condition, or its shift and scale if they are known -> (B, N, patch * patch * C_out)."""
        shift, scale = modulation or self.adaLN_modulation(condition).chunk(2, dim=1)
        projected: Tensor = self.linear(modulate(self.norm_final(tokens), shift[:, None], scale[:, None]))
        return projected


def branch_modulation(adaln: nn.Module, condition: Tensor | None) -> BranchModulation:
    """What adaLN does to attention and to the MLP, for a (B, C) condition."""
    values = adaln(condition).chunk(6, dim=1)
    return Modulation(*values[:3]), Modulation(*values[3:])


class DynamicDiTBlock(nn.Module):
    """An adaLN-Zero block whose heads, MLP groups and MLP tokens are dynamic.

    Args:
        hidden_size: C. num_heads: H. mlp_hidden: Hidden channels of the MLP. num_groups: G.
        always_on: Whether the first head and group have no router row and are always on.
        sequences: Which tokens attend to each other.
        width: ``free`` or ``ordered``; see `width_routers`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_hidden: int,
        num_groups: int,
        always_on: bool,
        sequences: Sequences = WHOLE,
        width: str = "free",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = DynamicAttention(hidden_size, num_heads, sequences)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.mlp = DynamicMlp(hidden_size, mlp_hidden, num_groups)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        for_heads, for_groups = width_routers(width)
        self.head_router = for_heads(hidden_size, num_heads, always_on)
        self.channel_router = for_groups(hidden_size, num_groups, always_on)
        self.token_router = TokenRouter(hidden_size)

    def decide_width(self, time_embedding: Tensor, gating: Gating, index: int) -> BlockWidth:
        """See `RoutedBlock`."""
        heads, groups = self.head_router, self.channel_router
        return BlockWidth(
            heads.complete(gating.heads(index, heads(time_embedding))),
            groups.complete(gating.groups(index, groups(time_embedding))),
        )

    def complete_width(self, time_embedding: Tensor) -> BlockWidth:
        """See `RoutedBlock`."""
        ones = time_embedding.new_ones(len(time_embedding), 1)
        return BlockWidth(ones.expand(-1, self.head_router.units), ones.expand(-1, self.channel_router.units))

    def sliced_layers(self) -> tuple[tuple[nn.Module, int], ...]:
        """See `RoutedBlock`."""
        return (self.attn, 0), (self.mlp, 1)

    def value_and_output_weights(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Of each stream, the weights that make a head's values (H * C_h, C) and those that read its output (C, H * C_h)."""
        values = self.attn.qkv.weight.chunk(3)[2]
        return ((values, self.attn.proj.weight),)

    def reset_routers(self) -> None:
        """Give the routers the paper's start: xavier weights, biases at which everything is on."""
        for router in (self.head_router, self.channel_router, self.token_router):
            router.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor | None,
        width: BlockWidth,
        executor: Executor,
        gating: Gating,
        index: int,
        decisions: Decisions,
        modulation: BranchModulation | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) tokens, (B, C) condition -> (B, N, C) tokens; ``decisions`` gets the mask of those that entered the MLP.

        ``modulation`` holds the adaLN values of attention and MLP if they are known; the condition is then not needed. ``offset`` is
        added to the tokens first, here and not before, so that whoever skips the block skips it too.
        """
        if offset is not None:
            hidden_states = hidden_states + offset
        if modulation is None:
            modulation = branch_modulation(self.adaLN_modulation, condition)
        if isinstance(executor, BlockCompiler):
            done = executor.run_block(self, hidden_states, modulation, width, gating, index)
            if done is not None:
                decisions.note(index, done[1])
                return done[0]
        for_attention, for_mlp = modulation
        tokens = executor.attend(self, hidden_states, for_attention, width)
        keep = executor.select(self.token_router, tokens, gating, index)
        decisions.note(index, keep)
        return executor.feed_forward(self, tokens, for_mlp, width, keep)
