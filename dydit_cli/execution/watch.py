"""Tells once a forward, and cheaply, whether a model still is what weights were packed and plans were made from.

Loading, casting, moving and editing in place change a tensor's storage or version; swapping a layer or a block changes a module's
children. Which adapters of peft are in use, and by what scale, a few attributes tell. peft fuses adapters through ``.data`` and
fused optimisers write without a new version: either changes a weight all over, so that a few of its values tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dydit_cli.execution.effective import adapter_state, is_adapted
from dydit_cli.execution.quantised import parts_of_tensor

PROBE_VALUES = 32


def submodules(roots: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The modules and everything below them."""
    pending = list(reversed(roots))
    while pending:
        module = pending.pop()
        yield module
        pending.extend(child for child in module._modules.values() if child is not None)


def probe_of(parameter: Tensor) -> list[Tensor]:
    """Views of a few values: the first, and where there are thrice as many rows as columns (qkv) the first of each third."""
    flat = parameter.detach().flatten()
    fused = parameter.dim() == 1 or (parameter.dim() == 2 and parameter.shape[0] == 3 * parameter.shape[1])
    return [third[:PROBE_VALUES] for third in (flat.chunk(3) if fused else [flat])]


class Watch:
    """Remembers the present state of modules.

    Args:
        roots: The modules; everything below them is watched too.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = list(roots)
        # The dicts of modules with the identities of what stood in them: replaced, added and removed things are seen. What
        # stood there is kept, so that its identity is not given away.
        self._shelves: list[tuple[Mapping[str, object], list[int]]] = []
        self._kept: list[object] = []
        self._adapted: list[nn.Module] = []
        parameters: list[Tensor] = []
        self._tensors: list[Tensor] = []
        for module in submodules(self.roots):
            for shelf in (module._modules, module._parameters, module._buffers):
                if shelf:
                    self._shelves.append((shelf, [id(value) for value in shelf.values()]))
                    self._kept += shelf.values()
            if is_adapted(module):
                self._adapted.append(module)
            stored = [tensor for tensor in module._parameters.values() if tensor is not None]
            held = [part for tensor in stored for part in parts_of_tensor(tensor)]
            parameters += held
            self._tensors += [*held, *(tensor for tensor in module._buffers.values() if tensor is not None)]
        # Weak references keep the addresses of storages from being given away, so that an address is an identity.
        self._references = [StorageWeakRef(tensor.untyped_storage()) for tensor in self._tensors]
        self._stamp = self._stamps()
        self._adapters = list(map(adapter_state, self._adapted))
        self._probes: list[tuple[list[Tensor], Tensor]] = []
        for device in dict.fromkeys(parameter.device for parameter in parameters if not parameter.is_meta):
            here = [parameter for parameter in parameters if parameter.device == device and parameter.numel()]
            for dtype in dict.fromkeys(parameter.dtype for parameter in here):
                pieces = [
                    piece for parameter in here if parameter.dtype == dtype for piece in probe_of(parameter)
                ]
                self._probes.append((pieces, torch.cat(pieces)))

    def _stamps(self) -> list[int]:
        storages = [tensor.untyped_storage()._cdata for tensor in self._tensors]
        try:
            return storages + [tensor._version for tensor in self._tensors]
        except RuntimeError:  # Tensors made under inference mode have no version.
            return storages + [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def covers(self, modules: Sequence[nn.Module]) -> bool:
        """Whether ``modules`` are the first of the roots."""
        return self.roots[: len(modules)] == list(modules)

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        for shelf, held in self._shelves:
            if list(map(id, shelf.values())) != held:
                return True
        if self._stamps() != self._stamp or list(map(adapter_state, self._adapted)) != self._adapters:
            return True
        with torch.no_grad():
            return not all(torch.equal(torch.cat(pieces), values) for pieces, values in self._probes)
