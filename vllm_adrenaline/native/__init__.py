"""The native library (csrc/): loading it, checking it against its sources, and its types."""
