"""The dearest bodies that we know of, each as large as is asked for.

Every one of them is to be refused, and the refusal must not cost the gateway more than a request
that it serves.
"""

from collections.abc import Callable, Mapping

from tera.contract.chat import MAX_MESSAGES, ChatRequest
from tera.contract.common import Request
from tera.contract.completions import MAX_TOKEN_IDS, CompletionRequest
from tera.contract.json_body import MAX_JSON_CONTAINERS, MAX_JSON_MEMBERS, MAX_JSON_VALUES

Body = Callable[[int], bytes]
"""Returns a body of about so many bytes."""


def _filled(before: bytes, piece: bytes, after: bytes, most: int | None = None) -> Body:
    """Return the body that repeats one piece, which ends in a comma, as an array's entries.

    `%s` in a piece is another number of six digits each time. Of a number of pieces that is
    bounded by `most`, spaces make a body of the size that is asked for.
    """
    numbered = b"%s" in piece

    def body(size: int) -> bytes:
        length = len(piece) + 4 * numbered
        count = max(1, (size - len(before) - len(after)) // length)
        count = min(count, most or count)
        numbers = range(100_000, 100_000 + count)
        pieces = (
            b"".join(piece % str(each).encode() for each in numbers) if numbered else piece * count
        )
        filled = before + pieces.removesuffix(b",") + after
        return filled + b" " * (size - len(filled))

    return body


_CHAT = b'{"model":"m","messages":['
_COMPLETION = b'{"model":"m","prompt":'
_HELLO = b'{"model":"m","messages":[{"role":"user","content":"Hello"}],'
_PART = b'{"type":"text","text":""},'
_CALL = b'{"id":"a","function":{"name":"a","arguments":""}},'

BODIES: Mapping[str, tuple[type[Request], Body]] = {
    "messages of zeros": (ChatRequest, _filled(_CHAT, b"0,", b"]}")),
    "messages without members": (ChatRequest, _filled(_CHAT, b"{},", b"]}")),
    "empty messages": (ChatRequest, _filled(_CHAT, b'{"role":"user","content":""},', b"]}")),
    "parts without text": (
        ChatRequest,
        _filled(_CHAT + b'{"role":"user","content":[', b'{"type":"text","text":""},', b"]}]}"),
    ),
    "parts of zeros": (
        ChatRequest,
        _filled(_CHAT + b'{"role":"user","content":[', b"0,", b"]}]}"),
    ),
    "tool calls": (
        ChatRequest,
        _filled(_CHAT + b'{"role":"assistant","tool_calls":[', _CALL, b"]}]}"),
    ),
    "tool calls of zeros": (
        ChatRequest,
        _filled(_CHAT + b'{"role":"assistant","tool_calls":[', b"0,", b"]}]}"),
    ),
    "tools of zeros": (ChatRequest, _filled(_HELLO + b'"tools":[', b"0,", b"]}")),
    "modalities": (ChatRequest, _filled(_HELLO + b'"modalities":[', b"0,", b"]}")),
    "token ids of one digit": (CompletionRequest, _filled(_COMPLETION + b"[", b"1,", b"]}")),
    "token ids": (CompletionRequest, _filled(_COMPLETION + b"[", b"123456,", b"]}")),
    "token ids as fractions": (CompletionRequest, _filled(_COMPLETION + b"[", b"1.0,", b"]}")),
    "prompts": (CompletionRequest, _filled(_COMPLETION + b"[", b'"a",', b"]}")),
    "prompts of one token": (CompletionRequest, _filled(_COMPLETION + b"[", b"[1],", b"]}")),
    "stop strings": (CompletionRequest, _filled(_COMPLETION + b'"a","stop":[', b'"a",', b"]}")),
    "biases": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","logit_bias":{', b'"%s":0,', b"}}"),
    ),
    "an ignored object's members": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":{', b'"%s":0,', b"}}"),
    ),
    "ignored members": (CompletionRequest, _filled(_COMPLETION + b'"a",', b'"%s":0,', b"}")),
    "ignored arrays": (CompletionRequest, _filled(_COMPLETION + b'"a","x":[', b"[],", b"]}")),
    "ignored objects and an escape": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","e":"\\u0041","x":[', b"{},", b"]}"),
    ),
    "ignored strings": (CompletionRequest, _filled(_COMPLETION + b'"a","x":[', b'",",', b"]}")),
    "nested arrays": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":[', b"[" * 60 + b"]" * 60 + b",", b"]}"),
    ),
    "a key twice": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":{', b'"%s":0,', b'},"x":0}'),
    ),
    "escaped quotes": (CompletionRequest, _filled(_COMPLETION + b'"a","x":"', b'\\"', b'"}')),
    "open brackets": (CompletionRequest, _filled(_COMPLETION, b"[", b"")),
    "closing brackets": (CompletionRequest, _filled(b"", b"]", b"")),
    "as many messages as may be": (
        ChatRequest,
        _filled(_CHAT, b'{"role":"tool","tool_call_id":"a","content":""},', b"]}", MAX_MESSAGES),
    ),
    "as many messages with calls as may be": (
        ChatRequest,
        _filled(
            _CHAT,
            b'{"role":"assistant","content":null,"tool_calls":[' + _CALL + _CALL[:-1] + b"]},",
            b"]}",
            MAX_MESSAGES,
        ),
    ),
    "as many messages with parts as may be": (
        ChatRequest,
        _filled(
            _CHAT,
            b'{"role":"user","content":[' + _PART * 3 + _PART[:-1] + b"]},",
            b"]}",
            MAX_MESSAGES,
        ),
    ),
    "as many token ids as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b"[", b"%s,", b"]}", MAX_TOKEN_IDS),
    ),
    "as many token ids as fractions as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b"[", b"%s.0,", b"]}", MAX_TOKEN_IDS),
    ),
    "as many huge fractions as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":[', b"1.5e300,", b"]}", MAX_JSON_VALUES - 5),
    ),
    "as many strings as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":[', b'"%s",', b"]}", MAX_JSON_VALUES - 5),
    ),
    "as many strings of commas as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":[', b'",,:",', b"]}", MAX_JSON_VALUES - 5),
    ),
    "as many members as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":{', b'"%s":0,', b"}}", MAX_JSON_MEMBERS - 3),
    ),
    "as many objects as may be": (
        CompletionRequest,
        _filled(_COMPLETION + b'"a","x":[', b'{"%s":0},', b"]}", MAX_JSON_CONTAINERS - 2),
    ),
    "as many nested arrays as may be": (
        CompletionRequest,
        _filled(
            _COMPLETION + b'"a","x":[',
            b"[" * 60 + b"]" * 60 + b",",
            b"]}",
            MAX_JSON_CONTAINERS // 60 - 1,
        ),
    ),
    "a huge integer and as many others as may be": (
        CompletionRequest,
        _filled(
            _COMPLETION + b'"a","y":"' + b"9" * 400 + b'","x":[', b"%s,", b"]}", MAX_JSON_VALUES - 5
        ),
    ),
}
"""By name, with the type that they claim to be."""
