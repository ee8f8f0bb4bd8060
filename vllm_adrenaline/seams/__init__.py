"""What the plugin leans on in vLLM, looked up in vLLM's source without importing it (`adrenaline check-seams`)."""
