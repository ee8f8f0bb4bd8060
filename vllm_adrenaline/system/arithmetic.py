"""Whole-number arithmetic for modules that run without vLLM.

vLLM has the same function in vllm/utils/math_utils.py, and modules that import vLLM anyway use that one. Importing vLLM
takes ten seconds, which is too long for the placement policy's tests, the simulator and the launcher.
"""


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up to a whole number."""
    return -(a // -b)
