"""The way of a request through catalog, dispatch and text, over a simulated engine."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.gateway.conftest import CALLER, CONTEXT_TOKENS, MODEL, Client, Gateway, exchange
from tests.routing.conftest import until

from tera.contract.chat_answers import ToolCallDelta
from tera.errors import BackendFailureError, ContextLengthError, ModelNotFoundError
from tera.gateway.all_or_none import all_or_none
from tera.gateway.catalog import Catalog
from tera.gateway.dialects.base import Unblocked
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.exchange import Exchange
from tera.gateway.pieces import Piece
from tera.gateway.render import AnswerPiece, RenderedChat
from tera.gateway.request import Conversation, TextRequest
from tera.gateway.simulated_text import SimulatedTextModel

PROMPT = "Once upon a time"
ENDLESS = {"logit_bias": {"256": -100}}
"""The model does not end its text by itself."""


def completion(prompt: Any = PROMPT, **fields: Any) -> TextRequest:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
    return CompletionQuestion(body).request


def chat(**fields: Any) -> TextRequest:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, **fields}
    return ChatQuestion(body).request


@dataclass
class Told(Unblocked):
    """What came of one request."""

    exchange: Exchange = field(default_factory=exchange)
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        assert piece.index not in self.finishes, "nothing follows the end of a choice"
        self.texts[piece.index] = self.texts.get(piece.index, "") + piece.content
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self.finishes[piece.index] = piece.finish_reason

    @property
    def completion_tokens(self) -> int:
        return self.exchange.completion_tokens


async def told(gateway: Gateway, request: TextRequest) -> Told:
    told = Told()
    await gateway.pipeline.generate(CALLER, request, told.exchange, told)
    return told


@pytest.fixture
def catalog(gateway: Gateway) -> Catalog:
    catalog = Catalog()
    models = [
        gateway.model("one", "sim/one", ("sim", "latest")),
        gateway.model("two", "Sim/Two"),
    ]
    catalog.replace({model.name: model for model in models})
    return catalog


@pytest.mark.parametrize(
    ("client_name", "name"),
    [
        pytest.param("sim/one", "one", id="id"),
        pytest.param("latest", "one", id="alias"),
        pytest.param("Sim/Two", "two", id="the other"),
    ],
)
def test_m3_a_model_is_found_by_its_id_and_its_aliases(
    catalog: Catalog, client_name: str, name: str
) -> None:
    assert catalog.find(CALLER, client_name).name == name


@pytest.mark.parametrize("client_name", ["sim/Two", "sim/two", "one", "two", "", "sim/one/"])
def test_m3_no_other_name_finds_one(catalog: Catalog, client_name: str) -> None:
    with pytest.raises(ModelNotFoundError) as unknown:
        catalog.find(CALLER, client_name)
    assert unknown.value.param == "model"
    assert f"`{client_name}`" in unknown.value.message


@pytest.mark.parametrize(
    ("allowed", "visible"),
    [
        pytest.param(None, ["one", "two"], id="all"),
        pytest.param(("Sim/Two",), ["two"], id="an id"),
        pytest.param(("latest",), ["one"], id="an alias"),
        pytest.param(("Sim/Two", "sim"), ["one", "two"], id="in the catalog's order"),
        pytest.param(("one",), [], id="no short name"),
        pytest.param((), [], id="none"),
    ],
)
def test_m1_a_caller_sees_what_its_key_allows(
    catalog: Catalog, allowed: tuple[str, ...] | None, visible: list[str]
) -> None:
    caller = replace(CALLER, models=allowed)
    assert [model.name for model in catalog.visible_to(caller)] == visible
    for name, model_id in (("one", "sim/one"), ("two", "Sim/Two")):
        if name in visible:
            assert catalog.find(caller, model_id).name == name
        else:
            hidden, unknown = (
                _refusal(catalog, caller, client_name) for client_name in (model_id, "no/model")
            )
            assert hidden.replace(model_id, "no/model") == unknown


def _refusal(catalog: Catalog, caller: Any, client_name: str) -> str:
    with pytest.raises(ModelNotFoundError) as refused:
        catalog.find(caller, client_name)
    return refused.value.message


def test_a_catalog_is_replaced_whole(catalog: Catalog, gateway: Gateway) -> None:
    catalog.replace({"three": gateway.model("three", "sim/three")})
    assert list(catalog.models) == ["three"]
    assert catalog.find(CALLER, "sim/three").name == "three"
    for gone in ("sim/one", "latest", "Sim/Two"):
        with pytest.raises(ModelNotFoundError):
            catalog.find(CALLER, gone)


async def test_c4_choices_stand_in_the_order_of_prompts_and_samples(gateway: Gateway) -> None:
    request = completion(["One", "Two"], n=2, seed=3, temperature=1, max_tokens=12)
    found = await told(gateway, request)
    assert sorted(found.texts) == [0, 1, 2, 3]
    assert set(found.finishes.values()) == {"length"}
    assert len(set(found.texts.values())) == 4
    for index, prompt in ((0, "One"), (2, "Two")):
        alone = await told(gateway, completion(prompt, seed=3, temperature=1, max_tokens=12))
        assert alone.texts == {0: found.texts[index]}


async def test_c5_usage_counts_each_prompt_once_and_every_choice(gateway: Gateway) -> None:
    found = await told(gateway, completion(["One", "Two!"], n=3, max_tokens=5))
    sent = gateway.fleet.dispatched
    assert len(sent) == 6
    usage = found.exchange.usage()
    assert usage.prompt_tokens == sum(len(generation.token_ids) for generation in sent[::3])
    assert usage.completion_tokens == 2 * 3 * 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_h1_an_error_of_the_request_comes_before_any_work(gateway: Gateway) -> None:
    with pytest.raises(ContextLengthError):
        await told(gateway, completion(["fits", "word " * CONTEXT_TOKENS]))
    assert gateway.fleet.dispatched == []
    assert gateway.admitter.settled == []
    assert gateway.admitter.running == {}


async def tokens(gateway: Gateway, **fields: Any) -> list[bytes]:
    """Return the bytes of each token of a completion."""
    found = await told(gateway, completion(logprobs=0, **fields))
    return [entry.token.data for piece in found.pieces for entry in piece.logprobs or ()]


@pytest.mark.parametrize("prompts", [1, 3])
async def test_c2_a_stop_string_ends_text_count_and_work(gateway: Gateway, prompts: int) -> None:
    whole = (await told(gateway, completion(max_tokens=400))).texts[0]
    stop = whole[100:108]
    request = completion([PROMPT] * prompts, max_tokens=400, stop=["\0", stop])
    found = await told(gateway, request)
    assert found.texts == dict.fromkeys(range(prompts), whole[: whole.index(stop)])
    assert set(found.finishes.values()) == {"stop"}
    # What counts is the tokens up to the one that completes the stop string.
    data = await tokens(gateway, max_tokens=400)
    completes = next(count for count in range(len(data)) if stop.encode() in b"".join(data[:count]))
    assert found.completion_tokens == prompts * completes
    await gateway.wait_until_idle()


async def test_s4_what_a_stop_string_held_back_comes_at_the_end(gateway: Gateway) -> None:
    whole = (await told(gateway, completion(max_tokens=30))).texts[0]
    never = whole[-4:] + "\0"
    found = await told(gateway, completion(max_tokens=30, stop=[never]))
    assert found.texts == {0: whole}
    assert found.finishes == {0: "length"}


@pytest.mark.parametrize("prompts", [[PROMPT], ["One", "Two", "Three"]], ids=["one", "several"])
async def test_s8_cancelling_stops_the_engine(prompts: list[str]) -> None:
    async with Gateway(profile={"decode_step_s": 0.001}) as gateway:
        found = Told()
        request = completion(prompts, max_tokens=2000, **ENDLESS)
        running = asyncio.create_task(
            gateway.pipeline.generate(CALLER, request, found.exchange, found)
        )
        await until(lambda: len(found.pieces) > 5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        said = len(found.pieces)
        await gateway.wait_until_idle()
        assert len(found.pieces) == said
        assert found.completion_tokens < 2000


async def test_c6_one_failed_prompt_fails_the_request_and_stops_the_rest() -> None:
    async with Gateway(profile={"decode_step_s": 0.001}) as gateway:
        request = completion(["One", "FAULT", "Three"], max_tokens=2000, **ENDLESS)
        with pytest.raises(BackendFailureError):
            await told(gateway, request)
        await gateway.wait_until_idle()


async def test_b2_a_death_at_any_token_leaves_text_and_usage_as_they_were(
    gateway: Gateway,
) -> None:
    request = completion(max_tokens=50)
    whole = await told(gateway, request)
    spelled = [character for character in whole.texts[0] if ord(character) > 127]
    assert spelled  # so some of the cuts are inside of a character
    for cut in range(50):
        async with Gateway([cut]) as flaky:
            found = await told(flaky, request)
            await flaky.wait_until_idle()
        assert found.texts == whole.texts, cut
        assert found.finishes == whole.finishes, cut
        assert found.completion_tokens == 50, cut
        assert found.exchange.prompt_tokens == whole.exchange.prompt_tokens, cut
        assert found.exchange.replica_switches == 1, cut
        assert not any("\ufffd" in piece.content for piece in found.pieces), cut


CALLS = [ToolCallDelta(index=index, id=f"call_{index}") for index in range(2)]


class CallingText(SimulatedTextModel):
    """A model with tools, whose every answer calls two of them in its last piece."""

    async def render_chat(self, conversation: Conversation) -> RenderedChat:
        return RenderedChat(await self.encode(PROMPT))

    def answer_parser(self, conversation: Conversation, rendered: RenderedChat) -> Any:
        return self

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        return AnswerPiece(reasoning=text, tool_calls=CALLS if finished else ())


async def test_t2_an_answer_goes_through_the_models_own_parser() -> None:
    request = chat(max_tokens=5, n=2, tools=[{"type": "function", "function": {"name": "get"}}])
    async with Gateway(text=CallingText) as gateway:
        found = await told(gateway, request)
    assert found.texts == {0: "", 1: ""}
    for index in range(2):
        *others, last = [piece for piece in found.pieces if piece.index == index]
        assert last.tool_calls == CALLS
        assert not any(piece.tool_calls for piece in others)
        assert any(piece.reasoning for piece in others)


async def test_t4_a_chat_answer_survives_a_death_too(gateway: Gateway) -> None:
    request = chat(n=2, max_tokens=30)
    whole = await told(gateway, request)
    async with Gateway([7, 3]) as flaky:
        found = await told(flaky, request)
    assert found.texts == whole.texts
    assert found.completion_tokens == 2 * 30


async def test_s8_a_client_that_goes_away_stops_the_engine() -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2000, "stream": True, **ENDLESS}
    async with Gateway(profile={"decode_step_s": 0.001}) as gateway:
        client = Client(body)
        posting = asyncio.create_task(gateway.post(client))
        await until(lambda: client.body.count(b"data: ") > 3)
        client.hang_up()
        await posting
        await gateway.wait_until_idle()
    assert client.status == 200
    assert b"[DONE]" not in client.body


@pytest.mark.parametrize("stream", [True, False])
async def test_s8_a_client_that_goes_away_before_the_first_token_stops_the_engine(
    stream: bool,
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "stream": stream}
    async with Gateway(profile={"decode_step_s": 3600.0}) as gateway:
        client = Client(body)
        posting = asyncio.create_task(gateway.post(client))
        await until(lambda: gateway.load.running == 1)
        client.hang_up()
        await posting
        await gateway.wait_until_idle()
        lost = gateway.metrics.exposition()
    assert client.sent == []
    assert 'status="499"' in lost


class Work:
    """Work that ends as it is told, and knows whether it was stopped."""

    def __init__(self, error: Exception | None = None, *, hangs: bool = False) -> None:
        self._error, self._hangs = error, hangs
        self.ended = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
            if self._hangs:
                await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)  # stopping may have to wait, as for an engine
            self.ended = True


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_all_work_is_run_to_its_end(count: int) -> None:
    several = [Work() for _ in range(count)]
    await all_or_none([each.run() for each in several])
    assert all(each.ended for each in several)


@pytest.mark.parametrize("others", [0, 1, 3])
@pytest.mark.parametrize("at", ["first", "last"])
async def test_c6_the_first_error_stops_all_work(others: int, at: str) -> None:
    error = BackendFailureError("The engines failed.")
    rest = [Work(hangs=True) for _ in range(others)]
    several = [Work(error), *rest] if at == "first" else [*rest, Work(error)]
    with pytest.raises(BackendFailureError) as raised:
        await all_or_none([each.run() for each in several])
    assert raised.value is error
    assert all(each.ended for each in several)


async def test_c6_of_two_errors_at_once_one_is_raised_and_none_is_forgotten() -> None:
    errors = [BackendFailureError("One."), BackendFailureError("Two.")]
    with pytest.raises(BackendFailureError) as raised:
        await all_or_none([Work(error).run() for error in errors])
    assert raised.value in errors


@pytest.mark.parametrize("count", [1, 3])
async def test_s8_cancelling_who_waits_stops_all_work(count: int) -> None:
    several = [Work(hangs=True) for _ in range(count)]
    waiting = asyncio.create_task(all_or_none([each.run() for each in several]))
    for _ in range(10):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert all(each.ended for each in several)
