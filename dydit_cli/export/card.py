"""The model card: what the model is, where it comes from, and code that loads it. Tests run the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PureWindowsPath

from dydit_cli.artifacts.manifest import versions
from dydit_cli.checkpoints.terms import Terms
from dydit_cli.dynamic.geometry import Geometry
from dydit_cli.export.lineage import Lineage
from dydit_cli.export.metadata import GIVEN, front_matter, license_words
from dydit_cli.families.family import Family

VAE = "stabilityai/sd-vae-ft-ema"
"""The autoencoder of the published DiT and SiT; a model of one's own may need another."""

DYNAMIC = (
    'A {title} whose width and tokens depend on the timestep and the image ("Dynamic Diffusion Transformer",\n'
    "[arXiv 2410.03456](https://arxiv.org/abs/2410.03456)), made by {maker}."
)
STATIC = "The static {title} inside a dynamic one, written by {maker}."

DRAW = """images = pipeline(
    class_labels={labels},
    guidance_scale=1.5,
    num_inference_steps={steps},
    generator=torch.manual_seed(0),
).images
images[0].save("image.png")
"""


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        name: Of the export's folder.
        family: Of the model.
        geometry: Of the model.
        lineage: Its past.
        dtype: Of the written weights.
        steps: Sampling steps of the examples.
        introduction: What the model is, in a sentence with ``{title}`` and ``{maker}``.
        dials: Whether its cost can be changed while it runs.
        limits: What it cannot do that a dynamic model can, as paragraphs.
        terms: Licence and repository of the base model.
        measured: A section of what was measured of it, or nothing.
    """

    name: str
    family: Family
    geometry: Geometry
    lineage: Lineage
    dtype: str
    steps: int = 50
    introduction: str = DYNAMIC
    dials: bool = True
    limits: str = ""
    terms: Terms = field(default_factory=Terms)
    measured: str = ""


def pipeline_card(subject: Subject, *, needs_vae: bool, is_identity: bool, names: Sequence[str]) -> str:
    """The card of a pipeline folder.

    Args:
        subject: The model.
        needs_vae: Whether an autoencoder must be passed when it is loaded.
        is_identity: Whether the autoencoder in the folder is the one that does nothing.
        names: Names of the classes by label.
    """
    snippets = "\n".join(
        f"### {heading}\n\n```python\n{code}```\n"
        for heading, code in pipeline_snippets(subject, needs_vae, names).items()
    )
    vae = (
        "\nThe folder has no autoencoder: it must be passed, as shown. Use the one that the model was trained with.\n"
        if needs_vae
        else ""
    )
    identity = (
        " and an `AutoencoderKL` (the model draws pixels, so its autoencoder does nothing)"
        if is_identity
        else ""
    )
    labels = (
        "Classes have names: `pipeline.labels` lists them.\n" if names else "Classes are given by number.\n"
    )
    return (
        head(
            subject,
            subject.introduction,
            "library_name: diffusers\npipeline_tag: unconditional-image-generation\n",
            rate=subject.dials,
        )
        + f"""
## Use

The folder runs in diffusers' own `DiTPipeline` (diffusers 0.35 or later). Run the code below beside the folder `{subject.name}`.
diffusers remarks that it expected a `DiTTransformer2DModel`{identity}; that is as it should be.
{vae}
{snippets}
{labels}
{dials_of(subject, "pipeline.transformer")}{subject.limits}
{_scheduler(subject.family)}

"""
        + licence(subject, "dydit, and with it the file `modeling_dydit.py` in this folder,")
    )


def pipeline_snippets(subject: Subject, needs_vae: bool, names: Sequence[str]) -> dict[str, str]:
    """Code for each way to load a pipeline folder, by heading; meant to run beside the folder."""
    dtype = "" if subject.dtype == "float32" else f", torch_dtype=torch.{subject.dtype}"
    what = "AutoencoderKL, DiTPipeline" if needs_vae else "DiTPipeline"
    vae = f'vae = AutoencoderKL.from_pretrained("{VAE}"{dtype})\n' if needs_vae else ""
    passed = ", vae=vae" if needs_vae else ""
    labels = f'pipeline.get_label_ids(["{names[0]}", "{names[1]}"])' if len(names) > 1 else "[0, 1]"
    draw = DRAW.format(labels=labels, steps=subject.steps)
    dial = ", keep_bias=0.5" if subject.dials else ""
    imports = f"import torch\nfrom diffusers import {what}\n\n{vae}"
    folder = f'"{subject.name}"'
    return {
        "With dydit installed": f"import dydit_cli  # diffusers then knows the model's classes\n{imports}"
        f"pipeline = DiTPipeline.from_pretrained({folder}{passed}{dtype})\n{draw}",
        "With diffusers alone": f"{imports}# This runs transformer/modeling_dydit.py of the folder.\n"
        f"pipeline = DiTPipeline.from_pretrained({folder}{passed}{dtype}, trust_remote_code=True)\n{draw}",
        "With a transformer that you have loaded": f"import dydit_cli\n{imports}"
        f"transformer = dydit_cli.load_model({folder}{dtype}{dial})\n"
        f"pipeline = DiTPipeline.from_pretrained({folder}, transformer=transformer{passed}{dtype})\n{draw}",
    }


def original_card(subject: Subject, file: str, *, ordered: bool) -> str:
    """The card of a file in the original layout with routers.

    Args:
        subject: The model.
        file: Name of the weight file.
        ordered: Whether the units' order of importance is in the file.
    """
    heads = subject.geometry.num_heads
    orders = (
        """Beside them stand `attn.head_order` and `mlp.channel_order` of each block: this model's units lie in the order of the
static checkpoint, and the routers count them by importance (rank r is head `head_order[r]`; group g holds the channels
`channel_order[g * width : (g + 1) * width]`). The authors' code knows no such order and refuses the file, which is right: it would
switch off the wrong units."""
        if ordered
        else "The units lie in the order of their importance, as the authors' code expects them."
    )
    return (
        head(subject, DYNAMIC)
        + f"""
## Use

`{file}` is a flat state dict in the layout of {subject.family.reference_url}, with the routers under the names that the authors of
"Dynamic Diffusion Transformer" gave them (`attn_rate.router`, `mlp_rate.router`, `token_selection.mlp_head`).

{orders}

```python
import torch

weights = torch.load("{subject.name}/{file}", weights_only=True)
```

dydit reads it back:

```sh
dydit convert --checkpoint {subject.name}/{file} --family {subject.family.name} --num-heads {heads} --out converted
```

"""
        + licence(subject)
    )


def static_card(subject: Subject, file: str, *, exact: bool, diffusers: bool = False) -> str:
    """The card of a static model.

    Args:
        subject: The model.
        file: Name of the weight file.
        exact: Whether the tensors are those of the base, bit for bit.
        diffusers: Whether it is a folder of diffusers' `DiTTransformer2DModel`.
    """
    trained = (
        "They were fine-tuned as part of a dynamic model, whose complete model, all units on, they are."
        if subject.lineage.steps
        else "They are those of the base model, bit for bit."
        if exact
        else ""
    )
    what = (
        "the weights of the static model alone, for diffusers' `DiTTransformer2DModel`."
        if diffusers
        else f"the weights of the static model alone, in the keys, shapes and unit order of\n{subject.family.reference_url}, for whose "
        "code it is."
    )
    load = (
        "from diffusers import DiTTransformer2DModel\n\n"
        f'model = DiTTransformer2DModel.from_pretrained("{subject.name}")'
        if diffusers
        else f'import torch\n\nweights = torch.load("{subject.name}/{file}", weights_only=True)'
        if file.endswith(".pt")
        else f'from safetensors.torch import load_file\n\nweights = load_file("{subject.name}/{file}")'
    )
    return (
        head(subject, STATIC, rate=False)
        + f"""
## Use

`{file}` holds {what} {trained}

```python
{load}
```

"""
        + licence(subject)
    )


# ------------------------------------------------------------------ parts


def dials_of(subject: Subject, transformer: str) -> str:
    """How the cost of a model is changed while it runs; ``transformer`` is its name in the examples."""
    if not subject.dials:
        return ""
    return f"""Only what the routers keep is computed. The cost can be changed while the model lives:

- `{transformer}.set_keep_bias(1.0)` keeps more, a negative value less;
- `{transformer}.set_execution("static")` runs the complete model, `"compact"` what is kept.
"""


def head(subject: Subject, introduction: str, library: str = "", *, rate: bool = True) -> str:
    """The top of a card: its fields, title, introduction and a table of facts."""
    geometry, lineage, family = subject.geometry, subject.lineage, subject.family
    rows = {
        "base model": _base(subject),
        "family": f"[{family.title}]({family.reference_url})",
        "size": f"{geometry.depth} blocks, {geometry.hidden_size} channels, {geometry.num_heads} heads and "
        f"{geometry.num_groups} channel groups a block, patches of {geometry.patch_size}",
        "input": f"{' x '.join(map(str, geometry.sample_shape))}, "
        + (
            "text"
            if geometry.has_context
            else f"{geometry.num_classes} classes"
            if geometry.num_classes
            else "no classes"
        ),
        "ratio": _ratio(lineage) if rate else "",
        "weights": subject.dtype,
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items() if text)
    fields = library if "library_name" in library else f"library_name: dydit\n{library}"
    if "pipeline_tag" not in fields:
        fields += _pipeline_tag(geometry)
    relation = "finetune" if lineage.steps else None
    return f"""{front_matter(subject.terms, ("dydit", family.name), fields, relation=relation)}
# {subject.name}

{introduction.format(title=family.title, maker=_maker())}

| | |
| --- | --- |
{table}
{subject.measured}"""


def _pipeline_tag(geometry: Geometry) -> str:
    """What a model does, in the Hub's words, which are none for videos of classes."""
    video = len(geometry.sample_shape) == 4
    if geometry.has_context:
        return f"pipeline_tag: text-to-{'video' if video else 'image'}\n"
    return "" if video else "pipeline_tag: unconditional-image-generation\n"


def _maker() -> str:
    """The package, with its version where it is installed and not just a folder on the path."""
    return f"dydit {versions().get('dydit', '')}".rstrip()


def _base(subject: Subject) -> str:
    if subject.terms.repository is not None:
        return f"[{subject.terms.repository}](https://huggingface.co/{subject.terms.repository})"
    base = subject.lineage.base
    # The name alone, also of a path of another system: where it lay is nobody's business who reads the card.
    return f"`{PureWindowsPath(base).name}`" if base else "not recorded"


def _ratio(lineage: Lineage) -> str:
    if lineage.ratio is None:
        return "1 (not fine-tuned yet: the routers keep everything)"
    target = f" (target {lineage.target_ratio:g})" if lineage.target_ratio is not None else ""
    return (
        f"{lineage.ratio:.3f}{target} of the static model's attention and MLP MACs, mean over held-out images"
    )


def _scheduler(family: Family) -> str:
    if family.objective == "flow":
        return (
            "The scheduler is first-order DPM-Solver++ on flow sigmas, which is Euler's method on the path of the model. Of second\n"
            "order it is more accurate at the same cost:\n"
            "`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=2)`."
        )
    return (
        "The scheduler is DDIM; others that predict noise go by `from_config(pipeline.scheduler.config)`. The pipeline guides all\n"
        "channels and drops the learned variance; `dydit sample` follows the original there."
    )


def licence(subject: Subject, ours: str = "dydit itself") -> str:
    """The last section of a card."""
    words = license_words(subject.terms)
    if subject.terms.said_by == GIVEN:
        said = f"The weights are under the licence {words}, as whoever exported them says. They come from {_base(subject)}."
    elif words:
        said = f"The weights are under the licence of the base model, {_base(subject)}: {words}."
    else:
        said = (
            f"The weights are under the licence of the base model: {_base(subject)}. Which one that is was not recorded; whoever\n"
            "publishes this model states it here and in the field `license` above (`dydit export --license`)."
        )
    return f"""## Licence

{said}

{ours[:1].upper()}{ours[1:]} is under the MIT licence.
"""
