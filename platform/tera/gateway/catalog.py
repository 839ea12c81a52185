"""The models that a gateway replica serves, and which callers may use them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tera.config.model import ModelConfig
from tera.contract.common import ModelCard, ModelStatus, cut
from tera.errors import ModelNotFoundError
from tera.gateway.render import TextModel
from tera.routing.run import Dispatcher
from tera.tenancy.keys import ApiKey

CREATED = 1_767_225_600
"""`created` of every model, the same on all gateway replicas: the day of the first release."""


@dataclass(frozen=True)
class ServedModel:
    """A model as the gateway knows it."""

    name: str
    config: ModelConfig
    text: TextModel
    dispatcher: Dispatcher
    cache_salt: Callable[[ApiKey], str]
    """Returns the salt of a caller's prompts; see `Generation`."""

    def card(self, client_name: str, status: ModelStatus) -> ModelCard:
        """Return the model's entry under the name that the client used."""
        return ModelCard(
            id=client_name,
            created=CREATED,
            owned_by="simulated" if self.config.engine.kind == "simulated" else "tera",
            context_length=self.text.context_length,
            capabilities=self.config.capabilities,
            status=status,
        )


class Catalog:
    """The models of this gateway replica; replaced as a whole when the configuration changes."""

    def __init__(self) -> None:
        self.models: Mapping[str, ServedModel] = {}
        self._by_client_name: Mapping[str, ServedModel] = {}

    def replace(self, models: Mapping[str, ServedModel]) -> None:
        """Serve these models, by short name, from the next request on."""
        self.models = models
        self._by_client_name = {
            client_name: model
            for model in models.values()
            for client_name in (model.config.id, *model.config.aliases)
        }

    def find(self, caller: ApiKey, client_name: str) -> ServedModel:
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

    def visible_to(self, caller: ApiKey) -> list[ServedModel]:
        """Return the models that the caller may use, in the catalog's order."""
        return [model for model in self.models.values() if _may_use(caller, model)]


def _may_use(caller: ApiKey, model: ServedModel) -> bool:
    if caller.models is None:
        return True
    return not {model.config.id, *model.config.aliases}.isdisjoint(caller.models)
