"""Keys and tenants' limits by what requests ask for, out of the records that Redis has of them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from tera.config.limits import TenantLimits
from tera.tenancy.keys import ApiKey, decode_keys
from tera.tenancy.tenants import BLOCKED, decode_tenant


class Table(Protocol):
    """What follows one hash in Redis, some of its records at a time."""

    @property
    def names(self) -> Collection[bytes]:
        """The fields of the hash, as far as they are known."""
        ...

    def put(self, stored: Mapping[bytes, bytes]) -> None:
        """Take over records as they are now; the others stay."""
        ...

    def remove(self, names: Iterable[bytes]) -> None:
        """Forget records; those that are not known do not matter."""
        ...


class KeyTable:
    """API keys by their hash."""

    def __init__(self) -> None:
        self.by_hash: dict[str, ApiKey] = {}
        self._by_id: dict[bytes, ApiKey] = {}
        self._stored: dict[bytes, bytes] = {}

    @property
    def names(self) -> Collection[bytes]:
        """The keys' ids."""
        return self._stored.keys()

    def put(self, stored: Mapping[bytes, bytes]) -> None:
        """Take over what differs; a record that cannot be read ends the key that it was."""
        changed = {
            key_id: data for key_id, data in stored.items() if self._stored.get(key_id) != data
        }
        self._drop(changed)
        for record in decode_keys(changed):
            self._by_id[record.key_id.encode()] = record
            self.by_hash[record.key_hash] = record
        self._stored.update(changed)

    def remove(self, names: Iterable[bytes]) -> None:
        """Refuse these keys from now on."""
        for key_id in names:
            self._stored.pop(key_id, None)
            self._drop((key_id,))

    def _drop(self, names: Iterable[bytes]) -> None:
        for key_id in names:
            record = self._by_id.pop(key_id, None)
            if record is not None:
                self.by_hash.pop(record.key_hash, None)


class TenantTable:
    """What is stored of tenants' limits, by tenant."""

    def __init__(self) -> None:
        self.limits: dict[str, TenantLimits] = {}
        self._stored: dict[bytes, bytes] = {}

    @property
    def names(self) -> Collection[bytes]:
        """The tenants' names."""
        return self._stored.keys()

    def put(self, stored: Mapping[bytes, bytes]) -> None:
        """Take over what differs; of the others the very objects stay."""
        for name, data in stored.items():
            if self._stored.get(name) != data:
                limits = decode_tenant(name, data)
                # Unlimited is what a damaged record must not mean.
                self.limits[name.decode(errors="replace")] = BLOCKED if limits is None else limits
                self._stored[name] = data

    def remove(self, names: Iterable[bytes]) -> None:
        """Leave these tenants to the values."""
        for name in names:
            self._stored.pop(name, None)
            self.limits.pop(name.decode(errors="replace"), None)
