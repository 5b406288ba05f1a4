"""docs/support.md says what the committed results say, and these are of every architecture, with nothing failed."""

import json

from tests.architectures.support import COLUMNS, PAGE, RESULTS, count, dump, render

RESULTS_NOW = json.loads(RESULTS.read_text())


def test_the_page_is_made_of_the_results():
    assert PAGE.read_text() == render(RESULTS_NOW)
    assert RESULTS.read_text() == dump(RESULTS_NOW)


def test_all_language_models_do_what_their_base_does():
    good, all_of_them = count(RESULTS_NOW)
    assert good == all_of_them >= 185
    for found in RESULTS_NOW["architectures"].values():
        assert set(found) in ({"refused"}, set(COLUMNS))
