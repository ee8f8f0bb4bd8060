"""Placement: the decision local, offloaded to which executor, or wait. Pure code."""
