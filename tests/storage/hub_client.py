"""Points the real huggingface_hub client, and so transformers, at a server of `tests.storage.hub_server`."""

import time

import pytest
from huggingface_hub import constants

from tests.storage.hub_server import running


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub, the only one that the client knows, with an empty cache, no Xet, no login, and no real waiting."""
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the first server
        server.waits = []
        monkeypatch.setattr(time, "sleep", server.waits.append)
        yield server
