"""What is printed where FBCache_ms is used as a library, in a process of its own, from another folder."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from narrow import make_narrow

from FBCache_ms.runtime import noise

LIBRARY = """
import sys
from FBCache_ms import TINY_FLUX, CacheConfig

assert TINY_FLUX.is_dir() and "mindspore" not in sys.modules
from FBCache_ms import FluxPipeline, choose_device

pipe = FluxPipeline.from_pretrained(sys.argv[1], device=choose_device(), cache_config=CacheConfig(0.12))
pipe.set_progress_bar_config(disable=True)
image = pipe("a big red circle", num_inference_steps=2)[0][0]
print("a table")
"""


@pytest.fixture
def printed(tmp_path):
    """stdout and stderr of a process that draws."""
    command = [sys.executable, "-c", LIBRARY, str(make_narrow(tmp_path / "narrow"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def test_nothing_alarming_is_printed(printed):
    out, err = printed
    # Two steps are few, and the cache says so; the bar is mindone's.
    said = [line for line in err.replace("\r", "\n").splitlines() if line and "Loading pipeline" not in line]
    assert out == "a table\n"
    assert len(said) == 1 and said[0].startswith("cache off: 2 steps are few")


def left_out(logger, text):
    record = logging.LogRecord(logger, logging.WARNING, __file__, 1, text, (), None)
    return not logging.getLogger(logger).filter(record)


LOADING = "Some weights of T5EncoderModel were not initialized and are newly initialized: {}\nYou should probably TRAIN"


MINDSPORE = f"ME.mindspore.log.{os.getpid()}"


@pytest.mark.parametrize(
    "logger, text, gone",
    [
        ("mindone.transformers.modeling_utils", LOADING.format("['encoder.embed_tokens.weight']"), True),
        ("mindone.transformers.modeling_utils", LOADING.format("['encoder.block.0.weight']"), False),
        ("mindone.transformers.modeling_utils", LOADING.format("['encoder.embed_tokens.weight', 'b']"), False),
        ("mindone.diffusers.pipelines.flux.pipeline_flux", "The following part of your input was truncated", False),
        ("transformers", "None of PyTorch, TensorFlow >= 2.0, or Flax have been found. Models", True),
        ("transformers", "another warning", False),
        (MINDSPORE, "Backend Ascend is not available.", not noise.has_npu()),
        (MINDSPORE, "Module 'mindspore.common.api' is deprecated from version 2.9.0", True),
        (MINDSPORE, "another warning", False),
    ],
    # MindSpore's logger has the process's number in its name, and the workers must agree on the tests' names.
    ids=["tied", "untied", "both", "truncated", "no torch", "transformers", "no npu", "moved", "mindspore"],
)
def test_a_line_is_left_out_alone(logger, text, gone):
    assert left_out(logger, text) == gone


def test_a_warning_is_left_out_alone(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        noise.leave_out_noise()
        warnings.warn("The image_processor_class argument is deprecated and will be removed", FutureWarning)
        warnings.warn("another is deprecated", FutureWarning)
    assert [str(warning.message) for warning in said] == ["another is deprecated"]
