"""Request bodies: pure functions from the client's JSON body to those for the prefill and the decode engine.

Of a body only the names of its fields become Python objects; values stay the bytes they are until one is needed. A body
of 8 MiB may be millions of values, which as objects would take many times its size.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import Raw

from vllm_adrenaline.proxy.apis import ANY_LENGTH, Api
from vllm_adrenaline.proxy.errors import Refused

Body = dict[str, Raw]
"""A body by the names of its fields; the values are JSON."""
MOST_FIELDS = 256
SHORT = 64
"""Bytes of a value that is read. What is longer is none of the numbers and switches that are looked for."""
LONG = object()

# vLLM's protocol of prefill/decode disaggregation: the first engine keeps the KV cache and answers where it is.
KEEP_KV_FOR_DECODE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
# Asks whether the prefill engine is to decode the request as well; in its answer, says so (kv/stamp.py, STAY).
STAY = "adrenaline_stay"
# Names a prompt for its prefill engine, and says that nobody will take it (kv/stamp.py).
TICKET, GIVES_UP = "adrenaline_ticket", "adrenaline_gives_up"
TOKEN_IDS = re.compile(rb"\s*\[\s*(-?[0-9]|\])")


class _Carrier(msgspec.Struct):
    """An object that may carry the engines' internal parameters."""

    kv_transfer_params: Raw | msgspec.UnsetType = msgspec.UNSET


class _PrefillAnswer(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None  # /v1/messages leaves out what is None


_BODY = msgspec.json.Decoder(Body)
_CARRIER = msgspec.json.Decoder(_Carrier)
_ONE = msgspec.json.Decoder(tuple[Raw])
_PREFILL_ANSWER = msgspec.json.Decoder(_PrefillAnswer)


def parse(raw: bytes) -> Body:
    """Return the fields of the body.

    Raises Refused for what is no JSON object, and for a body that carries the engines' internal parameters.
    """
    try:
        body = _BODY.decode(raw)
    except msgspec.ValidationError:
        raise Refused(400, "the request body must be a JSON object") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the request body is not valid JSON") from None
    if len(body) > MOST_FIELDS:
        body.clear()  # the exception keeps this frame until the client has its answer
        raise Refused(400, f"the request body has more than {MOST_FIELDS} fields")
    if "kv_transfer_params" in body or _carries_params(body.get("vllm_xargs")):
        message = "kv_transfer_params is set by this server for its engines and is not accepted from clients"
        raise Refused(400, message, "kv_transfer_params")
    return body


def _carries_params(extra: Raw | None) -> bool:
    try:
        return extra is not None and _CARRIER.decode(extra).kv_transfer_params is not msgspec.UNSET
    except msgspec.ValidationError:  # no object: the engines refuse it
        return False


def _value(body: Body, name: str) -> Any:
    """Return a field's value, None if it is not there, and LONG if it is no short one.

    Raises Refused for text that is not UTF-8: of values that are not looked at nobody has checked that.
    """
    raw = body.get(name)
    if raw is None:
        return None
    if len(memoryview(raw)) > SHORT:
        return LONG
    try:
        return json.loads(bytes(raw))
    except ValueError:
        raise Refused(400, f"{name} is not valid JSON", name) from None


def can_disaggregate(api: Api, body: Body) -> bool:
    """Say whether one KV cache, made on the prefill engine, is enough for the whole request.

    Raises Refused for a field that cannot be read.
    """
    if any(_value(body, name) not in enough for name, enough in api.alone.items()):
        return False
    return "prompt" not in api.prompt or "prompt" not in body or _is_one_prompt(body["prompt"])


def _is_one_prompt(prompt: Raw) -> bool:
    """Say whether a prompt is a text, a list of token ids, or a list with one of either."""
    beginning = bytes(memoryview(prompt)[:SHORT])
    if not beginning.lstrip().startswith(b"[") or TOKEN_IDS.match(beginning):
        return True
    try:
        return len(_ONE.decode(prompt)) == 1
    except msgspec.ValidationError:
        return False


def limit_of(api: Api, body: Body) -> int:
    """Return how many tokens the answer may have at most, as far as the body says it."""
    limits = (_value(body, name) for name in api.limits)
    return min(next((each for each in limits if isinstance(each, int) and each > 0), api.default), ANY_LENGTH)


def for_prefill(api: Api, body: Body, ticket: str) -> dict[str, Any]:
    """Return the body that makes the prefill engine compute the prompt, keep its KV cache and know it as `ticket`."""
    params = KEEP_KV_FOR_DECODE | {STAY: limit_of(api, body), TICKET: ticket}
    prefill: dict[str, Any] = {name: value for name, value in body.items() if name not in api.unwanted}
    prefill |= {name: 1 for name in api.limits if name in body}
    return prefill | api.prefill | {"stream": False, "kv_transfer_params": params}


def stays(params: dict[str, Any] | None) -> bool:
    """Say whether the prefill engine is to decode the request as well: it has computed nothing of it yet."""
    return params is not None and STAY in params


def params_of(prefill_answer: bytes) -> dict[str, Any] | None:
    """Return the kv_transfer_params of a prefill engine's answer: where it keeps the KV cache.

    None says that it kept nothing, and the decode engine computes the prompt itself. Raises Refused for what is no
    answer of a prefill engine.
    """
    try:
        return _PREFILL_ANSWER.decode(prefill_answer).kv_transfer_params
    except (ValueError, RecursionError):
        raise Refused(502, "the prefill engine's answer is none") from None


def for_decode(body: Body, params: dict[str, Any]) -> dict[str, Any]:
    """Return the body that makes the decode engine go on with the KV cache that `params` describe."""
    return body | {"kv_transfer_params": params}


def encode(body: dict[str, Any]) -> bytes:
    """Return a body as JSON; values that are JSON already go into it as they are."""
    return msgspec.json.encode(body)
