"""FLUX (black-forest-labs/flux) with routers, as a subclass of diffusers' class: its keys, its keywords, its mixins.

A forward knows nothing of training or inference: the executor says how masks become arithmetic, the gating how logits become
masks. With static execution, every block runs diffusers' own forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from diffusers.utils import (
    USE_PEFT_BACKEND,
    scale_lora_layers,
    set_weights_and_activate_adapters,
    unscale_lora_layers,
)
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.routing import Decisions, Routing
from dydit_cli.errors import DyditError, did_you_mean
from dydit_cli.execution import CompactExecutor, Executor, StaticExecutor, WidthPlan
from dydit_cli.families.backbone import check_divides, same_for_all
from dydit_cli.families.caching import between_cached_blocks, cache_context, is_cached
from dydit_cli.families.dynamic_model import DynamicModel, routing_of
from dydit_cli.families.flux_blocks import DynamicFluxBlock, DynamicFluxSingleBlock, FluxBlockShape
from dydit_cli.families.flux_geometry import PATCH, FluxGeometry
from dydit_cli.families.text_condition import TextCondition
from dydit_cli.randomness import normal

TOKEN_ROUTERS = ("low-rank", "authors")
EXAMPLE_GUIDANCE = 3.5


class DyFluxTransformer2DModel(DynamicModel, FluxTransformer2DModel):
    """FLUX whose heads, MLP groups and image tokens are dynamic.

    Args:
        patch_size: As in diffusers, whose published models say 1: pixels are packed outside the model.
        in_channels: Channels of a token: 4 for each latent channel.
        out_channels: Channels of a token that are predicted; None means ``in_channels``.
        num_layers: Blocks of two streams.
        num_single_layers: Blocks of one stream.
        attention_head_dim: C_h.
        num_attention_heads: H.
        joint_attention_dim: Width of the prompt's embeddings.
        pooled_projection_dim: Width of the pooled embedding.
        guidance_embeds: Whether a guidance scale is embedded.
        axes_dims_rope: How a head's channels are shared among the rotary axes.
        mlp_hidden_size: Hidden channels of the MLPs; None means 4C.
        num_groups: G; None means H. Divides ``mlp_hidden_size``.
        always_on: Whether the most important head and group have no router row and are always on.
        width: Which masks heads and groups have: ``free`` (any, the paper's) or ``ordered`` (the most important units); False
            means no routers, as in the authors' released FLUX.
        token_router: ``low-rank`` (ours) or ``authors`` (theirs, with four C x C layers a block).
        token_rank: Rank of the low-rank one; None means C / 48.
        sample_size: Latent side of the reference resolution, at which costs are quoted.
        text_tokens: Length of prompts at which they are.
        td_lora: ``rank`` and ``experts`` of a model whose weights follow the timestep; see `insert_timed_layers`.

    Raises:
        DyditError: If the numbers do not fit together.
    """

    family: ClassVar[str] = "flux"
    geometry: FluxGeometry
    _no_split_modules: ClassVar[list[str]] = ["DynamicFluxBlock", "DynamicFluxSingleBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["DynamicFluxBlock", "DynamicFluxSingleBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "_router"]
    # Shards know nothing of orders and masks; without a plan diffusers says that it has none.
    _cp_plan = None
    _tp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        mlp_hidden_size: int | None = None,
        num_groups: int | None = None,
        always_on: bool = True,
        width: str | bool = "free",
        token_router: str = "low-rank",
        token_rank: int | None = None,
        sample_size: int = 128,
        text_tokens: int = 512,
        td_lora: Mapping[str, Any] | None = None,
    ) -> None:
        # Without blocks: the dynamic ones are made below, and a full-size model is not made twice.
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            num_single_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        hidden = num_attention_heads * attention_head_dim
        mlp_hidden, groups = mlp_hidden_size or 4 * hidden, num_groups or num_attention_heads
        predicted = patch_size**2 * (out_channels or in_channels)
        check_divides("channel groups", groups, "MLP's hidden size", mlp_hidden)
        for name, channels in (("in_channels", in_channels), ("out_channels", predicted)):
            if channels % PATCH**2:
                raise DyditError(
                    f"{name} of {channels} is no multiple of 4.",
                    why="A token of FLUX holds 2x2 latent pixels.",
                    fix="Give the channels of a token, 4 for each latent channel.",
                )
        if token_router not in TOKEN_ROUTERS:
            raise DyditError(
                f"There is no token router called '{token_router}'.",
                why=f"A FLUX model has one of: {', '.join(TOKEN_ROUTERS)}.",
                fix=did_you_mean(token_router, TOKEN_ROUTERS) or "Pass one of these.",
            )
        self.register_to_config(
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            mlp_hidden_size=mlp_hidden,
            num_groups=groups,
        )
        self.geometry = FluxGeometry(
            hidden_size=hidden,
            depth=num_layers + num_single_layers,
            num_heads=num_attention_heads,
            num_groups=groups,
            mlp_hidden=mlp_hidden,
            num_tokens=(sample_size // PATCH) ** 2,
            patch_size=PATCH,
            in_channels=predicted // PATCH**2,
            out_channels=predicted // PATCH**2,
            sample_size=sample_size,
            num_classes=0,
            always_on=always_on,
            num_double=num_layers,
            text_tokens=text_tokens,
            joint_size=joint_attention_dim,
            pooled_size=pooled_projection_dim,
            packed_channels=in_channels,
            guidance=guidance_embeds,
            ordered_width=width == "ordered",
            routed_width=width is not False,
            full_token_router=token_router == "authors",
            token_rank=token_rank,
        )
        shape = FluxBlockShape(
            hidden_size=hidden,
            num_heads=num_attention_heads,
            mlp_hidden=mlp_hidden,
            num_groups=groups,
            always_on=always_on,
            width=None if width is False else str(width),
            full_token_router=token_router == "authors",
            token_rank=token_rank,
        )
        self.transformer_blocks = nn.ModuleList(DynamicFluxBlock(shape) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            DynamicFluxSingleBlock(shape) for _ in range(num_single_layers)
        )
        self.begin_dynamic()

    # ------------------------------------------------------------------ what plans ask

    @property
    def dynamic_blocks(self) -> list[Any]:
        """The blocks in their order: of two streams, then of one."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    def conditioning_modules(self) -> list[nn.Module]:
        """See `ConditionedModel`."""
        return [self.time_text_embed.timestep_embedder]

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(S,) t in [0, 1] -> (S, C). The width routers read this and neither prompt nor guidance."""
        return self._embed_time(timestep, self.dtype, self.dtype)

    def _embed_time(self, timestep: Tensor, scaled_in: torch.dtype, dtype: torch.dtype) -> Tensor:
        embedder = self.time_text_embed
        sinusoids = embedder.time_proj(timestep.to(scaled_in) * 1000)
        embedding: Tensor = embedder.timestep_embedder(sinusoids.to(dtype))
        return embedding

    def make_executor(self, name: str, compile: bool = False) -> Executor:  # noqa: A002
        """See `DynamicModel`."""
        if compile:
            raise DyditError(
                "FLUX is not compiled by set_execution.",
                why="Compiled blocks are of DiT's form; those of FLUX have two streams.",
                fix="Leave compile out.",
            )
        return super().make_executor(name)

    def plan(
        self, timesteps: Tensor | Sequence[float], class_labels: Tensor | Sequence[int] | None = None
    ) -> WidthPlan:
        """Prepare a schedule; see `DynamicModel`. ``timesteps`` are in [0, 1], the scheduler's divided by 1000.

        A pipeline casts them to the type of its latents before it divides; in bf16 that rounds. A timestep that was not
        announced asks the routers once and is remembered.
        """
        if class_labels is not None:
            raise DyditError(
                "FLUX takes no class labels.",
                why="It is conditioned on text, on which no width depends.",
                fix="Call model.plan(timesteps).",
            )
        # As forward casts them.
        return super().plan(torch.as_tensor(timesteps).flatten().to(self.dtype))

    # ------------------------------------------------------------------ adapters

    def set_adapters(self, adapter_names: str | list[str], weights: Any = None) -> None:
        """Choose adapters and their weights; see diffusers' `PeftAdapterMixin`.

        Not by its method, which in older versions looks the class up in a list of diffusers' own.

        Raises:
            DyditError: If there are not as many weights as adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(given) != len(names):
            raise DyditError(
                f"There are {len(names)} adapters and {len(given)} weights.",
                why="Each adapter has one.",
                fix="Pass as many weights as names, or one number for all.",
            )
        set_weights_and_activate_adapters(
            self, names, [1.0 if weight is None else weight for weight in given]
        )

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, with every keyword of diffusers' `FluxTransformer2DModel`.

        Args:
            hidden_states: (B, N, in_channels) packed latents.
            encoder_hidden_states: (B, T, joint_attention_dim).
            pooled_projections: (B, pooled_projection_dim).
            timestep: (B,) in [0, 1], 1 = noise.
            img_ids: (N, 3).
            txt_ids: (T, 3).
            guidance: (B,), for models with ``guidance_embeds``.
            joint_attention_kwargs: ``scale`` of LoRA layers; others are for static execution.
            controlnet_block_samples: Residuals for the blocks of two streams.
            controlnet_single_block_samples: Residuals for those of one.
            return_dict: Whether to wrap the result.
            controlnet_blocks_repeat: Whether residuals go round rather than serve several blocks each.

        Returns:
            (B, N, out_channels) as ``sample``, or in a tuple.

        Raises:
            DyditError: If an input that the model needs is missing, or one is given that the execution cannot use.
        """
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
        }
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise DyditError(
                f"FLUX needs {', '.join(missing)}.",
                why="Without them there is no prompt, time or place.",
                fix="Call the model as diffusers' FluxPipeline does.",
            )
        # Not by diffusers' decorator, which only its newer versions have.
        keywords = dict(joint_attention_kwargs or {})
        scale = keywords.pop("scale", 1.0)
        if USE_PEFT_BACKEND:
            scale_lora_layers(self, scale)
        try:
            sample, _ = self._predict(
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                torch.as_tensor(timestep),
                img_ids,
                txt_ids,
                guidance,
                executor=self._executor,
                gating=ThresholdGating(self.keep_bias),
                keywords=keywords or None,
                residuals=controlnet_block_samples,
                single_residuals=controlnet_single_block_samples,
                residuals_go_round=controlnet_blocks_repeat,
            )
        finally:
            if USE_PEFT_BACKEND:
                unscale_lora_layers(self, scale)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        condition: TextCondition,
        *,
        executor: Executor | None = None,
        gating: Gating | None = None,
    ) -> tuple[Tensor, Routing]:
        """Predict and say what was executed: the call of training, profiling and tests.

        Args:
            hidden_states: (B, C, h, w) latents, h and w even; packed as diffusers' FluxPipeline does.
            timestep: (B,) or a number, in [0, 1], 1 = noise.
            condition: Prompts, guidance where the model embeds it (unused where not), latents to pack beside the sample.
            executor: How masks become arithmetic; the model's own by default.
            gating: How logits become masks; thresholds with the model's ``keep_bias`` by default.

        Returns:
            The velocity noise - data, (B, C, h, w), and the masks of every block.

        Raises:
            DyditError: If the inputs are not of the model's shapes.
        """
        self._check_sample(hidden_states, condition)
        height, width = hidden_states.shape[-2:]
        dtype, device = self.dtype, hidden_states.device
        parts = [hidden_states] if condition.extra is None else [hidden_states, condition.extra]
        packed = torch.cat([pack_latents(part.to(device, dtype)) for part in parts], dim=2)
        guidance = None
        if self.geometry.guidance and condition.guidance is not None:
            guidance = condition.guidance.to(device)
        predicted, routing = self._predict(
            packed,
            condition.prompt_embeds.to(device, dtype),
            condition.pooled.to(device, dtype),
            torch.as_tensor(timestep, device=device).reshape(-1).expand(hidden_states.shape[0]),
            image_ids(height, width, device, dtype),
            torch.zeros(condition.prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            guidance,
            executor=executor or self._executor,
            gating=gating or ThresholdGating(self.keep_bias),
        )
        return unpack_latents(predicted, height, width), routing

    def _predict(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        timestep: Tensor,
        img_ids: Any,
        txt_ids: Any,
        guidance: Tensor | None,
        *,
        executor: Any,
        gating: Gating,
        keywords: dict[str, Any] | None = None,
        residuals: Sequence[Tensor] | None = None,
        single_residuals: Sequence[Tensor] | None = None,
        residuals_go_round: bool = False,
    ) -> tuple[Tensor, Routing]:
        """`forward`, with how to run, and what was executed."""
        if not isinstance(executor, StaticExecutor):
            self._check_routable(keywords)
            self._check_weights_at_hand(executor)
        elif keywords is not None and "ip_adapter_image_embeds" in keywords:
            images = keywords["ip_adapter_image_embeds"]
            others = {name: value for name, value in keywords.items() if name != "ip_adapter_image_embeds"}
            keywords = {**others, "ip_hidden_states": self.encoder_hid_proj(images)}
        image = self.x_embedder(hidden_states)
        batch = image.shape[0]
        times = timestep.reshape(-1).to(image.device, image.dtype)
        widths = None
        if isinstance(executor, CompactExecutor):
            widths = executor.known(self, same_for_all(times.tolist()), batch, gating)
        times = times.expand(batch)
        time_embedding = self._embed_time(times, image.dtype, pooled_projections.dtype)
        if widths is None:
            widths = executor.widths(self.dynamic_blocks, times, time_embedding, gating)
        conditioning = self._conditioning(time_embedding, guidance, pooled_projections, image.dtype)
        text = self.context_embedder(encoder_hidden_states)
        # Batched ids are an older form that diffusers still takes.
        ids = [part[0] if part.ndim == 3 else part for part in (txt_ids, img_ids)]
        rope = self.pos_embed(torch.cat(ids, dim=0))

        decisions = Decisions()
        index = 0
        groups = (
            (self.transformer_blocks, residuals, residuals_go_round),
            (self.single_transformer_blocks, single_residuals, False),
        )
        if (residuals is not None or single_residuals is not None) and is_cached(self.dynamic_blocks):
            raise between_cached_blocks("ControlNet residuals")
        with cache_context(self):
            for blocks, added, go_round in groups:
                for number, block in enumerate(blocks):
                    how = (widths[index], executor, gating, index, decisions)
                    arguments = (image, text, conditioning, rope, keywords, *how)
                    if self.gradient_checkpointing and torch.is_grad_enabled():
                        image, text = self._gradient_checkpointing_func(block, *arguments)
                    else:
                        image, text = block(*arguments)
                    if added is not None:
                        image = image + residual_of(added, number, len(blocks), go_round)
                    index += 1
            predicted = self.proj_out(self.norm_out(image, conditioning))
        return predicted, routing_of(widths, decisions, image)

    def _conditioning(
        self, time_embedding: Tensor, guidance: Tensor | None, pooled: Tensor, scaled_in: torch.dtype
    ) -> Tensor:
        """Time, guidance and pooled text, added up in diffusers' order."""
        if (guidance is not None) != self.geometry.guidance:
            raise DyditError(
                "The model needs guidance." if guidance is None else "The model takes no guidance.",
                why=f"Its guidance_embeds is {self.geometry.guidance}: FLUX.1-dev was distilled to take a scale, schnell was not.",
                fix="Pass guidance as (B,) scales such as 3.5."
                if guidance is None
                else "Leave guidance out.",
            )
        embedder = self.time_text_embed
        if guidance is not None:
            sinusoids = embedder.time_proj(guidance.to(scaled_in) * 1000)
            time_embedding = time_embedding + embedder.guidance_embedder(sinusoids.to(pooled.dtype))
        conditioning: Tensor = time_embedding + embedder.text_embedder(pooled)
        return conditioning

    # ------------------------------------------------------------------ what diffusers' class offers and this one does not

    @classmethod
    def from_single_file(cls, *arguments: Any, **options: Any) -> Any:
        """Refuse static files.

        Raises:
            DyditError: Always.
        """
        raise DyditError(
            "A dynamic FLUX is not loaded from a single file.",
            why="Original files hold no routers and no order of units.",
            fix="Run `dydit convert --family flux --checkpoint FILE --out C`, and load C with from_pretrained.",
        )

    # ------------------------------------------------------------------ inputs

    def example_inputs(self, batch: int, seed: int) -> tuple[Tensor, TextCondition]:
        """See `DynamicModel`."""
        geometry = self.geometry

        def drawn(name: str, *shape: int) -> Tensor:
            return normal(seed, (batch, *shape), "example", name)

        side, extra = geometry.sample_size, geometry.extra_channels
        condition = TextCondition(
            prompt_embeds=drawn("prompt", geometry.text_tokens, geometry.joint_size),
            pooled=drawn("pooled", geometry.pooled_size),
            guidance=torch.full((batch,), EXAMPLE_GUIDANCE) if geometry.guidance else None,
            extra=drawn("extra", extra, side, side) if extra else None,
        )
        return normal(seed, (batch, *geometry.sample_shape), "example"), condition

    def null_condition(self, batch: int) -> TextCondition:
        """Zeros in the place of embeddings. That of an empty prompt needs text encoders, which the model does not have."""
        geometry, side = self.geometry, self.geometry.sample_size

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=self.device)

        return TextCondition(
            prompt_embeds=zeros(geometry.text_tokens, geometry.joint_size),
            pooled=zeros(geometry.pooled_size),
            guidance=zeros() + EXAMPLE_GUIDANCE if geometry.guidance else None,
            extra=zeros(geometry.extra_channels, side, side) if geometry.extra_channels else None,
        )

    def _check_sample(self, sample: Tensor, condition: TextCondition) -> None:
        geometry = self.geometry
        if (
            sample.ndim != 4
            or sample.shape[1] != geometry.in_channels
            or any(n % PATCH for n in sample.shape[2:])
        ):
            raise DyditError(
                f"The model expects latents of {geometry.in_channels} channels and even sides, "
                f"got {'x'.join(map(str, sample.shape[1:]))}.",
                why="2x2 latent pixels make a token.",
                fix="Encode images whose sides are multiples of 16 with the VAE of the pipeline.",
            )
        extra = 0 if condition.extra is None else condition.extra.shape[1]
        if extra != geometry.extra_channels:
            raise DyditError(
                f"The model expects {geometry.extra_channels} channels of latents beside the sample, got {extra}.",
                why=f"Its tokens have {geometry.packed_channels} channels, of which the sample gives "
                f"{PATCH**2 * geometry.in_channels}.",
                fix="Give them as the condition's extra (FLUX Fill: mask and masked image).",
            )

    def _check_weights_at_hand(self, executor: Executor) -> None:
        """Raise where offloading leaves weights elsewhere that routed execution reads without calling their layers."""
        first = self.dynamic_blocks[0]
        # Blocks are brought whole, or layer by layer.
        layer = next(module for module in first.modules() if isinstance(module, nn.Linear))
        held = [getattr(module, "_diffusers_hook", None) for module in (first, layer)]
        in_groups = any(
            hooks is not None and hooks.get_hook("group_offloading") is not None for hooks in held
        )
        sequential = any(parameter.is_meta for parameter in first.token_router.parameters())
        if not (sequential or (in_groups and isinstance(executor, CompactExecutor))):
            return
        kind, others = ("sequential", "('static')") if sequential else ("group", "('static') or ('dense')")
        raise DyditError(
            f"The model's weights are under {kind} offloading, which {executor.name} execution cannot use.",
            why="It brings a layer's weights when the layer is called, and here they are read without calling it.",
            fix=f"Use pipeline.enable_model_cpu_offload(), or call model.set_execution{others}.",
        )

    def _check_routable(self, keywords: dict[str, Any] | None) -> None:
        """Raise where attention is not diffusers' own, which routed execution replaces."""
        unknown = sorted(set(keywords or ()) - {"scale"})
        foreign = {
            type(block.attn.processor).__name__
            for block in self.dynamic_blocks
            if type(block.attn.processor) is not FluxAttnProcessor
        }
        fused = any(block.attn.fused_projections for block in self.dynamic_blocks)
        if not (unknown or foreign or fused):
            return
        what = [*(f"joint_attention_kwargs['{name}']" for name in unknown), *sorted(foreign)]
        what += ["fused projections"] if fused else []
        raise DyditError(
            f"Dynamic execution cannot use {', '.join(what)}.",
            why="It computes attention itself, over the heads and tokens that are on; IP-adapters and other processors do not know these.",
            fix="Call model.set_execution('static'), or take out the IP-adapter, processor or fusion.",
        )


def residual_of(samples: Sequence[Tensor], number: int, blocks: int, go_round: bool) -> Tensor:
    """Which of a ControlNet's residuals block ``number`` of ``blocks`` gets."""
    if go_round:
        return samples[number % len(samples)]
    return samples[number // math.ceil(blocks / len(samples))]


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4C): rows of 2x2 patches; in a token channels first, then the patch's rows."""
    height, width = (side // PATCH for side in latents.shape[2:])
    patches = latents.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The way back of `pack_latents`."""
    grid = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, 3) positions of tokens: nothing, row, column."""
    rows = torch.arange(height // PATCH, device=device, dtype=dtype)
    columns = torch.arange(width // PATCH, device=device, dtype=dtype)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).flatten(0, 1)
