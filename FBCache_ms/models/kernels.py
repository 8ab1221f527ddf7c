"""Where a device's kernels stand in for parts of a block: each gives what the model's file would, or None.

None here; the code for a device, such as runtime/cpu/stand_ins.py, puts its own in these places.
"""


def places(cell):
    """Where a block's weights lie, a tuple of tensors: what a kernel of the same graph may take in their place."""
    return None


def whole_block(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.whole_block."""
    return None


def divided_double(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.divided_double."""
    return None


def behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate):
    """blocks.behind_double."""
    return None


def int8_weight_product(rows, weight, scale):
    """quantized.Int8WeightOnlyLinear.product."""
    return None


def int8_product(rows, weight, scale):
    """quantized.Int8Linear.product."""
    return None


def all_to_all(ranks, values, split, concat):
    """gathered.UlyssesRanks' exchange: each rank's values, split along an axis, put together along another."""
    return None
