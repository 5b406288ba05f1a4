"""Adapters by name: where their files are, and the card that goes with them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError
from visual_ground.saving import CONFIG_FILE, WEIGHTS_FILE

CARD = """---
library_name: visual_ground
{base}pipeline_tag: image-text-to-text
tags:
- visual_ground
- fromage
- image-retrieval
---

# A visual_ground adapter

This adapter lets the frozen language model `{lm}` read images through the frozen vision encoder `{vision}`, and
answer with text and retrieved images. It holds {count:,} parameters; neither model's weights are in it, or changed.

```python
from visual_ground import GroundedModel

model = GroundedModel.from_pretrained("{lm}", "THIS_REPOSITORY")
print(model.generate([[image, "What is this?"]])[0])
```
"""


def fetch_adapter(name: str | os.PathLike, subfolder: str | None = None, **hub_options: Any) -> Path:
    """Return the folder of an adapter: a local one as it is, or else what the Hub has by that name.

    Args:
        name: local folder or Hub id.
        subfolder: inside the folder or repository.
        hub_options: revision, token, cache_dir, local_files_only, for `huggingface_hub.snapshot_download`.

    Raises:
        GroundingFileError: neither a local folder nor to be had from the Hub.
    """
    local = Path(name)
    if not local.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        inside = f"{subfolder}/" if subfolder else ""
        try:
            patterns = [inside + file for file in (CONFIG_FILE, WEIGHTS_FILE)]
            local = Path(snapshot_download(str(name), allow_patterns=patterns, **hub_options))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise GroundingFileError(
                f"{str(name)!r} is no local adapter folder, and the Hub did not give it: {error}"
            ) from error
    return local / subfolder if subfolder else local


def push_folder(save: Callable[[Path], None], repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Save into a temporary folder and upload that as one commit; nothing else is uploaded.

    Args:
        save: writes the files into the folder that it is given.
        repo_id: Hub repository, made where it does not exist.
        private: whether a new repository is private.
        options: token, revision, commit_message, create_pr, for `HfApi.upload_folder`.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def render_card(values: Mapping[str, Any], count: int) -> str:
    """Return the text of an adapter's README.md.

    Args:
        values: what its `adapter_config.json` says.
        count: trained parameters.
    """
    lm = values["base_model_name_or_path"] or "the language model it was trained on"
    base = f"base_model: {lm}\n" if values["base_model_name_or_path"] else ""
    vision = values["vision_encoder"] or "the vision encoder it was trained on"
    return CARD.format(base=base, lm=lm, vision=vision, count=count)
