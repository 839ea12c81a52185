import inspect
import pickle

import pytest

from tera import errors
from tera.errors import RateLimitError, TeraError

ALL_ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, TeraError) and kind.__module__ == errors.__name__
]

# Contract E-2: status, type and code, by class.
TABLE = {
    "InvalidJsonError": (400, "invalid_request_error", "invalid_json"),
    "UnsupportedContentTypeError": (400, "invalid_request_error", "unsupported_content_type"),
    "MissingParameterError": (400, "invalid_request_error", "missing_required_parameter"),
    "InvalidTypeError": (400, "invalid_request_error", "invalid_type"),
    "InvalidValueError": (400, "invalid_request_error", "invalid_value"),
    "UnsupportedParameterError": (400, "invalid_request_error", "unsupported_parameter"),
    "ContextLengthError": (400, "invalid_request_error", "context_length_exceeded"),
    "MissingApiKeyError": (401, "authentication_error", "missing_api_key"),
    "InvalidApiKeyError": (401, "authentication_error", "invalid_api_key"),
    "ModelNotFoundError": (404, "invalid_request_error", "model_not_found"),
    "UnknownUrlError": (404, "invalid_request_error", "unknown_url"),
    "MethodNotAllowedError": (405, "invalid_request_error", "method_not_allowed"),
    "RequestTooLargeError": (413, "invalid_request_error", "request_too_large"),
    "RequestRateLimitError": (429, "requests", "rate_limit_exceeded"),
    "TokenRateLimitError": (429, "tokens", "rate_limit_exceeded"),
    "ConcurrencyLimitError": (429, "requests", "concurrency_limit_exceeded"),
    "QuotaError": (429, "insufficient_quota", "insufficient_quota"),
    "BackendFailureError": (500, "server_error", "backend_failure"),
    "InternalError": (500, "server_error", "internal_error"),
}

# Contract E-2 and H-2: nothing else reaches a tenant.
CODES_BY_STATUS_AND_TYPE = {
    (400, "invalid_request_error"): {
        "invalid_json",
        "unsupported_content_type",
        "missing_required_parameter",
        "invalid_type",
        "invalid_value",
        "unsupported_parameter",
        "context_length_exceeded",
    },
    (401, "authentication_error"): {"missing_api_key", "invalid_api_key"},
    (404, "invalid_request_error"): {"model_not_found", "unknown_url"},
    (405, "invalid_request_error"): {"method_not_allowed"},
    (413, "invalid_request_error"): {"request_too_large"},
    (429, "requests"): {"rate_limit_exceeded", "concurrency_limit_exceeded"},
    (429, "tokens"): {"rate_limit_exceeded"},
    (429, "insufficient_quota"): {"insufficient_quota"},
    (429, "overloaded"): {"engine_overloaded"},
    (500, "server_error"): {"backend_failure", "internal_error"},
}


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_error_survives_pickling_whole(kind: type[TeraError]) -> None:
    error = kind("What was wrong.", param="prompt[2]", retry_after_s=1.5)
    there = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    assert type(there) is kind
    assert (there.status, there.type, there.code) == (kind.status, kind.type, kind.code)
    assert there.message == str(there) == "What was wrong."
    assert there.param == "prompt[2]"
    assert there.retry_after_s == 1.5
    assert there.retryable is kind.retryable


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_error_is_rebuilt_from_its_arguments_alone(kind: type[TeraError]) -> None:
    rebuilt = kind(*kind("What was wrong.").args)
    assert (rebuilt.message, rebuilt.param, rebuilt.retry_after_s) == (
        "What was wrong.",
        None,
        None,
    )


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_subclass_keeps_the_one_constructor(kind: type[TeraError]) -> None:
    assert kind.__init__ is TeraError.__init__


@pytest.mark.parametrize("name", TABLE)
def test_e2_status_type_and_code(name: str) -> None:
    kind = getattr(errors, name)
    assert (kind.status, kind.type, kind.code) == TABLE[name]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_e2_no_error_is_outside_the_table(kind: type[TeraError]) -> None:
    if kind is TeraError:
        return
    assert kind.code in CODES_BY_STATUS_AND_TYPE[kind.status, kind.type]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_only_a_failure_of_the_platform_is_retryable(kind: type[TeraError]) -> None:
    assert not kind.retryable or kind.status == 500


@pytest.mark.parametrize("kind", [kind for kind in ALL_ERRORS if issubclass(kind, RateLimitError)])
def test_l6_a_limit_that_knows_no_wait_tells_clients_not_to_retry(
    kind: type[RateLimitError],
) -> None:
    assert kind("Wait.", retry_after_s=0.5).should_retry
    assert not kind("Never.").should_retry
    assert not kind(*kind("Wait.", retry_after_s=0.5).args).should_retry
