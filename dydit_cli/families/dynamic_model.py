"""What every dynamic model has, whatever its backbone: an executor, a dial, plans, and a word on what it would execute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dydit_cli.dynamic.gates import CompleteGating, Gating, ThresholdGating
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.dynamic.routing import BlockRouting, Decisions, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import (
    BlockWidth,
    CompactExecutor,
    DenseExecutor,
    Executor,
    WidthPlan,
    check_execution,
    executor_named,
)
from dydit_cli.execution.capacity import CapacityExecutor
from dydit_cli.execution.compiled import BlockCompiler
from dydit_cli.execution.freeing import free_weights, restore_weights
from dydit_cli.execution.graphs import GraphedCompactExecutor, GraphRunner
from dydit_cli.execution.slabs import freed_of
from dydit_cli.execution.units import SlicedLayer
from dydit_cli.families.caching import check_cache, register_blocks
from dydit_cli.families.timed_layers import insert_timed_layers


class DynamicModel(ModelMixin, ConfigMixin, CacheMixin):
    """A diffusers model with routers; the constructor of a subclass ends with `begin_dynamic`.

    Attributes:
        family: Name of the family.
        guided_channels: How many noise channels the original's classifier-free guidance acts on.
        geometry: The model's numbers.
        keep_bias: Added to all router logits of `forward`.
    """

    family: ClassVar[str] = ""
    guided_channels: ClassVar[int] = 3
    geometry: Geometry
    keep_bias: float
    _executor: Executor

    def begin_dynamic(self) -> None:
        """Start with dense execution and the dial at 0, and with experts in the layers if the configuration says so."""
        settings = self.config.get("td_lora")
        if settings is not None:
            insert_timed_layers(self, settings, self.geometry.hidden_size)
        self.keep_bias = 0.0
        self._executor = self.make_executor("dense")
        register_blocks(self.dynamic_blocks)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load as diffusers does, in eval mode, and run compactly: who loads a model wants it fast, who trains it says so."""
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_execution("compact")
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """As diffusers does, but without remarks on the entry by which its `AutoModel` finds our class."""
        known = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(known, **options)

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

    def router_input(self, time_embedding: Tensor) -> Tensor:
        """(S, C) timestep embeddings -> what the width routers read: the same, unless the model has budgets."""
        return time_embedding

    def width_gating(self, timestep: Tensor, gating: Gating) -> Gating:
        """The rule that decides widths at (S,) timesteps: ``gating``, unless the model's widths are written down."""
        return gating

    @property
    def budget_shift(self) -> float:
        """What the chosen budget adds to all router logits, beside ``keep_bias``; 0 for models without budgets."""
        return 0.0

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

    def make_step_runner(self, name: str, graphs: bool, token_capacity: float | None) -> Executor:
        """A new executor with static shapes for the model's blocks; families whose blocks have one say so."""
        raise DyditError(
            f"Models of the family {self.family} have neither CUDA graphs nor a token capacity.",
            why="Token selection with static shapes is written for blocks of DiT's form.",
            fix="Leave both out.",
        )

    # ------------------------------------------------------------------ routing and execution

    @property
    def execution(self) -> str:
        """Name of the executor that `forward` uses: ``dense``, ``compact`` or ``static``."""
        return self._executor.name

    @property
    def is_compiled(self) -> bool:
        """Whether `forward` runs compiled blocks."""
        return isinstance(self._executor, BlockCompiler)

    @property
    def execution_options(self) -> dict[str, Any]:
        """What `set_execution` takes to come back to how `forward` runs now."""
        executor = self._executor
        fixed = isinstance(executor, CapacityExecutor) and not (
            isinstance(executor, GraphedCompactExecutor) and executor.learns_room
        )
        return {
            "name": executor.name,
            "compile": self.is_compiled,
            "graphs": isinstance(executor, GraphRunner),
            "token_capacity": executor.share if fixed and isinstance(executor, CapacityExecutor) else None,
        }

    def set_execution(
        self,
        name: str,
        compile: bool = False,  # noqa: A002
        *,
        graphs: bool = False,
        token_capacity: float | None = None,
    ) -> DynamicModel:
        """Choose how `forward` runs: ``compact`` (inference), ``dense`` (masks multiplied) or ``static`` (complete model).

        Args:
            name: Which.
            compile: Whether blocks are compiled with `torch.compile`, at their first forward; for compact and static execution.
            graphs: Whether whole steps are recorded as CUDA graphs; for compact and static execution on a CUDA device.
            token_capacity: Give the MLPs room for this share of a batch's tokens, which makes shapes static; for compact
                execution. With ``graphs``, None learns it.

        Raises:
            DyditError: For another name, for what does not go together, and for graphs where there is no CUDA.
        """
        wanted = {"name": name, "compile": compile, "graphs": graphs, "token_capacity": token_capacity}
        if wanted != self.execution_options:
            check_execution(name, compile, graphs, token_capacity)
            if name != "compact":
                self.require_stored(f"{name.capitalize()} execution")
            if graphs or token_capacity is not None:
                self._executor = self.make_step_runner(name, graphs, token_capacity)
            else:
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

    def set_budget(self, budget: float) -> DynamicModel:
        """Choose the ratio of later forwards, of a model that was trained for a range of them.

        Raises:
            DyditError: If the model was not, or for other ratios.
        """
        raise DyditError(
            "The model has no budgets.",
            why="Its routers were trained for one ratio.",
            fix="Fine-tune with budgets, such as budgets=0.3,1.0; or use keep_bias, a dial without training.",
        )

    # ------------------------------------------------------------------ step caches

    def enable_cache(self, config: Any) -> None:
        """Reuse what earlier steps computed, by one of diffusers' step caches; see `CacheMixin`.

        Raises:
            DyditError: For caches that would be without effect here, or wrong.
        """
        usable = check_cache(self, self.dynamic_blocks, config)
        register_blocks(self.dynamic_blocks, wanted=True)
        super().enable_cache(usable)

    def begin_run(self) -> None:
        """Have step caches forget the steps of another sampling run, as pipelines of diffusers do when they end."""
        if getattr(self, "_diffusers_hook", None) is not None:
            self._reset_stateful_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicModel:
        """Cast or move; copies that compact execution made of the old tensors are freed with them.

        Stored weights that were given back are put back for that time.
        """
        freed = self.is_freed
        if isinstance(self._executor, CompactExecutor):
            self._executor.release()
        if freed:
            self.unpack()
        super()._apply(fn, recurse)
        return self.pack(free=True) if freed else self

    # ------------------------------------------------------------------ stored weights

    def _sliced_layers(self) -> list[SlicedLayer]:
        return [layer for block in self.dynamic_blocks for layer, _ in block.sliced_layers()]

    @property
    def is_freed(self) -> bool:
        """Whether the stored weights of heads and channel groups were given back (`pack`)."""
        return any(freed_of(layer) is not None for layer in self._sliced_layers()[:1])

    def pack(self, free: bool = False) -> DynamicModel:
        """Pack the weights of heads and channel groups now; else the first compact forward does so.

        Args:
            free: Give the stored weights back, so that they are held once and not twice. The model is then for compact
                execution alone: its state dict, saving, training, and dense and static execution need `unpack`. Where slabs
                have to change places, copies are made instead.

        Raises:
            DyditError: Unless the execution is compact, and for weights that cannot be put back (under an adapter), or that are
                being trained.
        """
        executor = self._executor
        if not isinstance(executor, CompactExecutor):
            raise DyditError(
                f"Weights are packed for compact execution, not for '{executor.name}'.",
                why="Dense and static execution read the stored weights.",
                fix="Call model.set_execution('compact') first.",
            )
        if free and not self.is_freed:
            executor.release()
            try:
                for block in self.dynamic_blocks:
                    free_weights([layer for layer, _ in block.sliced_layers()])
            except BaseException:
                self.unpack()
                raise
        executor.pack(self)
        return self

    def unpack(self) -> DynamicModel:
        """Put back the stored weights that `pack` gave back, bit for bit."""
        if isinstance(self._executor, CompactExecutor):
            self._executor.release()
        for block in self.dynamic_blocks:
            restore_weights([layer for layer, _ in block.sliced_layers()])
        return self

    def require_stored(self, what: str) -> None:
        """Raise a `DyditError` if the stored weights are not there, and ``what`` needs them."""
        if self.is_freed:
            raise DyditError(
                f"{what} needs the stored weights, which were given back.",
                why="model.pack(free=True) keeps the packed weights alone, for compact execution.",
                fix="Call model.unpack() first; it puts them back bit for bit.",
            )

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """See `torch.nn.Module`.

        Raises:
            DyditError: If the stored weights were given back.
        """
        self.require_stored("A state dict")
        return super().state_dict(*arguments, **options)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """See `torch.nn.Module`.

        Raises:
            DyditError: If the stored weights were given back.
        """
        self.require_stored("Loading a state dict")
        return super().load_state_dict(*arguments, **options)

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """See `ModelMixin`.

        Raises:
            DyditError: If the stored weights were given back.
        """
        self.require_stored("Saving a model")
        super().save_pretrained(*arguments, **options)

    # ------------------------------------------------------------------ plans

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
        gating = ThresholdGating(self.keep_bias + self.budget_shift)
        return executor.make_plan(self, values, known, gating)

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
            executor = CompactExecutor() if self.is_freed else DenseExecutor()
            _, routing = self.denoise(hidden_states, timestep, labels, executor=executor, gating=gating)
            return routing
        times = torch.as_tensor(timestep, device=self.device).reshape(-1)
        if isinstance(gating, ThresholdGating):
            gating = ThresholdGating(gating.keep_bias + self.budget_shift)
        read = self.router_input(self.embed_time(times))
        widths = DenseExecutor().widths(self.dynamic_blocks, times, read, self.width_gating(times, gating))
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
            if "_router." not in name and not name.startswith(("pos_embed", "temp_embed"))
        ]


def routed(width: BlockWidth, tokens: Tensor, ran: bool = True) -> BlockRouting:
    """A block's decisions: its width and the (B, N) mask of its tokens; zeros if the block did not run."""
    decided = BlockRouting(width.heads, width.groups, tokens, width.context_groups)
    return decided if ran else decided.map(torch.zeros_like)


def routing_of(widths: Sequence[BlockWidth], decisions: Decisions, tokens: Tensor) -> Routing:
    """What the blocks of a forward decided that ended with (B, N, C) tokens."""
    return Routing(
        tuple(
            routed(width, decisions.tokens(index, tokens), decisions.ran(index))
            for index, width in enumerate(widths)
        )
    )
