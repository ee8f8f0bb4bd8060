"""TCP ports of 127.0.0.1 for engines that start later."""

from __future__ import annotations

import socket

_reserved: list[socket.socket] = []


def reserve_ports(count: int) -> list[int]:
    """Reserve different ports of 127.0.0.1 for as long as this process lives, and return them.

    They are bound, so that nobody else gets them. They are not listened at, so that an engine of ours can listen there:
    it sets SO_REUSEADDR, as servers do. A port that is only found free is soon somebody's: any connection that any
    process makes may take it before an engine binds it, half a minute later.
    """
    made = [socket.socket() for _ in range(count)]
    for each in made:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # vLLM sets both
            each.setsockopt(socket.SOL_SOCKET, option, 1)
        each.bind(("127.0.0.1", 0))
    _reserved.extend(made)
    return [int(each.getsockname()[1]) for each in made]
