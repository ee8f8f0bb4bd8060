"""What runs inside the decode engine: KV space, scheduler, attention backend, worker."""
