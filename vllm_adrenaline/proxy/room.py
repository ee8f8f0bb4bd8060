"""How much room decode engines have for further requests, as they say now and then: own memory, and executors'."""

from __future__ import annotations

import asyncio

from vllm_adrenaline.proxy.upstream import Engine, Engines

EVERY_S = 2.0


async def watch(engines: Engines) -> None:
    """Keep the room of all engines up to date, for as long as there is a choice between them. Never ends."""
    while True:
        if len(engines.all) > 1:
            await asyncio.gather(*(ask(engine) for engine in engines.all))
        await asyncio.sleep(EVERY_S)


async def ask(engine: Engine) -> None:
    """Note how much room an engine says that it has; None if it does not. Until it answers, what it said last holds."""
    room = None
    try:
        if (metrics := await engine.metrics()) is not None:
            room = metrics.room()
    except (ValueError, OverflowError):  # what is there is no engine
        pass
    engine.room = room
