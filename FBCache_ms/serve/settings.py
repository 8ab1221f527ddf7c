"""What is served, and within which limits."""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Mapping, Optional, Tuple

from ..config import PRESETS, CacheConfig

MOST_PICTURES = 10
"""Of one request, as OpenAI's."""

MOST_GRAPHS = 16
"""So many denoise graphs a pipeline keeps."""

MOST_SEED = 2**64 - 1
PROMPT_CHARACTERS = 4000
BODY_BYTES = 256 * 1024
BODY_SECONDS = 10
"""So long a client may take to send a body."""

KEPT_PICTURES, KEPT_SECONDS = 64, 600
"""Of finished jobs of /v1/jobs, so many pictures are kept, and so long."""

OUTPUT_FORMATS = ("png", "jpeg", "webp")


@dataclass(frozen=True)
class Settings:
    """What a server serves.

    Args:
        model: what names the checkpoint and where it runs: ckpt, quantize, device, dtype, jit_level, lazy_inline,
            deterministic, compile_cache.
        name: the model's, as clients call it.
        pipeline: the name of the class that draws.
        guidance: {scale that the pipeline takes: its default}.
        blocks: how many double and single blocks the transformer has.
        sizes: (width, height) in pixels, the default one first.
        presets: {name: CacheConfig} that are compiled, the default one first.
        negative_prompts: whether true classifier-free guidance is compiled, too.
        prompt_tokens: the longest prompt; None for as long as the model reads.
        batch_sizes: how many pictures one call of the model may draw, 1 among them. More than one are drawn so of
            requests without a seed, under schedules.
        batch_wait: seconds that such a request waits for others.
        replicas: how many drawing processes there are, each with a device of its own.
        steps, max_steps: of a picture, where the client does not say, and at most.
        queue: how many requests may wait.
        timeout: seconds after which a request that is not done is given up.
        painter_timeout: seconds without a word after which the drawing process is taken for hung.
        start_timeout: the same while it starts; compiling one graph may take minutes.
        keys: SHA-256 of each API key; empty where none is asked for.
        loopback: whether only this machine can reach the server.
        moderation: has ``check_prompt(text)`` and ``check_picture(pixels)``, each giving a reason to refuse or None.
    """

    model: SimpleNamespace
    name: str
    pipeline: str
    guidance: Mapping[str, Optional[float]]
    blocks: Tuple[int, int]
    sizes: Tuple[Tuple[int, int], ...]
    presets: Mapping[str, CacheConfig]
    negative_prompts: bool = False
    prompt_tokens: Optional[int] = None
    batch_sizes: Tuple[int, ...] = (1,)
    batch_wait: float = 0.05
    replicas: int = 1
    steps: int = 28
    max_steps: int = 100
    queue: int = 8
    timeout: float = 600
    painter_timeout: float = 120
    start_timeout: float = 3600
    keys: Tuple[bytes, ...] = ()
    loopback: bool = True
    moderation: Any = field(default=None, compare=False)

    @property
    def structures(self):
        """{what makes a graph of its own: a CacheConfig that has it}."""
        return {config.structure: config for config in reversed(self.presets.values())}

    @property
    def served_presets(self):
        """{name: tag} of every preset that needs no other graph than those that are compiled, the default one first."""
        others = {name: CacheConfig.preset(name) for name in PRESETS}
        every = {**self.presets, **{name: each for name, each in others.items() if name not in self.presets}}
        return {name: str(each) for name, each in every.items() if each.structure in self.structures}

    @property
    def branches(self):
        """The numbers of guidance branches that are compiled."""
        return (1, 2) if self.negative_prompts else (1,)

    @property
    def graphs(self):
        """How many denoise graphs are compiled; as many for each length where prompts are padded to several."""
        return len(self.sizes) * len(self.branches) * sum(map(len, self.batches))

    @property
    def batches(self):
        """The batch sizes that are compiled for each structure: a gate would decide for all pictures of a batch."""
        return [(1,) if config.rules else self.batch_sizes for config in self.structures.values()]

    def batch_of(self, pictures):
        """How many of so many pictures to draw at once."""
        return max(size for size in self.batch_sizes if size <= pictures)

    def for_painter(self):
        """What the drawing process is told, in plain values."""
        return {
            "model": self.model,
            "pipeline": self.pipeline,
            "sizes": self.sizes,
            "tags": [(str(config), sizes) for config, sizes in zip(self.structures.values(), self.batches)],
            "branches": self.branches,
            "guidance": dict(self.guidance),
            "prompt_tokens": self.prompt_tokens,
        }


def is_loopback(host):
    """Whether this machine alone reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def digest(key):
    """An API key as it is kept."""
    return hashlib.sha256(key.encode()).digest()


def owner_of(key, keys):
    """Which of the ``keys`` this one is, its number; None for none. Takes the same time for every key."""
    mine, found = digest(key), None
    for number, each in enumerate(keys):
        if hmac.compare_digest(mine, each):
            found = number
    return found
