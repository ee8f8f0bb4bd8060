"""Following a path through a source tree, by names, annotations, and what constructors assign. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_adrenaline.seams.names import Gone, Names
from vllm_adrenaline.seams.shapes import fact_of, kind_of, members_of
from vllm_adrenaline.seams.source import Function, Import, Module, Tree, Value, name_of
from vllm_adrenaline.seams.things import (
    ClassThing,
    Container,
    Fact,
    FunctionThing,
    Missing,
    ModuleThing,
    Outside,
    Thing,
    ValueThing,
)

STEP = re.compile(r"\.?(\w+|\(\)|\[\])")
LISTS = {"list", "tuple", "set", "frozenset", "deque", "Sequence", "Iterable", "Iterator", "Collection", "Generator"}
DICTIONARIES = {"dict", "defaultdict", "OrderedDict", "Mapping", "MutableMapping"}
TRANSPARENT = {"Optional", "ClassVar", "Final", "Annotated", "Required", "NotRequired", "SkipValidation", "InitVar"}
DEPTH = 24
"""How many assignments are followed one after the other, at most."""


class _Unknown(Exception):
    """What `args[0]` says has no type that can be read."""


@dataclass(frozen=True)
class Scope:
    """Where an expression stands: in a module, perhaps in a function there, and that perhaps in the class `owner`."""

    module: Module
    function: Function | None = None
    owner: ClassThing | None = None


class Lookup:
    """Looks up paths in one tree.

    Attributes:
        names: of the tree.
        types: what vLLM does not say itself (declared.TYPES).
    """

    def __init__(self, tree: Tree, types: Mapping[str, str], attached: Collection[str] = ()) -> None:
        self.tree, self.types, self.names = tree, types, Names(tree, attached)

    def facts(self, paths: Iterable[str]) -> dict[str, Fact | Missing | None]:
        """Return what there is at each of these paths."""
        return {path: self.fact(path) for path in sorted(set(paths))}

    def fact(self, path: str) -> Fact | Missing | None:
        """Return what there is at a path, or why there is nothing; None where it leads out of vLLM."""
        module, _, rest = path.partition(":")
        try:
            if "~" in rest:
                return self._text(path, module, rest.removeprefix("~"))
            if rest.endswith(".*"):
                return members_of(path, self._thing(module, rest.removesuffix(".*")), self.names.bases)
            return fact_of(path, self._thing(module, rest), self.names.bases)
        except Gone as gone:
            if rest.endswith("().__init__"):  # which may be made of the fields
                made = self.fact(path.removesuffix("().__init__"))
                return Fact(path, "method", made.home, made.shape) if isinstance(made, Fact) else made
            return Missing(True, str(gone))
        except (_Unknown, RecursionError) as unknown:
            return Missing(False, str(unknown))

    def _text(self, path: str, name: str, text: str) -> Fact:
        module = self.tree.module(name)
        if module is None:
            raise Gone(f"there is no module {name}")
        if text not in module.text:
            raise Gone(f"{name} does not contain {text}")
        return Fact(path, "text", name)

    def elsewhere(self, path: str) -> list[str]:
        """Return other modules that define what a path begins with. Reads the whole tree."""
        module, _, rest = path.partition(":")
        name = re.split(r"\W", rest)[0]
        if not name:
            return []
        defines = re.compile(rf"^(?:class|def|async def) {name}\b|^{name}\b.*=", re.MULTILINE)
        found = (file for file, text in self.tree.files.items() if name in text and defines.search(text))
        return sorted(each for each in map(name_of, found) if each != module)

    def _thing(self, module: str, rest: str) -> Thing:
        found = self.tree.module(module)
        if found is None:
            raise Gone(f"there is no module {module}")
        thing: Thing = ModuleThing(found)
        for step in STEP.findall(rest):
            if isinstance(thing, Outside):
                return thing
            thing = self.step(thing, step)
        return thing

    # Steps

    def step(self, thing: Thing, step: str) -> Thing:
        """Return what a step leads to: the name of a member, "()" or "[]"."""
        if isinstance(thing, ModuleThing):
            return self.names.of_module(thing.module, step)
        if isinstance(thing, FunctionThing) and step == "()":
            return self._typed(thing, f"{thing.home}()", 0)
        if isinstance(thing, FunctionThing) and kind_of(thing) != "property":
            return Outside("a function")
        if isinstance(thing, ClassThing) and step == "()":
            return thing.object
        if isinstance(thing, FunctionThing | ValueThing):
            if step == "[]" and f"{thing.home}[]" in self.types:
                return self._declared(self.types[f"{thing.home}[]"])
            return self.step(self._typed(thing, thing.home, 0), step)
        if isinstance(thing, ClassThing):
            return self.names.member(thing, step) if step != "[]" else self._element(thing)
        if isinstance(thing, Container):
            if step == "[]":
                return self._of_annotation(thing.element, Scope(thing.module))
            if step in ("values", "copy", "()"):
                return thing
        return Outside(type(thing).__name__)

    def _element(self, thing: ClassThing) -> Thing:
        try:
            return self.step(self.names.member(thing, "__getitem__"), "()")
        except Gone:
            return self.step(self.step(self.names.member(thing, "__iter__"), "()"), "[]")

    # Types

    def _declared(self, path: str) -> Thing:
        if not path:
            return Outside("data")
        module, _, rest = path.partition(":")
        return self._thing(module, f"{rest}()")

    def _typed(self, thing: FunctionThing | ValueThing, home: str, depth: int) -> Thing:
        """Return what a function returns, or what a variable has as its value."""
        if home in self.types:
            return self._declared(self.types[home])
        if depth > DEPTH:
            raise _Unknown(f"{home} has no type that can be read")
        scope = Scope(thing.module, None, thing.owner)
        if isinstance(thing, FunctionThing):
            if thing.node.returns is None:
                raise _Unknown(f"{home} does not say what it returns")
            return self._of_annotation(thing.node.returns, scope)
        values = [thing.value]
        if thing.owner is not None:
            members = thing.owner.module.members(thing.owner.node)[thing.name.split(".")[-1]]
            values += [each for each in members if isinstance(each, Value)]
        found: list[Thing] = []
        error: Exception | None = None
        for each in values:
            try:
                if each.annotation is not None:
                    return self._of_annotation(each.annotation, scope)
                if each.value is not None:
                    within = Scope(thing.module, each.scope, thing.owner)
                    found.append(self._of_value(each.value, within, depth + 1))
            except (_Unknown, Gone) as missing:
                error = missing
        if all(isinstance(each, Outside) for each in found) and (error is not None or not found):
            raise _Unknown(f"{home} has no type that can be read" + (f": {error}" if error else ""))
        return _first(found)

    def _of_annotation(self, node: ast.expr, scope: Scope) -> Thing:
        """Return what a value with this annotation is."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return self._of_annotation(ast.parse(node.value, mode="eval").body, scope)
            return Outside("None")
        if isinstance(node, ast.BinOp):
            return _first([self._of_annotation(each, scope) for each in (node.left, node.right)])
        if isinstance(node, ast.Subscript):
            return self._of_generic(node, scope)
        name = ast.unparse(node).split(".")[-1]
        if name == "Self" and scope.owner is not None:
            return scope.owner.object
        if name in ("Any", "object"):
            raise _Unknown(f"{scope.module.name} says `{name}`")
        if isinstance(node, ast.Name) and node.id not in scope.module.names:
            return Outside(node.id)
        found = self._of_value(node, Scope(scope.module), 0, for_types=True)
        if isinstance(found, ClassThing):
            return found.object
        if isinstance(found, ValueThing) and found.value.value is not None:
            return self._of_annotation(found.value.value, Scope(found.module))  # another name for a type
        return found

    def _of_generic(self, node: ast.Subscript, scope: Scope) -> Thing:
        """Return what a value is whose annotation has brackets."""
        name = ast.unparse(node.value).split(".")[-1]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name in LISTS:
            return Container(scope.module, parts[0])
        if name in DICTIONARIES:
            return Container(scope.module, parts[-1])
        if name in TRANSPARENT:
            return self._of_annotation(parts[0], scope)
        if name == "Union":
            return _first([self._of_annotation(each, scope) for each in parts])
        if name == "type":
            found = self._of_annotation(parts[0], scope)
            return ClassThing(found.module, found.name, found.node) if isinstance(found, ClassThing) else found
        return self._of_annotation(node.value, scope)

    def _of_value(self, node: ast.expr, scope: Scope, depth: int, for_types: bool = False) -> Thing:
        """Return what an expression is. `for_types`: names count that are imported for type checkers only."""
        if depth > DEPTH:
            raise _Unknown(f"{scope.module.name}: {ast.unparse(node)} has no type that can be read")
        if isinstance(node, ast.Name):
            local = self._local(node.id, scope, depth)
            if local is not None:
                return local
            binding = scope.module.names.get(node.id)
            if for_types and isinstance(binding, Import):
                return self.names.imported(scope.module, binding)
            if binding is None and not scope.module.stars:
                return Outside(node.id)
            return self.names.of_module(scope.module, node.id)
        if isinstance(node, ast.Attribute):
            return self._then(self._of_value(node.value, scope, depth + 1, for_types), node.attr)
        if isinstance(node, ast.Call):
            return self._then(self._of_value(node.func, scope, depth + 1), "()")
        if isinstance(node, ast.Subscript):
            return self._then(self._of_value(node.value, scope, depth + 1), "[]")
        if isinstance(node, ast.IfExp | ast.BoolOp):
            parts = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            return _first([self._of_value(each, scope, depth + 1) for each in parts])
        return Outside(type(node).__name__)

    def _then(self, thing: Thing, step: str) -> Thing:
        return thing if isinstance(thing, Outside) else self.step(thing, step)

    def _local(self, name: str, scope: Scope, depth: int) -> Thing | None:
        """Return what a name is within a function: a parameter, or what is assigned to it there; None for neither."""
        if scope.function is None:
            return None
        arguments = scope.function.args
        for index, each in enumerate([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]):
            if each.arg == name:
                if index == 0 and scope.owner is not None:
                    return scope.owner.object
                if each.annotation is None:
                    raise _Unknown(f"{scope.module.name}, {scope.function.name}, does not annotate {name}")
                return self._of_annotation(each.annotation, scope)
        for node in ast.walk(scope.function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return self._of_value(node.value, scope, depth + 1)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return self._of_annotation(node.annotation, scope)
        return None


def _first(things: Sequence[Thing]) -> Thing:
    """Return the first that is vLLM's; if none is, the first."""
    return next((each for each in things if not isinstance(each, Outside)), things[0])
