"""Request bodies: pure functions from the client's JSON body to those for the prefill and the decode engine."""

from __future__ import annotations

import json
from typing import Any

from vllm_adrenaline.proxy.errors import Refused

Body = dict[str, Any]

# vLLM's protocol of prefill/decode disaggregation: the first engine keeps the KV cache and answers where it is.
KEEP_KV_FOR_DECODE: Body = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Asks whether the prefill engine is to decode the request as well; in its answer, says so (kv/stamp.py, STAY).
STAY = "adrenaline_stay"
ANY_LENGTH = 1 << 20
"""Stands for the output limit of a request that names none."""
# Of no use for one token that is thrown away; several of them are refused together with max_tokens=1 or stream=false.
NOT_FOR_PREFILL = (
    "stream_options",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "stop",
    "stop_token_ids",
)


def parse(raw: bytes) -> Body:
    """Return the body as a dictionary.

    Raises Refused for what is no JSON object, and for a body that carries the engines' internal parameters.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(400, "the request body is not valid JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "the request body must be a JSON object")
    extra = body.get("vllm_xargs")
    if "kv_transfer_params" in body or (isinstance(extra, dict) and "kv_transfer_params" in extra):
        message = "kv_transfer_params is set by this server for its engines and is not accepted from clients"
        raise Refused(400, message, "kv_transfer_params")
    return body


def can_disaggregate(body: Body) -> bool:
    """Say whether one KV cache, made on the prefill engine, is enough for the whole request."""
    if any(body.get(name) not in (None, 1) for name in ("n", "best_of")):
        return False
    if any(body.get(name) for name in ("echo", "use_beam_search", "prompt_embeds")):
        return False
    # 0 asks for prompt logprobs too; they come from prefill, which only the engine that answers must do.
    if body.get("prompt_logprobs") is not None:
        return False
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    return not several


def for_prefill(body: Body) -> Body:
    """Return the body that makes the prefill engine compute the prompt and keep its KV cache."""
    prefill = {name: value for name, value in body.items() if name not in NOT_FOR_PREFILL}
    # As vLLM takes them: completions have a default of 16 and know max_tokens only.
    limits = (
        (body.get("max_tokens"), 16)
        if "prompt" in body
        else (body.get("max_completion_tokens"), body.get("max_tokens"))
    )
    limit = next((each for each in limits if isinstance(each, int) and each > 0), ANY_LENGTH)
    params = KEEP_KV_FOR_DECODE | {STAY: min(limit, ANY_LENGTH)}
    prefill |= {"stream": False, "max_tokens": 1, "kv_transfer_params": params}
    if "max_completion_tokens" in body:
        prefill["max_completion_tokens"] = 1
    # A first token that ended the request would make vLLM drop the KV cache instead of handing it over.
    prefill["ignore_eos"] = True
    return prefill


def stays(params: Body | None) -> bool:
    """Say whether the prefill engine is to decode the request as well: it has computed nothing of it yet."""
    return params is not None and STAY in params


def params_of(prefill_answer: bytes) -> Body | None:
    """Return the kv_transfer_params of a prefill engine's answer: where it keeps the KV cache.

    None says that it kept nothing, and the decode engine computes the prompt itself. Raises Refused for an answer that
    is none.
    """
    try:
        params = json.loads(prefill_answer)["kv_transfer_params"]
    except (ValueError, KeyError, TypeError):
        raise Refused(502, "the prefill engine's answer carries no kv_transfer_params") from None
    if params is not None and not isinstance(params, dict):
        raise Refused(502, "the prefill engine's kv_transfer_params are no JSON object")
    return params


def for_decode(body: Body, params: Body | None) -> Body:
    """Return the body that makes the decode engine go on with the KV cache that `params` describe."""
    return body if params is None else body | {"kv_transfer_params": params}
