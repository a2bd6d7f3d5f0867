"""The dynamic transformer that DiT, SiT and Latte share: a diffusers model in the original repositories' layout, with routers.

A forward knows nothing of training or inference. The executor says how masks become arithmetic, the gating how logits become
masks; both come from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dydit_cli.dynamic.baked import (
    BakedChannelRouter,
    BakedHeadRouter,
    BakedWidths,
    baked_gating,
    baked_schedules,
    fixed_widths,
)
from dydit_cli.dynamic.budget import BudgetRouter, Told, check_budgets
from dydit_cli.dynamic.gates import (
    FrozenWidthGating,
    Gating,
    GumbelGating,
    ShiftedTokenGating,
    ThresholdGating,
)
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.layers import WHOLE, Sequences
from dydit_cli.dynamic.routers import width_routers
from dydit_cli.dynamic.routing import Decisions, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import (
    BlockWidth,
    CompactExecutor,
    Executor,
    Step,
    StepModulation,
    StepRunner,
    step_runner,
)
from dydit_cli.families.blocks import (
    NORM_EPS,
    DynamicDiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbedder,
    TimestepEmbedder,
)
from dydit_cli.families.caching import cache_context, is_cached
from dydit_cli.families.dynamic_model import DynamicModel, routed
from dydit_cli.families.pruned_blocks import PrunedDiTBlock, check_pruned
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
        width: Which masks heads and groups have: ``free`` (any, the paper's) or ``ordered`` (the most important units).
        budgets: Least and largest ratio that the routers serve, where they are told one; None for those that know one alone.
        default_budget: The ratio of a model that is not told.
        block_heads: Of a pruned model, the heads that each block is left with; such a model is static and has no routers.
        block_hidden: Of a pruned model, the hidden channels that each block's MLP is left with.
        td_lora: ``rank`` and ``experts`` of a model whose weights follow the timestep; see `insert_timed_layers`.
        frequency_shift: Of the timestep's sinusoids: 0 in the original files, 1 in diffusers' DiT; see `TimestepEmbedder`.
        mlp_norm_eps: Of the LayerNorm before the MLP: 1e-6 in the original files, 1e-5 in most of diffusers'.
        baked: ``schedules`` of a model whose widths are written down, and which has no width routers; see `BakedWidths`.

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
        width: str = "free",
        budgets: Sequence[float] | None = None,
        default_budget: float | None = None,
        block_heads: Sequence[int] | None = None,
        block_hidden: Sequence[int] | None = None,
        td_lora: Mapping[str, Any] | None = None,
        frequency_shift: float = 0.0,
        mlp_norm_eps: float = NORM_EPS,
        baked: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        mlp_hidden = mlp_hidden_size or 4 * hidden_size
        groups = num_groups or num_attention_heads
        check_divides("attention heads", num_attention_heads, "hidden size", hidden_size)
        check_divides("channel groups", groups, "MLP's hidden size", mlp_hidden)
        check_divides("patch size", patch_size, "sample size", sample_size)
        pruned = check_pruned(
            block_heads, block_hidden, depth=num_layers, num_heads=num_attention_heads, mlp_hidden=mlp_hidden
        )
        computed = 2 * in_channels if learn_sigma else in_channels
        places = (sample_size // patch_size) ** 2
        self.register_to_config(
            mlp_hidden_size=mlp_hidden, num_groups=groups, out_channels=self.channels_returned(computed)
        )
        self.geometry = Geometry(
            hidden_size=hidden_size,
            depth=num_layers,
            num_heads=num_attention_heads,
            num_groups=groups,
            mlp_hidden=mlp_hidden,
            num_tokens=places * max(1, self.num_frames),
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=computed,
            sample_size=sample_size,
            num_classes=num_classes,
            always_on=always_on,
            num_frames=self.num_frames,
            ordered_width=width == "ordered",
            width_macs=0.0
            if baked is not None
            else macs_of_width(width, hidden_size, num_attention_heads, groups, always_on),
            block_heads=pruned and pruned[0],
            block_hidden=pruned and pruned[1],
        )
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift)
        self.y_embedder = self.make_label_embedder(num_classes, hidden_size)
        # A parameter without gradient, as in the original: it is part of its files.
        self.pos_embed = nn.Parameter(torch.zeros(1, places, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(self._make_block(index, width) for index in range(num_layers))
        for block in self.dynamic_blocks:
            block.norm2.eps = mlp_norm_eps
        self.baked_widths: BakedWidths | None = None
        if baked is not None:
            self.baked_widths = BakedWidths(baked_schedules(baked), num_layers, num_attention_heads, groups)
            for block in self.dynamic_blocks:
                block.head_router = BakedHeadRouter(hidden_size, num_attention_heads, always_on)
                block.channel_router = BakedChannelRouter(hidden_size, groups, always_on)
        self.final_layer = FinalLayer(hidden_size, patch_size, computed)
        self.budget_router: BudgetRouter | None = None
        self.budget = default_budget
        if budgets is not None:
            self.budget_router = BudgetRouter(*check_budgets(budgets), hidden_size, num_layers)
        self.gradient_checkpointing = False
        self.begin_dynamic()

    def _make_block(self, index: int, width: str) -> nn.Module:
        geometry, sequences = self.geometry, self.sequences_of(index)
        if geometry.block_heads is not None and geometry.block_hidden is not None:
            return PrunedDiTBlock(
                geometry.hidden_size,
                geometry.head_dim,
                geometry.block_heads[index],
                geometry.block_hidden[index],
                geometry.num_heads,
                geometry.num_groups,
                sequences,
            )
        return DynamicDiTBlock(
            geometry.hidden_size,
            geometry.num_heads,
            geometry.mlp_hidden,
            geometry.num_groups,
            geometry.always_on,
            sequences,
            width,
        )

    def register_to_config(self, **values: Any) -> None:
        """As diffusers does, without arguments of this backbone that a family with a constructor of its own does not take."""
        taken, ours = (set(signature(cls.__init__).parameters) for cls in (type(self), DynamicTransformer))
        super().register_to_config(
            **{name: value for name, value in values.items() if name in taken or name not in ours}
        )

    # ------------------------------------------------------------------ what a family may change

    @property
    def num_frames(self) -> int:
        """Frames of one input; 0 for images, which have no axis of frames."""
        return 0

    def channels_returned(self, computed: int) -> int:
        """How many of the final layer's channels a forward returns."""
        return computed

    def sequences_of(self, block: int) -> Sequences:
        """Which tokens attend to each other in block number ``block``."""
        return WHOLE

    def make_label_embedder(self, num_classes: int, hidden_size: int) -> LabelEmbedder | None:
        """The table of classes, or None for a model without."""
        return LabelEmbedder(num_classes, hidden_size)

    def embed_sample(self, hidden_states: Tensor) -> Tensor:
        """(B, *sample_shape) -> (B, T, C), each token with its position."""
        tokens: Tensor = self.x_embedder(hidden_states)
        return tokens + self.pos_embed

    def offset_of(self, block: int) -> Tensor | None:
        """(1, T, C), what block number ``block`` adds to the tokens that it receives; None for nothing."""
        return None

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, T, p * p * C_out) -> a sample with C_out channels."""
        side, patch = self.geometry.sample_size // self.geometry.patch_size, self.geometry.patch_size
        batch = patches.shape[0]
        grid = patches.view(batch, side, side, patch, patch, self.geometry.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, grid.shape[-1], side * patch, side * patch)

    def native_timestep(self, timestep: Tensor) -> Tensor:
        """Turn the caller's t into the embedder's."""
        return timestep

    def given_timestep(self, native: float) -> float:
        """The inverse of `native_timestep`, for messages."""
        return native

    def native_prediction(self, sample: Tensor) -> Tensor:
        """Turn the final layer's channels into what the caller expects."""
        return sample

    def make_executor(self, name: str, compile: bool = False) -> Executor:  # noqa: A002
        """See `DynamicModel`."""
        if compile:
            self._refuse_pruned(name, "compiled blocks")
        return super().make_executor(name, compile)

    def make_step_runner(self, name: str, graphs: bool, token_capacity: float | None) -> Executor:
        """See `DynamicModel`."""
        self._refuse_pruned(name, "CUDA graphs or a token capacity")
        return step_runner(name, graphs, token_capacity)

    def _refuse_pruned(self, execution: str, what: str) -> None:
        if self.geometry.is_pruned and execution == "compact":
            raise DyditError(
                f"A pruned model does not run compactly with {what}.",
                why="It is static, so that compact execution has nothing to leave out.",
                fix="Choose static execution.",
            )

    # ------------------------------------------------------------------ what plans ask

    @property
    def dynamic_blocks(self) -> list[DynamicDiTBlock]:
        """The blocks in their order, with their type."""
        return cast(list[DynamicDiTBlock], list(self.blocks))

    def conditioning_modules(self) -> list[nn.Module]:
        """See `ConditionedModel`."""
        labels = [] if self.y_embedder is None else [self.y_embedder]
        budgets = [] if self.budget_router is None else [self.budget_router]
        baked = [] if self.baked_widths is None else [self.baked_widths]
        return [self.t_embedder, *labels, *budgets, *baked, self.final_layer.adaLN_modulation]

    def embed_time(self, timestep: Tensor) -> Tensor:
        """See `ConditionedModel`."""
        embedding: Tensor = self.t_embedder(self.native_timestep(timestep))
        return embedding

    def router_input(self, time_embedding: Tensor) -> Tensor:
        """See `DynamicModel`."""
        told = self._told(None)
        return time_embedding if told is None else time_embedding + told.embedding

    def width_gating(self, timestep: Tensor, gating: Gating) -> Gating:
        """See `DynamicModel`."""
        if self.baked_widths is None:
            return gating
        return baked_gating(self.baked_widths, self.native_timestep(timestep), gating, self.given_timestep)

    @property
    def budget_shift(self) -> float:
        """See `DynamicModel`."""
        told = self._told(None)
        return 0.0 if told is None else float(told.shift.detach())

    def _told(self, gating: Gating | None) -> Told | None:
        """What the budget says to the routers; None without budgets."""
        if self.budget_router is None:
            return None
        wanted = self.budget if self.budget is not None else self.budget_router.high
        if isinstance(gating, GumbelGating) and gating.budget is not None:
            wanted = gating.budget
        told: Told = self.budget_router(wanted)
        return told

    def set_budget(self, budget: float) -> DynamicTransformer:
        """See `DynamicModel`. What was planned and recorded for another budget is dropped."""
        if self.budget_router is None:
            super().set_budget(budget)
        elif not self.budget_router.low <= budget <= self.budget_router.high:
            raise DyditError(
                f"A budget of {budget:g} is outside the range of this model.",
                why=f"Its routers were trained for {self.budget_router.low:g} to {self.budget_router.high:g}.",
                fix="Choose one in this range.",
            )
        if self.baked_widths is not None and budget != self.budget:
            raise fixed_widths(f"They are those of a budget of {self.budget:g}.")
        if self.budget_router is not None:
            self.budget_router.check_realised(budget)
        if budget != self.budget and self.budget_router is not None:
            self.budget = float(budget)
            with torch.no_grad():
                self.budget_router.chosen.fill_(budget)
        return self

    def embed_labels(self, labels: Tensor) -> Tensor:
        """See `ConditionedModel`; a model without classes adds nothing."""
        if self.y_embedder is None:
            return self.pos_embed.new_zeros(labels.shape[0], self.geometry.hidden_size)
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

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, with the keywords of diffusers' `DiTTransformer2DModel`.

        Args:
            hidden_states: (B, C_in, h, w), or (B, F, C_in, h, w) of videos.
            timestep: (B,) or a number, in the family's own convention.
            class_labels: (B,) integers; ``num_classes`` and above mean the null class, as does None.
            return_dict: Whether to wrap the result.

        Returns:
            The same shape with C_out channels as ``sample``, or in a tuple.
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
            hidden_states: (B, C_in, h, w), or (B, F, C_in, h, w) of videos.
            timestep: (B,) or a number.
            condition: (B,) integers, the class labels.
            executor: How masks become arithmetic; the model's own by default.
            gating: How logits become masks; thresholds with the model's ``keep_bias`` by default.

        Returns:
            The prediction, of the same shape with C_out channels, and the masks of every block.

        Raises:
            DyditError: If the input's size is not the model's.
        """
        executor = executor or self._executor
        gating = gating or ThresholdGating(self.keep_bias)
        self._check_input(hidden_states)
        if not isinstance(executor, CompactExecutor):
            self.require_stored(f"{executor.name.capitalize()} execution")
        device, batch = hidden_states.device, hidden_states.shape[0]
        given = torch.as_tensor(timestep).reshape(-1)
        times = given.to(device).expand(batch)
        told = self._told(gating)
        if told is not None:
            gating = moved(gating, told)
        widths: Sequence[BlockWidth] | None = None
        planned: Tensor | None = None
        if isinstance(executor, CompactExecutor):
            values = same_for_all(given.tolist())
            widths = executor.known(self, values, batch, gating)
            # Values that were computed beforehand have no gradient, and not the types of autocast.
            if batch and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type):
                labels = executor.labels_of(condition, self.geometry.num_classes)
                planned = executor.modulation(self, values, labels, times)
        embedded: Tensor | None = None
        if widths is None or planned is None:
            time_embedding = self.embed_time(times)
            if planned is None:
                embedded = time_embedding + self.embed_labels(condition)
            if widths is None:
                read = time_embedding if told is None else time_embedding + told.embedding
                widths = executor.widths(self.dynamic_blocks, times, read, self.width_gating(times, gating))
        if told is not None:
            gating = ShiftedTokenGating(gating, told.tokens)
        compute = partial(self._computed, widths, executor, gating)
        # A cache counts steps, and says itself what of them is computed: nobody runs one twice, or plays it back.
        if isinstance(executor, StepRunner) and not is_cached(self.dynamic_blocks):
            step = Step(self, self.dynamic_blocks, widths, gating, hidden_states, embedded, planned, compute)
            sample, *keeps = executor.run_step(step)
            return sample, Routing(tuple(map(routed, widths, keeps)))
        decisions = Decisions()
        with cache_context(self):
            sample, *keeps = compute(hidden_states, embedded, planned, decisions)
        ran = map(decisions.ran, range(len(widths)))
        return sample, Routing(tuple(map(routed, widths, keeps, ran)))

    def _computed(
        self,
        widths: Sequence[BlockWidth],
        executor: Executor,
        gating: Gating,
        hidden_states: Tensor,
        embedded: Tensor | None,
        planned: Tensor | None,
        decisions: Decisions | None = None,
    ) -> tuple[Tensor, ...]:
        """What follows once widths are decided; see `Step.compute`. ``decisions`` is this call's alone."""
        decisions = decisions or Decisions()
        depth = len(self.dynamic_blocks)
        modulation = None if planned is None else StepModulation.of(planned, depth)
        tokens = self.embed_sample(hidden_states.to(self.pos_embed.dtype))
        for index, (block, width) in enumerate(zip(self.dynamic_blocks, widths, strict=True)):
            of_block = modulation.blocks[index] if modulation is not None else None
            offset = self.offset_of(index)
            arguments = (tokens, embedded, width, executor, gating, index, decisions, of_block, offset)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens = block(*arguments)
        final = modulation.final if modulation is not None else None
        sample = self.unpatchify(self.final_layer(tokens, embedded, final))
        keeps = (decisions.tokens(index, tokens) for index in range(depth))
        return self.native_prediction(sample), *keeps

    def _check_input(self, hidden_states: Tensor) -> None:
        expected = self.geometry.sample_shape
        if tuple(hidden_states.shape[1:]) != expected:
            raise DyditError(
                f"The model expects inputs of {'x'.join(map(str, expected))}, got {'x'.join(map(str, hidden_states.shape[1:]))}.",
                why=f"Its tables have {self.geometry.num_tokens} positions and its patch embedder "
                f"{self.geometry.in_channels} channels.",
                fix="Resize the input, or convert a checkpoint of that resolution.",
            )


def moved(gating: Gating, told: Told) -> Gating:
    """The same rule on logits that a budget moves; decisions from elsewhere stay as they are."""
    if type(gating) is ThresholdGating:
        # A number, because plans are kept by it.
        return ThresholdGating(gating.keep_bias + float(told.shift.detach()))
    if isinstance(gating, GumbelGating):
        return replace(gating, shift=told.shift)
    if isinstance(gating, FrozenWidthGating):
        return replace(gating, live=moved(gating.live, told))
    return gating


def macs_of_width(width: str, hidden_size: int, heads: int, groups: int, always_on: bool) -> float | None:
    """MACs of a block's width routers if they are a plug-in's; None for the package's own, which the geometry counts.

    Raises:
        DyditError: If there is no such width.
    """
    for_heads, for_groups = width_routers(width)
    if width in ("free", "ordered"):
        return None
    return for_heads.macs(hidden_size, heads, always_on) + for_groups.macs(hidden_size, groups, always_on)


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
