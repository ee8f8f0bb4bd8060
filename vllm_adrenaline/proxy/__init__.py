"""The proxy: one OpenAI-compatible address in front of the prefill and the decode engines. Imports no vLLM."""
