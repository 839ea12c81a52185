"""The last word on what goes wrong outside of any request's own work."""

import logging
from typing import Any

import pytest
from starlette.types import Message
from tests.gateway.conftest import MODEL, Client, Gateway


class Refusing(Client):
    """A client whose server fails at a message of the answer, by a defect of the server's."""

    def __init__(self, body: object, fails_at: str) -> None:
        super().__init__(body)
        self._fails_at = fails_at
        self.tried: list[str] = []

    async def send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body")
        kind = "last" if last else message["type"].removeprefix("http.response.")
        self.tried.append(kind)
        if kind == self._fails_at:
            raise RuntimeError("unexpected")
        await super().send(message)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fails_at", ["start", "body", "last"])
async def test_h9_no_second_answer_follows_one_that_has_begun(
    gateway: Gateway, stream: bool, fails_at: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    body: dict[str, Any] = {"model": MODEL, "prompt": "One", "max_tokens": 3, "stream": stream}
    client = Refusing({**body, "logit_bias": {"120": 100}}, fails_at)
    await gateway.post(client)
    assert client.tried.count("start") == 1
    await gateway.wait_until_idle()
    assert gateway.admitter.running == {}
