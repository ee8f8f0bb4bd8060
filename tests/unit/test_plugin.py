"""What the user types: flags, their errors, and that an installed package changes nothing until it is asked to."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_control import IDENTITY
from vllm_adrenaline import config
from vllm_adrenaline.compat import versions
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.engine import setup
from vllm_adrenaline.errors import AdrenalineError

VALUES: dict[str, tuple[str, str, Any]] = {
    "role": ("decode", "decode", "decode"),
    "experimental_cuda": ("decode", "", True),
    "pool": ("decode", "both", "both"),
    "listen": ("prefill", "ipc:///x", "ipc:///x"),
    "peers": ("decode", "ipc:///x,ipc:///y", "ipc:///x,ipc:///y"),
    "key": ("decode", "file", "file"),
    "allow": ("prefill", "file --adrenaline-key other", "file"),
    "insecure": ("decode", "", True),
    "interface": ("decode", "eth7", "eth7"),
    "share_weights": ("decode", "on", "on"),
    "offload_ratio": ("decode", "0.25", "0.25"),
    "offload_rule": ("decode", "and", "and"),
    "tpot_slo_ms": ("decode", "20", 20.0),
    "profile": ("decode", "file.json", "file.json"),
    "lease_seconds": ("prefill", "7", 7.0),
    "claim_seconds": ("prefill", "3", 3.0),
    "prefill_reserve": ("prefill", "0.5", 0.5),
    "growth_reserve": ("prefill", "0.3", 0.3),
    "executor_cores": ("prefill", "0-1|2", "0-1|2"),
    "executor_threads": ("prefill", "2", 2),
    "executor_share": ("prefill", "0.4", 0.4),
    "ttft_slo_ms": ("prefill", "300", 300.0),
    "elastic": ("prefill", "both", "both"),
    "executor_timeout": ("decode", "9", 9.0),
    "connect_timeout": ("decode", "8", 8.0),
}
"""What a user may write for an option, in which role, and what the option is then."""


def test_every_option_is_tried() -> None:
    assert set(VALUES) == set(Options.__struct_fields__)


@pytest.mark.parametrize("name", Options.__struct_fields__)
def test_every_option_is_a_flag_with_help(name: str) -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for field, flag, arguments in config.flags():
        parser.add_argument(flag, dest=field, **arguments)
    role, text, value = VALUES[name]
    flag = f"--adrenaline-{name.replace('_', '-')}"
    given = vars(parser.parse_args(["--adrenaline-role", role, flag, *text.split()]))
    assert getattr(Options.parse(given), name) == value
    (action,) = (action for action in parser._actions if flag in action.option_strings)
    shown = "".join(parser.format_help().split())  # lines end anywhere, at hyphens too
    assert "".join(str(action.help).split()) in shown
    assert re.fullmatch(r"[A-Z].{30,}[.]", str(action.help)), "at least one sentence"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--adrenaline-role prefill or --adrenaline-role decode"),
        ({"role": "both"}, "--adrenaline-role"),
        ({"role": "decode", "offload_ratio": 1.5}, "--adrenaline-offload-ratio"),
        ({"role": "decode", "peers": "tcp://1.2.3.4:5"}, "loopback"),
        ({"role": "decode", "listen": "ipc:///x"}, "--adrenaline-listen is of no use"),
        ({"role": "prefill", "offload_ratio": 0.5}, "--adrenaline-offload-ratio is of no use"),
        ({"role": "decode", "speed": 3}, "speed"),
        ({"role": "decode", "elastic": "both", "offload_ratio": 0.5}, "--adrenaline-elastic needs"),
        ({"role": "prefill", "executor_cores": "1", "pool": "mapped"}, "--adrenaline-executor-cores is of no use with"),
        ({"role": "prefill", "elastic": "prompts", "pool": "both"}, "--adrenaline-elastic is of no use with"),
    ],
)
def test_a_wrong_option_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(AdrenalineError, match=message):
        Options.parse(values)


def test_several_peers_are_separated_by_commas() -> None:
    options = Options.parse({"role": "decode", "peers": "ipc:///a, tcp://127.0.0.1:5"})
    assert options.peer_addresses == ["ipc:///a", "tcp://127.0.0.1:5"]


@pytest.mark.parametrize("version", ["0.31.0", "0.34.1", "1.0.0"])
def test_an_unknown_vllm_is_refused_with_both_versions(version: str) -> None:
    with pytest.raises(AdrenalineError, match=r"0\.32 and 0\.33.*" + version.replace(".", r"\.")):
        versions.check_vllm(version)


def test_a_checked_vllm_is_taken_with_any_local_part() -> None:
    assert versions.check_vllm("0.32.0+cpu") == "0.32.0"


def test_a_connector_that_is_named_as_vllms_is_taken_with_its_settings() -> None:
    """As deployments and routers for disaggregated vLLM write it."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    given = KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        engine_id="mine",
        kv_connector_extra_config={"backends": ["UCX"], "kv_lease_duration": 99},
    )
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        options = Options.parse({"role": role, **({"claim_seconds": 7} if role == "prefill" else {})})
        made = setup._kv_transfer_config(given, options)
        assert (made.kv_connector, made.kv_role, made.engine_id) == ("NixlConnector", kv_role, "mine")
        assert made.kv_connector_extra_config["backends"] == ["UCX"]
        assert made.kv_connector_extra_config["kv_lease_duration"] == (7 if role == "prefill" else 99)
        assert setup._kv_transfer_config(None, options).engine_id, "vLLM makes one"
        found = KVConnectorFactory.get_connector_class(made)
        assert found.__module__ == f"vllm_adrenaline.{role}.connector"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}, "names the connector 'LMCacheConnectorV1'"),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_connector_module_path": "x"}, "has its own"),
        ({"kv_connector": "NixlConnector", "kv_role": "kv_producer"}, "says kv_producer, and --adrenaline-role decode"),
    ],
)
def test_a_connector_that_does_not_fit_is_refused(given: dict[str, str], message: str) -> None:
    from vllm.config import KVTransferConfig

    with pytest.raises(AdrenalineError, match=message):
        setup._kv_transfer_config(KVTransferConfig(**given), Options.parse({"role": "decode"}))


@pytest.mark.parametrize("together", [False, True])
def test_a_decode_engine_does_not_wait_for_a_prefill_engine_that_starts_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool
) -> None:
    """They load and compile at the same time; its workers wait for the other's executors."""
    monkeypatch.setattr(setup, "identity_of", lambda _: IDENTITY)
    monkeypatch.delenv(setup.PEERS_START_TOO, raising=False)
    if together:
        monkeypatch.setenv(setup.PEERS_START_TOO, "1")
    options = Options.parse({"role": "decode", "peers": f"ipc://{tmp_path}/nobody", "connect_timeout": 0})
    with contextlib.nullcontext() if together else pytest.raises(AdrenalineError, match="no prefill engine answers"):
        setup.check_peers(options, None, print)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pool", "waits"), [("remote", None), ("mapped", "passive"), ("both", "passive")])
def test_threads_of_engines_that_share_cores_sleep_while_they_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool: str, waits: str | None
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    setup.apply(EngineArgs(model=str(tmp_path)), Options.parse({"role": "decode", "pool": pool}))
    assert os.environ.get("OMP_WAIT_POLICY") == waits


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("chosen", [None, "eth7"])
def test_nixl_stays_on_loopback_unless_an_operator_names_an_interface(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str, chosen: str | None
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(
        os, "environ", {"HOME": str(tmp_path)} | ({} if chosen is None else {"UCX_NET_DEVICES": chosen})
    )
    setup.apply(EngineArgs(model=str(tmp_path)), Options.parse({"role": role}))
    assert os.environ["UCX_NET_DEVICES"] == (chosen or "lo")


def test_the_interface_between_hosts_is_that_of_all_that_nixl_listens_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    setup.apply(EngineArgs(model=str(tmp_path)), Options.parse({"role": "decode", "interface": "lo"}))
    assert os.environ["UCX_NET_DEVICES"] == "lo"
    assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    with pytest.raises(AdrenalineError, match="no interface nothing0"):
        setup.apply(EngineArgs(model=str(tmp_path)), Options.parse({"role": "decode", "interface": "nothing0"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "on another host: name the network .* --adrenaline-interface"),
        ({"interface": "lo", "pool": "mapped"}, "memory cannot be mapped"),
        ({"interface": "lo", "pool": "both"}, "memory cannot be mapped"),
        ({"interface": "lo"}, None),
    ],
)
def test_what_does_not_reach_another_host_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: dict[str, Any], message: str | None
) -> None:
    far = messages.Welcome("p", "localhost", 1, 1, ["ipc:///x"], "", 60.0, vicinity="another host")
    monkeypatch.setattr(setup, "identity_of", lambda _: IDENTITY)
    monkeypatch.setattr(setup.sockets, "ask_once", lambda *_, **__: far)
    monkeypatch.delenv(setup.PEERS_START_TOO, raising=False)
    options = Options.parse({"role": "decode", "peers": f"ipc://{tmp_path}/p"} | values)
    with contextlib.nullcontext() if message is None else pytest.raises(AdrenalineError, match=message):
        setup.check_peers(options, None, print)  # type: ignore[arg-type]


FIRST_IN_A_FRESH_PROCESS = """
import contextlib, io, json, sys
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed import utils
before = AttentionBackendEnum.CPU_ATTN.get_path(), shm_broadcast.SpinCondition.wait
load_general_plugins()
assert "vllm_adrenaline.plugin" in sys.modules
same = (AttentionBackendEnum.CPU_ATTN.get_path(), shm_broadcast.SpinCondition.wait) == before
loaded = any(name.startswith("vllm_adrenaline.decode") for name in sys.modules)
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
classes = EngineArgs().scheduler_cls, EngineArgs().worker_cls
print(json.dumps({"same": same, "loaded": loaded, "classes": classes}))
"""
PARSE = """
from vllm.utils.argparse_utils import FlexibleArgumentParser
def parse(flags):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "x", *flags]))
    except SystemExit as error:
        return (errors.getvalue().strip() or str(error)).splitlines()[-1]
    return f"{args.additional_config} {args.scheduler_cls} {args.worker_cls} {args.kv_transfer_config}"
for flags in json.loads(sys.argv[1]):
    print(json.dumps(parse(flags)))
"""
LINES = {
    (): "{} None auto None",
    ("--plugin", "adrenaline", "--adrenaline-role", "decode", "--adrenaline-offload-ratio", "0.25"): (
        "{'adrenaline': {'role': 'decode', 'offload_ratio': '0.25'}} None auto None"
    ),
    ("--adrenaline-role", "decode"): "adrenaline: --adrenaline-role needs --plugin adrenaline",
}
UNKNOWN = ("--plugin", "steroids")


@pytest.fixture(scope="module")
def vllm() -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """What a fresh process with vLLM says: first of its classes, then of each of these command lines."""
    lines = [*LINES, UNKNOWN]
    command = [sys.executable, "-c", FIRST_IN_A_FRESH_PROCESS + PARSE, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    first, *said = [json.loads(line) for line in done.stdout.splitlines()[-len(lines) - 1 :]]
    return first, dict(zip(lines, said, strict=True))


def test_an_installed_package_changes_no_class_of_vllm(vllm: tuple[dict[str, Any], dict[tuple[str, ...], str]]) -> None:
    assert vllm[0] == {"same": True, "loaded": False, "classes": [None, "auto"]}


@pytest.mark.parametrize("flags", LINES)
def test_flags_reach_every_process_through_additional_config_and_need_the_plugin(
    flags: tuple[str, ...], vllm: tuple[dict[str, Any], dict[tuple[str, ...], str]]
) -> None:
    assert vllm[1][flags] == LINES[flags]


def test_an_unknown_plugin_is_refused(vllm: tuple[dict[str, Any], dict[tuple[str, ...], str]]) -> None:
    assert "invalid choice: 'steroids'" in vllm[1][UNKNOWN]
