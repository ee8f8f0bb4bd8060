"""The set-up of engines on CUDA: what is refused, and which of vLLM's classes are taken. It needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import platforms
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.unit.test_control import IDENTITY
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.engine import cuda, resources, setup
from vllm_adrenaline.engine.identity import CUDA_LAYOUT, identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native import cuda_library

CUDA = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
ROCM = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="rocm")


def options_of(role: str, **values: Any) -> Options:
    """Return options with which an engine starts on CUDA, but for `values`."""
    fixed = {"offload_ratio": "0.5"} if role == "decode" else {}
    return Options.parse({"role": role, "experimental_cuda": True} | fixed | values)


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineArgs:
    """An engine's arguments where vLLM runs on CUDA, and our library is there."""
    made = EngineArgs(model=str(tmp_path))
    library = tmp_path / "libadrenaline_cuda.so"
    library.touch()
    monkeypatch.setattr(platforms, "current_platform", CUDA)
    environment = {"HOME": str(tmp_path), cuda_library.PATH: str(library), cuda.MPS_FOLDER: str(tmp_path / "mps")}
    monkeypatch.setattr(os, "environ", environment)
    return made


@pytest.mark.parametrize(("role", "name"), [("prefill", "GpuPrefillWorker"), ("decode", "GpuDecodeWorker")])
def test_both_roles_get_workers_for_a_gpu(args: EngineArgs, role: str, name: str) -> None:
    setup.apply(args, options_of(role))
    worker = resolve_obj_by_qualname(args.worker_cls)
    assert worker.__name__ == name
    assert issubclass(worker, Worker)
    assert not issubclass(worker, CPUWorker)
    assert args.kv_transfer_config.kv_buffer_device == "cuda"
    assert (args.async_scheduling, args.block_size) == (False, 16)
    executor = args.distributed_executor_backend
    assert executor == ("mp" if role == "decode" else "vllm_adrenaline.prefill.executor.PrefillExecutor")


def test_what_the_user_says_of_blocks_and_scheduling_stays(args: EngineArgs) -> None:
    args.block_size, args.async_scheduling = 32, True
    setup.apply(args, options_of("decode"))
    assert (args.block_size, args.async_scheduling) == (32, True), "asynchronous scheduling is refused afterwards"


def test_without_the_flag_cuda_is_refused_with_what_has_run(args: EngineArgs) -> None:
    with pytest.raises(AdrenalineError, match=r"no engine of it has run on a GPU.*gpu-status\.md.*experimental-cuda"):
        setup.apply(args, options_of("decode", experimental_cuda=False))


@pytest.mark.parametrize("flag", [False, True])
def test_what_is_neither_cpu_nor_cuda_is_refused(flag: bool) -> None:
    with pytest.raises(AdrenalineError, match=r"runs on rocm$"):
        cuda.check_platform(ROCM, options_of("decode", experimental_cuda=flag))


def test_the_flag_is_refused_on_cpu(tmp_path: Path) -> None:
    with pytest.raises(AdrenalineError, match="experimental-cuda is for vLLM on CUDA"):
        setup.apply(EngineArgs(model=str(tmp_path)), options_of("decode"))


@pytest.mark.parametrize(
    ("role", "values", "said"),
    [
        (
            "decode",
            {"offload_ratio": "auto"},
            "--adrenaline-offload-ratio auto without .*a fixed ratio, or --adrenaline-profile",
        ),
        ("decode", {"pool": "mapped"}, "--adrenaline-pool mapped"),
        ("prefill", {"pool": "both"}, "--adrenaline-pool both"),
        ("prefill", {"share_weights": "auto"}, "--adrenaline-share-weights auto"),
        ("prefill", {"elastic": "prompts"}, "--adrenaline-elastic prompts"),
        ("prefill", {"ttft_slo_ms": 9}, "an objective of a prefill engine"),
        ("prefill", {"tpot_slo_ms": 9}, "an objective of a prefill engine"),
        ("prefill", {"executor_threads": 2}, "--adrenaline-executor-threads"),
        ("decode", {"interface": "lo"}, "--adrenaline-interface"),
    ],
)
def test_what_does_not_exist_on_cuda_is_refused_by_name(
    args: EngineArgs, role: str, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdrenalineError, match=f"not on CUDA yet: {said}"):
        setup.apply(args, options_of(role, **values))


def test_all_that_is_refused_is_said_at_once(args: EngineArgs) -> None:
    args.enable_sleep_mode = True
    with pytest.raises(AdrenalineError, match=r"pool mapped .*; --adrenaline-share-weights on .*; --enable-sleep-mode"):
        setup.apply(args, options_of("decode", pool="mapped", share_weights="on"))


def test_load_aware_placement_takes_a_profile_that_is_given(args: EngineArgs) -> None:
    setup.apply(args, options_of("decode", offload_ratio="auto", profile="p.json", tpot_slo_ms=30))


def test_a_library_that_is_missing_is_said_with_how_to_make_it(args: EngineArgs, tmp_path: Path) -> None:
    (tmp_path / "libadrenaline_cuda.so").unlink()
    with pytest.raises(AdrenalineError, match=r"no CUDA library at .*: python tools/build_cuda\.py library"):
        setup.apply(args, options_of("prefill"))


def test_beside_the_daemon_of_mps_nothing_starts(args: EngineArgs, tmp_path: Path) -> None:
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps" / "control").touch()
    with pytest.raises(AdrenalineError, match=r"MPS, whose daemon listens at .*/mps/control"):
        setup.apply(args, options_of("prefill"))


def config_of(**changes: Any) -> Any:
    """Return as much of a configuration as is looked at on CUDA; `changes` by "part.name"."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {"dtype": torch.bfloat16, "get_head_size": lambda: 128},
        "attention_config": {"backend": None, "backend_per_kind": {}},
        "cache_config": {"block_size": 16},
        "compilation_config": {
            "cudagraph_mode": CUDAGraphMode.PIECEWISE,
            "splitting_ops_contain_attention": lambda: True,
            "use_inductor_graph_partition": False,
        },
    }
    for path, value in changes.items():
        part, _, name = path.partition("__")
        parts[part][name] = value
    return SimpleNamespace(**{part: SimpleNamespace(**values) for part, values in parts.items()})


def refused(role: str, **changes: Any) -> list[str]:
    found = cuda.unsupported(config_of(**changes), options_of(role))
    return [words for words, is_present in found if is_present]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("backend", [None, *(AttentionBackendEnum[name] for name in cuda.BACKENDS)])
def test_the_supported_backends_are_accepted(role: str, backend: AttentionBackendEnum | None) -> None:
    assert refused(role, attention_config__backend=backend) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_config__backend": AttentionBackendEnum.FLEX_ATTENTION}, "the attention backend FLEX_ATTENTION"),
        ({"attention_config__backend_per_kind": {"full": AttentionBackendEnum.FLASHINFER}}, "attention backends by"),
        ({"model_config__dtype": torch.float32}, "float32 on CUDA"),
        ({"model_config__get_head_size": lambda: 80}, "a head size of 80 on CUDA"),
        ({"cache_config__block_size": 24}, "blocks of 24 tokens on CUDA"),
    ],
)
def test_what_no_kernel_of_ours_reads_is_refused_on_both_sides(changes: dict[str, Any], said: str) -> None:
    for role in ("prefill", "decode"):
        (words,) = refused(role, **changes)
        assert words.startswith(said)


@pytest.mark.parametrize(
    ("mode", "changes", "is_refused"),
    [
        (CUDAGraphMode.NONE, {"splitting_ops_contain_attention": lambda: False}, False),
        (CUDAGraphMode.PIECEWISE, {}, False),
        (CUDAGraphMode.PIECEWISE, {"splitting_ops_contain_attention": lambda: False}, True),
        (
            CUDAGraphMode.PIECEWISE,
            {"splitting_ops_contain_attention": lambda: False, "use_inductor_graph_partition": True},
            False,
        ),
        (CUDAGraphMode.FULL, {}, True),
        (CUDAGraphMode.FULL_DECODE_ONLY, {}, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, {}, True),
    ],
)
def test_a_decode_engine_refuses_graphs_with_attention_in_them_and_a_prefill_engine_does_not(
    mode: CUDAGraphMode, changes: dict[str, Any], is_refused: bool
) -> None:
    changes = {f"compilation_config__{name}": value for name, value in changes.items()}
    found = refused("decode", compilation_config__cudagraph_mode=mode, **changes)
    assert [f"cudagraph_mode {mode.name}" in words for words in found] == [True] * is_refused
    assert refused("prefill", compilation_config__cudagraph_mode=mode, **changes) == []


def test_of_the_machine_only_what_is_no_memory_is_looked_at() -> None:
    wanted = resources.wanted(options_of("prefill"), SimpleNamespace())  # type: ignore[arg-type]
    assert (wanted.weights, wanted.kv, wanted.share, wanted.moves_priorities) == (0, 0, 0.0, False)


def test_a_prefill_engine_that_is_out_of_sight_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    far = messages.Welcome("p", "localhost", 1, 1, ["ipc:///x"], "", 60.0, vicinity="another host")
    monkeypatch.setattr(setup, "identity_of", lambda _: IDENTITY)
    monkeypatch.setattr(setup.sockets, "ask_once", lambda *_, **__: far)
    monkeypatch.delenv(setup.PEERS_START_TOO, raising=False)
    options = options_of("decode", peers=f"ipc://{tmp_path}/p")
    with pytest.raises(AdrenalineError, match="from a GPU executors of this host alone are used"):
        setup.check_peers(options, None, print)  # type: ignore[arg-type]


def test_engines_on_cpu_and_cuda_do_not_fit_each_other() -> None:
    values = dict.fromkeys(("get_num_layers", "get_num_attention_heads", "get_num_kv_heads"), lambda _: 4)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            **values, model="m", revision=None, architectures=["A"], dtype=torch.bfloat16, get_head_size=lambda: 64
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
        additional_config={"adrenaline": {"role": "prefill", "experimental_cuda": True}},
    )
    on_cuda = identity_of(config)
    assert (on_cuda.isa, on_cuda.kv_layout, on_cuda.split_kv) == ("cuda", CUDA_LAYOUT, False)
    config.additional_config = {"adrenaline": {"role": "decode"}}
    assert identity_of(config).isa != "cuda"


def test_nothing_of_an_engine_on_cuda_imports_vllms_cpu_worker() -> None:
    """That replaces parts of torch.cuda as soon as it is imported."""
    modules = [
        f"vllm_adrenaline.{role}.{name}"
        for role in ("decode", "prefill")
        for name in ("gpu_worker", "scheduler", "connector")
    ]
    code = f"import sys, {', '.join([*modules, 'vllm_adrenaline.prefill.executor'])}; " + (
        "sys.exit(any(name in sys.modules for name in ('vllm.v1.worker.cpu_worker', 'vllm.v1.worker.cpu.shm')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
