"""vLLM's attention backends with the wrapper of decode/backend.py before them, one file for each."""
