"""What runs inside a prefill engine: scheduler, connector and worker, leases of KV blocks, and the executor pool."""
