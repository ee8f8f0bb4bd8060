"""A prefill worker's weights, moved to where decode workers can map them when they have loaded the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from vllm_adrenaline.config import Options
from vllm_adrenaline.weights import sharing
from vllm_adrenaline.weights.regions import Region, lie_in_huge_pages
from vllm_adrenaline.weights.sharing import Moved

logger = logging.getLogger("vllm.adrenaline")

MIB = 1 << 20


def move(regions: Sequence[Region], options: Options) -> Moved | None:
    """Move weights into a memory file, and say so in the log. None if they stay where they are; that is no error."""
    if options.share_weights == "auto" and lie_in_huge_pages(regions):
        logger.info(
            "weights are not offered to decode engines: they lie in huge pages here, which is faster "
            "(--adrenaline-share-weights on offers them all the same)"
        )
        return None
    began = time.monotonic()
    try:
        moved = sharing.move(regions)
    except OSError as error:
        logger.warning("weights are not offered to decode engines: %s", error)
        return None
    logger.info(
        "weights: %.1f of %.1f MiB can be shared with decode engines (%.1f s)",
        moved.shared / MIB,
        sum(region.size for region in regions) / MIB,
        time.monotonic() - began,
    )
    return moved
