"""Whole denoising steps as CUDA graphs: where a step is many small kernels, starting them takes longer than running them.

A step is recorded once for each combination of input shapes and masks, and played back: one launch from the host. What a
recording reads is fixed: buffers into which each call's samples and adaLN values are copied, and weights at their addresses. So

* a combination runs eagerly when it is first seen and is recorded when it comes again: what never comes again is not paid for;
* masks are part of what a recording is found by, and its weights are held with it, whatever else the engine drops;
* token selection has static shapes (`capacity.py`), its room learned from the tokens that were kept; one flag is read after each
  step, and a step with too little room is repeated eagerly and recorded anew with more;
* everything is forgotten when the model changes (`watch.py`), and the least recently used recordings go when they are too many or
  take too many bytes;
* what cannot be recorded runs eagerly, with the same result: gradients, autocast, mixed widths in a batch, imposed masks, weights
  that move, hooks on blocks, layers of other libraries.

None of this was run on a GPU; on a CPU the tests record with a stand-in that checks what CUDA would demand.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dydit_cli.dynamic.gates import CompleteGating, Gating, ShiftedTokenGating, ThresholdGating
from dydit_cli.dynamic.timed import TimedLayer
from dydit_cli.errors import DyditError
from dydit_cli.execution.capacity import ROW_MULTIPLE, CapacityExecutor
from dydit_cli.execution.compact import Result
from dydit_cli.execution.interface import (
    BlockWidth,
    ConditionedModel,
    Step,
    StepRunner,
)
from dydit_cli.execution.plan import CompactWidth, WidthPlan
from dydit_cli.execution.quantised import is_quantised
from dydit_cli.execution.slices import Slice
from dydit_cli.execution.static import StaticExecutor
from dydit_cli.execution.units import SlicedLayer

Outputs = tuple[Tensor, ...]

MOST_GRAPHS = 256
"""Recordings that are kept: several sampler runs of other shapes or schedules."""

LEAST_GRAPH_BYTES = 256 * 2**20
"""Bytes that recordings of a small model may take; of a large one, as much as its sliceable weights."""

MOST_NOTES = 4096
"""Combinations that are remembered as seen."""

ROOM_MARGIN = 1.2
"""Room for tokens, over the most that were kept so far (ours)."""

GATHER_FROM = 512
"""Tokens of a batch above which leaving some out of the MLP is expected to save time on a large GPU (an estimate, not measured)."""

WARMUPS = 2
"""Runs before a recording, in which libraries choose their kernels and take their workspaces."""


# ------------------------------------------------------------------ what records


class Recording(Protocol):
    """Work that a device does again without being told it piece by piece."""

    @property
    def outputs(self) -> Outputs:
        """Written anew by each `replay`."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        ...

    def replay(self) -> None:
        """Do it again, with what the recorded tensors hold now."""
        ...


class Recorder(Protocol):
    """Makes recordings on one device."""

    def record(self, compute: Callable[[], Outputs]) -> Recording:
        """Record what ``compute`` does. It reads fixed tensors alone and asks the device for nothing."""
        ...

    def in_turn(self) -> AbstractContextManager[None]:
        """What is given to the device inside is done after what earlier such blocks gave it, whatever their streams."""
        ...

    def wait(self) -> None:
        """Return when the device has done all of it."""
        ...


@dataclass(frozen=True)
class CudaRecording:
    """A captured CUDA graph."""

    graph: Any
    outputs: Outputs
    nbytes: int

    def replay(self) -> None:
        """See `Recording`."""
        self.graph.replay()


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool: they run one after the other, and each writes before it reads.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    def record(self, compute: Callable[[], Outputs]) -> CudaRecording:
        """See `Recorder`.

        Raises:
            DyditError: If CUDA refuses to capture the work.
        """
        with torch.cuda.device(self._device):
            # Not on the default stream, which cannot be captured and would remember its workspaces.
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARMUPS):
                    compute()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    outputs = compute()
                    taken = torch.cuda.memory_reserved() - before
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise DyditError(
                    "CUDA cannot record the model's steps as graphs.",
                    why=next((line for line in str(error).splitlines() if line.strip()), "no reason given")[
                        :300
                    ],
                    fix="Leave out graphs, and please report the model, the device and the version of torch.",
                ) from error
            return CudaRecording(graph, outputs, taken)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """See `Recorder`."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            # Waits for nothing if nothing was recorded yet.
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    def wait(self) -> None:
        """See `Recorder`."""
        self._done.synchronize()


RecorderFor = Callable[[torch.device], Recorder | None]
"""A new recorder for a device, or None: run eagerly there."""


def cuda_recorder(device: torch.device) -> CudaRecorder | None:
    """The recorder of a CUDA device; None for any other."""
    return CudaRecorder(device) if device.type == "cuda" else None


def require_cuda(device: torch.device | None = None) -> None:
    """Raise a `DyditError` unless CUDA graphs can be recorded on this machine, and on ``device`` if one is chosen."""
    available = torch.cuda.is_available()
    if not available or (device is not None and device.type != "cuda"):
        raise DyditError(
            "CUDA graphs need a CUDA device, and "
            + (f"the model is to run on {device}." if available else "there is none."),
            why="They record what a CUDA device is given to do."
            if available
            else "torch reports no CUDA device that it can use.",
            fix="Leave out graphs; on a CPU, compile is what makes small steps faster.",
        )


# ------------------------------------------------------------------ what is kept


@dataclass(frozen=True)
class StepGraph:
    """A recorded step.

    Attributes:
        buffers: What it reads of each call.
        recording: The work.
        held: What it reads besides, so that its memory is nobody else's.
        nbytes: Memory that goes when it goes.
    """

    buffers: tuple[Tensor, ...]
    recording: Recording
    held: object
    nbytes: int


class StepGraphs:
    """Recorded steps by what they are a function of; the least recently used go first.

    Args:
        recorder_for: See `RecorderFor`.
        most: How many to keep.
    """

    def __init__(self, recorder_for: RecorderFor, most: int = MOST_GRAPHS) -> None:
        self.recorder_for = recorder_for
        self.most = most
        self.recorded = 0
        self.replays = 0
        self._graphs: OrderedDict[Hashable, StepGraph] = OrderedDict()
        self._buffers: dict[Hashable, tuple[Tensor, ...]] = {}
        self._notes: OrderedDict[Hashable, Mapping[int, int]] = OrderedDict()
        self._recorders: dict[torch.device, Recorder | None] = {}
        # One step at a time: buffers are shared.
        self._lock = Lock()

    def __len__(self) -> int:
        """Recordings that are kept."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes that recordings hold: their results and workspaces, buffers, and weights that are nowhere else."""
        buffers = sum(nbytes_of(held) for held in self._buffers.values())
        return buffers + sum(graph.nbytes for graph in self._graphs.values())

    def recorder(self, device: torch.device) -> Recorder | None:
        """The recorder of a device."""
        if device not in self._recorders:
            self._recorders[device] = self.recorder_for(device)
        return self._recorders[device]

    def noted(self, key: Hashable) -> Mapping[int, int] | None:
        """What was noted about a combination; None if it was never seen."""
        return self._notes.get(key)

    def note(self, key: Hashable, rooms: Mapping[int, int]) -> None:
        """Remember a combination and the room for tokens in each of its blocks; a recording with other room is dropped."""
        with self._lock:
            if self._notes.get(key, rooms) != rooms:
                self._drop([key])
            self._notes[key] = rooms
            self._notes.move_to_end(key)
            while len(self._notes) > MOST_NOTES:
                self._notes.popitem(last=False)

    def run(
        self,
        key: Hashable,
        inputs: tuple[Tensor, ...],
        compute: Callable[..., Outputs],
        weights: Callable[[], tuple[object, int]],
        budget: float,
    ) -> Outputs:
        """Play a combination back, recording it if that was not done yet; the results are the caller's own.

        Args:
            key: Of the combination; shapes, types and device of ``inputs`` are part of it.
            inputs: Of this call.
            compute: What to record; a function of tensors like ``inputs``.
            weights: What else it reads and is to be held, and its bytes.
            budget: Bytes of all recordings; the one that is running is kept in any case.
        """
        recorder = self.recorder(inputs[0].device)
        if recorder is None:
            raise TypeError(f"nothing records on {inputs[0].device}")
        # Tensors made under inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad(), recorder.in_turn():
            graph = self._graphs.get(key)
            buffers = graph.buffers if graph is not None else self._buffers_for(inputs)
            for buffer, value in zip(buffers, inputs, strict=True):
                buffer.copy_(value)
            if graph is None:
                held, nbytes = weights()
                recording = recorder.record(lambda: compute(*buffers))
                graph = StepGraph(buffers, recording, (held, inputs), nbytes + recording.nbytes)
                self._graphs[key] = graph
                self.recorded += 1
                self._keep_within(budget, recorder)
            self._graphs.move_to_end(key)
            graph.recording.replay()
            self.replays += 1
            return tuple(output.clone() for output in graph.recording.outputs)

    def clear(self) -> None:
        """Forget all recordings and what was seen."""
        with self._lock:
            self._drop(list(self._graphs))
            self._notes.clear()

    def _buffers_for(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kind = layout_of_inputs(inputs)
        if kind not in self._buffers:
            self._buffers[kind] = tuple(
                torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs
            )
        return self._buffers[kind]

    def _keep_within(self, budget: float, recorder: Recorder) -> None:
        while len(self._graphs) > 1 and (len(self._graphs) > self.most or self.nbytes > budget):
            self._drop([next(iter(self._graphs))])

    def _drop(self, keys: Sequence[Hashable]) -> None:
        dropped = [key for key in keys if key in self._graphs]
        if not dropped:
            return
        # What a device still reads is not given back.
        for recorder in self._recorders.values():
            if recorder is not None:
                recorder.wait()
        for key in dropped:
            del self._graphs[key]
        used = {id(graph.buffers) for graph in self._graphs.values()}
        self._buffers = {kind: held for kind, held in self._buffers.items() if id(held) in used}


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layout_of_inputs(inputs: Sequence[Tensor]) -> Hashable:
    """What a recording fixes of its inputs."""
    return tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)


# ------------------------------------------------------------------ what a step is a function of


def outside_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that stand beside its list of blocks."""
    return [child for child in model.children() if not isinstance(child, nn.ModuleList)]


def addresses(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[tuple[Tensor, ...], Hashable]:
    """The tensors of ``modules`` and of ``model`` itself, and where they lie."""
    own = [tensor for tensor in (*model._parameters.values(), *model._buffers.values()) if tensor is not None]
    below = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors = (*own, *below)
    return tensors, tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)


def decides(gating: Gating) -> Gating:
    """What decides behind a budget's shifts, which are a function of the watched model and are held with a recording."""
    return gating.live if type(gating) is ShiftedTokenGating else gating


def recordable(step: Step, *gatings: type[Gating]) -> bool:
    """Whether a step may be recorded, as far as its widths do not matter."""
    sample = step.sample
    return (
        type(decides(step.gating)) in gatings
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(sample.device.type)
        and sample.numel() > 0
        # A hook is Python, which a recording leaves out.
        and not any(has_hooks(block) for block in step.blocks if isinstance(block, nn.Module))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def only_own_layers(model: nn.Module) -> bool:
    """Whether all layers are torch's or the model's own: another library's may be switched on and off by a Python value, and its
    weights lie where torch does not say.

    Nor are layers whose weights follow the timestep: a recording serves all timesteps that have its masks.
    """
    own = type(model).__module__.partition(".")[0]
    known = all(type(module).__module__.partition(".")[0] in ("torch", own) for module in model.modules())
    known = known and not any(map(is_quantised, model.parameters()))
    return known and not any(isinstance(module, TimedLayer) for module in model.modules())


def joined_masks(outputs: Outputs) -> Outputs:
    """The prediction and all blocks' token masks as one tensor, so that taking them out of a recording is one copy."""
    sample, *keeps = outputs
    return sample, torch.stack(list(keeps))


def room_for(count: int, total: int, gather_from: int = GATHER_FROM) -> int:
    """Room for tokens where ``count`` of ``total`` were kept; for few, all of them."""
    wanted = math.ceil(ROOM_MARGIN * count)
    return total if total <= gather_from else min(total, ROW_MULTIPLE * max(1, -(-wanted // ROW_MULTIPLE)))


# ------------------------------------------------------------------ the executors


class GraphRunner(StepRunner):
    """An executor that records steps.

    Attributes:
        graphs: What it recorded.
    """

    graphs: StepGraphs


class GraphedCompactExecutor(CapacityExecutor, GraphRunner):
    """Compact execution whose steps are recorded and played back.

    Args:
        share: Room for tokens, see `CapacityExecutor`; None learns it for every block and step from what is kept.
        slice_budget: See `CompactExecutor`.
        table_budget: See `CompactExecutor`.
        recorder_for: Who records on a device; None is CUDA's own recorder, and nobody elsewhere.
        most: Recordings to keep.
        gather_from: Tokens of a batch up to which room that is learned is room for all.
    """

    def __init__(
        self,
        share: float | None = None,
        slice_budget: float = 1.0,
        table_budget: int | None = None,
        recorder_for: RecorderFor | None = None,
        most: int = MOST_GRAPHS,
        gather_from: int = GATHER_FROM,
    ) -> None:
        super().__init__(1.0 if share is None else share, slice_budget, table_budget)
        self.learns_room = share is None
        self.gather_from = gather_from
        self.graphs = StepGraphs(recorder_for or cuda_recorder, most)
        self._held: ContextVar[Mapping[tuple[int, tuple[int, ...]], Slice] | None] = ContextVar(
            "held", default=None
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model packs and records its own."""
        share = None if self.learns_room else self.share
        return type(self), (
            share,
            self._slice_budget,
            self._table_budget,
            self.graphs.recorder_for,
            self.graphs.most,
            self.gather_from,
        )

    def _forget(self) -> None:
        super()._forget()
        self.graphs.clear()

    def make_plan(
        self, model: ConditionedModel, timesteps: Tensor, labels: Sequence[int], gating: ThresholdGating
    ) -> WidthPlan:
        """See `CompactExecutor`. Recordings stay if no slab had to be moved."""
        before = self._store.copied_bytes
        plan = super().make_plan(model, timesteps, labels, gating)
        if self._store.copied_bytes != before:
            self.graphs.clear()
        return plan

    def modulation(
        self, model: ConditionedModel, timesteps: Sequence[float], labels: tuple[int, ...], times: Tensor
    ) -> Tensor | None:
        """See `CompactExecutor`; what the plan's table does not hold is computed inside the step, where it is recorded too."""
        return self.tabled(timesteps, labels)

    def run_step(self, step: Step) -> Outputs:
        """See `StepRunner`."""
        uses = self._uses_of(step)
        recorder = self.graphs.recorder(step.sample.device) if uses is not None else None
        if uses is None or recorder is None:
            return self._eagerly(step)
        outside, where = addresses(step.model, outside_blocks(step.model))
        masks = tuple(active for _, active in uses)
        key = (step.modulation is None, decides(step.gating), layout_of_inputs(step.inputs), where, masks)
        rooms = self.graphs.noted(key)
        if rooms is None:
            outputs = self._eagerly(step)
            if only_own_layers(step.model):
                self.graphs.note(key, self._rooms(step, outputs, {}))
            return outputs
        held: dict[tuple[int, tuple[int, ...]], Slice] = {}

        def weights() -> tuple[object, int]:
            nbytes = 0
            for layer, active in uses:
                part = self._store.ready(layer, active)
                held[id(layer), active] = part
                nbytes += 0 if self._store.is_view(layer, active) else part.nbytes
            return (dict(held), outside, step.gating), nbytes

        def compute(*inputs: Tensor) -> Outputs:
            serving = self._held.set(held)
            try:
                with self.static_shapes(rooms) as overflow:
                    outputs = joined_masks(step.of(*inputs))
            finally:
                self._held.reset(serving)
            flag = overflow.flag()
            return outputs if flag is None else (*outputs, flag)

        budget = max(LEAST_GRAPH_BYTES, self._store.slab_bytes)
        sample, keeps, *flags = self.graphs.run(key, step.inputs, compute, weights, budget)
        # Without a flag there was room for all, and nobody has to wait for the device.
        if flags and bool(flags[0]):
            self.count_overflow()
            outputs = step.run()
            self.graphs.note(key, self._rooms(step, outputs, rooms))
            return outputs
        return sample, *keeps.unbind(0)

    def _eagerly(self, step: Step) -> Outputs:
        return step.run() if self.learns_room else super().run_step(step)

    def _uses_of(self, step: Step) -> list[tuple[SlicedLayer, tuple[int, ...]]] | None:
        """Every sliced layer with its active units; None if the step cannot be recorded."""
        if not recordable(step, ThresholdGating):
            return None
        uses = []
        for block, width in zip(step.blocks, step.widths, strict=True):
            if not isinstance(width, CompactWidth) or any(len(parts) > 1 for parts in width.parts):
                return None
            for layer, place in block.sliced_layers():
                if self._store.moves(layer):
                    return None
                uses.append((layer, width.parts[place][0].active))
        return uses

    def _rooms(self, step: Step, outputs: Outputs, before: Mapping[int, int]) -> Mapping[int, int]:
        """Room for what was kept, in blocks that have more than before; waits for the device."""
        if not self.learns_room:
            return before
        keeps = torch.stack(list(outputs[1:])).flatten(1)
        total, counts = keeps.shape[1], keeps.sum(dim=1).tolist()
        return {
            id(block.mlp): max(before.get(id(block.mlp), 0), room_for(round(count), total, self.gather_from))
            for block, count in zip(step.blocks, counts, strict=True)
        }

    def _run(
        self,
        layer: SlicedLayer,
        active: tuple[int, ...],
        width: BlockWidth,
        compute: Callable[[Slice], Result],
    ) -> Result:
        """While a step is recorded, with the weights that are held for it."""
        held = self._held.get()
        return (
            compute(held[id(layer), active])
            if held is not None
            else super()._run(layer, active, width, compute)
        )


class GraphedStaticExecutor(StaticExecutor, GraphRunner):
    """Static execution whose steps are recorded and played back: what graphed compact execution is to be compared with.

    Args:
        recorder_for: Who records on a device; None is CUDA's own recorder, and nobody elsewhere.
        most: Recordings to keep.
    """

    def __init__(self, recorder_for: RecorderFor | None = None, most: int = MOST_GRAPHS) -> None:
        self.graphs = StepGraphs(recorder_for or cuda_recorder, most)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model records its own."""
        return type(self), (self.graphs.recorder_for, self.graphs.most)

    def run_step(self, step: Step) -> Outputs:
        """See `StepRunner`."""
        inputs = step.inputs
        records = recordable(step, ThresholdGating, CompleteGating)
        if not records or self.graphs.recorder(step.sample.device) is None:
            return step.run()
        tensors, where = addresses(step.model, list(step.model.children()))
        key = (step.modulation is None, layout_of_inputs(inputs), where)
        if self.graphs.noted(key) is None:
            if only_own_layers(step.model):
                self.graphs.note(key, {})
            return step.run()
        sample, keeps = self.graphs.run(
            key,
            inputs,
            lambda *given: joined_masks(step.of(*given)),
            lambda: (tensors, 0),
            LEAST_GRAPH_BYTES,
        )
        return sample, *keeps.unbind(0)


def graphed_executor(name: str, share: float | None = None) -> GraphedCompactExecutor | GraphedStaticExecutor:
    """A new executor for ``compact`` or ``static`` that records its steps.

    Raises:
        DyditError: For another name, and where there is no CUDA.
    """
    if name not in ("compact", "static"):
        raise DyditError(
            f"CUDA graphs are not recorded in {name} execution.",
            why="They are there for inference: compact execution, and static to compare with.",
            fix="Choose compact or static execution, or leave out graphs.",
        )
    require_cuda()
    return GraphedCompactExecutor(share) if name == "compact" else GraphedStaticExecutor()
