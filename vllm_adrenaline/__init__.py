"""vllm-adrenaline: decode attention beside the prefill engine, where the KV cache of a request already is."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs vLLM when it is asked for: that takes seconds, and every command imports this package."""
    if name in ("LLM", "SamplingParams"):
        from vllm_adrenaline.compat.versions import check_environment

        check_environment()
    if name == "LLM":
        from vllm_adrenaline.offline.llm import LLM

        return LLM
    if name == "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
