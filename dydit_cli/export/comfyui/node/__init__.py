"""Dynamic FLUX in ComfyUI: the node "Apply dydit (FLUX)".

Written by `dydit export --format comfyui`, and made of torch alone: no diffusers, no dydit. See README.md.

Copyright (c) 2026 the dydit authors. SPDX-License-Identifier: MIT
"""

from __future__ import annotations

from .nodes import ApplyDydit

NODE_CLASS_MAPPINGS = {"DyditApplyFlux": ApplyDydit}
NODE_DISPLAY_NAME_MAPPINGS = {"DyditApplyFlux": "Apply dydit (FLUX)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
