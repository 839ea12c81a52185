"""What a running platform on one machine leaves for the commands that talk to it."""

import secrets
from pathlib import Path
from typing import Self

from tera.config.environment import Runtime
from tera.config.platform import PlatformConfig
from tera.config.section import Section
from tera.errors import ConfigError, StartError
from tera.local.private_file import write_private
from tera.local.processes import ProcessId


class LocalState(Section):
    """`state.json` in the platform's directory while it runs; only its owner may read it."""

    process: ProcessId
    """Of `tera serve`."""
    base_url: str
    ray_address: str
    status_socket: Path
    """Where `tera serve` tells what it is doing."""
    redis_url: str
    redis_pid: int | None
    """None with a Redis that is not ours."""
    platform: PlatformConfig = PlatformConfig()
    """What it was told to be, at its start or since."""

    @classmethod
    def read(cls, home: Path) -> Self:
        """Return the state of the platform that runs in `home`.

        Raises:
            ConfigError: none does.
        """
        try:
            state = cls.model_validate_json((home / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise _none_runs(home) from error
        if not state.process.is_alive:
            raise _none_runs(home)
        return state

    def write(self, home: Path) -> None:
        """Leave the state for other commands."""
        write_private(home / "state.json", self.model_dump_json())


def _none_runs(home: Path) -> ConfigError:
    return ConfigError(
        f"No platform runs in {home}. Start one with `tera serve`, or name its directory in "
        "TERA_HOME."
    )


class LocalSecrets(Section):
    """What this directory's processes share with each other and with nobody else."""

    key_pepper: str
    cluster_secret: str
    ray_token: str
    """Ray's own token authentication: without it, who reaches a port runs code."""

    @classmethod
    def of(cls, home: Path) -> Self:
        """Return the directory's secrets, made at the first start.

        They outlive a restart because the hashes of the keys in Redis depend on the pepper.

        Raises:
            StartError: the file is there and cannot be read.
        """
        path = home / "secrets.json"
        if not path.exists():
            fresh = cls(**{name: secrets.token_hex(32) for name in cls.model_fields})
            write_private(path, fresh.model_dump_json())
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError):
            # Neither the file nor the parser's words about it are for anybody's eyes.
            raise StartError(
                f"{path} cannot be read. Remove it to begin anew; keys made so far end with it."
            ) from None

    def runtime(self, redis_url: str, home: Path) -> Runtime:
        """Return what a process of this platform learns from its environment."""
        return Runtime(
            redis_url=redis_url,
            home=home,
            channel_host="127.0.0.1",
            keys_file=None,
            key_pepper=self.key_pepper,
            cluster_secret=self.cluster_secret,
        )

    def ray_environment(self) -> dict[str, str]:
        """Return what makes Ray ask for the token, and show it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.ray_token}


def runtime_of(home: Path) -> Runtime:
    """Return the addresses and secrets of the platform that runs in `home`.

    Raises:
        ConfigError: none does.
    """
    state = LocalState.read(home)
    return LocalSecrets.of(home).runtime(state.redis_url, home)
