"""Huge pages for a memory file, where the system has some and does not forbid them (Linux 6.1 and later).

The usual setting of /sys/kernel/mm/transparent_hugepage/shmem_enabled is `never`: memory files get none by themselves.
MADV_COLLAPSE makes them all the same. Then memory is in pieces of 2 MiB. Bare handlers of oneDNN read those faster even
where they are mapped as small pages, because the file and the addresses do not begin alike (docs/performance.md).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from vllm_adrenaline.system import pages

_COLLAPSE = 25
_FOLDER = Path("/sys/kernel/mm/transparent_hugepage")


class HugePages:
    """Makes the memory of a file that is being written, in order, huge pages.

    It has the file mapped until it is closed. Where there are no huge pages it does nothing.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Args: the descriptor of a file that holds nothing yet, and its bytes."""
        self._fd, self._done, self._piece, self._size = fd, 0, _piece(), size
        if not self._piece or size < self._piece:
            self._piece = 0
            return
        begin = pages.map_pages(None, size + self._piece, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self._mapped = pages.Range(begin, begin + size + self._piece)
        self._base = -(-begin // self._piece) * self._piece  # where huge pages can begin
        pages.map_pages(self._base, size, mmap.PROT_READ, mmap.MAP_SHARED | pages.FIXED, fd, 0)

    def prepare(self, end: int) -> None:
        """Get the memory of everything before `end` that was not prepared yet. It is zero then."""
        while self._piece and self._done < end and self._done + self._piece <= self._size:
            os.pwrite(self._fd, b"\0", self._done)  # a piece without any page is not collapsed
            begin = self._base + self._done
            try:
                pages.advise(pages.Range(begin, begin + self._piece), _COLLAPSE)
            except OSError:
                self.close()
            self._done += self._piece

    def close(self) -> None:
        """Unmap the file."""
        if self._piece:
            pages.unmap(self._mapped)
        self._piece = 0


def _piece() -> int:
    """Return the bytes of a huge page; 0 if there are none, or the system forbids them."""
    try:
        if "[never]" in (_FOLDER / "enabled").read_text():
            return 0
        return int((_FOLDER / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
