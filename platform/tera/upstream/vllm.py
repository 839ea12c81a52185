"""What Tera uses of vLLM that vLLM does not promise to keep."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import RequestOutputCollector


def deliver(
    collector: "RequestOutputCollector", put: "Callable[[RequestOutput | Exception], None]"
) -> None:
    """Have `put` called with each output of a request, from vLLM's own loop over a step's outputs.

    `AsyncLLM.generate` waits on the collector instead, which wakes a task for each token of each
    request. What vLLM has put into the collector before this call is delivered at once.
    """
    early: RequestOutput | Exception | None
    try:
        early = collector.get_nowait()  # type: ignore[assignment]  # no pooling request is made
    except Exception as error:  # noqa: BLE001  the request's own end, which is delivered
        early = error
    collector.put = put  # type: ignore[method-assign,assignment]
    if early is not None:
        put(early)
