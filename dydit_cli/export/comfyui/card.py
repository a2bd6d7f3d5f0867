"""The card of a ComfyUI export: what goes where, and what it is."""

from __future__ import annotations

from collections.abc import Sequence

from dydit_cli.export.card import DYNAMIC, Subject, head, licence


def comfyui_card(subject: Subject, file: str, node: str, *, axes: Sequence[int], ordered: bool) -> str:
    """The card.

    Args:
        subject: The model.
        file: Name of the weight file.
        node: Name of the custom node's folder.
        axes: How a head's channels are shared among the rotary axes.
        ordered: Whether the width routers are those of ordered width.
    """
    # No tensor tells them where heads are not of 128 channels.
    option = "" if sum(axes) == 128 else f" --axes-dims-rope {','.join(map(str, axes))}"
    back = (
        "The file does not come back into dydit: routers of ordered width have a name here that it does not read."
        if ordered
        else f"""dydit reads the file back:

```sh
dydit convert --checkpoint {subject.name}/{file} --family flux{option} --out converted
```"""
    )
    return (
        head(subject, DYNAMIC)
        + f"""
## Use

For [ComfyUI](https://github.com/comfyanonymous/ComfyUI), with neither dydit nor diffusers:

1. `{file}` goes into `ComfyUI/models/diffusion_models`. It has the layout of {subject.family.reference_url}, with the
   routers of each block beside its tensors. ComfyUI calls these "unet unexpected" when it loads the file, and does without them.
2. The folder `{node}` goes into `ComfyUI/custom_nodes`. Restart ComfyUI.
3. In a workflow for FLUX: *Load Diffusion Model* (this file) → *Apply dydit (FLUX)* (this file again, for its routers) → everything
   that takes a model. Without *Apply dydit* the same file is the complete, static model.

```
{subject.name}/
├── {file}
└── {node}/
```

What the node does, what it goes together with and what it refuses stands in `{node}/README.md`. It was tested against a stand-in of
ComfyUI's patcher and blocks, not in ComfyUI itself.

{back}

"""
        + licence(subject, f"dydit, and with it the folder `{node}`,")
    )
