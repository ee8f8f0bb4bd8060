"""The kernels of csrc/cuda on the emulator: compiled with g++, called with tensors of the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch

from vllm_adrenaline.native import cuda

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
KERNELS = [
    ("Bf16", "Bf16", 128),
    ("Bf16", "Bf16", 256),
    ("Bf16", "Fp8", 128),
    ("Half", "Half", 96),
    ("Half", "Fp8", 64),
]
"""What CI emulates: message, cache, head size. Every head size is among them, and every type."""
ALL_KERNELS = [
    (message, cache, head)
    for message, cache in (("Bf16", "Bf16"), ("Bf16", "Fp8"), ("Half", "Half"), ("Half", "Fp8"))
    for head in cuda.HEAD_SIZES
]
ASAN = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def kernels_option(kernels: list[tuple[str, str, int]]) -> str:
    """Return the option that has only these kernels compiled."""
    return "-DADRENALINE_KERNELS(X)=" + " ".join(f"X({m},{c},{head})" for m, c, head in kernels)


def build(folder: Path, source: str, options: list[str], csrc: Path = ROOT / "csrc") -> Path:
    """Compile a source of csrc/tests, unless `folder` has what the same sources, options and compiler made."""
    command = ["g++", *FLAGS, *options, str(csrc / "tests" / source)]
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version}{command}".encode())
    files = [*sorted((csrc / "cuda").rglob("*.h")), csrc / "tests" / source, csrc / "check.h", csrc / "stamp.h"]
    for path in files:
        digest.update(f"{path.name}{path.read_text()}".encode())
    name = Path(source).stem
    wanted = folder / f"{name}-{digest.hexdigest()[:16]}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.exists():
            made = folder / f"unfinished-{name}"
            done = subprocess.run([*command, "-o", str(made)], stderr=subprocess.PIPE, text=True)
            assert done.returncode == 0, done.stderr
            made.rename(wanted)
    return wanted


def build_library(
    folder: Path, kernels: list[tuple[str, str, int]], options: list[str], csrc: Path = ROOT / "csrc"
) -> Path:
    """Compile the library of emulated kernels."""
    options = [*options, "-shared", "-fPIC", kernels_option(kernels)]
    return build(folder, "emulated_attention.cpp", options, csrc)


def kept_programs(config: pytest.Config, factory: pytest.TempPathFactory) -> Path:
    """Return the folder where compiled programs are kept for later runs."""
    cache: pytest.Cache | None = getattr(config, "cache", None)  # none with -p no:cacheprovider
    return cache.mkdir("cuda-programs") if cache else factory.mktemp("cuda-programs")


class Emulator:
    """The library of csrc/tests/emulated_attention.cpp."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        signatures = {
            "adrenaline_call_bytes": (c_size_t, []),
            "adrenaline_shared_bytes": (c_int, [POINTER(cuda.Kind), c_int]),
            "adrenaline_partial_floats": (c_int64, [c_int, c_int]),
            "adrenaline_plan_on_host": (None, [POINTER(cuda.Call), c_void_p]),
            "adrenaline_parts": (c_int, [POINTER(cuda.Call), c_void_p, c_int, c_int, c_void_p, c_int]),
            "adrenaline_emulate_plan": (c_int, [POINTER(cuda.Call), c_void_p, c_uint64, c_char_p, c_size_t]),
            "adrenaline_emulate_attend": (
                c_int,
                [POINTER(cuda.Call), POINTER(cuda.Kind), c_int, c_uint64, c_char_p, c_size_t],
            ),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        assert self._lib.adrenaline_call_bytes() == ctypes.sizeof(cuda.Call)

    def workspace(self, head: int, rows: int, blocks: int) -> cuda.Workspace:
        """Return working memory whose floats are not numbers, and whose plan is nonsense."""
        floats = self._lib.adrenaline_partial_floats(blocks, head)
        return cuda.Workspace(
            first_tile=torch.full((rows + 1,), -1, dtype=torch.int32),
            partials=torch.full((floats,), torch.nan),
            counters=torch.zeros(blocks, dtype=torch.int32),
        )

    def shared_bytes(self, kind: cuda.Kind, stages: int) -> int:
        return int(self._lib.adrenaline_shared_bytes(kind, stages))

    def plan(self, call: cuda.Call, seed: int = 0) -> None:
        said = ctypes.create_string_buffer(400)
        self._lib.adrenaline_emulate_plan(call, call.first_tile, seed, said, len(said))
        assert not said.value, said.value.decode()

    def plan_on_host(self, call: cuda.Call, first_tile: torch.Tensor) -> None:
        self._lib.adrenaline_plan_on_host(call, first_tile.data_ptr())

    def attend(self, call: cuda.Call, kind: cuda.Kind, blocks: int, seed: int) -> str:
        """Return what the emulator found wrong; empty if nothing."""
        said = ctypes.create_string_buffer(400)
        self._lib.adrenaline_emulate_attend(call, kind, blocks, seed, said, len(said))
        return said.value.decode()

    def parts(self, call: cuda.Call, block: int, blocks: int) -> list[tuple[int, ...]]:
        """Return the parts that a block takes: row, row block, KV head, tile, tiles, parts, first block."""
        most = 1 << 14
        found = (c_int32 * (7 * most))()
        count = self._lib.adrenaline_parts(call, call.first_tile, block, blocks, found, most)
        assert count <= most
        return [tuple(found[7 * i : 7 * i + 7]) for i in range(count)]
