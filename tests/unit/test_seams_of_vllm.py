"""The vLLM that is installed, and those recorded, have what the plugin leans on. Faults planted in it are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm_adrenaline.compat.versions import CHECKED, RUN, installed_vllm
from vllm_adrenaline.seams import command, declared, readers, records
from vllm_adrenaline.seams.check import check
from vllm_adrenaline.seams.lookup import Lookup
from vllm_adrenaline.seams.source import Tree
from vllm_adrenaline.seams.things import Fact, Missing


@pytest.fixture(scope="module")
def installed() -> command.Subject:
    return command.subject(None)


def test_the_installed_vllm_has_what_the_plugin_leans_on(installed: command.Subject) -> None:
    assert command.problems(installed) == []


@pytest.mark.parametrize("version", CHECKED)
def test_every_checked_version_has_what_the_plugin_leans_on(version: str) -> None:
    assert command.problems(command.subject(version)) == []


@pytest.mark.skipif(not (installed_vllm() or "").startswith(f"{RUN}.0"), reason="another vLLM is recorded")
def test_the_record_is_what_is_installed(installed: command.Subject) -> None:
    assert records.load(RUN) == installed.facts


@pytest.mark.parametrize("version", CHECKED)
def test_a_record_has_nothing_that_nobody_needs(version: str) -> None:
    assert records.load(version).keys() == {need.path for need in command.needs()}


@pytest.mark.parametrize("version", CHECKED)
def test_everything_is_followed_to_its_end(version: str) -> None:
    assert [path for path, fact in records.load(version).items() if isinstance(fact, Missing) and not fact.gone] == []


SEAMS = (
    "vllm.v1.core.sched.scheduler:Scheduler().schedule",
    "vllm.v1.core.sched.scheduler:Scheduler()._pause_state",
    "vllm.v1.core.sched.scheduler:Scheduler().kv_cache_manager.block_pool.get_num_free_blocks",
    "vllm.v1.worker.gpu_worker:Worker().model_runner.input_batch.generators",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl().forward",
    "vllm.v1.worker.cpu_worker:CPUWorker().vllm_config.compilation_config.static_forward_context",
    "vllm:_custom_ops.cpu_attention_with_kv_cache",
    "vllm:envs.VLLM_NIXL_SIDE_CHANNEL_PORT",
    "vllm.engine.arg_utils:EngineArgs().create_engine_config",
)


@pytest.mark.parametrize("path", SEAMS)
def test_seams_that_we_know_of_are_among_those_found(path: str) -> None:
    assert isinstance(records.load(RUN)[path], Fact)


SCHEDULER, ATTENTION = "vllm/v1/core/sched/scheduler.py", "vllm/v1/attention/backends/cpu_attn.py"
PLANTED = {
    "a private method has another name": (
        SCHEDULER,
        "def _preempt_request(",
        "def _preempt(",
        "has no _preempt_request",
    ),
    "a parameter has another name": (SCHEDULER, "drop_stale_output", "drop_stale", "takes no `drop_stale_output`"),
    "an attribute has another name": (SCHEDULER, "_pause_state", "_paused", "has no _pause_state"),
    "a class has another name": (ATTENTION, "CPUAttentionBackendImpl", "CPUAttention", "is gone"),
    "a new parameter is passed to ours": (
        ATTENTION,
        "output_block_scale: torch.Tensor | None = None,",
        "output_block_scale: torch.Tensor | None = None, lse: bool = False,",
        "vLLM may pass `lse`, which ours does not take",
    ),
    "an attribute of layers has another name": (
        ATTENTION,
        "layer.isa = ",
        "layer.kind = ",
        "does not contain layer.isa",
    ),
}


@pytest.mark.parametrize(("file", "text", "other", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_a_fault_that_is_planted_in_the_installed_vllm_is_told(file: str, text: str, other: str, said: str) -> None:
    class Planted(dict[str, str]):
        def __getitem__(self, path: str) -> str:
            return real[path].replace(text, other) if path == file else real[path]

        def __contains__(self, path: object) -> bool:
            return path in real

        def items(self) -> Iterator[tuple[str, str]]:  # type: ignore[override]
            return iter(())  # other modules are not looked through

    real = readers.installed()
    assert text in real[file]
    module = file.removesuffix(".py").replace("/", ".")
    needs = {need for need in command.needs() if need.path.startswith(f"{module}:")}
    baseline = {path: fact for path, fact in records.load(RUN).items() if isinstance(fact, Fact)}
    facts = Lookup(Tree(Planted()), declared.TYPES, declared.ATTACHED).facts(need.path for need in needs)
    found = [f"{each.path} {each.what}" for each in check(needs, facts, baseline)]
    assert any(said in each for each in found), found
