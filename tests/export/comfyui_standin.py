"""A stand-in for the parts of ComfyUI that the node uses, written from what its source says of their interface (0.15.0).

It has FLUX's blocks in black-forest-labs' layout, a patcher with replacements and wrappers, layers whose weights may lie in another type
or wait for patches, and the folder of models. It is no ComfyUI: what it shows is that the node keeps to the interface as described.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Patch = Callable[[Tensor], Tensor]


class CastWeightBiasOp:
    """What ComfyUI's layers have in common."""

    weight_function: tuple[Patch, ...] = ()


class Linear(nn.Linear, CastWeightBiasOp):
    """A layer whose weights are cast, and patched by LoRAs, when it is called."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight, bias, handle = cast_bias_weight(self, inputs, offloadable=True)
        result = F.linear(inputs, weight, bias)
        uncast_bias_weight(self, weight, bias, handle)
        return result


BORROWED: list[object] = []
"""Handles of weights that were cast and not yet handed back."""


def cast_bias_weight(
    layer: nn.Linear, inputs: Tensor, offloadable: bool = False
) -> tuple[Tensor, Tensor, object]:
    """The weights as a forward needs them."""
    assert offloadable
    weight = layer.weight.to(inputs.dtype)
    for patch in layer.weight_function:  # type: ignore[union-attr]
        weight = patch(weight)
    handle = object()
    BORROWED.append(handle)
    return weight, layer.bias.to(inputs.dtype), handle


def uncast_bias_weight(layer: nn.Linear, weight: Tensor, bias: Tensor, handle: object) -> None:
    """The caller needs them no longer."""
    BORROWED.remove(handle)


def optimized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    skip_reshape: bool = False,
    transformer_options: Mapping[str, Any] | None = None,
) -> Tensor:
    """(B, H, L, D) -> (B, L, H * D), by the user's choice of kernel."""
    assert skip_reshape
    assert query.shape[1] == heads
    assert transformer_options is not None
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def apply_rope(inputs: Tensor, matrices: Tensor) -> Tensor:
    """Rotate pairs of channels of (B, H, S, D) in fp32."""
    pairs = inputs.float().unflatten(-1, (-1, 2))
    return (
        torch.einsum("bhspij,bhspj->bhspi", matrices.expand(*pairs.shape[:-1], 2, 2), pairs)
        .flatten(-2)
        .to(inputs)
    )


class Modulation(nn.Module):
    """adaLN values: shift, scale and gate of one or two branches."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.lin = Linear(width, 3 * branches * width)

    def forward(self, vec: Tensor) -> list[tuple[Tensor, ...]]:
        parts = self.lin(F.silu(vec))[:, None].chunk(3 * self.branches, dim=-1)
        return [parts[3 * index : 3 * index + 3] for index in range(self.branches)]


class RMSNorm(nn.RMSNorm):
    """Casts its scale, as ComfyUI's does."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


class QueryKeyNorm(nn.Module):
    """RMS norms of a head's channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim, eps=1e-6), RMSNorm(dim, eps=1e-6)


class Attention(nn.Module):
    """The layers of one stream's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)
        self.norm = QueryKeyNorm(width // heads)


def normed(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised and modulated."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


def split_heads(flat: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, S, 3C) -> three times (B, H, S, D)."""
    return flat.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class DoubleStreamBlock(nn.Module):
    """Image and text apart."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.num_heads = heads
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_mod", Modulation(width, 2))
            self.add_module(f"{stream}_attn", Attention(width, heads))
            layers = (Linear(width, mlp), nn.GELU(approximate="tanh"), Linear(mlp, width))
            self.add_module(f"{stream}_mlp", nn.Sequential(*layers))

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None,
        transformer_options: Any,
    ) -> tuple[Tensor, Tensor]:
        tokens = {"txt": txt, "img": img}
        mods = {name: getattr(self, f"{name}_mod")(vec) for name in tokens}
        joint: list[list[Tensor]] = [[], [], []]
        for name, values in tokens.items():
            attention, (shift, scale, _) = getattr(self, f"{name}_attn"), mods[name][0]
            query, key, value = split_heads(attention.qkv(normed(values, shift, scale)), self.num_heads)
            parts = (attention.norm.query_norm(query), attention.norm.key_norm(key), value)
            for list_, part in zip(joint, parts, strict=True):
                list_.append(part)
        query, key, value = (torch.cat(parts, dim=2) for parts in joint)
        mixed = optimized_attention(
            apply_rope(query, pe),
            apply_rope(key, pe),
            value,
            self.num_heads,
            mask=attn_mask,
            skip_reshape=True,
            transformer_options=transformer_options,
        )
        halves = {"txt": mixed[:, : txt.shape[1]], "img": mixed[:, txt.shape[1] :]}
        for name, values in tokens.items():
            (_, _, gate), (shift, scale, last_gate) = mods[name]
            values = values + gate * getattr(self, f"{name}_attn").proj(halves[name])
            tokens[name] = values + last_gate * getattr(self, f"{name}_mlp")(normed(values, shift, scale))
        return tokens["img"], tokens["txt"]


class SingleStreamBlock(nn.Module):
    """Image and text joined, attention and MLP side by side."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.num_heads, self.mlp_hidden_dim = heads, mlp
        self.linear1, self.linear2 = Linear(width, 3 * width + mlp), Linear(width + mlp, width)
        self.norm = QueryKeyNorm(width // heads)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(width, 1)

    def forward(
        self, img: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None, transformer_options: Any
    ) -> Tensor:
        ((shift, scale, gate),) = self.modulation(vec)
        flat, hidden = self.linear1(normed(img, shift, scale)).split(
            [3 * img.shape[-1], self.mlp_hidden_dim], dim=-1
        )
        query, key, value = split_heads(flat, self.num_heads)
        mixed = optimized_attention(
            apply_rope(self.norm.query_norm(query), pe),
            apply_rope(self.norm.key_norm(key), pe),
            value,
            self.num_heads,
            mask=attn_mask,
            skip_reshape=True,
            transformer_options=transformer_options,
        )
        return img + gate * self.linear2(torch.cat([mixed, self.mlp_act(hidden)], dim=-1))


class Embedder(nn.Module):
    """Two layers with a SiLU between."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = Linear(inputs, width), Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(values)))


class LastLayer(nn.Module):
    """To latents."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, tokens: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(normed(tokens, shift, scale))


def sinusoids(values: Tensor) -> Tensor:
    """(B,) -> (B, 256)."""
    angles = 1000 * values[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Flux(nn.Module):
    """The diffusion model: latents in and out.

    Args:
        tensors: Of a file in black-forest-labs' layout; what it has beyond the model is left out, as ComfyUI does.
        axes: Of the rotary embedding.
    """

    def __init__(self, tensors: Mapping[str, Tensor], axes: tuple[int, ...]) -> None:
        super().__init__()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.hidden_size = width = shapes["img_in.weight"][0]
        self.num_heads = heads = width // sum(axes)
        self.axes = axes
        mlp = shapes["double_blocks.0.img_mlp.0.weight"][0]
        depths = [
            len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}_blocks.")})
            for kind in ("double", "single")
        ]
        self.img_in = Linear(shapes["img_in.weight"][1], width)
        self.txt_in = Linear(shapes["txt_in.weight"][1], width)
        self.time_in, self.vector_in = (
            Embedder(256, width),
            Embedder(shapes["vector_in.in_layer.weight"][1], width),
        )
        self.guidance_in = Embedder(256, width) if "guidance_in.in_layer.weight" in shapes else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(width, heads, mlp) for _ in range(depths[0]))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(width, heads, mlp) for _ in range(depths[1]))
        self.final_layer = LastLayer(width, shapes["final_layer.linear.weight"][0])
        # ComfyUI knows the norms' scales by the name of torch's own layer.
        renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}
        missing, self.unexpected = self.load_state_dict(renamed, strict=False)
        assert not missing
        self.requires_grad_(False).eval()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        ref_latents: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> Tensor:
        options = transformer_options or {}
        wrappers = [
            each
            for of_key in options.get("wrappers", {}).get("diffusion_model", {}).values()
            for each in of_key
        ]
        executor = Executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, options, **keywords)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: Tensor | None,
        ref_latents: Any,
        control: Any,
        options: dict[str, Any],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        options = options.copy()
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        img = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ids = torch.zeros(len(x), context.shape[1] + rows * columns, 3)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        ids[:, context.shape[1] :, 1:] = grid.float()
        pe = self._positions(ids)
        img, txt = self.img_in(img), self.txt_in(context)
        vec = self.time_in(sinusoids(timestep).to(x.dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(sinusoids(guidance).to(x.dtype))
        vec = vec + self.vector_in(y)
        replaced = options.get("patches_replace", {}).get("dit", {})
        common = {"vec": vec, "pe": pe, "attn_mask": attention_mask, "transformer_options": options}
        for index, block in enumerate(self.double_blocks):

            def original(given: dict[str, Any], block: nn.Module = block) -> dict[str, Tensor]:
                return dict(zip(("img", "txt"), block(**given), strict=True))

            given = {"img": img, "txt": txt, **common}
            patch = replaced.get(("double_block", index))
            out = original(given) if patch is None else patch(given, {"original_block": original})
            img, txt = out["img"], out["txt"]
            if control is not None and (add := control["input"][index]) is not None:
                img[:, : add.shape[1]] += add
        length = txt.shape[1]
        img = torch.cat([txt, img], dim=1)
        options["img_slice"] = [length, img.shape[1]]
        for index, block in enumerate(self.single_blocks):

            def only(given: dict[str, Any], block: nn.Module = block) -> dict[str, Tensor]:
                return {"img": block(**given)}

            given = {"img": img, **common}
            patch = replaced.get(("single_block", index))
            img = (only(given) if patch is None else patch(given, {"original_block": only}))["img"]
            if control is not None and (add := control["output"][index]) is not None:
                img[:, length : length + add.shape[1]] += add
        tokens = self.final_layer(img[:, length:], vec)
        grid_out = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
        return grid_out.flatten(4).flatten(2, 3)

    def _positions(self, ids: Tensor) -> Tensor:
        """(B, S, 3) -> (B, 1, S, D / 2, 2, 2)."""
        parts = []
        for axis, size in enumerate(self.axes):
            speeds = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = ids[..., axis, None].double() * speeds
            cosine, sine = angles.cos(), angles.sin()
            parts.append(torch.stack([cosine, -sine, sine, cosine], dim=-1).unflatten(-1, (2, 2)))
        return torch.cat(parts, dim=2).float()[:, None]


class Executor:
    """Calls wrappers around a method, the first outermost."""

    def __init__(
        self, original: Callable[..., Any], class_obj: object, wrappers: list[Callable[..., Any]]
    ) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *arguments: Any, **keywords: Any) -> Any:
        """Begin."""
        if not self.wrappers:
            return self.original(*arguments, **keywords)
        return self.wrappers[0](self, *arguments, **keywords)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Go on inside a wrapper."""
        return Executor(self.original, self.class_obj, self.wrappers[1:]).execute(*arguments, **keywords)


@dataclass
class BaseModel:
    """What a patcher holds."""

    diffusion_model: nn.Module


class ModelPatcher:
    """A MODEL: weights that clones share, and options that each has of its own."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}

    def clone(self) -> ModelPatcher:
        """Options are copied deeply, as ComfyUI has done."""
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {
            kind: {key: [*each] for key, each in of.items()} for kind, of in self.wrappers.items()
        }
        return other

    def get_model_object(self, name: str) -> Any:
        """By its attribute's name."""
        return getattr(self.model, name)

    def set_model_patch_replace(self, patch: Any, name: str, block_name: str, number: int) -> None:
        """Replace a block."""
        options = self.model_options["transformer_options"]
        options.setdefault("patches_replace", {}).setdefault(name, {})[block_name, number] = patch

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        """Patch the outputs of attention."""
        options = self.model_options["transformer_options"]
        options.setdefault("patches", {}).setdefault("attn1_output_patch", []).append(patch)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        """Wrap a stage of sampling."""
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def apply(self, x: Tensor, timestep: Tensor, **keywords: Any) -> Tensor:
        """One forward, with the options that a sampler puts together."""
        options = {**self.model_options["transformer_options"], "wrappers": self.wrappers, "sigmas": timestep}
        with torch.inference_mode():
            return self.model.diffusion_model(x, timestep, transformer_options=options, **keywords)


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """Put the stand-in where the node imports ComfyUI from; ``models`` is the folder of diffusion models."""
    here = sys.modules[__name__]
    ops, attention, folders = (
        ModuleType("comfy.ops"),
        ModuleType("comfy.ldm.modules.attention"),
        ModuleType("folder_paths"),
    )
    for name in ("CastWeightBiasOp", "cast_bias_weight", "uncast_bias_weight"):
        setattr(ops, name, getattr(here, name))
    attention.optimized_attention = optimized_attention  # type: ignore[attr-defined]
    folders.get_filename_list = lambda _: sorted(path.name for path in models.glob("*.safetensors"))  # type: ignore[attr-defined]
    folders.get_full_path_or_raise = lambda _, name: str(models / name)  # type: ignore[attr-defined]
    comfy = ModuleType("comfy")
    comfy.ops = ops  # type: ignore[attr-defined]
    for module in (comfy, ops, attention, folders, ModuleType("comfy.ldm"), ModuleType("comfy.ldm.modules")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
