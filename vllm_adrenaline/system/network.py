"""The network interfaces of this host."""

from __future__ import annotations

import fcntl
import socket
import struct

from vllm_adrenaline.errors import AdrenalineError

SIOCGIFADDR = 0x8915


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface. Raises AdrenalineError for one without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise AdrenalineError(
                f"--adrenaline-interface: there is no interface {interface} with an IPv4 address here: {error}"
            ) from None
    return socket.inet_ntoa(answer[20:24])
