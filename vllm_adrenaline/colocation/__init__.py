"""How prefill and decode share a device: which share each gets, kept by objectives."""
