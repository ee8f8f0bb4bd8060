"""What cannot work is refused at start-up: one clear sentence, an exit code that is not zero, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import serve
from vllm_adrenaline.control import sockets

DECODE = ["--plugin", "adrenaline", "--adrenaline-role", "decode"]
PREFILL = ["--plugin", "adrenaline", "--adrenaline-role", "prefill"]
NOBODY = ["--adrenaline-peers", "ipc:///tmp/adrenaline-nobody-is-here", "--adrenaline-connect-timeout", "1"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([*DECODE, *NOBODY], "no prefill engine answers at ipc:///tmp/adrenaline-nobody-is-here"),
        (
            [*DECODE, "--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'],
            "--kv-transfer-config",
        ),
        ([*PREFILL, "--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
        ([*PREFILL, "--scheduling-policy", "priority", "--kv-cache-dtype", "fp8"], "priority scheduling"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_sentence(model: Path, flags: list[str], sentence: str) -> None:
    code, output = serve("--model", str(model), "--dtype", "float32", "--max-model-len", "512", *flags)
    assert code != 0
    said = [line for line in output.splitlines() if line.startswith("adrenaline: ")]
    assert len(said) == 1, output[-2000:]
    assert sentence in said[0]
    assert "Traceback" not in output


def test_a_model_that_is_not_there_is_refused() -> None:
    code, output = serve("--model", "/nowhere/model", *PREFILL)
    assert code != 0
    assert "adrenaline: there is no model at /nowhere/model" in output
    assert "Traceback" not in output


def test_an_address_in_use_is_refused(model: Path, short_tmp: Path) -> None:
    socket, address = sockets.bind(f"ipc://{short_tmp}/taken")
    code, output = serve("--model", str(model), "--max-model-len", "512", *PREFILL, "--adrenaline-listen", address)
    sockets.unbind(socket, address)
    assert code != 0
    assert f"adrenaline: {address} is in use" in output
    assert "Traceback" not in output
