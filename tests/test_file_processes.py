"""An xdist worker's test files run in processes that are replaced."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"

CONFTEST = """
import os
from pathlib import Path

import file_processes
import pytest

HERE = Path(__file__).parent


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        file_processes.LARGEST = {largest}
        config.pluginmanager.register(file_processes.FileProcesses())


@pytest.fixture(scope="session")
def session():
    yield
    (HERE / "ended").open("a").write(f"{{os.getpid()}}\\n")


@pytest.fixture(autouse=True)
def process(session, request):
    (HERE / "ran").open("a").write(f"{{request.node.name}} {{os.getpid()}}\\n")
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs two files with one worker, whose processes may have so many bytes; returns pytest's result."""

    def run(largest=0, first="pass"):
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        pytester.makeconftest(CONFTEST.format(largest=largest))
        pytester.makepyfile(
            test_1=f"import os\n\ndef test_a():\n    {first}\n\ndef test_b():\n    pass\n",
            test_2="def test_c():\n    pass\n",
        )
        return pytester.runpytest_subprocess("-n", "1", "--dist", "loadfile")

    return run


def pids(pytester):
    """{test: the process that ran it}, and the processes that tore down, in order."""
    ran = dict(line.split() for line in (pytester.path / "ran").read_text().splitlines())
    return ran, (pytester.path / "ended").read_text().split()


def test_a_process_that_has_grown_takes_no_further_file(run, pytester):
    run().assert_outcomes(passed=3)
    ran, ended = pids(pytester)
    assert ran["test_a"] == ran["test_b"] != ran["test_c"]
    assert ended == [ran["test_b"], ran["test_c"]]


def test_a_small_process_takes_the_next_file(run, pytester):
    run(largest=1e12).assert_outcomes(passed=3)
    ran, ended = pids(pytester)
    assert len(set(ran.values())) == 1 and ended == [ran["test_c"]]


def test_a_crash_fails_its_test_and_the_file_goes_on(run, pytester):
    result = run(first="os._exit(3)")
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(["*the process of this test file ended with status 3*"])


def test_a_failed_test_says_why(run, pytester):
    result = run(first="assert 1 == 2")
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])
