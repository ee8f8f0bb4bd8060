"""Announcements of a channel, as in csrc/stamp.h: a step of one life of the channel, and a layer in it."""

from __future__ import annotations

EPOCH_SHIFT, STEP_SHIFT = 48, 12
"""Where life and step begin in an announcement; layer + 1 is in the lowest bits, and 0 there says the plan."""


def stamp(epoch: int, step: int, layer_plus_1: int) -> int:
    """Return the announcement of a layer."""
    return epoch << EPOCH_SHIFT | step << STEP_SHIFT | layer_plus_1


def step_of(announced: int) -> int:
    """Return the step that an announcement is of."""
    return announced >> STEP_SHIFT & (1 << EPOCH_SHIFT - STEP_SHIFT) - 1
