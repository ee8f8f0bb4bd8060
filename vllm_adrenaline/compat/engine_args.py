"""A wrapper around vLLM's EngineArgs, through which a plugin adds command-line flags and derives settings.

vLLM has no hook with which a general plugin can do so (vllm/engine/arg_utils.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from vllm.engine.arg_utils import EngineArgs

MARK = "_adrenaline_wrapped"
"""Attribute of EngineArgs that says that it is wrapped already."""


def wrap(
    add_flags: Callable[[Any], None],
    take_flags: Callable[[Namespace], dict[str, Any]],
    create: Callable[[EngineArgs, Any, Callable[[], Any]], Any],
) -> None:
    """Wrap three methods of EngineArgs, once per process.

    Args:
        add_flags: adds flags to vLLM's argument parser.
        take_flags: returns what the parsed flags add to `additional_config`.
        create: returns vLLM's configuration for `EngineArgs` and a usage context. Its third argument is vLLM's own way
            to make it.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, MARK, False):
        return
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    def adding(parser: Any) -> Any:
        parser = add_cli_args(parser)
        add_flags(parser)
        return parser

    def taking(cls: type[EngineArgs], args: Namespace) -> EngineArgs:
        more = take_flags(args)
        engine_args = from_cli_args(cls, args)
        if more:
            engine_args.additional_config = {**engine_args.additional_config, **more}
        return engine_args

    @functools.wraps(create_engine_config)
    def creating(self: EngineArgs, usage_context: Any = None, headless: bool = False) -> Any:
        return create(self, usage_context, lambda: create_engine_config(self, usage_context, headless))

    EngineArgs.add_cli_args = staticmethod(adding)
    EngineArgs.from_cli_args = classmethod(taking)
    EngineArgs.create_engine_config = creating
    setattr(EngineArgs, MARK, True)
