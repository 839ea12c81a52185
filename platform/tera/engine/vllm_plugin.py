"""A vLLM plugin: structured outputs that go on where another replica's ended.

vLLM begins a request's grammar at the request's first generated token. A resumed generation has its
first tokens in the prompt, so here the grammar is led through them before it is used. vLLM calls
`register` in each of its processes (entry point group `vllm.general_plugins`).
"""

from typing import TYPE_CHECKING, Any

from tera.upstream.vllm_penalties import resumed_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_types import StructuredOutputGrammar


def register() -> None:
    """Lead grammars through what has been generated; called more than once in a process."""
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
    """Return the resumed tokens that the format holds for: those after the model's reasoning."""
    resumed = resumed_tokens(request.sampling_params)
    token_ids = request.prompt_token_ids or []
    if not resumed:
        return []
    prompt_tokens = len(token_ids) - resumed
    reasoner = None if manager.enable_in_reasoning else manager._get_reasoner(request)
    if reasoner is None:
        return token_ids[prompt_tokens:]
    # The shortest beginning that ends the reasoning: once it has ended it stays so.
    low, high = prompt_tokens, len(token_ids) + 1
    while low < high:
        middle = (low + high) // 2
        if middle > len(token_ids) or reasoner.is_reasoning_end(token_ids[:middle]):
            high = middle
        else:
            low = middle + 1
    return token_ids[low:]
