"""Tera's extension of vLLM's worker, in each process that runs a model."""

from typing import Any

from tera.upstream.vllm_penalties import count_resumed_in_v1, count_resumed_in_v2


class WorkerExtension:
    """Mixed into vLLM's worker class, through the argument `worker_extension_cls`."""

    model_runner: Any
    use_v2_model_runner: bool

    def count_resumed_tokens(self) -> None:
        """Make penalties count tokens from other replicas too; called once, after loading."""
        if not self.use_v2_model_runner:
            count_resumed_in_v1(self.model_runner)
        elif self.model_runner.sampler is not None:  # only the last pipeline stage samples
            count_resumed_in_v2(self.model_runner.sampler.penalties_state)
