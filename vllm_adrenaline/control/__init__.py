"""The control plane: messages, sockets, and both ends of the line between decode and prefill engine."""
