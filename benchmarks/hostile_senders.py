"""One tenant's attacks, sent at full speed; each runs in a process of its own.

`python -m benchmarks.hostile_senders NAME PORT KEY SECONDS` prints what was sent, as JSON.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import uvloop

from benchmarks.hostile_bodies import BODIES
from tera.gateway.checks import MAX_ECHOED_LOGPROBS, MAX_GENERATED_LOGPROBS

MODEL = "simulated"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CLIENTS = 6
"""At once, so that the text pool always has the next one."""
MOST_BYTES = 10 * 1024 * 1024 - 100


class Attack(msgspec.Struct, frozen=True):
    """What is sent, again and again."""

    path: str
    body: Callable[[], bytes]
    reads: bool = True
    """Whether answers are read; otherwise the client hangs up as soon as it has asked."""
    clients: int = CLIENTS


class Sent(msgspec.Struct, frozen=True):
    """What came of an attack."""

    requests: int
    by_status: dict[str, int]


def _dear(name: str) -> Callable[[], bytes]:
    return lambda: BODIES[name][1](MOST_BYTES).replace(b'"model":"m"', b'"model":"simulated"', 1)


def _completion(**fields: object) -> Callable[[], bytes]:
    return lambda: json.dumps({"model": MODEL, "max_tokens": 1, **fields}).encode()


ATTACKS: dict[str, Attack] = {
    "bodies of huge fractions": Attack(COMPLETIONS, _dear("as many huge fractions as may be")),
    "bodies of token ids": Attack(COMPLETIONS, _dear("as many token ids as fractions as may be")),
    "bodies of zeros as messages": Attack(CHAT, _dear("messages of zeros")),
    "as many messages as may be": Attack(CHAT, _dear("as many messages as may be")),
    "prompts that cannot fit": Attack(COMPLETIONS, _completion(prompt="1234567890" * 10**6)),
    "echoed log-probabilities": Attack(
        COMPLETIONS,
        _completion(prompt=[97] * (MAX_ECHOED_LOGPROBS // (128 * 6)), n=128, echo=True, logprobs=5),
    ),
    "log-probabilities of long answers": Attack(
        COMPLETIONS,
        _completion(prompt="a", n=32, logprobs=5, max_tokens=MAX_GENERATED_LOGPROBS // (32 * 6)),
    ),
    "streams that are hung up on": Attack(
        COMPLETIONS, _completion(prompt="a", n=128, max_tokens=500, stream=True), reads=False
    ),
    "short requests": Attack(COMPLETIONS, _completion(prompt="a"), clients=32),
}
"""By name."""


async def _send(attack: Attack, request: bytes, port: int, until: float) -> Counter[str]:
    answers: Counter[str] = Counter()
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                while time.monotonic() < until:
                    writer.write(request)
                    answers[await _answer(reader, attack)] += 1
                    if not attack.reads:
                        break
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            answers["closed"] += 1
    return answers


async def _answer(reader: asyncio.StreamReader, attack: Attack) -> str:
    """Return the status of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status = head.split()[1]
    if attack.reads:
        length = head.partition("content-length: ")[2].partition("\r\n")[0]
        await reader.readexactly(int(length))
    return status


async def _attack(name: str, port: int, api_key: str, seconds: float) -> Sent:
    attack = ATTACKS[name]
    body = attack.body()
    head = (
        f"POST {attack.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {api_key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    request, until = head.encode() + body, time.monotonic() + seconds
    sending = [
        asyncio.create_task(_send(attack, request, port, until)) for _ in range(attack.clients)
    ]
    done, late = await asyncio.wait(sending, timeout=seconds + 30)
    for task in late:
        task.cancel()
    answers = sum((task.result() for task in done), Counter[str]())
    return Sent(answers.total(), dict(answers))


def main(name: str, port: str, api_key: str, seconds: str) -> None:
    """Attack, and print what was sent."""
    os.nice(10)  # the attacker's machine is another one: it should take no CPU from the platform
    sent = uvloop.run(_attack(name, int(port), api_key, float(seconds)))
    sys.stdout.write(msgspec.json.encode(sent).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
