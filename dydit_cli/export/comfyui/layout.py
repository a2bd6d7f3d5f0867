"""The names of a ComfyUI export's tensors: black-forest-labs' single file, and our routers and orders beside each block's.

The same as `--format original` for most models. Two kinds of routers get a place here that they do not have there, because the node is
ours: the authors' token routers (whose own layout ComfyUI does not keep apart from a static model) and routers of ordered width, under
a name of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from dydit_cli.checkpoints.layout import Layout, Rows
from dydit_cli.checkpoints.lazy import TensorSpec
from dydit_cli.families.original_flux import is_ours, to_original
from dydit_cli.families.original_flux_routers import file_key

FREE, ORDERED = "_rate.router.", "_rate.ordered_router."


def comfyui_layout(specs: Mapping[str, TensorSpec], *, ordered: bool) -> Layout:
    """How to make the file's tensors of a model's.

    Args:
        specs: Under our names.
        ordered: Whether the width routers are those of ordered width.

    Raises:
        DyditError: If there are keys that the model does not have.
    """
    layout: dict[str, tuple[Rows, ...]] = dict(
        to_original({key: spec for key, spec in specs.items() if not is_ours(key)})
    )
    for key in specs:
        if is_ours(key):
            name = file_key(key)
            layout[name.replace(FREE, ORDERED) if ordered else name] = (Rows(key),)
    return layout
