"""Settings of all tests."""

import os

from hypothesis import settings

# Illegal transitions of a request raise, here and in all engines that tests start (vllm_adrenaline/decode/request.py).
os.environ["ADRENALINE_STRICT"] = "1"

# Machines are shared and pages come from disk: a slow example says nothing.
settings.register_profile("adrenaline", deadline=None)
settings.load_profile("adrenaline")
