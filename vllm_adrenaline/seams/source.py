"""Modules of a source tree, by syntax alone: which names they bind, and what their classes have as members. Pure."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """A name that is imported. `name` is None where it stands for the module itself."""

    module: str
    name: str | None


@dataclass(frozen=True)
class Value:
    """A name that is assigned, or only annotated. `scope` is the method in which that happens to an attribute."""

    annotation: ast.expr | None
    value: ast.expr | None
    scope: Function | None = None


Binding = ast.ClassDef | Function | Import | Value


def names_of(node: ast.ClassDef | Function) -> list[str]:
    """Return what decorates a definition: the last part of each decorator's name."""
    found = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return [ast.unparse(each).split(".")[-1] for each in found]


def kind_of(node: Function) -> str:
    """Return what a definition is in a class, by its decorators: staticmethod, classmethod, property or method."""
    decorators = names_of(node)
    if "cached_property" in decorators:
        return "property"
    return next((kind for kind in ("staticmethod", "classmethod", "property") if kind in decorators), "method")


def name_of(path: str) -> str:
    """Return the dotted name of the module in a file of a tree."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_type_checking(test: ast.expr) -> bool:
    """Whether a condition is true for type checkers only."""
    return ast.unparse(test).split(".")[-1] == "TYPE_CHECKING"


def is_none(binding: Binding) -> bool:
    """Whether a name is bound to None, which stands for what could not be imported."""
    return isinstance(binding, Value) and isinstance(binding.value, ast.Constant) and binding.value.value is None


def branches(node: ast.stmt) -> Iterator[tuple[list[ast.stmt], bool]]:
    """Yield the bodies of a statement that share the scope around it, and whether they are for type checkers only."""
    typing = isinstance(node, ast.If) and is_type_checking(node.test)
    yield getattr(node, "body", []), typing
    for handler in getattr(node, "handlers", []):
        yield handler.body, False
    for name in ("orelse", "finalbody"):
        yield getattr(node, name, []), False


@dataclass(frozen=True, eq=False)
class Module:
    """A module of the tree. `name` is its dotted name; `is_package`, whether it is an `__init__.py`."""

    name: str
    is_package: bool
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The module's syntax tree."""
        return ast.parse(self.text)

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the dotted name of the module from which `node` imports."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def relative(self, name: str) -> str:
        """Return the dotted name of a module that is named as in `import_module(name, package)`."""
        if not name.startswith("."):
            return name
        node = ast.ImportFrom(name.lstrip(".") or None, [], len(name) - len(name.lstrip(".")))
        return self.absolute(node)

    def bindings(self, body: Sequence[ast.stmt], typing: bool = False) -> Iterator[tuple[str, Binding, bool]]:
        """Yield each name that `body` binds, what it is bound to, and whether that is for type checkers only."""
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node, typing
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    target = alias.name if alias.asname else alias.name.split(".")[0]
                    yield alias.asname or target, Import(target, None), typing
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield alias.asname or alias.name, Import(self.absolute(node), alias.name), typing
            elif isinstance(node, ast.Assign):
                for left in node.targets:
                    for each in ast.walk(left):
                        if isinstance(each, ast.Name):
                            yield each.id, Value(None, node.value if each is left else None), typing
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, Value(node.annotation, node.value), typing
            elif isinstance(node, ast.If | ast.Try | ast.With):
                for inner, only_typing in branches(node):
                    yield from self.bindings(inner, typing or only_typing)

    @cached_property
    def names(self) -> dict[str, Binding]:
        """What the module's names are bound to while it runs, and for type checkers where that is all there is."""
        found: dict[str, list[tuple[Binding, bool]]] = defaultdict(list)
        for name, binding, typing in self.bindings(self.tree.body):
            found[name].append((binding, typing))
        return {name: chosen([b for b, t in each if not t] or [b for b, _ in each]) for name, each in found.items()}

    @cached_property
    def only_typing(self) -> set[str]:
        """Names that nothing binds while the module runs, but perhaps its `__getattr__`."""
        bound = list(self.bindings(self.tree.body))
        return {name for name, _, _ in bound} - {name for name, _, typing in bound if not typing}

    @cached_property
    def stars(self) -> list[str]:
        """Modules of which all public names are imported."""
        return [b.module for n, b, _ in self.bindings(self.tree.body) if n == "*" and isinstance(b, Import)]

    @cached_property
    def lazy(self) -> dict[str, str]:
        """Names that `__getattr__` may answer for: the keys of the module's dictionaries, with string values if any."""
        if "__getattr__" not in self.names:
            return {}
        found = {}
        for node in ast.walk(self.tree):
            for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    text = value.value if isinstance(value, ast.Constant) else ""
                    found[key.value] = text if isinstance(text, str) else ""
            if isinstance(node, ast.Compare) and ast.unparse(node.left) == "name":
                found |= {str(each.value): "" for each in node.comparators if isinstance(each, ast.Constant)}
        return found

    @cached_property
    def _members(self) -> dict[ast.ClassDef, dict[str, list[Binding]]]:
        return {}

    def members(self, node: ast.ClassDef) -> dict[str, list[Binding]]:
        """Return what a class of this module binds itself, in its body or in its methods to their `self`.

        The first binding of each name is the one that says most; then come all.
        """
        if node not in self._members:
            self._members[node] = self._members_of(node)
        return self._members[node]

    def _members_of(self, node: ast.ClassDef) -> dict[str, list[Binding]]:
        found: dict[str, list[Binding]] = defaultdict(list)
        for name, binding, _ in self.bindings(node.body):
            found[name].append(binding)
        for method in [each for each in ast.walk(node) if isinstance(each, Function)]:
            first = [*method.args.posonlyargs, *method.args.args][:1]
            if not first or "staticmethod" in names_of(method):
                continue
            for name, binding in _set_on(first[0].arg, method):
                found[name].append(binding)
        return {name: [chosen(each), *each] for name, each in found.items()}


def _set_on(me: str, method: Function) -> Iterator[tuple[str, Value]]:
    for node in ast.walk(method):
        if isinstance(node, ast.AnnAssign) and _is_of(node.target, me):
            assert isinstance(node.target, ast.Attribute)
            yield node.target.attr, Value(node.annotation, node.value, method)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_of(node, me):
            yield node.attr, Value(None, None, method)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if _is_of(target, me):
                    assert isinstance(target, ast.Attribute)
                    yield target.attr, Value(None, node.value, method)


def _is_of(node: ast.expr, me: str) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me


def chosen(bindings: Sequence[Binding]) -> Binding:
    """Return the binding that says most of several of one name.

    That is a definition rather than an import, and that rather than an assignment. Of overloads it is the last, and of
    a property its getter. What stands for something missing (None) says least.
    """

    def worth(binding: Binding) -> int:
        if isinstance(binding, Function):
            return 0 if {"overload", "setter", "deleter"} & set(names_of(binding)) else 4
        if isinstance(binding, ast.ClassDef):
            return 4
        if isinstance(binding, Import):
            return 3
        return 0 if is_none(binding) else 2 if binding.annotation is not None else 1

    return max(bindings, key=worth)


def digest(node: ast.ClassDef | Function) -> str:
    """Return a short digest of what a definition does: not of its docstring, comments or layout."""
    body = node.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    text = "\n".join(map(ast.unparse, body))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Tree:
    """The modules of a source tree.

    Attributes:
        files: the text of each file by its path, such as "vllm/v1/request.py". May read them when they are asked for.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return a module by its dotted name; None if there is none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            found = None
            for file, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
                if file in self.files:
                    found = Module(name, is_package, self.files[file])
            self._modules[name] = found
        return self._modules[name]
