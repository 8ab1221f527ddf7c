"""Runs the test files of an xdist worker in processes of its own, each replaced once it has grown.

MindSpore 2.7.0 never gives back what a compiled graph was made from: some 60 MB for each loop of the embedded
checkpoint.
"""

import os
from multiprocessing import Pipe

import psutil
import pytest
from _pytest.runner import runtestprotocol

LARGEST = 2e9
"""A process that has more bytes when it has finished a file takes no other one."""


class FileProcesses:
    """The plugin: forks before the first test of a file, and hands tests to the fork one by one.

    The worker itself runs none, so that there are no threads of MindSpore's in what is forked.
    """

    def __init__(self):
        self.pid = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if self.pid is None:
            self._start(item.session)
        hook, places = item.ihook, item.session.items
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item, places.index(item), nextitem and places.index(nextitem)):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        ends_file = nextitem is None or nextitem.path != item.path
        if self.pid is not None and ends_file and psutil.Process(self.pid).memory_info().rss > LARGEST:
            self._end()
        return True

    def pytest_sessionfinish(self):
        if self.pid is not None:
            self._end()

    def _start(self, session):
        self.connection, childs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            serve(session, childs)
        childs.close()

    def _run(self, item, *places):
        """The reports of a test that the child runs, or that it crashed."""
        hook, config = item.config.hook, item.config
        try:
            self.connection.send(places)
            return [hook.pytest_report_from_serializable(config=config, data=data) for data in self.connection.recv()]
        except (EOFError, OSError):
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = None
            why = f"the process of this test file ended with status {status}"
            return [pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")]

    def _end(self):
        """Lets the child tear down what is left, and end."""
        self.connection.close()
        os.waitpid(self.pid, 0)
        self.pid = None


def serve(session, connection):
    """Runs tests as they are asked for, and ends this process."""
    items, config = session.items, session.config
    try:
        while True:
            place, following = connection.recv()
            reports = runtestprotocol(items[place], log=False, nextitem=None if following is None else items[following])
            connection.send([config.hook.pytest_report_to_serializable(config=config, report=each) for each in reports])
    except EOFError:
        session._setupstate.teardown_exact(None)
        os._exit(0)
    finally:
        os._exit(1)
