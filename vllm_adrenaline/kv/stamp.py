"""The stamp that a prefill engine adds to the `kv_transfer_params` of a finished prompt: which prompt it was, signed.

A router carries it to the decode engine, with the rest. The decode engine compares it with the prompt of the request
that came with it, and believes nothing that the prefill engine has not signed. The key is one of this life of the
prefill engine, which tells it to decode engines (control/messages.py, Welcome). Prompts have to be compared because
vLLM answers a request of several prompts, or with `n` > 1, with the parameters of one of them
(vllm/entrypoints/openai/completion/serving.py, 0.32), and routers pass on what they get.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from vllm_adrenaline.kv.prompt_hash import prompt_hash

KEY = "adrenaline"
"""The key under which `kv_transfer_params` hold the stamp."""
STAY = "adrenaline_stay"
"""The key under which the `kv_transfer_params` of a prompt say that the prefill engine may decode the request as well:
then its `max_tokens` is the value. Where the answer has this key, the request is to be sent there again, whole."""
TICKET = "adrenaline_ticket"
"""The key under which who asks for a prompt names it, by a text that nobody can guess."""
GIVES_UP = "adrenaline_gives_up"
"""The key under which he says, in another request, that he will not take it: the value is the ticket. He may have left
when the prefill engine answered, and then knows no other name of the prompt."""
MAX_TICKET = 64
VERSION = 2
"""The version of stamps that are made and understood here."""


class Stamp(msgspec.Struct, frozen=True):
    """The proof of which prompt some KV is of.

    Attributes:
        version: of the stamp.
        prompt_hash: of the prompt's tokens (kv/prompt_hash.py), in hexadecimal.
        num_tokens: of the prompt, or of its beginning if that is all there is.
        signature: the prefill engine's, in hexadecimal, over all that decides what is read: the engine's life and the
            prompt's name there, whether the prompt is whole, and the rest of the stamp. Addresses are not in it, for
            routers change them.
    """

    version: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    prompt_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    signature: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{0,64}$")] = ""

    def is_signed(self, key: bytes, params: Mapping[str, Any]) -> bool:
        """Whether the prefill engine with this key has signed the stamp, for the `kv_transfer_params` it came in."""
        return hmac.compare_digest(self.signature.encode(), _signature(self, key, params).encode())

    def fits(self, prompt: Sequence[int], is_beginning: bool = False) -> bool:
        """Whether the stamp is of this prompt, given as token ids, and of a version that is understood here.

        `is_beginning`: it is to be of less than the whole prompt.
        """
        is_complete = self.num_tokens < len(prompt) if is_beginning else self.num_tokens == len(prompt)
        is_known = self.version == VERSION and is_complete
        return is_known and self.prompt_hash == prompt_hash(prompt[: self.num_tokens]).hex()


def stamped(params: Mapping[str, Any], proof: bytes, num_tokens: int, key: bytes) -> dict[str, Any]:
    """Return `params` with the stamp of a prompt.

    Args:
        params: `kv_transfer_params`, in which only addresses change from now on.
        proof: the prompt's hash.
        num_tokens: of the prompt.
        key: of this life of the prefill engine.
    """
    stamp = Stamp(VERSION, proof.hex(), num_tokens)
    signed = msgspec.structs.replace(stamp, signature=_signature(stamp, key, params))
    return {**params, KEY: msgspec.to_builtins(signed)}


def _signature(stamp: Stamp, key: bytes, params: Mapping[str, Any]) -> str:
    said = [params.get(name) for name in ("remote_engine_id", "remote_request_id", "do_remote_prefill")]
    return hmac.digest(
        key, msgspec.json.encode([*said, stamp.version, stamp.prompt_hash, stamp.num_tokens]), "sha256"
    ).hex()
