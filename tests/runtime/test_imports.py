"""Programs import of mindone what they use, and it is what it would have been."""

import json
import subprocess
import sys

import pytest

QUICK = """
import json, sys
from FBCache_ms.runtime.imports import quick_imports
with quick_imports():
    from FBCache_ms import FluxPipeline
"""
MODELS = """
names = [name.split(".") for name in sys.modules if name.startswith("mindone.transformers.models.")]
print(json.dumps(sorted({name[3] for name in names})))
"""
NAMES = """
import json, sys, types
import mindone.transformers
from mindone.transformers import *
whole = mindone.transformers
kinds = {name: value.__module__ for name, value in vars(whole).items() if isinstance(value, type)}
print(json.dumps([kinds, whole.__version__, hasattr(whole, "ModelMixin"), whole.models.bert.BertModel.__name__]))
"""


def said(script):
    """What a process of its own prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pipeline_imports_the_text_models_that_it_uses_alone():
    models = said(QUICK + MODELS)
    assert {"clip", "t5"} <= set(models) and len(models) < 10


@pytest.mark.slow
def test_names_are_those_of_the_whole_package():
    kinds, *others = said(QUICK + NAMES)
    whole, *theirs = said("import json, sys\n" + NAMES)
    assert others == theirs
    missing = {name: where for name, where in whole.items() if kinds.get(name) != where}
    assert not missing
