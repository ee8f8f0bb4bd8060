"""A step of vLLM's model runner without requests, for measuring (vllm/v1/worker/gpu_model_runner.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def run_dummy(runner: GPUModelRunner, num_tokens: int) -> Any:
    """Run the model over `num_tokens` tokens of no request, without attention; return the hidden states."""
    hidden, _ = runner._dummy_run(num_tokens)
    return hidden
