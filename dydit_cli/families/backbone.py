"""The dynamic transformer that DiT and SiT share: a diffusers model in the original repositories' layout, with routers.

A forward knows nothing of training or inference. The executor says how masks become arithmetic, the gating how logits become
masks; both come from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import BlockWidth, CompactExecutor, Executor, StepModulation
from dydit_cli.families.blocks import (
    DynamicDiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
)
from dydit_cli.families.dynamic_model import DynamicModel, routed
from dydit_cli.randomness import normal


class DynamicTransformer(DynamicModel):
    """A class-conditional diffusion transformer with dynamic width and tokens.

    Args:
        sample_size: Side of the square input in latent pixels.
        patch_size: Side of a patch.
        in_channels: Channels of the input.
        hidden_size: C.
        num_layers: L, number of blocks.
        num_attention_heads: H; divides ``hidden_size``.
        num_classes: Classes without the null class.
        mlp_hidden_size: Hidden channels of the MLP; None means 4C.
        learn_sigma: Whether the final layer computes a variance beside each input channel.
        num_groups: G; None means H. Divides ``mlp_hidden_size``.
        always_on: Whether the most important head and group have no router row and are always on (the paper's later files).
        out_channels: Channels that a forward returns. It follows from the others and is recorded because stock pipelines read it.

    Raises:
        DyditError: If the numbers do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DynamicDiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        num_classes: int = 1000,
        mlp_hidden_size: int | None = None,
        learn_sigma: bool = True,
        num_groups: int | None = None,
        always_on: bool = True,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        mlp_hidden = mlp_hidden_size or 4 * hidden_size
        groups = num_groups or num_attention_heads
        check_divides("attention heads", num_attention_heads, "hidden size", hidden_size)
        check_divides("channel groups", groups, "MLP's hidden size", mlp_hidden)
        check_divides("patch size", patch_size, "sample size", sample_size)
        computed = 2 * in_channels if learn_sigma else in_channels
        self.register_to_config(
            mlp_hidden_size=mlp_hidden, num_groups=groups, out_channels=self.channels_returned(computed)
        )
        self.geometry = Geometry(
            hidden_size=hidden_size,
            depth=num_layers,
            num_heads=num_attention_heads,
            num_groups=groups,
            mlp_hidden=mlp_hidden,
            num_tokens=(sample_size // patch_size) ** 2,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=computed,
            sample_size=sample_size,
            num_classes=num_classes,
            always_on=always_on,
        )
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A parameter without gradient, as in the original: it is part of its files.
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.geometry.num_tokens, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            DynamicDiTBlock(hidden_size, num_attention_heads, mlp_hidden, groups, always_on)
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, computed)
        self.gradient_checkpointing = False
        self.begin_dynamic()

    def channels_returned(self, computed: int) -> int:
        """How many of the final layer's channels a forward returns."""
        return computed

    @property
    def dynamic_blocks(self) -> list[DynamicDiTBlock]:
        """The blocks in their order, with their type."""
        return cast(list[DynamicDiTBlock], list(self.blocks))

    def conditioning_modules(self) -> list[nn.Module]:
        """See `ConditionedModel`."""
        return [self.t_embedder, self.y_embedder, self.final_layer.adaLN_modulation]

    def embed_time(self, timestep: Tensor) -> Tensor:
        """See `ConditionedModel`."""
        embedding: Tensor = self.t_embedder(self.native_timestep(timestep))
        return embedding

    def embed_labels(self, labels: Tensor) -> Tensor:
        """See `ConditionedModel`."""
        embedding: Tensor = self.y_embedder(labels)
        return embedding

    def modulation_values(self, condition: Tensor) -> Tensor:
        """See `ConditionedModel`."""
        layers = [block.adaLN_modulation for block in self.dynamic_blocks]
        return torch.cat([layer(condition) for layer in (*layers, self.final_layer.adaLN_modulation)], dim=1)

    # ------------------------------------------------------------------ forward

    def example_inputs(self, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """See `DynamicModel`."""
        labels = torch.arange(batch) % (self.geometry.num_classes + 1)
        return normal(seed, (batch, *self.geometry.sample_shape), "example"), labels

    def null_condition(self, batch: int) -> Tensor:
        """(B,) labels of the null class."""
        return torch.full((batch,), self.geometry.num_classes, device=self.device)

    def native_timestep(self, timestep: Tensor) -> Tensor:
        """Turn the caller's t into the embedder's."""
        return timestep

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, with the keywords of diffusers' `DiTTransformer2DModel`.

        Args:
            hidden_states: (B, C_in, h, w).
            timestep: (B,) or a number, in the family's own convention.
            class_labels: (B,) integers; ``num_classes`` and above mean the null class, as does None.
            return_dict: Whether to wrap the result.

        Returns:
            (B, C_out, h, w) as ``sample``, or in a tuple.
        """
        labels = class_labels if class_labels is not None else self.null_condition(len(hidden_states))
        sample, _ = self.denoise(
            hidden_states, timestep, labels, executor=self._executor, gating=ThresholdGating(self.keep_bias)
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        condition: Tensor,
        *,
        executor: Executor | None = None,
        gating: Gating | None = None,
    ) -> tuple[Tensor, Routing]:
        """Predict and say what was executed: the call of training, profiling and tests.

        Args:
            hidden_states: (B, C_in, h, w).
            timestep: (B,) or a number.
            condition: (B,) integers, the class labels.
            executor: How masks become arithmetic; the model's own by default.
            gating: How logits become masks; thresholds with the model's ``keep_bias`` by default.

        Returns:
            The prediction (B, C_out, h, w) and the masks of every block.

        Raises:
            DyditError: If the input's size is not the model's.
        """
        executor = executor or self._executor
        gating = gating or ThresholdGating(self.keep_bias)
        self._check_input(hidden_states)
        device, batch = hidden_states.device, len(hidden_states)
        given = torch.as_tensor(timestep).reshape(-1)
        times = given.to(device).expand(batch)
        tokens = self.x_embedder(hidden_states.to(self.pos_embed.dtype)) + self.pos_embed
        widths: Sequence[BlockWidth] | None = None
        modulation: StepModulation | None = None
        if isinstance(executor, CompactExecutor):
            values = same_for_all(given.tolist())
            widths = executor.known(self, values, batch, gating)
            # Values that were computed beforehand have no gradient, and not the types of autocast.
            if batch and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type):
                labels = executor.labels_of(condition, self.geometry.num_classes)
                modulation = executor.modulation(self, values, labels, times)
        embedded: Tensor | None = None
        if widths is None or modulation is None:
            time_embedding = self.embed_time(times)
            if modulation is None:
                embedded = time_embedding + self.y_embedder(condition)
            if widths is None:
                widths = executor.widths(self.dynamic_blocks, times, time_embedding, gating)
        decided = []
        for index, (block, width) in enumerate(zip(self.dynamic_blocks, widths, strict=True)):
            of_block = modulation.blocks[index] if modulation is not None else None
            arguments = (tokens, embedded, width, executor, gating, index, of_block)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, keep = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens, keep = block(*arguments)
            decided.append(routed(width, keep))
        final = modulation.final if modulation is not None else None
        sample = self._unpatchify(self.final_layer(tokens, embedded, final))
        return self.native_prediction(sample), Routing(tuple(decided))

    def native_prediction(self, sample: Tensor) -> Tensor:
        """Turn the final layer's channels into what the caller expects."""
        return sample

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, p * p * C_out) -> (B, C_out, h, w)."""
        side, patch = self.geometry.sample_size // self.geometry.patch_size, self.geometry.patch_size
        grid = patches.view(len(patches), side, side, patch, patch, self.geometry.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            len(patches), grid.shape[-1], side * patch, side * patch
        )

    def _check_input(self, hidden_states: Tensor) -> None:
        expected = (self.geometry.in_channels, self.geometry.sample_size, self.geometry.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise DyditError(
                f"The model expects inputs of {'x'.join(map(str, expected))}, got {'x'.join(map(str, hidden_states.shape[1:]))}.",
                why=f"Its position table has {self.geometry.num_tokens} entries and its patch embedder {expected[0]} channels.",
                fix="Resize the input, or convert a checkpoint of that resolution.",
            )


def same_for_all(values: list[float]) -> list[float]:
    """One entry where all are equal, else the list."""
    return values[:1] if values.count(values[0] if values else 0.0) == len(values) else values


def check_divides(divisor_name: str, divisor: int, number_name: str, number: int) -> None:
    """Raise a `DyditError` that names the divisors unless ``divisor`` divides ``number``."""
    if divisor > 0 and number % divisor == 0:
        return
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    near = sorted(divisors, key=lambda candidate: abs(candidate - divisor))[:8]
    raise DyditError(
        f"{divisor} {divisor_name} do not divide the {number_name} of {number}.",
        why=f"Every unit must be equally wide; near divisors of {number} are {', '.join(map(str, sorted(near)))}.",
        fix="Choose one of these.",
    )
