"""What names stand for in a source tree: re-exports, lazy modules, members of classes and of their bases. Pure."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from vllm_adrenaline.seams.source import Import, Module, Tree, Value
from vllm_adrenaline.seams.things import ClassThing, FunctionThing, ModuleThing, Outside, Thing, ValueThing


class Gone(Exception):
    """There is nothing of the name that the message says."""


class Names:
    """The names of one tree.

    Attributes:
        tree: the tree.
        attached: what objects get that their classes do not have, by class and name (declared.ATTACHED).
    """

    def __init__(self, tree: Tree, attached: Collection[str] = ()) -> None:
        self.tree, self.attached = tree, attached

    def of_module(self, module: Module, name: str, seen: frozenset[str] = frozenset()) -> Thing:
        """Return what a module's name stands for, whichever module defines it. Raises Gone."""
        binding = module.names.get(name)
        if binding is None or (name in module.only_typing and name not in module.lazy):
            return self._hidden(module, name, seen)
        if isinstance(binding, Import):
            return self.imported(module, binding, seen)
        if isinstance(binding, ast.ClassDef):
            return ClassThing(module, name, binding)
        if isinstance(binding, Value):
            return ValueThing(module, name, binding)
        return FunctionThing(module, name, binding)

    def _hidden(self, module: Module, name: str, seen: frozenset[str]) -> Thing:
        """Return what a name stands for that no statement of a module binds."""
        submodule = self.tree.module(f"{module.name}.{name}")
        if submodule is not None:
            return ModuleThing(submodule)
        for star in module.stars:
            other = self.tree.module(star)
            if other is not None and f"{star}:*" not in seen:
                try:
                    return self.of_module(other, name, seen | {f"{star}:*"})
                except Gone:
                    continue
        if name in module.lazy:
            target, _, attribute = module.lazy[name].rpartition(":")
            if target:
                return self.imported(module, Import(module.relative(target), attribute), seen)
            return ValueThing(module, name, Value(None, None))
        raise Gone(f"{module.name} has no {name}")

    def imported(self, module: Module, binding: Import, seen: frozenset[str] = frozenset()) -> Thing:
        """Return what an import in a module brings. Raises Gone."""
        if binding.module.split(".")[0] != module.name.split(".")[0]:
            return Outside(binding.module)
        if f"{binding.module}:{binding.name}" in seen:
            raise Gone(f"{binding.module} imports {binding.name} from itself")
        other = self.tree.module(binding.module)
        if other is None:
            found = self.tree.module(f"{binding.module}.{binding.name}")  # in a folder without an __init__.py
            if found is None:
                raise Gone(f"{module.name} imports from {binding.module}, which is not there")
            return ModuleThing(found)
        if binding.name is None:
            return ModuleThing(other)
        return self.of_module(other, binding.name, seen | {f"{binding.module}:{binding.name}"})

    def bases(self, thing: ClassThing) -> Iterator[ClassThing]:
        """Yield a class and all of vLLM's that it inherits from, nearest first."""
        yield thing
        for node in thing.node.bases:
            found = self._base(node.value if isinstance(node, ast.Subscript) else node, thing.module)
            if isinstance(found, ClassThing) and found.home != thing.home:
                yield from self.bases(found)

    def _base(self, node: ast.expr, module: Module) -> Thing | None:
        try:
            if isinstance(node, ast.Name):
                return self.of_module(module, node.id)
            if isinstance(node, ast.Attribute):
                inner = self._base(node.value, module)
                if isinstance(inner, ModuleThing):
                    return self.of_module(inner.module, node.attr)
                return self.member(inner, node.attr) if isinstance(inner, ClassThing) else None
        except Gone:
            pass
        return None

    def member(self, thing: ClassThing, name: str) -> Thing:
        """Return a member of a class, or of an object of it, whichever base has it. Raises Gone."""
        for each in self.bases(thing):
            bindings = each.module.members(each.node).get(name)
            if bindings:
                qualname, binding = f"{each.name}.{name}", bindings[0]
                owner = ClassThing(each.module, each.name, each.node, thing.instance)
                if isinstance(binding, Value):
                    return ValueThing(each.module, qualname, binding, owner)
                if isinstance(binding, ast.ClassDef):
                    return ClassThing(each.module, qualname, binding)
                if isinstance(binding, Import):
                    return self.imported(each.module, binding)
                return FunctionThing(each.module, qualname, binding, owner)
        if any(f"{each.home}.{name}" in self.attached for each in self.bases(thing)):
            return Outside("attached")
        raise Gone(f"{thing.home} has no {name}")
