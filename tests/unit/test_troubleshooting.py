"""docs/troubleshooting.md: each message there is, word for word, what the code says to that mistake."""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.test_control import IDENTITY, WELCOME
from tests.unit.test_resources import FOUND, MIB, WANTED
from vllm_adrenaline import cli, plugin
from vllm_adrenaline.compat import cpu_metadata, versions
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.engine import resources, setup
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy import server
from vllm_adrenaline.system import machine

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
ADDRESS = "ipc:///tmp/my-adrenaline/prefill"
Patch = pytest.MonkeyPatch


def parse(role: str = "decode", **values: Any) -> object:
    """Read the options of an engine."""
    return Options.parse({"role": role, **values})


def no_vllm(_: Patch, __: Path) -> None:
    versions.check_vllm(None)


def other_vllm(_: Patch, __: Path) -> None:
    versions.check_vllm("0.34.1")


def no_metadata(patch: Patch, _: Path) -> None:
    patch.setattr(metadata, "distributions", lambda **_: iter(()))
    patch.setattr(metadata.Distribution, "discover", lambda **_: iter(()))
    metadata.version("vllm")


def cuda_torchvision(patch: Patch, _: Path) -> None:
    patch.setattr(cpu_metadata, "cuda_builds", lambda: ["torchvision", "torchaudio", "torchcodec"])
    versions.check_environment()


def on_cuda(patch: Patch, tmp_path: Path) -> None:
    from vllm import platforms

    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="cuda")
    patch.setattr(platforms, "current_platform", platform)
    setup.apply(None, Options.parse({"role": "decode"}))  # type: ignore[arg-type]


def no_plugin(_: Patch, __: Path) -> None:
    plugin._take_flags(argparse.Namespace(adrenaline_role="decode"))


def no_role(_: Patch, __: Path) -> None:
    Options.parse({})


def other_roles_flag(_: Patch, __: Path) -> None:
    parse(listen=ADDRESS)


def percent(_: Patch, __: Path) -> None:
    parse(offload_ratio="50")


def fixed_elastic(_: Patch, __: Path) -> None:
    parse(elastic="both", offload_ratio="0.5")


def other_connector(_: Patch, __: Path) -> None:
    from vllm.config import KVTransferConfig

    given = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
    setup._kv_transfer_config(given, Options.parse({"role": "decode"}))


def unsupported(patch: Patch, _: Path) -> None:
    patch.setattr(setup, "_unsupported", lambda *_: [("sliding-window attention", True), ("MLA attention", False)])
    setup.check_supported(None, Options.parse({"role": "decode"}))  # type: ignore[arg-type]


def nobody_answers(patch: Patch, tmp_path: Path) -> None:
    check_peers(patch, tmp_path, None, connect_timeout=0)


def check_peers(patch: Patch, _: Path, answer: Any, **values: Any) -> None:
    """Start a decode engine whose prefill engine answers so."""
    patch.setattr(setup, "identity_of", lambda _: IDENTITY)
    patch.setattr(setup.sockets, "ask_once", lambda *_, **__: answer)
    patch.delenv(setup.PEERS_START_TOO, raising=False)
    options = Options(**{"role": "decode", "peers": ADDRESS} | values)
    setup.check_peers(options, None, print)  # type: ignore[arg-type]


def other_model(patch: Patch, tmp_path: Path) -> None:
    theirs = msgspec.structs.replace(IDENTITY, dtype="bfloat16")
    reason = messages.mismatch(IDENTITY, theirs, "decode engine", "prefill engine")
    assert reason is not None
    check_peers(patch, tmp_path, messages.Refused(reason))


def no_executors(patch: Patch, tmp_path: Path) -> None:
    check_peers(patch, tmp_path, msgspec.structs.replace(WELCOME, executors=[], vicinity=addresses.vicinity(ADDRESS)))


def other_container(patch: Patch, tmp_path: Path) -> None:
    there = f"{machine.boot()}/another network namespace"
    check_peers(patch, tmp_path, msgspec.structs.replace(WELCOME, vicinity=there), peers="tcp://127.0.0.1:7000")


def address_in_use(patch: Patch, _: Path) -> None:
    patch.setattr(socket.socket, "connect_ex", lambda *_: 0)
    sockets.check_free(ADDRESS)


def shared_folder(_: Patch, tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    try:
        sockets.bind(f"ipc://{tmp_path}/prefill")
    except AdrenalineError as error:
        raise AdrenalineError(str(error).replace(str(tmp_path), "/tmp")) from None


def not_loopback(_: Patch, __: Path) -> None:
    parse("prefill", listen="tcp://10.0.0.1:7000")


def open_key(_: Patch, tmp_path: Path) -> None:
    key = tmp_path / "prefill.key"
    key.write_text("0" * 64)
    key.chmod(0o644)
    try:
        Keys.load(str(key), "")
    except AdrenalineError as error:
        raise AdrenalineError(str(error).replace(str(key), "prefill.key")) from None


def check_resources(patch: Patch, wanted: resources.Wanted = WANTED, found: resources.Found = FOUND) -> None:
    """Start an engine that wants this where there is that."""
    patch.setattr(resources, "wanted", lambda *_: wanted)
    patch.setattr(resources, "read", lambda: found)

    def warn(text: str) -> None:
        raise AdrenalineError(text)

    setup.check_resources(None, None, warn)  # type: ignore[arg-type]


def too_little_memory(patch: Patch, _: Path) -> None:
    check_resources(patch, replace(WANTED, share=0.92))


def small_shm(patch: Patch, _: Path) -> None:
    check_resources(patch, found=replace(FOUND, shm=64 * MIB))


def few_files(patch: Patch, _: Path) -> None:
    check_resources(patch, found=replace(FOUND, files=256))


def no_priorities(patch: Patch, _: Path) -> None:
    check_resources(patch, found=replace(FOUND, may_raise=False))


def no_model(_: Patch, __: Path) -> None:
    setup.check_model("./my-model")


def port_in_use(_: Patch, __: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        try:
            server.bind("127.0.0.1", port)
        except AdrenalineError as error:
            raise AdrenalineError(str(error).replace(str(port), "8000")) from None


def no_url(_: Patch, __: Path) -> None:
    cli._urls("--prefill", "localhost:8001")


MISTAKES: list[Callable[[Patch, Path], None]] = [
    no_vllm,
    other_vllm,
    no_metadata,
    cuda_torchvision,
    on_cuda,
    no_plugin,
    no_role,
    other_roles_flag,
    percent,
    fixed_elastic,
    other_connector,
    unsupported,
    no_model,
    nobody_answers,
    other_model,
    no_executors,
    other_container,
    address_in_use,
    shared_folder,
    not_loopback,
    open_key,
    too_little_memory,
    small_shm,
    few_files,
    no_priorities,
    port_in_use,
    no_url,
]
"""The mistakes, in the order of the page."""


def said_on_the_page() -> list[str]:
    """Return the messages of the page, in its order."""
    return re.findall(r"^## [^\n]+\n\n```text\n(.*?)\n```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: MISTAKES[number].__name__)
def test_the_page_has_the_message_of_each_mistake_word_for_word(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises((AdrenalineError, SystemExit, metadata.PackageNotFoundError)) as caught:
        MISTAKES[number](monkeypatch, tmp_path)
    assert str(caught.value).removeprefix("adrenaline: ") == said_on_the_page()[number]


def test_the_page_has_no_message_that_nobody_makes() -> None:
    assert len(said_on_the_page()) == len(MISTAKES)
