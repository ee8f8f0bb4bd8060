"""What runs inside the prefill engine: KV sharing, lending of blocks, supervision of the attention executors."""
