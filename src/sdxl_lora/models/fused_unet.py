"""The base model's modules as training runs them: diffusers' and transformers' arithmetic in fewer kernels.

`fuse_modules` gives modules another class and leaves their weights and names alone, so that saving and
loading see what they always saw. What is not known here (other blocks, adapters with dropout) keeps its own
forward.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.clip.modeling_clip import ALL_ATTENTION_FUNCTIONS, CLIPAttention, CLIPEncoderLayer

from sdxl_lora.adapters.merged_linear import is_mergeable, pack_adjacent, project, project_merged
from sdxl_lora.config import AttentionBackend
from sdxl_lora.kernels.attention import AttentionShape, attend
from sdxl_lora.kernels.attention_ops import short_kv_attention, supports_short_kv
from sdxl_lora.kernels.conv_ops import frozen_conv2d, group_norm, residual_sum
from sdxl_lora.kernels.transformer_ops import add_norm, geglu, layer_norm, uses_triton

_NUM_TOKENS = 77  # of a caption, padded

_TextKeys = Mapping[Attention, tuple[Tensor, Tensor]]
"""Key and value of each cross-attention, (B, 77, C)."""


def fuse_modules(module: nn.Module) -> None:
    """Gives the module's parts the classes of this file, in place."""
    for part in list(module.modules()):
        if _is_fusable(part):
            part.__class__ = FUSED_CLASSES[type(part)]  # type: ignore[assignment]
        if isinstance(part, Attention | CLIPAttention):
            _merge_projections(part)


def _is_fusable(part: Any) -> bool:
    """Whether this file has a class for `part`, and SDXL's options are the ones that it has."""
    if type(part) is ResnetBlock2D:
        resamples = part.upsample is not None or part.downsample is not None
        adds_time = part.time_embedding_norm == "default" and not part.skip_time_act
        knows_no_time = part.time_embedding_norm == "group" and part.time_emb_proj is None  # in the decoder
        plain = type(part.nonlinearity) is nn.SiLU and part.output_scale_factor == 1
        return plain and (adds_time or knows_no_time) and not resamples
    if type(part) is nn.Conv2d:
        whole = part.groups == 1 and part.dilation == (1, 1)
        pads_zeros = part.padding_mode == "zeros" and not isinstance(part.padding, str)
        return whole and pads_zeros and not part.weight.requires_grad
    return type(part) in FUSED_CLASSES


def _merge_projections(attention: Any) -> None:
    """Makes the frozen weights neighbours whose layers read the same input."""
    layers = projections_of_same_input(attention)
    if all(is_mergeable(layer) for layer in layers):
        bases = [layer.base_layer for layer in layers]
        for tensors in zip(*([*base.parameters(), *base.buffers()] for base in bases), strict=True):
            pack_adjacent(tensors)


def projections_of_same_input(attention: Any) -> list[Any]:
    """The layers that read the same input, in the order in which the module holds them."""
    if isinstance(attention, CLIPAttention):
        return [attention.k_proj, attention.v_proj, attention.q_proj]
    keys_and_values = [attention.to_k, attention.to_v]
    return keys_and_values if attention.is_cross_attention else [attention.to_q, *keys_and_values]


class _FusedUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet that makes the keys and values of all its cross-attentions before it asks for the first.

    All read the same text. What takes the text's place on its way to the transformer blocks is `_TextKeys`.
    """

    def process_encoder_hidden_states(self, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> _TextKeys:
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


class _FusedCLIPAttention(CLIPAttention):  # type: ignore[misc]
    """A text encoder's attention with merged projections, and on a GPU by the kernel for few keys."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        heads = [
            t.unflatten(-1, (-1, self.head_dim))
            for t in project(projections_of_same_input(self), hidden_states)
        ]
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
        hidden_states, normal = _input_and_norm(hidden_states, self.layer_norm1)
        update, _ = self.self_attn(normal, attention_mask, **kwargs)
        hidden_states, normal = _residual_norm(hidden_states, update, self.layer_norm2)
        return hidden_states + self.mlp(normal)


class _FusedLoraLinear(LoraLinear):  # type: ignore[misc]
    """An adapted layer that is no part of an attention's merged ones."""

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_mergeable(self):
            return project_merged([self], inputs)[0]
        return super().forward(inputs, *args, **kwargs)


class _FusedGEGLU(GEGLU):  # type: ignore[misc]
    """The feed-forward layer's gate in one kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return geglu(self.proj(hidden_states))


class _FusedGroupNorm(nn.GroupNorm):
    """A group normalisation that keeps channels_last."""

    def forward(self, input: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        if input.ndim != 4:  # the VAE's attention normalises tokens
            return super().forward(input)
        return self.beside(input, silu, shift)[1]

    def beside(self, input: Tensor, silu: bool = False, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The input, to be read once more, and what becomes of it."""
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu, shift)


class _FusedConv2d(nn.Conv2d):
    """A frozen convolution that keeps no input for the gradient of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return frozen_conv2d(input, self.weight, self.bias, self.stride, self.padding)

    def without_bias(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return frozen_conv2d(input, self.weight, None, self.stride, self.padding)


class _FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """A residual block: whatever is added to an image, the next kernel adds. The VAE's know no time."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        input_tensor, hidden = self.norm1.beside(input_tensor, silu=True)
        hidden, bias = _bias_apart(self.conv1, hidden)
        shift = None if bias is None else bias.expand(len(hidden), -1).contiguous()
        if temb is not None:
            time = self.time_emb_proj(silu(temb))
            shift = time if bias is None else time + bias
        hidden = self.norm2(hidden, silu=True, shift=shift)
        hidden, bias = _bias_apart(self.conv2, self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor, more = _bias_apart(self.conv_shortcut, input_tensor)
            bias = more if bias is None else bias if more is None else bias + more
        return residual_sum(input_tensor, hidden, bias)


def _bias_apart(conv: nn.Module, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a convolution makes of an image, and the bias that is still to be added, if there is one.

    On a CPU none is, nor where an adapter's layer is wrapped around the convolution.
    """
    if isinstance(conv, _FusedConv2d) and uses_triton(image):
        return conv.without_bias(image), conv.bias
    return conv(image), None


class _FusedTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """A transformer block: each residual sum and the normalisation after it in one kernel."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor]) -> Tensor:
        hidden_states, normal = _input_and_norm(hidden_states, self.norm1)
        update = self.attn1(normal)
        hidden_states, normal = _residual_norm(hidden_states, update, self.norm2)
        update = self.attn2(normal, encoder_hidden_states=encoder_hidden_states)
        hidden_states, normal = _residual_norm(hidden_states, update, self.norm3)
        return hidden_states + self.ff(normal)


def _input_and_norm(hidden_states: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return layer_norm(hidden_states, norm.weight, norm.bias, norm.eps)


def _residual_norm(residual: Tensor, update: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return add_norm(residual, update, norm.weight, norm.bias, norm.eps)


class _FusedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """A stack of transformer blocks over pixels. In channels_last, pixels are tokens without a copy."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: _TextKeys,
        **_: Any,
    ) -> tuple[Tensor]:
        batch, channels, height, width = hidden_states.shape
        hidden_states, normal = self.norm.beside(hidden_states)
        tokens: Tensor = self.proj_in(normal.permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states[block.attn2])
        output = self.proj_out(tokens).view(batch, height, width, channels).permute(0, 3, 1, 2)
        return (output + hidden_states,)


FUSED_CLASSES = {
    BasicTransformerBlock: _FusedTransformerBlock,
    CLIPAttention: _FusedCLIPAttention,
    CLIPEncoderLayer: _FusedCLIPEncoderLayer,
    GEGLU: _FusedGEGLU,
    LoraLinear: _FusedLoraLinear,
    ResnetBlock2D: _FusedResnetBlock2D,
    Transformer2DModel: _FusedTransformer2DModel,
    UNet2DConditionModel: _FusedUNet2DConditionModel,
    nn.Conv2d: _FusedConv2d,
    nn.GroupNorm: _FusedGroupNorm,
}


def fuse_unet(unet: UNet2DConditionModel, backend: AttentionBackend) -> None:
    """`fuse_modules` for the UNet, with this backend in all its attentions, and channels_last on a GPU."""
    fuse_modules(unet)
    unet.set_attn_processor(_FusedAttentionProcessor(backend))
    if unet.device.type != "cpu":
        unet.to(memory_format=torch.channels_last)


def fuse_vae(vae: AutoencoderKL) -> None:
    """`fuse_modules` for the VAE, and channels_last on a GPU."""
    fuse_modules(vae)
    if vae.device.type != "cpu":
        vae.to(memory_format=torch.channels_last)


def attention_shapes(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> list[AttentionShape]:
    """The sizes of the UNet's attentions, for latents of this height and width."""
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
