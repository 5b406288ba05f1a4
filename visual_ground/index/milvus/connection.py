"""A connection to Milvus that is made again where it was lost."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from visual_ground.errors import GroundingStateError, GroundingValueError, needing

logger = logging.getLogger(__name__)

COLLECTION = "images"  # Where none is named.
LITE_SUFFIX = ".db"  # By which pymilvus knows a file of Milvus Lite from the address of a server.
LONGEST_PAUSE = 5.0
# What gRPC calls a server that is not there, or does not answer in time.
AWAY = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"})
PASSWORD = re.compile(r"//[^/@]*@")


@dataclass(frozen=True)
class MilvusServer:
    """Where Milvus is, and how patient one is with it.

    Args:
        uri: a file of Milvus Lite, `images.db`, or the address of a server or cluster, `http://localhost:19530`.
        token: `user:password` or an API key, where the server asks for one.
        database: of the server; its default where empty.
        timeout: seconds that a call may take before it is tried again.
        tries: how often a call is tried while Milvus is away.
        pause: seconds before the second try; doubled before each further one.

    Raises:
        GroundingValueError: a path that does not end in .db, or numbers out of range.
    """

    uri: str | os.PathLike[str]
    token: str = field(default="", repr=False)
    database: str = ""
    timeout: float = 30.0
    tries: int = 5
    pause: float = 0.25

    def __post_init__(self) -> None:
        uri = os.fspath(self.uri)
        object.__setattr__(self, "uri", uri)
        if "://" not in uri and not uri.endswith(LITE_SUFFIX):
            raise GroundingValueError(
                f"uri must be a file that ends in {LITE_SUFFIX}, for Milvus Lite, or an address such as "
                f"http://localhost:19530, got {uri!r}."
            )
        if not self.timeout > 0 or self.tries < 1 or not self.pause >= 0:
            raise GroundingValueError(
                f"timeout must be more than 0, tries at least 1 and pause at least 0, got {self.timeout}, "
                f"{self.tries} and {self.pause}."
            )

    def __str__(self) -> str:
        return PASSWORD.sub("//", str(self.uri))


Place: TypeAlias = str | os.PathLike[str] | MilvusServer


def server_at(place: Place) -> MilvusServer:
    """Return the server that a file or address names."""
    return place if isinstance(place, MilvusServer) else MilvusServer(place)


def named_place(name: str) -> tuple[MilvusServer, str] | None:
    """Return the server and the collection of a name such as `images.db` or `http://localhost:19530#photos`.

    The token is in the environment variable MILVUS_TOKEN, because a command line is there for all to see. None where
    the name is of something else, such as a folder or a repository of the Hub.
    """
    place, _, collection = name.partition("#")
    if "://" not in place and not place.endswith(LITE_SUFFIX):
        return None
    return MilvusServer(place, os.environ.get("MILVUS_TOKEN", "")), collection or COLLECTION


def lite_file(path: str | os.PathLike[str]) -> str:
    """Return the name of a file of Milvus Lite; its ending is added where it is not there."""
    name = os.fspath(path)
    return name if name.endswith(LITE_SUFFIX) else name + LITE_SUFFIX


class Connection:
    """Calls of a Milvus server, each tried again where the server was away.

    Raises:
        GroundingStateError: pymilvus is not installed, or Milvus cannot be reached.
    """

    def __init__(self, server: MilvusServer) -> None:
        self.server = server
        self._client: Any = None
        self.call(lambda client: client.list_collections(timeout=server.timeout))

    def call(self, use: Callable[[Any], Any], again: Callable[[Any], Any] | None = None) -> Any:
        """Return what a function of the client returns; it is called again, on a new connection, where one is lost.

        Args:
            use: what to do. It must do no harm twice, unless there is `again`.
            again: what to do from the second time on; a call that was lost may have been carried out.
        """
        for number in range(self.server.tries):
            if number:
                pause = min(self.server.pause * 2 ** (number - 1), LONGEST_PAUSE)
                logger.info("Milvus at %s is away; trying again in %.2f s.", self.server, pause)
                time.sleep(pause)
            try:
                return (use if not number or again is None else again)(self._connected())
            except Exception as error:
                if not _is_milvus(error):
                    raise
                if not _is_away(error):
                    raise GroundingStateError(f"Milvus at {self.server} refused: {_reason(error)}") from error
                self.close()
                last = error
        raise GroundingStateError(
            f"Milvus at {self.server} cannot be reached: {_reason(last)}. It was tried {self.server.tries} times; "
            "check that it runs and that the address is right."
        ) from last

    def close(self) -> None:
        """Give the connection back; the next call makes another."""
        client, self._client = self._client, None
        if client is not None:
            try:
                client.close()
            except Exception as error:  # It is gone already.
                logger.debug("Closing the connection to Milvus: %s", error)

    def _connected(self) -> Any:
        if self._client is None:
            module = load_pymilvus()
            uri = str(self.server.uri)
            if "://" not in uri:
                Path(uri).parent.mkdir(parents=True, exist_ok=True)
            self._client = module.MilvusClient(
                uri, token=self.server.token, db_name=self.server.database, timeout=self.server.timeout
            )
        return self._client


def load_pymilvus() -> Any:
    """Return the module `pymilvus`, or say what to install."""
    with needing('This index needs pymilvus, which is not installed: pip install "visual-ground[milvus]".'):
        import pymilvus
    # pymilvus logs the traceback of every call that fails, besides raising it; here, the error says it all.
    for name in ("pymilvus.decorators", "milvus_lite.adapter.grpc.servicer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return pymilvus


def _is_milvus(error: Exception) -> bool:
    import grpc

    return isinstance(error, (load_pymilvus().MilvusException, grpc.RpcError, OSError, _closed(error)))


def _closed(error: Exception) -> type[Exception]:
    # What gRPC raises on a channel that another thread has just closed.
    return ValueError if "closed channel" in str(error) else OSError


def _is_away(error: Exception) -> bool:
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    if getattr(code, "name", None) in AWAY or "closed channel" in str(error):
        return True
    text = str(error)
    return "Retry timeout" in text or "Fail connecting" in text or "server unavailable" in text


def _reason(error: Exception) -> str:
    text = str(getattr(error, "message", None) or getattr(error, "details", None) or error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
