"""`adrenaline up`: a whole cluster on this machine, until Ctrl-C or until one of its processes ends too often."""

from __future__ import annotations

import shlex
import time
from argparse import Namespace
from collections.abc import Sequence

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.proxy import limits
from vllm_adrenaline.system.terminal import say

CHECK_S = 0.5


def split_flags(flag: str, text: str) -> list[str]:
    """Return the words of --prefill-args or --decode-args, split as a shell would. Raises AdrenalineError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise AdrenalineError(f"cannot read {flag} {text!r}: {error}") from None


def run(options: Namespace, engine_args: Sequence[str]) -> int:
    """Start the cluster, say where it is, and watch it. Returns never, but raises AdrenalineError or Stopped."""
    cluster = Cluster(
        options.model,
        offload_ratio=options.offload_ratio,
        one_device=options.one_device,
        host=options.host,
        port=options.port,
        args=engine_args,
        prefill_args=split_flags("--prefill-args", options.prefill_args),
        decode_args=split_flags("--decode-args", options.decode_args),
        limits=limits.from_options(options),
        api_key=limits.api_key(options.api_key),
    )
    with cluster:
        try:
            say(f"ready: {cluster.url}  (see `adrenaline status {cluster.url}`; Ctrl-C stops all)")
            while True:
                cluster.recover()
                time.sleep(CHECK_S)
        finally:
            say("stopping")
