"""The machine: cores, priorities, memory files, child processes, folders, statistics. Knows nothing of vLLM."""
