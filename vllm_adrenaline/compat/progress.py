"""How far a request of vLLM's is, by its own numbers (vllm/v1/request.py). Imports no vLLM, for the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


def missing_tokens(request: Request) -> int:
    """Return how many tokens of a request are not computed yet; 1 for one that decodes."""
    return int(request.num_tokens) - int(request.num_computed_tokens)


def decodes(request: Request) -> bool:
    """Whether a running request has at most one token to compute in its next step."""
    return missing_tokens(request) <= 1
