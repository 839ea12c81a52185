"""`tera backup` and `tera restore`: keys, tenants and the usage ledger in a file."""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Annotated

import typer
from redis.asyncio import Redis

from tera.cli.console import err, reported
from tera.cli.store import runtime_here, with_redis
from tera.errors import ConfigError
from tera.tenancy import backup as backups
from tera.tenancy.key_store import KeyStore


def backup() -> None:
    """Print all keys (as hashes), tenants and usage records as JSON lines."""
    with reported():
        pepper = runtime_here().key_pepper

        async def write(redis: Redis) -> None:
            async for line in backups.backup(redis, pepper):
                sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()

        with_redis(write)


def restore(
    file: Annotated[Path, typer.Argument(help="What `tera backup` printed; - is standard input.")],
) -> None:
    """Write back what is missing of a backup; what exists stays as it is."""
    with reported(), tempfile.TemporaryFile() as copy:
        # It is read twice, and a pipe can be read once.
        try:
            if str(file) == "-":
                shutil.copyfileobj(sys.stdin.buffer, copy)
            else:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, copy)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error
        _restore(copy)


def _restore(lines: IO[bytes]) -> None:
    pepper = runtime_here().key_pepper
    lines.seek(0)
    backups.check(lines, pepper)
    lines.seek(0)

    async def write(redis: Redis) -> backups.Restored:
        return await backups.restore(redis, KeyStore(redis, pepper, time.time), lines)

    done = with_redis(write)
    err.print(
        f"{done.keys} keys, {done.tenants} tenants and {done.usage_records} usage records restored"
    )
