"""`python -m tests.fuzz TARGET SECONDS`: search for an input that breaks what no input may break.

Targets that read bytes are searched by atheris, which follows the coverage of Tera's code; what it
finds worth keeping is in `build/fuzz/TARGET`, and an input that fails is written there. `api` sends
requests made from the OpenAPI document to a gateway in this process.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

API = "api"
NAMES = ("bodies", "events", "frames", "rewriting", API)
BUILD = Path("build/fuzz")
ROUND_EXAMPLES = 100
MOST_MIB = 2048
MOST_BYTES = 4096
"""Of an input: longer ones are slower, and find little else."""


def main() -> None:
    """Search for as long as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("seconds", type=int)
    options = parser.parse_args()
    if options.target == API:
        _ask(options.seconds)
    else:
        _search(options.target, options.seconds)


def _search(target: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["tera"]):
        from tests.fuzz.targets import SEEDS, TARGETS, WORDS

    corpus = BUILD / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[target]):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = corpus.with_suffix(".words")
    words.write_text("".join(json.dumps(word) + "\n" for word in WORDS.get(target, [])))
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={MOST_MIB}", "-timeout=10"]
    limits.append(f"-max_len={MOST_BYTES}")
    shown = ["-print_final_stats=1", f"-artifact_prefix={corpus}/"]
    arguments = [sys.argv[0], *limits, *shown, f"-dict={words}", str(corpus)]
    atheris.Setup(arguments, TARGETS[target])
    atheris.Fuzz()  # ends the process


def _ask(seconds: int) -> None:
    import httpx
    from tests.contract.conftest import MODEL, Gateway
    from tests.contract.fuzz import FUZZED, fuzz

    gateway = Gateway()

    def send(method: str, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"content-type": "application/json"} if body else {}
        return gateway.request(method, path, headers=headers, **body)

    until, rounds = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until:
            fuzz(send, MODEL, FUZZED[rounds % len(FUZZED)], examples=ROUND_EXAMPLES)
            rounds += 1
    finally:
        gateway.close()
    sys.stdout.write(f"{rounds} rounds of {ROUND_EXAMPLES} requests\n")


if __name__ == "__main__":
    main()
