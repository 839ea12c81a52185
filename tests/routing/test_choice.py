"""Which replica gets a prompt: what it has cached, bounded by how busy it is."""

import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera.routing.choice import BOUND, EASE, LoadBoard, choose
from tera.routing.prefix_index import (
    BLOCK_TOKENS,
    MOST_HOLDERS,
    PrefixIndex,
    fingerprints,
)

CAPACITY = 40
EASY = int(EASE * CAPACITY)


def board_of(loads: dict[str, int], seed: int = 1) -> LoadBoard:
    board = LoadBoard(random.Random(seed).random)
    for replica_id, load in loads.items():
        board.put(replica_id, load, CAPACITY)
    return board


def prompt(*blocks: int) -> list[int]:
    """Return the fingerprints of a prompt whose blocks are named by a number each."""
    return fingerprints([block for block in blocks for _ in range(BLOCK_TOKENS)], "")


def index_of(prompts: dict[str, list[int]]) -> PrefixIndex:
    index = PrefixIndex()
    for replica_id, prints in prompts.items():
        index.add(prints, replica_id)
    return index


def test_a_prompt_goes_where_most_of_it_is_cached() -> None:
    index = index_of({"system": prompt(1), "chat": prompt(1, 2, 3), "other": prompt(9)})
    board = board_of({"system": 0, "chat": 5, "other": 0, "new": 0})
    assert choose(board, index, prompt(1, 2, 3, 4)) == "chat"


@pytest.mark.parametrize(
    ("busy", "others", "chosen"),
    [
        pytest.param(EASY - 1, 0, "has-it", id="not busy at all"),
        pytest.param(EASY, 0, "idle", id="busier than the bound"),
        pytest.param(24, 20, "has-it", id="a little busier than the others"),
        pytest.param(CAPACITY, CAPACITY - 1, "idle", id="full"),
    ],
)
def test_what_is_cached_counts_while_the_replica_is_not_too_busy(
    busy: int, others: int, chosen: str
) -> None:
    index = index_of({"has-it": prompt(1, 2)})
    board = board_of({"has-it": busy} | dict.fromkeys(["idle", "x", "y", "z"], others))
    found = {choose(board, index, prompt(1, 2)) for _ in range(50)}
    assert found == {"has-it"} if chosen == "has-it" else "has-it" not in found


def test_of_a_conversation_on_a_busy_replica_the_part_cached_elsewhere_counts() -> None:
    index = index_of({"tools": prompt(1), "chat": prompt(1, 2, 3, 4, 5, 6)})
    board = board_of({"chat": CAPACITY, "tools": 1, "idle": 0})
    assert choose(board, index, prompt(1, 2, 3, 4, 5, 6)) == "tools"


def test_a_prompt_without_a_whole_block_goes_to_any_of_the_least_busy() -> None:
    board = board_of({"a": 1, "b": 1, "c": 2, "d": 1})
    drawn = Counter(choose(board, PrefixIndex(), []) for _ in range(300))
    assert drawn.keys() == {"a", "b", "d"}
    assert min(drawn.values()) > 50


def homes(board: LoadBoard) -> dict[int, str | None]:
    return {block: choose(board, PrefixIndex(), prompt(block)) for block in range(300)}


def test_gateways_that_do_not_talk_send_a_new_prompt_to_one_replica() -> None:
    loads = dict.fromkeys(["a", "b", "c", "d"], 0)
    found = homes(board_of(loads, seed=1))
    assert found == homes(board_of(dict(reversed(loads.items())), seed=2))
    assert min(Counter(found.values()).values()) > 30


def test_a_replica_that_leaves_moves_its_own_prompts_only() -> None:
    board = board_of(dict.fromkeys(["a", "b", "c", "d"], 0))
    before = homes(board)
    board.remove("b")
    after = homes(board)
    assert {block for block in before if before[block] != after[block]} == {
        block for block, home in before.items() if home == "b"
    }


def test_a_new_prompt_goes_on_from_a_replica_that_is_busier_than_the_others() -> None:
    idle = board_of(dict.fromkeys(["a", "b", "c", "d"], 4))
    home = choose(idle, PrefixIndex(), prompt(7))
    assert home is not None
    idle.put(home, 7, CAPACITY)
    second = choose(idle, PrefixIndex(), prompt(7))
    assert second not in (home, None)
    assert {choose(idle, PrefixIndex(), prompt(7)) for _ in range(20)} == {second}


def test_nobody_is_chosen_when_all_are_full_or_gone() -> None:
    index = index_of({"full": prompt(1), "gone": prompt(1)})
    assert choose(board_of({"full": CAPACITY}), index, prompt(1)) is None
    assert choose(board_of({}), index, prompt(1)) is None


def test_a_replica_that_is_gone_is_not_chosen_for_what_it_had() -> None:
    index = index_of({"gone": prompt(1, 2)})
    assert choose(board_of({"here": 3}), index, prompt(1, 2)) == "here"


def test_who_may_go_beyond_the_capacity_gets_the_least_busy_up_to_there() -> None:
    board = board_of({"a": 2 * CAPACITY - 1, "b": 2 * CAPACITY})
    assert board.least() is None
    assert board.least(2.0) == "a"
    board.put("a", 2 * CAPACITY, CAPACITY)
    assert board.least(2.0) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.none() | st.integers(min_value=0, max_value=6),
        ),
        max_size=60,
    )
)
def test_the_board_knows_the_least_busy_whatever_changes(
    changes: list[tuple[str, int | None]],
) -> None:
    board, model = board_of({}), dict[str, int]()
    for replica_id, load in changes:
        if load is None:
            board.remove(replica_id)
            model.pop(replica_id, None)
        else:
            board.put(replica_id, load, 6)
            model[replica_id] = load
        least = board.least()
        lowest = min(model.values(), default=6)
        assert (least is None) == (lowest == 6)
        assert least is None or model[least] == lowest
        assert len(board) == len(model)
        if model:
            assert board.bound() == pytest.approx(BOUND * (sum(model.values()) + 1) / len(model))


class TestFingerprints:
    def test_equal_beginnings_have_equal_fingerprints_up_to_the_first_difference(self) -> None:
        one, other = prompt(1, 2, 3, 4), prompt(1, 2, 9, 4)
        assert one[:2] == other[:2]
        assert not set(one[2:]) & set(other[2:])

    def test_prompts_of_two_salts_have_nothing_in_common(self) -> None:
        token_ids = [*range(4 * BLOCK_TOKENS)]
        prints = [fingerprints(token_ids, salt) for salt in ("", "one", "two", "eno")]
        assert len({each for several in prints for each in several}) == 4 * len(prints)

    def test_all_processes_find_the_same(self) -> None:
        here = fingerprints([*range(2 * BLOCK_TOKENS)], "salt")
        code = (
            "from tera.routing.prefix_index import *;"
            "print(fingerprints([*range(2 * BLOCK_TOKENS)], 'salt'))"
        )
        for seed in ("1", "2"):
            environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
            command = [sys.executable, "-c", code]
            there = subprocess.check_output(command, env=environment)  # noqa: S603  our own
            assert there.decode().strip() == str(here)

    def test_only_whole_blocks_have_one(self) -> None:
        assert fingerprints([5] * (BLOCK_TOKENS - 1), "") == []
        assert len(fingerprints([5] * (3 * BLOCK_TOKENS + 1), "")) == 3


class TestIndex:
    @given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=30), st.integers(1, 12))
    def test_what_is_known_of_a_prompt_is_its_beginning_and_no_more_is_kept_than_allowed(
        self, prompts: list[list[int]], most: int
    ) -> None:
        index = PrefixIndex(most)
        for number, blocks in enumerate(prompts):
            index.add(prompt(*blocks), f"replica-{number}")
            assert len(index) <= most
        for blocks in prompts:
            prints = prompt(*blocks)
            known = index.known(prints)
            assert all(index.holders(block) for block in prints[:known])
            if known < len(prints):
                with pytest.raises(KeyError):
                    index.holders(prints[known])

    def test_the_least_recently_used_prompt_is_forgotten_first(self) -> None:
        index = PrefixIndex(4)
        for blocks in ((1, 2), (3, 4), (1, 2), (5,)):
            index.add(prompt(*blocks), "replica")
        assert [index.known(prompt(*blocks)) for blocks in ((1, 2), (3, 4), (5,))] == [2, 1, 1]

    def test_the_latest_holders_are_kept(self) -> None:
        index = PrefixIndex()
        names = [f"replica-{number}" for number in range(MOST_HOLDERS + 3)]
        for name in names:
            index.add(prompt(1), name)
        assert index.holders(prompt(1)[0]) == names[3:]
