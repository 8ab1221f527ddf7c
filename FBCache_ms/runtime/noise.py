"""Lines of other libraries that alarm without a cause: each is left out, it alone, where it comes from."""

import logging
import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path

_LINES = {
    "None of PyTorch, TensorFlow >= 2.0, or Flax have been found": "transformers",
    # T5's encoder has no embedding of its own: it is the model's.
    r"newly initialized: \['encoder.embed_tokens.weight'\]": "mindone.transformers.modeling_utils",
    # Tables of rotary frequencies are made with the model; no checkpoint has them.
    r"newly initialized: \[('[^']*inv_freq'(, )?)+\]": "mindone.transformers.modeling_utils",
    # What counts a normalization's training steps says nothing of a trained one.
    r"newly initialized: \['bn.num_batches_tracked'\]": "mindone.diffusers.models.modeling_utils",
    # mindone's own pipelines say it so.
    "`mindspore_dtype` is deprecated": "mindone.transformers.modeling_utils",
}
"""What a line has in it, a pattern, and its logger."""

_MINDSPORES = ("Module 'mindspore.common.api' is deprecated",)
"""What MindSpore's logger says of mindone's imports (MindSpore 2.10.0)."""

_WITHOUT_AN_NPU = ("Backend Ascend is not available", "error when loading plugin for MindSpore package")
"""What MindSpore's logger says when it is asked for an NPU; where there is one, it is what keeps MindSpore from it."""

_WARNING = "The image_processor_class argument is deprecated"
"""How a FutureWarning begins that is meant for mindone's authors."""


class _BeforeModels:
    """What Python asks first for a module: before mindone's models, it tells transformers a name that it asks for."""

    def find_spec(self, name, path=None, target=None):
        if name == "mindone.transformers":
            sys.meta_path.remove(self)
            configs = import_module("transformers.utils.auto_docstring").HARDCODED_CONFIG_FOR_MODELS
            configs.setdefault("parakeet", "ParakeetEncoderConfig")


def has_npu():
    """Whether this machine has an Ascend NPU, as far as its device files tell."""
    return any(Path("/dev").glob("davinci[0-9]*"))


def leave_out_noise():
    """To be called before mindone is imported, which it does not do itself."""
    mindspores = _MINDSPORES if has_npu() else _MINDSPORES + _WITHOUT_AN_NPU
    for text, name in {**_LINES, **dict.fromkeys(mindspores, f"ME.mindspore.log.{os.getpid()}")}.items():
        logging.getLogger(name).addFilter(lambda record, text=text: not re.search(text, record.getMessage()))
    warnings.filterwarnings("ignore", _WARNING, FutureWarning)
    sys.meta_path.insert(0, _BeforeModels())
