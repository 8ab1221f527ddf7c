"""Whether what the cache takes over is mindone's own: what is somebody else's is run as it is, or refused by name."""

from mindone.diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from mindone.diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)

SCHEDULER_METHODS = ("step", "step_index", "_init_step_index")
"""What the denoise loop does in the scheduler's place."""


def replaced(thing, original, names):
    """The first of these methods that a thing does not have from the class ``original``; None where it has all."""
    own = getattr(thing, "__dict__", {})
    for name in names:
        if name in own or getattr(type(thing), name, None) is not getattr(original, name):
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


def foreign_transformer(transformer):
    """Why the cached step cannot take a transformer's place, in words; None where it can."""
    if not isinstance(transformer, FluxTransformer2DModel):
        return f"Unsupported model {type(transformer).__name__}; the cache is for mindone's FluxTransformer2DModel"
    method = replaced(transformer, FluxTransformer2DModel, ("construct", "__call__"))
    if method:
        return f"transformer {type(transformer).__name__} has a {method} of its own"
    if transformer._forward_hook or transformer._forward_pre_hook:
        return f"transformer {type(transformer).__name__} has forward hooks"
    embedder = transformer.time_text_embed
    kinds = CombinedTimestepTextProjEmbeddings, CombinedTimestepGuidanceTextProjEmbeddings
    if all(replaced(embedder, kind, ("construct",)) for kind in kinds):
        return f"time_text_embed {type(embedder).__name__} has a construct of its own"
    return None
