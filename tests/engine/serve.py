"""Run vLLM's API server once for each command line, without importing vLLM each time: a fork for each.

A line of standard input is the arguments as JSON; a line of standard output is {"code": exit code, "output": all that
was printed}. The server runs as `python -m vllm.entrypoints.openai.api_server` would.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile

SERVER = "vllm.entrypoints.openai.api_server"
LIMIT_S = 120
"""A server that runs for longer was not refused: it is ended by SIGALRM."""


def main() -> None:
    """Answer lines until there are no more."""
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.async_llm  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            child = os.fork()
            if not child:
                become_server(json.loads(line), output.fileno())
                return
            _, status = os.waitpid(child, 0)
            output.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "output": output.read()}
        print(json.dumps(answer), flush=True)


def become_server(args: list[str], output: int) -> None:
    """Be what `args` start, with all output in the file; what it raises ends this process as it would end that one."""
    import signal

    signal.alarm(LIMIT_S)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [SERVER, *args]
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
