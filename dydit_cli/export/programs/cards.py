"""The cards of programs: what they are called with, code that runs them, and what they cannot do. Tests run the code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dydit_cli.export.card import Subject, head, licence

INTRODUCTION = (
    "One denoising step of a {title} whose width and tokens depend on the timestep and the image\n"
    '("Dynamic Diffusion Transformer", [arXiv 2410.03456](https://arxiv.org/abs/2410.03456)), as a program, made by {maker}.'
)
BAKED_INTRODUCTION = (
    "One denoising step of a {title} whose width follows a written schedule and whose tokens depend on the image\n"
    '("Dynamic Diffusion Transformer", [arXiv 2410.03456](https://arxiv.org/abs/2410.03456)), as a graph, made by {maker}.'
)
GUIDANCE = 1.5

TIMES = {
    "diffusion": ("500.0", "0 ... 999, 0 is data; one number for the whole batch"),
    "flow": ("0.5", "0 ... 1, 1 is data; one number for the whole batch"),
    "rectified-flow": ("0.5", "0 ... 1, 1 is noise; one number for the whole batch"),
}
PREDICTIONS = {
    "diffusion": "the predicted noise, then variance values where the model learned them",
    "flow": "the velocity, data - noise",
    "rectified-flow": "the velocity, noise - data",
}
MEANINGS = {
    "class_labels": "whole numbers; `{null}` is the null class of guidance",
    "prompt_embeds": "embeddings of the prompts by the text encoder that the model was trained with, two tokens at least",
    "prompt_mask": "true for the tokens of a prompt, false for what fills it up",
    "pooled": "embedding of each prompt as a whole",
    "guidance": "guidance scales",
    "extra": "latents that are packed beside the sample (mask and masked image)",
}


def torch_export_card(subject: Subject, file: str, inputs: Mapping[str, Tensor]) -> str:
    """The card of a program of `torch.export`.

    Args:
        subject: The model.
        file: The program.
        inputs: A call of it.
    """
    example, meaning = TIMES[subject.family.objective]
    shape = ", ".join(map(str, subject.geometry.sample_shape))
    codes = {"sample": f"torch.randn(2, {shape})", "timestep": f"torch.tensor({example})"}
    rows = [f"| `sample` | (B, {shape}) | the noisy sample{any_size(subject)} |"]
    rows.append(f"| `timestep` | no axes | {meaning} |")
    for name, tensor in inputs.items():
        if name not in codes:
            sizes = sizes_of(subject, name, tensor)
            codes[name] = code_of(name, sizes)
            means = MEANINGS[name].format(null=subject.geometry.num_classes)
            shown = ", ".join(("B", *map(str, sizes))) if sizes else "B,"
            rows.append(f"| `{name}` | ({shown}) | {means} |")
    call = "\n".join(f"        {name}={code}," for name, code in codes.items())
    table = "\n".join(rows)
    return (
        head(subject, INTRODUCTION)
        + f"""
## Use

`{file}` needs torch and nothing else. It is a program: load it only from those whom you trust. Run the code below beside the folder
`{subject.name}`.

```python
import torch

step = torch.export.load("{subject.name}/{file}").module()
with torch.no_grad():
    prediction = step(
{call}
    )
```

| input | shape | |
| --- | --- | --- |
{table}

The prediction has the sample's shape{channels_of(subject)}: {PREDICTIONS[subject.family.objective]}.
The batch may be of any size. The program runs on a CPU.

The routers decide inside the program. Heads and channel groups that are off are not computed, and neither is the MLP of skipped
tokens: the weights and tokens that are left are gathered by index. Beyond that it is plain torch, without plans or kept slices.
There are no dials, and all samples of a call share one timestep.

"""
        + licence(subject)
    )


def any_size(subject: Subject) -> str:
    """What is said of the sample's size."""
    return "; even sides, any size" if subject.geometry.has_context else ""


def channels_of(subject: Subject) -> str:
    """What is said of the prediction's channels."""
    geometry = subject.geometry
    if subject.family.objective == "diffusion" and geometry.out_channels != geometry.in_channels:
        return f" with {geometry.out_channels} channels"
    return ""


def sizes_of(subject: Subject, name: str, tensor: Tensor) -> list[int | str]:
    """The sizes of an input behind the batch: letters where they may change."""
    sizes: list[int | str] = list(tensor.shape[1:])
    if name in ("prompt_embeds", "prompt_mask"):
        sizes[0] = "T"
    if name == "extra":
        sizes[1:] = subject.geometry.sample_shape[1:]
    return sizes


def code_of(name: str, sizes: Sequence[int | str]) -> str:
    """An expression that gives an input for a batch of two."""
    shape = ", ".join(str(8 if size == "T" else size) for size in ("2", *sizes))
    if name == "class_labels":
        return "torch.tensor([0, 1])"
    if name == "prompt_mask":
        return f"torch.ones({shape}, dtype=torch.bool)"
    return "torch.tensor([3.5, 3.5])" if name == "guidance" else f"torch.randn({shape})"


SAMPLING = """import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{folder}/{file}")
times = json.loads(session.get_modelmeta().custom_metadata_map["timesteps"])
labels = np.array({labels})
both_labels = np.concatenate([labels, np.full_like(labels, {null})])  # {null} is the null class
{schedule}
images = np.random.default_rng(0).standard_normal((len(labels), {shape}), dtype=np.float32)
for step, (now, then) in enumerate(zip({pairs})):
    inputs = {{"sample": np.concatenate([images, images]), "step": np.array(step), "class_labels": both_labels}}
    with_class, without = np.split(session.run(None, inputs)[0][:, :{channels}], 2)
    {prediction} = without + {guidance} * (with_class - without)
{update}
"""
DDIM = {
    "schedule": "products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.array(times, dtype=int)]",
    "pairs": "products, [*products[1:], 1.0]",
    "prediction": "noise",
    "update": """    clean = (images - np.sqrt(1 - now) * noise) / np.sqrt(now)
    images = (np.sqrt(then) * clean + np.sqrt(1 - then) * noise).astype(np.float32)""",
}
EULER = {
    "schedule": "times.append(1.0)",
    "pairs": "times, times[1:]",
    "prediction": "velocity",
    "update": "    images = images + np.float32(then - now) * velocity",
}


def onnx_sampling(subject: Subject, file: str) -> str:
    """Code that draws two pictures with onnxruntime and numpy: DDIM, or Euler's method."""
    geometry = subject.geometry
    return SAMPLING.format(
        folder=subject.name,
        file=file,
        labels=[0, min(1, geometry.num_classes - 1)],
        null=geometry.num_classes,
        shape=", ".join(map(str, geometry.sample_shape)),
        channels=geometry.in_channels,
        guidance=GUIDANCE,
        **(EULER if subject.family.objective == "flow" else DDIM),
    )


def onnx_card(subject: Subject, file: str, *, sampler: str, steps: int, timesteps: int) -> str:
    """The card of an ONNX graph.

    Args:
        subject: The model.
        file: The graph.
        sampler: Whose timesteps it serves.
        steps: Of a run.
        timesteps: How many these are.
    """
    geometry = subject.geometry
    shape = ", ".join(map(str, geometry.sample_shape))
    kind = "latents; decode them with the autoencoder that the model was trained with"
    if geometry.in_channels in (1, 3):
        kind = "pixels in [-1, 1]"
    return (
        head(subject, BAKED_INTRODUCTION, "library_name: onnx\n")
        + f"""
## Use

`{file}` runs in onnxruntime. It serves the {timesteps} timesteps of {steps} steps of `dydit sample --sampler {sampler}`; they stand in
its metadata, and it is told the number of the step. Run the code below beside the folder `{subject.name}`; it needs onnxruntime and
numpy.

```python
{onnx_sampling(subject, file)}```

`images` are {kind}.

| input | shape | |
| --- | --- | --- |
| `sample` | (B, {shape}) | the noisy sample, float32 |
| `step` | no axes | number of the step, int64, from 0 |
| `class_labels` | (B,) | int64; `{geometry.num_classes}` is the null class |

The output, `prediction`, has the sample's shape{channels_of(subject)}: {PREDICTIONS[subject.family.objective]}.
The batch may be of any size. Heads and channel groups that a step leaves out are not computed, and neither is the MLP of skipped
tokens: what is left is gathered by index from one copy of the weights. There are no dials, and other timesteps need another export.

"""
        + licence(subject)
    )
