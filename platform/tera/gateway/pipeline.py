"""A request's way through the gateway: authenticate → render → admit → dispatch → derender.

The file to read first. `app.py` is HTTP around it, `relay.py` turns what it yields into bytes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import msgspec

from tera.config.model import Capability
from tera.contract.chat import ChatRequest, NamedToolChoice
from tera.contract.common import ModelCard, ModelStatus
from tera.contract.completions import CompletionRequest, Prompt, PromptArray
from tera.errors import (
    ContextLengthError,
    InternalError,
    InvalidValueError,
    TeraError,
    UnsupportedParameterError,
)
from tera.gateway.call import Call, ChatDelta, ChoiceDelta, PositionLogprobs
from tera.gateway.catalog import Catalog, ServedModel
from tera.gateway.render import (
    AnswerParser,
    Detokenizer,
    StopStrings,
    TextModel,
)
from tera.generation import FinishReason, Sampling, TokenDelta, TokenLogprobs
from tera.observability import Metrics
from tera.routing.switchboard import Share
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Progress
from tera.tenancy.usage import Status, UsageRecord

Clock = Callable[[], float]
Delta = TypeVar("Delta")


class Authenticator(Protocol):
    """Who turns an `Authorization` header into a caller."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the caller's key.

        Raises:
            AuthenticationError: there is none that is valid now.
        """
        ...


class Held(Protocol):
    """What a running request holds of its caller's limits."""

    def settle(self, record: UsageRecord) -> None:
        """Give it back and charge what `record` says; returns at once."""
        ...


class Admitter(Protocol):
    """Who decides whether a request may start now."""

    async def admit(
        self,
        key: ApiKey,
        opening: UsageRecord,
        tokens: int,
        *,
        progress: Callable[[], Progress],
        told: Callable[[Admission], None],
    ) -> Held:
        """Return what the request holds until it is settled; see `Admissions.admit`."""
        ...

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        """Return how many tokens a request can ever be admitted with; None is any number."""
        ...

    def weight(self, key: ApiKey, model: str) -> float:
        """Return the tenant's share in tokens while requests wait for replicas."""
        ...


@dataclass(frozen=True, slots=True)
class _Choice:
    """One completion to be generated."""

    index: int
    sample: int
    """Number among the completions of its prompt."""
    token_ids: list[int]
    sampling: Sampling
    stops: list[str]
    special_tokens: bool = False
    echo: str | None = None
    """The prompt's text, when the answer begins with it."""


class Pipeline:
    """Answers requests; holds no state of any of them between calls."""

    def __init__(
        self,
        catalog: Catalog,
        keys: Authenticator,
        admitter: Admitter,
        status: Callable[[str], ModelStatus],
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._keys = keys
        self._admitter = admitter
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
            RateLimitError: a limit of the caller is reached.
            BackendFailureError: the engines failed.
        """
        model = self._model(caller, request.model, "completions", call)
        text = model.text
        prompts = [await _token_ids(text, prompt, at) for prompt, at in _located(request)]
        for prompt in prompts:
            _check_context(text.context_length, len(prompt), request.max_tokens)
        _check_biases(text, request.logit_bias)
        call.prompt_tokens = sum(map(len, prompts))
        base = _sampling(request, request.max_tokens)
        base = msgspec.structs.replace(
            base,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
        )
        choices = [
            _Choice(
                index=position * request.n + sample,
                sample=sample,
                token_ids=prompt,
                sampling=_seeded(base, sample),
                stops=request.stop,
                echo=_echo(text, request.prompt[position]) if request.echo else None,
            )
            for position, prompt in enumerate(prompts)
            for sample in range(request.n)
        ]
        most_tokens = call.prompt_tokens + request.max_tokens * len(choices)
        async with self._admitted(caller, call, most_tokens, request.user):
            deltas = merged([self._choice(model, call, choice) for choice in choices])
            async with aclosing(deltas):
                async for delta in deltas:
                    yield delta

    async def chat(
        self, caller: ApiKey, request: ChatRequest, call: Call
    ) -> AsyncGenerator[ChatDelta]:
        """Yield the answers' pieces as they are generated; otherwise as `complete`.

        Raises:
            InvalidRequestError: the request does not fit the model.
            ModelNotFoundError: the model is not there, or not for this caller.
            RateLimitError: a limit of the caller is reached.
            BackendFailureError: the engines failed.
        """
        model = self._model(caller, request.model, "chat", call)
        text = model.text
        rendered = await text.render_chat(request)
        prompt_tokens = len(rendered.token_ids)
        max_tokens = request.completion_bound or self._rest(caller, model, request, prompt_tokens)
        _check_context(text.context_length, prompt_tokens, max_tokens)
        _check_biases(text, request.logit_bias)
        call.prompt_tokens = prompt_tokens
        base = msgspec.structs.replace(
            _sampling(request, max_tokens),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            structured=rendered.structured,
        )
        choices = [
            _Choice(
                index=sample,
                sample=sample,
                token_ids=rendered.token_ids,
                sampling=_seeded(base, sample),
                stops=request.stop,
                special_tokens=rendered.special_tokens,
            )
            for sample in range(request.n)
        ]
        most_tokens = prompt_tokens + max_tokens * len(choices)
        async with self._admitted(caller, call, most_tokens, request.user):
            answers = [
                self._answer(model, call, choice, request, text.answer_parser(request, rendered))
                for choice in choices
            ]
            async with aclosing(merged(answers)) as deltas:
                async for delta in deltas:
                    yield delta

    def _model(
        self, caller: ApiKey, client_name: str, capability: Capability, call: Call
    ) -> ServedModel:
        """Return the model that a client names, which the call takes note of.

        Raises:
            ModelNotFoundError: the model is not there, or not for this caller.
            UnsupportedParameterError: it is not for this route.
        """
        model = self._catalog.find(caller, client_name)
        call.model, call.tenant = model.name, caller.tenant
        call.share = Share(caller.tenant, self._admitter.weight(caller, model.name))
        if capability not in model.config.capabilities:
            others = ", ".join(model.config.capabilities) or "nothing"
            raise UnsupportedParameterError(
                f"'model' does not serve {capability}; it serves {others}.", param="model"
            )
        return model

    def _rest(
        self, caller: ApiKey, model: ServedModel, request: ChatRequest, prompt_tokens: int
    ) -> int:
        """Return the bound of an answer without one: what the context leaves.

        It is no more than the caller's limits could ever admit, or else no request without a
        bound would pass a limit that is lower than the context.
        """
        rest = model.text.context_length - prompt_tokens
        most_tokens = self._admitter.most_tokens(caller, model.name)
        if most_tokens is not None:
            rest = min(rest, (most_tokens - prompt_tokens) // request.n)
        # At least one token, so that a prompt which fills the context is refused as such.
        return max(1, rest)

    @asynccontextmanager
    async def _admitted(
        self, caller: ApiKey, call: Call, most_tokens: int, user: str | None
    ) -> AsyncIterator[None]:
        """Run the block if the caller's limits admit it, and settle what it used.

        Raises:
            RateLimitError: they do not; nothing has been spent.
        """
        opening = UsageRecord(
            request_id=call.request_id,
            tenant=caller.tenant,
            key_id=caller.key_id,
            model=call.model,
            route=call.route,
            status="lost",
            started_s=call.started_s,
            prompt_tokens=call.prompt_tokens,
            user=user or "",
        )

        held = await self._admitter.admit(
            caller, opening, most_tokens, progress=call.progress, told=call.tell
        )
        self._metrics.added_s.labels(call.model).observe(self._clock() - call.arrived)
        # A client that leaves, or a replica that drains, ends the block by no error of ours.
        status: Status = "cancelled"
        code = ""
        try:
            yield
            status = "finished"
        except Exception as error:
            status = "failed"
            code = error.code if isinstance(error, TeraError) else InternalError.code
            raise
        finally:
            held.settle(
                msgspec.structs.replace(
                    opening,
                    status=status,
                    code=code,
                    prompt_tokens=call.progress().prompt_tokens,
                    cached_tokens=call.cached_tokens,
                    completion_tokens=call.completion_tokens,
                    first_token_s=call.first_token_s,
                    duration_s=self._clock() - call.arrived,
                    replica_switches=call.attempts.replica_switches,
                )
            )

    async def _answer(
        self,
        model: ServedModel,
        call: Call,
        choice: _Choice,
        request: ChatRequest,
        parser: AnswerParser,
    ) -> AsyncGenerator[ChatDelta]:
        """Yield one chat answer: a choice's text, told apart by the model's parsers."""
        called_tools = False
        async with aclosing(self._choice(model, call, choice)) as deltas:
            async for delta in deltas:
                finished = delta.finish_reason is not None
                piece = parser.push(delta.text, delta.token_ids, finished=finished)
                if not request.parallel_tool_calls:
                    first_only = [call for call in piece.tool_calls if call.index == 0]
                    piece = replace(piece, tool_calls=first_only)
                called_tools |= bool(piece.tool_calls)
                finish: str | None = delta.finish_reason
                # As OpenAI: the one tool that the client named is no choice of the model's.
                chosen = called_tools and not isinstance(request.tool_choice, NamedToolChoice)
                if finish == FinishReason.STOP and chosen:
                    finish = "tool_calls"
                yield ChatDelta(choice.index, piece, finish, delta.logprobs)

    async def _choice(
        self, model: ServedModel, call: Call, choice: _Choice
    ) -> AsyncGenerator[ChoiceDelta]:
        """Yield one choice's text: dispatch, then ids to text and the end at a stop string."""
        watch = self._stopwatch(model, call)
        detokenizer = model.text.detokenizer(choice.token_ids, special_tokens=choice.special_tokens)
        stops = StopStrings(choice.stops)
        echo = choice.echo or ""
        generation = model.dispatcher.run(
            call.request_id, call.share, choice.token_ids, choice.sampling, call.attempts
        )
        first = True
        async with aclosing(generation) as deltas:
            async for delta in deltas:
                watch()
                if first and choice.sample == 0:
                    call.cached_tokens += delta.cached_tokens
                text, used, stopped = _derender(delta, detokenizer, stops)
                call.completion_tokens += used
                finish = FinishReason.STOP if stopped else delta.finish_reason
                if finish is not None and not stopped:
                    text += stops.flush()
                logprobs = None
                if choice.sampling.logprobs is not None:
                    logprobs = _positions(model.text, choice, delta, used, with_prompt=first)
                yield ChoiceDelta(
                    choice.index, echo + text, delta.token_ids[:used], finish, logprobs
                )
                first, echo = False, ""
                if finish is not None:
                    return

    def _stopwatch(self, model: ServedModel, call: Call) -> Callable[[], None]:
        """Return what is called at each delivery of a choice's tokens."""
        first_token_s = self._metrics.first_token_s.labels(model.name)
        between_tokens_s = self._metrics.between_tokens_s.labels(model.name)
        previous: float | None = None

        def delivered() -> None:
            nonlocal previous
            now = self._clock()
            if previous is None:
                first_token_s.observe(now - call.arrived)
                if call.first_token_s is None:
                    call.first_token_s = now - call.arrived
            else:
                between_tokens_s.observe(now - previous)
            previous = now

        return delivered


def _derender(
    delta: TokenDelta, detokenizer: Detokenizer, stops: StopStrings
) -> tuple[str, int, bool]:
    """Return a delta's text, how many of its tokens that took, and whether a stop string came."""
    text = ""
    for position, token_id in enumerate(delta.token_ids, start=1):
        if delta.finish_reason is FinishReason.STOP and position == len(delta.token_ids):
            break  # the token that ended the text is no part of it
        piece, stopped = stops.push(detokenizer.push(token_id))
        text += piece
        if stopped:
            return text, position, True
    return text, len(delta.token_ids), False


def _positions(
    text: TextModel, choice: _Choice, delta: TokenDelta, used: int, *, with_prompt: bool
) -> list[PositionLogprobs]:
    """Return the log-probabilities of a delta's first `used` tokens as text.

    The token that ended the text has none; an echoed prompt's come first.
    """
    entries = list((delta.logprobs or [])[:used])
    if delta.finish_reason is FinishReason.STOP and used == len(delta.token_ids):
        entries = entries[: used - 1]
    positions = [_position(text, entry) for entry in entries]
    if choice.echo is None or not with_prompt:
        return positions
    prompt = delta.prompt_logprobs or [None] * len(choice.token_ids)
    texts = text.token_texts(choice.token_ids)
    return [
        PositionLogprobs(token, None, []) if entry is None else _position(text, entry)
        for token, entry in zip(texts, prompt, strict=True)
    ] + positions


def _position(text: TextModel, entry: TokenLogprobs) -> PositionLogprobs:
    token, *top = text.token_texts([entry.token_id, *(token_id for token_id, _ in entry.top)])
    likely = [(name, logprob) for name, (_, logprob) in zip(top, entry.top, strict=True)]
    return PositionLogprobs(token, entry.logprob, likely)


def _located(request: CompletionRequest) -> list[tuple[Prompt, str]]:
    """Return the prompts with the path of each in the request."""
    if not isinstance(request.prompt, PromptArray):
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


def _check_biases(text: TextModel, biases: dict[int, float] | None) -> None:
    for token_id in biases or ():
        if token_id >= text.vocab_size:
            raise InvalidValueError(
                f"Invalid 'logit_bias': the key '{token_id}' is no token id of the model; they "
                f"go from 0 to {text.vocab_size - 1}.",
                param="logit_bias",
            )


def _echo(text: TextModel, prompt: Prompt) -> str:
    """Return a prompt as text."""
    if isinstance(prompt, str):
        return prompt
    detokenizer = text.detokenizer([])
    return "".join(map(detokenizer.push, prompt))


def _sampling(request: CompletionRequest | ChatRequest, max_tokens: int) -> Sampling:
    """Return how the request's completions are drawn, its seed as it is."""
    # 0 is «the most likely token»; vLLM wants a nucleus that is not empty, so this is greedy.
    greedy = request.temperature == 0 or request.top_p == 0
    return Sampling(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else request.temperature,
        top_p=1.0 if greedy else request.top_p,
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        seed=request.seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
    )


def _seeded(sampling: Sampling, sample: int) -> Sampling:
    """Return the sampling of one of several samples: each its own seed, as vLLM numbers them."""
    if sampling.seed is None or sample == 0:
        return sampling
    # Wrapped, to stay a signed 64-bit number.
    seed = (sampling.seed + sample + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)


async def merged(
    generators: Sequence[AsyncGenerator[Delta]],
) -> AsyncGenerator[Delta]:
    """Yield the items of all generators as they come; the first error ends and closes all."""
    if len(generators) == 1:
        async with aclosing(generators[0]) as only:
            async for delta in only:
                yield delta
        return
    ready: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
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
    generator: AsyncGenerator[Delta], ready: asyncio.Queue[Delta | Exception | None]
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
