import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from tera.errors import BackendFailureError
from tera.gateway.dialects import openai


class Chunk(msgspec.Struct):
    before: str
    text: str
    after: str


texts = st.text()


@given(texts, texts, texts)
@example("a", openai.mark(), "b")
@example('"', '\\"\x00\n\u2028', "🚀")
def test_s1_an_events_shape_changes_nothing_but_the_text(
    before: str, text: str, after: str
) -> None:
    shape = openai.EventShape.of(Chunk(before, openai.mark(), after))
    assert shape.event(text) == openai.event(Chunk(before, text, after))


def test_s6_an_error_is_an_event_of_the_envelope() -> None:
    event = openai.failed(BackendFailureError("The engines\nfailed."))
    assert event.startswith(b'data: {"error":{"message":"The engines\\nfailed."')
    assert event.count(b"\n") == 2
    assert event.endswith(b"}}\n\n")
