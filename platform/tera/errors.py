"""Everything that can go wrong, as one tree.

TeraError
├── InvalidRequestError                 400  the client can correct it
│   ├── InvalidJsonError                     the body is not a JSON object we accept
│   ├── UnsupportedContentTypeError
│   ├── MissingParameterError
│   ├── InvalidTypeError
│   ├── InvalidValueError
│   ├── UnsupportedParameterError            valid, but not supported here
│   └── ContextLengthError
├── AuthenticationError                 401
│   ├── MissingApiKeyError
│   └── InvalidApiKeyError
├── ModelNotFoundError                  404
├── UnknownUrlError                     404
├── MethodNotAllowedError               405
├── RequestTooLargeError                413
├── RateLimitError                      429  a limit of the tenant or the key
│   ├── RequestRateLimitError                requests per minute
│   ├── TokenRateLimitError                  tokens per minute
│   ├── ConcurrencyLimitError                requests in flight
│   └── QuotaError                           tokens of a day or month
├── EngineOverloadedError               429  the model's queue is full
└── ServerError                         500
    ├── InternalError                        a defect or a broken part of ours
    ├── BackendFailureError                  the engines failed and retries were used up
    ├── EngineError                          one replica failed; another may succeed
    │   ├── ReplicaLostError
    │   └── EngineStalledError
    ├── StartError                           a platform cannot start, or cannot stop
    ├── UnreachableError                     a platform that runs does not answer
    └── ConfigError                          the platform's configuration is wrong

An error crosses a Ray call as `cls(*args)`, so a subclass sets class attributes and never
overrides `__init__`; otherwise it would arrive as another type.
"""

from typing import ClassVar


class TeraError(Exception):
    """Base of every error that Tera raises on purpose.

    `message` is written for the tenant who reads it: it names no host, path or replica.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    """OpenAI's `error.type`."""
    code: ClassVar[str] = "internal_error"
    """OpenAI's `error.code`."""
    retryable: ClassVar[bool] = False
    """Whether another replica may succeed."""

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequestError(TeraError):
    """The request itself is wrong; sending it again cannot help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class InvalidJsonError(InvalidRequestError):
    """The body is not a JSON object of the kind that every parser reads alike."""

    code = "invalid_json"


class UnsupportedContentTypeError(InvalidRequestError):
    """The body is declared as something other than plain JSON."""

    code = "unsupported_content_type"


class MissingParameterError(InvalidRequestError):
    """A required field is absent or null."""

    code = "missing_required_parameter"


class InvalidTypeError(InvalidRequestError):
    """A field has the wrong JSON type."""

    code = "invalid_type"


class InvalidValueError(InvalidRequestError):
    """A field has the right type and a value outside its range."""

    code = "invalid_value"


class UnsupportedParameterError(InvalidRequestError):
    """A field would change the answer, but this deployment does not support it."""

    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion together do not fit the model's context."""

    code = "context_length_exceeded"


class AuthenticationError(TeraError):
    """The caller did not show a key that is valid now."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class MissingApiKeyError(AuthenticationError):
    """There is no `Authorization: Bearer` header."""

    code = "missing_api_key"


class InvalidApiKeyError(AuthenticationError):
    """The key is malformed, unknown, revoked or expired; the caller is not told which."""

    code = "invalid_api_key"


class ModelNotFoundError(TeraError):
    """No such model for this caller."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownUrlError(TeraError):
    """No such path."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class MethodNotAllowedError(TeraError):
    """The path exists, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTooLargeError(TeraError):
    """The body is over the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimitError(TeraError):
    """A limit refused the request, which has spent nothing of any limit.

    `retry_after_s` is the wait after which it passes if no other requests come; None means that
    waiting does not help.
    """

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"

    @property
    def should_retry(self) -> bool:
        """Whether waiting helps, as `x-should-retry` tells the client."""
        return self.retry_after_s is not None


class RequestRateLimitError(RateLimitError):
    """Too many requests in a minute."""


class TokenRateLimitError(RateLimitError):
    """Too many tokens in a minute, or more in one request than the limit for a minute."""

    type = "tokens"


class ConcurrencyLimitError(RateLimitError):
    """Too many requests in flight."""

    code = "concurrency_limit_exceeded"


class QuotaError(RateLimitError):
    """The tokens of a day or month are spent."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class EngineOverloadedError(TeraError):
    """All replicas of the model are busy and its queue is full; `retry_after_s` is set."""

    status = 429
    type = "overloaded"
    code = "engine_overloaded"


class ServerError(TeraError):
    """The platform, not the request, is at fault."""


class InternalError(ServerError):
    """A defect, or a part of the platform that cannot be reached."""


class BackendFailureError(ServerError):
    """The engines failed the request and its retries or its deadline were used up."""

    code = "backend_failure"


class EngineError(ServerError):
    """One engine replica failed a generation; another replica may succeed."""

    code = "backend_failure"
    retryable = True


class ReplicaLostError(EngineError):
    """The replica's process or its connection is gone."""


class EngineStalledError(EngineError):
    """The engine has work and makes no progress."""


class StartError(ServerError):
    """Something a platform needs is missing, or a part of it does not start or stop."""


class UnreachableError(ServerError):
    """A platform, or a part of it that should be running, does not answer an operator's command."""


class ConfigError(ServerError):
    """The platform's configuration is refused; the message names each path."""


FOR_OPERATORS = (StartError, UnreachableError, ConfigError)
"""Errors whose messages name paths and hosts; clients never see these messages."""
