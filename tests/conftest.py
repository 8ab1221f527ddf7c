import os
import shutil
import tempfile

import pytest
from file_processes import FileProcesses

import mindspore as ms

from FBCache_ms.pipelines.flux import FluxPipeline
from FBCache_ms.runtime.checkpoint import TINY_FLUX
from FBCache_ms.runtime.device import prepare_device


def pytest_addoption(parser):
    """The device, and the options of test_ascend_graph.py and flux_accuracy_test.py."""
    parser.addoption("--device", default="CPU", help="that the tests run on (default: CPU)")
    parser.addoption("--full_depth", action="store_true", help="compile Ascend graphs at full depth, such as 57 blocks")
    group = parser.getgroup("accuracy")
    group.addoption("--ckpt", help="checkpoint that flux_accuracy_test.py draws with (default: the embedded one)")
    group.addoption("--clip", help="folder of the CLIPModel that scores its pictures")
    group.addoption("--prompts", help="file of its prompts")
    group.addoption("--limit", help="how many prompts")
    group.addoption("--accuracy_path", help="folder that keeps its pictures")


def stay_on_one_core(worker):
    """Gives each of xdist's workers a core of its own: on two, their compilers' threads get in each other's way."""
    cores = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cores[int(worker[2:]) % len(cores)]})


def pytest_configure(config):
    """Sets the device before any test file makes a tensor, and a folder for what programs keep in the user's."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        if hasattr(os, "sched_setaffinity"):
            stay_on_one_core(os.environ["PYTEST_XDIST_WORKER"])
        config.pluginmanager.register(FileProcesses())
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="FBCache_ms_tests_")
    config.add_cleanup(lambda: shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True))
    ms.set_device(config.getoption("--device"))
    # To compile encoders and autoencoder takes longer than the loop.
    FluxPipeline.COMPILES_PARTS = False
    config.replaced = replaced() if config.getoption("--device") == "CPU" else {}
    prepare_device()


def replaced():
    """{(owner, name): what fused stand-ins alone take the place of}, None where there is nothing."""
    from FBCache_ms.runtime import cpu

    plain = {(owner, name) for owner, name, _ in cpu.STAND_INS}
    places = [(owner, name) for owner, name, _ in cpu.FUSED_STAND_INS if (owner, name) not in plain]
    return {(owner, name): vars(owner).get(name) for owner, name in places}


@pytest.fixture(autouse=True)
def mode_as_it_was():
    """What a test does to the mode ends with it."""
    mode = ms.get_context("mode")
    yield
    if ms.get_context("mode") != mode:
        ms.set_context(mode=mode)


@pytest.fixture(params=["plain", "fused"])
def installed(request, monkeypatch):
    """Either kind of the stand-ins that there are two of: those without a C++ compiler, and those with one."""
    if request.config.getoption("--device") != "CPU":
        if request.param == "fused":
            pytest.skip("no stand-ins on this device")
        yield
        return
    from FBCache_ms.runtime import cpu
    from FBCache_ms.runtime.cpu import kernels as cpu_kernels

    if request.param == "plain":
        for name in ("KERNELS_FILE", "LINEAR"):
            monkeypatch.setattr(cpu_kernels, name, None)
        for (owner, name), original in request.config.replaced.items():
            delattr(owner, name) if original is None else setattr(owner, name, original)
    elif cpu_kernels.KERNELS_FILE is None:
        pytest.skip("no C++ compiler")
    else:
        assert cpu_kernels.LINEAR is not None
    cpu.install()
    yield
    monkeypatch.undo()
    cpu.install()


@pytest.fixture(scope="session")
def pipe():
    """The embedded checkpoint, with the default cache, every part compiled as users have it."""
    pipe = FluxPipeline.from_pretrained(str(TINY_FLUX))
    pipe.COMPILES_PARTS = True
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def compiled_parts(monkeypatch):
    """Encoders and autoencoders compile, as users have them."""
    monkeypatch.setattr(FluxPipeline, "COMPILES_PARTS", True)


@pytest.fixture
def strict_graph_mode():
    """GRAPH_MODE in which a silent fallback to Python is an error."""
    mode, level = ms.get_context("mode"), ms.get_context("jit_syntax_level")
    ms.set_context(mode=ms.GRAPH_MODE, jit_syntax_level=ms.STRICT)
    yield
    ms.set_context(mode=mode, jit_syntax_level=level)
