"""The Redis that stores keys and limits."""

from typing import Self

from pydantic import Field, model_validator

from tera.config.cluster import Quantity, SecretReference
from tera.config.names import Address
from tera.config.pods import PodConfig
from tera.config.section import Section


class ExternalRedis(SecretReference):
    """An existing Redis or Valkey."""

    address: Address = ""
    """host:port."""
    tls: bool = False
    """Whether to connect with TLS."""


class RedisConfig(Section):
    """Where keys and limits are stored."""

    embedded: bool = True
    """Whether Tera runs one itself: a redis-server on one machine, a Valkey StatefulSet on a
    cluster."""
    image: str = Field(default="valkey/valkey:8.1.4-alpine", min_length=1)
    """Image of the embedded Valkey."""
    storage: Quantity = "8Gi"
    """Size of the embedded Valkey's volume."""
    pod: PodConfig = PodConfig()
    """What is added to the pods of the Valkeys that the chart runs."""
    external: ExternalRedis = ExternalRedis()

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if not self.embedded and not self.external.address:
            raise ValueError("external.address is missing; give host:port, or set embedded: true")
        if self.embedded and self.external.address:
            raise ValueError("external.address is set; set embedded: false to use it")
        return self
