"""Gathers what the walk finds, and writes docs/support.json and docs/support.md of it.

Results of earlier runs with the same versions are kept where this run has none, so one architecture can be run again.
"""

import json

from tests.architectures.builder import ARCHITECTURES
from tests.architectures.support import PAGE, RESULTS, count, dump, render, versions

found: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    if report.when == "call":
        found.update(value for name, value in report.user_properties if name == "support")


def pytest_terminal_summary(terminalreporter, config):
    if not found or hasattr(config, "workerinput"):
        return
    good, all_of_them = count({"architectures": found})
    terminalreporter.write_line(f"{good} of {all_of_them} language models do what their base does", bold=True)
    if config.option.markexpr == "not architectures":  # the default run's spread writes nothing
        return
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": None}
    kept = before["architectures"] if before["versions"] == versions() else {}
    merged = {m: found.get(m) or kept[m] for m in ARCHITECTURES if m in found or m in kept}
    if len(merged) == len(ARCHITECTURES):
        results = {"versions": versions(), "of_one_run": found.keys() == merged.keys(), "architectures": merged}
        RESULTS.write_text(dump(results))
        PAGE.write_text(render(results))
