"""The CUDA kernel, run on the emulator: what it appends, bit for bit, and what it attends, against double precision.

Its source is the one that nvcc compiles, and a GPU does the same (docs/gpu-status.md).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit import cuda_cases
from tests.unit.cuda_cases import Case
from tests.unit.cuda_emulator import ALL_KERNELS, ASAN, KERNELS, ROOT, Emulator, build_library, kept_programs
from vllm_adrenaline.native import cuda


class Fault(NamedTuple):
    """A fault: the file, what stands there, what stands there instead, and what is seen then."""

    file: str
    there: str
    instead: str
    seen: str


FAULTS = {
    "no barrier before places are read": Fault("attend.h", "device::barrier();  // places", "//", "shared memory"),
    "no barrier before stages are read": Fault("attend.h", "device::barrier();  // this load", "//", "shared memory"),
    "no barrier before stages are outputs": Fault("attend.h", "device::barrier();  // the stages", "//", "no barrier"),
    "no barrier before outputs are merged": Fault("attend.h", "device::barrier();  // outputs", "//", "no barrier"),
    "a stage is not waited for": Fault("attend.h", "copy_wait(stages - 2)", "copy_wait(stages - 1)", "waited for"),
    "a stage is loaded while it is read": Fault("attend.h", "free = stage;", "free = (stage + 1) % stages;", "shared"),
    "no fence before the merge": Fault("merge.h", "device::fence();  // releases", "//", "no fence before its atomic"),
    "no fence after the atomic": Fault("merge.h", "device::fence();  // acquires", "//", "no fence after the atomic"),
    "no barrier before the fence": Fault("merge.h", "device::barrier();  // the whole part", "//", "made no fence"),
    "some miss a barrier": Fault("merge.h", "part.parts > 1 && is_last()", "lane_index() < 9 && is_last()", "barrier"),
    "new tokens are read from the cache": Fault("tiles.h", "token) >= 0)", "token) >= 1 << 30)", "other"),
    "every row block appends": Fault("tiles.h", "if (span.part.row_block != 0) return;", "", "written twice"),
    "keys in another order": Fault("fragments.h", "token + lane / 16 * 8", "token + lane / 8 % 2 * 8", "wrong by"),
    "values not transposed": Fault("fragments.h", "matrices_transposed(four", "matrices(four", "wrong by"),
    "a maximum of half a row": Fault(
        "softmax.h", "greatest[half] = fmaxf(x, device::shuffle_xor(x, 2));", "greatest[half] = x;", "wrong by"
    ),
    "a token less": Fault("softmax.h", "position <= last[half] &&", "position < last[half] &&", "wrong by"),
    "a window one too wide": Fault(
        "softmax.h", "position > last[half] - window", "position >= last[half] - window", "wrong by"
    ),
    "no sinks": Fault("merge.h", "+ rescale(sink, maximum)", "", "wrong by"),
    "parts are merged as if alike": Fault(
        "merge.h", "theirs = rescale(sums.first, greatest)", "theirs = 1", "wrong by"
    ),
}
IN_CI = ("a stage is not waited for", "no fence before the merge", "a token less")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sizes are small: threads of torch would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kept(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept_programs(pytestconfig, tmp_path_factory)


@pytest.fixture(scope="module")
def emulator(kept: Path) -> Emulator:
    return Emulator(build_library(kept, KERNELS, ["-O1"]))


def steps(kernels: list[tuple[str, str, int]], longest: int) -> st.SearchStrategy[Case]:
    def row(queries: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(queries, queries + longest), st.just(queries))

    edges = st.sampled_from([(0, 0), (1, 1), (16, 1), (17, 1), (64, 1), (65, 1), (128, 2), (129, 3)])
    fp8_scales = st.tuples(st.sampled_from([1.0, 0.05]), st.sampled_from([1.0, 0.3]))
    free = st.builds(
        Case,
        kernel=st.sampled_from(kernels),
        rows=st.lists(edges | st.sampled_from([1, 1, 2, 5]).flatmap(row), min_size=1, max_size=5).map(tuple),
        kv_heads=st.integers(1, 2),
        group=st.integers(1, 16),
        block_size=st.sampled_from([16, 32, 48, 64, 128]),
        is_hnd=st.booleans(),
        received=st.frozensets(st.integers(0, 4), max_size=2),
        padding=st.integers(1, 3),
        window=st.just(0) | st.integers(1, 150),
        soft_cap=st.sampled_from([0.0, 0.0, 4.0]),
        has_sinks=st.booleans(),
        scales=fp8_scales,
        flat=st.booleans(),
        moves_output=st.booleans(),
        grid=st.integers(1, 9),
        stages=st.integers(2, 4),
        seed=st.integers(0, 1000),
    )
    return free.map(lambda case: case if case.kernel[1] == "Fp8" else replace(case, scales=(1.0, 1.0)))


@pytest.mark.parametrize("number", range(len(KERNELS) + 3))
def test_steps_with_everything_in_them(number: int, emulator: Emulator) -> None:
    assert cuda_cases.run(emulator, cuda_cases.some_cases(KERNELS)[number]) == ""


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(steps(KERNELS, longest=150))
def test_any_step_is_appended_and_attended(emulator: Emulator, case: Case) -> None:
    assert cuda_cases.run(emulator, case) == ""


@pytest.mark.extended
def test_any_step_with_any_kernel(kept: Path) -> None:
    emulated = Emulator(build_library(kept, ALL_KERNELS, ["-O2"]))

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(steps(ALL_KERNELS, longest=700))
    def holds(case: Case) -> None:
        assert cuda_cases.run(emulated, case) == ""

    holds()


@pytest.mark.parametrize("grid", [1, 4, 11])
def test_the_order_of_blocks_changes_no_bit(grid: int, emulator: Emulator) -> None:
    def out(seed: int) -> torch.Tensor:
        made = cuda_cases.make(Case(rows=((500, 1), (70, 2)), has_sinks=True))
        work = emulator.workspace(128, len(made.step["seq_lens"]), grid)
        call = cuda.call_of(made.step, made.layer, work, 2)
        emulator.plan(call)
        assert emulator.attend(call, cuda.kind_of(made.step["q"], made.layer.keys), grid, seed) == ""
        return made.step["out"].view(torch.int16)

    assert all(torch.equal(out(0), out(seed)) for seed in range(1, 4))


def run_with_asan(kept: Path, what: str) -> subprocess.CompletedProcess[str]:
    kernels = [KERNELS[0], KERNELS[-1]]
    library = build_library(kept, kernels, ASAN)
    command = ["g++", "-print-file-name=libasan.so"]
    asan = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    names = [f"{message},{cache},{head}" for message, cache, head in kernels]
    return subprocess.run(
        [sys.executable, "-m", "tests.unit.cuda_cases", str(library), what, *names],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_nothing_is_touched_that_should_not_be(kept: Path) -> None:
    done = run_with_asan(kept, "some")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_a_read_beyond_the_cache_would_be_seen(kept: Path) -> None:
    done = run_with_asan(kept, "beyond")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in IN_CI else pytest.mark.extended) for f in FAULTS])
def test_a_fault_in_the_kernel_would_be_seen(fault: str, tmp_path: Path) -> None:
    planted = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / planted.file
    text = source.read_text()
    assert text.count(planted.there) == 1, "the source has changed: plant the fault anew"
    source.write_text(text.replace(planted.there, planted.instead))
    kernel = KERNELS[0]
    emulated = Emulator(build_library(tmp_path, [kernel], ["-O1"], tmp_path / "csrc"))
    case = Case(kernel=kernel, rows=((500, 5), (64, 1), (2, 1)), group=16, kv_heads=1, grid=4)
    found = []
    for window, has_sinks in ((0, True), (40, False)):
        try:
            found.append(cuda_cases.run(emulated, replace(case, window=window, has_sinks=has_sinks)))
        except (AssertionError, IndexError) as error:
            found.append(str(error))
    assert any(planted.seen in each for each in found), found


def test_tensors_that_the_kernel_cannot_read_are_refused() -> None:
    made = cuda_cases.make(Case())
    work = cuda.Workspace(torch.zeros(4, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    for name, bad in (
        ("q", made.step["q"].transpose(1, 2)),
        ("k", torch.zeros(4 * 256, dtype=torch.bfloat16)[4:772].view(3, 2, 128)),
        ("seq_lens", made.step["seq_lens"].long()),
    ):
        with pytest.raises(ValueError, match=r"contiguous|16 bytes|types"):
            cuda.call_of({**made.step, name: bad}, made.layer, work, 2)
    with pytest.raises(ValueError, match="stages"):
        cuda.call_of(made.step, made.layer, work, 5)
    with pytest.raises(ValueError, match="no kernel"):
        cuda.kind_of(made.step["q"].float(), made.layer.keys)
