"""The folder that diffusers' stock `DiTPipeline` runs: transformer, scheduler, autoencoder, and the code that they need.

Where diffusers has no pipeline for a family, the folder holds the same parts, and diffusers' `AutoModel` finds the class of the
transformer by its configuration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from dydit_cli.artifacts import save_model, write_json
from dydit_cli.artifacts.loading import CONFIG_NAME
from dydit_cli.export.identity_vae import IdentityAutoencoder
from dydit_cli.export.inline import inline
from dydit_cli.export.registration import MODULE
from dydit_cli.export.vae import Vae
from dydit_cli.families.dynamic_model import DynamicModel
from dydit_cli.families.family import ObjectiveKind
from dydit_cli.families.registry import family_of

PIXEL_CHANNELS = (1, 3)
"""Channels of models that work on pixels; the others work on the latents of an autoencoder."""

TRANSFORMER = "transformer"
CODE = f"{MODULE}.py"


def is_pixel_space(model: DynamicModel) -> bool:
    """Whether a model draws pixels, and needs no autoencoder."""
    return model.geometry.in_channels in PIXEL_CHANNELS


def scheduler_for(objective: ObjectiveKind) -> SchedulerMixin:
    """The stock scheduler that samples a family inside `DiTPipeline`.

    DiT: DDIM. The pipeline hands a scheduler the noise channels alone, so ancestral sampling with the learned variance is not to be
    had there. Trailing timesteps start at 999, where the pure noise is, and are the ones between which this scheduler's own step of
    1000 // steps leads.

    SiT: Euler's method along the linear path, which first-order DPM-Solver++ on flow sigmas is exactly. (diffusers' flow-matching
    Euler scheduler has no ``scale_model_input``, which the pipeline calls.) Its grid runs from 0.999 to 0 and its timesteps are cut
    to whole numbers.
    """
    if objective == "flow":
        return DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order=1,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=1.0,
            final_sigmas_type="zero",
        )
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def pipeline_model(model: DynamicModel) -> DynamicModel:
    """The same weights in the class that stock pipelines drive; they are shared, not copied."""
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        converted = family_of(model).pipeline_class(**arguments)
    converted.load_state_dict(model.state_dict(), assign=True)
    return converted


def write_pipeline(
    model: DynamicModel,
    folder: Path,
    *,
    vae: Vae | None,
    names: Sequence[str] = (),
    max_shard_size: str = "5GB",
) -> None:
    """Write a model as a pipeline folder, or as its parts where diffusers has no pipeline for them.

    Args:
        model: In its family's own convention, in the dtype to write.
        folder: An empty folder.
        vae: The autoencoder to copy in. Without one a pixel-space model gets the identity, and a latent one none.
        names: Names of the classes by label.
        max_shard_size: Of the weight files.
    """
    code = inline()
    transformer = pipeline_model(model)
    save_model(transformer, folder / TRANSFORMER, max_shard_size)
    (folder / TRANSFORMER / CODE).write_text(code, encoding="utf-8")
    family = family_of(model)
    scheduler = scheduler_for(family.objective)
    scheduler.save_pretrained(str(folder / "scheduler"))
    if family.stock_pipeline is None:
        _name_for_auto_model(folder / TRANSFORMER / CONFIG_NAME, type(transformer).__name__)
        if vae is not None:
            vae.copy_to(folder / "vae")
        return
    index: dict[str, Any] = {
        "_class_name": family.stock_pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        TRANSFORMER: [MODULE, type(transformer).__name__],
    }
    if vae is not None:
        vae.copy_to(folder / "vae")
        index["vae"] = ["diffusers", vae.class_name]
    elif is_pixel_space(model):
        identity = IdentityAutoencoder(latent_channels=model.geometry.in_channels)
        identity.save_pretrained(str(folder / "vae"))
        (folder / "vae" / CODE).write_text(code, encoding="utf-8")
        index["vae"] = [MODULE, type(identity).__name__]
    else:
        # diffusers then expects one to be passed, and says so if it is not.
        index["vae"] = [None, None]
    if names:
        index["id2label"] = {str(label): name for label, name in enumerate(names)}
    write_json(folder / "model_index.json", index)


def _name_for_auto_model(file: Path, class_name: str) -> None:
    """Tell `AutoModel` where the class of a configuration is."""
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, config | {"auto_map": {"AutoModel": f"{MODULE}.{class_name}"}})
