"""Reports a tenant's limits in the headers that OpenAI's clients read."""

import math

from tera.errors import TeraError
from tera.tenancy.limits import Admission, Allowance

LIMIT_HEADERS = tuple(
    f"x-ratelimit-{figure}-{kind}".encode()
    for kind in ("requests", "tokens")
    for figure in ("limit", "remaining", "reset")
)


def limit_headers(admission: Admission | None) -> list[tuple[bytes, bytes]]:
    """Return the headers for a request that reached the limits; none if there is no limit."""
    if admission is None:
        return []
    headers: list[tuple[bytes, bytes]] = []
    for names, allowance in (
        (LIMIT_HEADERS[:3], admission.requests),
        (LIMIT_HEADERS[3:], admission.tokens),
    ):
        if allowance is not None:
            headers += zip(names, _values(allowance), strict=True)
    return headers


def _values(allowance: Allowance) -> tuple[bytes, bytes, bytes]:
    return (
        b"%d" % allowance.limit,
        b"%d" % allowance.remaining,
        go_duration(allowance.reset_us).encode(),
    )


def go_duration(duration_us: int) -> str:
    """Return a duration as Go writes it, in milliseconds rounded up: `6m0s`, `1.2s`, `20ms`."""
    whole_ms = -(-duration_us // 1000)
    if whole_ms < 1000:
        return f"{whole_ms}ms" if whole_ms else "0s"
    minutes, rest_ms = divmod(whole_ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{seconds}"
    return f"{minutes}m{seconds}" if minutes else seconds


def retry_headers(error: TeraError) -> dict[str, str]:
    """Return headers that say when the client of a refused request should retry, if at all."""
    if error.retry_after_s is None:
        return {"x-should-retry": "false"}
    # Round to whole milliseconds first: a float's last digit must not add another second.
    wait_ms = max(1, math.ceil(error.retry_after_s * 1000 - 1e-6))
    return {"retry-after": str(max(1, -(-wait_ms // 1000))), "retry-after-ms": str(wait_ms)}
