"""Completions in the making, from pieces that come in any order."""

from typing import Any

import pytest
from tests.gateway.dialects.answering import drawn_pieces, streamed, whole

from tera.gateway.dialects.completions import CompletionQuestion
from tera.gateway.pieces import Piece
from tera.gateway.request import Prompts
from tera.generation import FinishReason


def question(**fields: Any) -> CompletionQuestion:
    return CompletionQuestion({"model": "m", "prompt": ["One", "Two"], **fields})


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(
    ("logprobs", "usage"), [(True, False), (False, True)], ids=["logprobs", "usage"]
)
async def test_s4_a_streams_events_add_up_to_the_whole_answer(
    seed: int, logprobs: bool, usage: bool
) -> None:
    pieces = drawn_pieces(seed, 4, logprobs=logprobs, chat=False)
    fields = {"n": 2, "logprobs": 2 if logprobs else None}
    said = whole(question(**fields), pieces)
    options = {"stream": True, "stream_options": {"include_usage": usage}}
    chunks = await streamed(question(**fields, **options), pieces)
    if usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]) == ([], said["usage"])
    assert all(chunk.get("usage") is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for index, wanted in enumerate(said["choices"]):
        mine = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        assert "".join(each["text"] for each in mine) == wanted["text"]
        assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [
            wanted["finish_reason"]
        ]
        assert mine[-1]["finish_reason"] is not None
        told = [each["logprobs"] for each in mine if each["logprobs"] is not None]
        if wanted["logprobs"] is None:
            assert told == []
            continue
        for name, entries in wanted["logprobs"].items():
            assert [entry for part in told for entry in part[name]] == entries


async def test_s2_a_piece_that_says_nothing_is_no_event() -> None:
    pieces = [
        Piece(0, ""),
        Piece(0, "a"),
        Piece(0, "", logprobs=[]),
        Piece(0, "", FinishReason.LENGTH),
    ]
    chunks = await streamed(question(stream=True), pieces)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", ""]


def test_c1_a_question_is_read_into_what_the_pipeline_knows() -> None:
    asked = question(
        n=2, stop="x", user="me", max_tokens=5, logprobs=3, echo=True, seed=4, top_k=-1, top_p=0
    )
    request = asked.request
    assert not asked.stream
    assert request.content == Prompts(["One", "Two"], ["prompt[0]", "prompt[1]"], echo=True)
    assert (request.model, request.capability, request.user) == ("m", "completions", "me")
    assert (request.n, request.max_tokens, request.stops) == (2, 5, ["x"])
    sampling = request.sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, 3)
    # An empty nucleus is the most likely token.
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 1.0, 0)
    assert sampling.seed == 4


def test_c1_one_prompt_is_named_without_an_index() -> None:
    for prompt in ("One", [65, 66]):
        content = question(prompt=prompt).request.content
        assert content == Prompts([prompt], ["prompt"])
