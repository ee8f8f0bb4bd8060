"""One definition of a percentile for everything that reports or decides by one."""

from collections.abc import Collection


def percentile(values: Collection[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of all lie; 0 for none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
