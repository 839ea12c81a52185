"""Metrics, with every name, label and bucket on one screen, and the format of log lines.

Each process has its own registry. `GET /metrics` returns that of the gateway replica that answers.
`GET /metrics/all`, on any gateway replica, collects those of all gateway and engine replicas and
joins them with `merge_expositions`, which adds the label `replica` to every sample. So one scrape
is complete, whichever process answers it, and sums and rates over `replica` stay right when
replicas come and go.
"""

import json
import logging
import sys
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tera.generation import ReplicaLoad

EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Time to first token ranges from a warm small model (ms) to a queue for a big one (minutes).
FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 15, 30, 60, 120, 300)
# 2 ms is a small model on a fast GPU, 50 ms reading speed; above a second something is wrong.
BETWEEN_TOKENS_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 3, 10)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300, 600)
# What the gateway itself adds before dispatch: fractions of a millisecond.
ADDED_BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.05, 0.2, 1)
# 20 ms is what one request may take from the others.
LOOP_LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 3, 10)


class Metrics:
    """One process's metrics of the gateway."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tera_requests",
            "Requests answered, by model, route, HTTP status and error code.",
            ["model", "route", "status", "code"],
            registry=registry,
        )
        self.ongoing_requests = Gauge(
            "tera_ongoing_requests", "Requests being answered.", ["route"], registry=registry
        )
        self.first_token_s = Histogram(
            "tera_time_to_first_token_seconds",
            "Arrival at the gateway to the first token.",
            ["model"],
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "tera_time_between_tokens_seconds",
            "Gap between two deliveries of tokens of one completion, at the gateway.",
            ["model"],
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "tera_request_duration_seconds",
            "Arrival at the gateway to the end of the answer.",
            ["model", "route"],
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.added_s = Histogram(
            "tera_gateway_added_seconds",
            "Arrival at the gateway to dispatch: authentication, validation and rendering.",
            ["model"],
            buckets=ADDED_BUCKETS_S,
            registry=registry,
        )
        self.loop_lag_s = Histogram(
            "tera_event_loop_lag_seconds",
            "How much later than due the gateway's event loop runs a task.",
            buckets=LOOP_LAG_BUCKETS_S,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "tera_prompt_tokens", "Prompt tokens of requests.", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "tera_cached_tokens",
            "Prompt tokens found in an engine's KV cache.",
            ["model"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "tera_completion_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self.replica_switches = Counter(
            "tera_replica_switches",
            "Generations that went on on another replica.",
            ["model"],
            registry=registry,
        )
        self.model_failed = Gauge(
            "tera_model_failed",
            "1 while a model cannot be loaded by this gateway replica, or started by Serve.",
            ["model"],
            registry=registry,
        )
        self.redis_degraded = Gauge(
            "tera_redis_degraded",
            "1 while this gateway replica cannot reach Redis.",
            registry=registry,
        )
        self.redis_outages = Gauge(
            "tera_redis_outages",
            "Times since its start that this gateway replica found Redis to be away.",
            registry=registry,
        )
        self.redis_used_bytes = Gauge(
            "tera_redis_memory_used_bytes",
            "Memory that Redis uses for its data.",
            registry=registry,
        )
        self.redis_max_bytes = Gauge(
            "tera_redis_memory_max_bytes",
            "Memory from which on Redis refuses writes; 0 is no bound.",
            registry=registry,
        )
        self.usage_unsettled = Gauge(
            "tera_usage_unsettled",
            "Ended requests whose record is not in the ledger yet.",
            registry=registry,
        )
        self.usage_given_up = Gauge(
            "tera_usage_given_up",
            "Records given up since the start, because Redis was away for too long.",
            registry=registry,
        )

    def exposition(self) -> str:
        """Return this process's metrics as Prometheus text."""
        return generate_latest(self.registry).decode()


def load_exposition(model: str, load: ReplicaLoad) -> str:
    """Return an engine replica's current load as Prometheus text."""
    registry = CollectorRegistry()
    for name, help_text, value in (
        ("tera_engine_running", "Generations in the engine's batch.", load.running),
        (
            "tera_engine_waiting",
            "Generations that the engine has accepted and not scheduled.",
            load.waiting,
        ),
        (
            "tera_engine_kv_usage_ratio",
            "Part of the engine's KV cache in use.",
            load.kv_usage_ratio,
        ),
        (
            "tera_engine_asleep",
            "1 while the engine waits for its turn on a shared GPU.",
            load.asleep,
        ),
    ):
        Gauge(name, help_text, ["model"], registry=registry).labels(model).set(value)
    return generate_latest(registry).decode()


def merge_expositions(parts: Iterable[tuple[str, str]]) -> str:
    """Return one Prometheus text made of `(replica, text)` parts.

    Families with the same name are joined, as the format requires, and every sample gets the
    label `replica`.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in parts:
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                header = headers.setdefault(family, [])
                if line not in header and len(header) < 2:
                    header.append(line)
            elif line and not line.startswith("#"):
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [
        line for family, header in headers.items() for line in (*header, *samples.get(family, ()))
    ]
    return "\n".join([*lines, ""])


def _labelled(sample: str, replica: str) -> str:
    """Return a sample line with the label `replica` put first."""
    label = f'replica="{replica}"'
    name_end = next(i for i, character in enumerate(sample) if character in "{ ")
    if sample[name_end] == "{":
        separator = "" if sample[name_end + 1] == "}" else ","
        return f"{sample[:name_end]}{{{label}{separator}{sample[name_end + 1 :]}"
    return f"{sample[:name_end]}{{{label}}}{sample[name_end:]}"


class JsonLines(logging.Formatter):
    """One JSON object per line: time in UTC, level, logger, message, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        whole_s = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "at": f"{whole_s}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_json_lines() -> None:
    """Write Tera's log records in this process to standard error, which Ray keeps in a file."""
    logger = logging.getLogger("tera")
    if not logger.handlers:
        # The file itself: Serve replaces `sys.stderr` with a logger that holds lines back until
        # there are a thousand.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(JsonLines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
