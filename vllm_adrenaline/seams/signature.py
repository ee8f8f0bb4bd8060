"""Signatures as text: what a call of one lacks, and what an override of one does not take. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, order=True)
class Call:
    """How something is called.

    Attributes:
        positional: the number of arguments that are given by position.
        keywords: names of those that are given by name.
        more: whether `*` or `**` gives others, of which nothing is known.
    """

    positional: int = 0
    keywords: tuple[str, ...] = ()
    more: bool = False

    @classmethod
    def of(cls, node: ast.Call) -> Call:
        """Return how a node of a syntax tree calls."""
        plain = [each for each in node.args if not isinstance(each, ast.Starred)]
        names = sorted(each.arg for each in node.keywords if each.arg is not None)
        more = len(plain) < len(node.args) or len(names) < len(node.keywords)
        return cls(len(plain), tuple(names), more)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a signature: its name, whether it can be left out, and how it can be given."""

    name: str
    optional: bool
    by_position: bool = True
    by_name: bool = True


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, a method or a constructor, as they are written.

    Attributes:
        text: Python's own notation, e.g. "(request, *, timeout=1.0) -> bool".
        returns: the annotation of the result; "" without one.
    """

    text: str
    returns: str = field(init=False, compare=False)
    _arguments: ast.arguments = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        function = ast.parse(f"def _{self.text}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        object.__setattr__(self, "_arguments", function.args)
        object.__setattr__(self, "returns", ast.unparse(function.returns) if function.returns is not None else "")

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters but `*` and `**`."""
        a = self._arguments
        required = len(a.posonlyargs) + len(a.args) - len(a.defaults)
        positional = [
            Parameter(each.arg, index >= required, by_name=index >= len(a.posonlyargs))
            for index, each in enumerate([*a.posonlyargs, *a.args])
        ]
        named = [
            Parameter(each.arg, default is not None, by_position=False)
            for each, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
        ]
        return (*positional, *named)

    @property
    def takes_any_position(self) -> bool:
        """Whether there is a `*args`."""
        return self._arguments.vararg is not None

    @property
    def takes_any_name(self) -> bool:
        """Whether there is a `**kwargs`."""
        return self._arguments.kwarg is not None

    def lacks(self, call: Call) -> Iterator[str]:
        """Yield in words why this cannot be called so."""
        positional = [each for each in self.parameters if each.by_position]
        if call.positional > len(positional) and not self.takes_any_position:
            yield f"takes {len(positional)} arguments by position, and is given {call.positional}"
        given = {each.name for each in positional[: call.positional]}
        by_name = {each.name for each in self.parameters if each.by_name}
        for name in call.keywords:
            if name not in by_name and not self.takes_any_name:
                yield f"takes no `{name}`"
            elif name in given & by_name:
                yield f"is given `{name}` twice, by position and by name"
        if not call.more:
            for each in self.parameters:
                is_named = each.by_name and each.name in call.keywords
                if not (each.optional or is_named or each.name in given):
                    yield f"requires `{each.name}`, which is not given"

    def does_not_replace(self, base: Signature) -> Iterator[str]:
        """Yield in words what callers of `base` may give that this does not take, or not give that it requires.

        Where this has `*args` alone, callers of `base` are taken to give by position what they can.
        """
        ours, theirs = ([p for p in each.parameters if p.by_position] for each in (self, base))
        for index, each in enumerate(theirs):
            if index < len(ours):
                yield from self._misplaced(ours[index], each, index)
            elif not self.takes_any_position:
                yield f"vLLM may pass `{each.name}`, which ours does not take"
        by_name = {each.name for each in self.parameters if each.by_name}
        named = {each.name: each for each in base.parameters if not each.by_position}
        filled = {each.name for each in (ours if base.takes_any_position else ours[: len(theirs)])}
        for name in named:
            if name not in by_name and not self.takes_any_name:
                yield f"vLLM may pass `{name}`, which ours does not take"
            elif name in filled:
                yield f"vLLM passes `{name}` by name only, and something else in its place"
        for position, mine in enumerate(self.parameters):
            source = named.get(mine.name) if mine.by_name else None
            if mine.by_position and position < len(theirs):
                source = theirs[position]
            if source is None and not mine.optional:
                yield f"ours requires `{mine.name}`, which vLLM does not pass"
            elif source is not None and source.optional and not mine.optional:
                yield f"ours requires `{mine.name}`, which vLLM may leave out"
        if base.takes_any_position and not self.takes_any_position:
            yield "vLLM takes any number of arguments by position, ours does not"
        if base.takes_any_name and not self.takes_any_name:
            yield "vLLM takes arguments of any name, ours does not"

    def _misplaced(self, mine: Parameter, theirs: Parameter, index: int) -> Iterator[str]:
        """Yield whether what vLLM passes as its parameter `index` by name misses ours in that place."""
        is_same = mine.name == theirs.name and mine.by_name
        if theirs.by_name and not is_same and not (self.takes_any_name and mine.optional and not mine.by_name):
            yield f"vLLM names its parameter {index + 1} `{theirs.name}`, ours names it `{mine.name}`"


def differences(old: Signature, new: Signature) -> Iterator[str]:
    """Yield in words what is not the same in two signatures."""
    was, now = ({each.name: each for each in signature.parameters} for signature in (old, new))
    for name in was.keys() - now.keys():
        yield f"takes no `{name}` any more"
    for name, each in now.items():
        if name not in was:
            yield f"takes `{name}`, too" + ("" if each.optional else ", which is required")
        elif each != was[name]:
            yield f"takes `{name}` in another way: {_way(was[name])} before, {_way(each)} now"
    for what, had, has in (
        ("*args", old.takes_any_position, new.takes_any_position),
        ("**kwargs", old.takes_any_name, new.takes_any_name),
    ):
        if had != has:
            yield f"takes {what} {'too' if has else 'no more'}"
    common = [name for name in now if name in was]
    if common != [name for name in was if name in now]:
        yield f"takes its parameters in another order: {', '.join(now)}"
    if old.returns != new.returns:
        yield f"returns {new.returns or 'what it does not say'}, and before {old.returns or 'what it did not say'}"


def _way(parameter: Parameter) -> str:
    ways = ["by position"] * parameter.by_position + ["by name"] * parameter.by_name
    return f"{'optional' if parameter.optional else 'required'}, {' or '.join(ways)}"


def signature_of(arguments: ast.arguments, returns: ast.expr | None, drop_first: bool) -> Signature:
    """Return the signature of a definition, without annotations of its parameters.

    `drop_first`: whether the first one is left out: the object that a bound method has already.
    """
    arguments = ast.parse(f"def _({ast.unparse(arguments)}): ...").body[0].args  # type: ignore[attr-defined]
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    if drop_first:
        first = arguments.posonlyargs or arguments.args
        if first:
            del first[0]
            count = len(arguments.posonlyargs) + len(arguments.args)
            arguments.defaults = arguments.defaults[-count:] if count else []
    arrow = f" -> {ast.unparse(returns)}" if returns is not None else ""
    return Signature(f"({ast.unparse(arguments)}){arrow}")
