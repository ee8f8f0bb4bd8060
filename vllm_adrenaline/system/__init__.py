"""The machine: cores, priorities, ports, memory files, child processes, folders, the terminal. Imports no vLLM."""
