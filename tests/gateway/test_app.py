"""The last word on what goes wrong outside of any request's own work."""

import json
import logging
from typing import Any

import pytest
from starlette.types import Message
from tests.gateway.conftest import MODEL, Client, Gateway

from tera.errors import ConfigError, StartError, TeraError, UnreachableError
from tera.gateway.simulated_text import SimulatedTextModel


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


@pytest.mark.parametrize("kind", [ConfigError, StartError, UnreachableError])
async def test_h9_what_is_for_operators_is_in_the_log_and_not_in_the_answer(
    kind: type[TeraError], caplog: pytest.LogCaptureFixture
) -> None:
    class Misconfigured(SimulatedTextModel):
        async def encode(self, text: str) -> list[int]:
            raise kind("/models/one/tokenizer.json is not on node-7.internal", param="models.one")

    client = Client({"model": MODEL, "prompt": "One"})
    async with Gateway(text=Misconfigured) as gateway:
        await gateway.post(client)
    assert client.status == 500
    assert json.loads(client.body)["error"] == {
        "message": "The server failed on this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert "/models/one/tokenizer.json" in caplog.text
