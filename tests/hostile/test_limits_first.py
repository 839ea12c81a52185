"""A caller whom the limits refuse whatever it sends makes no gateway read what that is."""

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.gateway.conftest import MODEL, Client, Gateway

from tera.config.limits import TenantLimits
from tera.gateway.text_pool import SHORT_BYTES


@pytest_asyncio.fixture
async def gateway() -> AsyncGenerator[Gateway]:
    async with Gateway() as gateway:
        yield gateway


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the bodies that are parsed."""
    from tera.gateway import parsing

    sizes: list[int] = []
    inner: Callable[[bytes], dict[str, Any]] = vars(parsing)["parse_json_object"]

    def counted(body: bytes) -> dict[str, Any]:
        sizes.append(len(body))
        return inner(body)

    monkeypatch.setattr(parsing, "parse_json_object", counted)
    return sizes


def body(size: int, **fields: Any) -> dict[str, Any]:
    request = {"model": MODEL, "prompt": "One", "max_tokens": 1, **fields, "padding": ""}
    return {**request, "padding": " " * (size - len(json.dumps(request)))}


async def posted(gateway: Gateway, request: dict[str, Any]) -> tuple[int | None, str]:
    client = Client(request)
    await gateway.post(client)
    answer = json.loads(client.body)
    return client.status, answer.get("error", {}).get("code", "")


BLOCKED = TenantLimits(requests_per_minute=0)


async def test_h1_a_blocked_callers_long_body_is_not_parsed(
    gateway: Gateway, parsed: list[int]
) -> None:
    gateway.admitter.limits = BLOCKED
    client = Client(body(SHORT_BYTES + 1, n="no number"))
    await gateway.post(client)
    assert client.status == 429
    assert parsed == []
    headers = dict(client.sent[0]["headers"])
    assert headers[b"x-should-retry"] == b"false"
    assert headers[b"x-ratelimit-limit-requests"] == b"0"


async def test_h1_of_a_short_body_the_fields_come_before_the_limits(gateway: Gateway) -> None:
    gateway.admitter.limits = BLOCKED
    assert await posted(gateway, body(SHORT_BYTES, n="no number")) == (400, "invalid_type")
    assert await posted(gateway, body(SHORT_BYTES)) == (429, "rate_limit_exceeded")


async def test_e3_a_long_body_that_is_wrong_holds_and_spends_nothing(gateway: Gateway) -> None:
    gateway.admitter.limits = TenantLimits(requests_per_minute=1, concurrent_requests=1)
    for _ in range(3):
        wrong = body(SHORT_BYTES + 1, n="no number")
        assert await posted(gateway, wrong) == (400, "invalid_type")
    assert gateway.admitter.settled == []
    assert await posted(gateway, body(SHORT_BYTES + 1)) == (200, "")
