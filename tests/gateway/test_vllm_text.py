"""vLLM's renderer and parsers behind `TextModel`, with the demo model's tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tera.errors import ContextLengthError, InvalidRequestError, UnsupportedParameterError
from tera.gateway.dialects.chat import ChatQuestion
from tera.gateway.grammars import Grammars
from tera.gateway.render import AnswerPiece
from tera.gateway.request import Conversation
from tera.gateway.vllm_text import VllmTextModel

# What vLLM and torch warn themselves of, and leave unclosed, is not ours.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::Warning"),
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def model_path(demo_model: Path) -> str:
    return str(demo_model)


@pytest.fixture(scope="module")
def plain(model_path: str) -> Iterator[VllmTextModel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield VllmTextModel.load(
            model_path, {"max_model_len": 2048, "dtype": "float32"}, Grammars()
        )


@pytest.fixture(scope="module")
def with_tools(model_path: str) -> VllmTextModel:
    return VllmTextModel.load(
        model_path,
        {"max_model_len": 2048, "dtype": "float32", "tool_call_parser": "hermes"},
        Grammars(),
    )


def chat(**fields: Any) -> Conversation:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    content = ChatQuestion({"model": "m", "messages": messages, **fields}).request.content
    assert isinstance(content, Conversation)
    return content


async def said(model: VllmTextModel, conversation: Conversation, text: str) -> list[AnswerPiece]:
    """Feed a model's answer token by token through the derendering parts."""
    rendered = await model.render_chat(conversation)
    parser = model.answer_parser(conversation, rendered)
    assert parser is not None
    detokenizer = model.detokenizer(rendered.token_ids, special_tokens=rendered.special_tokens)
    token_ids = await model.encode(text)
    return [
        parser.push(detokenizer.push(token_id), [token_id], finished=at == len(token_ids))
        for at, token_id in enumerate(token_ids, start=1)
    ]


async def test_t1_a_conversation_goes_through_the_models_own_template(
    plain: VllmTextModel,
) -> None:
    rendered = await plain.render_chat(chat())
    detokenizer = plain.detokenizer([], special_tokens=True)
    text = "".join(map(detokenizer.push, rendered.token_ids))
    assert text.endswith(
        "<|im_start|>user\nWhat is the weather in Paris?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered.structured is None


async def test_t1_tools_need_a_parser(plain: VllmTextModel) -> None:
    with pytest.raises(UnsupportedParameterError) as refused:
        await plain.render_chat(chat(tools=[WEATHER]))
    assert refused.value.param == "tools"
    assert (await plain.render_chat(chat(tools=[WEATHER], tool_choice="none"))).token_ids


async def test_t1_a_call_is_told_apart_from_content(with_tools: VllmTextModel) -> None:
    pieces = await said(with_tools, chat(tools=[WEATHER]), f"Sure.{CALL}")
    assert "".join(piece.content for piece in pieces).strip() == "Sure."
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert {call.index for call in calls} == {0}
    (name,) = [c.function.name for c in calls if c.function and c.function.name]
    assert name == "get_weather"
    arguments = "".join(c.function.arguments or "" for c in calls if c.function)
    assert json.loads(arguments) == {"city": "Paris"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
async def test_t1_a_forced_call_binds_the_engine(with_tools: VllmTextModel, choice: Any) -> None:
    rendered = await with_tools.render_chat(chat(tools=[WEATHER], tool_choice=choice))
    assert rendered.structured is not None
    assert "get_weather" in json.dumps(rendered.structured)


@pytest.mark.parametrize(
    ("response_format", "structured"),
    [
        pytest.param({"type": "text"}, None, id="text"),
        pytest.param({"type": "json_object"}, {"json_object": True}, id="json_object"),
        pytest.param(
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            {"json": {"type": "object"}},
            id="json_schema",
        ),
    ],
)
async def test_t1_response_formats_become_structured_outputs(
    plain: VllmTextModel, response_format: dict[str, Any], structured: dict[str, Any] | None
) -> None:
    rendered = await plain.render_chat(chat(response_format=response_format))
    assert rendered.structured == structured


async def test_t3_a_model_without_a_template_names_the_other_route(model_path: str) -> None:
    bare = VllmTextModel.load(
        model_path,
        {"max_model_len": 2048, "chat_template": "{{ raise_exception('no') }}"},
        Grammars(),
    )
    with pytest.raises(InvalidRequestError) as refused:
        await bare.render_chat(chat())
    assert refused.value.param == "messages"


async def test_s4_text_is_never_split_inside_a_character(plain: VllmTextModel) -> None:
    text = "日本の首都は東京です。 🚀 e\u0301 \u0645\u0631\u062d\u0628\u0627"
    detokenizer = plain.detokenizer([])
    pieces = [detokenizer.push(token_id) for token_id in await plain.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


async def test_a_long_prompt_is_encoded_as_a_short_one(plain: VllmTextModel) -> None:
    sentence = "The quick brown fox jumps.\n"
    once = await plain.encode(sentence)
    assert await plain.encode(sentence * 400) == once * 400  # over the inline bound


async def test_x1_a_text_that_cannot_fit_is_refused_unread(
    plain: VllmTextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any, **__: Any) -> list[int]:
        raise AssertionError("this text was to be refused unread")

    monkeypatch.setattr(plain._encoder, "encode", encode)
    digits = "1234567890" * 1_000_000
    with pytest.raises(ContextLengthError, match="at least") as refused:
        await plain.encode(digits)
    assert refused.value.param == "prompt"
    with pytest.raises(ContextLengthError, match="2048 tokens") as refused:
        await plain.render_chat(chat(messages=[{"role": "user", "content": digits}]))
    assert refused.value.param == "messages"


async def test_prompts_are_those_of_the_tokenizers_own_template(plain: VllmTextModel) -> None:
    words = "naïve <|im_end|> 日本語 🚀🏽 don't\n\n  code()  "
    messages = [{"role": "user", "content": f"{words} {turn}"} for turn in range(4)]
    wanted = plain._tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    for _ in range(2):  # the second time from the encoder's memory
        assert (await plain.render_chat(chat(messages=messages))).token_ids == wanted
    assert plain._encoder is not None
    assert await plain.encode(words) == plain._tokenizer.encode(words)


async def test_t1_tokens_inside_of_a_character_have_its_bytes(plain: VllmTextModel) -> None:
    text = "naïve 日本語 🚀🏽"
    tokens = plain.token_texts(await plain.encode(text))
    assert b"".join(token.data for token in tokens) == text.encode()
    assert any("\ufffd" in token.text for token in tokens)
