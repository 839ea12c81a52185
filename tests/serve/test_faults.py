"""What a tenant notices when processes die: nothing but time."""

import contextlib
import http.client
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI
from tests.serve.conftest import Platform

pytestmark = pytest.mark.slow

WORDS = "word " * 600


@pytest.mark.parametrize(
    ("fate", "streams"),
    [
        pytest.param(signal.SIGKILL, 20, id="killed"),
        # Nothing closes a frozen process's connections; Serve sees it after half a minute.
        pytest.param(signal.SIGSTOP, 10, id="frozen"),
    ],
)
def test_b2_streams_survive_the_loss_of_their_replica(
    simulated: Platform, client: OpenAI, fate: int, streams: int
) -> None:
    prompts = [f"Story number {number}" for number in range(streams)]
    victim = simulated.replicas("small")[0]["pid"]
    all_stream = threading.Barrier(streams + 1)

    def undisturbed(prompt: str) -> str:
        whole = client.completions.create(
            model="sim/small", prompt=prompt, temperature=0, max_tokens=200
        )
        return whole.choices[0].text

    def text_of(prompt: str) -> str:
        with client.completions.create(
            model="sim/small", prompt=prompt, temperature=0, max_tokens=200, stream=True
        ) as chunks:
            text = next(chunks).choices[0].text
            all_stream.wait(30)
            return text + "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(streams) as pool:
        expected = list(pool.map(undisturbed, prompts))
        texts = [pool.submit(text_of, prompt) for prompt in prompts]
        all_stream.wait(30)
        os.kill(victim, fate)
        try:
            assert [text.result(20) for text in texts] == expected
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    simulated.wait_until_idle("small", replicas=2)


def test_a_frozen_replica_hides_none_of_the_others(simulated: Platform) -> None:
    frozen, other = simulated.replicas("small")
    os.kill(frozen["pid"], signal.SIGSTOP)
    try:
        told = {each["pid"]: each["running"] for each in simulated.replicas("small")}
    finally:
        os.kill(frozen["pid"], signal.SIGCONT)
    assert told == {frozen["pid"]: None, other["pid"]: 0}


@pytest.mark.parametrize("stream", [True, False])
def test_s8_a_hang_up_frees_the_engine(simulated: Platform, stream: bool) -> None:
    # Half a minute of prefill: nobody waits that long, and no token has come.
    body = {"model": "sim/slow", "prompt": f"{stream} {WORDS}", "max_tokens": 8, "stream": stream}
    with simulated.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=2)
    # Long before the prefill is over, and before a stream's first keep-alive.
    simulated.wait_until_idle("slow", replicas=1, timeout_s=10)


def test_s8_a_hang_up_in_mid_stream_frees_the_engine(simulated: Platform) -> None:
    body = {"model": "sim/small", "prompt": "Story", "max_tokens": 1000, "stream": True}
    with (
        simulated.http() as http,
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data: {")
    simulated.wait_until_idle("small", replicas=2)


def test_s6_an_engine_that_fails_every_time_is_an_error_of_the_backend(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="sim/small", prompt="FAULT please", max_tokens=50)
    assert failed.value.code == "backend_failure"


def test_metrics_of_all_processes_are_one_text(simulated: Platform, client: OpenAI) -> None:
    before = simulated.sample("tera_completion_tokens_total", model="small")
    used = client.completions.create(model="sim/small", prompt="Count", max_tokens=7).usage
    assert used is not None
    after = simulated.sample("tera_completion_tokens_total", model="small")
    assert after - before == used.completion_tokens
    families = [line for line in simulated.metrics().splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404, id="unknown path"),
        pytest.param(b"GET /-/routes HTTP/1.1\r\nHost: x\r\n\r\n", 404, id="Ray's routes"),
        pytest.param(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 401, id="no key"),
        pytest.param(b"PUT /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405, id="wrong method"),
    ],
)
def test_h2_errors_are_the_envelope_on_the_wire(
    simulated: Platform, request_bytes: bytes, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", simulated.port), timeout=10) as wire:
        wire.sendall(request_bytes)
        # Headers and body may come in two segments.
        response = http.client.HTTPResponse(wire)
        response.begin()
        body = response.read()
    assert (response.version, response.status) == (11, status)
    assert b'"error":' in body
    assert response.headers["x-request-id"].startswith("req_")
    assert "server" not in response.headers
    assert b"server:" not in body.lower()


def test_h2_what_is_no_http_gets_no_page(simulated: Platform) -> None:
    with socket.create_connection(("127.0.0.1", simulated.port), timeout=10) as wire:
        wire.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b"<html" not in wire.recv(65536).lower()
