"""Says what is installed to run on an Ascend NPU or a CPU, held against what is supported, and what to do about it."""

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from FBCache_ms.eval.shared.arguments import Parser, exit_status
from FBCache_ms.eval.shared.tables import markdown, show

ASCEND = Path("/usr/local/Ascend")
"""Where Ascend's driver, firmware and, unless its environment says otherwise, CANN lie."""

DEVICES = Path("/dev")

CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""What CANN's set_env.sh sets to its folder."""

PUBLISHED = {
    "2.7.0": ("8.2.RC1", "25.2.0"),
    "2.7.1": ("8.3.RC1", "25.3.RC1"),
    "2.7.2": ("8.5.0", "25.5.0"),
    "2.9.0": ("9.0.0", "26.0.RC1"),
}
"""{MindSpore's version: (CANN's, the driver's) that it is published with}: MindSpore Transformers 1.9.0, Installation
Guidelines, which lists neither 2.8.0 nor 2.10.0."""


@dataclass(frozen=True)
class Part:
    """A piece of software or hardware.

    Args:
        name: what it is.
        found: its version, or "none".
        wanted: what is supported, "-" where anything is.
        advice: what is wrong with it, or doubtful, and what to do; empty where nothing is.
        wrong: whether that keeps Flux from running, as far as one can know.
    """

    name: str
    found: str
    wanted: str = "-"
    advice: str = ""
    wrong: bool = False


def is_ascend_machine():
    """Whether anything here, working or not, belongs to an Ascend NPU: a device, a driver or CANN."""
    folders = (ASCEND / "driver", _cann()[0])
    return any(DEVICES.glob("davinci[0-9]*")) or any(folder is not None and folder.is_dir() for folder in folders)


def python_parts():
    """Python and the packages that FBCache_ms asks for, a Part each."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    wanted = metadata("FBCache_ms")["Requires-Python"]
    parts = [_package("Python", platform.python_version(), SpecifierSet(wanted), "run with such a Python")]
    for requirement in map(Requirement, requires("FBCache_ms")):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        parts.append(_package(requirement.name, found, requirement.specifier, f'pip install "{requirement}"'))
    return parts


def _package(name, found, specifier, cure):
    wrong = found == "none" or not specifier.contains(found, prereleases=True)
    return Part(name, found, str(specifier) or "-", f"{found} is not supported: {cure}" if wrong else "", wrong)


def ascend_parts():
    """Driver, firmware, CANN and the NPUs that MindSpore sees, a Part each."""
    import mindspore as ms

    published = PUBLISHED.get(ms.__version__)
    return [_driver(published), _firmware(), _cann_part(ms.__version__, published), _npus(ms)]


def _driver(published):
    path = ASCEND / "driver" / "version.info"
    found = _field(path, "version")
    suggestion = f" {published[1]}" if published else ""
    if found is None:
        advice = f"{path} is not there: install the driver{suggestion}, or mount {path.parent} into this container"
        return Part("driver", "none", "any", advice, True)
    if published and _older(found, published[1]):
        return Part("driver", found, "any", f"older than the published{suggestion}: update it if a check fails")
    return Part("driver", found, "any")


def _firmware():
    return Part("firmware", _field(ASCEND / "firmware" / "version.info", "version") or "not told")


def _cann_part(mindspore, published):
    folder, is_set = _cann()
    suggestion = f" {published[0]}" if published else ""
    if folder is None or not folder.is_dir():
        return Part(
            "CANN", "none", advice=f"it is not there: install CANN{suggestion} and run its set_env.sh", wrong=True
        )
    infos = sorted(folder.glob("*-linux/ascend_toolkit_install.info"))
    toolkit = _field(infos[0], "version") if infos else None
    compiler = _field(folder / "compiler" / "version.info", "version")
    name = toolkit or "of unknown version"
    supported = mindspores_list()
    if not is_set:
        advice = f"its environment is not set: run . {folder.parent / 'set_env.sh'}"
        return Part("CANN", name, advice=advice, wrong=True)
    if compiler is None or supported is None:
        return Part("CANN", name, advice=f"nothing in {folder} tells whether MindSpore {mindspore} works with it")
    found, wanted = f"{name} (compiler {compiler})", f"compiler {', '.join(supported)}"
    if ".".join(compiler.split(".")[:2]) not in supported:
        advice = f"MindSpore {mindspore} does not work with it: install CANN{suggestion or ' of a version that does'}"
        return Part("CANN", found, wanted, advice, True)
    return Part("CANN", found, wanted)


def mindspores_list():
    """The versions of CANN's compiler/version.info that the installed MindSpore names as its own, or None."""
    try:
        from mindspore.run_check._check_version import AscendEnvChecker

        return AscendEnvChecker(None).version
    except (AttributeError, ImportError):
        return None


def _cann():
    """CANN's folder, or None, and whether the environment says so."""
    for name in CANN_VARIABLES:
        if os.environ.get(name):
            return Path(os.environ[name]), True
    folders = (ASCEND / "ascend-toolkit" / "latest", ASCEND / "cann")
    return next((folder for folder in folders if folder.is_dir()), None), False


def _npus(ms):
    nodes = len(list(DEVICES.glob("davinci[0-9]*")))
    if not ms.hal.is_available("Ascend"):
        advice = (
            f"MindSpore sees none, though {DEVICES} has {nodes}: mend what is wrong above, then see npu-smi info"
            if nodes
            else f"{DEVICES} has no davinci0: load the driver, or give this container the device"
        )
        return Part("NPU", "none", "Ascend910B", advice, True)
    name = f"{ms.hal.device_count('Ascend')} x {ms.hal.get_device_name(0, 'Ascend')}"
    other = "" if "910B" in name else "the Atlas 800T A2 has Ascend910B; nobody has tried another"
    return Part("NPU", name, "Ascend910B", other)


def _field(path, name):
    """The value of a line NAME=VALUE of a file, whatever the case of the name; None if there is none."""
    try:
        lines = [line.partition("=") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return None
    return next((value.strip() for key, _, value in lines if key.strip().lower() == name), None)


def _older(found, published):
    from packaging.version import InvalidVersion, Version

    try:
        return Version(found) < Version(published)
    except InvalidVersion:
        return False


def table_of(parts):
    """The Parts as a Markdown table."""
    return markdown(
        [
            {"Part": part.name, "Found": part.found, "Supported": part.wanted, "Verdict": part.advice or "ok"}
            for part in parts
        ]
    )


def main(argv=None):
    """The program; returns its exit status: 1 if a part is wrong."""
    Parser(__name__, "doctor", description=__doc__).parse_args(argv)
    parts = []

    def work():
        try:
            parts.extend(python_parts())
        except PackageNotFoundError:
            raise ValueError("FBCache_ms is not installed: pip install it, or -e and its folder") from None
        ascend = is_ascend_machine()
        if ascend and find_spec("mindspore"):
            parts.extend(ascend_parts())
        show(table_of(parts))
        if not ascend:
            print("\nNo Ascend NPU, driver or CANN is here: FBCache_ms runs on the CPU.")

    return exit_status("doctor", work) or int(any(part.wrong for part in parts))


if __name__ == "__main__":
    sys.exit(main())
