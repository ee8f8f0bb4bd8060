"""What an engine needs of its machine: too little is said at the start, in a sentence that says what to do."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.test_launch_memory import MEMINFO, there
from vllm_adrenaline.config import Options
from vllm_adrenaline.engine import resources, setup
from vllm_adrenaline.engine.resources import MIB, Found, Wanted, refusals, warnings
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.memory import GIB, Memory, of_worker, read

WANTED = Wanted(weights=2 * GIB, kv=4 * GIB, share=0.0, moves_priorities=True)
FOUND = Found(Memory(64 * GIB, 7 * GIB), shm=GIB, files=1024, disks={"/tmp": GIB}, may_raise=True)


def test_a_machine_that_has_enough_is_not_complained_of() -> None:
    assert refusals(WANTED, FOUND) == []
    assert warnings(WANTED, FOUND) == []
    assert refusals(WANTED, replace(FOUND, shm=None, files=-1)) == [], "there is no /dev/shm, and no limit"
    assert refusals(replace(WANTED, share=0.3), replace(FOUND, of_worker=16 * GIB)) == [], "it is of one NUMA node"


@pytest.mark.parametrize(
    ("wanted", "found", "said"),
    [
        ({"kv": 6 * GIB}, {}, "KV cache takes 6.0 GiB of memory and the weights take 2.0 GiB, and 7.0 GiB .*--memory"),
        ({"share": 0.5}, {}, "utilization 0.5 is 32.0 of 64.0 GiB of memory, and 7.0 GiB are available"),
        ({"share": 0.06, "workers": 2}, {}, "0.06 for each of 2 workers is 7.7 of 64.0 GiB of memory, and 7.0 GiB"),
        ({}, {"shm": 64 * MIB}, "/dev/shm has 64 MiB free, .* 240 MiB: .*--shm-size"),
        ({}, {"files": 256}, "may open 256 files .*ulimit -n 1024"),
        ({}, {"disks": {"/tmp": MIB}}, "/tmp has 1 MiB free, .*TMPDIR"),
        ({}, {"disks": {"/tmp": None}}, "/tmp cannot be written to"),
    ],
)
def test_whatever_is_too_small_is_named_with_what_to_do(
    wanted: dict[str, Any], found: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "wanted", lambda *_: replace(WANTED, **wanted))
    monkeypatch.setattr(resources, "read", lambda: replace(FOUND, **found))
    with pytest.raises(AdrenalineError, match=said):
        setup.check_resources(None, None, print)  # type: ignore[arg-type]


def test_all_that_is_too_small_is_said_at_once() -> None:
    assert len(refusals(WANTED, Found(Memory(GIB, 0), 0, 10, {"/tmp": 0, "/c": None}, may_raise=False))) == 5


def test_without_the_right_to_move_priorities_an_objective_is_warned_of_and_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(resources, "wanted", lambda *_: WANTED)
    monkeypatch.setattr(resources, "read", lambda: replace(FOUND, may_raise=False))
    setup.check_resources(None, None, said.append)  # type: ignore[arg-type]
    assert len(said) == 1
    assert "CAP_SYS_NICE" in said[0]
    assert warnings(replace(WANTED, moves_priorities=False), replace(FOUND, may_raise=False)) == []


@pytest.mark.parametrize(
    ("cache", "kv", "share", "workers"),
    [
        ({"kv_cache_memory_bytes": 100}, 200, 0.0, 2),
        ({"num_gpu_blocks_override": 10}, 2 * 10 * 128 * 4 * 2 * 32 * 2, 0.9, 1),
        ({}, 0, 0.9, 2),
    ],
)
def test_what_is_wanted_is_what_vllm_will_take(
    tmp_path: Path, cache: dict[str, int], kv: int, share: float, workers: int
) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(70))
    nothing = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None}
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(**nothing | cache, block_size=128, gpu_memory_utilization=0.9),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
        model_config=SimpleNamespace(
            model=str(tmp_path),
            dtype=torch.bfloat16,
            get_total_num_kv_heads=lambda: 2,
            get_head_size=lambda: 32,
            get_num_layers=lambda _: 4,
        ),
    )
    found = resources.wanted(Options(role="prefill", tpot_slo_ms=5), config)
    assert found == Wanted(70, kv, share, moves_priorities=True, workers=workers)
    assert not resources.wanted(Options(role="decode", tpot_slo_ms=5), config).moves_priorities


V1, V2 = "sys/fs/cgroup/memory/slurm", "sys/fs/cgroup/system.slice"


@pytest.mark.parametrize(
    "groups",
    [
        {
            "proc/self/cgroup": "0::/system.slice/me",
            f"{V2}/memory.max": str(9 * GIB),
            f"{V2}/memory.current": str(5 * GIB),
            f"{V2}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            f"{V2}/me/memory.max": "max",
        },
        {
            "proc/self/cgroup": "9:cpu:/x\n4:memory:/slurm/me\n0::/",
            f"{V1}/memory.limit_in_bytes": str(9 * GIB),
            f"{V1}/memory.usage_in_bytes": str(5 * GIB),
            f"{V1}/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
            f"{V1}/me/memory.limit_in_bytes": str(2**63 - 4096),
        },
    ],
    ids=["v2", "v1"],
)
def test_a_control_group_inside_of_the_container_limits_what_is_available(
    tmp_path: Path, groups: dict[str, str]
) -> None:
    assert read(there(tmp_path, MEMINFO | groups)) == Memory(64 * GIB, 5 * GIB)


def test_a_worker_takes_its_share_of_a_numa_node_or_of_the_container(tmp_path: Path) -> None:
    sizes = {"node0": 32 * 2**20, "node1": 30 * 2**20, "node2": 0}  # kB; a node without memory has processors only
    node = "sys/devices/system/node"
    root = there(
        tmp_path,
        {f"{node}/{n}/meminfo": f"Node 0 MemTotal: {kb} kB\nNode 0 MemFree: 1 kB\n" for n, kb in sizes.items()},
    )
    assert of_worker(Memory(64 * GIB, GIB), root) == 30 * GIB
    assert of_worker(Memory(8 * GIB, GIB), root) == 8 * GIB
    assert of_worker(Memory(8 * GIB, GIB), tmp_path / "nothing") == 8 * GIB


def test_this_machine_is_read() -> None:
    found = resources.read()
    assert 0 < found.of_worker <= found.memory.total
    assert 0 < found.memory.available <= found.memory.total
    assert found.files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert all(found.disks.values())


READ = "from vllm_adrenaline.engine import resources as r; f = r.read(); print(f.files, f.shm, *f.disks.values())"


def read_in(command: list[str]) -> list[str]:
    """Return what a process that is started by this command reads of its machine; skip where it cannot be."""
    done = subprocess.run([*command, sys.executable, "-c", READ], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} is not possible here: {done.stderr.strip()[-100:]}")
    return done.stdout.split()


def test_a_limit_of_open_files_is_seen() -> None:
    files = int(read_in(["bash", "-c", 'ulimit -n 200; exec "$@"', "-"])[0])
    assert files == 200
    assert "may open 200 files" in refusals(WANTED, replace(FOUND, files=files))[0]


def test_a_small_dev_shm_and_a_small_disk_are_seen(tmp_path: Path) -> None:
    mounts = (
        f"mount -t tmpfs -o size=64m none /dev/shm && mount -t tmpfs -o size=1m none {tmp_path} && "
        f'TMPDIR={tmp_path} exec "$@"'
    )
    _, shm, disk, _ = read_in(["unshare", "--mount", "bash", "-c", mounts, "-"])
    found = replace(FOUND, shm=int(shm), disks={str(tmp_path): int(disk)})
    assert [said.partition(",")[0] for said in refusals(WANTED, found)] == [
        "/dev/shm has 64 MiB free",
        f"{tmp_path} has 1 MiB free",
    ]


def test_a_folder_of_a_read_only_file_system_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resources.free_bytes(tmp_path) or 0) > 0
    monkeypatch.setattr(resources.os, "access", lambda *_: False)  # as the system says it to root as well
    assert resources.free_bytes(tmp_path / "not there yet") is None
