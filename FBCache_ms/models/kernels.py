"""Where a device's kernels stand in for parts of a block: each gives what the model's file would, or None.

None here; the code for a device, such as runtime/cpu/stand_ins.py, puts its own in these places.
"""


def places(cells, attention_kwargs, dtype):
    """Where the weights of blocks lie: for each block what a kernel of the same graph may take in their place, or None.

    All of them lie in one table, since a graph hands each of its loops every tensor that is read there.
    """
    return (None,) * len(cells)


def whole_block(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.whole_block."""
    return None


def divided_double(cell, image, text, temb, rotary, attention_kwargs, places):
    """transformer_flux_withFBCache.divided_double."""
    return None


def behind_double(norm, feed_forward, stream, attended, gate, shift, scale, mlp_gate, places):
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
