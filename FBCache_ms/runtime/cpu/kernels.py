"""Compiles kernels.cc where there is a C++ compiler, and gives its kernels as MindSpore's operators.

On a CPU a small Flux takes as long for handing out kernels as for running them, so what makes it fast is one kernel in
the place of ten. Every operator here is None where nothing could be compiled.
"""

import ctypes
import hashlib
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mindone.diffusers.utils import logging

import mindspore as ms
from mindspore import ops
from mindspore.ops import CustomRegOp, DataType

from ..compile_cache import users_folder

logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_suffix(".cc")
# Not -ffast-math: it switches denormals off for the whole process, and what is no number has to stay none.
FLAGS = (
    *("-O3", "-march=native", "-fopenmp-simd", "-pthread", "-shared", "-fPIC"),
    # Its threads outlive the last graph that uses it, and with it what loaded it.
    "-Wl,-z,nodelete",
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)


def compiled(compiler, folder):
    """The kernels' library in a folder, compiled unless it is there; None, with a warning, where that fails."""
    try:
        # -march=native is for this processor, and a home folder may be shared with others.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = [line for line in lines if line.startswith(("flags", "Features"))][:1]
        key = hashlib.sha256("\n".join((SOURCE.read_text(), *FLAGS, *processor)).encode()).hexdigest()[:16]
        library = folder / f"cpu_kernels_{key}.so"
        if ":" in str(library):
            raise OSError(f"MindSpore takes no library from {folder}: there is a colon in it")
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as fresh:
                made = Path(fresh) / library.name
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
                made.replace(library)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
        reason = next((line for line in said if "error" in line), error)
        logger.warning(f"kernels.cc cannot be compiled ({reason}): MindSpore's own kernels take longer")
        return None
    return library


COMPILER = shutil.which("g++")
KERNELS_FILE = COMPILER and compiled(COMPILER, users_folder())


def kernel(name, inputs, outputs=1, matrices=(), kind=DataType.F32_Default):
    """A kernel of so many float32 tensors as an operator, None where there is no library.

    Those inputs whose numbers are in ``matrices`` are of another kind.
    """
    if KERNELS_FILE is None:
        return None
    # The library tells the outputs' shapes: a graph that is compiled while it runs cannot ask Python.
    info = CustomRegOp(name).target("CPU")
    for index in range(inputs):
        info.input(index, f"input{index}")
    for index in range(outputs):
        info.output(index, f"output{index}")
    kinds = [DataType.F32_Default] * (inputs + outputs)
    for index in matrices:
        kinds[index] = kind
    info.dtype_format(*kinds)
    return ops.Custom(f"{KERNELS_FILE}:{name}", func_type="aot", reg_info=info.get_op_info())


def product_kernel(*arguments):
    """A kernel that multiplies matrices, None too where MindSpore brings nothing along to do so with."""
    return kernel(*arguments) if has_products() else None


def has_products():
    """Whether MindSpore brings along the oneDNN that kernels.cc multiplies with; loads it."""
    for library in (Path(ms.__file__).parent / "lib").glob("libdnnl.so.[23]"):
        with suppress(OSError):
            return hasattr(ctypes.CDLL(str(library)), "dnnl_threadpool_interop_sgemm")
    return False


GELU_TANH = kernel("gelu_tanh", 1)
LAYER_NORM = kernel("layer_norm", 2)
GROUP_NORM = kernel("group_norm", 5)
RELATIVE_DIFFERENCE = kernel("relative_difference", 2)
DECISION = kernel("decision", 7, 3, (2,), DataType.I32_Default)
EULER_STEP = kernel("euler_step", 4, 1, (3,), DataType.I32_Default)
SINUSOIDS = kernel("sinusoids", 2)
WEIGHTED_SUM = {order: kernel(f"weighted_sum_{order}", 2 + order) for order in (1, 2, 3)}
FINITE_DIFFERENCES = {order: kernel(f"finite_differences_{order}", 3 + order) for order in (1, 2, 3)}
LINEAR = product_kernel("linear", 3)
LINEAR_BFLOAT16 = product_kernel("linear_bfloat16", 3, 1, (1,), DataType.BF16_Default)
ADA_LAYER_NORM = product_kernel("ada_layer_norm", 5)
TIMESTEP_EMBEDDING = product_kernel("timestep_embedding", 5)

FLOAT32, BFLOAT16, INT8 = range(3)
"""What a block's matrices are of, and where that kernel stands among the block's."""


@ms.jit_class
class BlockKernels:
    """A block's kernels, three each, by what its matrices are of.

    Args:
        name: in kernels.cc.
        streams, outputs: so many inputs before the weights, and outputs.
        weights: a letter for each, "m" for a matrix and "v" for any other.
        weights_int8: the same with int8: there a scale stands behind each matrix, and before all weights whether each
            layer rounds its input, 1 or 0.

    ``whole`` are given the weights behind the streams, ``placed`` a table of where weights lie, made of what ``places``
    give, and the row where their own begin.
    """

    def __init__(self, name, streams, outputs, weights, weights_int8):
        kinds = {
            name: (weights, DataType.F32_Default),
            f"{name}_bfloat16": (weights, DataType.BF16_Default),
            f"{name}_int8": (weights_int8, DataType.I8_Default),
        }
        whole, placed, places = [], [], []
        for each, (letters, kind) in kinds.items():
            matrices = [index for index, letter in enumerate(letters) if letter == "m"]
            behind = [streams + index for index in matrices]
            whole.append(product_kernel(each, streams + len(letters), outputs, behind, kind))
            placed.append(product_kernel(f"{each}_placed", streams + 2, outputs))
            places.append(product_kernel(f"{each}_places", len(letters), 1, matrices, kind))
        self.whole, self.placed, self.places = tuple(whole), tuple(placed), tuple(places)


ATTENDING, FEED_FORWARD = "mvmvmvmvvvmv", "mvmv"
ATTENDING_INT8, FEED_FORWARD_INT8 = "mvvmvvmvvmvvvvmvv", "mvvmvv"

DOUBLE_BLOCK = BlockKernels(
    *("double_block", 6, 6, ATTENDING + FEED_FORWARD + ATTENDING),
    "v" + ATTENDING_INT8 + FEED_FORWARD_INT8 + ATTENDING_INT8,
)
BEHIND_DOUBLE = BlockKernels("behind_double", 7, 1, FEED_FORWARD, "v" + FEED_FORWARD_INT8)
SINGLE_BLOCK = BlockKernels("single_block", 6, 2, "mvmvmvmvvvmvmv", "vmvvmvvmvvmvvvvmvvmvv")
