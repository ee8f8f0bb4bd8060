"""Sharing a device between a prefill engine and its attention executors."""
