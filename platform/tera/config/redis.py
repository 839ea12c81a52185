"""The Redis that keys and limits live in."""

from typing import Self

from pydantic import Field, model_validator

from tera.config.cluster import Quantity, SecretReference
from tera.config.section import Section


class ExternalRedis(SecretReference):
    """A Redis or Valkey that exists already."""

    address: str = ""
    """host:port."""
    tls: bool = False
    """Whether the connection is encrypted."""


class RedisConfig(Section):
    """Where keys and limits live."""

    embedded: bool = True
    """On one machine a redis-server of our own; on a cluster one Valkey StatefulSet."""
    image: str = Field(default="valkey/valkey:8.1.4-alpine", min_length=1)
    """Of the embedded Valkey."""
    storage: Quantity = "8Gi"
    """Of the embedded Valkey's volume."""
    external: ExternalRedis = ExternalRedis()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if not self.embedded and not self.external.address:
            raise ValueError("external.address is missing; give host:port, or set embedded: true")
        if self.embedded and self.external.address:
            raise ValueError("external.address is set; set embedded: false to use it")
        return self
