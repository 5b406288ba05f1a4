"""The Hub: folders by name, and commits that hold the files of one folder and nothing else.

Everything goes through huggingface_hub. A local folder never leads to the network.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from visual_ground.errors import GroundingError, GroundingFileError, GroundingTypeError, GroundingValueError
from visual_ground.storage.hub_names import is_hub_name

CARD_FILE = "README.md"
# With the waits that the Hub asks for, up to 2 minutes each, five attempts outlast its usual rate limits.
ATTEMPTS, LONGEST_WAIT = 5, 120
# Too many requests, busy, and twice "somebody else has committed in the meantime".
RETRIED_STATUSES = (429, 503, 409, 412)


@dataclass(frozen=True)
class HubOptions:
    """Which version of a repository to load, and how.

    Args:
        revision: branch, tag or commit; None: the default branch.
        subfolder: inside the repository or local folder.
        token: of the Hub; None: the one saved by logging in; False: none.
        cache_dir: where downloads are kept; None: huggingface_hub's cache.
        local_files_only: take what is in the cache and never ask the Hub.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> HubOptions:
        """Build options from keyword arguments; raise GroundingTypeError for a name that is no option."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise GroundingTypeError(f"Unknown arguments {unknown}; loading takes {known}.")
        return cls(**options)

    def for_models(self) -> dict[str, Any]:
        """Return the keyword arguments with which transformers loads the models that an adapter names."""
        shared = {"token": self.token, "cache_dir": self.cache_dir, "local_files_only": self.local_files_only or None}
        return {name: value for name, value in shared.items() if value is not None}


def fetch_folder(name: str | os.PathLike[str], files: Sequence[str], options: HubOptions, kind: str = "model") -> Path:
    """Return a local folder as it is, or else a folder with what the Hub has by that name.

    Args:
        name: local folder or Hub id.
        files: patterns of the files to download.
        options: which version, and how.
        kind: "model" or "dataset".

    Raises:
        GroundingFileError: no local folder, and not to be had from the Hub.
    """
    local, subfolder = Path(name), options.subfolder
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        if not is_hub_name(str(name)):
            raise GroundingFileError(f"{str(name)!r} is no local folder, and no name that the Hub could have.")
        prefix = f"{subfolder}/" if subfolder else ""
        with _file_errors(f"{str(name)!r} is no local folder, and the Hub did not give it"):
            patterns = [prefix + file for file in files]
            where = {key: value for key, value in vars(options).items() if key != "subfolder"}
            local = Path(snapshot_download(str(name), repo_type=kind, allow_patterns=patterns, **where))
    return local / subfolder if subfolder else local


def cached_commit(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """Return the commit of a model that was just loaded by name, as the cache has it; None for a local folder."""
    name = name.partition("#")[0]  # What follows names a submodule, see `vision.loading.load_vision`.
    if ":" in name or os.path.exists(name) or not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


@dataclass(frozen=True)
class PushOptions:
    """Where a commit goes, and how.

    Args:
        private: whether a new repository is private; None: the account's default.
        revision: branch, made where it does not exist; None: the default branch.
        token: of the Hub; None: the one saved by logging in.
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


def make_repository(repo_id: str, options: PushOptions, kind: str = "model") -> str:
    """Make a repository where it does not exist; return its full name, with the user's where `repo_id` had none.

    Raises:
        GroundingFileError: the Hub did not take it.
    """
    from huggingface_hub import HfApi

    def make() -> str:
        api = HfApi(token=options.token)
        return str(api.create_repo(repo_id, private=options.private, repo_type=kind, exist_ok=True).repo_id)

    with _file_errors(f"{repo_id!r} cannot be pushed to: the Hub did not take it"):
        return _retry(make)


def push_folder(
    save: Callable[[Path], None], repo_id: str, options: PushOptions, owned: Sequence[str], kind: str = "model"
) -> str:
    """Save into an empty folder, beside the README.md that the repository has, and commit that folder atomically.

    A commit that somebody else overtook, or that came to a busy Hub, is made again on what is there then.

    Args:
        save: writes the files into the folder that it is given, where the repository's README.md may be.
        repo_id: made where it does not exist.
        options: where to, and how.
        owned: patterns of the files that belong to what is saved; those that it no longer has are removed.
        kind: "model" or "dataset".

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        GroundingFileError: the Hub did not take it; the repository is as it was.
    """
    from huggingface_hub import HfApi

    api, revision = HfApi(token=options.token), options.revision

    def push() -> str:
        created = api.create_repo(repo_id, private=options.private, repo_type=kind, exist_ok=True)
        name = str(created.repo_id)  # With the user's name before it, where `repo_id` had none.
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
        return _commit(api, save, name, options, owned, kind)

    with _file_errors(f"Nothing was pushed to {repo_id!r}: the Hub did not take it"):
        return _retry(push)


def _commit(
    api: Any, save: Callable[[Path], None], name: str, options: PushOptions, owned: Sequence[str], kind: str
) -> str:
    """Commit what `save` writes, on the condition that nothing was committed since README.md was read.

    With hf_xet, `HfApi.upload_folder` may split a folder into several commits; `create_commit` makes exactly one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    target = {"repo_type": kind, "revision": options.revision}
    head = api.repo_info(name, **target)
    present = [file.rfilename for file in head.siblings or ()]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        if CARD_FILE in present:
            card = api.hf_hub_download(name, CARD_FILE, repo_type=kind, revision=head.sha, cache_dir=cache)
            Path(folder, CARD_FILE).write_bytes(Path(card).read_bytes())
        save(Path(folder))
        saved = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
        stale = [file for file in present if any(fnmatchcase(file, own) for own in owned) and file not in saved]
        operations: list[Any] = [CommitOperationDelete(file, is_folder=False) for file in stale]
        operations += [CommitOperationAdd(file, os.path.join(folder, file)) for file in saved]
        message = options.commit_message or "Upload with visual_ground"
        condition = {"create_pr": options.create_pr, "parent_commit": head.sha}
        commit = api.create_commit(name, operations, commit_message=message, **condition, **target)
    return str(commit.pr_url or commit.commit_url)


def _retry(act: Callable[[], str]) -> str:
    """Act, and act again after the time that the Hub asks for where its answer is one of `RETRIED_STATUSES`."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except HfHubHTTPError as error:
            if attempt == ATTEMPTS or error.response.status_code not in RETRIED_STATUSES:
                raise
            seconds = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(seconds) if seconds.isdigit() else 2**attempt, LONGEST_WAIT))
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _file_errors(what: str) -> Iterator[None]:
    """Raise whatever goes wrong in the block as a GroundingFileError that begins with `what`."""
    try:
        yield
    except GroundingError:
        raise
    # The HTTP library under huggingface_hub, whose errors these may be, is another one in each of its major versions.
    except Exception as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise GroundingFileError(f"{what}: {error}{cause}") from error
