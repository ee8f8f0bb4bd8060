"""What test_shared_weights.py states, to be tried in a process of its own: it maps other pages over memory in use.

Run as a program it prints what went wrong in each case, as JSON: nothing, or a traceback.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import malloc, memory_file, pages
from vllm_adrenaline.weights import sharing
from vllm_adrenaline.weights.regions import Region, regions_of

PAGE = mmap.PAGESIZE
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


class Linear(torch.nn.Module):
    """A linear layer as vLLM leaves it: its weight is only in the closure of a function."""

    def __init__(self) -> None:
        super().__init__()
        packed = torch.randn(1500, 700)
        self.bias = torch.nn.Parameter(torch.randn(1500))
        self.multiply = lambda x: x @ packed.t()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(10000, 256, dtype=torch.bfloat16))
        self.tied = self.embedding
        self.layers = torch.nn.ModuleList([Linear(), Linear()])
        self.register_buffer("table", torch.randn(1024, 1024))


def made() -> tuple[Model, list[Region]]:
    """Return a model that is equal each time, and its regions."""
    torch.manual_seed(0)
    with malloc.own_mappings():
        model = Model()
    return model, regions_of(model, lambda owner: None)


def taken(regions: list[Region], moved: sharing.Moved) -> sharing.Taken:
    return sharing.take(regions, moved.fd, moved.size, moved.table)


def mapped() -> int:
    """Return how many bytes of weights this process has mapped."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if sharing.NAME in line:
            begin, end = (int(each, 16) for each in line.split()[0].split("-"))
            total += end - begin
    return total


def expect(wrong: type[Exception], call: Callable[[], Any], words: str) -> None:
    with pytest.raises(wrong, match=words):
        call()


@case
def every_weight_is_found_once_by_name() -> None:
    _, regions = made()
    names = [region.name for region in regions]
    layers = [f"layers.{number}.{name}" for number in range(2) for name in ("bias", "multiply.packed")]
    assert sorted(names) == sorted(["embedding", "table", *layers])
    embedding = next(region for region in regions if region.name == "embedding")
    assert (embedding.dtype, embedding.shape, embedding.size) == ("bfloat16", (10000, 256), 5120000)


@case
def moving_changes_no_bit_and_no_address() -> None:
    model, regions = made()
    other, _ = made()
    before = [region.address for region in regions]
    moved = sharing.move(regions)
    assert moved.shared > 15_000_000
    assert mapped() == moved.shared
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [region.address for region in regions_of(model, lambda owner: None)] == before
    x = torch.randn(3, 700)
    assert torch.equal(model.layers[1].multiply(x), other.layers[1].multiply(x))
    os.close(moved.fd)


@case
def equal_weights_are_shared_and_small_ones_are_not() -> None:
    model, regions = made()
    other, theirs = made()
    moved = sharing.move(theirs)
    found = taken(regions, moved)
    assert found.shared == moved.shared, found
    assert [name for each in found.private.values() for _, name in each] == ["layers.0.bias", "layers.1.bias"]
    assert mapped() >= 2 * moved.shared
    assert torch.equal(model.embedding, other.embedding)
    os.close(moved.fd)


@case
def what_is_written_afterwards_the_other_side_does_not_see() -> None:
    model, regions = made()
    other, theirs = made()
    moved = sharing.move(theirs)
    taken(regions, moved)
    os.close(moved.fd)
    before = model.embedding.clone()
    with torch.no_grad():
        other.embedding.zero_()
        model.table.fill_(3)
    assert torch.equal(model.embedding, before)
    assert (model.table == 3).all()
    assert not (other.table == 3).any()


@case
def one_other_byte_and_the_weight_stays_private() -> None:
    model, regions = made()
    _, theirs = made()
    with torch.no_grad():
        model.table.view(torch.uint8).view(-1)[100_001] ^= 1
    before = model.table.clone()
    moved = sharing.move(theirs)
    found = taken(regions, moved)
    assert [name for _, name in found.private["other bytes"]] == ["table"]
    assert 0 < found.shared < moved.shared
    assert torch.equal(model.table, before)
    os.close(moved.fd)


@case
def weights_that_begin_elsewhere_in_a_page_stay_private() -> None:
    data = os.urandom(malloc.OWN_MAPPING)
    regions = []
    for lead in (64, 128):
        begin = pages.map_pages(None, len(data) + PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        ctypes.memmove(begin + lead, data, len(data))
        regions.append(Region("w", "uint8", (len(data),), begin + lead, len(data), None))
    moved = sharing.move(regions[:1])
    found = taken(regions[1:], moved)
    assert found.shared == 0
    assert list(found.private) == ["they begin elsewhere in a page"]
    assert ctypes.string_at(regions[1].address, len(data)) == data
    os.close(moved.fd)


@case
def another_shape_type_or_name_stays_private() -> None:
    _, regions = made()
    _, theirs = made()
    moved = sharing.move(theirs)
    for change, why in [
        ({"shape": (256, 10000)}, "another shape or type"),
        ({"dtype": "float16"}, "another shape or type"),
        ({"name": "embedding2"}, "the prefill engine has none of this name"),
    ]:
        values = {name: getattr(regions[0], name) for name in Region.__dataclass_fields__} | change
        found = taken([Region(**values)], moved)
        assert (found.shared, list(found.private)) == (0, [why])
    os.close(moved.fd)


@case
def memory_of_a_file_is_left_alone() -> None:
    size = malloc.OWN_MAPPING
    fd = memory_file.create("theirs", size)
    begin = pages.map_pages(None, size, 3, mmap.MAP_SHARED, fd, 0)
    region = Region("w", "uint8", (size,), begin, size, None)
    moved = sharing.move([region])
    assert moved.shared == 0
    assert not taken([region], moved).shared
    os.close(moved.fd)


@case
def a_frozen_file_cannot_be_written_any_more() -> None:
    _, theirs = made()
    moved = sharing.move(theirs)
    for change in (
        lambda: os.pwrite(moved.fd, b"x", 0),
        lambda: pages.map_pages(None, PAGE, 3, mmap.MAP_SHARED, moved.fd, 0),
        lambda: os.ftruncate(moved.fd, 0),
    ):
        expect(OSError, change, "not permitted")
    os.close(moved.fd)


def exported(entries: list[Any] | bytes, size: int = 0, freeze: bool = True) -> sharing.Moved:
    """Return a memory file with pages of noise and this table."""
    table = entries if isinstance(entries, bytes) else msgspec.msgpack.encode(entries)
    fd = memory_file.create_unfrozen("hostile", 4 * PAGE + len(table))
    os.pwrite(fd, os.urandom(4 * PAGE), 0)
    os.pwrite(fd, table, 4 * PAGE)
    if freeze:
        memory_file.freeze(fd)
    return sharing.Moved(fd, size or 4 * PAGE + len(table), 4 * PAGE, 0)


@case
def a_hostile_or_malformed_file_is_refused() -> None:
    _, regions = made()
    before = mapped()
    good = ["embedding", "bfloat16", [10000, 256], 5120000, regions[0].address % PAGE, 0]
    for moved, words in [
        (exported([good], freeze=False), "can still be written"),
        (exported([good], size=99 * PAGE), "should have"),
        (exported([good]), "pages that are not in the file"),
        (exported([[*good[:5], 1]]), "pages that are not in the file"),
        (exported([[*good[:5], 1 << 49]]), "pages that are not in the file"),
        (exported([[*good[:5], -1]]), "cannot be read"),
        (exported([[*good[:4], 1 << 30, 0]]), "pages that are not in the file"),
        (exported([["x" * 2000, *good[1:]]]), "cannot be read"),
        (exported([[1, 2, 3]]), "cannot be read"),
        (exported(b"\xff" * 100), "cannot be read"),
        (exported(b"\x91" * 100_000), "cannot be read"),
    ]:
        expect(AdrenalineError, lambda moved=moved: taken(regions, moved), words)
        os.close(moved.fd)
    moved = exported([])
    for table in (-1, moved.size, moved.size + 1, 1 << 60):
        expect(AdrenalineError, lambda table=table: sharing.take(regions, moved.fd, moved.size, table), "no table")
    with Path(__file__).open() as file:
        size = os.fstat(file.fileno()).st_size
        expect(AdrenalineError, lambda: sharing.take(regions, file.fileno(), size, 0), "no memory file")
    assert mapped() == before


def packed(weight: torch.Tensor) -> torch.nn.Module:
    """Return a layer whose weight is packed as vLLM packs it."""
    from vllm import _custom_ops as ops

    model = torch.nn.Module()
    handler = ops.create_onednn_mm(weight.t(), 32)
    model.linear = lambda x: ops.onednn_mm(handler, x, None)
    return model


@case
def packed_weights_of_onednn_are_found_and_shared() -> None:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    from vllm_adrenaline.compat import weight_memory

    current_platform.import_kernels()
    real = ops.create_onednn_mm
    models, regions = [], []
    for _ in range(2):
        torch.manual_seed(1)
        with weight_memory.followed() as locate:
            models.append(packed(torch.randn(2560, 512)))
        regions.append(regions_of(models[-1], locate))
    assert ops.create_onednn_mm is real
    (region,) = regions[0]
    assert (region.name, region.dtype, region.shape) == ("linear.handler", "float32", (512, 2560))
    assert 0 <= region.size - 2560 * 512 * 4 < 2 * PAGE
    x = torch.randn(5, 512)
    before = models[1].linear(x)
    moved = sharing.move(regions[0])
    found = taken(regions[1], moved)
    assert found.shared == moved.shared > 2560 * 512 * 4 - 2 * PAGE, found
    assert torch.equal(models[0].linear(x), before)
    assert torch.equal(models[1].linear(x), before)
    os.close(moved.fd)


@case
def blocks_have_mappings_of_their_own() -> None:
    with malloc.own_mappings():
        before = pages.anonymous()
        tensor = torch.ones(1 << 20)
        found = list(malloc.blocks(pages.grown(before, pages.anonymous())))
    assert [(address, size >= tensor.nbytes) for address, size in found] == [(tensor.data_ptr(), True)]


def main() -> None:
    malloc.STAYS = malloc.OWN_MAPPING  # else what one case has freed is given to the next without a mapping
    results = {}
    for name, function in CASES.items():
        try:
            function()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
