"""A platform over HTTP, used the way its clients use it."""

import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from tera.config.environment import ClientOptions
from tera.errors import ConfigError, ServerError

T = TypeVar("T")

_PROMPT: Final = "The capital of France is"
_MAX_TOKENS: Final = 8
_MAX_ERROR_BYTES: Final = 65536

_PREFERENCE: Final = ("ready", "starting", "scaled_to_zero")
"""Model statuses, the one to probe first leading; any other status comes last."""


class ProbeError(ServerError):
    """The platform did not answer as it should."""


# Only the fields that are read, so that gateways of other versions are understood too.


class _Readiness(msgspec.Struct):
    status: str
    models: dict[str, str] = {}
    redis: str = "ok"


class RemoteModel(msgspec.Struct):
    """A model as the platform lists it."""

    id: str
    status: str = "unknown"
    capabilities: tuple[str, ...] = ()


class _Models(msgspec.Struct):
    data: list[RemoteModel]


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


class Answer(msgspec.Struct):
    """One streamed completion, as the client saw it."""

    model: str
    time_to_first_token_s: float
    characters: int
    duration_s: float


def preferred(models: Sequence[RemoteModel]) -> RemoteModel:
    """Return the first ready model, or else the one most likely to become ready.

    Raises:
        ProbeError: there is no model.
    """
    if not models:
        raise ProbeError("There is no model that this key may use.")
    ranks = {status: rank for rank, status in enumerate(_PREFERENCE)}
    return min(models, key=lambda model: ranks.get(model.status, len(ranks)))


class RemotePlatform:
    """A platform at any address; all calls share one deadline.

    Use it as `with RemotePlatform(client, timeout_s) as platform`.
    """

    def __init__(self, client: ClientOptions, timeout_s: float) -> None:
        """Prepare the client; nothing is connected yet.

        Raises:
            ConfigError: the address is not a valid one.
        """
        self._client = client
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        try:
            self._http = httpx.Client(
                base_url=client.base_url,
                # A compressed stream would be held back until it fills a block.
                headers={"user-agent": "tera-probe", "accept-encoding": "identity"},
                # Trust the machine's certificates, not a package's: companies add their own there.
                verify=ssl.create_default_context(),
                # Following a redirect would send the key to another host.
                follow_redirects=False,
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"{client.base_url!r} is not a valid address: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def check_ready(self) -> None:
        """Return once the gateway has said that it can serve.

        Raises:
            ProbeError: it cannot serve, or cannot be reached.
        """
        # A gateway that is not ready answers 500 with the same body.
        with self._answer("/readyz", also=500) as response:
            found = _decoded("/readyz", response.read(), _Readiness)
        if found.status != "ready":
            parts = [f"{name} is {status}" for name, status in found.models.items()]
            parts.append(f"Redis is {found.redis}")
            raise ProbeError(f"{self._client.base_url} is not ready: {', '.join(parts)}.")

    def models(self) -> list[RemoteModel]:
        """Return the models that the key may use."""
        with self._answer("/v1/models") as response:
            return _decoded("/v1/models", response.read(), _Models).data

    def model(self, name: str) -> RemoteModel:
        """Return one model, by its id or an alias."""
        path = "/v1/models/" + quote(name)
        with self._answer(path) as response:
            return _decoded(path, response.read(), RemoteModel)

    def complete(self, model: RemoteModel) -> Answer:
        """Stream one completion and return how it went.

        Raises:
            ProbeError: it failed, broke off, or had no text.
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
        return Answer(model.id, first_s - began_s, characters, time.monotonic() - began_s)

    def _texts(self, path: str, response: httpx.Response) -> Iterator[str]:
        for line in _lines(response):
            # Keep-alive comments arrive all the time, so no read timeout would ever fire.
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
    def _answer(self, path: str, body: Any = None, *, also: int = 200) -> Iterator[httpx.Response]:
        """Yield a response of status 200 or `also`; failures while reading are `ProbeError`s."""
        headers = {}
        if self._client.api_key and path.startswith("/v1/"):
            headers["authorization"] = f"Bearer {self._client.api_key}"
        method = "GET" if body is None else "POST"
        try:
            with self._http.stream(
                method, path, json=body, headers=headers, timeout=self._left_s()
            ) as response:
                if response.status_code not in (200, also):
                    raise self._refusal(path, response)
                yield response
        except httpx.TimeoutException as error:
            raise self._too_late() from error
        except httpx.RequestError as error:
            what = str(error) or type(error).__name__
            raise ProbeError(f"{self._client.base_url} cannot be reached: {what}.") from error

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise self._too_late()
        return left_s

    def _too_late(self) -> ProbeError:
        return ProbeError(
            f"{self._client.base_url} did not answer within {self._timeout_s:g} seconds; "
            "--timeout allows more."
        )

    def _refusal(self, path: str, response: httpx.Response) -> ProbeError:
        said = _said(response)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            return ProbeError(f"The key was refused{said}")
        if location := response.headers.get("location"):
            said = f": it has moved to {location}"
        return ProbeError(
            f"{self._client.base_url} answered {response.status_code} to {path}{said}"
        )


def _said(response: httpx.Response) -> str:
    """Return a refusal's message, ready to append; "" if it is not from a Tera gateway."""
    text = b""
    try:
        for piece in response.iter_bytes():
            text += piece
            if len(text) > _MAX_ERROR_BYTES:
                return ""
        return f": {msgspec.json.decode(text, type=_ErrorBody).error.message}"
    except (httpx.RequestError, msgspec.DecodeError):
        return ""  # cut off, or another server's page: the status alone says enough


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield the lines of a stream, split at LF only.

    `iter_lines` also splits at characters such as U+2028, which a model's text may contain.
    """
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    yield rest


def _decoded(path: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise ProbeError(
            f"The answer to {path} did not come from a Tera gateway: {error}."
        ) from error
