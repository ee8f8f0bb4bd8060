"""Every patch of vLLM is in one room and in its ledger, and what it changes is there in the vLLM that is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_adrenaline.compat import ledger

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "vllm_adrenaline"
FOREIGN = ("vllm", "nixl", "torch")
PUBLIC = {
    ("os", "_exit"),
    ("gloo", "_Options"),
    ("settings", "_devices"),
    ("settings", "_threads"),
    ("settings", "_timeout"),
}
"""What only looks like a private attribute: (of what, which). Those of gloo's groups torch has no other names for."""


def test_every_file_of_the_room_is_in_the_ledger() -> None:
    files = {path.stem for path in (PACKAGE / "compat").glob("*.py")} - {"__init__"}
    assert files == {each.room for each in ledger.LEDGER} | ledger.OTHER_ROOMS


@pytest.mark.parametrize("target", sorted({target for each in ledger.LEDGER for target in each.targets}))
def test_what_is_patched_is_there(target: str) -> None:
    module, _, attribute = target.partition(":")
    operator.attrgetter(attribute)(importlib.import_module(module))


@pytest.mark.parametrize("room", sorted(each.room for each in ledger.LEDGER if each.names))
def test_what_is_relied_on_is_in_the_source(room: str) -> None:
    patch = next(each for each in ledger.LEDGER if each.room == room)
    source = inspect.getsource(importlib.import_module(patch.targets[0].partition(":")[0]))
    assert [name for name in patch.names if name not in source] == []


def test_the_table_for_readers_is_the_ledger() -> None:
    assert ledger.markdown() in (ROOT / "patches" / "README.md").read_text()


def from_vllm(tree: ast.Module) -> set[str]:
    """Return the names in a file that are modules, classes or functions of vLLM, NIXL or torch."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names if is_foreign(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and is_foreign(node.module):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def is_foreign(module: str) -> bool:
    return module.split(".")[0] in FOREIGN


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def patches(source: str) -> Iterator[str]:
    """Yield what a file sets on vLLM's modules and classes, what it makes of a foreign object, and which private
    attributes it uses of anything but its own objects."""
    tree = ast.parse(source)
    foreign = from_vllm(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and (root_of(target) in foreign or target.attr == "__class__"):
                yield f"line {node.lineno}: sets {ast.unparse(target)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and root_of(node.args[0]) in foreign:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of = ast.unparse(node.value)
            if of not in ("self", "cls", "super()") and (of, node.attr) not in PUBLIC:
                yield f"line {node.lineno}: uses {ast.unparse(node)}"


@pytest.mark.parametrize(
    "planted",
    [
        "from vllm.v1.core.sched.scheduler import Scheduler\nScheduler.schedule = print",
        "from vllm.v1.core.sched import scheduler\nscheduler.Scheduler.schedule = print",
        "import vllm\nsetattr(vllm.LLM, 'generate', print)",
        "def f(manager):\n    manager.__class__ = dict",
        "def f(scheduler):\n    scheduler._pause_state = 1",
        "import torch\ntorch.cpu._init_amx()",
        "def f(runner):\n    runner._dummy_run(8)",
    ],
)
def test_a_patch_is_seen(planted: str) -> None:
    assert list(patches(planted))


def test_no_other_room_patches_anything() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "compat" and "baseline" not in path.parts and (lines := list(patches(path.read_text())))
    }
    assert found == {}
