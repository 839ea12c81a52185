import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tera.config.limits import Limits
from tera.tenancy.keys import (
    KEY_PATTERN,
    ApiKey,
    decode_keys,
    encode_key,
    generate_key,
    hash_key,
    is_well_formed,
)


# the form of a key.
def test_keys_are_well_formed_and_differ() -> None:
    keys = {generate_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(is_well_formed(key) and re.fullmatch(KEY_PATTERN, key) for key in keys)


@given(data=st.data())
def test_one_wrong_character_anywhere_is_refused(data: st.DataObject) -> None:
    key = generate_key()
    position = data.draw(st.integers(0, len(key) - 1))
    wrong = data.draw(st.characters().filter(lambda character: character != key[position]))
    assert not is_well_formed(key[:position] + wrong + key[position + 1 :])


@given(data=st.data())
def test_two_swapped_neighbours_are_refused(data: st.DataObject) -> None:
    key = generate_key()
    at = data.draw(st.integers(0, len(key) - 2))
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    assert swapped == key or not is_well_formed(swapped)


@given(st.text())
def test_any_other_text_is_refused(text: str) -> None:
    assert not is_well_formed(text)


@pytest.mark.parametrize("change", [lambda k: k[:-1], lambda k: k + "0", lambda k: k + "\n"])
def test_another_length_is_refused(change: Callable[[str], str]) -> None:
    assert not is_well_formed(change(generate_key()))


def test_the_hash_depends_on_key_and_pepper() -> None:
    hashes = {hash_key(key, pepper) for key in ("a", "b") for pepper in ("x", "y")}
    assert len(hashes) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)


def test_records_are_compared_by_value() -> None:
    record = ApiKey("key_1", "team-a", "0" * 64, "", None, created_s=1.0)
    assert record == ApiKey("key_1", "team-a", "0" * 64, "", None, created_s=1.0)


def test_a_record_comes_back_as_it_was_but_for_the_last_use() -> None:
    record = ApiKey(
        *("key_1", "team-a", "0" * 64, "hint", ("one",)),
        created_s=1.0,
        expires_s=2.0,
        limits=Limits(requests_per_minute=0, budget_period="day"),
        replaced_by="key_2",
    )
    used = replace(record, last_used_s=3.0)
    assert decode_keys({b"key_1": encode_key(used)}) == [record]
