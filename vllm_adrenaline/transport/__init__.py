"""The data plane: how q, k, v go to executors in each layer, and how attention output comes back."""
