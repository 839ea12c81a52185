"""Names shared by Tera, its chart and the clients of Ray Serve, and the patterns of names."""

import re
from typing import Annotated, Final

from pydantic import StringConstraints

GATEWAY_APPLICATION: Final = "gateway"
"""The Serve application that serves HTTP; each model has its own application beside it."""
GATEWAY_DEPLOYMENT: Final = "Gateway"
"""The one Serve deployment of `GATEWAY_APPLICATION`."""
ENGINE_DEPLOYMENT: Final = "Engine"
"""The one Serve deployment of a model's application."""
_MODEL_APPLICATION: Final = "model-"

HTTP_PORT: Final = 8000
"""The port a platform listens on: the default on one machine, fixed on a cluster."""

CPU_POOL: Final = "cpu"
"""The worker group of gateways and of models without a pool."""

_MODEL: Final = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"

ModelName = Annotated[str, StringConstraints(pattern=_MODEL)]
"""A short DNS label: it becomes part of an application's and a Kubernetes object's name."""

_POOL: Final = r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$"

PoolName = Annotated[str, StringConstraints(pattern=_POOL)]

_ADDRESS: Final = r"^([^/@\s]+:[0-9]{1,5})?$"

Address = Annotated[str, StringConstraints(pattern=_ADDRESS)]
"""host:port, or empty."""

_TENANT = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")

TenantName = Annotated[str, StringConstraints(pattern=_TENANT.pattern)]


MEANINGS: Final = {
    _MODEL: "must be 1 to 40 lower-case letters, digits and hyphens, beginning with a letter; "
    "clients send the model's id or an alias, which may be any text",
    _POOL: "must be 1 to 30 lower-case letters, digits and hyphens, beginning with a letter",
    _ADDRESS: "must be host:port, without a scheme, user or password",
}
"""What a value that does not match a pattern is told."""


def application_name(model_name: str) -> str:
    """Return the name of the Serve application of a model."""
    return _MODEL_APPLICATION + model_name


def model_name(application_name: str) -> str:
    """Return the short name of the model whose Serve application this is."""
    return application_name.removeprefix(_MODEL_APPLICATION)


def pool_resource(pool: str) -> str:
    """Return the Ray resource that only a pool's workers have."""
    return f"pool_{pool}"


def is_tenant_name(text: str) -> bool:
    """Return whether this is a valid tenant name."""
    return _TENANT.fullmatch(text) is not None
