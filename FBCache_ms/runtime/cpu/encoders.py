"""Stand-ins for the text encoders and autoencoders of Qwen-Image and FLUX.2, run operator by operator."""

from mindone.diffusers.models.autoencoders import autoencoder_kl_qwenimage

import mindspore as ms
from mindspore import mint, ops

from .stand_ins import chunk, scaled_dot_product_attention


def clone(self):
    """Tensor.clone."""
    return ops.deepcopy(self)


def masked_fill_(self, mask, value):
    """Tensor.masked_fill_, with a number."""
    return self.assign_value(ops.masked_fill(self, mask, ms.Tensor(value, self.dtype)))


def dropout(input, p=0.5, training=True, inplace=False):
    """mint.nn.functional.dropout."""
    return ops.dropout(input, p) if training and p > 0 else input


def pad(input, pad, mode="constant", value=0.0):
    """mint.nn.functional.pad."""
    return ops.pad(input, tuple(pad), mode, value if mode == "constant" else None)


def norm(input, p=2, dim=None, keepdim=False, *, dtype=None):
    """mint.norm of the second order."""
    if p not in (2, 2.0, "fro", None):
        raise NotImplementedError(f"mint.norm of order {p} is not supported on CPU; 2 is")
    input = input if dtype is None else input.astype(dtype)
    return ops.sqrt((input * input).sum(dim, keepdims=keepdim))


def normalize(input, p=2.0, dim=1, eps=1e-12):
    """mint.nn.functional.normalize."""
    return input / ops.maximum(norm(input, p, dim, True), eps)


def conv3d_cell(self, input):
    """mint.nn.Conv3d.construct, for zero padding."""
    output = ops.Conv3D(
        self.out_channels,
        self.kernel_size,
        pad_mode="pad",
        pad=tuple(side for side in self.padding for _ in range(2)),
        stride=self.stride,
        dilation=self.dilation,
        group=self.groups,
    )(input, self.weight)
    return output if self.bias is None else output + self.bias.reshape(1, -1, 1, 1, 1)


def qwen_attention_block(self, x):
    """QwenImageAttentionBlock.construct: each frame of (B, C, T, H, W) attends to itself."""
    batch, channels, frames, height, width = x.shape
    pictures = x.swapaxes(1, 2).reshape(-1, channels, height, width)
    rows = self.to_qkv(self.norm(pictures)).reshape(-1, 1, 3 * channels, height * width).swapaxes(2, 3)
    attended = scaled_dot_product_attention(*chunk(rows, 3, -1)).swapaxes(2, 3)
    attended = self.proj(attended.reshape(pictures.shape))
    return x + attended.reshape(batch, frames, channels, height, width).swapaxes(1, 2)


STAND_INS = (
    (ms.Tensor, "clone", clone),
    (ms.Tensor, "masked_fill_", masked_fill_),
    (mint, "norm", norm),
    (mint.nn.functional, "dropout", dropout),
    (mint.nn.functional, "pad", pad),
    (mint.nn.functional, "normalize", normalize),
    (mint.nn.Conv3d, "construct", conv3d_cell),
    (autoencoder_kl_qwenimage.QwenImageAttentionBlock, "construct", qwen_attention_block),
)
"""As in stand_ins.py."""
