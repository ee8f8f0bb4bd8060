"""How a prefill engine and its attention executors share a device."""
