"""One generation inside vLLM: its output, and how it ends."""

import asyncio
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tera.errors import EngineError, InvalidValueError, ReplicaLostError, TeraError
from tera.generation import FinishReason, Generation, TokenDelta, TokenLogprobs

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

log = logging.getLogger(__name__)

_PARAMETER_SUFFIX = re.compile(r" \(parameter=.*\)$", re.DOTALL)
"""What vLLM appends to a validation message for its own server."""

_INSIDE = re.compile(
    r"(?:^|[^\w<])/[\w.-]+/[\w.-]"  # a path
    r"|\.(?:py|cc|cpp|cu|h|hpp|so)\b"
    r"|\w://"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b"  # an address
    r"|\b0x[0-9a-fA-F]{4,}"
    r"|\.(?:local|internal|svc)\b"
    r"|\b(?:vllm|ray|torch|xgrammar|llguidance|outlines)\.\w"  # a module
)
"""Signs that a message of a library reveals the inside of the platform."""
_REASON_CHARACTERS = 512


class Run:
    """One generation inside vLLM."""

    def __init__(
        self,
        generation: Generation,
        emit: Callable[[TokenDelta], None],
        ended: Callable[[TeraError], None],
        on_over: Callable[["Run"], None],
    ) -> None:
        """`on_over` is called once, when no callback will be called any more."""
        self.generation = generation
        self._emit = emit
        self._ended = ended
        self._on_over = on_over
        self.adding: asyncio.Task[None] | None = None
        """Kept here, since the event loop holds tasks only weakly."""
        self.vllm_id: str | None = None
        """vLLM's own id of it, once vLLM has it."""
        self.over = False
        self.finished = False
        """Whether vLLM is done with it."""

    def put(self, output: "RequestOutput | Exception") -> None:
        """Take the output of a step, or the error with which vLLM ended.

        Never raises: vLLM calls it from its loop over all generations.
        """
        if self.over:
            return
        if isinstance(output, Exception):
            self.end(_failure(output))
            return
        reason = output.outputs[0].finish_reason
        if reason not in (None, "stop", "length"):
            self.end(EngineError("The engine gave this generation up."))
            return
        try:
            delta = _delta(self.generation, output)
        except Exception as error:  # noqa: BLE001  its output cannot be used
            self.end(_failure(error), finished=reason is not None)
            return
        if reason is not None:
            self._leave(finished=True)
        try:
            self._emit(delta)
        except Exception:
            log.exception("Nobody could take a generation's tokens; it is aborted.")
            self.abort()

    def end(self, error: TeraError, *, finished: bool = True) -> None:
        """Report that it has ended without a finish reason; `finished` if vLLM knows that."""
        if self.over:
            return
        self._leave(finished=finished)
        try:
            self._ended(error)
        except Exception:
            log.exception("Nobody could be told that a generation has ended.")

    def abort(self) -> None:
        """Abort it; see `TextEngine.start`."""
        if not self.over:
            self._leave(finished=False)

    def _leave(self, *, finished: bool) -> None:
        self.over = True
        self.finished = finished
        self._on_over(self)


def _delta(generation: Generation, output: "RequestOutput") -> TokenDelta:
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    logprobs = prompt_logprobs = None
    count = generation.sampling.logprobs
    if count is not None and completion.logprobs is not None:
        positions: Iterable[Any] = completion.logprobs
        logprobs = [
            _token_logprobs(token_id, entries, count)
            for token_id, entries in zip(token_ids, positions, strict=True)
        ]
    count = generation.sampling.prompt_logprobs
    if count is not None and output.prompt_logprobs:  # empty in every delta but the first
        positions = output.prompt_logprobs
        prompt_logprobs = [
            None if entries is None else _token_logprobs(token_id, entries, count)
            for token_id, entries in zip(generation.token_ids, positions, strict=True)
        ]
    return TokenDelta(
        generation.generation_id,
        token_ids,
        None if completion.finish_reason is None else FinishReason(completion.finish_reason),
        output.num_cached_tokens or 0,
        logprobs,
        prompt_logprobs,
    )


def _token_logprobs(token_id: int, entries: Mapping[int, Any], count: int) -> TokenLogprobs:
    # vLLM adds the chosen token to the requested number of likeliest ones.
    ranked = sorted((entry.rank, other, entry.logprob) for other, entry in entries.items())
    top = [(other, logprob) for rank, other, logprob in ranked if rank <= count]
    return TokenLogprobs(token_id, entries[token_id].logprob, top[:count])


def refusal(error: Exception) -> TeraError:
    """Translate what vLLM raises when it is given a generation."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    if isinstance(error, VLLMClientError | ValueError):
        return _caused(_invalid(error), error)
    if isinstance(error, GracefulHTTPError):  # vLLM's own queue bounds, if configured
        return _caused(EngineError("The engine is busy."), error)
    return _failure(error)


def _failure(error: Exception) -> TeraError:
    """Translate the error that has ended a generation, or vLLM with all its generations."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, EngineDeadError):
        return _caused(ReplicaLostError("The engine has stopped."), error)
    log.error("vLLM failed a generation.", exc_info=error)
    return _caused(EngineError("The engine failed this generation."), error)


def _caused(error: TeraError, cause: Exception) -> TeraError:
    error.__cause__ = cause
    return error


def _invalid(error: Exception) -> InvalidValueError:
    """Translate vLLM's refusal, without the part meant for its own server."""
    parameter = getattr(error, "parameter", None)
    return InvalidValueError(reason_for_client(str(error)), param=parameter)


def reason_for_client(text: str) -> str:
    """Return what a client may read of vLLM's reason: its first line, if it reveals no internals.

    Every `ValueError` counts as a refusal, so it may come from a library and name a file or a host.
    """
    first_line = _PARAMETER_SUFFIX.sub("", text).partition("\n")[0][:_REASON_CHARACTERS].strip()
    if not first_line or _INSIDE.search(first_line):
        log.warning("vLLM refuses a generation; the client is not told why: %a", text[:4096])
        return "The engine refuses these parameters."
    return first_line
