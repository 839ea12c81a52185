"""One generation over replicas that fail as they are told, and over the simulated engine."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

import msgspec
import pytest
import pytest_asyncio
from tests.routing.conftest import (
    Attempt,
    EngineHandle,
    Script,
    ScriptedHandle,
    ended,
    until,
)

from tera import wire
from tera.engine.simulated import SimulatedEngine
from tera.errors import (
    BackendFailureError,
    EngineError,
    InvalidRequestError,
    InvalidValueError,
    ReplicaLostError,
)
from tera.generation import FinishReason, ReplicaLoad, Sampling, TokenDelta, TokenLogprobs
from tera.routing import channel, dispatch, retry_budget
from tera.routing.channel import TokenReceiver
from tera.routing.dispatch import Attempts, Dispatcher, DispatchLimits, ModelHandle
from tera.routing.retry_budget import FIRST_BALANCE, RETRIES_PER_GENERATION
from tera.routing.switchboard import Share

SHARE = Share("tenant")
PROMPT = [10, 11, 12]
PATIENT = DispatchLimits(
    deadline_s=60, first_token_deadline_s=60, cold_start_deadline_s=60, retries=2
)


def limits(**changes: float) -> DispatchLimits:
    """Return limits that no test meets by chance, but for the changed ones."""
    return DispatchLimits(**{**_fields(PATIENT), **changes})  # type: ignore[arg-type]


def _fields(kept: DispatchLimits) -> dict[str, float]:
    return {name: getattr(kept, name) for name in DispatchLimits.__slots__}


class Stage:
    """The gateway's side of one generation: what it reads, and scripts that wait for that."""

    def __init__(self, receiver: TokenReceiver) -> None:
        self._receiver = receiver
        self.attempts = Attempts()
        self.deltas: list[TokenDelta] = []
        self.hangs = asyncio.Event()
        """A script has come to where it waits for ever."""

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [delta.finish_reason for delta in self.deltas if delta.finish_reason is not None]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    def dispatcher(self, handle: ModelHandle, limits: DispatchLimits = PATIENT) -> Dispatcher:
        return Dispatcher(handle, self._receiver, limits)

    def run(
        self,
        handle: ModelHandle,
        sampling: Sampling | None = None,
        limits: DispatchLimits = PATIENT,
        prompt: Sequence[int] = PROMPT,
    ) -> AsyncGenerator[TokenDelta]:
        sampling = sampling or Sampling(max_tokens=9)
        return self.dispatcher(handle, limits).run(
            "request", SHARE, list(prompt), sampling, self.attempts
        )

    async def read(
        self,
        handle: ModelHandle,
        sampling: Sampling | None = None,
        limits: DispatchLimits = PATIENT,
        prompt: Sequence[int] = PROMPT,
    ) -> None:
        """Read the generation to its end."""
        async with (
            asyncio.timeout(20),
            aclosing(self.run(handle, sampling, limits, prompt)) as deltas,
        ):
            async for delta in deltas:
                self.deltas.append(delta)

    async def taken(self, attempt: Attempt) -> None:
        """Let the attempt's replica take it, and wait until the gateway knows."""
        await attempt.take()
        await until(lambda: attempt.name in self._receiver.loads)

    async def took(self, attempt: Attempt, *token_ids: int) -> None:
        """As `taken`, with tokens, which the gateway has read then."""
        await self.taken(attempt)
        if token_ids:
            await attempt.send(*token_ids)
        read = attempt.generation.resumed_tokens + len(token_ids)
        await until(lambda: len(self.token_ids) == read)

    def lives(self, *token_ids: int, finish: FinishReason = FinishReason.LENGTH) -> Script:
        async def script(attempt: Attempt) -> bytes:
            await attempt.take()
            await attempt.send(*token_ids, finish=finish)
            return ended(finish, len(token_ids))

        return script

    def dies_after(self, *token_ids: int) -> Script:
        async def script(attempt: Attempt) -> bytes:
            await self.took(attempt, *token_ids)
            return await attempt.die()

        return script

    def raises(self, error: BaseException, *token_ids: int) -> Script:
        """Return a script that says its error by the call, with the connection kept."""

        async def script(attempt: Attempt) -> bytes:
            await self.took(attempt, *token_ids)
            raise error

        return script

    def answers(self, answer: bytes, *token_ids: int) -> Script:
        """Return a script whose tokens end without the one that has a finish reason."""

        async def script(attempt: Attempt) -> bytes:
            await self.took(attempt, *token_ids)
            return answer

        return script

    def hangs_after(self, *token_ids: int) -> Script:
        async def script(attempt: Attempt) -> bytes:
            await self.took(attempt, *token_ids)
            return await self.hang(attempt)

        return script

    async def hang(self, attempt: Attempt) -> bytes:
        """Be called, and do nothing: a script."""
        self.hangs.set()
        found: bytes = await asyncio.get_running_loop().create_future()
        return found


async def is_not_there(attempt: Attempt) -> bytes:
    """Fail as the call to a replica that had died before it was asked."""
    raise ReplicaLostError("The engine replica was lost.")


@pytest.fixture
def stage(receiver: TokenReceiver) -> Stage:
    return Stage(receiver)


Scripted = Callable[..., ScriptedHandle]


@pytest_asyncio.fixture
async def scripted() -> AsyncGenerator[Scripted]:
    handles: list[ScriptedHandle] = []

    def scripted(*scripts: Script) -> ScriptedHandle:
        handles.append(ScriptedHandle(*scripts))
        return handles[-1]

    yield scripted
    for handle in handles:
        await handle.close()


@pytest.fixture
def deaths_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no loss count as soon after the take: it was not the request."""
    monkeypatch.setattr(dispatch, "POISON_WINDOW_S", -1)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(dispatch, "LAST_FRAME_GRACE_S", 0.01)


async def test_deltas_arrive_as_the_replica_sends_them(stage: Stage, scripted: Scripted) -> None:
    async def script(attempt: Attempt) -> bytes:
        await stage.took(attempt, 1, 2)
        await attempt.send(3, finish=FinishReason.STOP)
        return ended(FinishReason.STOP, 3)

    handle = scripted(script)
    await stage.read(handle)
    assert [(delta.token_ids, delta.finish_reason) for delta in stage.deltas] == [
        ([1, 2], None),
        ([3], FinishReason.STOP),
    ]
    (attempt,) = handle.attempts
    assert attempt.generation.token_ids == PROMPT
    assert attempt.generation.request_id == "request"
    assert (attempt.generation.resumed_tokens, stage.attempts.replica_switches) == (0, 0)
    assert not stage.attempts.inboxes


async def test_the_end_of_the_call_may_overtake_the_last_token(
    stage: Stage, scripted: Scripted
) -> None:
    answered = asyncio.Event()
    late: list[asyncio.Task[None]] = []

    async def finish(attempt: Attempt) -> None:
        await answered.wait()
        await attempt.send(2, finish=FinishReason.LENGTH)

    async def script(attempt: Attempt) -> bytes:
        await stage.took(attempt, 1)
        late.append(asyncio.create_task(finish(attempt)))
        asyncio.get_running_loop().call_later(0.02, answered.set)
        return ended(FinishReason.LENGTH, 2)

    handle = scripted(script)
    await stage.read(handle)
    assert (stage.token_ids, len(handle.attempts)) == ([1, 2], 1)
    await asyncio.gather(*late)


async def test_a_call_whose_tokens_have_all_come_is_not_cancelled(
    stage: Stage, scripted: Scripted
) -> None:
    may_answer = asyncio.Event()

    async def script(attempt: Attempt) -> bytes:
        await attempt.take()
        await attempt.send(1, finish=FinishReason.LENGTH)
        await may_answer.wait()
        answered.append(attempt)
        return ended()

    answered: list[Attempt] = []
    handle = scripted(script)
    await stage.read(handle)
    may_answer.set()
    await until(lambda: answered == handle.attempts)
    assert not handle.attempts[0].cancelled


@pytest.mark.parametrize("retries", [0, 1, 2])
@pytest.mark.parametrize("tokens", [pytest.param([], id="before"), pytest.param([1], id="after")])
async def test_b1_a_generation_is_tried_on_so_many_replicas_more_and_then_fails(
    stage: Stage, scripted: Scripted, deaths_far_apart: None, retries: int, tokens: list[int]
) -> None:
    handle = scripted(stage.dies_after(*tokens))
    with pytest.raises(BackendFailureError, match="failed repeatedly") as failed:
        await stage.read(handle, limits=limits(retries=retries))
    assert isinstance(failed.value.__cause__, EngineError)
    assert len(handle.attempts) == retries + 1
    assert stage.attempts.replica_switches == retries
    assert stage.token_ids == tokens * (retries + 1)
    assert not stage.attempts.inboxes


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(lambda stage: stage.dies_after(), id="connection lost"),
        pytest.param(lambda stage: stage.raises(EngineError("The engine failed.")), id="error"),
        pytest.param(lambda stage: stage.raises(asyncio.CancelledError()), id="ended by Serve"),
        pytest.param(lambda stage: stage.answers(b"\xc1"), id="unreadable answer"),
        pytest.param(lambda stage: stage.answers(ended()), id="end without its tokens"),
    ],
)
async def test_b1_another_replica_answers_in_place_of_one_that_failed(
    stage: Stage, scripted: Scripted, short_pauses: None, fails: Callable[[Stage], Script]
) -> None:
    handle = scripted(fails(stage), stage.lives(1, 2))
    await stage.read(handle)
    assert (stage.token_ids, stage.finish_reasons) == ([1, 2], [FinishReason.LENGTH])
    first, second = (attempt.generation for attempt in handle.attempts)
    assert first.generation_id != second.generation_id
    assert msgspec.structs.replace(second, generation_id=first.generation_id) == first
    assert stage.attempts.replica_switches == 1


async def test_b1_a_replica_that_never_took_the_generation_is_no_failure_to_count(
    stage: Stage, scripted: Scripted, short_pauses: None
) -> None:
    handle = scripted(is_not_there, is_not_there, is_not_there, stage.lives(1))
    await stage.read(handle, limits=limits(retries=0))
    assert stage.token_ids == [1]
    assert stage.attempts.replica_switches == 0


async def test_b2_the_next_replica_goes_on_from_prompt_and_tokens(
    stage: Stage, scripted: Scripted, deaths_far_apart: None
) -> None:
    sampling = Sampling(max_tokens=9, seed=7, logprobs=2, prompt_logprobs=3)
    handle = scripted(stage.dies_after(1, 2), stage.dies_after(3), stage.lives(4, 5))
    await stage.read(handle, sampling)
    assert (stage.token_ids, stage.finish_reasons) == ([1, 2, 3, 4, 5], [FinishReason.LENGTH])
    asked = [attempt.generation for attempt in handle.attempts]
    assert [each.token_ids for each in asked] == [PROMPT, [*PROMPT, 1, 2], [*PROMPT, 1, 2, 3]]
    assert [each.resumed_tokens for each in asked] == [0, 2, 3]
    assert [each.sampling.max_tokens for each in asked] == [9, 7, 6]
    # Only the first delta of all tells of the prompt.
    assert [each.sampling.prompt_logprobs for each in asked] == [3, None, None]
    assert {(each.sampling.seed, each.sampling.logprobs) for each in asked} == {(7, 2)}
    assert stage.attempts.replica_switches == 2


async def test_b2_what_a_given_up_replica_still_sends_finds_nobody(
    stage: Stage, scripted: Scripted, receiver: TokenReceiver
) -> None:
    class Late:
        """A replica that fails by its call and then goes on sending."""

        async def fail(self, attempt: Attempt) -> bytes:
            self.attempt, self.replica = attempt, await attempt.take()
            await attempt.send(1)
            await until(lambda: stage.token_ids == [1])
            raise EngineError("The engine failed.")

        async def go_on(self) -> None:
            late = TokenDelta(self.attempt.generation.generation_id, [99], FinishReason.STOP)
            await self.replica.send(late, load=ReplicaLoad(running=99))
            await until(lambda: receiver.loads[self.attempt.name].running == 99)

    late = Late()

    async def second(attempt: Attempt) -> bytes:
        await late.go_on()
        return await stage.lives(2)(attempt)

    await stage.read(scripted(late.fail, second))
    assert (stage.token_ids, stage.finish_reasons) == ([1, 2], [FinishReason.LENGTH])


async def test_b2_a_loss_after_the_last_token_needs_no_other_replica(
    stage: Stage, scripted: Scripted
) -> None:
    handle = scripted(stage.dies_after(1, 2))
    await stage.read(handle, Sampling(max_tokens=2))
    assert (stage.token_ids, stage.finish_reasons) == ([1, 2], [FinishReason.LENGTH])
    assert len(handle.attempts) == 1


async def test_b2_a_stream_older_than_the_cold_start_deadline_still_moves(
    stage: Stage, scripted: Scripted
) -> None:
    loop = asyncio.get_running_loop()
    began, cold_start_s = loop.time(), 2.0

    async def dies_late(attempt: Attempt) -> bytes:
        await stage.took(attempt, 1)
        await until(lambda: loop.time() > began + cold_start_s)
        return await attempt.die()

    handle = scripted(dies_late, stage.lives(2))
    await stage.read(handle, limits=limits(cold_start_deadline_s=cold_start_s))
    assert stage.token_ids == [1, 2]


@pytest.mark.parametrize("tokens", [pytest.param([], id="before"), pytest.param([1], id="after")])
async def test_b5_a_refusal_is_not_tried_again(
    stage: Stage, scripted: Scripted, tokens: list[int]
) -> None:
    refusal = InvalidValueError("The engine refuses this prompt.", param="prompt")
    handle = scripted(stage.raises(refusal, *tokens))
    with pytest.raises(InvalidRequestError) as refused:
        await stage.read(handle)
    assert refused.value is refusal
    assert len(handle.attempts) == 1
    assert stage.attempts.replica_switches == 0


async def test_b5_a_refusal_without_taking_the_generation_is_not_tried_again(
    stage: Stage, scripted: Scripted
) -> None:
    async def refuses(attempt: Attempt) -> bytes:
        raise InvalidValueError("The engine refuses this prompt.")

    handle = scripted(refuses)
    with pytest.raises(InvalidRequestError):
        await stage.read(handle)
    assert len(handle.attempts) == 1


async def test_s8_closing_stops_the_replica(stage: Stage, scripted: Scripted) -> None:
    async def script(attempt: Attempt) -> bytes:
        await stage.taken(attempt)
        await attempt.send(1)
        return await stage.hang(attempt)

    handle = scripted(script)
    deltas = stage.run(handle)
    assert (await anext(deltas)).token_ids == [1]
    await deltas.aclose()
    await until(lambda: handle.attempts[0].cancelled)
    assert len(handle.attempts) == 1
    assert not stage.attempts.inboxes


@pytest.mark.parametrize(
    "waits_for",
    [
        pytest.param(lambda stage: stage.hang, id="a replica"),
        pytest.param(lambda stage: stage.hangs_after(), id="the first token"),
        pytest.param(lambda stage: stage.hangs_after(1), id="the next token"),
    ],
)
async def test_s8_cancelling_who_waits_stops_the_replica(
    stage: Stage, scripted: Scripted, waits_for: Callable[[Stage], Script]
) -> None:
    handle = scripted(waits_for(stage))
    reading = asyncio.create_task(stage.read(handle))
    await stage.hangs.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: handle.attempts[0].cancelled)
    assert len(handle.attempts) == 1
    assert not stage.attempts.inboxes


@pytest.mark.parametrize(
    ("changes", "hangs"),
    [
        pytest.param(
            {"cold_start_deadline_s": 0.05},
            lambda stage: stage.hang,
            id="b3 no replica takes it",
        ),
        pytest.param(
            {"first_token_deadline_s": 0.05}, lambda stage: stage.hangs_after(), id="b7 first token"
        ),
        pytest.param({"deadline_s": 0.2}, lambda stage: stage.hangs_after(1), id="b7 whole"),
        pytest.param({"deadline_s": 0.2}, lambda stage: stage.hangs_after(), id="b7 no token"),
        pytest.param({"deadline_s": 0.05}, lambda stage: stage.hang, id="b7 no replica"),
    ],
)
async def test_a_deadline_ends_the_wait_and_the_replicas_work(
    stage: Stage,
    scripted: Scripted,
    changes: dict[str, float],
    hangs: Callable[[Stage], Script],
) -> None:
    handle = scripted(hangs(stage))
    with pytest.raises(BackendFailureError, match="deadline"):
        await stage.read(handle, limits=limits(**changes))
    assert len(handle.attempts) == 1
    await until(lambda: handle.attempts[0].cancelled)
    assert not stage.attempts.inboxes


@pytest.mark.parametrize("deadline", ["cold_start_deadline_s", "deadline_s"])
async def test_b3_asking_replicas_that_are_not_there_ends_at_the_deadline(
    stage: Stage, scripted: Scripted, short_pauses: None, deadline: str
) -> None:
    handle = scripted(is_not_there)
    with pytest.raises(BackendFailureError, match="deadline"):
        await stage.read(handle, limits=limits(retries=0, **{deadline: 0.1}))
    assert len(handle.attempts) > 1


async def test_b7_the_first_token_is_waited_for_from_when_a_replica_took_it(
    stage: Stage, scripted: Scripted
) -> None:
    loop = asyncio.get_running_loop()
    began, first_token_s = loop.time(), 0.3

    async def starts_cold(attempt: Attempt) -> bytes:
        await until(lambda: loop.time() > began + first_token_s)
        return await stage.lives(1)(attempt)

    await stage.read(scripted(starts_cold), limits=limits(first_token_deadline_s=first_token_s))
    assert stage.token_ids == [1]


async def test_b1_the_budget_ends_retries_of_engines_that_fail_on_everything(
    stage: Stage, scripted: Scripted
) -> None:
    handle = scripted(stage.raises(EngineError("The engine failed.")))
    dispatcher = stage.dispatcher(handle)
    for _ in range(100):
        with pytest.raises(BackendFailureError):
            await anext(
                dispatcher.run(
                    "request", Share("tenant"), PROMPT, Sampling(max_tokens=9), Attempts()
                )
            )
    assert len(handle.attempts) <= 100 + FIRST_BALANCE + 100 * RETRIES_PER_GENERATION


async def test_b2_a_death_moves_whatever_ran_there_even_without_budget(
    stage: Stage, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
    handle = scripted(stage.dies_after(1), stage.lives(2))
    await stage.read(handle)
    assert stage.token_ids == [1, 2]


async def test_b1_a_second_loss_is_paid_for(
    stage: Stage,
    scripted: Scripted,
    deaths_far_apart: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry_budget, "FIRST_BALANCE", 0)
    handle = scripted(stage.dies_after(1))
    with pytest.raises(BackendFailureError, match="too often"):
        await stage.read(handle)
    assert len(handle.attempts) == 2


@pytest.mark.parametrize("tokens", [pytest.param([], id="before"), pytest.param([1], id="after")])
async def test_a_request_that_kills_two_replicas_gets_no_third(
    stage: Stage, scripted: Scripted, caplog: pytest.LogCaptureFixture, tokens: list[int]
) -> None:
    handle = scripted(stage.dies_after(*tokens))
    with pytest.raises(BackendFailureError, match="itself"):
        await stage.read(handle, limits=limits(retries=9))
    assert len(handle.attempts) == 2
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "Request request:" in line.getMessage()


async def test_a_failure_that_kills_no_replica_is_no_poison(
    stage: Stage, scripted: Scripted
) -> None:
    fails = stage.raises(EngineError("The engine failed."))
    await stage.read(
        scripted(fails, stage.dies_after(), fails, stage.lives(1)), limits=limits(retries=3)
    )
    assert stage.token_ids == [1]


class TestSilence:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "SILENCE_S", 0.1)
        monkeypatch.setattr(channel, "CHECK_S", 0.02)
        monkeypatch.setattr(dispatch, "FIRST_BACKOFF_S", 0.001)
        monkeypatch.setattr(dispatch, "FIRST_PATIENCE_S", 0.05)

    async def test_b2_a_frozen_replicas_generation_goes_on_elsewhere(
        self, stage: Stage, scripted: Scripted
    ) -> None:
        async def freezes(attempt: Attempt) -> bytes:
            await (await attempt.take()).beat()
            await attempt.send(1)
            return await stage.hang(attempt)

        handle = scripted(freezes, stage.lives(2))
        await stage.read(handle)
        assert stage.token_ids == [1, 2]
        assert stage.attempts.replica_switches == 1
        await until(lambda: handle.attempts[0].cancelled)

    async def test_b1_a_call_that_its_replica_does_not_take_is_made_again(
        self, stage: Stage, scripted: Scripted
    ) -> None:
        async def freezes(attempt: Attempt) -> bytes:
            attempt.offered()
            return await stage.hang(attempt)

        handle = scripted(freezes, freezes, stage.lives(1))
        await stage.read(handle, limits=limits(retries=1))
        assert stage.token_ids == [1]
        assert stage.attempts.replica_switches == 0
        await until(lambda: [each.cancelled for each in handle.attempts[:2]] == [True] * 2)

    async def test_b3_a_call_waits_for_a_replica_as_long_as_none_has_room(
        self, stage: Stage, scripted: Scripted
    ) -> None:
        async def waits(attempt: Attempt) -> bytes:
            await asyncio.sleep(4 * dispatch.FIRST_PATIENCE_S)
            attempt.offered()
            return await stage.lives(1)(attempt)

        handle = scripted(waits)
        await stage.read(handle)
        assert stage.token_ids == [1]
        assert len(handle.attempts) == 1


SAMPLINGS = [
    pytest.param(Sampling(max_tokens=40, temperature=0, logprobs=2), id="greedy"),
    pytest.param(Sampling(max_tokens=40, seed=5, logprobs=2), id="seeded"),
]
Undisturbed = Callable[[Sampling], Awaitable[Stage]]


@pytest_asyncio.fixture
async def engine() -> AsyncGenerator[SimulatedEngine]:
    profile = {"decode_step_s": 0, "prefill_tokens_per_s": 0}
    engine = await SimulatedEngine.launch({"profile": dict(profile)}, stall_s=60)
    yield engine
    await engine.close()


async def told(
    receiver: TokenReceiver, engine: SimulatedEngine, sampling: Sampling, deaths: list[int]
) -> tuple[Stage, EngineHandle]:
    """Return what is read of a generation whose replicas die after so many tokens."""
    stage, handle = Stage(receiver), EngineHandle(engine, deaths)
    try:
        await stage.read(handle, sampling, limits(retries=len(deaths)), prompt=b"Once upon a time")
    finally:
        handle.close()
    return stage, handle


@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_b2_a_death_at_any_token_changes_nothing(
    receiver: TokenReceiver, engine: SimulatedEngine, short_pauses: None, sampling: Sampling
) -> None:
    whole, _ = await told(receiver, engine, sampling, [])
    assert len(whole.token_ids) == sampling.max_tokens
    for cut in range(sampling.max_tokens + 1):
        stage, handle = await told(receiver, engine, sampling, [cut])
        assert stage.token_ids == whole.token_ids, cut
        assert stage.logprobs == whole.logprobs, cut
        assert stage.finish_reasons == whole.finish_reasons, cut
        # Tokens and their frames may be lost together with the replica, so fewer are resumed.
        for asked in handle.dispatched[1:]:
            resumed = asked.token_ids[len(b"Once upon a time") :]
            assert resumed == whole.token_ids[: asked.resumed_tokens]
            assert asked.sampling.max_tokens == sampling.max_tokens - asked.resumed_tokens


async def test_b2_two_deaths_at_any_tokens_change_nothing(
    receiver: TokenReceiver, engine: SimulatedEngine, short_pauses: None, deaths_far_apart: None
) -> None:
    sampling = Sampling(max_tokens=10, temperature=0)
    whole, _ = await told(receiver, engine, sampling, [])
    for first in range(sampling.max_tokens):
        for second in range(sampling.max_tokens - first):
            stage, _ = await told(receiver, engine, sampling, [first, second])
            assert stage.token_ids == whole.token_ids, (first, second)
            assert stage.finish_reasons == whole.finish_reasons, (first, second)


async def test_b2_the_end_of_the_text_is_where_it_was(
    receiver: TokenReceiver, engine: SimulatedEngine, short_pauses: None
) -> None:
    sampling = Sampling(max_tokens=1000, temperature=0)
    whole, _ = await told(receiver, engine, sampling, [])
    assert whole.finish_reasons == [FinishReason.STOP]
    tokens = len(whole.token_ids)
    for cut in (0, 1, tokens // 2, tokens - 2, tokens - 1):
        stage, _ = await told(receiver, engine, sampling, [cut])
        assert stage.token_ids == whole.token_ids, cut
        assert stage.finish_reasons == [FinishReason.STOP]


async def test_s5_the_next_tokens_are_here_only_when_nothing_has_to_be_waited_for(
    receiver: TokenReceiver,
) -> None:
    attempts = Attempts()
    assert attempts.next_is_here()
    one, other = receiver.open(), receiver.open()
    attempts.inboxes |= {one, other}
    assert not attempts.next_is_here()
    other.put(TokenDelta(other.generation_id, [1]))
    assert attempts.next_is_here()
    await other.get()
    assert not attempts.next_is_here()
    other.put(TokenDelta(other.generation_id, [2], FinishReason.LENGTH))
    assert not attempts.next_is_here()  # `other` is finished; `one` is waited for
    one.fail(ReplicaLostError("The engine replica was lost."))
    assert attempts.next_is_here()
