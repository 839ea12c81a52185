"""Bodies against a plain parser, and the bounds on what they hold."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tera.contract import json_slices
from tera.contract.json_body import (
    MAX_JSON_CONTAINERS,
    MAX_JSON_DEPTH,
    MAX_JSON_MEMBERS,
    MAX_JSON_VALUES,
    parse_json_object,
)
from tera.errors import InvalidJsonError, InvalidValueError

# Whatever could be taken for the structure of the text around it.
strings = st.text(st.sampled_from('"\\[]{}:,u0a\n é🚀')) | st.text(max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(strings, values, max_size=4)


@given(objects, st.booleans(), st.sampled_from([None, 1]), st.integers(1, 9) | st.just(65_536))
@settings(max_examples=150)
def test_every_object_is_read_as_it_was_written(
    value: dict[str, Any], escaped: bool, indent: int | None, slice_bytes: int
) -> None:
    body = json.dumps(value, ensure_ascii=escaped, indent=indent).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        # So small that strings and escapes lie across the ends of slices.
        patch.setattr(json_slices, "SLICE_BYTES", slice_bytes)
        assert parse_json_object(body) == value


def read(body: bytes) -> Any:
    """Return the object, or the kind of error."""
    try:
        return parse_json_object(body)
    except InvalidJsonError as error:
        return type(error)


@given(
    objects, st.lists(st.tuples(st.integers(0, 400), st.sampled_from(b'"\\[]{}:,0e -')), max_size=3)
)
@example({"a": [1]}, [(8, ord(","))])
@example({"a": [1]}, [(6, ord(","))])
@example({"a": [1, 2], "b": []}, [(13, ord("}"))])
@example({"a": 0, "b": {"a": 0}}, [(10, ord("{"))])
@settings(max_examples=80)
def test_a_body_is_read_the_same_however_it_is_cut(
    value: dict[str, Any], strayed: list[tuple[int, int]]
) -> None:
    body = bytearray(json.dumps(value).encode())
    for place, byte in strayed:
        body[place % len(body)] = byte
    wanted = read(bytes(body))
    for slice_bytes in (1, 3, 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_slices, "SLICE_BYTES", slice_bytes)
            assert read(bytes(body)) == wanted


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"a":[1,2],"b":[3,4],"a":[5,6]}', id="the same kind"),
        pytest.param(b'{"a":1,"b":2,"a":[5,6,7,8,9]}', id="another kind"),
        pytest.param(b'{"a":{"x":1,"y":2,"x":{"z":3,"w":4,"z":5}}}', id="at several levels"),
    ],
)
def test_a_key_twice_is_found_where_a_body_is_cut(
    monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    for slice_bytes in range(1, len(body)):
        monkeypatch.setattr(json_slices, "SLICE_BYTES", slice_bytes)
        with pytest.raises(InvalidJsonError, match="twice in one object"):
            parse_json_object(body)


def test_the_place_of_a_fault_is_that_in_the_whole_body(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"a": [1, 2, 3, 4, 5, x]}'
    monkeypatch.setattr(json_slices, "SLICE_BYTES", 4)
    with pytest.raises(InvalidJsonError, match=rf"\(byte {body.index(b'x')}\)"):
        parse_json_object(body)


@given(objects, strings, values, values)
@settings(max_examples=80)
def test_a_key_twice_is_found_wherever_it_is(
    around: dict[str, Any], key: str, first: Any, second: Any
) -> None:
    members = [f"{json.dumps(key)}: {json.dumps(value)}" for value in (first, second)]
    inside = json.dumps({**around, "found": ["inside"]})
    body = inside.replace('"inside"', "{" + ", ".join(members) + "}").encode()
    with pytest.raises(InvalidJsonError, match="twice in one object"):
        parse_json_object(body)


def test_of_a_large_body_a_key_that_comes_twice_is_not_named() -> None:
    for padding, named in ((10, "the key 'twice'"), (100_000, "a key")):
        body = f'{{"padding": "{"x" * padding}", "twice": 1, "twice": 2}}'.encode()
        with pytest.raises(InvalidJsonError) as refused:
            parse_json_object(body)
        assert refused.value.message == f"The request body has {named} twice in one object."


@pytest.mark.parametrize(
    ("number", "accepted"),
    [
        pytest.param(str(2**1024 - 1), True, id="largest-integer"),
        pytest.param(str(2**1024), False, id="one-more"),
        pytest.param(str(-(2**1024)), False, id="one-less"),
        pytest.param("1" + "0" * 400 + "e-200", True, id="many-digits-of-a-double"),
        pytest.param("0." + "1" * 400, True, id="many-digits-of-a-fraction"),
        pytest.param("1" + "0" * 400 + ".5", False, id="fraction-beyond-a-double"),
        pytest.param("1" + "0" * 250 + "e99", False, id="short-exponent-beyond-a-double"),
        pytest.param('"' + "9" * 400 + '"', True, id="digits-in-a-string"),
    ],
)
def test_numbers_are_those_of_a_double(number: str, accepted: bool) -> None:
    body = f'{{"x": [{{"y": {number}}}]}}'.encode()
    if accepted:
        assert parse_json_object(body) == json.loads(body)
    else:
        with pytest.raises(InvalidJsonError, match="beyond the range of a double"):
            parse_json_object(body)


def arrays(count: int) -> bytes:
    """Return an object that holds so many arrays and objects, itself among them."""
    return b'{"x": [' + b"[]," * (count - 3) + b"[]]}"


def members(count: int) -> bytes:
    """Return an object that has so many members, its own among them."""
    inner = ",".join(f'"{number}": 0' for number in range(count - 1))
    return f'{{"x": {{{inner}}}}}'.encode()


def entries(count: int) -> bytes:
    """Return an object that holds so many values: two containers and the entries of one."""
    return b'{"x": [' + b"0," * (count - 2) + b"0]}"


@pytest.mark.parametrize(
    ("body", "most", "what"),
    [
        pytest.param(arrays, MAX_JSON_CONTAINERS, "arrays and objects", id="containers"),
        pytest.param(members, MAX_JSON_MEMBERS, "members of objects", id="members"),
        pytest.param(entries, MAX_JSON_VALUES, "values", id="values"),
    ],
)
def test_x1_what_a_body_holds_is_bounded(body: Any, most: int, what: str) -> None:
    assert parse_json_object(body(most))
    with pytest.raises(InvalidValueError) as refused:
        parse_json_object(body(most + 1))
    assert refused.value.message == f"The request body has more than {most} {what}."
    assert refused.value.param is None


def test_structure_in_strings_is_not_counted() -> None:
    text = '[{:,"\\' * MAX_JSON_CONTAINERS
    assert parse_json_object(json.dumps({"x": text}).encode()) == {"x": text}


@pytest.mark.parametrize("slice_bytes", [1, 7, 65_536])
def test_what_nests_too_deep_is_found_before_it_is_followed(
    monkeypatch: pytest.MonkeyPatch, slice_bytes: int
) -> None:
    monkeypatch.setattr(json_slices, "SLICE_BYTES", slice_bytes)
    deepest = b"[" * (MAX_JSON_DEPTH - 1) + b"]" * (MAX_JSON_DEPTH - 1)
    assert parse_json_object(b'{"x": ' + deepest + b"}")
    for body in (b'{"x": [' + deepest + b"]}", b"[" * 100_000, b'{"x":' * 100_000):
        with pytest.raises(InvalidJsonError, match="nests deeper than 64 levels"):
            parse_json_object(body)


def test_brackets_in_strings_do_not_nest() -> None:
    assert parse_json_object(b'{"x": "' + b"[" * 1000 + b'\\"{"}') == {"x": "[" * 1000 + '"{'}
