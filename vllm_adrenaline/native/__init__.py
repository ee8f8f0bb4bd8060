"""The native library: loaded, checked against its sources, typed."""
