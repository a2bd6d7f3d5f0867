"""The node as ComfyUI sees it: its inputs, its output, and where it stands in the menu."""

from __future__ import annotations

from typing import Any

from .host import comfy_host
from .patch import patched
from .reading import read_routers

FOLDER = "diffusion_models"
KEEP_BIAS_LIMIT = 50.0


class ApplyDydit:
    """Runs a FLUX dynamically: heads, channel groups and image tokens that its routers switch off are not computed."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "advanced/model"
    DESCRIPTION = (
        "Runs a FLUX that dydit made dynamic. Load the file with 'Load Diffusion Model' and choose the same file here: it holds "
        "the routers beside the weights."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks of every node."""
        import folder_paths  # type: ignore[import-not-found]  # ComfyUI's own

        dial = {
            "default": 0.0,
            "min": -KEEP_BIAS_LIMIT,
            "max": KEEP_BIAS_LIMIT,
            "step": 0.05,
            "tooltip": "Added to every router's logit: above 0 more is kept, below 0 less.",
        }
        tip = {"tooltip": "The file that the model was loaded from; it holds the routers too."}
        return {
            "required": {
                "model": ("MODEL",),
                "routers": (folder_paths.get_filename_list(FOLDER), tip),
                "keep_bias": ("FLOAT", dial),
            }
        }

    def apply(self, model: Any, routers: str, keep_bias: float) -> tuple[Any]:
        """Return a copy of the MODEL that runs dynamically; weights are shared, the input stays as it is."""
        import folder_paths

        path = folder_paths.get_full_path_or_raise(FOLDER, routers)
        return (patched(model, read_routers(path), float(keep_bias), comfy_host()),)
