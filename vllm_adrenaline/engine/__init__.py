"""What both roles share: set-up, identity, metrics, profiles, the connector."""
