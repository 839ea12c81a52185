"""API keys that are made elsewhere, in a file."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Self

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from tera.config.faults import faults
from tera.config.limits import Limits
from tera.config.names import TenantName
from tera.config.section import Section
from tera.config.yaml_file import read_yaml
from tera.errors import ConfigError


def _moment(value: Any) -> Any:
    """Return YAML's dates and ISO texts as a moment, in UTC unless they say otherwise."""
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError("give a date such as 2027-01-31 or 2027-01-31T12:00:00Z") from error
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if isinstance(value, datetime.datetime) and value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)
    return value


class KeyEntry(Section):
    """One API key that is made elsewhere, in a keys file."""

    tenant: TenantName
    key: str | None = Field(default=None, repr=False)
    """The key itself; or else `keyHash`."""
    key_hash: str | None = Field(default=None, repr=False)
    """Its HMAC-SHA-256 under the platform's pepper, in hex."""
    models: tuple[str, ...] | None = Field(default=None, strict=False)
    """The ids that clients may send as `model`; absent allows all."""
    expires: Annotated[datetime.datetime, BeforeValidator(_moment)] | None = None
    """The moment from which it is refused; absent never."""
    limits: Limits | None = None
    """Of this key alone, beside its tenant's."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.key_hash is None):
            raise ValueError("give one of key and keyHash")
        return self


_KEYS_FILE: Final = TypeAdapter(list[KeyEntry])


def load_keys_file(path: Path) -> tuple[KeyEntry, ...]:
    """Read a keys file: a list of `KeyEntry` in YAML.

    Raises:
        ConfigError: one line for each fault, each with the path of the value, and never with a
            value: it may be a key.
    """
    try:
        values = read_yaml(path)
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, yaml.MarkedYAMLError) or cause.problem_mark is None:
            raise
        # The parser's own words quote the line.
        line = cause.problem_mark.line + 1
        raise ConfigError(f"{path}: no valid YAML in line {line}") from None
    try:
        entries = _KEYS_FILE.validate_python(
            [] if values is None else values, by_alias=True, by_name=False
        )
    except ValidationError as error:
        lines = faults(error, show_values=False)
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None
    first: dict[str | None, int] = {}
    for position, entry in enumerate(entries):
        known = first.setdefault(entry.key or entry.key_hash, position)
        if known != position:
            raise ConfigError(f"{path}: {position}: the same key as {known}")
    return tuple(entries)
