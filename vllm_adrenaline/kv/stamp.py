"""The stamp that a prefill engine adds to the `kv_transfer_params` of a finished prompt: which prompt it was.

A router carries it to the decode engine, with the rest. The decode engine compares it with the prompt of the request
that came with it. vLLM answers a request of several prompts, or with `n` > 1, with the parameters of one of them
(vllm/entrypoints/openai/completion/serving.py, 0.32), and routers pass on what they get.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from vllm_adrenaline.kv.prompt_hash import prompt_hash

KEY = "adrenaline"
"""The key under which `kv_transfer_params` hold the stamp."""
STAY = "adrenaline_stay"
"""The key under which the `kv_transfer_params` of a prompt say that the prefill engine may decode the request as well:
then its `max_tokens` is the value. Where the answer has this key, the request is to be sent there again, whole."""
VERSION = 1
"""The version of stamps that are made and understood here."""


class Stamp(msgspec.Struct, frozen=True):
    """The proof of which prompt some KV is of.

    Attributes:
        version: of the stamp.
        prompt_hash: of the prompt's tokens (kv/prompt_hash.py), in hexadecimal.
        num_tokens: of the prompt, or of its beginning if that is all there is.
        signature: room for the prefill engine's signature over the rest. In version 1 it is empty and not looked at.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    prompt_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    signature: Annotated[str, msgspec.Meta(max_length=512)] = ""

    def fits(self, prompt: Sequence[int], is_beginning: bool = False) -> bool:
        """Whether the stamp is of this prompt, given as token ids, and of a version that is understood here.

        `is_beginning`: it is to be of less than the whole prompt.
        """
        is_complete = self.num_tokens < len(prompt) if is_beginning else self.num_tokens == len(prompt)
        is_known = self.version == VERSION and is_complete
        return is_known and self.prompt_hash == prompt_hash(prompt[: self.num_tokens]).hex()


def stamped(params: dict[str, Any], proof: bytes, num_tokens: int) -> dict[str, Any]:
    """Return `params` with the stamp of a prompt that has `num_tokens` tokens and whose hash is `proof`."""
    return params | {KEY: msgspec.to_builtins(Stamp(VERSION, proof.hex(), num_tokens))}
