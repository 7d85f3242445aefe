"""The UNet in fewer kernels, with the adapters of its attentions merged and a chosen attention backend.

What is not known here (other blocks, adapters with dropout) keeps its forward.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from sdxl_lora.adapters.lora import layers_of_same_input
from sdxl_lora.adapters.merged_linear import is_mergeable, project
from sdxl_lora.config import AttentionBackend
from sdxl_lora.kernels.attention import AttentionShape, attend
from sdxl_lora.kernels.transformer_ops import geglu
from sdxl_lora.models.class_swap import Classes, swap_classes
from sdxl_lora.models.fused_blocks import FUSED_BLOCKS
from sdxl_lora.models.fused_layers import FUSED_LAYERS, input_and_norm, pack_projections, residual_and_norm

_NUM_TOKENS = 77  # of a caption, padded

_TextKeys = Mapping[Attention, tuple[Tensor, Tensor]]
"""Key and value of each cross-attention, (B, 77, C)."""


def fuse_unet(unet: UNet2DConditionModel, backend: AttentionBackend) -> None:
    """Give the UNet's parts fused classes, its attentions `backend`, and on a GPU channels_last."""
    swap_classes(unet, FUSED_UNET_CLASSES)
    for part in unet.modules():
        if isinstance(part, Attention):
            pack_projections(projections_of_same_input(part))
    unet.set_attn_processor(_FusedAttentionProcessor(backend))
    if unet.device.type != "cpu":
        unet.to(memory_format=torch.channels_last)


def projections_of_same_input(attention: Attention) -> list[Any]:
    """Return the layers that read the same input: query, key, value; of a cross-attention key and value."""
    query = () if attention.is_cross_attention else ("to_q",)
    return layers_of_same_input(attention, (*query, "to_k", "to_v"))


class _FusedUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet that makes the keys and values of all its cross-attentions before it asks for the first.

    All read the same text. What takes the text's place on its way to the transformer blocks is `_TextKeys`.
    """

    def process_encoder_hidden_states(self, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> _TextKeys:
        # diffusers passes this to its blocks as `encoder_hidden_states`, a Tensor by their annotations. None
        # reads it on the way to `_FusedTransformer2DModel`, which picks each attention's key and value.
        return project_text(self, encoder_hidden_states)


def project_text(unet: UNet2DConditionModel, text: Tensor) -> _TextKeys:
    """Projects a text, (B, 77, 2048), for all attentions of equal width at once."""
    groups: dict[tuple[int, bool], list[Attention]] = defaultdict(list)
    for attention in cross_attentions(unet):
        groups[attention.inner_dim, all(map(is_mergeable, projections_of_same_input(attention)))].append(
            attention
        )
    projected: dict[Attention, tuple[Tensor, Tensor]] = {}
    for group in groups.values():
        outputs = project(
            [layer for attention in group for layer in projections_of_same_input(attention)], text
        )
        projected.update(zip(group, zip(outputs[::2], outputs[1::2], strict=True), strict=True))
    return projected


def cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """In the order of the blocks."""
    parts = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    stacks = [stack for part in parts for stack in getattr(part, "attentions", ())]
    return [block.attn2 for stack in stacks for block in stack.transformer_blocks]


class _FusedAttentionProcessor:
    """An attention of the UNet with merged projections and a chosen backend."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of `hidden_states`, (B, L, C), to themselves or to a text's key and value.

        Raises:
            ValueError: there is a mask. SDXL has none.
        """
        if attention_mask is not None:
            raise ValueError("SDXL's attention takes no mask")
        if encoder_hidden_states is None:
            query, key, value = project(projections_of_same_input(attn), hidden_states)
        else:
            (query,) = project([attn.to_q], hidden_states)
            key, value = encoder_hidden_states
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in (query, key, value))
        output = attend(query, key, value, self._backend).flatten(-2)
        return attn.to_out[1](attn.to_out[0](output))


class _FusedGEGLU(GEGLU):  # type: ignore[misc]
    """The feed-forward layer's gate in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return geglu(self.proj(hidden_states))


class _FusedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """A transformer block: each residual sum and the normalisation after it in one kernel."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor]) -> Tensor:
        hidden_states, normal = input_and_norm(hidden_states, self.norm1)
        update = self.attn1(normal)
        hidden_states, normal = residual_and_norm(hidden_states, update, self.norm2)
        update = self.attn2(normal, encoder_hidden_states=encoder_hidden_states)
        hidden_states, normal = residual_and_norm(hidden_states, update, self.norm3)
        return hidden_states + self.ff(normal)


class _FusedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """A stack of transformer blocks over pixels. In channels_last, pixels are tokens without a copy."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: _TextKeys,
        **_: Any,
    ) -> tuple[Tensor]:
        batch, channels, height, width = hidden_states.shape
        hidden_states, normal = self.norm.input_and_norm(hidden_states)
        tokens: Tensor = self.proj_in(normal.permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states[block.attn2])
        output = self.proj_out(tokens).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return (output + hidden_states,)


FUSED_UNET_CLASSES: Classes = {
    BasicTransformerBlock: _FusedTransformerBlock,
    GEGLU: _FusedGEGLU,
    Transformer2DModel: _FusedTransformer2DModel,
    UNet2DConditionModel: _FusedUNet2DConditionModel,
    **FUSED_BLOCKS,
    **FUSED_LAYERS,
}


def attention_shapes(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> list[AttentionShape]:
    """Return the sizes of the UNet's attentions, for latents of this height and width."""
    deepest = len(unet.down_blocks) - 1
    counts: Counter[tuple[int, int, int, int]] = Counter()
    for name, part in unet.named_modules():
        if isinstance(part, Attention):
            level = _level_of(name, deepest)
            pixels = (height >> level) * (width >> level)
            keys = _NUM_TOKENS if part.is_cross_attention else pixels
            counts[pixels, keys, part.heads, part.inner_dim // part.heads] += 1
    return [AttentionShape(batch, *sizes, count) for sizes, count in counts.items()]


def _level_of(name: str, deepest: int) -> int:
    """How many times the part of this name sees the latents halved."""
    side, number, *_ = name.split(".")
    if side == "mid_block":
        return deepest
    return int(number) if side == "down_blocks" else deepest - int(number)
