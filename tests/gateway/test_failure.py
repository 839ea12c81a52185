"""What operators read of a model that cannot be served."""

from types import SimpleNamespace

import pytest
from pydantic import BaseModel, ValidationError

from tera.errors import ConfigError
from tera.gateway.failure import REASON_CHARACTERS, last_line, reason_of


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param("one\n  two\n\nthree", "one two three", id="one line"),
        pytest.param(
            "no config.json in /srv/state/models/a-b.c/snapshots", "no config.json in …/snapshots"
        ),
        pytest.param(
            "see https://huggingface.co/org/model/tree", "see https://huggingface.co/org/model/tree"
        ),
        pytest.param("org/model is gated", "org/model is gated", id="a repository's name"),
        pytest.param("token hf_AbC123 is wrong", "token hf_… is wrong", id="a token"),
    ],
)
def test_h9_a_reason_is_one_line_without_directories_and_tokens(message: str, reason: str) -> None:
    assert reason_of(ConfigError(message)) == reason


def test_a_reason_is_short() -> None:
    assert reason_of(ValueError("x" * 10_000)) == "x" * (REASON_CHARACTERS - 1) + "…"


def test_an_error_without_a_message_has_its_name() -> None:
    assert reason_of(TimeoutError()) == "TimeoutError"


def test_h9_a_refused_argument_is_not_repeated() -> None:
    class Args(BaseModel):
        seed: int

    with pytest.raises(ValidationError) as refused:
        Args.model_validate({"seed": "secret"})
    reason = reason_of(refused.value)
    assert "secret" not in reason
    assert "seed" in reason
    assert "valid integer" in reason


def test_an_applications_last_line_says_why_it_failed() -> None:
    def application(of_application: str, of_engine: str) -> SimpleNamespace:
        engine = SimpleNamespace(message=of_engine)
        return SimpleNamespace(message=of_application, deployments={"Engine": engine})

    failed = "Deploying failed:\nTraceback\n  ValueError: no such model\n"
    assert last_line(application(failed, "")) == "ValueError: no such model"
    assert last_line(application("Deploying failed:", failed)) == "ValueError: no such model"
    assert last_line(application("", "")) == ""
