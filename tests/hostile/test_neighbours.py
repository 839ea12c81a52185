"""The dearest requests that are accepted, sent by one tenant while another one asks.

What the other one waits for is counted in pieces of work and in turns, never in seconds.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from benchmarks.hostile_bodies import BODIES
from tests.gateway.conftest import MODEL, Client, Gateway, exchange
from tests.gateway.test_text_pool import ByHand
from tests.hostile.test_bodies import counted_calls
from tests.routing.conftest import until

from tera.gateway.checks import MAX_ECHOED_LOGPROBS, MAX_GENERATED_LOGPROBS
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.echo import SLICE_TOKENS
from tera.gateway.fair_pool import LARGE_BYTES
from tera.gateway.pieces import Piece, PositionLogprobs
from tera.gateway.render import TokenText
from tera.gateway.text_pool import SHORT_BYTES, TextPool
from tera.tenancy.keys import ApiKey

MOST_BYTES = 10 * 1024 * 1024
"""Of a body, by default."""


class Names:
    """An `Authenticator` to whom a key is the name of its tenant."""

    def authenticate(self, authorization: str | None) -> ApiKey:
        name = (authorization or "").removeprefix("Bearer ")
        return ApiKey(f"key_{name}", name, "", "", None, 0.0)


@pytest.fixture
def threads() -> ByHand:
    return ByHand()


@pytest_asyncio.fixture
async def gateway(threads: ByHand) -> AsyncGenerator[Gateway]:
    profile = {"context_tokens": 8192}
    pool = TextPool(executor=threads)
    async with Gateway(keys=Names(), pool=pool, profile=profile) as gateway:
        yield gateway


class Asking:
    """A request under way."""

    def __init__(self, gateway: Gateway, tenant: str, path: str, body: bytes) -> None:
        self.client = Client()
        self.client._arriving.put_nowait({"type": "http.request", "body": body})
        self.task = asyncio.create_task(gateway.request(self.client, "POST", path, tenant))

    @property
    def answered(self) -> bool:
        return self.task.done()

    @property
    def answer(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.client.body)
        return found


def named(body: bytes) -> bytes:
    return body.replace(b'"model":"m"', b'"model":"%b"' % MODEL.encode(), 1)


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "What is it?"}]
    fields = {"model": MODEL, "messages": messages, "max_tokens": 1, **fields}
    return json.dumps(fields, separators=(",", ":")).encode()


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SMALL = chat()
LONG = chat(padding=" " * SHORT_BYTES)

DEAREST = {
    "as many messages as may be": (
        CHAT,
        chat(messages=[{"role": "user", "content": ""}] * 2048),
    ),
    "as many template variables as may be": (CHAT, chat(chat_template_kwargs={"x": [1] * 10**6})),
    "as many token ids as may be": (
        COMPLETIONS,
        named(BODIES["as many token ids as fractions as may be"][1](MOST_BYTES - 100)),
    ),
    "a prompt of the context's size": (
        COMPLETIONS,
        json.dumps({"model": MODEL, "prompt": "a" * (4 * 8192), "max_tokens": 1}).encode(),
    ),
    "many prompts": (
        COMPLETIONS,
        json.dumps({"model": MODEL, "prompt": ["a " * 4000] * 100, "max_tokens": 1}).encode(),
    ),
}


async def flooded(gateway: Gateway, threads: ByHand, name: str) -> list[Asking]:
    """Return a tenant's requests, once the first of them has the one thread that they may have."""
    path, body = DEAREST[name]
    flood = [Asking(gateway, "flood", path, body) for _ in range(3)]
    await until(lambda: len(threads.running) == 1)
    return flood


@pytest.mark.parametrize("name", DEAREST)
async def test_x1_a_flood_of_dear_requests_holds_up_no_short_one(
    gateway: Gateway, threads: ByHand, name: str
) -> None:
    flood = await flooded(gateway, threads, name)
    short = Asking(gateway, "other", CHAT, SMALL)
    await until(lambda: short.answered)
    assert short.client.status == 200
    assert not any(asking.answered for asking in flood)
    for asking in flood:
        asking.client.hang_up()
    await ended(threads, flood)


async def ended(threads: ByHand, asking: list[Asking]) -> None:
    """Let all work come to its end, and with it these requests."""

    def all_ended() -> bool:
        if threads.running:
            threads.end()
        return all(one.answered for one in asking) and not threads.running

    await until(all_ended)


@pytest.mark.parametrize("name", DEAREST)
async def test_x1_a_flood_of_dear_requests_has_one_thread_and_another_tenant_the_other(
    gateway: Gateway, threads: ByHand, name: str
) -> None:
    flood = await flooded(gateway, threads, name)
    other = Asking(gateway, "other", CHAT, LONG)
    pieces = 0
    while not other.answered:
        if len(threads.running) == 2:
            threads.end(1)  # the other's: first its body, then its prompt
            pieces += 1
        await asyncio.sleep(0)
    assert other.client.status == 200
    assert pieces == 2
    assert not any(asking.answered for asking in flood)
    for asking in flood:
        asking.client.hang_up()
    await ended(threads, flood)


async def test_x1_of_two_tenants_with_the_largest_bodies_each_waits_for_one_of_the_other(
    gateway: Gateway, threads: ByHand
) -> None:
    largest = chat(padding=" " * LARGE_BYTES)
    flood = [Asking(gateway, "flood", CHAT, largest) for _ in range(4)]
    await until(lambda: len(threads.running) == 1)
    other = Asking(gateway, "other", CHAT, largest)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(threads.running) == 1, "two at once would take twice the memory"
    await ended(threads, [*flood, other])
    assert {asking.client.status for asking in [*flood, other]} == {200}
    # Of the flood's eight pieces of work, two had their turn before the other's second one.
    first = gateway.fleet.dispatched[0]
    assert dict(other.client.sent[0]["headers"])[b"x-request-id"] == first.request_id.encode()


async def test_s8_work_that_waits_is_dropped_with_its_client(
    gateway: Gateway, threads: ByHand
) -> None:
    flood = [Asking(gateway, "flood", CHAT, LONG) for _ in range(10)]
    await until(lambda: len(threads.running) == 1)
    for asking in flood:
        asking.client.hang_up()
    await until(lambda: all(asking.answered for asking in flood))
    assert all(asking.client.status is None for asking in flood)
    threads.end()
    for _ in range(20):
        await asyncio.sleep(0)
    assert threads.running == [], "nobody waits for the nine others"


async def test_b4_more_text_than_may_wait_is_refused_with_a_time_to_come_again(
    threads: ByHand,
) -> None:
    pool = TextPool(executor=threads, most_waiting_bytes=2 * len(LONG))
    async with Gateway(keys=Names(), pool=pool) as gateway:
        flood = [Asking(gateway, "flood", CHAT, LONG) for _ in range(4)]
        await until(lambda: any(asking.answered for asking in flood))
        [refused] = [asking for asking in flood if asking.answered]
        assert refused.client.status == 429
        assert refused.answer["error"]["code"] == "engine_overloaded"
        assert b"retry-after" in dict(refused.client.sent[0]["headers"])
        await ended(threads, flood)
        assert sorted(asking.client.status or 0 for asking in flood) == [200, 200, 200, 429]


ECHO = {"model": MODEL, "echo": True, "max_tokens": 1, "temperature": 0}


async def test_x1_while_a_prompt_is_echoed_with_log_probabilities_others_have_their_turns(
    gateway: Gateway, threads: ByHand
) -> None:
    prompt, n = [97] * 1000, 8
    body = json.dumps({**ECHO, "prompt": prompt, "n": n, "logprobs": 5}).encode()
    echoing = Asking(gateway, "flood", COMPLETIONS, body)
    await until(lambda: gateway.load.running == 0 and len(gateway.fleet.dispatched) == n)
    answers = 0
    while not echoing.answered:
        short = Asking(gateway, "other", CHAT, SMALL)
        await until(partial(getattr, short, "answered"))
        answers += 1
    assert echoing.client.status == 200
    assert answers > 1
    choices = echoing.answer["choices"]
    assert len(choices) == n
    assert all(choice["logprobs"] == choices[0]["logprobs"] for choice in choices)
    assert len(choices[0]["logprobs"]["tokens"]) == len(prompt) + 1 > SLICE_TOKENS


async def test_x1_the_log_probabilities_of_a_prompt_are_asked_for_once(gateway: Gateway) -> None:
    prompts, n = [[97, 98, 99], [100, 101]], 3
    body = json.dumps({**ECHO, "prompt": prompts, "n": n, "logprobs": 1}).encode()
    asking = Asking(gateway, "flood", COMPLETIONS, body)
    await until(lambda: asking.answered)
    asked = [each.sampling.prompt_logprobs for each in gateway.fleet.dispatched]
    assert sorted(asked, key=str) == [1, 1, None, None, None, None]
    assert asking.answer["usage"]["prompt_tokens"] == 5
    for choice, prompt in zip(
        asking.answer["choices"], [prompts[0]] * n + [prompts[1]] * n, strict=True
    ):
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1


async def test_x1_more_log_probabilities_of_prompts_than_fit_an_answer_are_refused(
    gateway: Gateway,
) -> None:
    per_token = 128 * 6
    most = MAX_ECHOED_LOGPROBS // per_token
    for tokens, status in ((most, 200), (most + 1, 400)):
        body = json.dumps({**ECHO, "prompt": [97] * tokens, "n": 128, "logprobs": 5}).encode()
        asking = Asking(gateway, "flood", COMPLETIONS, body)
        await until(partial(getattr, asking, "answered"))
        assert asking.client.status == status
    error = asking.answer["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "echo")
    assert str(MAX_ECHOED_LOGPROBS) in error["message"]


LOGPROBS: dict[str, tuple[dict[str, Any], str, int]] = {
    CHAT: ({"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}, "top_logprobs", 20),
    COMPLETIONS: ({"prompt": "Hi"}, "logprobs", 5),
}


@pytest.mark.parametrize("path", LOGPROBS)
async def test_x1_more_log_probabilities_than_a_gateway_can_hold_are_refused(
    gateway: Gateway, path: str
) -> None:
    fields, asks, likeliest = LOGPROBS[path]
    most = MAX_GENERATED_LOGPROBS // (128 * (likeliest + 1))
    for max_tokens, status in ((most, 200), (most + 1, 400)):
        asked = {"model": MODEL, **fields, asks: likeliest, "n": 128, "max_tokens": max_tokens}
        asking = Asking(gateway, "flood", path, json.dumps(asked).encode())
        await until(partial(getattr, asking, "answered"))
        assert asking.client.status == status
    error = asking.answer["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "logprobs")
    assert str(MAX_GENERATED_LOGPROBS) in error["message"]


async def test_x1_a_chat_without_a_bound_gets_as_many_tokens_as_it_may_have_log_probabilities(
    gateway: Gateway,
) -> None:
    fields = {"logprobs": True, "top_logprobs": 20, "n": 8, "max_tokens": None}
    asking = Asking(gateway, "flood", CHAT, chat(**fields))
    await until(lambda: asking.answered)
    assert asking.client.status == 200
    asked = {each.sampling.max_tokens for each in gateway.fleet.dispatched}
    assert asked == {MAX_GENERATED_LOGPROBS // (8 * 21)}


@pytest.mark.parametrize("path", LOGPROBS)
async def test_x1_the_log_probabilities_of_a_whole_answer_are_encoded_as_they_come(
    path: str,
) -> None:
    fields, asks, likeliest = LOGPROBS[path]
    kind = ChatQuestion if path == CHAT else CompletionQuestion
    answer = kind({"model": MODEL, **fields, asks: likeliest}).whole(exchange())
    token = TokenText(" a", b" a")
    position = PositionLogprobs(token, -1.0, [(token, -1.0)] * likeliest)
    for _ in range(1000):
        answer.add(Piece(0, " a", logprobs=[position]))
    with counted_calls() as calls:
        body = answer.body()
    assert calls() < 100, "nothing is left to be done for each entry"
    assert len(body) > 1000 * likeliest
