"""The KV cache across engines: ids of its blocks, its shared memory, and the proof of which prompt it holds."""
