"""The cards of FLUX exports: pipeline folders, the original layout with routers, the static model. Tests run the code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dydit_cli.export.card import DYNAMIC, STATIC, Subject, head, licence
from dydit_cli.export.flux_parts import FluxParts
from dydit_cli.families.flux_geometry import FluxGeometry

BASES = {True: "black-forest-labs/FLUX.1-dev", False: "black-forest-labs/FLUX.1-schnell"}
"""Whose text encoders and autoencoder fit, with and without a guidance scale."""
STEPS = {True: 28, False: 4}
USUAL_TOKENS = {True: 512, False: 256}
"""Tokens of a prompt in FLUX.1-dev and in FLUX.1-schnell."""
PLAIN = "FluxPipeline"

PARTS = """# The parts that the folder does not have; for a model of your own, the folder of the pipeline that it was trained with.
base = {pipeline}.from_pretrained("{base}", transformer=None{dtype})
names = ({missing})
parts = {{name: getattr(base, name) for name in names}}
"""

DRAW = """image = pipeline(
    "a sneaker",
    height={side},
    width={side},
    num_inference_steps={steps},
    guidance_scale={guidance},
    max_sequence_length={tokens},
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
"""


@dataclass(frozen=True)
class Way:
    """One way to load a folder.

    Attributes:
        heading: In the card.
        before: Code after the imports.
        imports: Whether dydit is imported.
        argument: Of ``from_pretrained``.
    """

    heading: str
    before: str
    imports: bool
    argument: str


WAYS = (
    Way("With dydit installed", "", True, ""),
    Way(
        "With diffusers alone",
        "# This runs transformer/modeling_dydit.py of the folder.\n",
        False,
        ", trust_remote_code=True",
    ),
    Way(
        "With a transformer that you have loaded",
        "transformer = dydit_cli.load_model({folder}{dtype}, keep_bias=0.5)\n",
        True,
        ", transformer=transformer",
    ),
)


def flux_pipeline_card(subject: Subject, parts: FluxParts, pipeline: str) -> str:
    """The card of a pipeline folder.

    Args:
        subject: The model.
        parts: What the folder has beside the transformer.
        pipeline: Name of diffusers' pipeline.
    """
    snippets = "\n".join(
        f"### {heading}\n\n```python\n{code}```\n"
        for heading, code in flux_snippets(subject, parts, pipeline).items()
    )
    missing = parts.missing
    lacking = (
        f"\nThe folder has no {_listed(missing)}: they must be passed, as shown. Use those that\nthe model was trained with.\n"
        if missing
        else ""
    )
    remarks = "`FluxTransformer2DModel`" + (" and an `AutoencoderKL`" if parts.patches else "")
    call = (
        ""
        if pipeline == PLAIN
        else f"\n`{pipeline}` takes pictures as well; diffusers' documentation tells how it is called.\n"
    )
    return (
        head(subject, DYNAMIC, "library_name: diffusers\npipeline_tag: text-to-image\n")
        + f"""
## Use

The folder runs in diffusers' own `{pipeline}`. Run the code below beside the folder `{subject.name}`. diffusers remarks that it
expected a {remarks}; that is as it should be.
{lacking}
{snippets}{call}
Only what the routers keep is computed. The cost can be changed while the pipeline lives:

- `pipeline.transformer.set_keep_bias(1.0)` keeps more, a negative value less;
- `pipeline.transformer.set_execution("static")` runs the complete model, `"compact"` what is kept.

LoRAs that were made for the static model fit: `pipeline.load_lora_weights(...)`.

"""
        + licence(subject, "dydit, and with it the file `modeling_dydit.py` in this folder,")
    )


def flux_snippets(subject: Subject, parts: FluxParts, pipeline: str) -> dict[str, str]:
    """Code for each way to load a pipeline folder, by heading; meant to run beside the folder."""
    geometry = flux_geometry(subject)
    guided = geometry.guidance
    facts = {
        "folder": f'"{subject.name}"',
        "dtype": "" if subject.dtype == "float32" else f", torch_dtype=torch.{subject.dtype}",
        "pipeline": pipeline,
        "base": BASES[guided],
        "missing": "".join(f'"{name}", ' for name in parts.missing).rstrip(" "),
        "side": geometry.sample_size * parts.reduction,
        "steps": STEPS[guided],
        "guidance": 3.5 if guided else 0.0,
        "tokens": min(geometry.text_tokens, USUAL_TOKENS[guided]),
    }
    given = PARTS.format(**facts) if parts.missing else ""
    passed = ", **parts" if parts.missing else ""
    draw = DRAW.format(**facts) if pipeline == PLAIN else ""
    return {
        way.heading: f"import torch\n{'import dydit_cli' + chr(10) if way.imports else ''}from diffusers import {pipeline}\n\n"
        + given
        + way.before.format(**facts)
        + f"pipeline = {pipeline}.from_pretrained({facts['folder']}{way.argument}{passed}{facts['dtype']})\n"
        + draw
        for way in WAYS
    }


def flux_original_card(
    subject: Subject, file: str, *, axes: Sequence[int], authors: bool, ordered: bool
) -> str:
    """The card of a file with routers in a layout that others read.

    Args:
        subject: The model.
        file: Name of the weight file.
        axes: How a head's channels are shared among the rotary axes.
        authors: Whether it is the layout of the authors' dynamic FLUX, else black-forest-labs' with routers of ours.
        ordered: Whether the units' order of importance is in the file.
    """
    # No tensor tells them where heads are not of 128 channels.
    known = sum(axes) == 128
    option = "" if known else f" --axes-dims-rope {','.join(map(str, axes))}"
    layout = (
        """`{file}` has the layout of the dynamic FLUX that the authors of "Dynamic Diffusion Transformer" released: the keys of
diffusers' `FluxTransformer2DModel`, and in every block the token router as `token_selection`."""
        if authors
        else """`{file}` is a single file in the layout of {reference}. The static model's tensors
are as there; beside them stand the routers of each block: `attn_rate` (heads), `mlp_rate` (channel groups), in blocks of two streams
`txt_mlp_rate`, and `token_selection` (image tokens). Programs that read the static file will call these unexpected; the complete
model without them is what `dydit export --format static` writes."""
    ).format(file=file, reference=subject.family.reference_url)
    orders = (
        """
Units lie in the order of the static checkpoint, and routers count them by importance: rank r is head `head_order[r]`, and group g
holds the channels `channel_order[g * width : (g + 1) * width]`.
"""
        if ordered
        else ""
    )
    return (
        head(subject, DYNAMIC)
        + f"""
## Use

{layout}
{orders}
```python
from safetensors.torch import load_file

weights = load_file("{subject.name}/{file}")
```

dydit reads it back:

```sh
dydit convert --checkpoint {subject.name}/{file} --family flux{option} --out converted
```

"""
        + licence(subject)
    )


def flux_static_card(subject: Subject, file: str | None, *, exact: bool) -> str:
    """The card of a static model.

    Args:
        subject: The model.
        file: Name of the single file in the original layout; None for a folder of diffusers' `FluxTransformer2DModel`.
        exact: Whether the tensors are those of the base, bit for bit.
    """
    lineage = subject.lineage
    trained = (
        "They were fine-tuned as part of a dynamic model, whose complete model, all units on, they are."
        if lineage.steps
        else f"They are those of the base model with {_listed(lineage.loras)} merged."
        if lineage.loras
        else f"They are the {subject.dtype} numbers that the {lineage.quantisation} numbers of the base stand for."
        if lineage.quantisation
        else "They are those of the base model, bit for bit."
        if exact
        else ""
    )
    dtype = "" if subject.dtype == "float32" else f", torch_dtype=torch.{subject.dtype}"
    if file is None:
        what = (
            "The folder holds the weights of the static model alone, as diffusers' `FluxTransformer2DModel`."
        )
        load = (
            "import torch\nfrom diffusers import FluxTransformer2DModel\n\n"
            f'transformer = FluxTransformer2DModel.from_pretrained("{subject.name}"{dtype})'
        )
    else:
        what = (
            f"`{file}` holds the weights of the static model alone, in the keys, shapes and unit order of "
            f"{subject.family.reference_url}, for whose code it is."
        )
        load = (
            f'from safetensors.torch import load_file\n\nweights = load_file("{subject.name}/{file}")'
            if file.endswith(".safetensors")
            else f'import torch\n\nweights = torch.load("{subject.name}/{file}", weights_only=True)'
        )
    return (
        head(subject, STATIC, rate=False)
        + f"""
## Use

{what} {trained}

```python
{load}
```

"""
        + licence(subject)
    )


def flux_geometry(subject: Subject) -> FluxGeometry:
    """The geometry as what it is."""
    if not isinstance(subject.geometry, FluxGeometry):
        raise TypeError(type(subject.geometry))
    return subject.geometry


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
