"""The Hub: folders by name, and commits that hold the files of one folder and nothing else.

Everything goes through huggingface_hub. Local folders never lead here to the network.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingFileError, GroundingTypeError, GroundingValueError

CARD_FILE = "README.md"
ATTEMPTS, LONGEST_WAIT = 5, 120
BUSY, OVERTAKEN = (429, 503), (409, 412)
# "name" or "owner/name", as the Hub has them; "open_clip:" or "timm:" before it, and "#part" after it, say how.
HUB_NAME = re.compile(r"(?:open_clip:|timm:)?[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?(?:#[\w.]+)?")


@dataclass(frozen=True)
class HubOptions:
    """Which version of a repository is wanted, and how it is got.

    Args:
        revision: branch, tag or commit; the default branch where None.
        subfolder: inside the repository or local folder.
        token: of the Hub; the one that was saved by logging in where None, none at all where False.
        cache_dir: where downloads are kept; huggingface_hub's own place where None.
        local_files_only: take what is in the cache and never ask the Hub.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> HubOptions:
        """Build options from keyword arguments.

        Raises:
            GroundingTypeError: a name that is no option.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise GroundingTypeError(f"Unknown arguments {unknown}; loading knows {known}.")
        return cls(**given)

    def for_models(self) -> dict[str, Any]:
        """Return what transformers' `from_pretrained` should be given for the models that an adapter names."""
        shared = {"token": self.token, "cache_dir": self.cache_dir}
        given = {name: value for name, value in shared.items() if value is not None}
        return {**given, "local_files_only": True} if self.local_files_only else given


def is_hub_name(name: str) -> bool:
    """Say whether a name could be the Hub's, and is no local path.

    Example:
        >>> is_hub_name("me/adapter"), is_hub_name("timm:vit_tiny"), is_hub_name("/home/me/lm"), is_hub_name("../lm")
        (True, True, False, False)
    """
    bare = name.split(":", 1)[-1]
    parts = (bare, *bare.split("/")) if ":" in name else (bare,)
    return HUB_NAME.fullmatch(name) is not None and ".." not in name and not any(map(os.path.exists, parts))


def fetch_folder(name: str | os.PathLike, files: Sequence[str], options: HubOptions, kind: str = "model") -> Path:
    """Return a local folder as it is, or else what the Hub has by that name.

    Args:
        name: local folder or Hub id.
        files: patterns of the files that are wanted; no others are downloaded.
        options: which version, and how.
        kind: "model" or "dataset".

    Raises:
        GroundingFileError: neither a local folder nor to be had from the Hub.
    """
    local, subfolder = Path(name), options.subfolder
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        inside = f"{subfolder}/" if subfolder else ""
        if not is_hub_name(str(name)):
            raise GroundingFileError(f"{str(name)!r} is no local folder, and no name that the Hub could have.")
        with _told(f"{str(name)!r} is no local folder, and the Hub did not give it"):
            local = Path(
                snapshot_download(
                    str(name),
                    repo_type=kind,
                    allow_patterns=[inside + file for file in files],
                    revision=options.revision,
                    token=options.token,
                    cache_dir=options.cache_dir,
                    local_files_only=options.local_files_only,
                )
            )
    return local / subfolder if subfolder else local


def cached_commit(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """Return the commit of a model that was just loaded by name, as the cache knows it; None for a local folder.

    Args:
        name: as it was loaded.
        revision: likewise.
        cache_dir: likewise.
    """
    name = name.partition("#")[0]  # What follows is a part inside the model, see `vision_loading.load_vision`.
    if ":" in name or os.path.exists(name) or not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


@dataclass(frozen=True)
class PushOptions:
    """Where a commit goes, and how.

    Args:
        private: whether a new repository is private; the account's default where None.
        revision: branch, made where it does not exist; the default branch where None.
        token: of the Hub; the one that was saved by logging in where None.
        commit_message: its first line.
        create_pr: open a pull request instead of committing to the branch.
    """

    private: bool | None = None
    revision: str | None = None
    token: str | None = None
    commit_message: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.revision not in (None, "main"):
            raise GroundingValueError(
                f"A pull request goes to the default branch; leave revision={self.revision!r} out, or create_pr."
            )


def push_folder(
    save: Callable[[Path], None], repo_id: str, options: PushOptions, owned: Sequence[str], kind: str = "model"
) -> str:
    """Save into an empty folder, beside the card that the repository has, and commit that, at once or not at all.

    A commit that somebody else overtook, or that came to a busy Hub, is tried again on what is there then.

    Args:
        save: writes the files into the folder that it is given, where the repository's README.md may be.
        repo_id: made where it does not exist.
        options: where to, and how.
        owned: patterns of file names that belong to what is saved: those that it no longer has are removed.
        kind: "model" or "dataset".

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        GroundingFileError: the Hub did not take it; the repository is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.token)
    branch = options.revision if options.revision and not options.revision.startswith("refs/") else None
    with _told(f"Nothing was pushed to {repo_id!r}: the Hub did not take it"):
        made = _patiently(
            lambda: api.create_repo(repo_id, private=options.private, repo_type=kind, exist_ok=True), BUSY
        )
        name = str(made.repo_id)
        if branch is not None:
            _patiently(lambda: api.create_branch(name, branch=branch, repo_type=kind, exist_ok=True), BUSY)
        return _patiently(lambda: _commit(api, save, name, options, owned, kind), BUSY + OVERTAKEN)


def _commit(api: Any, save: Callable, name: str, options: PushOptions, owned: Sequence[str], kind: str) -> str:
    """Commit what `save` writes, on the condition that nothing was committed since its card was read."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    where = {"repo_type": kind, "revision": options.revision}
    head = api.repo_info(name, **where)
    held = [file.rfilename for file in head.siblings or ()]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        if CARD_FILE in held:
            card = api.hf_hub_download(name, CARD_FILE, repo_type=kind, revision=head.sha, cache_dir=cache)
            Path(folder, CARD_FILE).write_bytes(Path(card).read_bytes())
        save(Path(folder))
        saved = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
        stale = [file for file in held if any(fnmatchcase(file, own) for own in owned) and file not in saved]
        operations: list[Any] = [CommitOperationDelete(file, is_folder=False) for file in stale]
        operations += [CommitOperationAdd(file, os.path.join(folder, file)) for file in saved]
        done = api.create_commit(
            name,
            operations,
            commit_message=options.commit_message or "Upload with visual_ground",
            create_pr=options.create_pr,
            parent_commit=head.sha,
            **where,
        )
    return str(done.pr_url or done.commit_url)


def _patiently(act: Callable[[], Any], again: Sequence[int]) -> Any:
    """Act, and act again after the time that the Hub asks for where it answers with one of these statuses."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except HfHubHTTPError as error:
            if attempt == ATTEMPTS or error.response.status_code not in again:
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(asked) if asked.isdigit() else 2**attempt, LONGEST_WAIT))
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except (GroundingFileError, GroundingValueError, GroundingTypeError):
        raise
    # The HTTP library under huggingface_hub, whose errors these may be, is another one in each of its major versions.
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise GroundingFileError(f"{what}: {error}{cause}") from error
