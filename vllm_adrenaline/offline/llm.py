"""`LLM(...)` with offloading: vLLM's class for use without a server, and a prefill engine beside it.

    from vllm_adrenaline import LLM
    llm = LLM("MODEL")
    llm.generate("Once upon a time")

This process has the decode engine. The prefill engine with its attention executors is a process of its own, which ends
with this one.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import vllm

from vllm_adrenaline.compat import engine_core_client
from vllm_adrenaline.config import PLUGIN, Options, ratio_of
from vllm_adrenaline.control import addresses
from vllm_adrenaline.engine.setup import check_model
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.supervisor import Supervisor
from vllm_adrenaline.offline import start
from vllm_adrenaline.offline.arguments import PREFIX, for_role, options_of
from vllm_adrenaline.offline.prompts import PromptsFirst
from vllm_adrenaline.system.folders import runtime_folder


class LLM(vllm.LLM):
    """vllm.LLM whose prompts are computed, and some of whose requests are attended, by a prefill engine.

    Answers are those of vllm.LLM, which has all the other arguments and methods. What a prefill engine cannot compute
    (images, prompt logprobs) the decode engine computes. On CPU the two engines divide cores and memory, unless
    arguments or vLLM's environment variables do.

    At the end of `with LLM(...) as llm:` both engines end; `shutdown` ends them at once. Else they end when the object
    or the process does, however that ends. The prefill engine ends with the thread that made it, too.
    """

    def __init__(
        self,
        model: str,
        *,
        offload_ratio: str | float | None = "auto",
        prefill: str | Mapping[str, Any] | None = None,
        decode: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Start both engines; return when they are ready.

        Args:
            model: as for vllm.LLM.
            offload_ratio: `auto`, or the share of requests to offload, 0 to 1 (--adrenaline-offload-ratio). None:
                vllm.LLM as it is.
            prefill: arguments for the prefill engine alone; or the URL of one that runs already, whose control address
                is `adrenaline_peers`.
            decode: arguments for the decode engine alone.
            kwargs: arguments for both: those of vllm.LLM, and every option of `vllm serve --help=Adrenaline` as
                `adrenaline_<name>`. With `adrenaline_role` this is an engine of that role, and nothing else is started;
                one that decodes is told where prompts are by SamplingParams.extra_args["kv_transfer_params"].

        Raises:
            AdrenalineError: options, model or peers do not fit, or the prefill engine does not start.
        """
        self._close: Any = None
        if offload_ratio is None or f"{PREFIX}role" in kwargs:
            if prefill is not None or decode is not None:
                raise AdrenalineError(
                    "prefill=... and decode=... are of no use with one engine: leave adrenaline_role "
                    "out, or give an offload_ratio"
                )
            super().__init__(model, **_for_vllm(kwargs))
            return
        check_model(model)
        ratio_of("offload_ratio", offload_ratio)
        theirs = for_role("prefill", kwargs, prefill if isinstance(prefill, Mapping) else {})
        mine = for_role("decode", kwargs, decode)
        with ExitStack() as stack:
            supervisor: Supervisor | None = None
            on_cores: dict[str, str] = {}
            if isinstance(prefill, str):
                url, address = prefill, mine.get(f"{PREFIX}peers") or addresses.default()
            else:
                folder = runtime_folder()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                address = start.listen_address(folder)
                on_cores = start.cores_of_engines(share_all=mine.get(f"{PREFIX}pool", "remote") != "remote")
                theirs, mine = start.with_memory(theirs), start.with_memory(mine)
                engine = start.prefill_engine(model, folder, theirs, on_cores.get("prefill"))
                url, supervisor = engine.url, Supervisor([engine])
                stack.callback(supervisor.stop)
                supervisor.spawn()
            mine |= {f"{PREFIX}role": "decode", f"{PREFIX}peers": address, f"{PREFIX}offload_ratio": str(offload_ratio)}
            with start.environment(on_cores.get("decode"), supervisor is not None), start.ending_with(supervisor):
                super().__init__(model, **_for_vllm(mine))
                core = self.llm_engine.engine_core
                stack.callback(core.shutdown)
                if supervisor is not None:
                    supervisor.wait_until_ready()
            prompts = PromptsFirst(url)
            prompts.forward = engine_core_client.divert(core, prompts.take, prompts.drop)
            stack.callback(prompts.stop)
            self._close = weakref.finalize(self, stack.pop_all().close)

    def shutdown(self) -> None:
        """End both engines; may be called again."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _for_vllm(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with this plugin's options where vLLM carries them: in `additional_config`."""
    options = options_of(arguments)
    others = {name: value for name, value in arguments.items() if not name.startswith(PREFIX)}
    if options:
        Options.parse(options)
        others["additional_config"] = {**others.get("additional_config", {}), PLUGIN: options}
    return others
