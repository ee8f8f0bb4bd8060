"""What cannot work is refused at start-up: one clear sentence, an exit code that is not zero, no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.engine.conftest import Ended, Server
from vllm_adrenaline.control import sockets
from vllm_adrenaline.system.folders import runtime_folder

DECODE = ["--plugin", "adrenaline", "--adrenaline-role", "decode"]
PREFILL = ["--plugin", "adrenaline", "--adrenaline-role", "prefill"]
SMALL = ["--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", "100000000"]
"""Fits beside whatever else runs on this machine."""


def reason(ended: Ended) -> str:
    """Return the one sentence with which a server refused to start."""
    assert ended.code != 0
    said = [line for line in ended.output.splitlines() if line.startswith("adrenaline: ")]
    assert len(said) == 1, ended.output[-2000:]
    assert "Traceback" not in ended.output
    return said[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*DECODE, "--adrenaline-peers", "ipc:///tmp/anybody"], "the folder /tmp of a control socket can be written"),
        (
            [*DECODE, "--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'],
            "--kv-transfer-config names the connector 'LMCacheConnectorV1'",
        ),
        ([*PREFILL, "--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        (
            [*PREFILL, "--kv-cache-memory-bytes", str(1 << 50)],
            "the KV cache takes 1048576.0 GiB of memory and the weights take 0.0 GiB, and ",
        ),
        ([*PREFILL, "--scheduling-policy", "priority", "--kv-cache-dtype", "fp8"], "priority scheduling"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(
    server: Server, model: Path, flags: list[str], sentence: str
) -> None:
    ended = server.run("--model", str(model), *SMALL, *flags)
    assert sentence in reason(ended)


def test_a_decode_engine_without_a_prefill_engine_is_refused(server: Server, model: Path, tmp_path: Path) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    flags = ["--adrenaline-peers", nobody, "--adrenaline-connect-timeout", "1"]
    ended = server.run("--model", str(model), *SMALL, *DECODE, *flags)
    assert f"no prefill engine answers at {nobody}" in reason(ended)


def test_a_model_that_is_not_there_is_refused(server: Server) -> None:
    assert "adrenaline: there is no model at /nowhere/model" in reason(
        server.run("--model", "/nowhere/model", *PREFILL)
    )


def test_an_address_in_use_is_refused(server: Server, model: Path) -> None:
    folder = runtime_folder()
    socket, address = sockets.bind(f"ipc://{folder}/taken")
    listen = ["--adrenaline-listen", address]
    ended = server.run("--model", str(model), *SMALL, *PREFILL, *listen)
    sockets.unbind(socket, address)
    shutil.rmtree(folder)
    assert f"adrenaline: {address} is in use" in reason(ended)
