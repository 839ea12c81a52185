from typing import Any

import httpx
import pytest
from schemathesis import GenerationMode
from tests.contract.conftest import MODEL, Gateway
from tests.contract.fuzz import FUZZED, fuzz


@pytest.mark.parametrize("operation", FUZZED, ids=lambda it: " ".join(map(str, it)))
def test_answers_are_as_described_whatever_is_sent(
    gateway: Gateway, operation: tuple[str, str, GenerationMode]
) -> None:
    def send(method: str, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"content-type": "application/json"} if body else {}
        return gateway.request(method, path, headers=headers, **body)

    fuzz(send, MODEL, operation, examples=15)
