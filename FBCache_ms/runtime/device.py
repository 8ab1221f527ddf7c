"""The device that Flux runs on, and how its graphs are compiled there: chosen and prepared in this one place."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import mindspore as ms

try:
    from mindspore.graph import api  # where MindSpore 2.10.0 has it
except ImportError:
    from mindspore.common import api

from .compile_cache import CompileCache, graph_key

DEVICES = ("auto", "Ascend", "CPU")
DTYPES = ("auto", "bfloat16", "float16", "float32")
JIT_LEVELS = ("auto", "O0", "O1")


@dataclass(frozen=True)
class Device:
    """Where Flux runs, in which dtype, and how its denoise loop is compiled.

    Args:
        name: "Ascend" or "CPU".
        dtype: "bfloat16", "float16" or "float32".
        jit_level: "O0" launches a graph's operators one by one; "O1" fuses neighbouring ones, which saves launches and
            memory traffic; None is MindSpore's own choice.
        lazy_inline: whether a block is compiled once for all its copies, which takes a fraction of the time and half
            the memory at FLUX.1's 57 blocks; such graphs run on Ascend alone.
        deterministic: whether an NPU gives the same bits at every run, whose fastest kernels sum in any order.
        compile_cache: the folder that keeps compiled graphs for other processes, or None.
    """

    name: str
    dtype: str
    jit_level: Optional[str] = None
    lazy_inline: bool = False
    deterministic: bool = False
    compile_cache: Optional[Path] = None

    @property
    def mindspore_dtype(self):
        """The dtype as MindSpore's."""
        return getattr(ms, self.dtype)

    def prepare(self, cell, transformer):
        """Sets a cell that runs this transformer's blocks up for compilation, before its first call."""
        if self.jit_level is not None:
            cell.set_jit_config(ms.JitConfig(jit_level=self.jit_level))
        if self.lazy_inline:
            for block in map(transformer.cached_model.cell, range(sum(transformer.cached_model.stacks))):
                # What the decorator mindspore.lazy_inline leaves on a cell: equal marks share one graph.
                block.cell_init_args = f"lazy_inline_{type(block).__name__}"

    def compile(self, cell, inputs, model, structure=None):
        """Compiles a cell for these inputs unless it is; returns whether its graph came from the compile cache.

        A model with adapters or with anything in it that is not mindone's own, and a program without a file of its own
        (python -c), compile without the cache, as do a cell's further graphs, for other inputs.

        Args:
            cell: what is compiled.
            inputs: its inputs.
            model: the model that it is, or that it runs the layers of.
            structure: what makes a graph of its own beside the model, the cell's Parameters and the inputs.
        """
        key = None
        if self.compile_cache is not None and not cell.compile_cache:
            key = self._key(cell, inputs, model, structure)
        if key is None:
            cell.compile(*inputs)
            return False
        return CompileCache(self.compile_cache).compile(cell, inputs, key)

    def _key(self, cell, inputs, model, structure):
        """The graph's key, None for one that no key can tell from another."""
        # An adapter's scale is a constant of the graph that no key can see; MindSpore reads the program's file.
        adapters = any(getattr(model, name, None) for name in ("_hf_peft_config_loaded", "encoder_hid_proj"))
        if adapters or not os.path.isfile(api.entry_script_path or ""):
            return None
        try:
            return graph_key(
                cell,
                inputs,
                model,
                structure=structure,
                device=self.name,
                kernels=self._kernels(),
                jit_level=self.jit_level,
                lazy_inline=self.lazy_inline,
                deterministic=self.deterministic,
            )
        except TypeError:
            return None

    def _kernels(self):
        """The file of compiled kernels that a CPU's graphs name, None elsewhere."""
        if self.name != "CPU":
            return None
        from .cpu.kernels import KERNELS_FILE

        return str(KERNELS_FILE)


def current_device():
    """The Device that the process is set to: MindSpore's default, or what ms.set_device chose."""
    name = ms.get_context("device_target")
    return Device(name, default_dtype(name), default_jit_level(name))


def choose_device(
    name="auto", dtype="auto", jit_level="auto", lazy_inline=False, deterministic=False, compile_cache=None
):
    """Sets the process to a device and returns its Device; what is "auto" follows from what is there.

    Under msrun, the environment's DEVICE_ID is the NPU of this rank.

    Raises ValueError for what is unknown, not there, or not possible on that device.
    """
    for option, value, allowed in (
        ("device", name, DEVICES),
        ("dtype", dtype, DTYPES),
        ("jit_level", jit_level, JIT_LEVELS),
    ):
        if value not in allowed:
            raise ValueError(f"--{option} must be one of {', '.join(allowed)}, not {value!r}")
    here = "Ascend" if ms.hal.is_available("Ascend") else "CPU"
    name = here if name == "auto" else name
    if name == "Ascend" and here == "CPU":
        raise ValueError("--device Ascend: there is no Ascend NPU here; only CPU is")
    dtype = default_dtype(name) if dtype == "auto" else dtype
    check_dtype(name, dtype)
    if lazy_inline and name == "CPU":
        raise ValueError("--lazy_inline is not supported on CPU; MindSpore runs such graphs on Ascend alone")
    if compile_cache is not None and os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1":
        raise ValueError(
            "--compile_cache keeps each graph in a folder of its own, MS_COMPILER_CACHE_ENABLE=1 all of a process in "
            "one; unset the variable"
        )
    ms.set_device(name, int(os.environ.get("DEVICE_ID", 0)) if name == "Ascend" else None)
    # MindSpore refuses to be told twice.
    if deterministic and ms.get_context("deterministic") == "OFF":
        ms.set_deterministic(True)
    return Device(
        name,
        dtype,
        default_jit_level(name) if jit_level == "auto" else jit_level,
        lazy_inline,
        deterministic,
        None if compile_cache is None else Path(compile_cache),
    )


def default_dtype(name):
    """bfloat16, in which FLUX.1 is published; float32 on a CPU, which has more than matrices of no other."""
    return "float32" if name == "CPU" else "bfloat16"


def default_jit_level(name):
    """O1; on a CPU None, since it fuses nothing there."""
    return None if name == "CPU" else "O1"


def check_dtype(name, dtype):
    """Raises ValueError for a dtype, by name, that the device cannot run Flux in."""
    if name == "CPU" and dtype == "float16":
        raise ValueError(f"--dtype {dtype} is not supported on CPU; float32 and bfloat16 are")


def prepare_device():
    """Makes the current device able to run Flux: installs the CPU backend's stand-ins, and does nothing elsewhere."""
    if ms.get_context("device_target") == "CPU":
        from .cpu import install

        install()


@contextmanager
def graph_mode(use_graph_mode):
    """GRAPH_MODE or PYNATIVE_MODE for a while."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if use_graph_mode else ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)
