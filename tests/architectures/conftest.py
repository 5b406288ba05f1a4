"""Gathers what the walk finds; a walk over all architectures writes docs/support.json and docs/support.md."""

import sys

from tests.architectures.builder import ARCHITECTURES
from tests.architectures.support import PAGE, RESULTS, count, dump, render, versions

found: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    if report.when == "call":
        found.update(value for name, value in report.user_properties if name == "support")


def pytest_terminal_summary(terminalreporter, config):
    if not found or hasattr(config, "workerinput"):
        return
    results = {"versions": versions(), "architectures": dict(sorted(found.items()))}
    good, all_of_them = count(results)
    terminalreporter.write_line(f"{good} of {all_of_them} language models do what their base does", bold=True)
    if set(found) == set(ARCHITECTURES) and sys.platform == "linux":
        RESULTS.write_text(dump(results))
        PAGE.write_text(render(results))
