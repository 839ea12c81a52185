from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from schemathesis import GenerationMode
from tests.contract.document import DOCUMENT
from tests.contract.fuzz import FUZZED, fuzz
from tests.serve.conftest import Platform

pytestmark = pytest.mark.slow


@pytest.fixture
def http(simulated: Platform) -> Iterator[httpx.Client]:
    with simulated.http() as client:
        yield client


def test_document_is_served_whole(http: httpx.Client) -> None:
    assert http.get("/openapi.json").raise_for_status().json() == DOCUMENT


@pytest.mark.parametrize("operation", FUZZED, ids=lambda it: " ".join(map(str, it)))
def test_answers_are_as_described_whatever_is_sent(
    http: httpx.Client, operation: tuple[str, str, GenerationMode]
) -> None:
    def send(method: str, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"content-type": "application/json"} if body else {}
        return http.request(method, path, headers=headers, **body)

    fuzz(send, "sim/small", operation, examples=40, max_tokens=8)
