"""Keeps the keys of a keys file in Redis: when the file changes, and when Redis has lost them."""

import asyncio
import logging
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from tera.background import Background
from tera.config.keys_file import load_keys_file
from tera.errors import ConfigError, InternalError
from tera.tenancy.key_store import KeyStore, import_records, records_of
from tera.tenancy.keys import ApiKey

logger = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 5.0
"""A mounted Secret is changed by swapping a link, of which nothing tells on every file system."""


class KeysFile(Background):
    """Imports the keys of a file, and again as long as the block runs.

    Nodes get a new version of a Secret at different times. So a version that is there is imported
    only by a replica that has just found it, or when Redis has lost it: otherwise old and new
    replicas would undo each other's.
    """

    def __init__(self, path: Path, store: KeyStore, interval_s: float = POLL_INTERVAL_S) -> None:
        """`interval_s` is the time between two looks at file and Redis."""
        self._path = path
        self._store = store
        self._interval_s = interval_s
        self._seen = ""
        self._digest = ""
        """Of the last version without a fault."""
        self._records: list[ApiKey] = []
        self._imported = False

    async def __aenter__(self) -> Self:
        """Import the keys and begin to follow the file.

        Raises:
            ConfigError: the file has a fault.
            InternalError: Redis cannot be reached.
        """
        await self._look()
        return await super().__aenter__()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self._look()
            except ConfigError as error:
                logger.error("The keys file's former version stays in force: %s", error.message)
            except InternalError as error:
                # Whoever follows the keys warns of it, once; the next look tries again.
                logger.debug("The keys file is not compared with Redis now: %s", error.message)
            except Exception:
                # The edge of this task: were it to end, no later version would ever be read.
                logger.exception("Following the keys file failed; trying again.")

    async def _look(self) -> None:
        # In a thread: YAML of thousands of keys takes seconds.
        digest = await asyncio.to_thread(_digest_of, self._path)
        if digest != self._seen:
            self._seen = digest  # now, so that a fault is told once
            self._records = await asyncio.to_thread(self._load)
            self._digest, self._imported = digest, False
        if self._imported and await self._store.has_file(self._digest):
            return
        await import_records(self._store, self._records)
        await self._store.note_file(self._digest)
        self._imported = True

    def _load(self) -> list[ApiKey]:
        entries = load_keys_file(self._path)
        try:
            return records_of(self._store, entries)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error.message}") from error


def _digest_of(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"  # what is wrong tells who loads it
