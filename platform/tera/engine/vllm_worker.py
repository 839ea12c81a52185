"""What Tera adds to vLLM's worker, in each of the processes that run a model."""

from typing import Any

from tera.upstream.vllm_penalties import count_resumed_in_v1, count_resumed_in_v2


class WorkerExtension:
    """Mixed into vLLM's worker class, which it is named to by `worker_extension_cls`."""

    model_runner: Any
    use_v2_model_runner: bool

    def count_resumed_tokens(self) -> None:
        """Have penalties count what another replica has generated; called once, after loading."""
        if not self.use_v2_model_runner:
            count_resumed_in_v1(self.model_runner)
        elif self.model_runner.sampler is not None:  # only the last pipeline stage samples
            count_resumed_in_v2(self.model_runner.sampler.penalties_state)
