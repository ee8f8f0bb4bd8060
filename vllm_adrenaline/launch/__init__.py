"""Starting and supervising a prefill engine, a decode engine and the front door on one machine."""
