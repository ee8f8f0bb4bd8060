"""The control plane: messages and sockets."""
