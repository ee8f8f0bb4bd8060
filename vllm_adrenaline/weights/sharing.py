"""Weights in a memory file: one worker moves its own into it, and others map what is equal to theirs.

Nothing is believed. A worker loads and packs its own weights, as it would alone. It maps a peer's pages only over bytes
of its own that are equal, and the peer's file is frozen before they are compared. So a model is the same after sharing,
whatever the peer did. Mappings are private: a worker that writes into its weights does so in a copy of the page. They
stay when the peer ends.

A page can be shared only if a weight begins at the same place in a page in both workers (system/malloc.py). The first
and the last page of a weight hold other things too, and stay private.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import memory_file, pages
from vllm_adrenaline.system.huge_pages import HugePages
from vllm_adrenaline.weights.regions import Region

NAME = "adrenaline-weights"
"""What the memory file is called in /proc/PID/maps."""
MAX_TABLE = 64 << 20
"""Bytes of the largest table that is read."""
WRITE_AT_ONCE = 1 << 30

Natural = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One region in a memory file.

    Attributes:
        name, dtype, shape: of the weight, as in Region.
        size: of the weight's memory, in bytes.
        lead: where it begins in a page.
        offset: where its pages begin in the file.
    """

    name: Text
    dtype: Text
    shape: Annotated[list[Natural], msgspec.Meta(max_length=64)]
    size: Natural
    lead: Natural
    offset: Natural


@dataclass(frozen=True)
class Moved:
    """The memory file of a worker that has moved its weights.

    Attributes:
        fd: of the file, which stays open.
        size: of the file, in bytes.
        table: where its table begins, in bytes: a list of Entry as msgpack, until the end of the file.
        shared: bytes of weights in it.
    """

    fd: int
    size: int
    table: int
    shared: int


@dataclass
class Taken:
    """What a worker has mapped of a peer's weights.

    Attributes:
        shared: bytes.
        private: (bytes, name) of weights that are not mapped as a whole, by the reason.
    """

    shared: int = 0
    private: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def leave(self, why: str, region: Region) -> None:
        """Note that a region stays private."""
        self.private.setdefault(why, []).append((region.size, region.name))


def move(regions: Sequence[Region]) -> Moved:
    """Move the pages of these regions into a new memory file, which is frozen then. Their addresses stay.

    No thread may write into them meanwhile. At most one region is in memory twice.

    Raises:
        OSError: there is not enough memory. Regions may be in the file or not; they are good either way.
    """
    own, entries, movable, end = pages.anonymous(), [], [], 0
    for region in regions:
        size = region.pages.end - region.pages.begin
        if size and pages.is_inside(region.pages, own):
            lead = region.address % mmap.PAGESIZE
            entries.append(Entry(region.name, region.dtype, list(region.shape), region.size, lead, end))
            movable.append(region.pages)
            end += size
    table = msgspec.msgpack.encode(entries)
    fd = memory_file.create_unfrozen(NAME, end + len(table))
    try:
        with contextlib.closing(HugePages(fd, end + len(table))) as huge:
            for entry, each in zip(entries, movable, strict=True):
                huge.prepare(entry.offset + each.end - each.begin)
                _write(fd, (ctypes.c_char * (each.end - each.begin)).from_address(each.begin), entry.offset)
                pages.replace_by_file(each, fd, entry.offset)
        _write(fd, table, end)
        memory_file.freeze(fd)
    except BaseException:
        os.close(fd)
        raise
    return Moved(fd, end + len(table), end, end)


def _write(fd: int, data: ctypes.Array[ctypes.c_char] | bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:WRITE_AT_ONCE], offset)
        view, offset = view[written:], offset + written


def take(regions: Sequence[Region], fd: int, size: int, table: int) -> Taken:
    """Map a peer's pages over those of this worker that hold the same bytes.

    Args:
        regions: of this worker. No thread may write into them meanwhile.
        fd: the peer's memory file; the caller closes it.
        size, table: of the file, as in Moved.

    Raises:
        AdrenalineError: the file is not frozen, or its table is none. Nothing is mapped then.
        OSError: it cannot be mapped. Regions may be mapped or not; they are good either way.
    """
    memory_file.check(fd, size, "the memory file with the weights", frozen=True)
    if not max(0, size - MAX_TABLE) <= table < size:
        raise AdrenalineError("the memory file with the weights has no table")
    try:
        listed = msgspec.msgpack.decode(os.pread(fd, size - table, table), type=list[Entry])
    except (RecursionError, ValueError) as error:
        raise AdrenalineError(f"the table of the weights cannot be read: {error}") from None
    for entry in listed:
        begin, end = pages.inner_pages(entry.lead, entry.size)
        if entry.offset % mmap.PAGESIZE or entry.offset + end - begin > table:
            raise AdrenalineError("the table of the weights names pages that are not in the file")
    begin = pages.map_pages(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    try:
        return _take(regions, {entry.name: entry for entry in listed}, fd, begin)
    finally:
        pages.unmap(pages.Range(begin, begin + size))


def _take(regions: Sequence[Region], entries: dict[str, Entry], fd: int, file: int) -> Taken:
    own, taken = pages.anonymous(), Taken()
    for region in regions:
        each, entry = region.pages, entries.get(region.name)
        size = each.end - each.begin
        if not size or not pages.is_inside(each, own):
            taken.leave("small, or in no memory of their own", region)
        elif entry is None:
            taken.leave("the prefill engine has none of this name", region)
        elif (entry.dtype, tuple(entry.shape), entry.size) != (region.dtype, region.shape, region.size):
            taken.leave("another shape or type", region)
        elif entry.lead != region.address % mmap.PAGESIZE:
            taken.leave("they begin elsewhere in a page", region)
        elif not pages.are_equal(each.begin, file + entry.offset, size):
            taken.leave("other bytes", region)
        else:
            pages.replace_by_file(each, fd, entry.offset)
            taken.shared += size
    return taken
