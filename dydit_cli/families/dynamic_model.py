"""What every dynamic model has, whatever its backbone: an executor, a dial, plans, and a word on what it would execute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dydit_cli.dynamic.gates import CompleteGating, Gating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import BlockRouting, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import (
    BlockWidth,
    CompactExecutor,
    DenseExecutor,
    Executor,
    WidthPlan,
    executor_named,
)
from dydit_cli.execution.compiled import BlockCompiler


class DynamicModel(ModelMixin, ConfigMixin):
    """A diffusers model with routers; the constructor of a subclass ends with `begin_dynamic`.

    Attributes:
        family: Name of the family.
        geometry: The model's numbers.
        keep_bias: Added to all router logits of `forward`.
    """

    family: ClassVar[str] = ""
    geometry: Geometry
    keep_bias: float
    _executor: Executor

    def begin_dynamic(self) -> None:
        """Start with dense execution and the dial at 0."""
        self.keep_bias = 0.0
        self._executor = self.make_executor("dense")

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load as diffusers does, in eval mode, and run compactly: who loads a model wants it fast, who trains it says so."""
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_execution("compact")
        return loaded

    # ------------------------------------------------------------------ what a backbone gives

    @property
    def dynamic_blocks(self) -> list[Any]:
        """The blocks in their order."""
        raise NotImplementedError

    def conditioning_modules(self) -> list[nn.Module]:
        """See `ConditionedModel`."""
        raise NotImplementedError

    def embed_labels(self, labels: Tensor) -> Tensor:
        """See `ConditionedModel`; families without labels are never asked."""
        raise NotImplementedError

    def modulation_values(self, condition: Tensor) -> Tensor:
        """See `ConditionedModel`; families without labels are never asked."""
        raise NotImplementedError

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(S,) t as `forward` receives it -> (S, C) timestep embeddings, which the width routers read."""
        raise NotImplementedError

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        condition: Any,
        *,
        executor: Executor | None = None,
        gating: Gating | None = None,
    ) -> tuple[Tensor, Routing]:
        """Predict and say what was executed: the call of training, profiling and tests.

        Args:
            hidden_states: (B, *geometry.sample_shape).
            timestep: (B,) or a number, in the family's own convention.
            condition: Of each sample: (B,) class labels, or what a text-to-image family takes.
            executor: How masks become arithmetic; the model's own by default.
            gating: How logits become masks; thresholds with the model's ``keep_bias`` by default.

        Returns:
            The prediction and the masks of every block.
        """
        raise NotImplementedError

    def example_inputs(self, batch: int, seed: int) -> tuple[Tensor, Any]:
        """Samples of noise and conditions of the right shape, on the CPU, as a function of the seed."""
        raise NotImplementedError

    def null_condition(self, batch: int) -> Any:
        """The condition of no class and no text, for as many samples."""
        raise NotImplementedError

    def make_executor(self, name: str, compile: bool = False) -> Executor:  # noqa: A002
        """A new executor for the model's blocks."""
        return executor_named(name, compile)

    # ------------------------------------------------------------------ routing and execution

    @property
    def execution(self) -> str:
        """Name of the executor that `forward` uses: ``dense``, ``compact`` or ``static``."""
        return self._executor.name

    @property
    def is_compiled(self) -> bool:
        """Whether `forward` runs compiled blocks."""
        return isinstance(self._executor, BlockCompiler)

    def set_execution(self, name: str, compile: bool = False) -> DynamicModel:  # noqa: A002
        """Choose how `forward` runs: ``compact`` (inference), ``dense`` (masks multiplied) or ``static`` (complete model).

        Args:
            name: Which.
            compile: Whether blocks are compiled with `torch.compile`, at their first forward; for compact and static execution.

        Raises:
            DyditError: For another name, and for dense execution compiled.
        """
        if (name, compile) != (self.execution, self.is_compiled):
            self._executor = self.make_executor(name, compile)
        return self

    def set_keep_bias(self, keep_bias: float) -> DynamicModel:
        """Add ``keep_bias`` to all router logits of later forwards: more is kept above 0, less below; +inf keeps everything.

        Raises:
            DyditError: If it is no number.
        """
        if math.isnan(keep_bias):
            raise DyditError(
                "keep_bias is not a number.",
                why="No logit is above it, so that everything would be switched off.",
                fix="Pass 0 for the model as it is, or a larger number to keep more.",
            )
        self.keep_bias = float(keep_bias)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicModel:
        """Cast or move; copies that compact execution made of the old tensors are freed with them."""
        if isinstance(self._executor, CompactExecutor):
            self._executor.release()
        super()._apply(fn, recurse)
        return self

    def plan(
        self, timesteps: Tensor | Sequence[float], class_labels: Tensor | Sequence[int] | None = None
    ) -> WidthPlan:
        """Prepare a schedule: later compact forwards at these timesteps ask no width router and copy few weights or none.

        Results are those without a plan, up to rounding.

        Args:
            timesteps: Values of t as `forward` will receive them, in the order in which it will.
            class_labels: The labels of the images to come, the null class among them if guidance is used. With them, the adaLN
                values of the whole schedule are computed at once, as far as they fit into the executor's budget.

        Returns:
            The plan; its ``hits`` and ``misses`` count later forwards. Switches the execution to compact.
        """
        if self.execution != "compact":
            self.set_execution("compact")
        executor = self._executor
        if not isinstance(executor, CompactExecutor):
            raise DyditError(
                f"A plan belongs to compact execution, not to '{executor.name}'.",
                why="Dense and static execution compute everything, so that there is nothing to plan.",
                fix="Call model.set_execution('compact') first.",
            )
        values = torch.as_tensor(timesteps, device=self.device).flatten()
        labels = [] if class_labels is None else torch.as_tensor(class_labels).flatten().tolist()
        known = [min(int(label), self.geometry.num_classes) for label in labels]
        return executor.make_plan(self, values, known, ThresholdGating(self.keep_bias))

    @property
    def current_plan(self) -> WidthPlan | None:
        """The plan in use: that of `plan`, or one that has grown from the timesteps that were seen; None without either."""
        return self._executor.plan if isinstance(self._executor, CompactExecutor) else None

    @torch.no_grad()
    def routing(
        self,
        timestep: Tensor | float,
        hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> Routing:
        """What would be executed at evaluation, without noise.

        Args:
            timestep: (B,) or a number.
            hidden_states: (B, C_in, h, w); without it the token masks, which depend on the image, are all ones.
            class_labels: (B,); the null class without it.

        Returns:
            Masks by rank; a static model's are all ones.
        """
        gating: Gating = CompleteGating() if self.execution == "static" else ThresholdGating(self.keep_bias)
        if hidden_states is not None:
            labels = class_labels if class_labels is not None else self.null_condition(len(hidden_states))
            _, routing = self.denoise(
                hidden_states, timestep, labels, executor=DenseExecutor(), gating=gating
            )
            return routing
        times = torch.as_tensor(timestep, device=self.device).reshape(-1)
        widths = DenseExecutor().widths(self.dynamic_blocks, times, self.embed_time(times), gating)
        ones = torch.ones(len(times), self.geometry.num_tokens, device=self.device)
        return Routing(tuple(routed(width, ones) for width in widths))

    def router_parameters(self) -> list[nn.Parameter]:
        """Parameters of all routers."""
        return [parameter for name, parameter in self.named_parameters() if "_router." in name]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the static model."""
        return [
            parameter
            for name, parameter in self.named_parameters()
            if "_router." not in name and not name.startswith("pos_embed")
        ]


def routed(width: BlockWidth, tokens: Tensor) -> BlockRouting:
    """A block's decisions: its width and the (B, N) mask of its tokens."""
    return BlockRouting(width.heads, width.groups, tokens, width.context_groups)
