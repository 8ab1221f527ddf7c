"""kernels.cc under GCC's sanitizers: no access beyond an array, nothing undefined, no race."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mindspore as ms

from FBCache_ms.runtime.cpu import kernels

HERE = Path(__file__).parent
SANITIZERS = {
    "libasan.so": "address,undefined,float-cast-overflow",
    "libtsan.so": "thread",
}
"""What is checked, by the library that a process must be started with."""


def said_by(*command, **settings):
    return subprocess.run(command, check=True, capture_output=True, text=True, **settings).stdout


@pytest.mark.slow
@pytest.mark.skipif(kernels.COMPILER is None or kernels.LINEAR is None, reason="no kernels")
@pytest.mark.parametrize("runtime", SANITIZERS)
def test_sanitizers_find_nothing_in_the_kernels(runtime, tmp_path):
    names = re.findall(r"(\w+)InferShape", said_by(kernels.COMPILER, "-E", "-P", str(kernels.SOURCE)))
    source, library = tmp_path / "kernels.cc", tmp_path / "kernels.so"
    lines = [f'#include "{file}"' for file in (kernels.SOURCE, HERE / "kernels_alone.cc")]
    source.write_text("\n".join(lines + [f"CALLED({name})" for name in names]))
    flags = f"-fsanitize={SANITIZERS[runtime]}", "-fno-sanitize-recover=all", "-g", "-O1"
    said_by(kernels.COMPILER, *kernels.FLAGS, *flags, str(source), "-o", str(library))
    preloaded = [said_by(kernels.COMPILER, f"-print-file-name={file}").strip() for file in (runtime, "libstdc++.so")]
    (onednn,) = (Path(ms.__file__).parent / "lib").glob("libdnnl.so.[23]")
    # What Python never frees is not the kernels'.
    environment = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    command = sys.executable, str(HERE / "kernels_alone.py"), str(library), str(onednn), *names
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("GCC's thread sanitizer does not run where Linux lays out memory this much at random")
    assert done.returncode == 0 and done.stdout == f"{len(names)} kernels\n", done.stdout + done.stderr[-5000:]
