"""What the plugin needs of vLLM, read from the plugin's own syntax trees. Pure.

Followed are: imports from vLLM; parameters, attributes and results that are annotated with vLLM's classes; `self` and
`super()` in subclasses of them; classes of ours that stand before one of vLLM's; what is assigned to local variables;
and names of environment variables.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from vllm_adrenaline.seams.needs import Need, Override
from vllm_adrenaline.seams.ours import BETWEEN, VLLM, OurClass, Ours, Path, tuple_of
from vllm_adrenaline.seams.signature import Call, signature_of
from vllm_adrenaline.seams.source import Function, Module, Tree, kind_of, names_of

ENVIRONMENT = re.compile("VLLM_[A-Z0-9_]+")
"""Names of vLLM's environment variables."""
Names = dict[str, Path]
"""Paths of what names stand for, in a scope: as in Fact, of vLLM's modules and of ours."""


def derived(tree: Tree) -> set[Need]:
    """Return what the modules of `tree`, the plugin's, need of vLLM."""
    ours = Ours(tree)
    needs: set[Need] = set()
    for module in ours.modules:
        needs |= _Reader(ours, module).read()
    return needs


def file_of(module: Module) -> str:
    """Return the file of a module of the plugin, as users of a seam are named."""
    return module.name.removeprefix("vllm_adrenaline.").replace(".", "/") + ".py"


class _Reader:
    """Reads one module."""

    def __init__(self, ours: Ours, module: Module) -> None:
        self.ours, self.module = ours, module
        self.file = file_of(module)
        self.needs: set[Need] = set()

    def read(self) -> set[Need]:
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                for path in self.ours.imported(self.module, node).values():
                    self._need(node, path)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ENVIRONMENT.fullmatch(node.value):
                self._need(node, f"vllm:envs.{node.value}")
        self._body(self.module.tree.body, {}, None)
        return self.needs

    def _need(self, node: ast.AST, path: Path, call: Call | None = None, override: Override | None = None) -> None:
        if path.startswith(VLLM):
            self.needs.add(Need(path, f"{self.file}:{getattr(node, 'lineno', 0)}", call, override))

    # Definitions

    def _body(self, body: list[ast.stmt], names: Names, within: OurClass | None) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                self._class(node, names)
            elif isinstance(node, Function):
                self._function(node, names, within)
            else:
                self._statement(node, names, within)

    def _class(self, node: ast.ClassDef, names: Names) -> None:
        known = self.ours.classes.get(f"{self.module.name}:{node.name}")
        for each in (*node.bases, *(keyword.value for keyword in node.keywords)):
            self._expression(each, names, None)
        if known is not None and known.foreign is not None:
            self._need(node, f"{known.foreign}().*")
            for ours in (known, *self.ours.mixins(known)):
                self._overrides(ours, known.foreign)
        self._body(node.body, dict(names), known)

    def _overrides(self, ours: OurClass, foreign: Path) -> None:
        """Note what a class of ours, which stands before a class of vLLM's, has in place of what that one has."""
        file = file_of(ours.module)
        for member, line, override in self._members(ours):
            if not member.startswith("__") or member == "__init__":
                self.needs.add(Need(f"{foreign}().{member}", f"{file}:{line}", None, override))

    def _members(self, ours: OurClass) -> Iterator[tuple[str, int, Override]]:
        """Yield what a class binds itself, with the line."""
        for name, bindings in ours.module.members(ours.node).items():
            first = bindings[0]
            if isinstance(first, Function):
                kind = kind_of(first)
                signature = signature_of(first.args, None, kind in ("method", "classmethod"))
                yield name, first.lineno, Override(kind, None if kind == "property" else signature)
            elif name != "__init__":
                yield name, ours.node.lineno, Override("attribute", None)

    def _function(self, node: Function, names: Names, within: OurClass | None) -> None:
        inner = dict(names)
        arguments = node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        for each in (*positional, *arguments.kwonlyargs):
            path = self.ours.of_annotation(self.module, each.annotation)
            inner.pop(each.arg, None)
            if path is not None:
                inner[each.arg] = path
        if within is not None and positional and "staticmethod" not in names_of(node):
            object_ = "" if "classmethod" in names_of(node) else "()"
            inner[positional[0].arg] = f"{within.path}{object_}"
        for default in (*arguments.defaults, *(each for each in arguments.kw_defaults if each is not None)):
            self._expression(default, names, within)
        self._body(node.body, inner, within)

    # Statements

    def _statement(self, node: ast.stmt, names: Names, within: OurClass | None) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= self.ours.imported(self.module, node)
            return
        if isinstance(node, ast.Assign):
            path = self._expression(node.value, names, within)
            for target in node.targets:
                self._assign(target, node.value, path, names, within)
            return
        if isinstance(node, ast.AnnAssign):
            path = self.ours.of_annotation(self.module, node.annotation)
            value = self._expression(node.value, names, within) if node.value is not None else None
            if isinstance(node.target, ast.Name):
                names.pop(node.target.id, None)
                if found := path or value:
                    names[node.target.id] = found
            else:
                self._expression(node.target, names, within)
            return
        if isinstance(node, ast.For):
            path = self._expression(node.iter, names, within)
            self._assign(node.target, None, self.ours.element(path) if path else None, names, within)
        elif isinstance(node, ast.With):
            for item in node.items:
                path = self._expression(item.context_expr, names, within)
                if item.optional_vars is not None:
                    self._assign(item.optional_vars, None, None, names, within)
        elif isinstance(node, ast.Assert) and (narrowed := self._narrowed(node.test, names, within)):
            names |= narrowed
        for field, value in ast.iter_fields(node):
            if (field in ("iter", "target") and isinstance(node, ast.For)) or field == "items":
                continue
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.stmt):
                    self._body([each], names, within)
                elif isinstance(each, ast.expr):
                    self._expression(each, names, within)
                elif isinstance(each, ast.ExceptHandler | ast.match_case):
                    self._body(each.body, names, within)

    def _narrowed(self, test: ast.expr, names: Names, within: OurClass | None) -> Names:
        """Return what is known of names where `test` is true: `isinstance(name, Class)`."""
        if not isinstance(test, ast.Call) or ast.unparse(test.func) != "isinstance":
            return {}
        name, kind = test.args
        path = self._expression(kind, names, within)
        return {name.id: f"{path}()"} if isinstance(name, ast.Name) and path else {}

    def _assign(
        self, target: ast.expr, value: ast.expr | None, path: Path | None, names: Names, within: OurClass | None
    ) -> None:
        """Note what `target` stands for from here on."""
        if isinstance(target, ast.Name):
            names.pop(target.id, None)
            if path is not None:
                names[target.id] = path
        elif isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [None] * len(target.elts)
            for each, part, found in zip(target.elts, values, self.ours.parts(path, len(values)), strict=False):
                self._assign(each, part, found, names, within)
        else:
            self._expression(target, names, within)

    # Expressions

    def _expression(self, node: ast.expr, names: Names, within: OurClass | None) -> Path | None:
        """Note what an expression needs, and return the path of what it is, if that is known."""
        if isinstance(node, ast.Name):
            return names.get(node.id) or self.ours.global_path(self.module, node.id)
        if isinstance(node, ast.Attribute):
            inner = self._expression(node.value, names, within)
            return self._attribute(node, inner) if inner else None
        if isinstance(node, ast.Call):
            return self._call(node, names, within)
        if isinstance(node, ast.Subscript):
            inner = self._expression(node.value, names, within)
            self._expression(node.slice, names, within)
            return self.ours.element(inner) if inner and not isinstance(node.slice, ast.Slice) else inner
        if isinstance(node, ast.Lambda):
            inside = {k: v for k, v in names.items() if k not in {each.arg for each in node.args.args}}
            self._expression(node.body, inside, within)
            return None
        if isinstance(node, ast.IfExp):
            self._expression(node.test, names, within)
            narrowed = names | self._narrowed(node.test, names, within)
            found = self._expression(node.body, narrowed, within)
            return self._expression(node.orelse, names, within) or found
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            return self._comprehension(node, names, within)
        if isinstance(node, ast.NamedExpr):
            path = self._expression(node.value, names, within)
            self._assign(node.target, node.value, path, names, within)
            return path
        parts = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        paths = [self._expression(each, names, within) for each in parts]
        if isinstance(node, ast.Tuple):
            return tuple_of(paths)
        return next((each for each in paths if each), None) if isinstance(node, ast.BoolOp) else None

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, names: Names, within: OurClass | None
    ) -> Path | None:
        inner = dict(names)
        for each in node.generators:
            path = self._expression(each.iter, inner, within)
            self._assign(each.target, None, self.ours.element(path) if path else None, inner, within)
            for test in each.ifs:
                self._expression(test, inner, within)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        found = [self._expression(each, inner, within) for each in parts][-1]
        return f"{found}*" if found else None

    def _attribute(self, node: ast.Attribute, inner: Path) -> Path | None:
        if node.attr.startswith("__") or inner.endswith("super()"):
            return None
        path, is_own = self.ours.attribute(inner, node.attr)
        if path is not None and not is_own:
            is_set = isinstance(node.ctx, ast.Store) and "()" in inner
            self._need(node, path, override=Override("attribute", None) if is_set else None)
        return path

    def _call(self, node: ast.Call, names: Names, within: OurClass | None) -> Path | None:
        for each in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._expression(each.value if isinstance(each, ast.Starred) else each, names, within)
        function = node.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "super()":
            if within is not None and (path := self.ours.of_parents(within, function.attr)):
                self._need(node, path, Call.of(node))
                return f"{path}()"
            return None
        path = self._expression(function, names, within)
        if path is None:
            return self._of_builtin(node, names, within)
        if "*" not in path:  # else it is a method of a container
            self._need(node, path, Call.of(node))
        return self.ours.result(path)

    def _of_builtin(self, node: ast.Call, names: Names, within: OurClass | None) -> Path | None:
        """Return the path of what Python's functions give that pass their arguments on: list, filter, zip and so on."""
        if not isinstance(node.func, ast.Name) or not node.args:
            return None
        given = [self._expression(each, names, within) for each in node.args]
        if node.func.id in ("list", "sorted", "filter", "reversed"):
            return given[-1 if node.func.id == "filter" else 0]
        if node.func.id in ("zip", "enumerate"):
            parts = tuple_of(self.ours.element(each) if each else None for each in given)
            before = BETWEEN if node.func.id == "enumerate" else ""
            return f"{before}{parts}*" if parts else None
        return None
