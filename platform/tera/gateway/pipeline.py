"""A request's way through the gateway: authenticate → render → dispatch → derender.

The file to read first. `app.py` is HTTP around it, `relay.py` turns what it yields into bytes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from tera.config import ModelConfig
from tera.contract.common import ModelCard, ModelStatus, Usage, usage_of
from tera.contract.completions import CompletionRequest, Prompt
from tera.errors import (
    ContextLengthError,
    InvalidValueError,
    ModelNotFoundError,
    UnsupportedParameterError,
)
from tera.gateway.render import StopStrings, TextModel
from tera.generation import FinishReason, Sampling
from tera.observability import Metrics
from tera.routing.dispatch import Attempts, Dispatcher
from tera.tenancy.keys import ApiKey

CREATED = 1_767_225_600
"""`created` of every model: one number on all gateway replicas, the day of the first release."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class ServedModel:
    """A model as the gateway knows it."""

    name: str
    config: ModelConfig
    text: TextModel
    dispatcher: Dispatcher

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
    """The models of this gateway replica; replaced whole when the configuration changes."""

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
            ModelNotFoundError: it is not there, or not for this caller.
        """
        model = self._by_client_name.get(client_name)
        if model is None or not _may_use(caller, model):
            raise ModelNotFoundError(
                f"The model `{client_name}` does not exist or is not deployed, "
                "or you do not have access to it.",
                param="model",
            )
        return model

    def visible_to(self, caller: ApiKey) -> list[ServedModel]:
        """Return the models that the caller may use, in the catalog's order."""
        return [model for model in self.models.values() if _may_use(caller, model)]


class Authenticator(Protocol):
    """Who turns an `Authorization` header into a caller."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the caller's key.

        Raises:
            AuthenticationError: there is none that is valid now.
        """
        ...


@dataclass(slots=True)
class Call:
    """One request's facts, filled in on its way; the ledger and the metrics read them."""

    request_id: str
    route: str
    arrived: float
    """Monotonic, in seconds."""
    model: str = ""
    """Short name of the model, once it is known to exist."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    attempts: Attempts = field(default_factory=Attempts)

    def usage(self) -> Usage:
        """Return the counts so far as the client sees them."""
        return usage_of(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice of an answer gained."""

    index: int
    text: str
    finish_reason: FinishReason | None = None


class Pipeline:
    """Answers requests; holds no state of any of them between calls."""

    def __init__(
        self,
        catalog: Catalog,
        keys: Authenticator,
        status: Callable[[str], ModelStatus],
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._keys = keys
        self._status = status
        self._metrics = metrics
        self._clock = clock

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the caller's key; see `Authenticator`."""
        return self._keys.authenticate(authorization)

    def model_cards(self, caller: ApiKey) -> list[ModelCard]:
        """Return the models that the caller may use, in the catalog's order."""
        return [
            model.card(model.config.id, self._status(model.name))
            for model in self._catalog.visible_to(caller)
        ]

    def model_card(self, caller: ApiKey, client_name: str) -> ModelCard:
        """Return one model.

        Raises:
            ModelNotFoundError: it is not there, or not for this caller.
        """
        model = self._catalog.find(caller, client_name)
        return model.card(client_name, self._status(model.name))

    async def complete(
        self, caller: ApiKey, request: CompletionRequest, call: Call
    ) -> AsyncGenerator[ChoiceDelta]:
        """Yield the choices' text as it is generated; `call` has the counts when it ends.

        The first step renders and checks everything, so an error of the request comes before
        any delta. Closing the generator stops the engines' work.

        Raises:
            InvalidRequestError: the request does not fit the model.
            ModelNotFoundError: the model is not there, or not for this caller.
            BackendFailureError: the engines failed.
        """
        model = self._catalog.find(caller, request.model)
        call.model = model.name
        _refuse_unsupported(request)
        prompts = [await _token_ids(model.text, prompt, at) for prompt, at in _located(request)]
        for prompt in prompts:
            _check_context(model.text.context_length, len(prompt), request.max_tokens)
        call.prompt_tokens = sum(map(len, prompts))
        self._metrics.added_s.labels(model.name).observe(self._clock() - call.arrived)
        choices = [
            self._choice(model, call, prompt, request, position * request.n + sample, sample)
            for position, prompt in enumerate(prompts)
            for sample in range(request.n)
        ]
        async with aclosing(merged(choices)) as deltas:
            async for delta in deltas:
                yield delta

    async def _choice(
        self,
        model: ServedModel,
        call: Call,
        prompt: list[int],
        request: CompletionRequest,
        index: int,
        sample: int,
    ) -> AsyncGenerator[ChoiceDelta]:
        """Yield one choice's text: dispatch, then ids to text and the end at a stop string."""
        metrics, clock = self._metrics, self._clock
        first_token_s = metrics.first_token_s.labels(model.name)
        between_tokens_s = metrics.between_tokens_s.labels(model.name)
        detokenizer = model.text.detokenizer(prompt)
        stops = StopStrings(request.stop)
        generation = model.dispatcher.run(
            call.request_id, prompt, _sampling(request, sample), call.attempts
        )
        previous: float | None = None
        async with aclosing(generation) as deltas:
            async for delta in deltas:
                now = clock()
                if previous is None:
                    first_token_s.observe(now - call.arrived)
                    if sample == 0:
                        call.cached_tokens += delta.cached_tokens
                else:
                    between_tokens_s.observe(now - previous)
                previous = now
                text = ""
                finish = delta.finish_reason
                for position, token_id in enumerate(delta.token_ids, start=1):
                    call.completion_tokens += 1
                    if finish is FinishReason.STOP and position == len(delta.token_ids):
                        break  # the token that ended the text is no part of it
                    piece, stopped = stops.push(detokenizer.push(token_id))
                    text += piece
                    if stopped:
                        yield ChoiceDelta(index, text, FinishReason.STOP)
                        return
                if finish is not None:
                    yield ChoiceDelta(index, text + stops.flush(), finish)
                    return
                if text:
                    yield ChoiceDelta(index, text)


def _may_use(caller: ApiKey, model: ServedModel) -> bool:
    if caller.models is None:
        return True
    return not {model.config.id, *model.config.aliases}.isdisjoint(caller.models)


def _refuse_unsupported(request: CompletionRequest) -> None:
    for name in ("logprobs", "echo"):
        if getattr(request, name) not in (None, False):
            raise UnsupportedParameterError(f"'{name}' is not supported yet.", param=name)


def _located(request: CompletionRequest) -> list[tuple[Prompt, str]]:
    """Return the prompts with the path of each in the request."""
    if len(request.prompt) == 1:
        return [(request.prompt[0], "prompt")]
    return [(prompt, f"prompt[{at}]") for at, prompt in enumerate(request.prompt)]


async def _token_ids(text: TextModel, prompt: Prompt, path: str) -> list[int]:
    """Return a prompt's token ids.

    Raises:
        InvalidValueError: an id is outside the vocabulary.
    """
    if isinstance(prompt, str):
        return await text.encode(prompt)
    for position, token_id in enumerate(prompt):
        if not 0 <= token_id < text.vocab_size:
            raise InvalidValueError(
                f"Invalid '{path}[{position}]': must be a token id from 0 to "
                f"{text.vocab_size - 1}, but {token_id} was given.",
                param=f"{path}[{position}]",
            )
    return prompt


def _check_context(context_length: int, prompt_tokens: int, max_tokens: int) -> None:
    if prompt_tokens + max_tokens > context_length:
        raise ContextLengthError(
            f"This model's context holds {context_length} tokens, but the request asks for "
            f"{prompt_tokens + max_tokens}: {prompt_tokens} of the prompt and {max_tokens} "
            "of max_tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if prompt_tokens < context_length else "prompt",
        )


def _sampling(request: CompletionRequest, sample: int) -> Sampling:
    """Return how sample number `sample` of each prompt is drawn."""
    # 0 is «the most likely token»; vLLM wants a nucleus that is not empty, so this is greedy.
    greedy = request.temperature == 0 or request.top_p == 0
    seed = request.seed
    if seed is not None:
        # Each sample its own, as vLLM numbers them; wrapped to stay a signed 64-bit number.
        seed = (seed + sample + 2**63) % 2**64 - 2**63
    return Sampling(
        max_tokens=request.max_tokens,
        temperature=0.0 if greedy else request.temperature,
        top_p=1.0 if greedy else request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        seed=seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
    )


async def merged(
    generators: Sequence[AsyncGenerator[ChoiceDelta]],
) -> AsyncGenerator[ChoiceDelta]:
    """Yield the items of all generators as they come; the first error ends and closes all."""
    if len(generators) == 1:
        async with aclosing(generators[0]) as only:
            async for delta in only:
                yield delta
        return
    ready: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_drain(generator, ready)) for generator in generators]
    try:
        running = len(tasks)
        while running:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(
    generator: AsyncGenerator[ChoiceDelta], ready: asyncio.Queue[ChoiceDelta | Exception | None]
) -> None:
    """Put all items into the queue, and after them the error that ended them, or None."""
    try:
        async with aclosing(generator):
            async for delta in generator:
                ready.put_nowait(delta)
    except Exception as error:  # noqa: BLE001  raised again where the items are read
        ready.put_nowait(error)
    else:
        ready.put_nowait(None)
