"""What the user types: flags, their errors, and that an installed package changes nothing until it is asked to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_control import IDENTITY
from vllm_adrenaline import config, identity, roles, versions
from vllm_adrenaline.config import Options
from vllm_adrenaline.errors import AdrenalineError


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter, where no plugin is loaded yet; return its last line, of stderr if it failed."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=180)
    return (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


def test_every_option_is_a_flag_with_help() -> None:
    flags = config.flags()
    assert {name for name, _, _ in flags} == set(Options.__struct_fields__)
    assert all(arguments["help"] for _, _, arguments in flags)


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


@pytest.mark.parametrize("together", [False, True])
def test_a_decode_engine_does_not_wait_for_a_prefill_engine_that_starts_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool
) -> None:
    """They load and compile at the same time; its workers wait for the other's executors."""
    monkeypatch.setattr(identity, "of", lambda _: IDENTITY)
    monkeypatch.delenv(roles.PEERS_START_TOO, raising=False)
    if together:
        monkeypatch.setenv(roles.PEERS_START_TOO, "1")
    options = Options.parse({"role": "decode", "peers": f"ipc://{tmp_path}/nobody", "connect_timeout": 0})
    with contextlib.nullcontext() if together else pytest.raises(AdrenalineError, match="no prefill engine answers"):
        roles.check_peers(options, None, print)  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("chosen", [None, "eth7"])
def test_nixl_stays_on_loopback_unless_an_operator_names_an_interface(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str, chosen: str | None
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(
        os, "environ", {"HOME": str(tmp_path)} | ({} if chosen is None else {"UCX_NET_DEVICES": chosen})
    )
    roles.apply(EngineArgs(model=str(tmp_path)), Options.parse({"role": role}))
    assert os.environ["UCX_NET_DEVICES"] == (chosen or "lo")


PARSE = """
import sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "x", *sys.argv[1:]]))
print(args.additional_config, args.scheduler_cls, args.worker_cls, args.kv_transfer_config)
"""


def parse(*flags: str) -> str:
    return python(PARSE, *flags)


def test_without_the_plugin_flag_nothing_is_different() -> None:
    assert parse() == "{} None auto None"


def test_the_flags_reach_every_process_through_additional_config() -> None:
    line = parse("--plugin", "adrenaline", "--adrenaline-role", "decode", "--adrenaline-offload-ratio", "0.25")
    assert line == "{'adrenaline': {'role': 'decode', 'offload_ratio': '0.25'}} None auto None"


def test_a_flag_without_the_plugin_says_what_is_missing() -> None:
    assert parse("--adrenaline-role", "decode") == "adrenaline: --adrenaline-role needs --plugin adrenaline"


def test_an_unknown_plugin_is_refused() -> None:
    assert "invalid choice: 'steroids'" in parse("--plugin", "steroids")


IDLE = """
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed import utils
before = AttentionBackendEnum.CPU_ATTN.get_path(), shm_broadcast.SpinCondition.wait
load_general_plugins()
import sys
assert "vllm_adrenaline.plugin" in sys.modules
assert (AttentionBackendEnum.CPU_ATTN.get_path(), shm_broadcast.SpinCondition.wait) == before
assert not any(name.startswith("vllm_adrenaline.decode") for name in sys.modules)
from vllm.engine.arg_utils import EngineArgs
print("same", EngineArgs().scheduler_cls, EngineArgs().worker_cls)
"""


def test_an_installed_package_changes_no_class_of_vllm() -> None:
    assert python(IDLE) == "same None auto"
