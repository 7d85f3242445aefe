"""A text encoder's layers in fewer kernels, with the adapters of an attention merged."""

from typing import Any

from torch import Tensor
from transformers.models.clip.modeling_clip import (
    ALL_ATTENTION_FUNCTIONS,
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from sdxl_lora.adapters.lora import layers_of_same_input
from sdxl_lora.adapters.merged_linear import project
from sdxl_lora.kernels.attention_ops import short_kv_attention, supports_short_kv
from sdxl_lora.models.class_swap import Classes, swap_classes
from sdxl_lora.models.fused_layers import FUSED_LAYERS, input_and_norm, pack_projections, residual_and_norm


def fuse_text_encoder(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Give the text encoder's parts their fused classes, and pack the projections of each attention."""
    swap_classes(text_encoder, FUSED_TEXT_CLASSES)
    for part in text_encoder.modules():
        if isinstance(part, CLIPAttention):
            pack_projections(text_projections(part))


def text_projections(attention: CLIPAttention) -> list[Any]:
    """Return the layers that read the attention's input: key, value, query."""
    return layers_of_same_input(attention, ("k_proj", "v_proj", "q_proj"))


class _FusedCLIPAttention(CLIPAttention):  # type: ignore[misc]
    """A text encoder's attention with merged projections, and on a GPU by the kernel for few keys."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        heads = [t.unflatten(-1, (-1, self.head_dim)) for t in project(text_projections(self), hidden_states)]
        key, value, query = heads
        if attention_mask is None and supports_short_kv(query, key):
            causal = bool(kwargs.get("is_causal", self.is_causal))
            output = short_kv_attention(query, key, value, causal)
            return self.out_proj(output.flatten(-2)), None
        key, value, query = (t.transpose(1, 2) for t in heads)
        attend_ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, weights = attend_(self, query, key, value, attention_mask, scaling=self.scale, **kwargs)
        return self.out_proj(output.flatten(-2)), weights


class _FusedCLIPEncoderLayer(CLIPEncoderLayer):  # type: ignore[misc]
    """A text encoder's layer: the residual sum and the normalisation after it in one kernel."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        hidden_states, normal = input_and_norm(hidden_states, self.layer_norm1)
        update, _ = self.self_attn(normal, attention_mask, **kwargs)
        hidden_states, normal = residual_and_norm(hidden_states, update, self.layer_norm2)
        return hidden_states + self.mlp(normal)


FUSED_TEXT_CLASSES: Classes = {
    CLIPAttention: _FusedCLIPAttention,
    CLIPEncoderLayer: _FusedCLIPEncoderLayer,
    **FUSED_LAYERS,
}
