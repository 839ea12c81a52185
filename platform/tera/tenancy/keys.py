"""API keys: their format, and the record of each.

`key_store.py` writes them, `snapshot.py` follows, both with tenants (`tenants.py`). In Redis:

    tera:keys            hash     key id → JSON record, without the key itself
    tera:keys:version    counter  incremented by every change of a key or tenant
    tera:keys:changed    channel  notified of every change, in the form of `Change`
    tera:keys:last_used  hash     key id → seconds; apart, so that use never rewrites a record
    tera:keys:revoked    hash     key id → seconds; what an import must not restore
    tera:keys:files      set      digests of imported keys files
    tera:tenants         hash     tenant → JSON of its limits, in the form of the values file

Each change is one script: record, version and message change together or not at all.
"""

import hmac
import logging
import re
import secrets
import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from typing import Any, Final

import msgspec

from tera.config.limits import Limits
from tera.config.names import is_tenant_name
from tera.errors import ConfigError

logger = logging.getLogger(__name__)

KEYS: Final = "tera:keys"
VERSION: Final = "tera:keys:version"
CHANGED: Final = "tera:keys:changed"
LAST_USED: Final = "tera:keys:last_used"
REVOKED: Final = "tera:keys:revoked"
FILES: Final = "tera:keys:files"
TENANTS: Final = "tera:tenants"

PREFIX: Final = "sk-tera-"
KEY_PATTERN: Final = r"sk-tera-[0-9A-Za-z]{42}"
"""For secret scanners; the last 6 characters are a checksum of all before them."""

_ALPHABET: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_CHARS: Final = 36
"""214 bits; the 4 random characters and the checksum part that the hint shows leave 166."""
_CHECKSUM_CHARS: Final = 6
"""62**6 exceeds 2**32, so every CRC-32 fits."""

_WELL_FORMED = re.compile(KEY_PATTERN)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The record of one key, without the key itself. Times are Unix seconds."""

    key_id: str
    tenant: str
    key_hash: str = field(repr=False)
    hint: str
    """The first 12 and last 4 characters; empty for a key that came as a hash."""
    models: tuple[str, ...] | None
    """The model ids that the key may use; None allows all."""
    created_s: float
    expires_s: float | None = None
    last_used_s: float | None = None
    """Accurate to about a minute; only `KeyStore` fills it in."""
    limits: Limits | None = None
    """Limits of this key, in addition to its tenant's; None means none."""
    replaced_by: str | None = None
    """Id of the key that replaced this one, which will expire."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A new key; this is the only time that it can be shown."""

    key: str = field(repr=False)
    record: ApiKey


def generate_key() -> str:
    """Return a new random key in the form of `KEY_PATTERN`, with its checksum."""
    # Letters and digits only, so that a double click selects all of a key.
    body = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARS))
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Return whether `key` is well formed; a typo or two swapped characters are detected.

    CRC-32 finds every error burst of up to 32 bits (Koopman, DSN 2002), four characters.
    """
    return (
        _WELL_FORMED.fullmatch(key) is not None
        and _checksum(key[:-_CHECKSUM_CHARS]) == key[-_CHECKSUM_CHARS:]
    )


def hash_key(key: str, pepper: str) -> str:
    """Return the HMAC-SHA-256 of `key` under `pepper`, in hex: the form that Redis holds.

    A slow password hash would add nothing: the key has more random bits than anyone can try.
    """
    return hmac.digest(pepper.encode(), key.encode(), "sha256").hex()


def hint_of(key: str) -> str:
    """Return the part of a key that may be shown, by which its owner recognises it."""
    return f"{key[:12]}…{key[-4:]}"


def id_of(key_hash: str) -> str:
    """Return the id derived from a hash, so that importing a key twice finds the first."""
    return "key_" + sha256(b"tera key id:" + key_hash.encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Change:
    """What changed with one version: `41 key:key_0123… key:…` or `41 tenant:acme`."""

    version: int
    key_ids: tuple[bytes, ...]
    tenants: tuple[bytes, ...]


def read_change(message: bytes) -> Change | None:
    """Return what a message on `CHANGED` says; None if it does not say what changed.

    Older writers send the version alone.
    """
    # A key's or tenant's name never has a space; see `is_tenant_name` and `id_of`.
    version, *names = message.split(b" ")
    changed: dict[bytes, list[bytes]] = {b"key": [], b"tenant": []}
    for each in names:
        kind, _, name = each.partition(b":")
        if kind not in changed:
            return None
        changed[kind].append(name)
    if not names or not version.isdigit():
        return None
    return Change(int(version), tuple(changed[b"key"]), tuple(changed[b"tenant"]))


def _checksum(body: str) -> str:
    rest = zlib.crc32(body.encode())
    digits = []
    for _ in range(_CHECKSUM_CHARS):
        rest, digit = divmod(rest, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def encode_key(record: ApiKey) -> bytes:
    """Return the JSON record that Redis holds: everything but the last use."""
    stored = {item.name: getattr(record, item.name) for item in fields(record)}
    # A key in use would otherwise be rewritten, and announced to every gateway, each minute.
    del stored["last_used_s"]
    return msgspec.json.encode(stored, enc_hook=_encode_limits)


def decode_keys(stored: Mapping[bytes, bytes]) -> list[ApiKey]:
    """Return the readable records; a damaged one is logged and does not affect the others.

    Fields that a later version added are ignored, except within `limits`: ignoring an unknown limit
    would lift it, so the key is refused.
    """
    records = []
    for key_id, data in stored.items():
        try:
            record = _decoder.decode(data)
            # One record under another's id would be revoked and edited in the other's place.
            if record.key_id.encode() != key_id:
                raise msgspec.DecodeError("The record names another key.")
        except (msgspec.DecodeError, UnicodeDecodeError, ConfigError):
            logger.error("The record of API key %r cannot be read; the key is refused.", key_id)
        else:
            records.append(record)
    return records


def with_last_used(record: ApiKey, last_used: bytes | None) -> ApiKey:
    """Return the record with its last use, from the value in `LAST_USED`."""
    return record if last_used is None else replace(record, last_used_s=float(last_used))


def require_tenant(tenant: str) -> None:
    """Raise ConfigError unless this can be a tenant's name."""
    if not is_tenant_name(tenant):
        raise ConfigError(
            "A tenant's name must have 1 to 64 of the characters a-z, 0-9, '.', '_' and '-', "
            "and begin and end with a letter or digit."
        )


def require_pepper(pepper: str) -> None:
    """Raise ConfigError when there is no pepper."""
    if not pepper:
        raise ConfigError(
            "The key pepper is empty; set TERA_KEY_PEPPER, or whoever copies Redis can try keys."
        )


def _encode_limits(value: Any) -> Any:
    assert isinstance(value, Limits)
    return value.file_form(exclude_none=True)


def _decode_limits(kind: type, value: Any) -> Any:
    assert kind is Limits
    return Limits.parse(value)


_decoder: Final = msgspec.json.Decoder(ApiKey, dec_hook=_decode_limits)
