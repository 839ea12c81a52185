"""What the dearest requests that are accepted cost another tenant of the same gateway replica.

One tenant sends six at once, and another one a short chat each few milliseconds. Both are parsed
and rendered as in the gateway, with the demo model's tokenizer and template. Time is counted in the
CPU of this process, which a machine that is busy otherwise does not make longer.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from pydantic import JsonValue

from benchmarks.hostile_bodies import BODIES
from tera.config.environment import set_environment
from tera.gateway.checks import MAX_ECHOED_LOGPROBS
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.echo import EchoedPrompt
from tera.gateway.exchange import Exchange
from tera.gateway.grammars import Grammars
from tera.gateway.parsing import RequestParser
from tera.gateway.request import Conversation
from tera.gateway.text_pool import SHORT_BYTES, TextPool
from tera.gateway.vllm_text import VllmTextModel
from tera.generation import TokenDelta, TokenLogprobs

MOST_BYTES = 10 * 1024 * 1024 - 100
CONTEXT_TOKENS = 131_072
AT_ONCE = 6
GOAL_STALL_S = 0.02


class Felt(msgspec.Struct, frozen=True):
    """What another tenant felt of requests of one kind, in seconds of CPU."""

    each_s: float
    """What one of them took."""
    stall_s: float
    """The longest time that the event loop stood still."""
    waited_s: float
    """The longest time that one of the other's requests took."""


def _chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "What is it?"}]
    return json.dumps(
        {"model": "m", "messages": messages, **fields}, separators=(",", ":")
    ).encode()


_EMPTY = {"role": "user", "content": ""}
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {f"p{number}": {"type": "string"} for number in range(30)},
        },
    },
}
_PROSE = " ".join(f"word{number % 997} river" for number in range(30_000))

KINDS: dict[str, tuple[type[Any], bytes]] = {
    "as many empty messages as may be": (ChatQuestion, _chat(messages=[_EMPTY] * 2048)),
    "short, of as many messages as fit": (ChatQuestion, _chat(messages=[_EMPTY] * 270)),
    "a million values for the template": (
        ChatQuestion,
        _chat(chat_template_kwargs={"x": [1] * 1_000_000}),
    ),
    "as many tools as may be": (ChatQuestion, _chat(tools=[_TOOL] * 128, tool_choice="none")),
    "a prompt of the context's size": (
        ChatQuestion,
        _chat(messages=[{"role": "user", "content": _PROSE}]),
    ),
    "a million huge fractions": (
        CompletionQuestion,
        BODIES["as many huge fractions as may be"][1](MOST_BYTES),
    ),
    "a million token ids": (
        CompletionQuestion,
        BODIES["as many token ids as fractions as may be"][1](MOST_BYTES),
    ),
}
ECHO = "an echoed prompt's log-probabilities"
_ECHO_LOGPROBS = 5
_ECHO_TOKENS = MAX_ECHOED_LOGPROBS // (1 + _ECHO_LOGPROBS)


class _Gateway:
    """The part of a gateway replica that is work on text."""

    def __init__(self, model: VllmTextModel) -> None:
        self.model = model
        self.pool = TextPool()
        self._parser = RequestParser(self.pool)

    async def ask(self, tenant: str, kind: type[Any], body: bytes) -> None:
        """Parse and render a request."""
        question = await self._parser.parse(tenant, kind, body)
        content = question.request.content
        if not isinstance(content, Conversation):
            return
        render = partial(self.model.render_chat, content)
        if len(body) <= SHORT_BYTES:
            await render()
        else:
            await self.pool.render(tenant, len(body), render)

    async def echo(self) -> None:
        """Tell a prompt's log-probabilities, as large as an answer may have them."""
        ids = [1000 + number % 20_000 for number in range(_ECHO_TOKENS)]
        top = [(token_id, -1.0) for token_id in range(2000, 2000 + _ECHO_LOGPROBS)]
        found = [TokenLogprobs(token_id, -1.0, top) for token_id in ids]
        body = {"model": "m", "prompt": "a", "echo": True, "logprobs": _ECHO_LOGPROBS}
        exchange = Exchange("r", "", 0.0, 0.0, _unused)
        answer = CompletionQuestion(body).whole(exchange)
        prompt = EchoedPrompt("", ids, range(1))
        prompt.take(TokenDelta(1, [5], None, 0, None, [None, *found[1:]]))
        await prompt.tell(self.model, answer)
        answer.body()


async def _unused(message: object) -> None:
    raise AssertionError("nothing is sent here")


async def _felt(gateway: _Gateway, dear: Callable[[], Awaitable[None]]) -> Felt:
    """Return what another tenant feels of `AT_ONCE` dear requests at once."""
    small, over = _chat(), asyncio.Event()
    stalls, waits = [0.0], [0.0]

    async def beat() -> None:
        before = time.process_time()
        while not over.is_set():
            await asyncio.sleep(0.001)
            now = time.process_time()
            stalls.append(now - before)
            before = now

    async def other() -> None:
        while not over.is_set():
            began = time.process_time()
            await gateway.ask("other", ChatQuestion, small)
            waits.append(time.process_time() - began)
            await asyncio.sleep(0.002)

    beside = [asyncio.create_task(beat()), asyncio.create_task(other())]
    await asyncio.sleep(0.1)
    stalls[:], waits[:] = [0.0], [0.0]
    began = time.process_time()
    await asyncio.gather(*(dear() for _ in range(AT_ONCE)))
    each_s = (time.process_time() - began) / AT_ONCE
    over.set()
    await asyncio.gather(*beside)
    return Felt(each_s, max(stalls), max(waits))


async def _measured(model_path: str) -> dict[str, Felt]:
    args: dict[str, JsonValue] = {"max_model_len": CONTEXT_TOKENS, "dtype": "bfloat16"}
    grammars = Grammars()
    gateway = _Gateway(VllmTextModel.load(model_path, args, grammars))
    await gateway.ask("other", ChatQuestion, _chat())  # the first one compiles the template
    gc.collect()
    gc.freeze()  # as a gateway does once it has its models
    found = {}
    for name, (kind, body) in KINDS.items():
        found[name] = await _felt(gateway, partial(gateway.ask, "dear", kind, body))
    found[ECHO] = await _felt(gateway, gateway.echo)
    gateway.pool.close()
    grammars.close()
    return found


def main(model_path: str) -> None:
    """Print what is felt of each kind as JSON."""
    set_environment({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, keep_existing=True)
    set_environment({"VLLM_LOGGING_LEVEL": "ERROR"}, keep_existing=True)
    set_environment({"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, keep_existing=True)
    sys.stdout.write(msgspec.json.encode(asyncio.run(_measured(model_path))).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
