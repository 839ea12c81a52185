"""Settings from environment variables. No other module reads the environment."""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tera.config.faults import faults
from tera.config.names import HTTP_PORT
from tera.errors import ConfigError


def set_environment(variables: Mapping[str, str], *, keep_existing: bool = False) -> None:
    """Set variables for this process and its child processes."""
    for name, value in variables.items():
        if not keep_existing or name not in os.environ:
            os.environ[name] = value


class EnvironmentSettings(BaseSettings):
    """Base of settings from the environment: `redis_url` is the variable TERA_REDIS_URL.

    A field not passed to the constructor is read from the environment.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        # The environment and `local.env` hold variables for other programs too.
        extra="ignore",
        case_sensitive=True,
        alias_generator=lambda name: f"TERA_{name.upper()}",
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def from_environment(cls) -> Self:
        """Return the settings of this process.

        Raises:
            ConfigError: one line per fault, each beginning with the name of the variable.
        """
        return cls._read()

    @classmethod
    def _read(cls, **given: Any) -> Self:
        try:
            return cls(**given)
        except ValidationError as error:
            lines = faults(error, show_values=False)  # a value may be a secret
            raise ConfigError("\n".join(lines)) from None


def _port(value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"give a port from 1 to 65535, not {text!r}")
    return int(text)


class ServeOptions(EnvironmentSettings):
    """Where `tera serve` listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, BeforeValidator(_port)] = HTTP_PORT


def _is_sendable(text: str) -> bool:
    """Return whether a text can be sent over HTTP; `http.client`'s own error would repeat it."""
    return text.isascii() and not re.search(r"[\x00-\x20\x7f]", text)


def _address(text: str) -> str:
    address = text.rstrip("/").removesuffix("/v1")
    if address and (not re.match("https?://[^/]", address) or not _is_sendable(address)):
        raise ValueError(f"give an address such as https://llm.example.com, not {address!r}")
    return address


def _key(text: str) -> str:
    key = text.strip()
    if not _is_sendable(key):
        raise ValueError("is not a valid key")
    return key


class ClientOptions(EnvironmentSettings):
    """Which platform a command asks as a client, and with which key."""

    # An empty variable counts as unset: the platform that runs here is used.
    model_config = SettingsConfigDict(env_ignore_empty=True)

    base_url: Annotated[str, AfterValidator(_address)] = ""
    """The platform's address, without /v1."""
    api_key: Annotated[str, AfterValidator(_key)] = Field(default="", repr=False)
    """Empty means none."""

    @classmethod
    def from_environment(cls, base_url: str | None = None) -> Self:
        """Return the options for `base_url`, or else TERA_BASE_URL, with the key TERA_API_KEY.

        Without an address, return those of the platform that runs in TERA_HOME. That
        platform's key is never sent to another address.

        Raises:
            ConfigError: there is no address, or the address or key cannot be sent over HTTP.
        """
        if base_url:
            return cls._read(base_url=base_url)
        options = cls._read()
        if not options.base_url:
            with suppress(OSError):  # a user who may not read the file has no platform here
                options = cls._read(_env_file=Runtime.from_environment().home / "local.env")
        if not options.base_url:
            raise ConfigError("TERA_BASE_URL is not set, and no platform runs here.")
        return options


class Runtime(EnvironmentSettings):
    """The addresses and secrets of a process that belongs to a platform or talks to one.

    On one machine `tera serve` sets these variables; on a cluster they come from Secrets.
    """

    redis_url: str = "redis://127.0.0.1:6379/0"
    key_pepper: str = Field(default="", repr=False)
    """Server-side part of every key's hash; without it a stolen Redis dump is useless."""
    cluster_secret: str = Field(default="", repr=False)
    """Shared by gateway and engine replicas; it authenticates the token channel."""
    channel_host: str = ""
    """Address at which engine replicas reach this process; empty means the node's own."""
    keys_file: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = None
    """File with externally managed API keys (see `KeyEntry`); gateways pick up its changes."""
    home: Annotated[Path, AfterValidator(Path.absolute)] = Path(".tera")
    """State of one machine: models, embedded Redis, logs, secrets."""

    @property
    def on_one_machine(self) -> bool:
        """Whether the whole platform runs on this machine, so that only the API needs a network."""
        return self.channel_host == "127.0.0.1"

    def to_environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads back."""
        values = self.model_dump(by_alias=True)
        return {name: "" if value is None else str(value) for name, value in values.items()}
