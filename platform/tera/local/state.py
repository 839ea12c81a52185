"""What a running platform on one machine writes down for the commands that talk to it."""

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
    """The process of `tera serve`."""
    base_url: str
    ray_address: str
    status_socket: Path
    """Socket over which `tera serve` reports the platform's status."""
    redis_url: str
    redis_pid: int | None
    """None for an external Redis."""
    platform: PlatformConfig = PlatformConfig()
    """The values in force, from its start or the last `tera apply`."""

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
        """Write the state for other commands."""
        write_private(home / "state.json", self.model_dump_json())


def _none_runs(home: Path) -> ConfigError:
    return ConfigError(
        f"No platform runs in {home}. Start one with `tera serve`, or name its directory in "
        "TERA_HOME."
    )


class LocalSecrets(Section):
    """Secrets that the processes of this directory share."""

    key_pepper: str
    cluster_secret: str
    ray_token: str
    """For Ray's token authentication: without it, anyone who can connect to a port can run code."""

    @classmethod
    def of(cls, home: Path) -> Self:
        """Return the directory's secrets, created at the first start.

        They outlive a restart because the hashes of the keys in Redis depend on the pepper.

        Raises:
            StartError: the file exists but cannot be read.
        """
        path = home / "secrets.json"
        if not path.exists():
            fresh = cls(**{name: secrets.token_hex(32) for name in cls.model_fields})
            write_private(path, fresh.model_dump_json())
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValueError):
            # Neither the file nor the parser's error, which may quote it, may be shown.
            raise StartError(
                f"{path} cannot be read. Remove it to start afresh; "
                "API keys made so far will stop working."
            ) from None

    def runtime(self, redis_url: str, home: Path) -> Runtime:
        """Return the runtime settings of this platform's processes."""
        return Runtime(
            redis_url=redis_url,
            home=home,
            channel_host="127.0.0.1",
            keys_file=None,
            key_pepper=self.key_pepper,
            cluster_secret=self.cluster_secret,
        )

    def ray_environment(self) -> dict[str, str]:
        """Return variables that make Ray require the token, and present it."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.ray_token}


def runtime_of(home: Path) -> Runtime:
    """Return the addresses and secrets of the platform that runs in `home`.

    Raises:
        ConfigError: none does.
    """
    state = LocalState.read(home)
    return LocalSecrets.of(home).runtime(state.redis_url, home)
