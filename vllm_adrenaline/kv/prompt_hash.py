"""The hash of a prompt's tokens: the proof that KV is that of this very prompt."""

import hashlib
from array import array
from collections.abc import Sequence


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """Return 16 bytes that identify `token_ids`: the same on both engines for the same prompt, and for no other."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).digest()
