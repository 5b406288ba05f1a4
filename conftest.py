"""What pytest leaves out where an extra is not installed, and what no test leaves behind."""

from importlib.util import find_spec

import hypothesis
import pytest

# The machine may be busy with something else: no test fails for its time.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# These two need gradio, which is not among the packages for developers; `make test-app` tests them.
collect_ignore = [] if find_spec("gradio") else ["visual_ground/app/page.py", "visual_ground/app/web.py"]


@pytest.fixture(autouse=True)
def state_of_this_machine(tmp_path_factory, monkeypatch):
    """What is noted about this machine, such as which indexes were saved here, goes into a folder of the test's own."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder


@pytest.fixture
def another_machine(tmp_path_factory, monkeypatch):
    """Return a function after whose call this is another machine: nothing that was noted before is known."""
    return lambda: monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("another")))
