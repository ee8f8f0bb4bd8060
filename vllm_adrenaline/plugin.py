"""The entry point vLLM calls in each of its processes: adds `--plugin` and the Adrenaline flags, nothing else.

Without `--plugin adrenaline` (or additional_config["adrenaline"]) vLLM does what it does without this package.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_adrenaline import config
from vllm_adrenaline.compat import engine_args
from vllm_adrenaline.config import PLUGIN
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system.bounded_log import bound

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger("vllm.adrenaline")


def register() -> None:
    """Add the plugin's flags to vLLM, and bound our log; may be called again."""
    bound(logger)
    engine_args.wrap(_add_flags, _take_flags, _create_config)


def _add_flags(parser: Any) -> None:
    group = parser.add_argument_group("Adrenaline", "Decode attention beside the prefill engine.")
    group.add_argument(
        "--plugin", choices=[PLUGIN], default=argparse.SUPPRESS, help="Turn a plugin on. The flags below need it."
    )
    for name, flag, arguments in config.flags():
        group.add_argument(flag, dest=f"adrenaline_{name}", default=argparse.SUPPRESS, **arguments)


def _take_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options for `additional_config`, checked; {} without the plugin. Ends the process for wrong ones."""
    values = {
        name: value for name, _, _ in config.flags() if (value := getattr(args, f"adrenaline_{name}", None)) is not None
    }
    if getattr(args, "plugin", None) != PLUGIN:
        if values:
            flag = f"{config.FLAG_PREFIX}{next(iter(values)).replace('_', '-')}"
            raise SystemExit(f"adrenaline: {flag} needs --plugin {PLUGIN}")
        return {}
    from vllm_adrenaline.engine import setup

    try:
        config.Options.parse(values)
        setup.check_model(args.model)  # vLLM itself looks for the model while EngineArgs are made
    except AdrenalineError as error:
        raise SystemExit(f"adrenaline: {error}") from None
    return {PLUGIN: values}


def _create_config(args: EngineArgs, usage_context: Any, create: Callable[[], Any]) -> Any:
    """Return vLLM's configuration for the role; an API server ends with one sentence when it is refused."""
    if PLUGIN not in (args.additional_config or {}):
        return create()
    from vllm.usage.usage_lib import UsageContext

    from vllm_adrenaline.engine import setup

    try:
        options = config.Options.parse(dict(args.additional_config[PLUGIN]))
        setup.apply(args, options)
        vllm_config = create()
        setup.check_supported(vllm_config, options)
        setup.check_resources(options, vllm_config, logger.warning)
        setup.check_peers(options, vllm_config, logger.info)
    except AdrenalineError as error:
        if usage_context is UsageContext.OPENAI_API_SERVER:
            raise SystemExit(f"adrenaline: {error}") from None
        raise
    return vllm_config
