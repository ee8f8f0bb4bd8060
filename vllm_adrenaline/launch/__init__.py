"""Starting and supervising a prefill engine, a decode engine and the proxy on one machine. Imports no vLLM."""
