"""Settings of all tests."""

from hypothesis import settings

# Machines are shared and pages come from disk: a slow example says nothing.
settings.register_profile("adrenaline", deadline=None)
settings.load_profile("adrenaline")
