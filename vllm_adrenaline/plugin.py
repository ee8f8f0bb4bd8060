"""The entry point vLLM calls in each of its processes: adds `--plugin` and the Adrenaline flags, nothing else.

Three methods of EngineArgs are wrapped, for vLLM has no hook that lets a general plugin add flags or derive settings
(vllm/engine/arg_utils.py, checked with 0.32 by running and 0.33 by reading). All wrappers do nothing but call the
original unless `--plugin adrenaline` (or additional_config["adrenaline"]) is given.
Removal condition: vLLM lets general plugins register CLI arguments and edit EngineArgs.
"""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any

from vllm_adrenaline import config
from vllm_adrenaline.config import PLUGIN
from vllm_adrenaline.errors import AdrenalineError

logger = logging.getLogger("vllm.adrenaline")
_MARK = "_adrenaline_wrapped"


def register() -> None:
    """Wrap EngineArgs once per process."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _MARK, False):
        return
    setattr(EngineArgs, _MARK, True)
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    def add_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group("Adrenaline", "Decode attention beside the prefill engine.")
        group.add_argument(
            "--plugin", choices=[PLUGIN], default=argparse.SUPPRESS, help="Turn a plugin on. The flags below need it."
        )
        for name, flag, arguments in config.flags():
            group.add_argument(flag, dest=f"adrenaline_{name}", default=argparse.SUPPRESS, **arguments)
        return parser

    def take_flags(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        values = {
            name: value
            for name, _, _ in config.flags()
            if (value := getattr(args, f"adrenaline_{name}", None)) is not None
        }
        if getattr(args, "plugin", None) != PLUGIN:
            if values:
                flag = f"{config.FLAG_PREFIX}{next(iter(values)).replace('_', '-')}"
                raise SystemExit(f"adrenaline: {flag} needs --plugin {PLUGIN}")
            return from_cli_args(cls, args)
        from vllm_adrenaline.engine import setup

        try:
            config.Options.parse(values)
            setup.check_model(args.model)  # vLLM itself looks for the model while EngineArgs are made
        except AdrenalineError as error:
            raise SystemExit(f"adrenaline: {error}") from None
        engine_args = from_cli_args(cls, args)
        engine_args.additional_config = {**engine_args.additional_config, PLUGIN: values}
        return engine_args

    @functools.wraps(create_engine_config)
    def create(self: EngineArgs, usage_context: Any = None, headless: bool = False) -> Any:
        if PLUGIN not in (self.additional_config or {}):
            return create_engine_config(self, usage_context, headless)
        from vllm.usage.usage_lib import UsageContext

        from vllm_adrenaline.engine import setup

        try:
            options = config.Options.parse(dict(self.additional_config[PLUGIN]))
            setup.apply(self, options)
            vllm_config = create_engine_config(self, usage_context, headless)
            setup.check_supported(vllm_config)
            setup.check_peers(options, vllm_config, logger.info)
        except AdrenalineError as error:
            if usage_context is UsageContext.OPENAI_API_SERVER:
                raise SystemExit(f"adrenaline: {error}") from None
            raise
        return vllm_config

    EngineArgs.add_cli_args = staticmethod(add_flags)
    EngineArgs.from_cli_args = classmethod(take_flags)
    EngineArgs.create_engine_config = create
