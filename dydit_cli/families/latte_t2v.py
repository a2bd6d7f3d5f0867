"""Text-to-video Latte (Vchitect/Latte's LatteT2V, as diffusers ships it): dynamic, under diffusers' keys and keywords.

A spatial and a temporal block take turns. Checked against diffusers' `LatteTransformer3DModel` with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import (
    PatchEmbed,
    PixArtAlphaTextProjection,
    get_1d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from dydit_cli.dynamic.gates import Gating, ThresholdGating
from dydit_cli.dynamic.routing import Decisions, Routing
from dydit_cli.errors import DyditError
from dydit_cli.execution import BlockWidth, CompactExecutor, Executor, WidthPlan
from dydit_cli.execution.interface import modulate
from dydit_cli.families.backbone import check_divides, same_for_all
from dydit_cli.families.caching import between_cached_blocks, cache_context, is_cached
from dydit_cli.families.dynamic_model import DynamicModel, routing_of
from dydit_cli.families.latte_t2v_blocks import DynamicLatteT2VBlock
from dydit_cli.families.latte_t2v_geometry import LatteT2VGeometry
from dydit_cli.families.prompt_condition import PromptCondition
from dydit_cli.randomness import normal

FINAL_NORM_EPS = 1e-6
MLP_RATIO = 4
TABLE_SIDE = 64
"""diffusers stretches the position table of larger samples over as many patches as one of this side has."""


class DyLatteT2VTransformer3DModel(DynamicModel):
    """A dynamic text-to-video Latte. ``timestep`` is 0 ... 999; the prediction is noise, then variance values.

    Samples are (B, C_in, F, h, w). In memory the tokens of a video stand in one row, frame after frame. Heads, MLP groups and MLP
    tokens are dynamic in spatial and in temporal blocks, cross-attention to the prompt is static. Width routers read the output
    of the shared time MLP alone. Videos may have any number of frames where temporal blocks are left out, else one or
    ``video_length``; their size is the model's.

    The import path of this class is recorded in saved pipelines and does not change.

    Args:
        num_attention_heads: H.
        attention_head_dim: C_h; C = H * C_h.
        in_channels: Channels of a frame.
        out_channels: Channels of the prediction; None means ``in_channels``.
        num_layers: Spatial blocks, and as many temporal ones.
        attention_bias: Whether queries, keys and values have a bias.
        sample_size: Side of a square frame in latent pixels.
        patch_size: Side of a patch.
        norm_eps: Of the blocks' LayerNorm.
        caption_channels: Channels of prompt embeddings.
        video_length: F.
        text_tokens: Tokens of a prompt that costs are counted with; diffusers' pipeline cuts prompts at 120.
        num_groups: G; None means H. Divides 4C.
        always_on: Whether the most important head and group have no router row and are always on.
        width: Which masks heads and groups have: ``free`` (any, the paper's) or ``ordered`` (the most important units).
        td_lora: ``rank`` and ``experts`` of a model whose weights follow the timestep; see `insert_timed_layers`.

    Raises:
        DyditError: If the numbers do not fit together.
    """

    family = "latte-t2v"
    geometry: LatteT2VGeometry
    temp_pos_embed: Tensor

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DynamicLatteT2VBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["pos_embed", "norm", "_router"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        attention_bias: bool = True,
        sample_size: int = 64,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        caption_channels: int = 4096,
        video_length: int = 16,
        text_tokens: int = 120,
        num_groups: int | None = None,
        always_on: bool = True,
        width: str = "free",
        td_lora: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        hidden = num_attention_heads * attention_head_dim
        mlp_hidden, groups = MLP_RATIO * hidden, num_groups or num_attention_heads
        computed = in_channels if out_channels is None else out_channels
        check_divides("channel groups", groups, "MLP's hidden size", mlp_hidden)
        check_divides("patch size", patch_size, "sample size", sample_size)
        places = (sample_size // patch_size) ** 2
        self.register_to_config(out_channels=computed, num_groups=groups)
        self.geometry = LatteT2VGeometry(
            hidden_size=hidden,
            depth=2 * num_layers,
            num_heads=num_attention_heads,
            num_groups=groups,
            mlp_hidden=mlp_hidden,
            num_tokens=video_length * places,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=computed,
            sample_size=sample_size,
            num_classes=0,
            always_on=always_on,
            num_frames=video_length,
            ordered_width=width == "ordered",
            text_tokens=text_tokens,
            caption_channels=caption_channels,
        )
        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=hidden,
            interpolation_scale=max(sample_size // TABLE_SIDE, 1),
        )
        self.transformer_blocks, self.temporal_transformer_blocks = (
            nn.ModuleList(
                DynamicLatteT2VBlock(
                    hidden,
                    num_attention_heads,
                    mlp_hidden,
                    groups,
                    always_on,
                    places=places,
                    temporal=temporal,
                    bias=attention_bias,
                    norm_eps=norm_eps,
                    width=width,
                )
                for _ in range(num_layers)
            )
            for temporal in (False, True)
        )
        self.norm_out = nn.LayerNorm(hidden, elementwise_affine=False, eps=FINAL_NORM_EPS)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden) / hidden**0.5)
        self.proj_out = nn.Linear(hidden, patch_size * patch_size * computed)
        self.adaln_single = AdaLayerNormSingle(hidden, use_additional_conditions=False)
        self.caption_projection = PixArtAlphaTextProjection(caption_channels, hidden)
        frames = get_1d_sincos_pos_embed_from_grid(hidden, torch.arange(video_length)[:, None], "pt")
        # Not part of the files, like the table of places inside `pos_embed`.
        self.register_buffer("temp_pos_embed", frames.float()[None], persistent=False)
        self.gradient_checkpointing = False
        self.begin_dynamic()

    # ------------------------------------------------------------------ what generic code asks

    @property
    def dynamic_blocks(self) -> list[DynamicLatteT2VBlock]:
        """Spatial and temporal blocks in the order in which they run."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return [cast(DynamicLatteT2VBlock, block) for pair in pairs for block in pair]

    def conditioning_modules(self) -> list[nn.Module]:
        """See `ConditionedModel`."""
        return [self.adaln_single.emb]

    def embed_time(self, timestep: Tensor) -> Tensor:
        """(S,) t -> (S, C), the output of the time MLP alone."""
        dtype = self.pos_embed.proj.weight.dtype
        embedding: Tensor = self.adaln_single.emb(timestep, None, None, timestep.shape[0], dtype)
        return embedding

    def example_inputs(self, batch: int, seed: int) -> tuple[Tensor, PromptCondition]:
        """See `DynamicModel`."""
        geometry = self.geometry
        prompts = (batch, geometry.text_tokens, geometry.caption_channels)
        return (
            normal(seed, (batch, *geometry.sample_shape), "example"),
            PromptCondition(normal(seed, prompts, "example_prompts")),
        )

    def null_condition(self, batch: int) -> PromptCondition:
        """Embeddings of zeros. (A pipeline's own null condition is its text encoder's answer to an empty prompt.)"""
        shape = (batch, self.geometry.text_tokens, self.geometry.caption_channels)
        return PromptCondition(torch.zeros(shape, device=self.device))

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Parameters of the static model; its position tables are none."""
        return [parameter for name, parameter in self.named_parameters() if "_router." not in name]

    def make_executor(self, name: str, compile: bool = False) -> Executor:  # noqa: A002
        """See `DynamicModel`.

        Raises:
            DyditError: Also if compiled blocks are wanted.
        """
        if compile:
            raise DyditError(
                "Blocks of a text-to-video Latte are not compiled.",
                why="Compiled execution knows blocks of attention and MLP, and these have cross-attention between the two.",
                fix="Leave compile out.",
            )
        return super().make_executor(name)

    def plan(
        self, timesteps: Tensor | Sequence[float], class_labels: Tensor | Sequence[int] | None = None
    ) -> WidthPlan:
        """See `DynamicModel`; there are no labels.

        Raises:
            DyditError: Also if labels are given.
        """
        if class_labels is not None:
            raise DyditError(
                "A plan of a text-to-video model takes no labels.",
                why="It is conditioned on prompts, and widths depend on the timesteps alone.",
                fix="Pass the timesteps alone.",
            )
        return super().plan(timesteps)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, with the keywords of diffusers' `LatteTransformer3DModel`.

        Args:
            hidden_states: (B, C_in, F, h, w).
            timestep: (B,) or a number, 0 ... 999.
            encoder_hidden_states: (B, L, D) prompt embeddings.
            encoder_attention_mask: One row a video or, as diffusers' class wants it, one a frame: (B, L), (B * F, L), or the same
                with an axis of one in the middle. Bool or whole numbers: true for the tokens to attend to; other numbers are
                added to the attention scores.
            enable_temporal_attentions: Whether the temporal blocks run.
            return_dict: Whether to wrap the result.

        Returns:
            (B, C_out, F, h, w) as ``sample``, or in a tuple.

        Raises:
            DyditError: If timestep or prompt are missing, or shapes do not fit.
        """
        if timestep is None or encoder_hidden_states is None:
            raise DyditError(
                "The model needs a timestep and prompt embeddings.",
                why="Its routers read the one, its cross-attention the other.",
                fix="Pass timestep and encoder_hidden_states, as diffusers' LattePipeline does.",
            )
        mask = _by_video(encoder_attention_mask, len(hidden_states), hidden_states.shape[2:3].numel())
        sample, _ = self.denoise(
            hidden_states,
            timestep,
            PromptCondition(encoder_hidden_states, mask),
            executor=self._executor,
            gating=ThresholdGating(self.keep_bias),
            enable_temporal_attentions=enable_temporal_attentions,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def denoise(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        condition: Any,
        *,
        executor: Executor | None = None,
        gating: Gating | None = None,
        enable_temporal_attentions: bool = True,
    ) -> tuple[Tensor, Routing]:
        """See `DynamicModel`.

        Args:
            hidden_states: (B, C_in, F, h, w).
            timestep: (B,) or a number.
            condition: The prompts, a `PromptCondition`.
            executor: How masks become arithmetic; the model's own by default.
            gating: How logits become masks; thresholds with the model's ``keep_bias`` by default.
            enable_temporal_attentions: Whether the temporal blocks run; those that do not have masks of zeros.

        Returns:
            The prediction (B, C_out, F, h, w) and the masks of every block.

        Raises:
            DyditError: If the input's size is not the model's.
        """
        executor = executor or self._executor
        gating = gating or ThresholdGating(self.keep_bias)
        self._check_input(hidden_states, enable_temporal_attentions)
        device, batch, frames = hidden_states.device, hidden_states.shape[0], hidden_states.shape[2]
        given = torch.as_tensor(timestep).reshape(-1)
        times = given.to(device).expand(batch)
        dtype = self.pos_embed.proj.weight.dtype
        tokens = self._embed_frames(hidden_states.to(dtype))
        prompt = self.caption_projection(condition.prompt_embeds.to(dtype))
        mask = _for_attention(condition.mask, tokens, frames)
        time_embedding = self.embed_time(times)
        adaln = self.adaln_single
        shared = adaln.linear(adaln.silu(time_embedding)).unflatten(1, (6, -1))
        widths: Sequence[BlockWidth] | None = None
        if isinstance(executor, CompactExecutor):
            widths = executor.known(self, same_for_all(given.tolist()), batch, gating)
        if widths is None:
            widths = executor.widths(self.dynamic_blocks, times, time_embedding, gating)
        if not enable_temporal_attentions and is_cached(self.dynamic_blocks):
            raise between_cached_blocks("Spatial blocks alone")
        decisions = Decisions()
        with cache_context(self):
            for index, (block, width) in enumerate(zip(self.dynamic_blocks, widths, strict=True)):
                if index % 2 and not enable_temporal_attentions:
                    continue
                offset = self._times(tokens, frames) if index == 1 and frames > 1 else None
                arguments = (tokens, shared, prompt, mask, width, executor, gating, index, decisions, offset)
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    tokens = self._gradient_checkpointing_func(block, *arguments)
                else:
                    tokens = block(*arguments)
            shift, scale = (self.scale_shift_table + time_embedding[:, None]).chunk(2, dim=1)
            patches = self.proj_out(modulate(self.norm_out(tokens), shift, scale))
        return self._unpatchify(patches, frames), routing_of(widths, decisions, tokens)

    def _times(self, tokens: Tensor, frames: int) -> Tensor:
        """(1, F * N, C), the place in time of each of (B, F * N, C) tokens."""
        return self.temp_pos_embed.to(tokens.dtype).repeat_interleave(tokens.shape[1] // frames, dim=1)

    def _embed_frames(self, hidden_states: Tensor) -> Tensor:
        """(B, C_in, F, h, w) -> (B, F * N, C), each token with its place in the frame."""
        batch, frames = hidden_states.shape[0], hidden_states.shape[2]
        tokens: Tensor = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1))
        # Contiguous, because token gathering flattens batch and tokens in every block.
        return tokens.unflatten(0, (batch, frames)).flatten(1, 2).contiguous()

    def _unpatchify(self, patches: Tensor, frames: int) -> Tensor:
        """(B, F * N, p * p * C_out) -> (B, C_out, F, h, w)."""
        geometry = self.geometry
        side, patch = geometry.sample_size // geometry.patch_size, geometry.patch_size
        batch = patches.shape[0]
        grid = patches.view(batch, frames, side, side, patch, patch, geometry.out_channels)
        pixels = grid.permute(0, 6, 1, 2, 4, 3, 5)
        return pixels.reshape(
            batch, geometry.out_channels, frames, geometry.sample_size, geometry.sample_size
        )

    def _check_input(self, hidden_states: Tensor, temporal: bool) -> None:
        channels, length, side, _ = expected = self.geometry.sample_shape
        given = tuple(hidden_states.shape[1:])
        frames_fit = len(given) == 4 and (given[1] in (1, length) or (given[1] > 0 and not temporal))
        if frames_fit and (given[0], *given[2:]) == (channels, side, side):
            return
        raise DyditError(
            f"The model expects inputs of {'x'.join(map(str, expected))}, got {'x'.join(map(str, given))}.",
            why=f"It was trained on {length} frames of {side}x{side} latent pixels; a single frame passes too, and any number "
            "without temporal attention.",
            fix="Resize the input, or convert a checkpoint of that size.",
        )


def _by_video(mask: Tensor | None, batch: int, frames: int) -> Tensor | None:
    """A mask with rows for videos or frames, as `PromptCondition` keeps it.

    Raises:
        DyditError: If it has another number of rows.
    """
    if mask is None:
        return None
    rows = mask.squeeze(1) if mask.dim() == 3 else mask
    if rows.dim() == 2 and len(rows) == batch:
        return rows
    if rows.dim() == 2 and len(rows) == batch * frames:
        return rows.unflatten(0, (batch, frames))
    raise DyditError(
        f"A prompt mask of shape {tuple(mask.shape)} does not fit {batch} videos of {frames} frames.",
        why="It has one row a video, or one a frame.",
        fix=f"Pass a mask of shape ({batch}, L) or ({batch * frames}, L).",
    )


def _for_attention(mask: Tensor | None, tokens: Tensor, frames: int) -> Tensor | None:
    """The mask of a `PromptCondition` in a shape that expands to (B, 1, F * N, L)."""
    if mask is None:
        return None
    of_type = mask.to(tokens.dtype) if mask.is_floating_point() else mask.bool()
    if mask.dim() == 2:
        return of_type[:, None, None]
    return of_type.repeat_interleave(tokens.shape[1] // frames, dim=1)[:, None]
