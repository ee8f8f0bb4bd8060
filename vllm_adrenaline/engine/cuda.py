"""An engine on CUDA, behind --adrenaline-experimental-cuda: what is set there, and what is refused.

No engine has run on a GPU (docs/gpu-status.md). So whatever has nothing behind it there is refused, in a sentence.
Read in vllm/platforms/cuda.py, vllm/config and vllm/v1/worker of 0.32 and 0.33; not run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adrenaline.config import Options
from vllm_adrenaline.errors import AdrenalineError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.worker.utils import AttentionGroup

FLAG = "--adrenaline-experimental-cuda"
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""vLLM's names of the attention backends whose KV cache executors can read, and that leave offloaded rows out."""
BLOCK_SIZE = 16
"""Tokens of a block, unless the user says. vLLM would choose it in each worker, where the backend is known: too late to
be compared with other engines. All three backends take it as it is."""
MPS_FOLDER = "CUDA_MPS_PIPE_DIRECTORY"
"""Environment variable with the folder of the MPS daemon's pipes, and below where they are without it."""
DEFAULT_MPS_FOLDER = "/tmp/nvidia-mps"


def name_of(member: Enum) -> str:
    """Return how vLLM calls a backend or a mode of CUDA graphs."""
    return member.name


def check_platform(platform: Any, options: Options) -> None:
    """Raise AdrenalineError unless the plugin serves on vLLM's platform: on CPU, or on CUDA if that is asked for."""
    if platform.is_cpu():
        if options.experimental_cuda:
            raise AdrenalineError(f"{FLAG} is for vLLM on CUDA, and this vLLM runs on CPU: leave the flag out")
        return
    here = f"vllm-adrenaline serves on CPU so far, and this vLLM runs on {platform.device_name}"
    if not platform.is_cuda():
        raise AdrenalineError(here)
    if not options.experimental_cuda:
        raise AdrenalineError(
            f"{here}: no engine of it has run on a GPU, only the executor and the way to it, with tests in the place "
            f"of vLLM (docs/gpu-status.md). {FLAG} tries it all the same"
        )


def prepare(args: EngineArgs, options: Options) -> None:
    """Set on `args` what an engine on CUDA needs and the user left open.

    Raises:
        AdrenalineError: the user chose what does not exist on CUDA, or something is missing on this machine.
    """
    from vllm_adrenaline.native import cuda_library  # it needs torch, which takes seconds

    if refused := [*_refused(args, options)]:
        raise AdrenalineError(f"not on CUDA yet: {'; '.join(refused)}")
    cuda_library.find()
    if args.async_scheduling is None:  # vLLM would have it. Here the next step waits for what the last one reports
        args.async_scheduling = False
    if args.block_size is None:
        args.block_size = BLOCK_SIZE
    if args.distributed_executor_backend is None:
        args.distributed_executor_backend = "mp"  # as on CPU: a worker is a process of its own, with one rank, too


def _refused(args: EngineArgs, options: Options) -> Iterator[str]:
    """Yield each thing that was asked for and does not exist on CUDA, with what to do."""
    if options.maps:
        yield f"--adrenaline-pool {options.pool} (GPU memory of prefill engines is not mapped; give remote)"
    if options.share_weights != "off":
        yield f"--adrenaline-share-weights {options.share_weights} (leave it out)"
    if options.elastic != "off":
        yield f"--adrenaline-elastic {options.elastic} (nothing measures there what work takes; leave it out)"
    if options.role == "prefill" and (options.ttft_slo_ms or options.tpot_slo_ms):
        yield "an objective of a prefill engine (nothing moves shares of a GPU; give --adrenaline-executor-share)"
    if options.executor_threads:
        yield "--adrenaline-executor-threads (an executor there has one thread; leave it out)"
    if options.interface:
        yield "--adrenaline-interface (both engines must be on one host)"
    if options.role == "decode" and options.ratio is None and not options.profile:
        yield (
            "--adrenaline-offload-ratio auto without a profile (nothing measures costs there; give a fixed ratio, or "
            "--adrenaline-profile)"
        )
    if args.enable_sleep_mode:
        yield "--enable-sleep-mode (peers would go on with old addresses of the KV cache)"
    if (pipe := Path(os.environ.get(MPS_FOLDER, DEFAULT_MPS_FOLDER)) / "control").exists():
        yield f"MPS, whose daemon listens at {pipe} (a killed executor might go on writing there; end the daemon)"


def unsupported(config: VllmConfig, options: Options) -> Iterator[tuple[str, bool]]:
    """Yield what is not supported on CUDA, in words, and whether the configuration asks for it."""
    from vllm_adrenaline.native.cuda import HEAD_SIZES

    model, attention, compilation = config.model_config, config.attention_config, config.compilation_config
    backend = name_of(attention.backend) if attention.backend is not None else ""
    yield f"the attention backend {backend} on CUDA (--attention-backend)", bool(backend) and backend not in BACKENDS
    yield "attention backends by kind of layer (backend_per_kind)", bool(attention.backend_per_kind)
    dtype = str(model.dtype).removeprefix("torch.")
    yield f"{dtype} on CUDA", dtype not in ("bfloat16", "float16")
    yield f"a head size of {model.get_head_size()} on CUDA", model.get_head_size() not in HEAD_SIZES
    yield f"blocks of {config.cache_config.block_size} tokens on CUDA", bool(config.cache_config.block_size % 16)
    if options.role == "decode":
        mode = compilation.cudagraph_mode
        splits = compilation.splitting_ops_contain_attention() or compilation.use_inductor_graph_partition
        is_captured = mode.has_full_cudagraphs() or (mode.has_piecewise_cudagraphs() and not splits)
        yield f"CUDA graphs with attention in them (cudagraph_mode {name_of(mode)})", is_captured


def _path_of(backend: AttentionBackendEnum) -> str:
    """Return the module and the name of the class that vLLM takes for a backend, in this process."""
    path: str = backend.get_path()
    return path


def check_cache(groups: Sequence[Sequence[AttentionGroup]], caches: Iterable[torch.Tensor], block_size: int) -> None:
    """Check, in a worker, that its attention and its KV cache are what executors and the split of a batch count on.

    Args:
        groups: the model runner's attention groups, by KV cache group.
        caches: each layer's view [blocks, KV heads, block size, 2 * head size], as the kernels have it.
        block_size: tokens of a block, as the scheduler counts them.

    Raises:
        AdrenalineError: a backend is none of BACKENDS as it is, or its blocks are others than the scheduler's.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # In a decode worker the paths of ours, which have taken the place of the stock ones.
    known = {_path_of(AttentionBackendEnum[name]) for name in BACKENDS}
    sizes = set()
    for group in (group for several in groups for group in several):
        path = ".".join(group.backend.full_cls_name())
        if path not in known:
            raise AdrenalineError(
                f"vLLM has chosen the attention backend {group.backend.get_name()} ({path}), and on CUDA "
                f"{', '.join(BACKENDS)} are supported, each by itself: name one with --attention-backend"
            )
        if group.kernel_block_size is not None:
            sizes.add(group.kernel_block_size)
    sizes |= {cache.shape[2] for cache in caches}
    if sizes != {block_size}:
        others = ", ".join(map(str, sorted(sizes - {block_size})))
        raise AdrenalineError(
            f"blocks have {block_size} tokens, and those of the attention kernels {others}: give both engines "
            f"--block-size {others}"
        )
