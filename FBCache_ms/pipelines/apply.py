"""Puts the cache into any of mindone's pipelines with a transformer that it knows, and takes it out again."""

from ..config import CacheConfig
from ..models import foreign_transformer
from ..runtime.device import prepare_device
from ..runtime.kept_graphs import KEPT_GRAPHS
from .cached_transformer import CachedScheduler, CachedTransformer, check_config, check_structure
from .whole_loop import WholeLoop


def apply_cache_on_pipe(pipe, config=None, kept_shapes=KEPT_GRAPHS):
    """Puts the cache into any mindone pipeline of a known family (ControlNet, Edit, ...), step by step, and returns it.

    Each call of the transformer is one compiled graph, the same for every prompt, seed and step count at one shape;
    ``pipe.transformer.cache_stats`` tells what the last generation did. Pipelines with true CFG may name the branch
    as mindone's FluxPipeline does, or call for the positive prompt first. Our own pipelines just take the config:
    their loops have the cache already.

    Args:
        pipe: a pipeline whose ``transformer`` is mindone's FluxTransformer2DModel, Flux2Transformer2DModel or
            QwenImageTransformer2DModel.
        config: a CacheConfig; None for the default. Applying again replaces it, and compiles only what is another
            structure.
        kept_shapes: for how many shapes (batch, size, text length, dtype) graph and buffers are kept, 1 or more; the
            one that was not used for longest goes first.

    Raises TypeError for another config, ValueError for a pipeline of another model or no kept shape.
    """
    check_config(config)
    config = config or CacheConfig()
    if kept_shapes < 1:
        raise ValueError(f"kept_shapes must be 1 or more, not {kept_shapes}")
    if isinstance(pipe, WholeLoop):
        pipe.cache_config, pipe._loops.most = config, kept_shapes
        return pipe
    transformer = given = getattr(pipe, "transformer", pipe)
    if type(given) is CachedTransformer:
        # It may be another pipeline's, among whose components this one's were.
        transformer = given.original
    reason = foreign_transformer(transformer)
    if reason:
        raise ValueError(reason)
    check_structure(config, transformer)
    if given is pipe or not hasattr(pipe, "scheduler"):
        raise ValueError(f"{type(pipe).__name__} is no pipeline: give one with a transformer and a scheduler")
    if given is not transformer and given.pipe() is pipe:
        given.cache_settings, given.steps.most = config, kept_shapes
        given.begin_generation()
        return pipe
    prepare_device()
    # Past DiffusionPipeline.__setattr__, which would write the stand-ins' classes into model_index.json.
    pipe.__dict__["transformer"] = CachedTransformer(transformer, config, pipe, kept_shapes)
    pipe.transformer.cached_scheduler()
    return pipe


def remove_cache_from_pipe(pipe):
    """Takes the cache out of a pipeline again, which is then what it was; one that has none stays as it is."""
    if isinstance(pipe, WholeLoop):
        pipe.cache_config = None
    for name, kind in {"transformer": CachedTransformer, "scheduler": CachedScheduler}.items():
        found = getattr(pipe, name, None)
        if type(found) is kind:
            if kind is CachedTransformer and found.sharing is not None:
                found.disable_parallelism()
            pipe.__dict__[name] = found.original
