"""One copy of the weights: a decode worker maps those of a prefill engine's worker over its own, where they are equal.

It happens once, when the KV cache is allocated: a prefill engine that starts at the same time has loaded its weights
then. What is compared, and why a wrong weight is impossible, is in weights/sharing.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence

from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.decode.mapped_memory import ask_to_map
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import cores
from vllm_adrenaline.weights import sharing
from vllm_adrenaline.weights.regions import Region, lie_in_huge_pages
from vllm_adrenaline.weights.sharing import Taken

logger = logging.getLogger("vllm.adrenaline")

MIB = 1 << 20
NAMED = 3
"""Weights that the log names for each reason why some are not shared, the largest first."""


def share(regions: Sequence[Region], options: Options, identity: messages.Identity, rank: int) -> Taken | None:
    """Map the weights of the first prefill engine that has some, and say in the log what is shared.

    Nothing here ends the engine: what cannot be shared stays as it is.

    Args:
        regions: the weights of this worker, as it has loaded them.
        options: of this engine.
        identity: of this engine.
        rank: of this worker.

    Returns:
        What is shared, and what is not. None if nothing was tried.
    """
    for address in options.peer_addresses:
        began = time.monotonic()
        try:
            with contextlib.closing(ask_to_map(address, identity, rank, "")) as found:
                if found.weights is None:
                    continue
                if options.share_weights == "auto" and (why := _why_not(regions, found.kv.cpus)):
                    anyway = "--adrenaline-share-weights on shares them all the same"
                    logger.info("weights are not shared: %s (%s)", why, anyway)
                    return None
                taken = sharing.take(regions, found.weights_file, found.weights.size, found.weights.table)
        except (AdrenalineError, OSError) as error:
            logger.warning("weights are not shared with the prefill engine at %s: %s", address, error)
            continue
        total = sum(region.size for region in regions)
        logger.info(
            "weights: %.1f of %.1f MiB are shared with the prefill engine at %s (%.1f s)%s",
            taken.shared / MIB,
            total / MIB,
            address,
            time.monotonic() - began,
            "".join(f"; {reason}" for reason in _reasons(taken)),
        )
        return taken
    logger.info("weights are not shared: no prefill engine shares its own")
    return None


def _why_not(regions: Sequence[Region], their_cores: Sequence[int]) -> str:
    """Return why sharing would make steps slower; nothing if it would not."""
    if cores.nodes(os.sched_getaffinity(0)) != cores.nodes(their_cores):
        return "the prefill engine runs on another NUMA node"
    if lie_in_huge_pages(regions):
        return "they lie in huge pages here, which is faster"
    return ""


def _reasons(taken: Taken) -> list[str]:
    """Return in words what is not shared."""
    words = []
    for reason, each in sorted(taken.private.items()):
        names = [name for _, name in sorted(each, reverse=True)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        size = sum(size for size, _ in each) / MIB
        words.append(f"{size:.1f} MiB not ({reason}): {', '.join(names[:NAMED])}{more}")
    return words
