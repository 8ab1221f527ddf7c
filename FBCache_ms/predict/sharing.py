"""Seconds of a picture that several devices share, predicted: runtime/parallel.py's schemes, a roofline a part."""

from dataclasses import dataclass, replace

from .roofline import Work, seconds, step

SCHEMES = ("gather", "ulysses")


@dataclass(frozen=True)
class Links:
    """What devices are joined by.

    Args:
        name: what it is called.
        bandwidth: bytes a second that a device receives.
    """

    name: str
    bandwidth: float


def shared_works(shapes, config, design, ranks, reused=()):
    """A step's Works on each of so many devices: an equal share of the operations and streams, and all weights."""
    part = replace(shapes, image_tokens=shapes.image_tokens // ranks, text_tokens=max(shapes.text_tokens // ranks, 1))
    whole, own = (step(each, config, design, reused) for each in (shapes, part))
    return [Work(all_of.part, all_of.operations / ranks, one.bytes, one.operators) for all_of, one in zip(whole, own)]


def received_bytes(shapes, ranks, blocks, scheme="gather"):
    """What a device receives for so many blocks.

    By "gather" keys and values of all tokens but its own; by "ulysses" its heads' queries, keys and values of those,
    and its tokens' attention of the other heads.
    """
    streams = 2 if scheme == "gather" else 4 / ranks
    return streams * shapes.stream(shapes.tokens) * blocks * (ranks - 1) / ranks


def shared_step_seconds(device, design, links, shapes, config, ranks, reused=(), scheme="gather"):
    """Of a step: computing, and then, without any overlap, what the blocks that run exchange."""
    works = shared_works(shapes, config, design, ranks, reused)
    blocks = sum(work.part == "blocks: attention" for work in works)
    return seconds(device, design, works) + received_bytes(shapes, ranks, blocks, scheme) / links.bandwidth
