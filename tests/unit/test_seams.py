"""`adrenaline check-seams` tells what breaks us in a vLLM, and nothing else: on small trees that are planted here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest

from vllm_adrenaline.seams.check import check
from vllm_adrenaline.seams.derive import derived
from vllm_adrenaline.seams.lookup import Lookup
from vllm_adrenaline.seams.moved import moved
from vllm_adrenaline.seams.needs import Need
from vllm_adrenaline.seams.source import Tree
from vllm_adrenaline.seams.things import Fact, Missing

Texts = Mapping[str, str]


def vllm(**modules: str) -> dict[str, str]:
    """Return a tree with these modules; `__init__` is that of the package."""
    return {"vllm/__init__.py": ""} | {f"vllm/{name}.py": text for name, text in modules.items()}


def needed(ours: str) -> set[Need]:
    return derived(Tree({"vllm_adrenaline/ours.py": ours}))


def look(tree: Texts, needs: set[Need]) -> dict[str, Fact | Missing | None]:
    return Lookup(Tree(tree), {}).facts(need.path for need in needs)


def complaints(ours: str, tree: Texts, run_with: Texts | None = None) -> list[str]:
    """Return what is said of a tree where `run_with` is the one that the plugin runs with; by default the same."""
    needs = needed(ours)
    baseline = {path: fact for path, fact in look(run_with or tree, needs).items() if isinstance(fact, Fact)}
    elsewhere = Lookup(Tree(tree), {}).elsewhere
    return [f"{each.path} {each.what}" for each in check(needs, look(tree, needs), baseline, (), elsewhere)]


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that a new vLLM does to us: our code, vLLM's before and after, and what is to be said of it."""

    ours: str
    before: Texts
    after: Texts
    said: str


CALLS = "from vllm.a import f\nf(1, x=2)"
EXTENDS = "from vllm.a import A\nclass B(A):\n    def go(self, x): return super().go(x)"
READS = "from vllm.a import A\ndef f(a: A): return a.pool.free(1)"
MIXES = "from vllm.a import A\nclass M:\n    def go(self, x): ...\nclass B(M, A): ..."
BETWEEN = "from vllm.a import A\nfrom vllm.b import B\nclass M(A):\n    def go(self, x): ...\nclass C(M, B): ..."
ABOVE, BELOW = "class A:\n    def go(self, x): ...", "from vllm.a import A\nclass B(A):\n    def go(self, x): ..."
POOL = "class Pool:\n    def free(self, n): ...\n"
NO_POOL = "class Pool:\n    def release(self, n): ...\n"

FAULTS = {
    "a function has another name": Fault(
        CALLS, vllm(a="def f(n, x): ..."), vllm(a="def g(n, x): ..."), "vllm.a:f is gone"
    ),
    "a module is gone": Fault(CALLS, vllm(a="def f(n, x): ..."), vllm(), "there is no module vllm.a"),
    "a function moved": Fault(
        CALLS, vllm(a="def f(n, x): ..."), vllm(a="", b="def f(n, x): ..."), "vllm.b define that name"
    ),
    "a class moved": Fault(
        "from vllm.a import A", vllm(a="class A: ..."), vllm(a="", b="class A: ..."), "vllm.b define that name"
    ),
    "a re-export is gone": Fault(
        "from vllm import A",
        {**vllm(a="class A: ..."), "vllm/__init__.py": "from .a import A"},
        vllm(a="class A: ..."),
        "vllm has no A",
    ),
    "a re-export leads nowhere": Fault(
        "from vllm import A",
        {**vllm(a="class A: ..."), "vllm/__init__.py": "from .a import A"},
        {**vllm(a="class B: ..."), "vllm/__init__.py": "from .a import A"},
        "vllm.a has no A",
    ),
    "a lazy name is gone": Fault(
        "import vllm\nvllm.A()",
        {**vllm(a="class A: ..."), "vllm/__init__.py": "N = {'A': '.a:A'}\ndef __getattr__(name): ..."},
        {**vllm(a="class A: ..."), "vllm/__init__.py": "N = {'B': '.a:A'}\ndef __getattr__(name): ..."},
        "vllm has no A",
    ),
    "a name is for type checkers only": Fault(
        "from vllm.b import A",
        vllm(a="class A: ...", b="from vllm.a import A"),
        vllm(a="class A: ...", b="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.a import A"),
        "vllm.b has no A",
    ),
    "a parameter is gone": Fault(CALLS, vllm(a="def f(n, x): ..."), vllm(a="def f(n): ..."), "takes no `x`"),
    "a new parameter is required": Fault(
        CALLS, vllm(a="def f(n, x): ..."), vllm(a="def f(n, x, y): ..."), "requires `y`, which is not given"
    ),
    "a parameter is by name only": Fault(
        CALLS, vllm(a="def f(n, x): ..."), vllm(a="def f(*, n, x): ..."), "takes 0 arguments by position"
    ),
    "an overridden method has another name": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    def run(self, x): ..."),
        "has no go",
    ),
    "a method that a mixin overrides is given more": Fault(
        MIXES,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    def go(self, x, y=1): ..."),
        "vLLM may pass `y`, which ours does not take",
    ),
    "a method that a mixin overrides has another name": Fault(
        MIXES,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    def run(self, x): ..."),
        "has no go",
    ),
    "a method that is overridden between two classes of vLLM is given more below": Fault(
        BETWEEN,
        vllm(a=ABOVE, b=BELOW),
        vllm(a=ABOVE, b=BELOW.replace("x", "x, y=1")),
        "vllm.b:B().go vLLM may pass `y`, which ours does not take",
    ),
    "an overridden method is given more": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    def go(self, x, y=1): ..."),
        "vLLM may pass `y`, which ours does not take",
    ),
    "an overridden method is given less": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    def go(self): ..."),
        "ours requires `x`, which vLLM does not pass",
    ),
    "an overridden method became a property": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    @property\n    def go(self): ..."),
        "was a method, and is a property",
    ),
    "an overridden method became a coroutine": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    async def go(self, x): ..."),
        "became a coroutine",
    ),
    "a method became static": Fault(
        EXTENDS,
        vllm(a="class A:\n    def go(self, x): ..."),
        vllm(a="class A:\n    @staticmethod\n    def go(x): ..."),
        "was a method, and is a staticmethod",
    ),
    "a method of a base is gone": Fault(
        EXTENDS,
        vllm(a="class Base:\n    def go(self, x): ...\nclass A(Base): ..."),
        vllm(a="class Base: ...\nclass A(Base): ..."),
        "has no go",
    ),
    "a base is another one": Fault(
        EXTENDS,
        vllm(a="class Base:\n    def go(self, x): ...\nclass A(Base): ..."),
        vllm(a="class Base:\n    def go(self, x): ...\nclass A: ..."),
        "has no go",
    ),
    "vLLM has a method of our name": Fault(
        "from vllm.a import A\nclass B(A):\n    def ours(self): ...",
        vllm(a="class A: ..."),
        vllm(a="class A:\n    def ours(self, x): ..."),
        "ours of the same name would take its place",
    ),
    "vLLM has an attribute of our name": Fault(
        "from vllm.a import A\nclass B(A):\n    def __init__(self): self.table = 1",
        vllm(a="class A: ..."),
        vllm(a="class A:\n    def __init__(self): self.table = 2"),
        "ours of the same name would take its place",
    ),
    "an attribute is set no more": Fault(
        "from vllm.a import A\nclass B(A):\n    def f(self): return self.rank",
        vllm(a="class A:\n    def __init__(self): self.rank = 1"),
        vllm(a="class A:\n    def __init__(self): self.ranks = 1"),
        "has no rank",
    ),
    "an attribute that we set is gone": Fault(
        "from vllm.a import A\ndef f(a: A): a.step = 1",
        vllm(a="class A:\n    step: int = 0"),
        vllm(a="class A:\n    steps: int = 0"),
        "has no step",
    ),
    "a member of an enumeration is gone": Fault(
        "from vllm.a import E\nE.ON",
        vllm(a="import enum\nclass E(enum.Enum):\n    ON = 1"),
        vllm(a="import enum\nclass E(enum.Enum):\n    OFF = 1"),
        "has no ON",
    ),
    "a field of a dataclass is gone": Fault(
        "from vllm.a import D\nD(x=1)",
        vllm(a="from dataclasses import dataclass\n@dataclass\nclass D:\n    x: int"),
        vllm(a="from dataclasses import dataclass\n@dataclass\nclass D:\n    y: int = 0"),
        "takes no `x`",
    ),
    "a new field of a base is required": Fault(
        "from vllm.a import D\nD(x=1)",
        vllm(a="import msgspec\nclass C(msgspec.Struct): ...\nclass D(C, kw_only=True):\n    x: int"),
        vllm(a="import msgspec\nclass C(msgspec.Struct):\n    y: int\nclass D(C, kw_only=True):\n    x: int"),
        "requires `y`",
    ),
    "an environment variable is gone": Fault(
        "import os\nos.environ['VLLM_CORES']",
        vllm(envs="D = {'VLLM_CORES': 1}\ndef __getattr__(name): ..."),
        vllm(envs="D = {'VLLM_CPUS': 1}\ndef __getattr__(name): ..."),
        "vllm.envs has no VLLM_CORES",
    ),
    "a type is told no more": Fault(
        READS,
        vllm(a=POOL + "class A:\n    def __init__(self, pool: Pool): self.pool = pool"),
        vllm(a=POOL + "class A:\n    def __init__(self, pool): self.pool = pool"),
        "cannot be followed",
    ),
    "what vLLM had is torch's": Fault(
        READS,
        vllm(a=POOL + "class A:\n    pool: Pool"),
        vllm(a="from torch import Pool\nclass A:\n    pool: Pool"),
        "is not vLLM's any more",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_a_new_vllm_breaks_is_told(fault: Fault) -> None:
    assert complaints(fault.ours, fault.before) == []
    found = complaints(fault.ours, fault.after, fault.before)
    assert any(fault.said in each for each in found), found


PATHS = {
    "an annotation": "class A:\n    pool: Pool",
    "a text as annotation": "class A:\n    pool: 'Pool | None' = None",
    "an import for type checkers": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm.b import Pool\n"
    "class A:\n    pool: Pool",
    "what is made in the constructor": "class A:\n    def __init__(self):\n        self.pool = None\n"
    "        self.pool = Pool() if True else None",
    "a parameter of the constructor": "class A:\n    def __init__(self, pool: Pool): self.pool = pool",
    "a variable of the constructor": "class A:\n    def __init__(self):\n        p = Pool()\n        self.pool = p",
    "an attribute of an attribute": "class C:\n    p: Pool\nclass A:\n"
    "    def __init__(self, c: C):\n        self.c = c\n        self.pool = self.c.p",
    "what a function returns": "def make() -> Pool: ...\nclass A:\n    def __init__(self): self.pool = make()",
    "a property": "class A:\n    @property\n    def pool(self) -> Pool: ...",
    "an element": "class A:\n    def __init__(self, all: list[Pool]): self.pool = all[0]",
    "another name of the type": "P = Pool\nclass A:\n    pool: P",
    "a class method of its own": "class A:\n    @classmethod\n    def make(cls) -> 'Self': ...\n    pool: Pool",
}


@pytest.mark.parametrize("way", PATHS.values(), ids=PATHS.keys())
def test_a_type_is_found_by_way_of(way: str) -> None:
    head = "" if "vllm.b" in way else "from vllm.b import Pool\n"
    assert complaints(READS, vllm(a=head + way, b=POOL)) == []
    assert any("has no free" in each for each in complaints(READS, vllm(a=head + way, b=NO_POOL)))


WAYS_OF_OURS = {
    "a parameter": "def f(a: A): a.free(1)",
    "a parameter that may be None": "def f(a: A | None): a and a.free(1)",
    "an element of a parameter": "def f(all: list[A]):\n    for a in all: a.free(1)",
    "a comprehension": "def f(all: dict[str, A]): return [a.free(1) for a in all.values() if a]",
    "a variable": "def f(a: A):\n    b = a\n    b.free(1)",
    "two variables at once": "def f(a: A):\n    b, c = a, 1\n    b.free(1)",
    "what it makes": "def f(): A().free(1)",
    "what its function returns": "def g() -> A: ...\ndef f(): g().free(1)",
    "an attribute of its class": "class C:\n    def __init__(self, a: A): self.a = a\n    def f(self): self.a.free(1)",
    "a method of its class": "class C:\n    def a(self) -> A: ...\n    def f(self): self.a().free(1)",
    "a class within": "def f(x):\n    assert isinstance(x, A)\n    x.free(1)",
    "what it turns out to be": "def f(x): return (x if isinstance(x, A) else A()).free(1)",
    "a closure": "def f(a: A):\n    def g(): return a.free(1)",
    "a lambda": "def f(a: A): return lambda: a.free(1)",
    "itself": "class C(A):\n    def f(self): self.free(1)",
    "its parent": "class C(A): ...\nclass D(C):\n    def f(self): super().free(1)",
    "the class": "def f(a): A.free(a, 1)",
}


@pytest.mark.parametrize("way", WAYS_OF_OURS.values(), ids=WAYS_OF_OURS.keys())
def test_our_code_leans_on_a_method_by_way_of(way: str) -> None:
    ours = f"from vllm.a import A\n{way}"
    assert complaints(ours, vllm(a="class A:\n    def free(self, n): ...")) == []
    assert complaints(ours, vllm(a="class A:\n    def free(self, n, m): ..."))
    assert complaints(ours, vllm(a="class A: ..."))


FINE = {
    "star imports": ("from vllm.b import A", vllm(a="class A: ...", b="from vllm.a import *")),
    "imports that may fail": (
        "from vllm.b import A\nA(1)",
        vllm(a="class A:\n    def __init__(self, n): ...", b="try:\n    from vllm.a import A\nexcept E:\n    A = None"),
    ),
    "definitions under a condition": (
        "from vllm.a import f\nf(1)",
        vllm(a="if X:\n    def f(n): ...\nelse:\n    f = None"),
    ),
    "overloads": (
        "from vllm.a import f\nf(1, 2)",
        vllm(a="@overload\ndef f(n): ...\n@overload\ndef f(n, m, o): ...\ndef f(n, m=1, o=2): ..."),
    ),
    "decorators that we do not know": ("from vllm.a import f\nf(1)", vllm(a="@trace('x')\ndef f(n): ...")),
    "a property with a setter": (
        "from vllm.a import A\ndef f(a: A): a.n = 1",
        vllm(a="class A:\n    @property\n    def n(self): ...\n    @n.setter\n    def n(self, v): ..."),
    ),
    "a class within a class": (
        "from vllm.a import A\nA.B(1)",
        vllm(a="class A:\n    class B:\n        def __init__(self, n): ..."),
    ),
    "a module of a package": ("from vllm import b\nb.f()", vllm(b="def f(): ...")),
    "a package without an __init__": ("from vllm.c.d import f", {**vllm(), "vllm/c/d.py": "def f(): ..."}),
    "imports in a circle": (
        "from vllm.a import f",
        vllm(a="from vllm.b import *\ndef f(): ...", b="from vllm.a import *"),
    ),
    "defaults, and arguments of any number": (
        "from vllm.a import f\nf(1, 2, 3, x=4)",
        vllm(a="def f(n, *r, **k): ..."),
    ),
    "what we pass on": (
        "from vllm.a import A\nclass B(A):\n    def go(self, x, *a, **k): super().go(x, *a, **k)",
        vllm(a="class A:\n    def go(self, x, y, *, z): ..."),
    ),
    "fields without a parameter": (
        "from vllm.a import D\nD(1)",
        vllm(a="@dataclass\nclass D:\n    x: int\n    y: ClassVar[int]\n    z: int = field(init=False)"),
    ),
    "members of what is not vLLM's": (
        "from vllm.a import A\ndef f(a: A): a.tensor.shape[0].item()",
        vllm(a="import torch\nclass A:\n    tensor: torch.Tensor"),
    ),
    "names of our own": (
        "from vllm.a import A\nclass B(A):\n    mine = 1\n    def f(self): return self.mine + self.g()\n"
        "    def g(self): ...",
        vllm(a="class A: ..."),
    ),
}


@pytest.mark.parametrize(("ours", "tree"), FINE.values(), ids=FINE.keys())
def test_nothing_is_said_of(ours: str, tree: Texts) -> None:
    needs = needed(ours)
    assert needs
    assert complaints(ours, tree) == []


def test_what_moved_between_two_versions_is_told() -> None:
    ours = EXTENDS + "\nfrom vllm.a import f, g\nf(1)\ng(1)"
    old = vllm(a="class A:\n    def go(self, x): return 1\ndef f(n): ...\ndef g(n): ...")
    new = vllm(
        a="from vllm.b import f\nclass A:\n    def go(self, x): return 2\n    def stop(self): ...\ndef g(n, m=1): ...",
        b="def f(n): ...",
    )
    needs = needed(ours)
    found = {(each.path, each.what) for each in moved(needs, look(old, needs), look(new, needs))}
    assert found == {
        ("vllm.a:A().*", "got the methods stop"),
        ("vllm.a:A().go", "does something else: read it"),
        ("vllm.a:f", "moved from vllm.a:f to vllm.b:f"),
        ("vllm.a:g", "takes `m`, too"),
    }


def test_comments_and_docstrings_are_no_change() -> None:
    needs = needed(EXTENDS)
    old = vllm(a="class A:\n    def go(self, x):\n        '''One.'''\n        return x")
    new = vllm(a="class A:\n    def go(self, x):\n        '''Two.'''\n\n        return  x  # three")
    assert moved(needs, look(old, needs), look(new, needs)) == []
