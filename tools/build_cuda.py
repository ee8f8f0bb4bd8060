"""Compile csrc/cuda with nvcc: to check it for every architecture, or to make the library for the GPU at hand.

    python tools/build_cuda.py check [--all]    warnings are errors, the report is held to bounds
    python tools/build_cuda.py library OUT [--arch 90a]

Standard library only. Without nvcc `check` says so and succeeds: it is no part of the installation.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ATTENTION, CHANNEL = (ROOT / "csrc" / "cuda" / name for name in ("library.cu", "channel.cu"))
OPTIONS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"]
ARCHITECTURES = ("80", "90a", "100", "120")
FEW = (("Bf16", "Bf16", 128), ("Bf16", "Fp8", 128), ("Bf16", "Bf16", 256))
"""The kernels that are checked in little time: message, cache, head size. With `--all` all of instances.h are."""

REGISTERS, THREADS = 65536, 128
"""32-bit registers of a multiprocessor, and threads of a block (csrc/cuda/call.h)."""
SHARED = {"80": (164, 163), "90a": (228, 227), "100": (228, 227), "120": (100, 99)}
"""Shared memory by architecture, KiB: of a multiprocessor, and what one block may have. CUDA takes 1 KiB of every block
for itself. From the CUDA C++ programming guide, compute capabilities."""
STAGES = (4, 3, 2)


@dataclass(frozen=True)
class Kernel:
    """What the compiler reports of one kernel.

    Attributes:
        message, cache, head_size: its template's arguments.
        registers, spilled: of a thread; spilled counts bytes stored.
    """

    message: str
    cache: str
    head_size: int
    registers: int
    spilled: int

    @property
    def spill_bound(self) -> int:
        """Bytes that it may spill. Outputs and queries of a head of 256 take 192 registers of the 255 there are. Those
        of a head of 128 take 96 of the 168 with which three blocks fit (library.cu)."""
        return {256: 128, 128: 32}.get(self.head_size, 0)

    def shared_bytes(self, stages: int) -> int:
        """Return its shared memory, as SharedLayout in csrc/cuda/call.h has it."""
        row = self.head_size * (1 if self.cache == "Fp8" else 2) + 16
        load = 32 if row > 272 else 64
        outputs = 64 * 4 * (self.head_size + 8)
        return 4 * load * 8 + 64 * 8 + 16 + max(stages * 2 * load * row, outputs)

    def fit(self, arch: str) -> tuple[int, int]:
        """Return the stages and the blocks of a multiprocessor, chosen as adrenaline_prepare does (library.cu)."""
        whole, each = (size << 10 for size in SHARED[arch])
        # Registers are given to a warp in units of 256.
        by_registers = REGISTERS // ((self.registers * 32 + 255) // 256 * 256 * (THREADS // 32))
        for wanted in (3, 2, 1):
            for stages in (count for count in STAGES if self.shared_bytes(count) <= each):
                if (blocks := min(by_registers, whole // (self.shared_bytes(stages) + 1024))) >= wanted:
                    return stages, blocks
        return STAGES[-1], 0


def demangled(symbol: str) -> tuple[str, str, int] | None:
    """Return the template arguments in a kernel's symbol, None if it is another kernel."""
    found = re.search(r"attend_kernelINS0_(\d)(\w+?)E(?:S3_|NS0_(\d)(\w+?)E)Li(\d+)E", symbol)
    if found is None:
        return None
    message = found[2][: int(found[1])]
    return message, found[4][: int(found[3])] if found[3] else message, int(found[5])


def report(text: str) -> list[Kernel]:
    """Return the kernels of a report of ptxas -v."""
    kernels = []
    for part in re.split(r"Compiling entry function '", text)[1:]:
        numbers = re.search(r"(\d+) bytes spill stores.*?Used (\d+) registers", part, re.DOTALL)
        if (name := demangled(part.split("'")[0])) and numbers:
            kernels.append(Kernel(*name, registers=int(numbers[2]), spilled=int(numbers[1])))
    return sorted(kernels, key=lambda k: (k.message, k.cache, k.head_size))


def nvcc(*arguments: str | Path) -> str:
    """Run the compiler and return what it said. Ends the program if it fails."""
    done = subprocess.run(["nvcc", *OPTIONS, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def target(arch: str, code: str) -> list[str]:
    """Return the options for an architecture: `code` is "sm", or "compute" for PTX."""
    return ["-gencode", f"arch=compute_{arch},code={code}_{arch}"]


def check(all_kernels: bool) -> int:
    """Compile for every architecture, print what each kernel needs, and return how many need too much."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.h"
        names = " ".join(f"X({message}, {cache}, {head})" for message, cache, head in FEW)
        few.write_text(f"#define ADRENALINE_KERNELS(X) {names}\n")
        chosen = [] if all_kernels else ["-include", str(few)]
        for arch in ARCHITECTURES:
            started = time.monotonic()
            cubin = str(Path(folder) / "out.cubin")
            kernels = report(nvcc(*target(arch, "sm"), "-Xptxas", "-v", "-cubin", "-o", cubin, *chosen, ATTENTION))
            channel = nvcc(*target(arch, "sm"), "-Xptxas", "-v", "-cubin", "-o", cubin, CHANNEL)
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", channel)))
            took = time.monotonic() - started
            print(f"sm_{arch}: {len(kernels)} kernels of attention, and those of channels, in {took:.0f} s")
            bad += spilled > 0
            for kernel in kernels:
                stages, blocks = kernel.fit(arch)
                name = f"{kernel.message} over {kernel.cache}, head {kernel.head_size}"
                print(
                    f"  {name:<26} {kernel.registers:>3} registers, {kernel.spilled:>3} bytes spilled, "
                    f"{kernel.shared_bytes(stages) / 1024:6.1f} KiB in {stages} stages, {blocks} blocks"
                )
                bad += kernel.spilled > kernel.spill_bound or blocks < 1
            bad += len(kernels) != (16 if all_kernels else len(FEW))
    return bad


def visible_arch() -> str:
    """Return the architecture of the first GPU. Ends the program if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        sys.exit("there is no CUDA driver: name an architecture with --arch")
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in zip(numbers, (75, 76), strict=True):  # compute capability, major and minor
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if failed:
        sys.exit("the CUDA driver finds no GPU: name an architecture with --arch")
    return f"{numbers[0].value}{numbers[1].value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check")
    checks.add_argument("--all", action="store_true", help="all kernels, not only three")
    library = commands.add_parser("library")
    library.add_argument("out", type=Path)
    library.add_argument("--arch", help="80, 90a, ...; default: of the first GPU")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        if options.command == "check":
            print("csrc/cuda is not compiled: there is no nvcc")
            return
        sys.exit("there is no nvcc")
    if options.command == "check":
        if bad := check(options.all):
            sys.exit(f"{bad} kernels are missing, spill too much, or do not fit")
        return
    # PTX besides, for GPUs that come later.
    arch = options.arch or visible_arch()
    targets = [*target(arch, "sm"), *target(arch.rstrip("a"), "compute")]
    nvcc(*targets, "-shared", "-Xcompiler=-fPIC,-fvisibility=default", "-o", options.out, ATTENTION, CHANNEL)


if __name__ == "__main__":
    main()
