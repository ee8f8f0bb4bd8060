"""What engines of both roles share: set-up, identity, metrics, profiles, the connector."""
