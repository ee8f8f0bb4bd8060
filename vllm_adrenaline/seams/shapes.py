"""What is recorded of a thing: its kind, where it is defined, and its signature. Pure."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

from vllm_adrenaline.seams import source
from vllm_adrenaline.seams.signature import signature_of
from vllm_adrenaline.seams.source import Function, Value, digest, names_of
from vllm_adrenaline.seams.things import (
    ClassThing,
    Container,
    Fact,
    FunctionThing,
    ModuleThing,
    Outside,
    Thing,
    ValueThing,
)

FIELDS = {"dataclass", "config"}
"""Decorators that make a constructor of a class's annotations: Python's, and vLLM's own (vllm/config/utils.py)."""
STRUCTS = {"Struct", "NamedTuple", "BaseModel", "TypedDict"}
"""Bases that do the same."""

Bases = Callable[[ClassThing], Iterable[ClassThing]]


def fact_of(path: str, thing: Thing, bases: Bases) -> Fact | None:
    """Return what is recorded of what is at `path`; None if it is not vLLM's."""
    if isinstance(thing, ModuleThing):
        return Fact(path, "module", thing.module.name)
    if isinstance(thing, ClassThing):
        return Fact(path, "class", thing.home, constructor(thing, bases))
    if isinstance(thing, FunctionThing):
        kind = kind_of(thing)
        bound = thing.owner is not None and (kind == "classmethod" or (kind == "method" and thing.owner.instance))
        if kind == "property":
            shape = ast.unparse(thing.node.returns) if thing.node.returns is not None else ""
        else:
            returns = signature_of(thing.node.args, thing.node.returns, bound).text
            shape = f"async {returns}" if isinstance(thing.node, ast.AsyncFunctionDef) else returns
        return Fact(path, kind, thing.home, shape, digest(thing.node))
    if isinstance(thing, ValueThing):
        annotation = thing.value.annotation
        return Fact(path, "attribute", thing.home, ast.unparse(annotation) if annotation is not None else "")
    assert isinstance(thing, Container | Outside)
    return None


def members_of(path: str, thing: Thing, bases: Bases) -> Fact | None:
    """Return the names of all methods of a class, as one fact."""
    if not isinstance(thing, ClassThing):
        return None
    names = {
        name
        for each in bases(thing)
        for name, bindings in each.module.members(each.node).items()
        if isinstance(bindings[0], Function)
    }
    return Fact(path, "methods", thing.home, " ".join(sorted(names)))


def kind_of(thing: FunctionThing) -> str:
    """Return whether a definition is a function, a method, or what its decorators make of it."""
    kind = source.kind_of(thing.node)
    return "function" if kind == "method" and thing.owner is None else kind


def constructor(thing: ClassThing, bases: Bases) -> str:
    """Return the signature with which a class is called; "" if it cannot be read.

    It is that of `__init__` or `__new__` of the nearest class that has one, or is made of the fields.
    """
    chain = list(bases(thing))
    for index, each in enumerate(chain):
        members = each.module.members(each.node)
        for name in ("__init__", "__new__"):
            if name in members and isinstance(members[name][0], Function):
                definition = members[name][0]
                assert isinstance(definition, Function)
                return signature_of(definition.args, None, drop_first=True).text
        if _makes_fields(each) or any(_makes_fields(other) and _is_struct(other) for other in chain[index:]):
            return _of_fields(chain[index:])
    return ""


def _is_struct(thing: ClassThing) -> bool:
    return bool(STRUCTS & {ast.unparse(each).split(".")[-1] for each in thing.node.bases})


def _makes_fields(thing: ClassThing) -> bool:
    return bool(FIELDS & set(names_of(thing.node))) or _is_struct(thing)


def _of_fields(chain: list[ClassThing]) -> str:
    plain: dict[str, str] = {}
    named: dict[str, str] = {}
    for each in reversed(chain):
        options = [
            *each.node.keywords,
            *(k for d in each.node.decorator_list if isinstance(d, ast.Call) for k in d.keywords),
        ]
        only_named = any(k.arg == "kw_only" and isinstance(k.value, ast.Constant) and k.value.value for k in options)
        for name, binding, _ in each.module.bindings(each.node.body):
            if not isinstance(binding, Value) or binding.annotation is None or name.startswith("__"):
                continue
            annotation = ast.unparse(binding.annotation)
            if "ClassVar" in annotation or _is_left_out(binding.value):
                continue
            target = named if only_named or name in named else plain
            target[name] = _default(binding.value)
    written = [f"{name}{default}" for name, default in plain.items() if not default]
    written += [f"{name}{default}" for name, default in plain.items() if default]
    if named:
        written += ["*", *(f"{name}{default}" for name, default in named.items())]
    return f"({', '.join(written)})"


def _is_left_out(value: ast.expr | None) -> bool:
    """Whether a field is no parameter: field(init=False)."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(k.arg == "init" and ast.unparse(k.value) == "False" for k in keywords)


def _default(value: ast.expr | None) -> str:
    """Return the default of a field as it is written in a signature; "" if it has none."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in ("field", "Field"):
        given = {k.arg for k in value.keywords}
        return "=..." if value.args or given & {"default", "default_factory"} else ""
    return f"={ast.unparse(value)}"
