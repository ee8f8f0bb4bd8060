"""`adrenaline bench`: this plugin against vLLM's own disaggregation, on the same machine in the same run."""
