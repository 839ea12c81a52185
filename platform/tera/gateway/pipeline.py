"""A request's path: authenticate → parse → render → admit → run → derender → settle.

The file to read first. It knows no API: a dialect (`gateway/dialects/`) has turned the client's
body into a `TextRequest`, and turns the pieces that are added to its `Answer` into the client's
objects and events. Around it, `edge.py` handles HTTP; behind it, `routing/run.py` finds replicas,
and other ones when those die.

The way back is not awaited step by step. A frame of the token channel (`routing/link.py`) pushes
its tokens through `Run` and `ChoiceText` into the answer in one go, after which a streamed answer's
bytes are sent: no task is woken for a token.
"""

import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from tera.config.model import Capability
from tera.contract.common import ModelCard, ModelStatus
from tera.errors import InternalError, TeraError, UnsupportedParameterError
from tera.gateway.all_or_none import all_or_none
from tera.gateway.catalog import Catalog, ServedModel, unavailable
from tera.gateway.checks import (
    check_biases,
    check_context,
    check_echo,
    check_logprobs,
    most_told_tokens,
)
from tera.gateway.derender import Choice, ChoiceText
from tera.gateway.echo import EchoedPrompt, echoed_prompts
from tera.gateway.exchange import Exchange
from tera.gateway.parsing import RequestParser
from tera.gateway.pieces import Answer
from tera.gateway.render import AnswerParser, render_prompt
from tera.gateway.request import Conversation, Prompts, TextRequest, of_sample
from tera.gateway.stopwatch import Stopwatch
from tera.gateway.text_pool import SHORT_BYTES, TextPool
from tera.generation import Sampling
from tera.observability import Metrics
from tera.routing.run import Work
from tera.routing.switchboard import Share
from tera.tenancy.keys import ApiKey
from tera.tenancy.limits import Admission, Progress
from tera.tenancy.usage import Status, UsageRecord

R = TypeVar("R")


class Authenticator(Protocol):
    """Turns an `Authorization` header into a caller."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the caller's key.

        Raises:
            AuthenticationError: there is no key, or it is not valid now.
        """
        ...


class Held(Protocol):
    """What a running request holds of its caller's limits."""

    def settle(self, record: UsageRecord) -> None:
        """Release it and charge what `record` says; returns at once."""
        ...


class Admitter(Protocol):
    """Decides whether a request may start now."""

    async def admit(
        self,
        key: ApiKey,
        opening: UsageRecord,
        tokens: int,
        *,
        progress: Callable[[], Progress],
        told: Callable[[Admission], None],
    ) -> Held:
        """Return the hold on the limits, to be settled; see `Admissions.admit`."""
        ...

    async def refuse_early(
        self, key: ApiKey, opening: UsageRecord, *, told: Callable[[Admission], None]
    ) -> None:
        """Raise if every request of this key is refused, whichever model it names.

        Raises:
            RateLimitError: it is; see `Admissions.refuse_early`.
        """
        ...

    def most_tokens(self, key: ApiKey, model: str) -> int | None:
        """Return the largest number of tokens the limits can ever admit; None means no limit."""
        ...

    def weight(self, key: ApiKey, model: str) -> float:
        """Return the tenant's weight in the queue for replicas."""
        ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A request as the model sees it: token ids, and how to create the text state of an answer."""

    prompts: list[list[int]]
    sampling: Sampling
    choices: list[Choice]
    cache_salt: str
    """Of all prompts; see `Generation`."""
    echoed: list[EchoedPrompt]
    """Prompts that answers begin with, including their log-probabilities."""
    new_parser: Callable[[], AnswerParser | None]
    """Creates the parser that separates content, reasoning and tool calls; may return None."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that the request can use."""
        return self.prompt_tokens + self.sampling.max_tokens * len(self.choices)


class Pipeline:
    """Answers requests; keeps no state of a request between calls."""

    def __init__(
        self,
        catalog: Catalog,
        keys: Authenticator,
        admitter: Admitter,
        status: Callable[[str], ModelStatus],
        metrics: Metrics,
        pool: TextPool | None = None,
    ) -> None:
        """Long requests are parsed and rendered in `pool`; by default in one of its own."""
        self._catalog = catalog
        self._keys = keys
        self._admitter = admitter
        self._status = status
        self._metrics = metrics
        self._pool = pool or TextPool()
        self._parser = RequestParser(self._pool)

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
            ModelNotFoundError: it does not exist, or the caller may not use it.
        """
        model = self._catalog.find(caller, client_name)
        return model.card(client_name, self._status(model.name))

    async def parse(
        self, caller: ApiKey, read: Callable[[dict[str, Any]], R], body: bytes, exchange: Exchange
    ) -> R:
        """Return the result of `read`, an API's dialect, for a caller's body.

        Raises:
            InvalidRequestError: it is not a valid request of that API.
            RateLimitError: it is long, and the caller's limits refuse it whatever it says.
            EngineOverloadedError: too many long requests are waiting already.
        """
        exchange.body_bytes = len(body)
        if len(body) > SHORT_BYTES:
            opening = _opening(caller, exchange, user="")
            await self._admitter.refuse_early(caller, opening, told=exchange.tell)
        return await self._parser.parse(caller.tenant, read, body)

    async def generate(
        self, caller: ApiKey, request: TextRequest, exchange: Exchange, answer: Answer
    ) -> None:
        """Generate the answer; afterwards `exchange` has the counts.

        Everything is rendered and checked before the first piece, so errors in the request are
        raised before any output. Cancelling it stops the engines' work.

        Raises:
            InvalidRequestError: the request does not fit the model.
            ModelNotFoundError: the model does not exist, or the caller may not use it.
            RateLimitError: a limit of the caller is reached.
            BackendFailureError: the engines, or the model as a whole, failed.
        """
        model = await self._model(caller, request.model, request.capability, exchange)
        rendered = await self._render(caller, model, request, exchange)
        exchange.prompt_tokens = rendered.prompt_tokens
        async with self._admitted(caller, exchange, rendered.most_tokens, request.user):
            await all_or_none(
                [
                    *(each.tell(model.text, answer) for each in rendered.echoed),
                    *(
                        self._choose(model, exchange, rendered, each, answer)
                        for each in rendered.choices
                    ),
                ]
            )

    async def _model(
        self, caller: ApiKey, client_name: str, capability: Capability, exchange: Exchange
    ) -> ServedModel:
        """Return the model that a client names once it is loaded; record it in the exchange.

        Raises:
            ModelNotFoundError: the model does not exist, or the caller may not use it.
            UnsupportedParameterError: the model does not serve this route.
            BackendFailureError: the model has failed.
        """
        model = self._catalog.find(caller, client_name)
        exchange.model, exchange.tenant = model.name, caller.tenant
        exchange.share = Share(caller.tenant, self._admitter.weight(caller, model.name))
        if capability not in model.config.capabilities:
            others = ", ".join(model.config.capabilities) or "nothing"
            raise UnsupportedParameterError(
                f"'model' does not serve {capability}; it serves {others}.", param="model"
            )
        if self._status(model.name) == "failed":
            raise unavailable()
        return await model.served()

    async def _render(
        self, caller: ApiKey, model: ServedModel, request: TextRequest, exchange: Exchange
    ) -> Rendered:
        """Return the request as token ids, checked against the model's context and vocabulary."""
        text, content, sampling = model.text, request.content, request.sampling
        special_tokens = False
        new_parser: Callable[[], AnswerParser | None] = _no_parser
        echoes: list[str | None] = [None]
        if isinstance(content, Conversation):
            render = partial(text.render_chat, content)
            chat = await self._apart(caller, exchange.body_bytes, render)
            if chat.structured is not None:
                await text.check_structured(caller.tenant, exchange.body_bytes, chat)
            prompts, special_tokens = [chat.token_ids], chat.special_tokens
            sampling = msgspec.structs.replace(sampling, structured=chat.structured)
            new_parser = partial(text.answer_parser, content, chat)
        else:
            prompts, echoes = await self._render_prompts(caller, model, content)
        max_tokens = request.max_tokens
        if max_tokens is None:
            max_tokens = self._rest(caller, model, len(prompts[0]), request)
        for prompt in prompts:
            check_context(text.context_length, len(prompt), max_tokens)
        check_logprobs(max_tokens, len(prompts) * request.n, sampling.logprobs)
        check_biases(text, sampling.logit_bias)
        echoed: list[EchoedPrompt] = []
        if sampling.prompt_logprobs is not None:
            check_echo(sum(map(len, prompts)), request.n, sampling.prompt_logprobs)
            echoed = echoed_prompts(prompts, echoes, request.n)
        choices = [
            Choice(
                index=position * request.n + sample,
                sample=sample,
                token_ids=prompt,
                stops=request.stops,
                special_tokens=special_tokens,
                logprobs=sampling.logprobs is not None,
                echo="" if echoed else echo or "",
                prompt=echoed[position] if echoed else None,
            )
            for position, (prompt, echo) in enumerate(zip(prompts, echoes, strict=True))
            for sample in range(request.n)
        ]
        sampling = msgspec.structs.replace(sampling, max_tokens=max_tokens)
        salt = model.cache_salt(caller)
        return Rendered(prompts, sampling, choices, salt, echoed, new_parser)

    async def _render_prompts(
        self, caller: ApiKey, model: ServedModel, content: Prompts
    ) -> tuple[list[list[int]], list[str | None]]:
        """Return the token ids of raw prompts, and for each the text that its answers echo."""
        # Each prompt is a piece of work of its own, so that other tenants get turns between them.
        rendered = [
            await self._apart(
                caller,
                len(prompt),
                partial(render_prompt, model.text, prompt, path, echo=content.echo),
            )
            for prompt, path in zip(content.prompts, content.paths, strict=True)
        ]
        return [token_ids for token_ids, _ in rendered], [echo for _, echo in rendered]

    async def _apart(
        self, caller: ApiKey, size_bytes: int, render: Callable[[], Coroutine[Any, Any, R]]
    ) -> R:
        """Render a text of about this size: a short one here, a longer one in the text pool."""
        if size_bytes <= SHORT_BYTES:
            return await render()
        return await self._pool.render(caller.tenant, size_bytes, render)

    def _rest(
        self, caller: ApiKey, model: ServedModel, prompt_tokens: int, request: TextRequest
    ) -> int:
        """Return the token bound where the client has set none: the rest of the context.

        It does not exceed what the caller's limits could ever admit, nor what log-probabilities
        there may be; otherwise no request without a bound would pass where that is less.
        """
        rest = model.text.context_length - prompt_tokens
        most_tokens = self._admitter.most_tokens(caller, model.name)
        if most_tokens is not None:
            rest = min(rest, (most_tokens - prompt_tokens) // request.n)
        told = most_told_tokens(request.n, request.sampling.logprobs)
        if told is not None:
            rest = min(rest, told)
        # At least one token, so that a prompt that fills the context is refused for that reason.
        return max(1, rest)

    @asynccontextmanager
    async def _admitted(
        self, caller: ApiKey, exchange: Exchange, most_tokens: int, user: str
    ) -> AsyncIterator[None]:
        """Run the block if the caller's limits admit the request, and settle what it used.

        Raises:
            RateLimitError: they do not admit it; nothing has been spent.
        """
        opening = _opening(caller, exchange, user)
        held = await self._admitter.admit(
            caller, opening, most_tokens, progress=exchange.progress, told=exchange.tell
        )
        self._metrics.added_s.labels(exchange.model).observe(time.monotonic() - exchange.arrived)
        # A client that hangs up, or a draining replica, cancels the block: not an error of ours.
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
            used = exchange.abandoned() if status == "cancelled" else exchange.progress()
            held.settle(
                msgspec.structs.replace(
                    opening,
                    status=status,
                    code=code,
                    prompt_tokens=used.prompt_tokens,
                    cached_tokens=exchange.cached_tokens,
                    completion_tokens=used.completion_tokens,
                    first_token_s=exchange.first_token_s,
                    duration_s=time.monotonic() - exchange.arrived,
                    replica_switches=exchange.replica_switches,
                )
            )

    async def _choose(
        self,
        model: ServedModel,
        exchange: Exchange,
        rendered: Rendered,
        choice: Choice,
        answer: Answer,
    ) -> None:
        """Add one choice to the answer, from its first token to its last."""
        sampling = of_sample(rendered.sampling, choice.sample)
        stopwatch = Stopwatch(self._metrics, model.name, exchange, first_sample=choice.sample == 0)
        parser = rendered.new_parser()
        text = ChoiceText(choice, model.text, parser, answer, exchange, stopwatch.delivered)
        work = Work(
            exchange.request_id,
            exchange.arrived,
            exchange.share,
            choice.token_ids,
            sampling,
            rendered.cache_salt,
        )
        run = model.dispatcher.run(work, text)
        try:
            await run.to_end()
        except TeraError:
            await text.finish()  # what was generated before the error is sent before it
            raise
        else:
            await text.finish()
        finally:
            stopwatch.tell()
            # A client that hung up is charged for what was held back too.
            exchange.completion_tokens += text.held_tokens
            exchange.replica_switches += run.replica_switches
            if run.taken:
                exchange.taken_prompts[choice.index - choice.sample] = len(choice.token_ids)


def _opening(caller: ApiKey, exchange: Exchange, user: str) -> UsageRecord:
    """Return a request's usage record as it is before the request ends."""
    return UsageRecord(
        request_id=exchange.request_id,
        tenant=caller.tenant,
        key_id=caller.key_id,
        model=exchange.model,
        route=exchange.route,
        status="lost",
        started_s=exchange.started_s,
        prompt_tokens=exchange.prompt_tokens,
        user=user,
    )


def _no_parser() -> None:
    """Return None: all of the answer is content."""
