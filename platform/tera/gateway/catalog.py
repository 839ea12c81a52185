"""The models that a gateway replica serves, and which callers may use them."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tera.config.model import ModelConfig
from tera.contract.common import ModelCard, ModelStatus, cut
from tera.errors import BackendFailureError, ModelNotFoundError
from tera.gateway.render import TextModel
from tera.gateway.text_loader import TextLoader
from tera.routing.run import Dispatcher
from tera.tenancy.keys import ApiKey

CREATED = 1_767_225_600
"""`created` of every model, the same on all gateway replicas: the day of the first release."""


class CatalogModel(Protocol):
    """A model of the catalog, which may not be loaded yet."""

    @property
    def name(self) -> str:
        """Its name in the values."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Its settings."""
        ...

    @property
    def dispatcher(self) -> Dispatcher:
        """The way to its replicas."""
        ...

    def card(self, client_name: str, status: ModelStatus) -> ModelCard:
        """Return the model's entry under the name that the client used."""
        ...

    async def served(self) -> "ServedModel":
        """Return the model once it is loaded.

        Raises:
            BackendFailureError: it could not be loaded.
        """
        ...


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded."""

    name: str
    config: ModelConfig
    text: TextModel
    dispatcher: Dispatcher
    cache_salt: Callable[[ApiKey], str]
    """Returns the salt of a caller's prompts; see `Generation`."""

    def card(self, client_name: str, status: ModelStatus) -> ModelCard:
        """Return the model's entry under the name that the client used."""
        return _card(self.config, client_name, self.text, status)

    async def served(self) -> "ServedModel":
        """Return the model itself."""
        return self


@dataclass(frozen=True)
class LoadingModel:
    """A model whose text side is loaded beside requests."""

    name: str
    config: ModelConfig
    loader: TextLoader
    dispatcher: Dispatcher
    cache_salt: Callable[[ApiKey], str]
    """As of `ServedModel`."""

    def card(self, client_name: str, status: ModelStatus) -> ModelCard:
        """Return the model's entry under the name that the client used."""
        return _card(self.config, client_name, self.loader.text, status)

    async def served(self) -> ServedModel:
        """Return the model once it is loaded.

        Raises:
            BackendFailureError: it could not be loaded, or not within the deadline of a cold start.
        """
        if self.loader.text is None:
            try:
                async with asyncio.timeout(self.config.scaling.cold_start_deadline_seconds):
                    await self.loader.tried()
            except TimeoutError as error:
                raise unavailable() from error
        text = self.loader.text
        if text is None:
            raise unavailable()
        return ServedModel(self.name, self.config, text, self.dispatcher, self.cache_salt)


def unavailable() -> BackendFailureError:
    """Return the answer to a request for a model that has failed; only operators are told why."""
    return BackendFailureError(
        "This model cannot be used at the moment: it has failed to start. It is tried again; "
        "`GET /v1/models` shows its status."
    )


def _card(
    config: ModelConfig, client_name: str, text: TextModel | None, status: ModelStatus
) -> ModelCard:
    return ModelCard(
        id=client_name,
        created=CREATED,
        owned_by="simulated" if config.engine.kind == "simulated" else "tera",
        context_length=None if text is None else text.context_length,
        capabilities=config.capabilities,
        status=status,
    )


class Catalog:
    """The models of this gateway replica; replaced as a whole when the configuration changes."""

    def __init__(self) -> None:
        self.models: Mapping[str, CatalogModel] = {}
        self._by_client_name: Mapping[str, CatalogModel] = {}

    def replace(self, models: Mapping[str, CatalogModel]) -> None:
        """Serve these models, by short name, from the next request on."""
        self.models = models
        self._by_client_name = {
            client_name: model
            for model in models.values()
            for client_name in (model.config.id, *model.config.aliases)
        }

    def find(self, caller: ApiKey, client_name: str) -> CatalogModel:
        """Return the model that a client names.

        Raises:
            ModelNotFoundError: it does not exist, or the caller may not use it.
        """
        model = self._by_client_name.get(client_name)
        if model is None or not _may_use(caller, model):
            raise ModelNotFoundError(
                f"The model `{cut(client_name)}` does not exist or is not deployed, "
                "or you do not have access to it.",
                param="model",
            )
        return model

    def visible_to(self, caller: ApiKey) -> list[CatalogModel]:
        """Return the models that the caller may use, in the catalog's order."""
        return [model for model in self.models.values() if _may_use(caller, model)]


def _may_use(caller: ApiKey, model: CatalogModel) -> bool:
    if caller.models is None:
        return True
    return not {model.config.id, *model.config.aliases}.isdisjoint(caller.models)
