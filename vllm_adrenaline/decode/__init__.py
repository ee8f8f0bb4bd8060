"""What runs inside a decode engine: scheduler, request table, connector, worker, attention backend."""
