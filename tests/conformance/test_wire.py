"""The contract on the wire: raw bytes to and from HAProxy."""

import json
import os
import re
import signal

import httpx
import pytest
from tests.conformance.answers import accepted, assert_envelope, assert_refused, events
from tests.conformance.gateways import PlatformGateway
from tests.conformance.wires import head, post, wire
from tests.serve.conftest import until

pytestmark = pytest.mark.slow
ENDLESS = {"logit_bias": {"256": -100}}  # the token that ends a text is forbidden
WORDS = "word " * 600
"""Of `sim/slow`, twenty seconds without a token. Whoever comes after one that was given up still
waits for the end of its step."""


def wait_until_idle(gateway: PlatformGateway) -> None:
    gateway.platform.wait_until_idle("small", replicas=2)
    gateway.platform.wait_until_idle("slow", replicas=1)


def slow_replica(gateway: PlatformGateway) -> tuple[int, int]:
    """Return how many generations of the slow model run and how many wait."""
    [replica] = gateway.platform.replicas("slow")
    return replica["running"], replica["waiting"]


def test_s1_a_stream_is_chunks_of_whole_events(behind_haproxy: PlatformGateway) -> None:
    body = behind_haproxy.completion(stream=True, max_tokens=20)
    with wire(behind_haproxy) as connection:
        connection.send(post(behind_haproxy, body))
        status, headers = connection.head()
        assert status == 200
        assert headers["transfer-encoding"] == "chunked"
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in headers
        assert "content-encoding" not in headers
        pieces = list(iter(connection.chunk, b""))
        assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for piece in pieces)
        assert events(b"".join(pieces))[-1] == b"[DONE]"
        # The connection is good for another request.
        connection.send(post(behind_haproxy, behind_haproxy.completion()))
        assert connection.answer().status == 200


def test_s5_the_first_event_comes_while_the_engine_still_works(
    behind_haproxy: PlatformGateway,
) -> None:
    body = behind_haproxy.completion(stream=True, max_tokens=1900, **ENDLESS)
    with wire(behind_haproxy) as connection:
        connection.send(post(behind_haproxy, body))
        assert connection.head()[0] == 200
        assert connection.chunk().startswith(b"data: {")
        replicas = behind_haproxy.platform.replicas("small")
        assert sum(replica["running"] for replica in replicas) == 1
    wait_until_idle(behind_haproxy)


def test_s6_a_later_error_is_an_event_and_no_done(behind_haproxy: PlatformGateway) -> None:
    body = behind_haproxy.completion(prompt="FAULT", stream=True, max_tokens=100, **ENDLESS)
    with wire(behind_haproxy) as connection:
        connection.send(post(behind_haproxy, body))
        answer = connection.answer()
    *pieces, last = events(answer.body)
    assert answer.status == 200
    assert pieces
    assert assert_envelope(last)["code"] == "backend_failure"


def test_s1_a_client_of_http_1_0_gets_its_stream(behind_haproxy: PlatformGateway) -> None:
    body = behind_haproxy.completion(stream=True)
    with wire(behind_haproxy) as connection:
        connection.send(post(behind_haproxy, body, version="1.0"))
        assert events(connection.answer().body)[-1] == b"[DONE]"


def test_pipelined_requests_are_answered_in_their_order(behind_haproxy: PlatformGateway) -> None:
    bodies = [
        behind_haproxy.completion(max_tokens=5, stream=True),
        behind_haproxy.completion(model="nobody/none"),
        behind_haproxy.completion(),
    ]
    with wire(behind_haproxy) as connection:
        connection.send(b"".join(post(behind_haproxy, body) for body in bodies))
        answers = [connection.answer() for _ in bodies]
    assert [answer.status for answer in answers] == [200, 404, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


def test_h1_without_a_key_a_body_is_not_even_waited_for(behind_haproxy: PlatformGateway) -> None:
    lines = head(behind_haproxy, "Content-Length: 50000000", key="sk-wrong")
    with wire(behind_haproxy) as connection:
        connection.send(f"{lines}\r\n\r\n".encode())
        answer = connection.answer()
        assert answer.headers["connection"] == "close"
    assert answer.status == 401
    assert assert_envelope(answer.body)["code"] == "invalid_api_key"


def test_h1_without_a_key_a_client_that_waits_is_not_told_to_continue(
    behind_haproxy: PlatformGateway,
) -> None:
    lines = head(behind_haproxy, "Content-Length: 9", "Expect: 100-continue", key="sk-wrong")
    with wire(behind_haproxy) as connection:
        connection.send(f"{lines}\r\n\r\n".encode())
        assert connection.head()[0] == 401


def test_h6_a_wish_to_upgrade_is_ignored(behind_haproxy: PlatformGateway) -> None:
    wish = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    wish["sec-websocket-key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    answer = behind_haproxy.request("GET", "/v1/chat/completions", headers=wish)
    assert_refused(answer, "method_not_allowed")
    accepted(behind_haproxy.request("GET", "/v1/models", headers=wish))


def test_h7_too_large_a_body_is_not_even_waited_for(behind_haproxy: PlatformGateway) -> None:
    with wire(behind_haproxy) as connection:
        connection.send(f"{head(behind_haproxy, 'Content-Length: 50000000')}\r\n\r\n".encode())
        answer = connection.answer()
    assert answer.status == 413
    assert assert_envelope(answer.body)["code"] == "request_too_large"


@pytest.mark.parametrize("over", [0, 1])
def test_h7_chunked_bodies_have_the_same_limit(behind_haproxy: PlatformGateway, over: int) -> None:
    body = json.dumps(behind_haproxy.completion()).encode()
    content = body + b" " * (behind_haproxy.max_body_bytes - len(body) + over)
    pieces = (content[at : at + 50_000] for at in range(0, len(content), 50_000))
    answer = httpx.post(
        f"{behind_haproxy.platform.base_url}/v1/completions",
        content=pieces,
        headers={"authorization": f"Bearer {behind_haproxy.key}"},
        timeout=60,
    )
    if over:
        assert_refused(answer, "request_too_large")
    else:
        accepted(answer)


def test_h7_an_endless_body_is_refused(behind_haproxy: PlatformGateway) -> None:
    with wire(behind_haproxy) as connection:
        connection.send(f"{head(behind_haproxy, 'Transfer-Encoding: chunked')}\r\n\r\n".encode())
        for _ in range(behind_haproxy.max_body_bytes // 65536 + 1):
            connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        answer = connection.answer()
    assert answer.status == 413
    assert assert_envelope(answer.body)["code"] == "request_too_large"


def test_a_client_that_waits_is_told_to_continue(behind_haproxy: PlatformGateway) -> None:
    content = json.dumps(behind_haproxy.completion()).encode()
    lines = head(behind_haproxy, f"Content-Length: {len(content)}", "Expect: 100-continue")
    with wire(behind_haproxy) as connection:
        connection.send(f"{lines}\r\n\r\n".encode())
        assert connection.head()[0] == 100
        connection.send(content)
        assert connection.answer().status == 200


def test_s8_a_hang_up_inside_of_the_head_leaves_nothing(behind_haproxy: PlatformGateway) -> None:
    for part in (b"", b"POST /v1/compl", head(behind_haproxy, "X-Half: ").encode()):
        with wire(behind_haproxy) as connection:
            connection.send(part)
            connection.reset()
    wait_until_idle(behind_haproxy)
    accepted(behind_haproxy.complete())


def test_s8_a_hang_up_inside_of_the_body_leaves_nothing(behind_haproxy: PlatformGateway) -> None:
    request = post(behind_haproxy, behind_haproxy.completion(max_tokens=1900, **ENDLESS))
    for reset in (False, True):
        with wire(behind_haproxy) as connection:
            connection.send(request[:-10])
            if reset:
                connection.reset()
    wait_until_idle(behind_haproxy)
    accepted(behind_haproxy.complete())


@pytest.mark.parametrize(
    ("stream", "reset"),
    [pytest.param(True, False, id="stream-close"), pytest.param(False, True, id="reset")],
)
def test_s8_a_hang_up_while_queued_frees_the_place(
    behind_haproxy: PlatformGateway, stream: bool, reset: bool
) -> None:
    body = {"model": "sim/slow", "prompt": f"{stream} {reset} {WORDS}", "stream": stream}
    with wire(behind_haproxy) as running, wire(behind_haproxy) as queued:
        running.send(post(behind_haproxy, body))
        until(lambda: slow_replica(behind_haproxy) == (1, 0))
        queued.send(post(behind_haproxy, {**body, "prompt": f"queued {body['prompt']}"}))
        until(lambda: slow_replica(behind_haproxy) == (1, 1))
        if reset:
            queued.reset()
        else:
            queued.close()
        until(lambda: slow_replica(behind_haproxy) == (1, 0))
    wait_until_idle(behind_haproxy)


@pytest.mark.parametrize(
    ("stream", "reset"),
    [pytest.param(True, False, id="stream-close"), pytest.param(False, True, id="reset")],
)
def test_s8_a_hang_up_while_tokens_come_ends_the_generation(
    behind_haproxy: PlatformGateway, stream: bool, reset: bool
) -> None:
    body = behind_haproxy.completion(stream=stream, max_tokens=1900, n=2, **ENDLESS)
    with wire(behind_haproxy) as connection:
        connection.send(post(behind_haproxy, body))
        if stream:
            assert connection.head()[0] == 200
            for _ in range(5):
                assert connection.chunk()

        def running() -> int:
            return sum(each["running"] for each in behind_haproxy.platform.replicas("small"))

        until(lambda: running() == 2)
        if reset:
            connection.reset()
    wait_until_idle(behind_haproxy)


MALFORMED = [
    pytest.param(b"GARBAGE\r\n\r\n", id="one-word"),
    pytest.param(b"GET\r\n\r\n", id="no-path"),
    pytest.param(b"GET /v1/models\r\n\r\n", id="http-0.9"),
    pytest.param(b"GET /v1/models HTTPS/1.1\r\nHost: x\r\n\r\n", id="protocol"),
    pytest.param(b"GET  /v1/models  HTTP/1.1 x\r\nHost: x\r\n\r\n", id="words"),
    pytest.param(b"G\x00T /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", id="zero-in-the-method"),
    pytest.param(b"GET /v1/mod\x00els HTTP/1.1\r\nHost: x\r\n\r\n", id="zero-in-the-path"),
    pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nnocolon\r\n\r\n", id="no-colon"),
    pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nname : x\r\n\r\n", id="space-in-a-name"),
    pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n", id="no-name"),
    pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: x\r\na: \x00\r\n\r\n", id="zero-in-a-value"),
    pytest.param(
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nlong: " + b"a" * 70_000 + b"\r\n\r\n",
        id="oversize-header",
    ),
    pytest.param(
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000 + b"\r\n", id="many-headers"
    ),
    pytest.param(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", id="oversize-path"),
    pytest.param(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", id="negative"
    ),
    pytest.param(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello", id="hex"
    ),
    pytest.param(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\nhello!",
        id="two-lengths",
    ),
    pytest.param(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
        b"0\r\n\r\n",
        id="gzip-chunked",
    ),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", id="bad-http-2"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", id="tls"),
]


@pytest.mark.parametrize("request_bytes", MALFORMED)
def test_h2_what_is_no_http_gets_a_bare_400_or_a_closed_connection(
    behind_haproxy: PlatformGateway, request_bytes: bytes
) -> None:
    with wire(behind_haproxy) as connection:
        connection.send(request_bytes)
        answered = connection.rest()
    assert answered == b"" or re.match(rb"HTTP/1\.[01] 400 ", answered), answered
    assert b"<" not in answered
    accepted(behind_haproxy.request("GET", "/v1/models"))


def test_h2_a_broken_chunk_ends_the_request(behind_haproxy: PlatformGateway) -> None:
    with wire(behind_haproxy) as connection:
        lines = head(behind_haproxy, "Transfer-Encoding: chunked")
        connection.send(f"{lines}\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n".encode())
        answered = connection.rest()
    assert answered == b"" or re.match(rb"HTTP/1\.[01] 400 ", answered), answered
    wait_until_idle(behind_haproxy)


def two_lengths(gateway: PlatformGateway) -> bytes:
    """Return a request with both framings; read by the shorter one, a second request follows."""
    content = json.dumps(gateway.completion()).encode()
    chunked = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    lines = head(
        gateway, f"Content-Length: {len(chunked + smuggled)}", "Transfer-Encoding: chunked"
    )
    return f"{lines}\r\n\r\n".encode() + chunked + smuggled


def test_h2_of_two_framings_one_is_used_and_the_connection_closes(
    behind_haproxy: PlatformGateway,
) -> None:
    with wire(behind_haproxy) as connection:
        connection.send(two_lengths(behind_haproxy))
        connection.answer()
        assert connection.rest() == b""


def test_h2_after_chunks_of_http_1_0_the_connection_closes(
    behind_haproxy: PlatformGateway,
) -> None:
    lines = head(behind_haproxy, "Transfer-Encoding: chunked", version="1.0")
    with wire(behind_haproxy) as connection:
        connection.send(f"{lines}\r\n\r\n0\r\n\r\n".encode() * 2)
        connection.answer()
        assert connection.rest() == b""


@pytest.mark.xfail(
    reason="HAProxy 2.8 drops content-length beside transfer-encoding before any rule can see it"
)
def test_h2_two_framings_are_refused(behind_haproxy: PlatformGateway) -> None:
    with wire(behind_haproxy) as connection:
        connection.send(two_lengths(behind_haproxy))
        assert connection.answer().status == 400


def test_h2_without_a_gateway_the_answer_is_our_error(behind_haproxy: PlatformGateway) -> None:
    platform = behind_haproxy.platform
    [gateway] = platform.status()["gateway"]
    os.kill(gateway["pid"], signal.SIGKILL)
    answers: list[httpx.Response] = []

    def another_answers() -> bool:
        # Each time a connection of its own: one that had an answer already is just closed.
        answers.append(httpx.get(f"{platform.base_url}/healthz", timeout=60))
        found = platform.status()["gateway"]
        return bool(found and found[0]["pid"] != gateway["pid"] and answers[-1].is_success)

    until(another_answers, timeout_s=90)
    for answer in answers:
        if not answer.is_success:
            assert_refused(answer, "internal_error")
    accepted(behind_haproxy.complete())
