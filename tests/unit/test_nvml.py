"""The figures of an engine's GPU, from NVML to /metrics. A made-up pynvml stands for the package and the driver."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.third_party import pynvml as pynvml_of_vllm

from vllm_adrenaline.engine import connector, metrics
from vllm_adrenaline.engine.connector import WorkerSide
from vllm_adrenaline.engine.metrics import GPU_GAUGES, AdrenalinePromMetrics, AdrenalineStats
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import nvml
from vllm_adrenaline.system.nvml import Gpu

ONE, TWO = "11111111-aaaa", "22222222-bbbb"
GIB = 1 << 30


class NvmlError(Exception):
    """What pynvml raises."""


@dataclass
class Device:
    """A device of the made-up NVML. A figure of None is refused. `mig`: its mode; None if it knows no MIG."""

    gpu: int | None = 40
    memory: int | None = 30
    used: int | None = 8 * GIB
    mig: int | None = None


@dataclass
class FakeNvml:
    """The part of pynvml that is used. `devices`: by NVML's names. `calls`: what was asked."""

    devices: dict[str, Device]
    starts: bool = True
    calls: list[str] = field(default_factory=list)
    NVMLError: type[Exception] = NvmlError
    NVML_DEVICE_MIG_ENABLE: int = 1

    def nvmlInit(self) -> None:
        if not self.starts:
            raise NvmlError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        if uuid not in self.devices:
            raise NvmlError("Not Found")
        return self.devices[uuid]

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        return [self._answer("mode", device.mig), 0]

    def nvmlDeviceGetUtilizationRates(self, device: Device) -> SimpleNamespace:
        return SimpleNamespace(gpu=self._answer("utilization", device.gpu), memory=device.memory)

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> SimpleNamespace:
        return SimpleNamespace(used=self._answer("memory", device.used))

    def _answer(self, what: str, value: int | None) -> int:
        self.calls.append(what)
        if value is None:
            raise NvmlError("Not Supported")
        return value


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Two GPUs."""
    made = FakeNvml({f"GPU-{ONE}": Device(), f"GPU-{TWO}": Device(gpu=100, memory=0, used=GIB)})
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was logged."""
    lines: list[str] = []
    for module in (nvml, connector):
        logger = logging.Logger("test")
        monkeypatch.setattr(logger, "warning", lambda text, *words: lines.append(text % words))
        monkeypatch.setattr(module, "logger", logger)
    return lines


def clock_of(*times: float) -> Any:
    return iter(times).__next__


# What NVML tells


def test_names_are_those_of_pynvml() -> None:
    names = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(names) == 5
    assert [name for name in (*names, "NVMLError") if not hasattr(pynvml_of_vllm, name)] == []
    assert pynvml_of_vllm.NVML_DEVICE_MIG_ENABLE == FakeNvml.NVML_DEVICE_MIG_ENABLE
    assert {"gpu", "memory"} == {name for name, *_ in pynvml_of_vllm.c_nvmlUtilization_t._fields_}
    assert "used" in {name for name, *_ in pynvml_of_vllm.c_nvmlMemory_t._fields_}


def test_figures_are_of_the_gpu_with_this_uuid(fake: FakeNvml) -> None:
    assert Gpu(ONE).read() == {"busy_share": 0.4, "memory_busy_share": 0.3, "memory_used_bytes": 8 * GIB}
    assert Gpu(TWO).read() == {"busy_share": 1.0, "memory_busy_share": 0.0, "memory_used_bytes": GIB}
    assert Gpu(TWO).name == f"GPU-{TWO}"


def test_it_is_asked_at_most_twice_a_second(fake: FakeNvml) -> None:
    gpu = Gpu(ONE, clock_of(7.0, 7.1, 7.49, 7.5, 7.9))
    read = [bool(gpu.read()) for _ in range(5)]
    assert read == [True, False, False, True, False]
    assert fake.calls == ["mode", *("utilization", "memory") * 2]


def test_what_is_refused_is_absent_and_said_once(fake: FakeNvml, said: list[str]) -> None:
    fake.devices[f"GPU-{ONE}"].gpu = None
    gpu = Gpu(ONE, clock_of(1, 2))
    assert [gpu.read(), gpu.read()] == [{"memory_used_bytes": 8 * GIB}] * 2
    assert said == [f"NVML does not tell the utilization of GPU-{ONE}: Not Supported"]


def test_what_is_refused_later_is_no_number_until_it_is_told_again(fake: FakeNvml, said: list[str]) -> None:
    device, gpu = fake.devices[f"GPU-{ONE}"], Gpu(ONE, clock_of(1, 2, 3))
    gpu.read()
    device.used = None
    later = gpu.read()
    assert later.keys() == {"busy_share", "memory_busy_share", "memory_used_bytes"}
    assert math.isnan(later["memory_used_bytes"])
    device.used = 3
    assert gpu.read()["memory_used_bytes"] == 3
    assert len(said) == 1


def test_an_instance_of_mig_has_its_memory_alone(fake: FakeNvml, said: list[str]) -> None:
    fake.devices = {f"MIG-{ONE}": Device(gpu=None, used=GIB), f"GPU-{TWO}": Device(mig=1)}
    gpu = Gpu(ONE)
    assert gpu.name == f"MIG-{ONE}"
    assert gpu.read() == {"memory_used_bytes": GIB}
    assert len(said) == 1


def test_a_gpu_that_mig_divides_is_refused_and_one_that_it_could_divide_is_not(fake: FakeNvml) -> None:
    fake.devices[f"GPU-{ONE}"].mig, fake.devices[f"GPU-{TWO}"].mig = 1, 0
    with pytest.raises(AdrenalineError, match=f"^MIG divides GPU-{ONE}, and CUDA does not tell which"):
        Gpu(ONE)
    assert Gpu(TWO).read()


def test_an_unknown_gpu_is_refused(fake: FakeNvml) -> None:
    with pytest.raises(AdrenalineError, match=r"that CUDA uses here \(GPU-3: Not Found, MIG-3: Not Found\)$"):
        Gpu("3")


def test_without_a_driver_or_the_package_it_is_refused(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.starts = False
    with pytest.raises(AdrenalineError, match=r"^NVML does not start \(Driver Not Loaded\)$"):
        Gpu(ONE)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(AdrenalineError, match=r"^there is no pynvml here \(pip install nvidia-ml-py\)$"):
        Gpu(ONE)


# From a worker to /metrics


def config_of(experimental_cuda: bool) -> Any:
    options = {"role": "prefill", "experimental_cuda": experimental_cuda}
    return SimpleNamespace(additional_config={"adrenaline": options}, kv_transfer_config=None)


def side_of(monkeypatch: pytest.MonkeyPatch, uuid: str = ONE, experimental_cuda: bool = True) -> WorkerSide:
    """Return the worker side of a connector in a process that uses this GPU."""
    monkeypatch.setattr(NixlPullConnectorWorker, "__init__", lambda *_: None)
    monkeypatch.setattr(NixlPullConnectorWorker, "__del__", lambda _: None, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = {1: SimpleNamespace(uuid=uuid)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    return WorkerSide(config_of(experimental_cuda), "engine", None)


def test_a_worker_reports_its_gpu(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    side = side_of(monkeypatch)
    assert side.gauges() == {
        f"gpu_busy_share/GPU-{ONE}": 0.4,
        f"gpu_memory_busy_share/GPU-{ONE}": 0.3,
        f"gpu_memory_used_bytes/GPU-{ONE}": 8 * GIB,
    }
    assert side.gauges() == {}, "half a second is not over"


def test_a_worker_on_cpu_asks_nothing(fake: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "Gpu", None)
    assert side_of(monkeypatch, experimental_cuda=False).gauges() == {}


def test_a_worker_whose_gpu_cannot_be_read_goes_on_without(
    fake: FakeNvml, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.starts = False
    side = side_of(monkeypatch)
    assert [side.gauges(), side.gauges()] == [{}, {}]
    assert said == ["nothing of this worker's GPU is in the metrics: NVML does not start (Driver Not Loaded)"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """Where metrics are, in the place of the process's own registry, and without NIXL's."""
    monkeypatch.setattr(metrics, "NixlPromMetrics", lambda *_: SimpleNamespace(observe=lambda *_: None))
    return CollectorRegistry()


def prom_of(registry: CollectorRegistry, experimental_cuda: bool = True) -> AdrenalinePromMetrics:
    kinds = {
        kind: lambda *args, kind=kind, **kwargs: kind(*args, registry=registry, **kwargs)
        for kind in (Gauge, Counter, Histogram)
    }
    return AdrenalinePromMetrics(config_of(experimental_cuda), kinds, ["model_name", "engine"], {0: ["m", "0"]})


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Return what a scrape has of GPUs, by gauge and GPU."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = [sample for family in families for sample in family.samples if "adrenaline_gpu_" in sample.name]
    return {
        (sample.name.removeprefix("vllm:adrenaline_"), sample.labels["gpu"].partition("-")[2]): sample.value
        for sample in found
    }


def test_ranks_add_up_to_all_gpus_of_an_engine_and_what_is_not_told_is_absent(
    fake: FakeNvml, said: list[str], registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.devices[f"GPU-{TWO}"].gpu = None
    first, second = (AdrenalineStats.merged(None, {}, side_of(monkeypatch, uuid).gauges()) for uuid in (ONE, TWO))
    assert first is not None
    assert second is not None
    prom = prom_of(registry)
    assert samples(registry) == {}, "nothing was told yet"
    prom.observe(first.aggregate(second).data)
    assert samples(registry) == {
        ("gpu_busy_share", ONE): 0.4,
        ("gpu_memory_busy_share", ONE): 0.3,
        ("gpu_memory_used_bytes", ONE): 8 * GIB,
        ("gpu_memory_used_bytes", TWO): GIB,
    }


def test_on_cpu_there_is_nothing_of_gpus_in_the_metrics(registry: CollectorRegistry) -> None:
    prom_of(registry, experimental_cuda=False).observe(AdrenalineStats(data={}).data)
    assert not [name for name in GPU_GAUGES if name in generate_latest(registry).decode()]


@pytest.mark.parametrize("name", ["gpu_busy_share", "gpu_share/GPU-1", "executor_share/GPU-1"])
def test_a_gauge_without_its_gpu_or_of_none_is_not_described(name: str) -> None:
    with pytest.raises(AssertionError, match="GPU_GAUGES"):
        AdrenalineStats.merged(None, {}, {name: 1.0})
