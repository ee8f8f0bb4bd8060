"""What a name of a source tree can stand for while `lookup` follows it, and what is recorded of it."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import msgspec

from vllm_adrenaline.seams.source import Function, Module, Value


class Fact(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a version of vLLM has at a path.

    Attributes:
        path: how we get there: "module:Name", then ".member", "()" for a call or an instance, and "[]" for an element.
            "module:~text" is a text in a module's source, and ".*" stands for the names of all methods.
        kind: module, class, function, method, staticmethod, classmethod, property, attribute, text or methods.
        home: where it is defined, "module:Class.name".
        shape: its signature, or of an attribute its annotation; of a class the signature of its constructor. Empty
            where there is none, or none can be read. Of methods, their names.
        body: a digest of what a function does.
    """

    path: str
    kind: str
    home: str
    shape: str = ""
    body: str = ""


class Missing(msgspec.Struct, frozen=True):
    """Why there is nothing at a path.

    Attributes:
        gone: whether there is nothing; otherwise it could not be followed, for lack of types.
        why: in words.
    """

    gone: bool
    why: str


@dataclass(frozen=True)
class ModuleThing:
    """A module."""

    module: Module


@dataclass(frozen=True)
class _Defined:
    """What a module, or a class in it, defines: `name` is its qualified name."""

    module: Module
    name: str

    @property
    def home(self) -> str:
        """Where it is defined."""
        return f"{self.module.name}:{self.name}"


@dataclass(frozen=True)
class ClassThing(_Defined):
    """A class, or with `instance` an object of it."""

    node: ast.ClassDef
    instance: bool = False

    @property
    def object(self) -> ClassThing:
        """An object of it."""
        return ClassThing(self.module, self.name, self.node, instance=True)


@dataclass(frozen=True)
class FunctionThing(_Defined):
    """A function, or a method of `owner`."""

    node: Function
    owner: ClassThing | None = None


@dataclass(frozen=True)
class ValueThing(_Defined):
    """A variable or an attribute; of `owner`, the class that binds it, if any does."""

    value: Value
    owner: ClassThing | None = None


@dataclass(frozen=True)
class Container:
    """A list, a dictionary or the like, whose elements have the type `element`, an annotation in `module`."""

    module: Module
    element: ast.expr


@dataclass(frozen=True)
class Outside:
    """What is not vLLM's: of Python, torch and others. Nothing is asked about it."""

    what: str


Thing = ModuleThing | ClassThing | FunctionThing | ValueThing | Container | Outside
