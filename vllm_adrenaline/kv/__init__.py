"""The KV space, shared KV memory, and the proof of whose prompt it holds."""
