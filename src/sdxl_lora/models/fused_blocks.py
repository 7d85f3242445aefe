"""Group normalisation, convolutions and residual blocks of the UNet and the VAE in fewer kernels.

Knows no adapters but what is wrapped around a convolution, which keeps its forward.
"""

from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import silu

from sdxl_lora.kernels.conv_ops import frozen_conv2d, group_norm, residual_sum
from sdxl_lora.kernels.transformer_ops import uses_triton
from sdxl_lora.models.class_swap import Classes


class _FusedGroupNorm(nn.GroupNorm):
    """A group normalisation that keeps channels_last."""

    def forward(self, input: Tensor, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        if input.ndim != 4:  # the VAE's attention normalises tokens
            return super().forward(input)
        return self.input_and_norm(input, silu, shift)[1]

    def input_and_norm(
        self, input: Tensor, silu: bool = False, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the input, to be read once more, and its group norm: both of the input's shape."""
        return group_norm(input, self.weight, self.bias, self.num_groups, self.eps, silu, shift)


class _FusedConv2d(nn.Conv2d):
    """A frozen convolution that keeps no input for the gradient of its weight."""

    @staticmethod
    def supports(conv: nn.Conv2d) -> bool:
        """Return whether a convolution is frozen and has no options but stride and zeros around the image."""
        whole = conv.groups == 1 and conv.dilation == (1, 1)
        pads_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return whole and pads_zeros and not conv.weight.requires_grad

    def forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return frozen_conv2d(input, self.weight, self.bias, self.stride, self.padding)

    def without_bias(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return frozen_conv2d(input, self.weight, None, self.stride, self.padding)


class _FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """A residual block: whatever is added to an image, the next kernel adds. The VAE's know no time."""

    @staticmethod
    def supports(block: Any) -> bool:
        """Return whether a block has SDXL's options, of the UNet or of the VAE."""
        resamples = block.upsample is not None or block.downsample is not None
        adds_time = block.time_embedding_norm == "default" and not block.skip_time_act
        # The VAE's decoder says `group`, and has no time to normalise by.
        knows_no_time = block.time_embedding_norm == "group" and block.time_emb_proj is None
        plain = type(block.nonlinearity) is nn.SiLU and block.output_scale_factor == 1
        return plain and (adds_time or knows_no_time) and not resamples

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        input_tensor, hidden = self.norm1.input_and_norm(input_tensor, silu=True)
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
    """Return a convolution of an image, and the bias that is still to be added; None if there is none.

    The next kernel adds the bias as it reads the image, which saves a pass over it. The convolution adds it
    on a CPU, and where an adapter's layer is wrapped around it.
    """
    if isinstance(conv, _FusedConv2d) and uses_triton(image):
        return conv.without_bias(image), conv.bias
    return conv(image), None


FUSED_BLOCKS: Classes = {
    ResnetBlock2D: _FusedResnetBlock2D,
    nn.Conv2d: _FusedConv2d,
    nn.GroupNorm: _FusedGroupNorm,
}
