"""How engines on one machine share its memory, on machines and in containers of other sizes than this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.engine.setup import PEERS_START_TOO
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch import engine_command
from vllm_adrenaline.launch.cluster import Cluster
from vllm_adrenaline.launch.memory import PROCESSES_BYTES, is_chosen, utilization
from vllm_adrenaline.system.memory import GIB, Memory, read

ENGINES = ["prefill", "decode"]


def there(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {40 * 2**20} kB\n"}
V1, V2 = "sys/fs/cgroup/memory/memory", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({}, Memory(64 * GIB, 40 * GIB)),
        ({f"{V2}.max": "max", f"{V2}.current": "5"}, Memory(64 * GIB, 40 * GIB)),
        ({f"{V2}.max": str(16 * GIB), f"{V2}.current": str(GIB)}, Memory(16 * GIB, 15 * GIB)),
        ({f"{V2}.max": str(50 * GIB), f"{V2}.current": str(GIB)}, Memory(50 * GIB, 40 * GIB)),
        ({f"{V2}.max": str(99 * GIB), f"{V2}.current": str(GIB)}, Memory(64 * GIB, 40 * GIB)),
        ({f"{V1}.limit_in_bytes": str(8 * GIB), f"{V1}.usage_in_bytes": "0"}, Memory(8 * GIB, 8 * GIB)),
        ({f"{V1}.limit_in_bytes": str(2**63 - 4096)}, Memory(64 * GIB, 40 * GIB)),
    ],
)
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, group: dict[str, str], expected: Memory) -> None:
    assert read(there(tmp_path, MEMINFO | group)) == expected


@given(total=st.integers(2 * GIB, 4096 * GIB), used=st.floats(0, 1), engines=st.integers(1, 8))
def test_parts_fit_together_or_are_refused(total: int, used: float, engines: int) -> None:
    memory = Memory(total, int(total * (1 - used)))
    try:
        part = utilization(memory, engines)
    except AdrenalineError:
        assert memory.available < engines * (PROCESSES_BYTES + 1.1 * GIB) + 0.1 * total
        return
    assert engines * (part * total + PROCESSES_BYTES) <= memory.available


@pytest.mark.parametrize(
    ("args", "env", "chosen"),
    [
        ([], {}, False),
        (["--max-model-len", "100"], {}, False),
        (["--gpu-memory-utilization", "0.3"], {}, True),
        (["--gpu_memory_utilization=0.3"], {}, True),
        (["--kv-cache-memory-bytes", "100"], {}, True),
        (["--num-gpu-blocks-override", "100"], {}, False),  # vLLM wants its share all the same
        ([], {"VLLM_CPU_KVCACHE_SPACE": "4"}, True),
    ],
)
def test_vllms_own_flags_are_in_charge(args: list[str], env: dict[str, str], chosen: bool) -> None:
    assert is_chosen(args, env) == chosen


def commands_of(monkeypatch: pytest.MonkeyPatch, model: Path, **options: list[str]) -> dict[str, list[str]]:
    """Return how a cluster's engines would be started on a machine with 24 GiB, all free."""
    monkeypatch.setattr("vllm_adrenaline.launch.cluster.read", lambda: Memory(24 * GIB, 23 * GIB))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    made: dict[str, list[str]] = {}
    together: dict[str, bool] = {}

    class Nothing:
        def __init__(self, specs: list[engine_command.EngineCommand], **_: object) -> None:
            made.update({spec.name: spec.argv for spec in specs})
            together.update({spec.name: PEERS_START_TOO in spec.env for spec in specs})

        def start(self) -> None:
            raise AdrenalineError("far enough")

        def stop(self) -> None: ...

        def end(self, name: str, more_s: float) -> None: ...

    monkeypatch.setattr("vllm_adrenaline.launch.cluster.Supervisor", Nothing)
    with pytest.raises(AdrenalineError, match="far enough"), Cluster(model, **options):  # type: ignore[arg-type]
        pass
    assert together == {"prefill": False, "decode": True}, "none waits for the other before it loads its model"
    return made


def test_both_engines_of_a_cluster_fit_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = commands_of(monkeypatch, tmp_path)
    for command in made.values():
        assert float(command[command.index("--gpu-memory-utilization") + 1]) == pytest.approx(0.356, abs=0.002)
    assert "may take 8.5 GiB by the prefill engine and 8.5 GiB by the decode engine" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--tensor-parallel-size", "2"], ["-tp=2"], ["--tensor_parallel_size=2"]])
def test_the_workers_of_an_engine_divide_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    for command in commands_of(monkeypatch, tmp_path, args=flags).values():
        assert float(command[command.index("--gpu-memory-utilization") + 1]) == pytest.approx(0.178, abs=0.002)


def test_on_one_device_the_prefill_engine_has_all_memory_but_the_decode_engines_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB)
    shape = {"num_attention_heads": 8, "num_hidden_layers": 16, "hidden_size": 512, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 1 << 20}))
    made = commands_of(monkeypatch, tmp_path, one_device=True, args=["--max-model-len", "65536"])  # type: ignore[arg-type]
    shares = {name: float(command[command.index("--gpu-memory-utilization") + 1]) for name, command in made.items()}
    assert shares["decode"] == pytest.approx((1.2 + 2 + 1) / 24, abs=0.002), "weights, processes, a longest request"
    assert sum(shares.values()) == pytest.approx(2 * 0.355, abs=0.002)
    assert all(command[command.index("--adrenaline-pool") + 1] == "mapped" for command in made.values())


@pytest.mark.parametrize(
    "options",
    [{"args": ["--gpu-memory-utilization", "0.2"]}, {"decode_args": ["--kv-cache-memory-bytes", "1000"]}],
)
def test_a_choice_of_the_user_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, list[str]]
) -> None:
    made = commands_of(monkeypatch, tmp_path, **options)
    ours = {name: "0.355" in command for name, command in made.items()}
    assert ours == {"prefill": "decode_args" in options, "decode": False}
