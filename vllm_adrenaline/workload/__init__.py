"""Requests and models for benchmarks, the simulator, the demonstration and tests."""
