"""`adrenaline bench` and `adrenaline demo`: this plugin beside vLLM alone, on the same machine in the same run."""
