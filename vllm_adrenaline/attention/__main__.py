"""The entry point of an attention executor process: `python -m vllm_adrenaline.attention`.

It reads an ExecutorSpec as JSON from stdin. The prefill engine starts it (prefill/executor_pool.py).
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import msgspec

from vllm_adrenaline.attention.spec import ExecutorSpec
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.system import priority
from vllm_adrenaline.system.bounded_log import bound

logger = logging.getLogger("vllm.adrenaline")


def main() -> None:
    """Read the spec and serve decode engines until SIGTERM, which also removes the control socket."""
    logging.basicConfig(level=logging.INFO, format="(adrenaline executor %(process)d) %(levelname)s %(message)s")
    bound(logger)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the engine, which ends us
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=ExecutorSpec)
    # Before torch is imported: its thread pools look at the affinity when they start.
    os.sched_setaffinity(0, spec.cpus)
    import torch

    from vllm_adrenaline.attention.server import Server
    from vllm_adrenaline.control import sockets
    from vllm_adrenaline.control.keys import Keys

    torch.set_num_threads(spec.threads)
    sockets.use_keys(Keys.load(spec.key, spec.allow) if spec.key else None)
    server = Server(spec)
    # Not before: imports take seconds, and one that is started again would keep its cores from whoever works there.
    # A share of a GPU is one of its multiprocessors (attention/gpu.py): whoever launches there comes first.
    taken = priority.take_share(os.getpid(), spec.share if isinstance(spec.kv, KVExport) else 1.0)
    logger.info("attention executor %d: %d thread(s) on cores %s, %s", spec.rank, spec.threads, spec.cpus, taken)
    if taken == priority.ORDINARY:
        logger.warning(
            "the attention executor may take no higher priority (it needs CAP_SYS_NICE, or ulimit -r 1): whatever else "
            "runs on its cores delays every layer of a decode step"
        )
    try:
        server.serve()
    except SystemExit:
        # At once: a thread that comes back from native code while the interpreter ends would abort the process.
        os._exit(0)


if __name__ == "__main__":
    main()
