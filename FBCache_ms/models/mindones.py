"""What is mindone's own: only that may be run by what stands for it; what is the user's is run as it is, or refused."""

from mindone.diffusers import FlowMatchEulerDiscreteScheduler

AUTHORS = "mindone", "mindspore", "builtins", __name__.partition(".")[0]
"""Packages whose functions are not the user's: this one has the CPU's stand-ins, MindSpore has some written in C++."""

HOOKS = "_lazy_forward_pre_hook", "_lazy_forward_hook"
"""Where MindSpore keeps a cell's hooks, from the first one that is registered."""


def by_known_author(function):
    """Whether a function is not the user's; a wrapper, a partial function and an object that can be called are."""
    module = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
    return module.partition(".")[0] in AUTHORS


def is_mindones(thing, kind):
    """Whether a cell, or an attention processor, computes what a class of mindone's or MindSpore's does.

    It has the methods of that class, whatever its own, and none of them is the user's; it has no hook, and is not cast
    to another precision.
    """
    own = {name for name, value in vars(kind).items() if callable(value) and not isinstance(value, type)}
    methods = {name for name in own | {"construct", "__call__"} if hasattr(kind, name)} - {"__init__"}
    return (
        all(getattr(type(thing), name, None) is getattr(kind, name) for name in methods)
        and all(by_known_author(getattr(kind, name)) for name in methods)
        and methods.isdisjoint(vars(thing))
        and not any(vars(thing).get(hooks) for hooks in HOOKS)
        and getattr(thing, "mixed_precision_type", None) is None
    )


SCHEDULER_METHODS = ("step", "step_index", "_init_step_index")
"""What the denoise loop does in the scheduler's place."""


def replaced(thing, original, names):
    """The first of these methods that are not mindone's own, from the class ``original``; None where all are."""
    own = getattr(thing, "__dict__", {})
    for name in names:
        method = getattr(original, name)
        if name in own or getattr(type(thing), name, None) is not method or not by_known_author(method):
            return name
    return None


def foreign_scheduler(scheduler):
    """Why the denoise loop cannot take a scheduler's steps, in words; None where it can."""
    name = type(scheduler).__name__
    if getattr(getattr(scheduler, "config", None), "stochastic_sampling", False):
        return f"scheduler {name} samples stochastically"
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return f"scheduler {name} is no FlowMatchEulerDiscreteScheduler"
    method = replaced(scheduler, FlowMatchEulerDiscreteScheduler, SCHEDULER_METHODS)
    return method and f"scheduler {name} has a {method} of its own"


class AtParsing:
    """A cell's attribute that is asked for when a graph is parsed: test(cell), of the cell as it is then.

    A graph can ask a cell for an attribute alone, and takes a property for a method that it compiles.
    """

    def __init__(self, test):
        self.test = test

    def __get__(self, cell, owner):
        return cell is not None and self.test(cell)
