"""The percentile, in one definition for everything that reports it or decides by it."""

from collections.abc import Collection


def percentile(values: Collection[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of all values lie, or 0 if there are no values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
