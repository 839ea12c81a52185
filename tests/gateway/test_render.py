from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tera.contract.completions import Prompt
from tera.errors import InvalidValueError
from tera.gateway.render import StopStrings, render_prompt
from tera.gateway.simulated_text import SimulatedTextModel

# Few characters, so that texts hold stop strings and beginnings of them.
LETTERS = "ab🚀"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=5), max_size=12)


def ended_at(text: str, stops: list[str]) -> str | None:
    """Return what stands before the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return None


def beginnings(stops: list[str]) -> Iterator[str]:
    for stop in stops:
        for length in range(1, len(stop)):
            yield stop[:length]


@settings(max_examples=300)
@given(PIECES, STOPS)
@example(["a", "a", "b"], ["aab", "ab"])
@example(["aaab"], ["aab"])
@example(["ab"], ["abc", "b"])
@example(["", "🚀a", ""], ["🚀🚀"])
def test_s4_the_text_depends_on_no_cut_and_no_stop_string_leaves(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    wanted = ended_at(whole, stops)
    parts = StopStrings(stops)
    pushed, shown = "", ""
    for piece in pieces:
        pushed += piece
        text, stopped = parts.push(piece)
        shown += text
        assert stopped == (ended_at(pushed, stops) is not None)
        if stopped:
            assert shown == wanted
            assert parts.flush() == ""
            return
        # Held back is what may still become a stop string, and nothing more.
        held = pushed.removeprefix(shown)
        assert shown + held == pushed
        ends = [begin for begin in beginnings(stops) if pushed.endswith(begin)]
        assert held == max(ends, key=len, default="")
    assert wanted is None
    assert shown + parts.flush() == whole


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        pytest.param([], ["a", "b"], ["a", "b"], id="none"),
        pytest.param(["END"], ["xE", "N", "x"], ["x", "", "ENx"], id="only a beginning"),
        pytest.param(["END"], ["x E", "ND y"], ["x ", ""], id="in two pieces"),
        pytest.param(["END"], ["x END y END"], ["x "], id="the first one"),
        pytest.param(["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], id="begins anew"),
        pytest.param(["\n", "\n\n"], ["a\n", "\n"], ["a"], id="the first to be complete"),
        pytest.param(["b", "ab"], ["xab"], ["x"], id="the longest of two at one place"),
        pytest.param(["日本"], ["x日", "本"], ["x", ""], id="not ASCII"),
    ],
)
def test_s4_pieces_leave_as_soon_as_they_may(
    stops: list[str], pieces: list[str], shown: list[str]
) -> None:
    parts = StopStrings(stops)
    found = []
    for piece in pieces:
        text, stopped = parts.push(piece)
        found.append(text)
        if stopped:
            break
    assert found == shown


TEXT = SimulatedTextModel({})


async def test_c3_prompts_are_text_or_ids_and_each_stays_what_it_is() -> None:
    prompts: list[Prompt] = ["One", [72, 105], "日本"]
    found = [await render_prompt(TEXT, prompt, "prompt", echo=False) for prompt in prompts]
    ids = [await TEXT.encode("One"), [72, 105], await TEXT.encode("日本")]
    assert found == [(token_ids, None) for token_ids in ids]


async def test_c3_an_echo_is_the_prompt_as_text() -> None:
    prompts: list[Prompt] = ["One", [72, 105], [*"🚀".encode()]]
    found = [await render_prompt(TEXT, prompt, "prompt", echo=True) for prompt in prompts]
    assert [echo for _, echo in found] == ["One", "Hi", "🚀"]


@pytest.mark.parametrize("token_id", [-1, TEXT.vocab_size, 10**9])
async def test_c3_an_id_that_no_token_has_is_named_by_its_place(token_id: int) -> None:
    with pytest.raises(InvalidValueError) as refused:
        await render_prompt(TEXT, [2, token_id], "prompt[1]", echo=False)
    assert refused.value.param == "prompt[1][1]"
    assert str(token_id) in refused.value.message
