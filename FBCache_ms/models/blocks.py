"""What the blocks of several families have in common."""

import mindspore as ms

from . import kernels


def input_or_none(inputs, name):
    """An input by its name, None where it is not given."""
    return inputs[name] if name in inputs else None


def controlnet_index(index, blocks, samples, in_turn):
    """Which of a ControlNet's residuals block number ``index`` gets: spread over the blocks, or in turn."""
    if in_turn:
        return index % samples
    return index // ((blocks + samples - 1) // samples)


def behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """A double block's stream behind attention, by a device's kernel where there is one that does it."""
    by_kernel = kernels.behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate)
    if by_kernel is not None:
        return by_kernel
    return behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate)


def behind_double_equations(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """A double block's stream: y = x + gate a, then y + mlp_gate ff((1 + scale) norm(y) + shift)."""
    stream = stream + gate.unsqueeze(1) * attended
    modulated = norm(stream) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return stream + mlp_gate.unsqueeze(1) * feed_forward(modulated)


def finite(stream):
    """A stream of float16 within what that can hold."""
    return stream.clip(-65504, 65504) if stream.dtype == ms.float16 else stream
