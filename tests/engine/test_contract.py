"""What every engine promises, on every engine."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest
from tests.engine.conftest import Asker, until
from tests.engine.streams import streamed

from tera.engine.turns import Sleeper
from tera.errors import ContextLengthError, InvalidRequestError, InvalidValueError, TeraError
from tera.generation import FinishReason, Sampling, TokenDelta

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = [504, 575, 282, 260, 314, 325]
GREEDY = Sampling(max_tokens=24, temperature=0, ignore_eos=True)


def sampled(seed: int | None, max_tokens: int = 24) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True)


class Calls:
    """What an engine calls of one generation, in order."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self.deltas: list[TokenDelta] = []
        self.errors: list[TeraError] = []
        self.abort: Callable[[], None] = lambda: None
        self.then: Callable[[TokenDelta], None] = lambda delta: None
        """Called with each delta."""

    def start(self, token_ids: list[int], sampling: Sampling) -> None:
        generation = self._asker.generation(token_ids, sampling)
        self.abort = self._asker.engine.start(generation, self._emit, self.errors.append)

    def _emit(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)
        self.then(delta)

    async def end(self) -> None:
        await until(lambda: bool(self.errors or (self.deltas and self.deltas[-1].finish_reason)))

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]


async def test_a_generation_is_pushed_until_its_finish_reason(asker: Asker) -> None:
    calls = Calls(asker)
    calls.start(PROMPT, GREEDY)
    assert calls.deltas == []
    await calls.end()
    assert calls.errors == []
    assert calls.token_ids == await asker.tokens(PROMPT, GREEDY)
    assert [bool(delta.finish_reason) for delta in calls.deltas].index(True) == (
        len(calls.deltas) - 1
    )


async def test_a_refused_generation_ends_after_it_was_started(asker: Asker) -> None:
    calls, let_go = Calls(asker), Calls(asker)
    calls.start(PROMPT, Sampling(max_tokens=0))
    let_go.start(PROMPT, Sampling(max_tokens=0))
    let_go.abort()
    assert calls.errors == []
    await calls.end()
    assert [type(error) for error in calls.errors] == [InvalidValueError]
    assert calls.deltas == []
    await asker.tokens(PROMPT, GREEDY)
    assert let_go.errors == []
    assert asker.engine.load().running == 0


async def test_nothing_is_heard_of_an_aborted_generation(asker: Asker) -> None:
    at_once, from_within, in_between = Calls(asker), Calls(asker), Calls(asker)
    at_once.start(PROMPT, GREEDY)
    at_once.abort()
    from_within.then = lambda delta: from_within.abort()
    from_within.start(PROMPT, GREEDY)
    in_between.start(PROMPT, GREEDY)
    await until(lambda: bool(in_between.deltas))
    in_between.abort()
    heard = len(in_between.deltas)
    for calls in (at_once, from_within, in_between):
        calls.abort()
    await until(lambda: asker.engine.load().running == 0)
    await asker.tokens(PROMPT, GREEDY)
    assert (len(at_once.deltas), len(from_within.deltas)) == (0, 1)
    assert len(in_between.deltas) == heard
    assert [*at_once.errors, *from_within.errors, *in_between.errors] == []
    assert asker.engine.load().kv_usage_ratio == 0


async def test_a_generation_may_abort_another_one_in_the_same_step(asker: Asker) -> None:
    first, second = Calls(asker), Calls(asker)
    first.then = lambda delta: second.abort()
    second.then = lambda delta: first.abort()
    first.start(PROMPT, GREEDY)
    second.start([*PROMPT, 300], GREEDY)
    await until(lambda: bool(first.deltas or second.deltas))
    await until(lambda: len(first.deltas) == 24 or len(second.deltas) == 24)
    assert min(len(first.deltas), len(second.deltas)) == 0
    assert asker.engine.load().running == 0


async def test_an_emit_that_raises_ends_its_own_generation_alone(
    asker: Asker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(delta: TokenDelta) -> None:
        raise RuntimeError("nobody there")

    broken, whole = Calls(asker), Calls(asker)
    broken.then = fail
    broken.start(PROMPT, GREEDY)
    whole.start(PROMPT, GREEDY)
    await whole.end()
    assert len(broken.deltas) == 1
    assert broken.errors == []
    assert len(whole.token_ids) == 24
    assert "nobody there" in caplog.text


async def test_greedy_is_deterministic(asker: Asker) -> None:
    first = await asker.tokens(PROMPT, GREEDY)
    assert len(first) == 24
    assert await asker.tokens(PROMPT, GREEDY) == first


async def test_top_p_zero_is_greedy(asker: Asker) -> None:
    greedy = await asker.tokens(PROMPT, GREEDY)
    narrow = Sampling(max_tokens=24, temperature=1.0, top_p=0.0, ignore_eos=True)
    assert await asker.tokens(PROMPT, narrow) == greedy


async def test_seed_decides_the_sampled_text(asker: Asker) -> None:
    first = await asker.tokens(PROMPT, sampled(7))
    assert await asker.tokens(PROMPT, sampled(7)) == first
    assert await asker.tokens(PROMPT, sampled(8)) != first


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, 2**64, -(2**70)])
async def test_any_integer_is_a_seed(asker: Asker, seed: int) -> None:
    first = await asker.tokens(PROMPT, sampled(seed, 8))
    assert await asker.tokens(PROMPT, sampled(seed, 8)) == first


async def test_without_a_seed_texts_differ(asker: Asker) -> None:
    assert await asker.tokens(PROMPT, sampled(None)) != await asker.tokens(PROMPT, sampled(None))


async def test_max_tokens_end_with_length(asker: Asker) -> None:
    deltas = await asker.deltas(PROMPT, GREEDY)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert sum(len(delta.token_ids) for delta in deltas) == 24


async def test_end_of_sequence_is_the_last_token(asker: Asker, eos_id: int) -> None:
    ending = Sampling(max_tokens=24, temperature=0, logit_bias={eos_id: 100.0})
    deltas = await asker.deltas(PROMPT, ending)
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].token_ids[-1] == eos_id


async def test_forbidden_token_never_comes(asker: Asker) -> None:
    first = (await asker.tokens(PROMPT, GREEDY))[0]
    sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True, logit_bias={first: -100.0})
    assert first not in await asker.tokens(PROMPT, sampling)


async def test_closing_the_stream_frees_the_engine(asker: Asker) -> None:
    long = Sampling(max_tokens=1500, temperature=0, ignore_eos=True)
    streams = [streamed(asker.engine, asker.generation([*PROMPT, i], long)) for i in range(4)]
    for stream in streams:
        await anext(stream)
    await until(lambda: asker.engine.load().running == 4)
    for stream in streams[1:]:
        await stream.aclose()
    await anext(streams[0])
    assert asker.engine.load().running <= 1
    assert asker.engine.load().waiting == 0
    await streams[0].aclose()
    await until(lambda: asker.engine.load().running == 0)
    assert asker.engine.load().kv_usage_ratio == 0


async def test_company_changes_no_text(asker: Asker) -> None:
    # More than run at once.
    prompts = [[*PROMPT, 300 + index] for index in range(20)]
    sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    alone = [await asker.tokens(prompt, sampling) for prompt in prompts]
    together = await asyncio.gather(*(asker.tokens(prompt, sampling) for prompt in prompts))
    assert together == alone


@pytest.mark.parametrize("cut", [1, 5, 16, 17, 23])
async def test_resumed_greedy_text_is_the_undisturbed_one(asker: Asker, cut: int) -> None:
    whole = await asker.tokens(PROMPT, GREEDY)
    rest = Sampling(max_tokens=24 - cut, temperature=0, ignore_eos=True)
    assert await asker.tokens(PROMPT + whole[:cut], rest, cut) == whole[cut:]


async def test_load_moves_and_returns(asker: Asker) -> None:
    assert asker.engine.load().running == 0
    long = Sampling(max_tokens=400, temperature=0, ignore_eos=True)
    streams = [streamed(asker.engine, asker.generation([*PROMPT, i], long)) for i in range(20)]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await until(lambda: asker.engine.load().running == 16)
    assert asker.engine.load().waiting == 4
    assert asker.engine.load().kv_usage_ratio > 0
    for first, stream in zip(firsts, streams, strict=True):
        first.cancel()
        await asyncio.wait([first])
        await stream.aclose()
    await until(lambda: asker.engine.load().running == 0 and asker.engine.load().waiting == 0)


async def test_repeated_prompt_is_found_in_the_cache(asker: Asker) -> None:
    prompt = [300 + (index * 7) % 500 for index in range(200)]
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    first = await asker.deltas(prompt, sampling)
    again = await asker.deltas(prompt, sampling)
    assert first[0].cached_tokens == 0
    assert 0 < again[0].cached_tokens < 200


async def test_b8_a_prompt_is_found_in_the_cache_by_its_own_salt_alone(asker: Asker) -> None:
    prompt = [301 + (index * 7) % 500 for index in range(200)]
    sampling = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    first = await asker.deltas(prompt, sampling, cache_salt="one")
    answer = [token_id for delta in first for token_id in delta.token_ids]
    sampling = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    for salt in ("two", "", "on"):
        other = await asker.deltas(prompt + answer, sampling, cache_salt=salt)
        assert other[0].cached_tokens == 0
    again = await asker.deltas(prompt + answer, sampling, cache_salt="one")
    assert 200 < again[0].cached_tokens < 260
    resumed = await asker.deltas(prompt + answer, sampling, resumed_tokens=60, cache_salt="two")
    assert 200 < resumed[0].cached_tokens < 260


async def test_logprobs_are_ranked_and_cover_each_token(asker: Asker) -> None:
    sampling = Sampling(max_tokens=5, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    deltas = await asker.deltas(PROMPT, sampling)
    tokens = [token_id for delta in deltas for token_id in delta.token_ids]
    logprobs = [each for delta in deltas for each in delta.logprobs or []]
    assert [each.token_id for each in logprobs] == tokens
    for each in logprobs:
        assert len(each.top) == 3
        assert each.top[0] == (each.token_id, each.logprob)
        assert sorted(each.top, key=lambda entry: -entry[1]) == each.top
        assert each.logprob <= 0
    prompt_logprobs = deltas[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert prompt_logprobs[0] is None
    assert [each.token_id for each in prompt_logprobs[1:] if each] == PROMPT[1:]
    assert all(len(each.top) == 2 for each in prompt_logprobs[1:] if each)
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])


async def test_zero_logprobs_give_the_chosen_token_alone(asker: Asker) -> None:
    sampling = Sampling(max_tokens=3, temperature=1.0, seed=1, ignore_eos=True, logprobs=0)
    deltas = await asker.deltas(PROMPT, sampling)
    logprobs = [each for delta in deltas for each in delta.logprobs or []]
    assert len(logprobs) == 3
    assert all(each.top == [] for each in logprobs)


async def test_prompt_over_the_context_is_refused(asker: Asker) -> None:
    with pytest.raises(ContextLengthError, match=r"2048 tokens; the prompt has 2050"):
        await asker.deltas([300] * 2050, GREEDY)


async def test_full_context_ends_with_length(asker: Asker) -> None:
    deltas = await asker.deltas([300] * 2045, Sampling(max_tokens=50, temperature=0))
    assert sum(len(delta.token_ids) for delta in deltas) == 3
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        pytest.param(Sampling(max_tokens=0), "max_tokens", id="no tokens"),
        pytest.param(Sampling(max_tokens=2, logprobs=21), "logprobs", id="too many logprobs"),
        pytest.param(
            Sampling(max_tokens=2, logit_bias={10**7: 1.0}), "logit_bias", id="unknown token"
        ),
        pytest.param(
            Sampling(max_tokens=2, logit_bias=dict.fromkeys(range(1025), 1.0)),
            "logit_bias",
            id="too many biases",
        ),
    ],
)
async def test_wrong_parameters_are_the_clients_fault(
    asker: Asker, sampling: Sampling, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        await asker.deltas(PROMPT, sampling)
    assert raised.value.param == param
    assert "parameter=" not in raised.value.message


async def test_healthy_when_idle_and_when_busy(asker: Asker) -> None:
    await asker.engine.check_health()
    stream = streamed(asker.engine, asker.generation(PROMPT, GREEDY))
    async with aclosing(stream):
        await anext(stream)
        await asker.engine.check_health()


async def test_sleep_stops_what_runs_and_waking_goes_on_with_it(
    asker: Asker, engine: Sleeper
) -> None:
    long = Sampling(max_tokens=80, temperature=0, ignore_eos=True)
    undisturbed = await asker.tokens(PROMPT, long)
    token_ids: list[int] = []
    stream = streamed(engine, asker.generation(PROMPT, long))

    async def read() -> None:
        async with aclosing(stream):
            async for delta in stream:
                token_ids.extend(delta.token_ids)

    token_ids += (await anext(stream)).token_ids
    await engine.sleep()
    running = asyncio.create_task(read())
    come_late = asyncio.create_task(asker.tokens(PROMPT, GREEDY))
    await engine.check_health()
    done, _ = await asyncio.wait([running, come_late], timeout=0.2)
    assert not done
    assert len(token_ids) < 80
    await engine.wake()
    await running
    assert token_ids == undisturbed
    assert await come_late == undisturbed[:24]


async def test_whoever_leaves_an_engine_that_sleeps_is_forgotten(
    asker: Asker, engine: Sleeper
) -> None:
    stream = streamed(engine, asker.generation(PROMPT, GREEDY))
    await anext(stream)
    await engine.sleep()
    await stream.aclose()
    await engine.wake()
    await until(lambda: engine.load().running == 0 and engine.load().waiting == 0)
    assert len(await asker.tokens(PROMPT, GREEDY)) == 24
