"""One picture on several devices: each has a part of its tokens, and attention sees the keys and values of all.

    pipe.enable_parallelism(ContextParallelConfig())        # under msrun

Latents, text, rotary tables and the cache are split by token over the whole loop, and the latents gathered once at its
end. A block exchanges its keys and values, a decision two sums; a reused step that runs one block exchanges for that
one alone.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import nn, ops
from mindspore.communication import GlobalComm, create_group, get_rank, init

from ..models import family
from ..models.gathered import PROCESSORS, SCHEMES, Gathered, Ranks
from . import scheduler_watch

NODE_TIMEOUT = 30
"""Seconds after which msrun's scheduler gives up a process that is gone."""

MESSAGE = 4096
"""Bytes that a message from the first rank has room for."""


@dataclass(frozen=True)
class ContextParallelConfig:
    """How devices share a picture.

    Args:
        degree: how many share one; None: all that msrun has started. Groups of so many draw pictures of their own.
        scheme: what attention exchanges: "gather", keys and values of all tokens, once a block; or "ulysses", all
            tokens of a part of the heads, there and back: with four devices half the bytes, with eight a quarter.
        cfg_parallel: whether one half of them takes the prompt of a true classifier-free guidance, and the other half
            the negative prompt, with an exchange a step; only pictures with both are drawn then.

    Raises ValueError, naming the field, for what is not allowed.
    """

    degree: Optional[int] = None
    scheme: str = "gather"
    cfg_parallel: bool = False

    def __post_init__(self):
        if self.degree is not None and (not isinstance(self.degree, int) or self.degree < 1):
            raise ValueError(f"degree must be a number from 1 on or None, not {self.degree!r}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, not {self.scheme!r}")
        if self.cfg_parallel and self.degree is not None and self.degree % 2:
            raise ValueError(f"degree must be even with cfg_parallel, not {self.degree}")


def world():
    """How many processes msrun has started, 1 without it."""
    return int(os.environ.get("MS_WORKER_NUM", 1))


def groups_of(config):
    """(those that share the tokens with this process, that draw the same picture, the two that have the same tokens).

    Ranks each; the last is None without cfg_parallel. Choose the device before: communication begins here, and msrun's
    scheduler process stays here. Raises ValueError for a degree that the processes do not allow.
    """
    number = world() if config.degree is None else config.degree
    if world() % number:
        raise ValueError(f"degree {number}: {world()} processes cannot be divided into groups of so many")
    if config.cfg_parallel and number % 2:
        raise ValueError(f"degree must be even with cfg_parallel, not {number}")
    begin_communication()
    first, place = divmod(get_rank(), number)
    everyone = range(first * number, (first + 1) * number)
    if not config.cfg_parallel:
        ranks = ranks_of(everyone, SCHEMES[config.scheme])
        return ranks, ranks, None
    branch, place = divmod(place, number // 2)
    half = number // 2
    sharing = ranks_of(everyone[branch * half :][:half], SCHEMES[config.scheme])
    return sharing, ranks_of(everyone), ranks_of(everyone[place::half])


def ranks_of(members, kind=Ranks):
    """The Ranks of a group of processes, this one among them. Raises ValueError for one that the device has not."""
    number, rank = len(members), members.index(get_rank())
    if number == world():
        return kind(number, rank, GlobalComm.WORLD_COMM_GROUP)
    if number == 1:
        return kind(1, 0, None)
    if ms.get_context("device_target") == "CPU":
        raise ValueError(f"{number} processes: on a CPU all {world()} have to be one group")
    group = f"fbcache_{'_'.join(map(str, members))}"
    create_group(group, list(members))
    return kind(number, rank, group)


@lru_cache(maxsize=None)
def begin_communication():
    """Joins the processes that msrun has started; a process that fails then ends at once, so that msrun ends them all.

    MindSpore's own end of a process would wait for the others, which wait for this one.
    """
    os.environ.setdefault("MS_NODE_TIMEOUT", str(NODE_TIMEOUT))
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        subprocess.Popen([sys.executable, scheduler_watch.__file__, str(os.getpid())])
    with in_turn():
        init()
    hook = sys.excepthook

    def end(*error):
        hook(*error)
        leave(1)

    sys.excepthook = end


@contextmanager
def in_turn():
    """Lets this thread, and those that it starts, wait for each other on one core; afterwards they are free again.

    MindSpore 2.7.0 connects to msrun's scheduler in a race of two threads: where its event loop hears of a connection
    before the other thread has noted it, the connection is given up after seconds, and tried again for minutes.
    """
    cores, policy, before = os.sched_getaffinity(0), os.sched_getscheduler(0), set(os.listdir("/proc/self/task"))
    # A container may forbid it, and then it takes as long as it takes.
    with suppress(PermissionError):
        os.sched_setaffinity(0, {min(cores)})
        # A thread of this kind does not interrupt another when it wakes up.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        for thread in {"0", *os.listdir("/proc/self/task")} - before:
            with suppress(ProcessLookupError, PermissionError):
                os.sched_setaffinity(int(thread), cores)
                os.sched_setscheduler(int(thread), policy, os.sched_param(0))


def leave(status):
    """Ends this process with a status; where that is an error and others wait for it, at once."""
    if status and begin_communication.cache_info().currsize:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class Exchange(nn.Cell):
    """What each rank has, (n, ...), on all of them."""

    def __init__(self, ranks):
        super().__init__(auto_prefix=False)
        self.all_gather = ranks.all_gather

    def construct(self, values):
        """See the class."""
        values = values.expand_dims(0)
        return values if self.all_gather is None else self.all_gather(values)


class Sharing:
    """How a pipeline's picture is shared: what of a call's inputs a rank has, and what all have to agree on.

    Args:
        ranks: the Ranks that share the tokens.
        everyone: those that draw the same picture.
        pair: with cfg_parallel the two that have the same tokens, of the prompt and of the negative one; else None.
        by_token: the family's BY_TOKEN.
    """

    def __init__(self, ranks, everyone, pair, by_token):
        self.ranks, self.pair, self.by_token = ranks, pair, by_token
        self.exchange, self.exchange_tokens = Exchange(everyone), Exchange(ranks)
        self.exchange_prompts = pair and Exchange(pair)
        self.dismissed = False

    def part(self, values, axis, text=0):
        """This rank's share of a tensor's tokens along an axis; the first ``text`` of them are shared by themselves.

        Raises ValueError where the tokens cannot be divided.
        """
        number, rank = self.ranks.number, self.ranks.rank
        whole, parts = values.shape[axis], []
        for start, stop in ((0, text), (text, whole)):
            each, left = divmod(stop - start, number)
            if left:
                raise ValueError(f"{stop - start} tokens cannot be shared by {number} devices evenly")
            parts.append(np.arange(start + rank * each, start + (rank + 1) * each))
        return ops.gather(values, ms.Tensor(np.concatenate(parts), ms.int32), axis % values.ndim)

    def inputs(self, inputs):
        """A rank's share of a model's inputs, {name: tensor or tuple of tensors}."""
        text = inputs["encoder_hidden_states"].shape[-2]
        found = dict(inputs)
        for name in set(self.by_token) & set(inputs):
            kind, axis = self.by_token[name]
            before = text if kind == "both" else 0
            value = inputs[name]
            if isinstance(value, (list, tuple)):
                found[name] = tuple(self.part(each, axis, before) for each in value)
            else:
                found[name] = self.part(value, axis, before)
        return found

    def latents(self, latents):
        """A rank's share of the latents (B, S, C)."""
        return self.part(latents, 1)

    def whole(self, latents):
        """All latents, from a rank's share."""
        if self.ranks.number == 1:
            return latents
        parts = self.exchange_tokens(latents).asnumpy()
        return ms.Tensor(np.concatenate(parts, 1), latents.dtype)

    def firsts(self, values):
        """The first rank's tensor."""
        return self.exchange(values)[0]

    def agree(self, **facts):
        """Raises ValueError on all ranks, naming it, unless each fact, by name, is the same on all."""
        digests = [
            int.from_bytes(hashlib.sha256(repr(each).encode()).digest()[:4], "little") for each in facts.values()
        ]
        told = self.exchange(ms.Tensor(np.array(digests, np.uint32).view(np.int32))).asnumpy()
        for name, column in zip(facts, told.T):
            others = [rank for rank, digest in enumerate(column) if digest != column[0]]
            if others:
                raise ValueError(
                    f"the devices that share a picture disagree on {name}: rank {others[0]} of the group has another "
                    "than rank 0"
                )

    def agree_on_inputs(self, branches, **facts):
        """``agree``, also on what the transformer is given: for each prompt its arguments by name."""
        prompts = [given["encoder_hidden_states"] for given in branches]
        self.agree(**facts, prompts=digest(prompts), inputs=digest(branches))

    def tell(self, message=None):
        """Hands the first rank's message, a dictionary for JSON, to all others, which call this without one."""
        text = json.dumps(message).encode().ljust(MESSAGE)
        if len(text) > MESSAGE:
            raise ValueError(f"a message of {len(text)} bytes is longer than {MESSAGE}")
        told = self.firsts(ms.Tensor(np.frombuffer(text, np.int32)))
        return json.loads(told.asnumpy().tobytes())

    def dismiss(self):
        """Tells those who wait for a message, once, that none will come: ``tell`` gives them None."""
        if not self.dismissed:
            self.dismissed = True
            self.tell()

    def over_ranks(self, transformer):
        """The mean over all ranks' tokens, for a new graph; raises ValueError where their transformers differ.

        None where one rank has all tokens.
        """
        self.agree(scheme=type(self.ranks).__name__, weights=weights_of(transformer))
        return self.ranks.mean if self.ranks.number > 1 else None

    def both_traces(self, trace):
        """Each prompt's GateStats, with cfg_parallel, of which this rank has its own."""
        # NumPy's NaN for None.
        own = np.array([(gate.reused, gate.residual_diffs) for gate in trace], np.float32)
        told = self.exchange_prompts(ms.Tensor(own)).asnumpy()
        return [tuple(replace(gate, **traced(each)) for gate, each in zip(trace, numbers)) for numbers in told]

    def first_number(self, number):
        """The first rank's whole number."""
        return int(self.firsts(ms.Tensor([number], ms.int32)).asnumpy()[0])

    def any(self, flag):
        """Whether a flag is set on any rank."""
        return bool(self.exchange(ms.Tensor([int(flag)], ms.int32)).asnumpy().any())


def digest(value):
    """What tells a call's input from another: tensors by their numbers, collections by their entries."""
    if isinstance(value, ms.Tensor):
        return hashlib.sha256(value.float().asnumpy().tobytes()).hexdigest(), value.shape
    if isinstance(value, dict):
        return [(name, digest(each)) for name, each in sorted(value.items())]
    return [digest(each) for each in value] if isinstance(value, (list, tuple)) else value


def traced(numbers):
    """A GateStats' ``reused`` and ``residual_diffs``, of two rows of numbers with NaN for None."""
    reused, diffs = ([None if np.isnan(each) else float(each) for each in row] for row in numbers)
    return {"reused": tuple(each if each is None else bool(each) for each in reused), "residual_diffs": tuple(diffs)}


def weights_of(model):
    """Some numbers of each weight, to tell models apart."""
    return [
        (name, parameter.shape, *parameter.flatten()[:4].float().asnumpy().tolist())
        for name, parameter in model.parameters_and_names()
    ]


def share(transformer, ranks):
    """Puts processors that see all ranks' tokens into a transformer's attention; raises ValueError for foreign ones.

    One rank alone has all tokens, and keeps its processors.
    """
    if ranks.number == 1:
        return
    cells = [cell for _, cell in transformer.cells_and_names() if hasattr(cell, "processor")]
    for cell in cells:
        if type(cell.processor) not in PROCESSORS:
            raise ValueError(
                f"attention processor {type(cell.processor).__name__} cannot be shared by several devices; only "
                f"{', '.join(kind.__name__ for kind in PROCESSORS)} can"
            )
        reason = ranks.why_not(cell)
        if reason:
            raise ValueError(reason)
    for cell in cells:
        cell.processor = PROCESSORS[type(cell.processor)](ranks, cell.processor)


def sharing_of(transformer, config):
    """The Sharing of a transformer's calls, as a ContextParallelConfig says.

    Raises:
        TypeError: config is none.
        ValueError: the processes or the attention processors do not allow it.
    """
    if not isinstance(config, ContextParallelConfig):
        raise TypeError(f"config must be a ContextParallelConfig, not {type(config).__name__}")
    ranks, everyone, pair = groups_of(config)
    share(transformer, ranks)
    return Sharing(ranks, everyone, pair, family(transformer).BY_TOKEN)


def why_not_shared(transformer, sharing):
    """What is wrong if a transformer's attention is not shared as this Sharing, or None, has it; None if nothing is."""
    first = next(iter(getattr(transformer, "transformer_blocks", ())), None)
    processor = getattr(getattr(first, "attn", None), "processor", None)
    ranks = processor.ranks if isinstance(processor, Gathered) else None
    if ranks is (sharing.ranks if sharing is not None and sharing.ranks.number > 1 else None):
        return None
    if sharing is None:
        return (
            "another pipeline shares the transformer's calls among several devices; end that by disable_parallelism()"
        )
    return (
        f"attention processor {type(processor).__name__} is not the one that enable_parallelism has put there; call it "
        "again"
    )


def unshare(transformer):
    """Puts back what share has taken out."""
    for _, cell in transformer.cells_and_names():
        if isinstance(getattr(cell, "processor", None), Gathered):
            cell.processor = cell.processor.original
