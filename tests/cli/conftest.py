import pytest


@pytest.fixture(autouse=True)
def state_of_this_machine(tmp_path_factory, monkeypatch):
    """What the commands write down about this machine goes into a folder of the test's own."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder
