"""`tera probe` against the real gateway over HTTP, and against servers that are none."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from tests.conformance.gateways import InProcessGateway
from typer.testing import CliRunner, Result

from tera.cli import app
from tera.contract.common import ModelStatus
from tera.tenancy.keys import generate_key


def tera(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["probe", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def failure(*arguments: str, code: int = 1) -> str:
    """Return the one line that says why it failed."""
    result = tera(*arguments, code=code)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the developer's shell, and no platform here."""
    monkeypatch.delenv("TERA_BASE_URL", raising=False)
    monkeypatch.delenv("TERA_API_KEY", raising=False)
    monkeypatch.setenv("TERA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


class Gateway(InProcessGateway):
    """The real gateway behind a real server, with statuses as a test wants them."""

    def __init__(self) -> None:
        self.statuses: dict[str, ModelStatus] = {}
        self.ready = True
        super().__init__()
        listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(self.app, lifespan="off", log_config=None)
        self._server = uvicorn.Server(config)
        # The listener holds connections until the server takes them.
        serve = self._server.serve(sockets=[listener])
        self._thread = threading.Thread(target=self._runner.run, args=(serve,))
        self._thread.start()

    def _status(self, name: str) -> ModelStatus:
        return self.statuses.get(name, "ready")

    async def readiness(self) -> tuple[bool, dict[str, Any]]:
        return self.ready, {"models": {"sim/small": "starting"}, "redis": "away"}

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        super().close()


@pytest.fixture(scope="module")
def _gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.close()


@pytest.fixture
def gateway(_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """The gateway as it is by default, and the environment of its client."""
    _gateway.statuses = {}
    _gateway.ready = True
    _gateway.config = _gateway.default_config
    monkeypatch.setenv("TERA_BASE_URL", _gateway.base_url)
    monkeypatch.setenv("TERA_API_KEY", _gateway.key)
    return _gateway


class TestTheGateway:
    def test_its_models_and_an_answer_are_shown(self, gateway: Gateway) -> None:
        gateway.statuses = {"chat": "scaled_to_zero"}
        said = tera().stdout
        assert f"{gateway.base_url} is ready" in said
        rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines()]
        assert ["sim/small", "ready"] in rows
        assert ["Sim/Chat-Only", "scaled_to_zero"] in rows
        assert "sim/small: first token after 0." in said

    @pytest.mark.parametrize(
        "model",
        [
            pytest.param("sim/small", id="completions"),
            pytest.param("Sim/Chat-Only", id="chat alone"),
            pytest.param("sim", id="alias"),
        ],
    )
    def test_programs_get_json(self, gateway: Gateway, model: str) -> None:
        found = json.loads(tera("--model", model, "--json").stdout)
        assert found.keys() == {"base_url", "status", "models", "answer"}
        assert {"id": "sim/dead", "status": "ready"} in found["models"]
        answer = found["answer"]
        assert answer["model"] == model
        assert answer["characters"] > 0
        assert 0 < answer["time_to_first_token_s"] <= answer["duration_s"]

    @pytest.mark.parametrize(
        ("statuses", "asked"),
        [
            pytest.param({"small": "scaled_to_zero"}, "Sim/Chat-Only", id="the first ready one"),
            pytest.param(
                {"small": "failed", "chat": "scaled_to_zero", "dead": "failed"},
                "Sim/Chat-Only",
                id="one that can be woken before one that failed",
            ),
        ],
    )
    def test_the_model_is_one_that_can_answer(
        self, gateway: Gateway, statuses: dict[str, ModelStatus], asked: str
    ) -> None:
        rest: dict[str, ModelStatus] = dict.fromkeys(
            ("dead", "stalled", "stuck", "defective"), "failed"
        )
        gateway.statuses = {**rest, **statuses}
        assert json.loads(tera("--json").stdout)["answer"]["model"] == asked

    def test_a_gateway_that_is_not_ready_says_why(self, gateway: Gateway) -> None:
        gateway.ready = False
        assert failure("--ready-only") == (
            f"{gateway.base_url} is not ready: sim/small is starting, Redis is away."
        )

    def test_readiness_needs_no_key(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("TERA_API_KEY")
        assert tera("--ready-only").stdout == f"{gateway.base_url} is ready\n"
        found = json.loads(tera("--ready-only", "--json").stdout)
        assert found == {"base_url": gateway.base_url, "status": "ready"}
        assert "TERA_API_KEY is not set" in failure(code=2)

    @pytest.mark.parametrize("end", ["/v1", "/v1/", "/"])
    def test_the_address_may_be_that_of_an_sdk(self, gateway: Gateway, end: str) -> None:
        assert tera("--ready-only", "--base-url", gateway.base_url + end).exit_code == 0

    def test_a_refused_key_is_told_and_not_shown(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERA_API_KEY", key := generate_key())
        said = failure()
        assert said.startswith("The key was refused: ")
        assert key not in said

    def test_a_key_without_models_has_no_answer(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TERA_API_KEY", gateway.make_key(models=("none",)))
        assert failure() == "There is no model that this key may use."

    def test_a_model_that_is_not_there_is_named(self, gateway: Gateway) -> None:
        said = failure("--model", "sim/none")
        assert "404" in said
        assert "sim/none" in said

    def test_a_model_that_fails_is_told(self, gateway: Gateway) -> None:
        assert "500 to /v1/completions" in failure("--model", "sim/dead")

    @pytest.mark.parametrize(
        "keep_alive_s",
        [
            pytest.param(15, id="in silence"),
            pytest.param(0.05, id="with comments that keep the stream alive"),
        ],
    )
    def test_a_stalled_answer_ends_with_the_timeout(
        self, gateway: Gateway, keep_alive_s: float
    ) -> None:
        gateway.keep_alive_after(keep_alive_s)
        said = failure("--model", "sim/stalled", "--timeout", "1s")
        assert "did not answer within 1 seconds" in said


class TestWithoutAnAddress:
    def test_the_platform_that_runs_here_is_asked(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, home: Path
    ) -> None:
        monkeypatch.delenv("TERA_BASE_URL")
        monkeypatch.delenv("TERA_API_KEY")
        file = home / "local.env"
        file.write_text(f"TERA_BASE_URL={gateway.base_url}\nTERA_API_KEY={gateway.key}\n")
        assert json.loads(tera("--json").stdout)["base_url"] == gateway.base_url

    def test_its_key_is_for_no_other_address(self, gateway: Gateway, home: Path) -> None:
        file = home / "local.env"
        file.write_text(f"TERA_BASE_URL=http://127.0.0.1:1\nTERA_API_KEY={gateway.key}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TERA_API_KEY")
            assert "TERA_API_KEY is not set" in failure("--base-url", gateway.base_url, code=2)

    def test_nobody_is_asked(self) -> None:
        assert "TERA_BASE_URL is not set" in failure(code=2)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000", "ftp://example.com", "file:///etc/passwd", "http://", "http://a b"],
)
def test_an_address_that_is_none_is_wrong_usage(address: str) -> None:
    assert "give an address such as https://" in failure("--base-url", address, code=2)


@pytest.mark.parametrize("address", ["http://127.0.0.1:port", "http://[::1"])
def test_an_address_that_only_looks_like_one_is_wrong_usage(address: str) -> None:
    assert "is not a valid address" in failure("--ready-only", "--base-url", address, code=2)


def test_a_key_that_is_no_text_of_a_header_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERA_API_KEY", "sk-tera-secret\nx: y")
    assert failure("--base-url", "http://127.0.0.1:1", code=2) == "TERA_API_KEY: is not a valid key"


def test_nobody_at_the_address_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert f"{address} cannot be reached: " in failure("--ready-only", "--base-url", address)


Canned = tuple[int, dict[str, str], bytes]
READY: Canned = (200, {}, b'{"status": "ready"}')
MODELS: Canned = (200, {}, b'{"data": [{"id": "m"}]}')


class Impostor:
    """A server with one answer for each path, which keeps the headers of what it is asked."""

    def __init__(self, answers: dict[str, Canned]) -> None:
        self.asked: list[tuple[str, str | None]] = []
        impostor = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                impostor.asked.append((self.path, self.headers.get("authorization")))
                status, headers, body = answers[self.path]
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> "Impostor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        pytest.param(
            {"/readyz": (200, {}, b"<html>")},
            "The answer to /readyz did not come from a Tera gateway",
            id="another's page",
        ),
        pytest.param({"/readyz": (503, {}, b"<html>")}, "answered 503 to /readyz", id="a proxy"),
        pytest.param(
            {"/readyz": (200, {"content-length": "99"}, b"{")}, "cannot be reached", id="half"
        ),
        pytest.param(
            {"/readyz": READY, "/v1/models": (403, {"content-length": "99"}, b"no")},
            "answered 403 to /v1/models",
            id="half a refusal",
        ),
        pytest.param(
            {"/readyz": READY, "/v1/models": (200, {}, b'{"data": []}')},
            "There is no model",
            id="no model",
        ),
        pytest.param(
            {"/readyz": READY, "/v1/models": (401, {}, b"")}, "The key was refused", id="bare 401"
        ),
        pytest.param(
            {
                "/readyz": READY,
                "/v1/models": MODELS,
                "/v1/completions": (200, {}, b'data: {"choices": [{"text": ""}]}\n\ndata: [DONE]'),
            },
            "m answered with no text.",
            id="no text",
        ),
        pytest.param(
            {
                "/readyz": READY,
                "/v1/models": MODELS,
                "/v1/completions": (200, {}, b'data: {"choices": [{"text": "One"}]}\n\n'),
            },
            "broke off",
            id="no end",
        ),
        pytest.param(
            {
                "/readyz": READY,
                "/v1/models": MODELS,
                "/v1/completions": (200, {}, b': \n\ndata: {"error": {"message": "It died."}}\n\n'),
            },
            "failed: It died.",
            id="an error on the stream",
        ),
    ],
)
def test_what_no_tera_answers_is_told(
    answers: dict[str, Canned], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERA_API_KEY", "sk-tera-of-no-account")
    with Impostor(answers) as impostor:
        assert said in failure("--base-url", impostor.base_url)


def test_lines_end_where_the_protocol_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_API_KEY", "sk-tera-of-no-account")
    text = "one\u2028two\x85three"  # which Python takes for three lines
    body = f'data: {{"choices": [{{"text": "{text}"}}]}}\n\ndata: [DONE]'.encode()
    answers = {"/readyz": READY, "/v1/models": MODELS, "/v1/completions": (200, {}, body)}
    with Impostor(answers) as impostor:
        found = json.loads(tera("--base-url", impostor.base_url, "--json").stdout)
    assert found["answer"]["characters"] == len(text)


def test_the_key_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERA_API_KEY", "sk-tera-of-no-account")
    with Impostor({}) as elsewhere:
        there = f"{elsewhere.base_url}/v1/models"
        answers = {"/readyz": READY, "/v1/models": (302, {"location": there}, b"")}
        with Impostor(answers) as impostor:
            said = failure("--base-url", impostor.base_url)
    assert said.endswith(f"answered 302 to /v1/models: it has moved to {there}")
    assert impostor.asked[0] == ("/readyz", None)
    assert elsewhere.asked == []
