"""Makes structured outputs continue where another replica's ended.

vLLM starts a request's grammar at its first generated token. A resumed generation has its first
tokens in the prompt, so here the grammar is advanced through them before it is used.

An engine's process also skips vLLM's own check of a grammar: a gateway has made it.
"""

from typing import TYPE_CHECKING, Any

from tera.upstream import xgrammar
from tera.upstream.symbols import Symbol, check
from tera.upstream.vllm_penalties import resumed_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

_OUTPUT = "vllm.v1.structured_output"

NEEDS = (
    Symbol(
        _OUTPUT,
        "StructuredOutputManager._create_grammar",
        "ours takes its place, and leads what it returns through the resumed tokens",
        exact="self request",
    ),
    Symbol(
        _OUTPUT,
        "StructuredOutputManager._get_reasoner",
        "a format does not hold for a model's reasoning",
        call="request",
    ),
    Symbol(_OUTPUT, "StructuredOutputManager.enable_in_reasoning", "unless it is to"),
    Symbol(
        f"{_OUTPUT}.backend_types",
        "StructuredOutputGrammar.accept_tokens",
        "the grammar moves past a token",
        call="request_id tokens",
    ),
    Symbol(
        "vllm.reasoning.abs_reasoning_parsers",
        "ReasoningParser.is_reasoning_end",
        "as above",
        call="input_ids",
    ),
    Symbol("vllm.v1.request", "Request.sampling_params", "how many tokens were resumed"),
    Symbol("vllm.v1.request", "Request.prompt_token_ids", "which they are"),
    Symbol("vllm.v1.request", "Request.request_id", "grammars log it"),
)


def leave_check_to_gateways() -> None:
    """Patch vLLM to accept structured outputs without parsing them on its event loop.

    A gateway has already compiled each of them in a process of its own. Here a slow one would delay
    every generation, and one that overflows the stack would end them all. vLLM's engine core then
    compiles it in a thread, where a failure is only that request's.

    Raises:
        StartError: Tera does not work with this version of vLLM.
    """
    check(xgrammar.NEEDS)
    from vllm.v1.structured_output import backend_xgrammar

    def trusted(sampling_params: Any) -> None:
        """Accept it: it is known to compile."""

    backend_xgrammar.validate_xgrammar_grammar = trusted


def lead_grammars() -> None:
    """Patch vLLM to advance grammars through resumed tokens; calling it twice is harmless.

    Raises:
        StartError: Tera does not work with this version of vLLM.
    """
    check(NEEDS)
    from vllm.v1.structured_output import StructuredOutputManager

    create: Any = StructuredOutputManager._create_grammar
    if hasattr(create, "resumes"):
        return

    def create_resumed(
        manager: "StructuredOutputManager", request: "Request"
    ) -> "StructuredOutputGrammar":
        grammar: StructuredOutputGrammar = create(manager, request)
        generated = _constrained(manager, request)
        if generated and not grammar.accept_tokens(request.request_id, generated):
            raise ValueError("the tokens generated so far do not fit the format asked for")
        return grammar

    create_resumed.resumes = True  # type: ignore[attr-defined]
    StructuredOutputManager._create_grammar = create_resumed  # type: ignore[assignment,method-assign]


def _constrained(manager: "StructuredOutputManager", request: "Request") -> list[int]:
    """Return the resumed tokens that the format applies to: those after the reasoning."""
    resumed = resumed_tokens(request.sampling_params)
    token_ids = request.prompt_token_ids or []
    if not resumed:
        return []
    prompt_tokens = len(token_ids) - resumed
    reasoner = None if manager.enable_in_reasoning else manager._get_reasoner(request)
    if reasoner is None:
        return token_ids[prompt_tokens:]
    # Find the shortest prefix in which the reasoning has ended; once ended, it stays so.
    low, high = prompt_tokens, len(token_ids) + 1
    while low < high:
        middle = (low + high) // 2
        if middle > len(token_ids) or reasoner.is_reasoning_end(token_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return token_ids[low:]
