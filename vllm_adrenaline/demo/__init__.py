"""The demonstration: a small random model, and a comparison of Adrenaline with plain vLLM on this machine."""
