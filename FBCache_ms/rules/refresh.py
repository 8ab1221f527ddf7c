"""A refresh, the third kind of step: attention is kept from the last full step, and chosen tokens' MLPs run anew.

From the code of ToCa and DuCa for FLUX.1. Which tokens are the oldest: a random order of a stream's tokens is gone
through again and again, so that none is chosen twice before all others were.
"""

import numpy as np

DOUBLE, SINGLE = 0.4, 1.6
"""The weights of the two stacks in the share of tokens that are chosen."""


def chosen(layer, tokens, weight):
    """How many of so many tokens a refresh chooses in block ``layer`` of its stack, counted from 0.

    floor(0.1 (1.5 - layer / 27) weight tokens), as published for FLUX.1's 19 double and 38 single blocks, and the same
    at another depth; at least one token.
    """
    return max(int(0.1 * (1.5 - layer / 27) * weight * tokens), 1)


def streams(doubles, singles, text, image):
    """For each block (tokens, how many of them are chosen) of each stream that it has: text and image, or one of both.

    Args:
        doubles, singles: number of blocks of each kind.
        text, image: tokens.
    """
    blocks = [tuple((tokens, chosen(layer, tokens, DOUBLE)) for tokens in (text, image)) for layer in range(doubles)]
    return blocks + [((text + image, chosen(layer, text + image, SINGLE)),) for layer in range(singles)]


def orders(blocks, seed=0):
    """The order in which each stream's tokens are chosen, one behind the other, int32; ``blocks`` as from streams."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(tokens) for block in blocks for tokens, _ in block]).astype(np.int32)
