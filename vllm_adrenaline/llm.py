"""`LLM(...)` with offloading: vLLM's offline class, which takes `adrenaline_*` arguments, too.

    from vllm_adrenaline import LLM
    llm = LLM("MODEL", adrenaline_role="decode", adrenaline_peers="ipc:///run/adrenaline/prefill")

An offline decode engine offloads requests whose `SamplingParams.extra_args["kv_transfer_params"]` come from a prefill
engine, as over HTTP.
"""

from __future__ import annotations

from typing import Any

import vllm

from vllm_adrenaline.config import PLUGIN, Options

PREFIX = f"{PLUGIN}_"


class LLM(vllm.LLM):
    """vllm.LLM with every option of `vllm serve --help=Adrenaline` as an argument `adrenaline_<name>`.

    Raises:
        AdrenalineError: options, model or peers do not fit.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        ours = {name.removeprefix(PREFIX): kwargs.pop(name) for name in list(kwargs) if name.startswith(PREFIX)}
        if ours:
            Options.parse(ours)
            kwargs["additional_config"] = {**kwargs.get("additional_config", {}), PLUGIN: ours}
        super().__init__(model, **kwargs)
