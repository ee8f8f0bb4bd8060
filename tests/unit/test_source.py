"""What no source file of the package may do: deserialize objects, which runs code of whoever sent them, or listen at
addresses that other machines reach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_adrenaline

PICKLING_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_METHODS = {"recv_pyobj", "send_pyobj", "send_serialized", "recv_serialized"}
EVERY_ADDRESS = ("tcp://*", "tcp://0.0.0.0", "tcp://[::]")
PACKAGE = Path(vllm_adrenaline.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def forbidden(source: str) -> Iterator[str]:
    """Yield what a source file does that it must not."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in PICKLING_MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                yield from (name.name for name in names if module == "torch" and name.name == "load")
                if module.split(".")[0] in PICKLING_MODULES:
                    yield module
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.Attribute(attr=attribute) if attribute in PICKLING_METHODS:
                yield attribute
            case ast.keyword(arg="allow_pickle"):
                yield "allow_pickle"
            case ast.Constant(value=str(text)):
                yield from (address for address in EVERY_ADDRESS if address in text)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from cloudpickle.cloudpickle import dumps",
        "socket.recv_pyobj()",
        "self.control.send_pyobj",
        "torch.load(path)",
        "from torch import load",
        "numpy.load(path, allow_pickle=True)",
        'socket.bind("tcp://*:5")',
        'socket.bind(f"tcp://0.0.0.0:{port}")',
    ],
)
def test_the_check_finds_what_is_forbidden(line: str) -> None:
    assert list(forbidden(f"def f():\n    {line}\n"))


def test_the_check_lets_the_rest_pass() -> None:
    assert list(forbidden('import json\nfrom torch import save\nloads = json.loads\nbind("tcp://127.0.0.1:5")\n')) == []


def test_all_files_are_looked_at() -> None:
    assert len(FILES) > 50
    assert {"cli.py", "messages.py", "server.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_pickles_or_listens_to_the_world(path: Path) -> None:
    assert list(forbidden(path.read_text())) == []
