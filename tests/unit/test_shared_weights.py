"""Weights that are moved into a memory file and mapped from there (the statements are in weights_cases.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import weights_cases
from vllm_adrenaline.system import cores, pages
from vllm_adrenaline.system.pages import Range


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    command = [sys.executable, "-m", weights_cases.__name__]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 0, ended.returncode
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", weights_cases.CASES)
def test_in_a_process_of_its_own(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


@pytest.mark.parametrize(
    ("before", "after", "new"),
    [
        ([], [Range(2, 5)], [Range(2, 5)]),
        ([Range(2, 5)], [Range(2, 5)], []),
        ([Range(2, 5)], [], []),
        ([Range(3, 5)], [Range(2, 9)], [Range(2, 3), Range(5, 9)]),
        ([Range(0, 3), Range(5, 6)], [Range(2, 5), Range(7, 9)], [Range(3, 5), Range(7, 9)]),
        ([Range(0, 1), Range(2, 3), Range(4, 5)], [Range(0, 6)], [Range(1, 2), Range(3, 4), Range(5, 6)]),
    ],
)
def test_what_grew(before: list[Range], after: list[Range], new: list[Range]) -> None:
    assert pages.grown(before, after) == new


@pytest.mark.parametrize(
    ("wanted", "inside"),
    [
        (Range(2, 5), True),
        (Range(2, 8), True),
        (Range(1, 5), False),
        (Range(2, 9), False),
        (Range(11, 12), True),
        (Range(9, 12), False),
        (Range(13, 14), False),
    ],
)
def test_what_is_inside_mappings_without_a_gap(wanted: Range, inside: bool) -> None:
    assert pages.is_inside(wanted, [Range(2, 5), Range(5, 8), Range(10, 13)]) == inside


@pytest.mark.parametrize(
    ("address", "size", "whole"),
    [(4096, 4096, (4096, 8192)), (4160, 9000, (8192, 12288)), (4160, 100, (8192, 8192)), (0, 4095, (0, 0))],
)
def test_whole_pages(address: int, size: int, whole: tuple[int, int]) -> None:
    assert pages.inner_pages(address, size) == whole


def test_numa_nodes_of_cores(tmp_path: Path) -> None:
    for node, listed in enumerate(("0-3\n", "4-7,12\n", "\n")):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(listed)
    assert cores.nodes([1, 2], tmp_path) == {"node0"}
    assert cores.nodes([3, 12], tmp_path) == {"node0", "node1"}
    assert cores.nodes([99], tmp_path) == set()
