"""Arguments of `LLM(...)`, as flags of a server, and by the engine that they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_adrenaline.config import PLUGIN, role_of
from vllm_adrenaline.errors import AdrenalineError

PREFIX = f"{PLUGIN}_"
ONLY_OF_LLM = ("chat_template", "disable_log_stats", "served_model_name")
"""Arguments that say nothing of how prompts are computed."""


def for_role(role: str, common: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of one engine: all of `common` but this plugin's options for the other role, and its own."""
    fitting = {
        name: value
        for name, value in common.items()
        if not name.startswith(PREFIX) or role_of(name.removeprefix(PREFIX)) in (None, role)
    }
    return {**fitting, **(own or {})}


def options_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plugin's options in arguments, by their names without the prefix."""
    return {name.removeprefix(PREFIX): value for name, value in arguments.items() if name.startswith(PREFIX)}


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments of vllm.LLM as flags of vLLM's server.

    Raises:
        AdrenalineError: a value cannot be written on a command line.
    """
    flags: list[str] = []
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or name in ONLY_OF_LLM:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, dict):
            try:
                flags += [flag, json.dumps(value)]
            except TypeError:
                raise _refusal(name, value) from None
        elif isinstance(value, list | tuple):
            flags += [flag, *map(str, value)]
        elif isinstance(value, str | int | float):
            flags += [flag, str(value)]
        else:
            raise _refusal(name, value)
    return flags


def _refusal(name: str, value: Any) -> AdrenalineError:
    return AdrenalineError(
        f"the argument {name} cannot be given to the prefill engine, which is a process of its own: {value!r} is no "
        "number, text, list or dictionary of such. Give it in decode={...} if it is for this engine alone"
    )
