"""Offloading without a server: vLLM's `LLM`, with a prefill engine of its own beside it."""
