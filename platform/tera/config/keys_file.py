"""Reads the file of externally managed API keys."""

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
    """Return a YAML date or ISO text as a datetime, in UTC unless it names another zone."""
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
    """One externally managed API key, as an entry of a keys file."""

    tenant: TenantName
    key: str | None = Field(default=None, repr=False)
    """The key itself; the alternative is `keyHash`."""
    key_hash: str | None = Field(default=None, repr=False)
    """The key's HMAC-SHA-256 under the platform's pepper, in hex."""
    models: tuple[str, ...] | None = Field(default=None, strict=False)
    """The model ids that the key may use; absent allows all."""
    expires: Annotated[datetime.datetime, BeforeValidator(_moment)] | None = None
    """When the key expires; absent means never."""
    limits: Limits | None = None
    """Limits of this key, in addition to its tenant's."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.key is None) == (self.key_hash is None):
            raise ValueError("give either key or keyHash")
        return self


_KEYS_FILE: Final = TypeAdapter(list[KeyEntry])


def load_keys_file(path: Path) -> tuple[KeyEntry, ...]:
    """Read a keys file: a list of `KeyEntry` in YAML.

    Raises:
        ConfigError: one line per fault, each with the path of the value but never the value
            itself: it may be a key.
    """
    try:
        values = read_yaml(path)
    except ConfigError as error:
        cause = error.__cause__
        if not isinstance(cause, yaml.MarkedYAMLError) or cause.problem_mark is None:
            raise
        # The parser's own message would quote the line, which may hold a key.
        line = cause.problem_mark.line + 1
        raise ConfigError(f"{path}: invalid YAML in line {line}") from None
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
