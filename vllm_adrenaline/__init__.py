"""vllm-adrenaline: decode attention beside the prefill engine, where the KV cache of a request already is."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import LLM when it is asked for: vLLM takes seconds to import, and this package is imported by every command."""
    if name == "LLM":
        from vllm_adrenaline.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
