"""The plugin's own classes and functions, as far as they lead to vLLM's: bases, annotations, results. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_adrenaline.seams.source import Binding, Function, Module, Tree, Value, kind_of, name_of

Path = str
ROOT = "vllm_adrenaline"
VLLM = ("vllm.", "vllm:")
PASSED_ON = {
    "list",
    "tuple",
    "Sequence",
    "Iterable",
    "Iterator",
    "Collection",
    "deque",
    "set",
    "frozenset",
    "dict",
    "Mapping",
}
BETWEEN = "\n"
"""What stands between the paths of a tuple's parts, in the path of the tuple."""
GIVES_ALL, GIVES_ONE = {"values", "copy"}, {"get", "pop", "popleft", "setdefault"}
"""Methods of containers that give all elements, and one."""
OPTIONAL = {"Optional", "ClassVar", "Final"}


@dataclass(frozen=True)
class OurClass:
    """A class of ours.

    Attributes:
        module: that defines it.
        node: its definition.
        parents: paths of its bases, those that are ours or vLLM's.
        foreign: the path of vLLM's class that it is one of, if it is.
    """

    module: Module
    node: ast.ClassDef
    parents: tuple[Path, ...]
    foreign: Path | None

    @property
    def path(self) -> Path:
        """Where it is defined."""
        return f"{self.module.name}:{self.node.name}"


def tuple_of(parts: Iterable[Path | None]) -> Path | None:
    """Return the path of a tuple; None if nothing is known of any part."""
    found = [part or "" for part in parts]
    return BETWEEN.join(found) if any(found) else None


class Ours:
    """All modules of the plugin.

    Attributes:
        modules: them.
        classes: the classes at their top, by path.
    """

    def __init__(self, tree: Tree) -> None:
        found = [tree.module(name_of(file)) for file in tree.files]
        self.modules = [each for each in found if each is not None]
        self._by_name = {each.name: each for each in self.modules}
        self.classes: dict[Path, OurClass] = {}
        self._globals: dict[tuple[str, str], Path | None] = {}
        for module in self.modules:
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef):
                    self._add(module, node)

    def _add(self, module: Module, node: ast.ClassDef) -> OurClass:
        path = f"{module.name}:{node.name}"
        if path not in self.classes:
            bases = [self._of_expression(module, each) for each in node.bases]
            parents = tuple(each for each in bases if each is not None)
            # What is named itself first: the other one may be a base of it, as vLLM's GPU worker is of its CPU worker.
            foreign = next((parent for parent in parents if parent.startswith(VLLM)), None)
            for parent in parents:
                if foreign is None and (known := self._class(parent)):
                    foreign = known.foreign
            self.classes[path] = OurClass(module, node, parents, foreign)
        return self.classes[path]

    def _class(self, path: Path) -> OurClass | None:
        if path in self.classes:
            return self.classes[path]
        module, _, name = path.partition(":")
        owner = self._by_name.get(module)
        node = owner.names.get(name) if owner is not None else None
        return self._add(owner, node) if owner is not None and isinstance(node, ast.ClassDef) else None

    def mixins(self, ours: OurClass) -> list[OurClass]:
        """Return the bases of a class of vLLM's that are none of its themselves: what they have comes before vLLM's."""
        found = [self._class(parent) for parent in ours.parents]
        return [each for each in found if each is not None and each.foreign != ours.foreign]

    # Names

    def imported(self, module: Module, node: ast.Import | ast.ImportFrom) -> dict[str, Path]:
        """Return the paths of what an import binds, of vLLM's and ours."""
        found = {}
        for alias in node.names:
            if isinstance(node, ast.Import):
                source, name = (alias.name, "") if alias.asname else (alias.name.split(".")[0], "")
            else:
                source, name = module.absolute(node), alias.name
            if source.split(".")[0] not in ("vllm", ROOT):
                continue
            if f"{source}.{name}" in self._by_name:
                source, name = f"{source}.{name}", ""
            found[alias.asname or alias.name.split(".")[0]] = f"{source}:{name}"
        return found

    def global_path(self, module: Module, name: str) -> Path | None:
        """Return the path of what a name stands for that is bound at the top of a module."""
        key = module.name, name
        if key not in self._globals:
            self._globals[key] = None  # of a name that leads back to itself
            self._globals[key] = self._global_path(module, name)
        return self._globals[key]

    def _global_path(self, module: Module, name: str) -> Path | None:
        binding = module.names.get(name)
        if isinstance(binding, ast.ClassDef | ast.FunctionDef):
            return f"{module.name}:{name}"
        for node in module.tree.body:
            inner = node.body if isinstance(node, ast.If) else [node]
            for each in inner:
                if isinstance(each, ast.Import | ast.ImportFrom):
                    found = self.imported(module, each)
                    if name in found:
                        return found[name]
        if isinstance(binding, Value) and binding.annotation is not None:
            return self.of_annotation(module, binding.annotation)
        if isinstance(binding, Value) and isinstance(binding.value, ast.Attribute):
            return self._of_expression(module, binding.value)
        return None

    def _of_expression(self, module: Module, node: ast.expr) -> Path | None:
        if isinstance(node, ast.Name):
            return self.global_path(module, node.id)
        if isinstance(node, ast.Attribute):
            inner = self._of_expression(module, node.value)
            return self.attribute(inner, node.attr)[0] if inner else None
        if isinstance(node, ast.Subscript):
            return self._of_expression(module, node.value)
        return None

    def of_annotation(self, module: Module, node: ast.expr | None) -> Path | None:
        """Return the path of what has this annotation, of vLLM's or ours; with "*" at its end, what contains such."""
        if node is None:
            return None
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.of_annotation(module, ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.BinOp):
            return self.of_annotation(module, node.left) or self.of_annotation(module, node.right)
        if isinstance(node, ast.Subscript):
            name = ast.unparse(node.value).split(".")[-1]
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if name == "type":
                return self._of_expression(module, parts[0])
            if name in OPTIONAL:
                return self.of_annotation(module, parts[0])
            if name == "tuple" and len(parts) > 1 and not isinstance(parts[1], ast.Constant):
                return tuple_of(self.of_annotation(module, each) for each in parts)
            if name in PASSED_ON:
                inner = self.of_annotation(module, parts[-1])
                return f"{inner}*" if inner else None
            return self.of_annotation(module, node.value)
        path = self._of_expression(module, node)
        return f"{path}()" if path else None

    # Members

    def attribute(self, inner: Path, name: str) -> tuple[Path | None, bool]:
        """Return the path of a member of what is at `inner`, and whether it is ours."""
        if BETWEEN in inner:
            return None, True
        if inner.endswith("*"):
            return (f"{inner}.{name}" if name in GIVES_ALL | GIVES_ONE else None), True
        if inner.startswith(VLLM):
            dot = "" if inner.endswith(":") else "."
            return f"{inner}{dot}{name}", False
        module, _, rest = inner.partition(":")
        if not rest:
            owner = self._by_name.get(module)
            return (self.global_path(owner, name) if owner is not None else None), True
        known = self._class(inner.removesuffix("()"))
        if known is None:
            return None, True
        for each in self._chain(known):
            bindings = each.module.members(each.node).get(name)
            if bindings is None:
                continue
            first = bindings[0]
            if isinstance(first, Function):
                return f"{each.path}.{name}", True
            for binding in bindings:
                if isinstance(binding, Value) and binding.annotation is not None:
                    return self.of_annotation(each.module, binding.annotation), True
            return self._assigned(each, bindings), True
        return (f"{known.foreign}().{name}", False) if known.foreign is not None else (None, True)

    def _assigned(self, known: OurClass, bindings: Sequence[Binding]) -> Path | None:
        """Return the path of what is assigned to an attribute: an object that is made there, or a parameter."""
        for binding in bindings:
            if not isinstance(binding, Value) or binding.value is None:
                continue
            value = binding.value
            if isinstance(value, ast.Call):
                function = value.func
                if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "self":
                    path = self.attribute(f"{known.path}()", function.attr)[0]
                else:
                    path = self._of_expression(known.module, function)
                if path is not None:
                    return self.result(path)
            if isinstance(value, ast.Name) and binding.scope is not None:
                arguments = binding.scope.args
                for each in (*arguments.args, *arguments.kwonlyargs):
                    if each.arg == value.id:
                        return self.of_annotation(known.module, each.annotation)
        return None

    def _chain(self, known: OurClass) -> list[OurClass]:
        """Return a class of ours and those of ours that it inherits from, nearest first."""
        found = [known]
        for parent in known.parents:
            if not parent.startswith(VLLM) and (other := self._class(parent)):
                found += self._chain(other)
        return found

    def of_parents(self, known: OurClass, name: str) -> Path | None:
        """Return the path of what `super().name` is in a class, if it is vLLM's."""
        for each in self._chain(known)[1:]:
            if name in each.module.members(each.node):
                return None
        return f"{known.foreign}().{name}" if known.foreign is not None else None

    def parts(self, path: Path | None, count: int) -> list[Path | None]:
        """Return the paths of what is at `path` when it is taken apart into `count`."""
        if path is not None and BETWEEN in path and not path.endswith("*"):
            return [part or None for part in path.split(BETWEEN)]
        return [self.element(path) if path else None] * count

    def element(self, path: Path) -> Path | None:
        """Return the path of an element of what is at `path`."""
        if path.endswith("*"):
            return path.removesuffix("*")
        if BETWEEN in path:
            return None
        return f"{path}[]" if path.startswith(VLLM) else None

    def result(self, path: Path) -> Path | None:
        """Return the path of what a call of what is at `path` gives."""
        if BETWEEN in path:
            return None
        container, star, method = path.partition("*.")
        if star:
            return f"{container}*" if method in GIVES_ALL else container
        if path.startswith(VLLM):
            return f"{path}()"
        module, _, rest = path.partition(":")
        if path in self.classes:
            return f"{path}()"
        owner = self._by_name.get(module)
        name, _, member = rest.partition(".")
        node: object = owner.names.get(name) if owner is not None else None
        if member and owner is not None and isinstance(node, ast.ClassDef):
            node = owner.members(node).get(member, [None])[0]
        if owner is None or not isinstance(node, Function) or kind_of(node) == "property":
            return None
        return self.of_annotation(owner, node.returns)
