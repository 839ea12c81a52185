"""What a gateway holds of bodies that are still arriving."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from tests.routing.conftest import until

from tera.errors import ConcurrencyLimitError, InvalidJsonError, RequestTooLargeError, TeraError
from tera.gateway.body import TENANTS_BODIES, BodyReader

MAX_BYTES = 1000


class Upload:
    """A request whose body comes piece by piece."""

    def __init__(self) -> None:
        self._arriving: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        self.request = Request(scope, self._arriving.get)

    def send(self, data: bytes, *, more: bool = True) -> None:
        self._arriving.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def hang_up(self) -> None:
        self._arriving.put_nowait({"type": "http.disconnect"})


def begin(
    reader: BodyReader, tenant: str, data: bytes, *, within_s: float = 60
) -> tuple[Upload, asyncio.Task[bytes]]:
    upload = Upload()
    upload.send(data)
    reading = reader.read(upload.request, tenant, max_bytes=MAX_BYTES, within_s=within_s)
    return upload, asyncio.create_task(reading)


async def test_a_tenants_unfinished_bodies_are_bounded_and_no_others() -> None:
    reader = BodyReader()
    begun = [begin(reader, "acme", b"x" * MAX_BYTES) for _ in range(TENANTS_BODIES)]
    await until(lambda: reader._held["acme"] == TENANTS_BODIES * MAX_BYTES)
    _, refused = begin(reader, "acme", b"x")
    with pytest.raises(ConcurrencyLimitError) as raised:
        await refused
    assert raised.value.retry_after_s == 1.0

    # What comes whole is never held, and another tenant has room of its own.
    whole = Upload()
    whole.send(b"y" * MAX_BYTES, more=False)
    read = reader.read(whole.request, "acme", max_bytes=MAX_BYTES, within_s=60)
    assert await read == b"y" * MAX_BYTES
    other, reading = begin(reader, "other", b"z")
    other.send(b"z", more=False)
    assert await reading == b"zz"

    for upload, _ in begun:
        upload.send(b"", more=False)
    assert [len(await reading) for _, reading in begun] == [MAX_BYTES] * TENANTS_BODIES
    assert reader._held == {}


@pytest.mark.parametrize(
    ("end", "error"),
    [
        pytest.param(lambda upload: upload.hang_up(), InvalidJsonError, id="hang-up"),
        pytest.param(lambda upload: upload.send(b"x" * 999), RequestTooLargeError, id="too large"),
        pytest.param(lambda upload: None, InvalidJsonError, id="deadline"),
    ],
)
async def test_e3_nothing_is_held_of_a_body_that_fails(end: Any, error: type[TeraError]) -> None:
    reader = BodyReader()
    upload, reading = begin(reader, "acme", b"xx", within_s=0.05)
    end(upload)
    with pytest.raises(error):
        await reading
    assert reader._held == {}


async def test_e3_nothing_is_held_of_a_body_whose_reader_is_cancelled() -> None:
    reader = BodyReader()
    _, reading = begin(reader, "acme", b"xx")
    await until(lambda: reader._held["acme"] == 2)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert reader._held == {}
