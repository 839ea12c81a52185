"""Tera's plugin for vLLM, which each of vLLM's processes loads.

The entry point is `tera` in the group `vllm.general_plugins`.
"""

from tera.upstream.vllm_grammar import lead_grammars


def register() -> None:
    """Prepare this vLLM process for generations that began elsewhere; may be called repeatedly.

    Raises:
        StartError: Tera does not work with this version of vLLM. The error ends the process, while
            vLLM would only log a plugin that cannot be imported.
    """
    lead_grammars()
