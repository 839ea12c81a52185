"""Why a model cannot be served, in words for operators."""

import re
from typing import Any, Final

REASON_CHARACTERS: Final = 300

_VALIDATION_DETAILS = re.compile(r"\s*\[type=.*?\]|For further information visit \S+")
"""What pydantic adds to a message; it repeats the arguments, and so possibly a token."""
_TOKEN = re.compile(r"\bhf_\w+")
_DIRECTORY = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")


def reason_of(error: Exception) -> str:
    """Return an error on one line and shortened, without directories and tokens."""
    return shortened(str(error) or type(error).__name__)


def shortened(text: str) -> str:
    """Return a message on one line and shortened, without directories and tokens."""
    text = _VALIDATION_DETAILS.sub("", text)
    text = _DIRECTORY.sub("…/", _TOKEN.sub("hf_…", text))
    line = " ".join(text.split())
    return line if len(line) <= REASON_CHARACTERS else f"{line[: REASON_CHARACTERS - 1]}…"


def last_line(application: Any) -> str:
    """Return the last line of what Serve says of an application, which is why it failed.

    Args:
        application: its status. The message of the application comes first, then those of its
            deployments; they hold tracebacks.
    """
    deployments = application.deployments.values()
    messages = [application.message, *(deployment.message for deployment in deployments)]
    lines = [line.strip() for text in messages for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
