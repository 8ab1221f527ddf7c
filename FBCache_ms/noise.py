"""Lines of other libraries that alarm without a cause: each is left out, it alone, where it comes from."""

import logging
import sys
import warnings
from importlib import import_module

_LINES = {
    "None of PyTorch, TensorFlow >= 2.0, or Flax have been found": "transformers",
    # T5's encoder has no embedding of its own: it is the model's.
    "newly initialized: ['encoder.embed_tokens.weight']": "mindone.transformers.modeling_utils",
    # mindone's own pipelines say it so.
    "`mindspore_dtype` is deprecated": "mindone.transformers.modeling_utils",
}
"""What a line has in it, and its logger."""

_WARNING = "The image_processor_class argument is deprecated"
"""How a FutureWarning begins that is meant for mindone's authors."""


class _BeforeModels:
    """What Python asks first for a module: before mindone's models, it tells transformers a name that it asks for."""

    def find_spec(self, name, path=None, target=None):
        if name == "mindone.transformers":
            sys.meta_path.remove(self)
            configs = import_module("transformers.utils.auto_docstring").HARDCODED_CONFIG_FOR_MODELS
            configs.setdefault("parakeet", "ParakeetEncoderConfig")


def leave_out_noise():
    """To be called before mindone is imported, which it does not do itself."""
    for text, name in _LINES.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
    warnings.filterwarnings("ignore", _WARNING, FutureWarning)
    sys.meta_path.insert(0, _BeforeModels())
