"""From a generation's tokens to pieces: the same, however the tokens come and the client reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.gateway.conftest import exchange

from tera.contract.chat_answers import ToolCallDelta
from tera.engine.simulated_vocabulary import Vocabulary
from tera.gateway.derender import SLICE_ENTRIES, Choice, ChoiceText
from tera.gateway.echo import EchoedPrompt
from tera.gateway.pieces import Piece, PositionLogprobs
from tera.gateway.render import AnswerPiece
from tera.gateway.simulated_text import SimulatedTextModel
from tera.generation import FinishReason, TokenDelta, TokenLogprobs

TEXT = SimulatedTextModel({})
EOS = Vocabulary.eos_id
PROMPT = [*b"Hi ", 300]

# Few characters, so that texts hold stop strings and beginnings of them, and one of four tokens.
LETTERS = "ab🚀"


class Kept:
    """An `Answer` that keeps its pieces, for a client that reads when the test says so."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.blocked = False

    async def free(self) -> None:
        self.blocked = False

    def add(self, piece: Piece) -> None:
        assert not self.blocked, "what a client has no room for is held back"
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(piece.content for piece in self.pieces)


@dataclass
class Parsed:
    """An `AnswerParser` that calls a tool at each «b», reasons at each «a», and keeps its input."""

    token_ids: list[int] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def push(self, text: str, token_ids: list[int], *, finished: bool) -> AnswerPiece:
        self.token_ids += token_ids
        self.finished.append(finished)
        calls = [ToolCallDelta(index=0) for _ in range(text.count("b"))]
        return AnswerPiece(text.replace("a", "").replace("b", ""), "a" * text.count("a"), calls)


@dataclass(frozen=True)
class Case:
    """A generation, and how its text is to be shown."""

    token_ids: list[int]
    finish: FinishReason
    stops: list[str]
    logprobs: bool = False
    echo: str | None = None
    parsed: bool = False


@dataclass
class Told:
    """What a client is told, and what it is charged for."""

    text: str
    reasoning: str
    calls: int
    logprobs: list[PositionLogprobs]
    finishes: list[FinishReason]
    completion_tokens: int
    parsed: list[int]


async def told(case: Case, cuts: Sequence[tuple[int, bool]]) -> Told:
    """Return what comes of a generation whose tokens come in deltas.

    Args:
        case: the generation.
        cuts: of each delta, how many tokens it has, and whether the client reads then; the rest
            comes at once.
    """
    answer, its_exchange, parser = Kept(), exchange(), Parsed() if case.parsed else None
    echo = case.echo or ""
    prompt = EchoedPrompt(echo, PROMPT, range(1)) if case.logprobs and echo else None
    choice = Choice(
        *(0, 0, PROMPT, case.stops),
        logprobs=case.logprobs,
        echo="" if prompt else echo,
        prompt=prompt,
    )
    heard: list[TokenDelta] = []
    text = ChoiceText(choice, TEXT, parser, answer, its_exchange, heard.append)
    for delta, reads in deltas(case, cuts):
        answer.blocked = not reads
        before = len(answer.pieces)
        may_begin = prompt is None or prompt.is_told
        enough = text.push(delta)
        assert len(answer.pieces) - before == (reads and may_begin)
        if prompt is not None and not may_begin:
            await prompt.tell(TEXT, answer)
        if enough:
            break
    await text.finish()
    assert heard
    *others, last = answer.pieces
    assert last.finish_reason is not None
    assert all(piece.finish_reason is None for piece in others)
    if parser is not None:
        pieces_of_the_prompt = 0 if prompt is None else 1
        assert parser.finished == [False] * (len(others) - pieces_of_the_prompt) + [True]
    return Told(
        answer.text,
        "".join(piece.reasoning for piece in answer.pieces),
        sum(len(piece.tool_calls) for piece in answer.pieces),
        [position for piece in answer.pieces for position in piece.logprobs or ()],
        [last.finish_reason],
        its_exchange.completion_tokens,
        [] if parser is None else parser.token_ids,
    )


def deltas(case: Case, cuts: Sequence[tuple[int, bool]]) -> list[tuple[TokenDelta, bool]]:
    """Return a generation's deltas, and whether the client reads at each."""
    found, start, tokens = [], 0, case.token_ids
    for size, reads in [*cuts, (len(tokens), True)]:
        end = min(start + size, len(tokens))
        finish = case.finish if end == len(tokens) else None
        logprobs = [entry(token_id) for token_id in tokens[start:end]] if case.logprobs else None
        prompt = None
        if case.echo is not None and case.logprobs and start == 0:
            prompt = [None, *map(entry, PROMPT[1:])]
        delta = TokenDelta(1, tokens[start:end], finish, 2, logprobs, prompt)
        found.append((delta, reads))
        if finish is not None:
            return found
        start = end
    raise AssertionError("the last delta ends the generation")


def entry(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -token_id / 100, [(token_id, -token_id / 100), (98, -9.0)])


ONE_BY_ONE = [(1, True)] * 200

cases = st.builds(
    lambda text, stops, ends, logprobs, echo, parsed: Case(
        [*text.encode(), *([EOS] if ends else [])] or [97],
        FinishReason.STOP if ends else FinishReason.LENGTH,
        stops,
        logprobs,
        echo,
        parsed,
    ),
    st.text(LETTERS, max_size=12),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "Hi a"]),
    st.booleans(),
)
cuts = st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=20)


@settings(max_examples=200)
@given(cases, cuts)
@example(Case([*b"aab"], FinishReason.LENGTH, ["ab"]), [(1, False), (1, False), (1, False)])
@example(Case([*b"xabyyy"], FinishReason.LENGTH, ["ab"]), [(2, True), (1, False), (1, False)])
@example(Case([*b"ab", EOS], FinishReason.STOP, ["b"], logprobs=True), [(3, True)])
@example(Case([*b"ab", EOS], FinishReason.STOP, ["bc"], logprobs=True), [(1, False), (2, False)])
async def test_s4_what_is_told_depends_on_no_cut_and_on_no_clients_pace(
    case: Case, cuts: list[tuple[int, bool]]
) -> None:
    assert await told(case, cuts) == await told(case, ONE_BY_ONE)


@pytest.mark.parametrize(
    ("case", "text", "finish", "used"),
    [
        pytest.param(
            Case([*b"abc"], FinishReason.LENGTH, []), "abc", FinishReason.LENGTH, 3, id="no stops"
        ),
        pytest.param(
            Case([*b"abc", EOS], FinishReason.STOP, []),
            *("abc", FinishReason.STOP, 4),
            id="the token that ends the text is charged and not shown",
        ),
        pytest.param(Case([EOS], FinishReason.STOP, []), "", FinishReason.STOP, 1, id="at once"),
        pytest.param(
            Case([*b"abcdef"], FinishReason.LENGTH, ["cd"]),
            *("ab", FinishReason.STOP, 4),
            id="a stop string and nothing after it is charged",
        ),
        pytest.param(
            Case([*b"abcd", EOS], FinishReason.STOP, ["cd"]),
            *("ab", FinishReason.STOP, 4),
            id="a stop string before the end",
        ),
        pytest.param(
            Case([*b"abc"], FinishReason.LENGTH, ["cd"]),
            *("abc", FinishReason.LENGTH, 3),
            id="what only began as one",
        ),
        pytest.param(
            Case([*b"ab"], FinishReason.LENGTH, ["b"], echo="Hi b "),
            *("Hi b a", FinishReason.STOP, 2),
            id="a prompt is not searched",
        ),
        pytest.param(
            Case([*"a🚀".encode()[:-1]], FinishReason.LENGTH, []),
            *("a", FinishReason.LENGTH, 4),
            id="cut inside of a character",
        ),
    ],
)
@pytest.mark.parametrize("cuts", [ONE_BY_ONE, [], [(1, False)] * 9], ids=["each", "all", "held"])
async def test_c2_what_is_told_and_charged(
    case: Case, text: str, finish: FinishReason, used: int, cuts: list[tuple[int, bool]]
) -> None:
    found = await told(case, cuts)
    assert (found.text, found.finishes, found.completion_tokens) == (text, [finish], used)


async def test_s9_while_a_client_does_not_read_one_delta_is_all_that_is_held() -> None:
    answer, its_exchange = Kept(), exchange()
    text = ChoiceText(Choice(0, 0, PROMPT, []), TEXT, None, answer, its_exchange, unheard)
    answer.blocked = True
    for _ in range(100):
        assert not text.push(TokenDelta(1, [*b"ab"]))
    assert answer.pieces == []
    answer.blocked = False
    assert not text.push(TokenDelta(1, [*b"c"]))
    assert [piece.content for piece in answer.pieces] == ["ab" * 100 + "c"]
    assert its_exchange.completion_tokens == 201


async def test_x1_log_probabilities_that_were_held_back_are_told_a_few_at_a_time() -> None:
    answer, its_exchange = Kept(), exchange()
    choice = Choice(0, 0, PROMPT, ["yz"], logprobs=True)
    text = ChoiceText(choice, TEXT, None, answer, its_exchange, unheard)
    tokens = [*b"ab" * 1000, *b"xyzab"]
    answer.blocked = True
    for token_id in tokens[:-1]:
        assert not text.push(TokenDelta(1, [token_id], logprobs=[entry(token_id)]))
    answer.blocked = False
    last = TokenDelta(1, tokens[-1:], FinishReason.LENGTH, logprobs=[entry(tokens[-1])])
    assert not text.push(last)
    assert len(answer.pieces) == 1
    await text.finish()
    sizes = [len(piece.logprobs or ()) for piece in answer.pieces]
    assert sum(sizes) == 2003
    assert max(sizes) * 3 <= SLICE_ENTRIES
    assert answer.text == "ab" * 1000 + "x"
    assert answer.pieces[-1].finish_reason is FinishReason.STOP
    assert its_exchange.completion_tokens == 2003
    assert text.held_tokens == 0


def unheard(delta: TokenDelta) -> None:
    """Take no note of a delta."""


async def test_s4_a_stop_string_in_what_was_held_ends_the_text_and_the_work() -> None:
    answer, its_exchange = Kept(), exchange()
    text = ChoiceText(Choice(0, 0, PROMPT, ["bc"]), TEXT, None, answer, its_exchange, unheard)
    answer.blocked = True
    for token in b"abcabc":
        assert not text.push(TokenDelta(1, [token]))
    answer.blocked = False
    assert text.push(TokenDelta(1, [*b"d"]))
    assert answer.pieces == [Piece(0, "a", FinishReason.STOP)]
    assert its_exchange.completion_tokens == 3


async def test_s6_what_is_held_when_a_generation_fails_is_told_all_the_same() -> None:
    answer = Kept()
    text = ChoiceText(Choice(0, 0, PROMPT, ["bc"]), TEXT, None, answer, exchange(), unheard)
    answer.blocked = True
    text.push(TokenDelta(1, [*b"ab"]))
    await text.finish()
    # «b» may begin a stop string, and whether it does is not known.
    assert answer.pieces == [Piece(0, "a")]
    await text.finish()
    assert len(answer.pieces) == 1


@pytest.mark.parametrize("reads", [True, False])
async def test_t1_an_echoed_prompts_logprobs_come_first_and_once(reads: bool) -> None:
    case = Case([*b"ab"], FinishReason.LENGTH, [], logprobs=True, echo="Hi ")
    found = await told(case, [(1, reads)])
    tokens = [position.token.data for position in found.logprobs]
    assert tokens == [*(text.data for text in TEXT.token_texts(PROMPT)), b"a", b"b"]
    assert found.logprobs[0].logprob is None
    assert [position.logprob for position in found.logprobs[1:]] == [
        -token_id / 100 for token_id in [*PROMPT[1:], *b"ab"]
    ]
    assert [token.text for token, _ in found.logprobs[-1].top] == ["b", "b"]


async def test_t1_a_stop_strings_tokens_have_logprobs_and_the_ending_token_has_none() -> None:
    stopped = await told(Case([*b"abcd"], FinishReason.LENGTH, ["bc"], logprobs=True), [])
    assert [position.token.text for position in stopped.logprobs] == ["a", "b", "c"]
    over = await told(Case([*b"ab", EOS], FinishReason.STOP, [], logprobs=True), [])
    assert [position.token.text for position in over.logprobs] == ["a", "b"]


async def test_each_delta_of_tokens_is_heard_of_as_it_comes() -> None:
    answer, heard = Kept(), list[TokenDelta]()
    text = ChoiceText(Choice(0, 0, PROMPT, []), TEXT, None, answer, exchange(), heard.append)
    answer.blocked = True
    sent = [TokenDelta(1, [97], None, 5), TokenDelta(1, [98], None, 5)]
    for number, delta in enumerate(sent, start=1):
        text.push(delta)
        assert len(heard) == number
