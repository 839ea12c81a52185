"""Clients that ask again and again while something happens to a platform, and its account of it."""

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import yaml
from benchmarks.streams import Answer, StreamClient, ask_all
from tests.serve.conftest import Platform, until

from tera.engine.simulated_vocabulary import Vocabulary

Body = dict[str, Any]

STEP_S = 0.05
PACED, STEADY = "sim/paced", "sim/steady"
"""A model to which tests do things, with a token each `STEP_S`, and one that is left alone."""


def values(
    paced: Mapping[str, Any], *, gateway: Mapping[str, Any] | None = None, **models: Any
) -> str:
    """Return values with both models and maybe more, of which some are a test's own.

    All tests make their platform's first model from the same arguments, which only an edit of
    those would reload: so it is its replicas that come and go between them, and nothing more.
    """
    engines = {
        "paced": {"decode_step_s": STEP_S, "max_running": 512},
        "steady": {"decode_step_s": 0.005},
    }
    both = {
        name: {"id": f"sim/{name}", "engine": {"kind": "simulated", "args": {"profile": profile}}}
        for name, profile in engines.items()
    }
    both["paced"] |= paced
    return yaml.safe_dump({"models": {**both, **models}, "gateway": gateway or {}})


def bounds(least: int, most: int | None = None) -> dict[str, int]:
    """Return `replicas` of so many, or of any number between two."""
    return {"min": least, "max": least if most is None else most}


def greedy(model: str, number: int, max_tokens: int = 100) -> Body:
    """Return a request of its own prompt, whose text is always the same."""
    prompt = f"Story number {number} of what happened"
    return {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}


def endless(model: str, number: int, tokens: int) -> Body:
    """Return a request whose text has exactly so many tokens."""
    return {
        **greedy(model, number, tokens),
        "logit_bias": {str(Vocabulary.eos_id): -100},
    }


def faults(answers: Sequence[Answer]) -> set[str]:
    """Return why answers are not whole."""
    return {answer.error for answer in answers} - {""}


async def undisturbed(platform: Platform, bodies: Sequence[Body]) -> list[Any]:
    """Return the choices that the same requests get of the model to which nothing happens."""
    elsewhere = [{**body, "model": STEADY} for body in bodies]
    answers = await ask_all(platform.port, platform.api_key, elsewhere, clients=4)
    assert not faults(answers)
    return [answer.choices for answer in answers]


class Load:
    """So many clients within its block; at its end each finishes the stream that it has begun."""

    def __init__(self, platform: Platform, bodies: Sequence[Body], *, clients: int) -> None:
        self._platform = platform
        self._bodies = bodies
        self._numbers = itertools.cycle(range(len(bodies)))
        self._count = clients
        self._clients: list[asyncio.Task[None]] = []
        self._stopping = False
        self.answers: list[tuple[int, Answer]] = []
        """With the number of the body that each answers."""

    async def __aenter__(self) -> Self:
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._count)]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        if exc is not None:
            for client in self._clients:
                client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=exc is not None)

    async def _client(self) -> None:
        async with StreamClient(self._platform.port, self._platform.api_key) as connection:
            while not self._stopping:
                number = next(self._numbers)
                self.answers.append((number, await connection.ask(self._bodies[number])))

    def changed(self, expected: Sequence[Any]) -> list[tuple[int, str]]:
        """Return the numbers of the bodies that got other choices than expected, and why."""
        return [
            (number, answer.error)
            for number, answer in self.answers
            if answer.error or answer.choices != expected[number]
        ]


class Streams:
    """Streams that are all under way once its block begins."""

    def __init__(self, platform: Platform, key: str, bodies: list[Body]) -> None:
        self._platform, self._key, self._bodies = platform, key, bodies
        self._tasks: list[asyncio.Task[Answer]] = []
        self.events = 0
        """Read so far, of all streams."""

    async def __aenter__(self) -> Self:
        begun = [asyncio.Event() for _ in self._bodies]
        self._tasks = [
            asyncio.create_task(self._stream(body, event))
            for body, event in zip(self._bodies, begun, strict=True)
        ]
        async with asyncio.timeout(30):
            await asyncio.gather(*(event.wait() for event in begun))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks:
            task.cancel()

    async def _stream(self, body: Body, begun: asyncio.Event) -> Answer:
        def read() -> None:
            self.events += 1
            begun.set()

        async with StreamClient(self._platform.port, self._key) as client:
            return await client.ask(body, on_event=read)

    async def answers(self) -> list[Answer]:
        async with asyncio.timeout(120):
            return await asyncio.gather(*self._tasks)


def serving(platform: Platform, model: str) -> list[int]:
    """Return the process ids of a model's replicas that take requests."""
    return sorted(
        each["pid"]
        for each in platform.replicas(model)
        if each["running"] is not None and not each["draining"]
    )


def new_key(platform: Platform, tenant: str, *limits: str, gateways: int = 1) -> str:
    """Make a key, and return it once every gateway replica accepts it."""
    made = platform.tera("keys", "create", "--tenant", tenant, "--json", *limits)
    key: str = json.loads(made.stdout)["key"]

    def accepted() -> bool:
        with platform.http(key) as http:
            return http.get("/v1/models").status_code == 200

    until(lambda: all(accepted() for _ in range(5 * gateways)), timeout_s=10)
    return key


def used(platform: Platform, tenant: str) -> dict[str, int]:
    """Return what the ledger has of a tenant, over all models and days."""
    done = platform.tera("usage", "--tenant", tenant, "--json")
    assert done.returncode == 0, done.stderr
    counted = ("requests", "prompt_tokens", "completion_tokens", "failed", "cancelled", "lost")
    return {name: sum(row[name] for row in json.loads(done.stdout)) for name in counted}


def told(answers: Sequence[Answer]) -> dict[str, int]:
    """Return what `used` should be when clients were told these whole answers."""
    usages = [answer.usage for answer in answers if answer.usage is not None]
    assert len(usages) == len(answers)
    return {
        "requests": len(answers),
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in usages),
        "completion_tokens": sum(usage["completion_tokens"] for usage in usages),
        **dict.fromkeys(("failed", "cancelled", "lost"), 0),
    }


async def apply(platform: Platform, values: str) -> None:
    """Give the running platform other values; return once it has them."""
    await asyncio.to_thread(platform.apply, values)
