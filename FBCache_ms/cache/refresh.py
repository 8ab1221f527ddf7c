"""What a gate keeps of every block, so that a refresh runs chosen tokens' MLPs alone."""

import numpy as np

import mindspore as ms
from mindspore import Parameter, ops

from ..rules.refresh import orders, streams


@ms.jit_class
class KeptStream:
    """One stream of a block (B, N, D), and which of its tokens a refresh chooses.

    Args:
        attended: the Buffer of what attention gave at the last full step.
        added: the Buffer of what the MLP gave, of each token when it was last chosen.
        order: the Parameter of all streams' orders; this one's begins at ``first``.
        tokens, chosen: N, and how many of them a refresh chooses.
    """

    def __init__(self, attended, added, order, first, tokens, chosen):
        self.attended, self.added, self.order = attended, added, order
        self.first, self.tokens, self.number = first, tokens, chosen
        self.places = ms.Tensor(np.arange(chosen), ms.int32)

    def chosen(self, refresh):
        """The tokens that refresh number ``refresh``, from 1 on, chooses: the next ones of the order, which is a ring.

        The numbers are an int32 vector.
        """
        places = ((refresh - 1) * self.number + self.places) % self.tokens
        return ops.gather(self.order, places + self.first, 0)

    def kept(self):
        """What attention and the MLP gave."""
        return self.attended.read(), self.added.read()

    def record(self, attended, added):
        """Takes over a full step."""
        self.attended.write(attended)
        self.added.write(added)


def kept_blocks(buffer, shape, text_len, stacks, dtype):
    """The KeptStreams of each block, and the Parameter of their orders.

    Args:
        buffer: makes a Buffer of a name, a shape, a first value and a dtype.
        shape: (B, S, D) of the image stream.
        text_len: T.
        stacks: how many double and how many single blocks.
        dtype: of the model.
    """
    batch, image, width = shape
    blocks, kept, first = streams(*stacks, text_len, image), [], 0
    order = Parameter(ms.Tensor(orders(blocks)), name="cache_token_order", requires_grad=False)
    for index, block in enumerate(blocks):
        found = []
        for place, (tokens, chosen) in enumerate(block):
            buffers = [
                buffer(f"block_{index}_{place}_{name}", (batch, tokens, width), 0, dtype)
                for name in ("attended", "added")
            ]
            found.append(KeptStream(*buffers, order, first, tokens, chosen))
            first += tokens
        kept.append(tuple(found))
    return tuple(kept), order
