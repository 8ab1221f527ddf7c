"""kernels.cc by itself: under GCC's sanitizers, and as it is compiled for other processors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mindspore as ms

from FBCache_ms.runtime.cpu import kernels

HERE = Path(__file__).parent
SANITIZERS = {
    "libasan.so": "address,undefined,float-cast-overflow",
    "libtsan.so": "thread",
}
"""What is checked, by the library that a process must be started with."""

PAIRS = "-DFAST_PAIRS=false", "-DFAST_PAIRS=true"
"""How bfloat16 is multiplied on Intel's processors and on AMD's."""


def said_by(*command, **settings):
    return subprocess.run(command, check=True, capture_output=True, text=True, **settings).stdout


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels.COMPILER is None or kernels.LINEAR is None, reason="no kernels"),
]


def run_alone(folder, *flags, preloaded=()):
    """Compiles the kernels with more flags and calls all of them: the names, the process, and its file of outputs."""
    names = re.findall(r"(\w+)InferShape", said_by(kernels.COMPILER, "-E", "-P", str(kernels.SOURCE)))
    source, library, outputs = folder / "kernels.cc", folder / "kernels.so", folder / "outputs.npz"
    lines = [f'#include "{file}"' for file in (kernels.SOURCE, HERE / "kernels_alone.cc")]
    source.write_text("\n".join(lines + [f"CALLED({name})" for name in names]))
    said_by(kernels.COMPILER, *kernels.FLAGS, *flags, str(source), "-o", str(library))
    found = [said_by(kernels.COMPILER, f"-print-file-name={file}").strip() for file in preloaded]
    (onednn,) = (Path(ms.__file__).parent / "lib").glob("libdnnl.so.[23]")
    # What Python never frees is not the kernels'.
    environment = {**os.environ, "LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    command = sys.executable, str(HERE / "kernels_alone.py"), str(library), str(onednn), str(outputs), *names
    return names, subprocess.run(command, env=environment, capture_output=True, text=True), outputs


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("runtime", SANITIZERS)
def test_sanitizers_find_nothing_in_the_kernels(runtime, pairs, tmp_path):
    flags = f"-fsanitize={SANITIZERS[runtime]}", "-fno-sanitize-recover=all", "-g", "-O1", pairs
    names, done, _ = run_alone(tmp_path, *flags, preloaded=(runtime, "libstdc++.so"))
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("GCC's thread sanitizer does not run where Linux lays out memory this much at random")
    assert done.returncode == 0 and done.stdout == f"{len(names)} kernels\n", done.stdout + done.stderr[-5000:]


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="another kind of processor")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3", *PAIRS])
def test_processors_with_shorter_registers_or_slower_instructions_compute_the_same(flag, tmp_path):
    for name, flags in {"this": (), "other": (flag,)}.items():
        (tmp_path / name).mkdir()
        _, done, _ = run_alone(tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
    this, other = (np.load(tmp_path / name / "outputs.npz") for name in ("this", "other"))
    assert this.files == other.files
    for name in this.files:
        scale = np.abs(this[name]).max()
        same = np.isclose(other[name], this[name], rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
        # An input that lies between two levels, or two bfloat16, may be rounded to the other one.
        assert same.mean() >= (0.99 if name.endswith(("int8", "bfloat16")) else 1), name
