"""The memory of a model's weights, region by region, each with a name that is the same in every engine."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_adrenaline.system import pages
from vllm_adrenaline.system.malloc import OWN_MAPPING
from vllm_adrenaline.system.pages import Range, inner_pages

DEEPEST = 4
"""How deep closures and lists are followed from a module's attributes."""


@dataclass(frozen=True)
class Region:
    """Memory that holds a weight.

    Attributes:
        name: where in the model it was found, as "layers.0.mlp.down_proj.weight".
        dtype: torch's name of it, as "bfloat16".
        shape: of the weight, before it was packed.
        address, size: of the memory, in bytes.
        owner: what the memory belongs to: it stays as long as this is referred to.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    address: int
    size: int
    owner: Any

    @property
    def pages(self) -> Range:
        """The pages that hold nothing else; an empty range for small memory, which lies in a heap with other things."""
        return inner_pages(self.address, self.size if self.size >= OWN_MAPPING else 0)


Locate = Callable[[Any], tuple[tuple[int, ...], torch.dtype, int, int] | None]
"""Returns the shape, dtype, address and bytes of a weight that an object owns which is no tensor; None for the rest."""


def regions_of(model: torch.nn.Module, locate: Locate) -> list[Region]:
    """Return the regions of a loaded model, each once, in the order of its modules.

    They are its parameters, its buffers, and what its modules keep beside them: packed weights are often only in the
    closure of the function that multiplies by them.
    """
    found: dict[int, Region] = {}
    for prefix, module in model.named_modules():
        attributes = dict(vars(module))
        attributes |= dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, value in attributes.items():
            for path, each in _weights_in(value, f"{prefix}.{name}" if prefix else name, DEEPEST):
                region = _tensor(path, each) if isinstance(each, torch.Tensor) else _other(path, each, locate)
                if region is not None:
                    found.setdefault(region.address, region)
    return list(found.values())


def lie_in_huge_pages(regions: Sequence[Region]) -> bool:
    """Whether more than half of the weights lie in huge pages."""
    huge = pages.in_huge_pages([region.pages for region in regions])
    return huge > sum(region.pages.end - region.pages.begin for region in regions) / 2


def _weights_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield what may own memory in an attribute of a module, with where it was found."""
    if isinstance(value, types.FunctionType):
        named = _closure(value)
        named += [(name, default) for name, default in (value.__kwdefaults__ or {}).items()]
        named += [(f"default{number}", default) for number, default in enumerate(value.__defaults__ or ())]
    elif isinstance(value, list | tuple):
        named = [(str(number), each) for number, each in enumerate(value)]
    elif isinstance(value, torch.nn.Module):
        return
    else:
        yield path, value
        return
    if depth:
        for name, each in named:
            yield from _weights_in(each, f"{path}.{name}", depth - 1)


def _closure(function: types.FunctionType) -> list[tuple[str, Any]]:
    named = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            named.append((name, cell.cell_contents))
    return named


def _tensor(path: str, tensor: torch.Tensor) -> Region | None:
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Region(path, dtype, tuple(tensor.shape), storage.data_ptr(), storage.nbytes(), storage)


def _other(path: str, owner: Any, locate: Locate) -> Region | None:
    if (found := locate(owner)) is None:
        return None
    shape, dtype, address, size = found
    return Region(path, str(dtype).removeprefix("torch."), shape, address, size, owner)
