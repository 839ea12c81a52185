"""`tera probe`: whether a Tera answers, asked as its clients ask."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import IO, Annotated, Any, Final, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

import msgspec
import typer
from rich.markup import escape
from rich.table import Column, Table

from tera.cli.console import Json, out, print_json, reported, seconds
from tera.config.environment import ClientOptions
from tera.errors import ConfigError, ServerError

T = TypeVar("T")

_PROMPT: Final = "The capital of France is"
_MAX_TOKENS: Final = 8
_MAX_ERROR_BYTES: Final = 65536

_PREFERENCE: Final = ("ready", "starting", "scaled_to_zero")
"""Statuses in the order in which models are asked; any other comes last."""


class ProbeError(ServerError):
    """The platform does not answer as it should."""


# Only what is read of an answer, so that a gateway of another version is understood too.


class _Readiness(msgspec.Struct):
    status: str
    models: dict[str, str] = {}
    redis: str = "ok"


class _Model(msgspec.Struct):
    id: str
    status: str = "unknown"
    capabilities: tuple[str, ...] = ()


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Error | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _Answer(msgspec.Struct):
    """One streamed completion, as the client saw it."""

    model: str
    time_to_first_token_s: float
    characters: int
    duration_s: float


def probe(
    base_url: Annotated[
        str | None,
        typer.Option(help="Without /v1; TERA_BASE_URL, or else the platform that runs here."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its id; one that is ready without.")] = None,
    timeout: Annotated[
        str, typer.Option(help="How long all may take; a cold start takes minutes.")
    ] = "60s",
    ready_only: Annotated[
        bool, typer.Option("--ready-only", help="Ask no model; that needs no key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a platform whether it is ready, for its models, and for one short completion.

    The key is TERA_API_KEY.
    """
    with reported():
        client = ClientOptions.from_environment(base_url)
        if not ready_only and not client.api_key:
            raise ConfigError("TERA_API_KEY is not set; give a key there, or --ready-only.")
        tera = _Tera(client, seconds("--timeout", timeout))
        tera.check_ready()
        found: dict[str, Any] = {"base_url": client.base_url, "status": "ready"}
        if not as_json:
            out.print(f"{client.base_url} is ready", markup=False, highlight=False)
        if not ready_only:
            models = tera.models()
            if not as_json:
                _show(models)
            answer = tera.complete(tera.model(model) if model else _preferred(models))
            found["models"] = [{"id": each.id, "status": each.status} for each in models]
            found["answer"] = msgspec.to_builtins(answer)
    if as_json:
        print_json(found)
    elif not ready_only:
        out.print(
            f"{answer.model}: first token after {answer.time_to_first_token_s:.3f} s, "
            f"{answer.characters} characters in {answer.duration_s:.3f} s",
            markup=False,
            highlight=False,
        )


def _show(models: Sequence[_Model]) -> None:
    # A narrow terminal must not cut what is to be copied.
    table = Table(Column("model", overflow="fold"), "status")
    for model in models:
        table.add_row(escape(model.id), escape(model.status))
    out.print(table)


def _preferred(models: Sequence[_Model]) -> _Model:
    """Return the first ready model, or else the one that is likeliest to become ready."""
    if not models:
        raise ProbeError("There is no model that this key may use.")
    ranks = {status: rank for rank, status in enumerate(_PREFERENCE)}
    return min(models, key=lambda model: ranks.get(model.status, len(ranks)))


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Tera:
    """A platform over HTTP."""

    def __init__(self, client: ClientOptions, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._opener = build_opener(_NoRedirects)

    def check_ready(self) -> None:
        """Return if the gateway can serve.

        Raises:
            ProbeError: it cannot, or is not there.
        """
        # A gateway that is not ready says so with 500 and the same body.
        with self._answer("/readyz", also=500) as response:
            found = _decoded("/readyz", response.read(), _Readiness)
        if found.status != "ready":
            parts = [f"{name} is {status}" for name, status in found.models.items()]
            parts.append(f"Redis is {found.redis}")
            raise ProbeError(f"{self._client.base_url} is not ready: {', '.join(parts)}.")

    def models(self) -> list[_Model]:
        """Return the models that the key may use."""
        with self._answer("/v1/models") as response:
            return _decoded("/v1/models", response.read(), _Models).data

    def model(self, name: str) -> _Model:
        """Return one model, by its id or an alias."""
        path = "/v1/models/" + quote(name)
        with self._answer(path) as response:
            return _decoded(path, response.read(), _Model)

    def complete(self, model: _Model) -> _Answer:
        """Return how one streamed completion went.

        Raises:
            ProbeError: it failed, broke off, or has no text.
        """
        chat = "chat" in model.capabilities and "completions" not in model.capabilities
        path = "/v1/chat/completions" if chat else "/v1/completions"
        prompt: dict[str, Any] = {"prompt": _PROMPT}
        if chat:
            prompt = {"messages": [{"role": "user", "content": _PROMPT}]}
        body = {"model": model.id, "stream": True, "max_tokens": _MAX_TOKENS, "temperature": 0}
        began_s = time.monotonic()
        first_s: float | None = None
        characters = 0
        with self._answer(path, {**body, **prompt}) as response:
            for text in self._texts(path, response):
                if text and first_s is None:
                    first_s = time.monotonic()
                characters += len(text)
        if first_s is None:
            raise ProbeError(f"{model.id} answered with no text.")
        return _Answer(model.id, first_s - began_s, characters, time.monotonic() - began_s)

    def _texts(self, path: str, response: IO[bytes]) -> Iterator[str]:
        for line in response:
            # Comments keep a stream alive, so the socket alone would wait for ever.
            self._left_s()
            name, _, value = line.strip().partition(b":")
            if name != b"data":
                continue
            if value.strip() == b"[DONE]":
                return
            chunk = _decoded(path, value, _Chunk)
            if chunk.error is not None:
                raise ProbeError(f"The answer of {path} failed: {chunk.error.message}")
            for choice in chunk.choices:
                delta = choice.delta or _Delta()
                yield choice.text or delta.content or delta.reasoning_content or ""
        raise ProbeError(f"The answer of {path} broke off.")

    @contextmanager
    def _answer(self, path: str, body: Any = None, *, also: int = 200) -> Iterator[IO[bytes]]:
        """Yield an answer of status 200 or `also`, and say what goes wrong until it is read."""
        headers = {"user-agent": "tera-probe"}
        if self._client.api_key and path.startswith("/v1/"):
            headers["authorization"] = f"Bearer {self._client.api_key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["content-type"] = "application/json"
        # `ClientOptions` lets http and https pass and nothing else.
        request = Request(self._client.base_url + path, data, headers)  # noqa: S310
        try:
            with self._opened(request, also) as response:
                yield response
        except HTTPError as error:
            raise self._refusal(path, error) from error
        except TimeoutError as error:
            raise self._too_late() from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                raise self._too_late() from error
            what = str(reason) or type(reason).__name__
            raise ProbeError(f"{self._client.base_url} cannot be reached: {what}.") from error

    def _opened(self, request: Request, also: int) -> HTTPResponse | HTTPError:
        try:
            response: HTTPResponse = self._opener.open(request, timeout=self._left_s())
        except HTTPError as error:
            if error.status != also:
                raise
            return error
        return response

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise self._too_late()
        return left_s

    def _too_late(self) -> ProbeError:
        return ProbeError(
            f"{self._client.base_url} did not answer within {self._timeout_s:g} seconds; "
            "--timeout gives it longer."
        )

    def _refusal(self, path: str, error: HTTPError) -> ProbeError:
        said = ""
        with suppress(OSError, HTTPException, msgspec.DecodeError), error:
            text = error.read(_MAX_ERROR_BYTES)
            said = f": {msgspec.json.decode(text, type=_ErrorBody).error.message}"
        if error.status == 401:
            return ProbeError(f"The key is refused{said}")
        if location := error.headers.get("location"):
            said = f": it is at {location}"
        return ProbeError(f"{self._client.base_url} answered {error.status} to {path}{said}")


def _decoded(path: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise ProbeError(f"The answer to {path} is none of a Tera: {error}.") from error
