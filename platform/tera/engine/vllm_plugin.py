"""Tera's plugin of vLLM, which each of vLLM's processes loads.

The entry point is `tera` in the group `vllm.general_plugins`.
"""

from tera.upstream.vllm_grammar import lead_grammars


def register() -> None:
    """Make vLLM's process ready for generations that began elsewhere; may be called again.

    Raises:
        StartError: this vLLM is not one that Tera works with. It ends the process, where vLLM
            would only log that the plugin could not be imported.
    """
    lead_grammars()
