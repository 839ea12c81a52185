"""The way of a request through catalog, dispatch and text, over a simulated engine."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.gateway.conftest import CALLER, CONTEXT_TOKENS, MODEL, Client, Gateway
from tests.routing.conftest import until

from tera.contract.chat import ChatRequest, ToolCallDelta
from tera.contract.common import Usage, parse_request
from tera.contract.completions import CompletionRequest
from tera.engine.simulated_vocabulary import Vocabulary
from tera.errors import BackendFailureError, ContextLengthError, ModelNotFoundError
from tera.gateway.call import Call, ChatDelta, ChoiceDelta
from tera.gateway.catalog import Catalog
from tera.gateway.pipeline import merged
from tera.gateway.render import AnswerPiece, RenderedChat
from tera.gateway.simulated_text import SimulatedTextModel

PROMPT = "Once upon a time"


def completion(prompt: Any = PROMPT, **fields: Any) -> CompletionRequest:
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
    return parse_request(CompletionRequest, body)


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": MODEL, "messages": messages, "temperature": 0, **fields}
    return parse_request(ChatRequest, body)


@dataclass
class Told:
    """What came of one request."""

    call: Call
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    """Of completions."""
    pieces: list[str] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return self.call.usage()

    def add(self, delta: ChoiceDelta | ChatDelta) -> None:
        text = delta.text if isinstance(delta, ChoiceDelta) else delta.piece.content
        assert delta.index not in self.finishes
        self.texts[delta.index] = self.texts.get(delta.index, "") + text
        self.pieces.append(text)
        if isinstance(delta, ChoiceDelta):
            self.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.finishes[delta.index] = delta.finish_reason


async def completed(gateway: Gateway, request: CompletionRequest) -> Told:
    told = Told(gateway.call())
    async with aclosing(gateway.pipeline.complete(CALLER, request, told.call)) as deltas:
        async for delta in deltas:
            told.add(delta)
    return told


async def chatted(gateway: Gateway, request: ChatRequest) -> tuple[Told, list[ChatDelta]]:
    told, found = Told(gateway.call()), []
    async with aclosing(gateway.pipeline.chat(CALLER, request, told.call)) as deltas:
        async for delta in deltas:
            told.add(delta)
            found.append(delta)
    return told, found


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
    told = await completed(gateway, request)
    assert sorted(told.texts) == [0, 1, 2, 3]
    assert set(told.finishes.values()) == {"length"}
    assert len(set(told.texts.values())) == 4
    for index, prompt in ((0, "One"), (2, "Two")):
        alone = await completed(gateway, completion(prompt, seed=3, temperature=1, max_tokens=12))
        assert alone.texts == {0: told.texts[index]}


async def test_c5_usage_counts_each_prompt_once_and_every_choice(gateway: Gateway) -> None:
    told = await completed(gateway, completion(["One", "Two!"], n=3, max_tokens=5))
    prompts = [len(generation.token_ids) for generation in gateway.handle.dispatched[::3]]
    assert len(gateway.handle.dispatched) == 6
    assert told.usage.prompt_tokens == sum(prompts)
    assert told.usage.completion_tokens == 2 * 3 * 5
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens


async def test_h1_an_error_of_the_request_comes_before_any_work(gateway: Gateway) -> None:
    with pytest.raises(ContextLengthError):
        await completed(gateway, completion(["fits", "word " * CONTEXT_TOKENS]))
    assert gateway.handle.dispatched == []


@pytest.mark.parametrize("prompts", [1, 3])
async def test_c2_a_stop_string_ends_text_count_and_work(gateway: Gateway, prompts: int) -> None:
    whole = (await completed(gateway, completion(max_tokens=400))).texts[0]
    stop = whole[100:108]
    request = completion([PROMPT] * prompts, max_tokens=400, stop=["\0", stop])
    told = await completed(gateway, request)
    ended = whole[: whole.index(stop)]
    assert told.texts == dict.fromkeys(range(prompts), ended)
    assert set(told.finishes.values()) == {"stop"}
    # What counts is the tokens up to the one that completes the stop string.
    *before, last = told.token_ids[0]
    assert stop not in Vocabulary().decode(before)
    assert stop in Vocabulary().decode([*before, last])
    assert told.usage.completion_tokens == prompts * len(told.token_ids[0])
    await gateway.wait_until_idle()


async def test_s4_what_a_stop_string_held_back_comes_at_the_end(gateway: Gateway) -> None:
    whole = (await completed(gateway, completion(max_tokens=30))).texts[0]
    never = whole[-4:] + "\0"
    told = await completed(gateway, completion(max_tokens=30, stop=[never]))
    assert told.texts == {0: whole}
    assert told.finishes == {0: "length"}


@pytest.mark.parametrize("prompts", [[PROMPT], ["One", "Two", "Three"]], ids=["one", "several"])
async def test_s8_closing_stops_the_engine(prompts: list[str]) -> None:
    async with Gateway(profile={"decode_step_s": 0.001}) as gateway:
        call = gateway.call()
        request = completion(prompts, max_tokens=2000, logit_bias={"256": -100})
        deltas = gateway.pipeline.complete(CALLER, request, call)
        await anext(deltas)
        await deltas.aclose()
        await gateway.wait_until_idle()
        assert call.completion_tokens < 2000
        assert not call.attempts.inboxes


async def test_c6_one_failed_prompt_fails_the_request_and_stops_the_rest() -> None:
    async with Gateway(profile={"decode_step_s": 0.001}) as gateway:
        request = completion(["One", "FAULT", "Three"], max_tokens=2000, logit_bias={"256": -100})
        with pytest.raises(BackendFailureError):
            await completed(gateway, request)
        await gateway.wait_until_idle()


async def test_b2_a_death_at_any_token_leaves_text_and_usage_as_they_were(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tera.routing.dispatch.FIRST_BACKOFF_S", 0.001)
    request = completion(max_tokens=50)
    whole = await completed(gateway, request)
    spelled = [character for character in whole.texts[0] if ord(character) > 127]
    assert spelled  # so some of the cuts are inside of a character
    for cut in range(50):
        async with Gateway([cut]) as flaky:
            told = await completed(flaky, request)
        assert told.texts == whole.texts, cut
        assert told.finishes == whole.finishes, cut
        assert told.usage.completion_tokens == 50, cut
        assert told.usage.prompt_tokens == whole.usage.prompt_tokens, cut
        assert not any("\ufffd" in piece for piece in told.pieces), cut


CALLS = [ToolCallDelta(index=index, id=f"call_{index}") for index in range(2)]


class CallingText(SimulatedTextModel):
    """A model with tools, whose every answer calls two of them in its last piece."""

    async def render_chat(self, request: ChatRequest) -> RenderedChat:
        return RenderedChat(await self.encode(PROMPT))

    def answer_parser(self, request: ChatRequest, rendered: RenderedChat) -> Any:
        return self

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        return AnswerPiece(tool_calls=CALLS if finished else ())


TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get"}}


@pytest.mark.parametrize(
    ("fields", "finish", "calls"),
    [
        pytest.param({}, "tool_calls", [0, 1], id="chosen by the model"),
        pytest.param({"tool_choice": "required"}, "tool_calls", [0, 1], id="required"),
        pytest.param({"tool_choice": NAMED}, "stop", [0, 1], id="named by the client"),
        pytest.param({"parallel_tool_calls": False}, "tool_calls", [0], id="one at most"),
        pytest.param({"max_tokens": 2}, "length", [0, 1], id="cut"),
    ],
)
async def test_t2_calls_of_tools_are_why_an_answer_ends(
    fields: dict[str, Any], finish: str, calls: list[int]
) -> None:
    async with Gateway(text=CallingText) as gateway:
        told, deltas = await chatted(gateway, chat(tools=[TOOL], **fields))
    assert told.finishes == {0: finish}
    assert [call.index for delta in deltas for call in delta.piece.tool_calls] == calls


async def test_t4_a_chat_answer_survives_a_death_too(gateway: Gateway) -> None:
    request = chat(n=2, max_tokens=30)
    whole, _ = await chatted(gateway, request)
    async with Gateway([7, 3]) as flaky:
        told, _ = await chatted(flaky, request)
    assert told.texts == whole.texts
    assert told.usage.completion_tokens == 2 * 30


async def test_s8_a_client_that_goes_away_stops_the_engine() -> None:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 2000,
        "stream": True,
        "logit_bias": {"256": -100},
    }
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


class Numbers:
    """A generator that counts, as far as it may, and knows whether it was closed."""

    def __init__(self, *numbers: int, error: Exception | None = None, hangs: bool = False) -> None:
        self._numbers, self._error, self._hangs = numbers, error, hangs
        self.closed = False

    async def stream(self) -> AsyncGenerator[int]:
        try:
            for number in self._numbers:
                yield number
                await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
            if self._hangs:
                await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)  # closing may have to wait, as for an engine
            self.closed = True


async def read(*sources: Numbers, into: list[int]) -> None:
    async with aclosing(merged([source.stream() for source in sources])) as numbers:
        async for number in numbers:
            into.append(number)


@pytest.mark.parametrize("sources", [1, 2, 5])
async def test_merged_items_keep_each_generators_order(sources: int) -> None:
    several = [Numbers(*range(at * 10, at * 10 + at + 3)) for at in range(sources)]
    found: list[int] = []
    await read(*several, into=found)
    for at in range(sources):
        own = [number for number in found if number // 10 == at]
        assert own == list(range(at * 10, at * 10 + at + 3))
    assert len(found) == sum(at + 3 for at in range(sources))
    assert all(source.closed for source in several)


async def test_merged_items_do_not_wait_for_slower_generators() -> None:
    slow, fast = Numbers(hangs=True), Numbers(1, 2)
    async with aclosing(merged([slow.stream(), fast.stream()])) as numbers:
        assert [await anext(numbers), await anext(numbers)] == [1, 2]
    assert slow.closed


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_c6_the_first_error_closes_all_generators(others: int) -> None:
    error = BackendFailureError("The engines failed.")
    failing = Numbers(1, 2, error=error)
    rest = [Numbers(3, 4, hangs=True) for _ in range(others)]
    found: list[int] = []
    with pytest.raises(BackendFailureError) as raised:
        await read(*rest, failing, into=found)
    assert raised.value is error
    assert {1, 2} <= set(found)
    assert failing.closed
    assert all(each.closed for each in rest)


@pytest.mark.parametrize("sources", [1, 3])
async def test_s8_closing_what_is_merged_closes_all_generators(sources: int) -> None:
    several = [Numbers(1, hangs=True) for _ in range(sources)]
    numbers = merged([each.stream() for each in several])
    assert await anext(numbers) == 1
    await numbers.aclose()
    assert all(each.closed for each in several)


@pytest.mark.parametrize("sources", [1, 3])
async def test_s8_cancelling_who_reads_closes_all_generators(sources: int) -> None:
    several = [Numbers(hangs=True) for _ in range(sources)]
    reading = asyncio.create_task(read(*several, into=[]))
    for _ in range(10):
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert all(each.closed for each in several)
