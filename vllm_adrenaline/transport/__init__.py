"""The data plane: the per-layer path of q, k, v and attention output."""
