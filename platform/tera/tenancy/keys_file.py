"""Imports a keys file into Redis, whenever the file changes or Redis has lost the keys."""

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
"""Polling interval: a mounted Secret changes by swapping a link, which not every file system
reports."""
FIRST_INTERVAL_S: Final = 0.5
"""Polling interval until the keys are in Redis for the first time: nobody is served before."""


class KeysFile(Background):
    """Imports the keys of a file, repeatedly while the block runs.

    Nodes get a new version of a Secret at different times. So a version is imported only by a
    replica that has just found it, or when Redis has lost it: otherwise replicas with the old and
    the new version would undo each other's imports.
    """

    def __init__(self, path: Path, store: KeyStore, interval_s: float = POLL_INTERVAL_S) -> None:
        """`interval_s` is how often file and Redis are checked."""
        self._path = path
        self._store = store
        self._interval_s = interval_s
        self._seen = ""
        self._digest = ""
        """Digest of the last valid version."""
        self._records: list[ApiKey] = []
        self._imported = False
        self.ready = False
        """The keys have been in Redis; from then on they are whatever becomes of either."""

    async def __aenter__(self) -> Self:
        """Import the keys and start following the file.

        Without Redis it goes on too, and imports them as soon as it can: a gateway that failed here
        would be given up by Serve after the third time, however soon Redis comes.

        Raises:
            ConfigError: the file is invalid.
        """
        try:
            await self._look()
        except InternalError as error:
            logger.warning("The keys file is not imported yet: %s", error.message)
        return await super().__aenter__()

    async def _run(self) -> None:
        while True:
            first_s = min(FIRST_INTERVAL_S, self._interval_s)
            await asyncio.sleep(self._interval_s if self.ready else first_s)
            try:
                await self._look()
            except ConfigError as error:
                logger.error("The keys file's former version stays in force: %s", error.message)
            except InternalError as error:
                # The key snapshot warns of it, once; the next check tries again.
                logger.debug("The keys file is not compared with Redis now: %s", error.message)
            except Exception:
                # The edge of this task: if it ended, no later version would ever be read.
                logger.exception("Following the keys file failed; trying again.")

    async def _look(self) -> None:
        # In a thread: YAML of thousands of keys takes seconds.
        digest = await asyncio.to_thread(_digest_of, self._path)
        if digest != self._seen:
            self._seen = digest  # set first, so that a fault is logged only once
            self._records = await asyncio.to_thread(self._load)
            self._digest, self._imported = digest, False
        noted = await self._store.has_file(self._digest)
        if self._imported and noted:
            return
        await import_records(self._store, self._records)
        if not noted:  # a full Redis would refuse to be told again
            await self._store.note_file(self._digest)
        self._imported = self.ready = True

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
        return "unreadable"  # loading it will say what is wrong
