"""The APIs of vLLM that generate: which of their fields the proxy has to know. Checked with vLLM 0.32.

The request classes are in vllm/entrypoints: openai/{completion,chat_completion,responses}/protocol.py and
anthropic/protocol.py. All of them carry kv_transfer_params, and so do their answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ANY_LENGTH = 1 << 20
"""Stands for the output limit of a request that names none."""
SAMPLING = ("stream_options", "min_tokens", "logprobs", "top_logprobs", "logprob_token_ids", "stop", "stop_token_ids")


@dataclass(frozen=True)
class Api:
    """One API.

    `limits` are the fields that limit the answer's tokens; the first one that a body has counts, and `default` without
    any. `unwanted` are fields of no use for one token that is thrown away; several are refused together with a limit of
    1 or without a stream. `prefill` is set in the body for the prefill engine. `alone`: values of fields with which one
    KV cache, made on the prefill engine, is enough; with any other the decode engine does all. `prompt` are the fields
    that make the prompt, in their order there. `named_events`: events of its streams have names. `first_token`: what a
    stream holds not before its first token, where it begins before that.
    """

    limits: tuple[str, ...]
    prompt: tuple[str, ...]
    alone: dict[str, tuple[Any, ...]]
    default: int = ANY_LENGTH
    unwanted: tuple[str, ...] = SAMPLING
    prefill: dict[str, Any] = field(default_factory=dict)
    named_events: bool = False
    first_token: bytes = b""


NO = (None, False)
# A first token that ended the request is handed over as well, but the decode engine's need not be the same one.
GO_ON = {"ignore_eos": True}
SEQUENCES = {"n": (None, 1), "best_of": (None, 1), "use_beam_search": NO, "prompt_embeds": (None, []), "echo": NO}
# 0 asks for prompt logprobs too; they come from prefill, which only the engine that answers must do.
OPENAI = {**SEQUENCES, "prompt_logprobs": (None,)}

APIS = {
    "/v1/completions": Api(
        limits=("max_tokens",),
        prompt=("cache_salt", "prompt"),
        alone=OPENAI,
        default=16,
        prefill={"max_tokens": 1, **GO_ON},
    ),
    "/v1/chat/completions": Api(
        limits=("max_completion_tokens", "max_tokens"),
        prompt=("cache_salt", "tools", "messages"),
        alone=OPENAI,
        prefill={"max_tokens": 1, **GO_ON},
    ),
    "/v1/responses": Api(
        limits=("max_output_tokens",),
        prompt=("cache_salt", "tools", "instructions", "input"),
        # What was stored is stored by a decode engine. A prompt is cut to what the limit of its answer leaves.
        alone={"background": NO, "previous_response_id": (None,), "truncation": (None, "disabled")},
        unwanted=(*SAMPLING, "include", "enable_response_messages"),
        prefill={"max_output_tokens": 1, "store": False, **GO_ON},
        named_events=True,
        first_token=b"response.output_",
    ),
    "/v1/messages": Api(
        limits=("max_tokens",),
        prompt=("cache_salt", "tools", "system", "messages"),
        alone={},
        unwanted=(*SAMPLING, "stop_sequences"),
        prefill={"max_tokens": 1},  # it has no ignore_eos
        named_events=True,
    ),
}
"""The APIs by path."""
FORWARDED = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""Paths of requests that generate nothing. Any decode engine answers them."""
