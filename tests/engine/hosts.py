"""Hosts on one machine: a host has network, IPC, PID, mount and UTS namespaces of its own, and its own /dev/shm.

So no transport reaches another host but over the network: `data0`, a wire between two hosts whose interfaces count what
crosses. `mgmt0` leads to this test, and carries HTTP alone. None of it is left when the processes of a host have ended.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 300.0


def why_not() -> str:
    """Return why hosts cannot be made here; empty if they can."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (util-linux, iproute2)"
    if os.geteuid() != 0:
        return "making namespaces and wires between them needs root"
    tried = subprocess.run(["unshare", "-n", "-i", "-p", "-m", "-u", "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"namespaces are not permitted here: {tried.stderr.strip()}"
    name = f"adr{os.getpid()}"
    tried = subprocess.run(["ip", "link", "add", name, "type", "veth"], capture_output=True, text=True)
    subprocess.run(["ip", "link", "delete", name], capture_output=True)
    return f"veth interfaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else ""


def ip(*words: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *words], check=True)


@dataclass
class Host:
    """A host.

    Attributes:
        name: its hostname.
        pid: its first process, as this test sees it. Everything else on the host ends with it.
        data, management: its addresses on the two networks.
    """

    name: str
    pid: int
    data: str
    management: str
    started: subprocess.Popen[bytes] | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-i", "-p", "-m", "-u", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command on this host and return what it prints."""
        return subprocess.run(self.command(words), check=True, capture_output=True, text=True).stdout

    def crossed(self) -> int:
        """Return the bytes that came and went over the wire to the other host."""
        (line,) = (line for line in self.run("cat", "/proc/net/dev").splitlines() if line.strip().startswith("data0:"))
        counters = line.split()[1:]
        return int(counters[0]) + int(counters[8])

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Cut the wire to the other host."""
        self.run("ip", "link", "set", "data0", "down")
        try:
            yield
        finally:
            self.run("ip", "link", "set", "data0", "up")

    def processes(self, word: str) -> list[int]:
        """Return the processes with `word` in their command line, as this test sees them."""
        space = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    is_here = os.stat(entry / "ns" / "pid").st_ino == space
                    if is_here and word.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    @contextmanager
    def engine(self, arguments: Sequence[str], env: dict[str, str], log: Path) -> Iterator[str]:
        """Run vLLM's API server on this host until the context ends; give its URL. It may not be ready yet."""
        module = "vllm.entrypoints.openai.api_server"
        words = [sys.executable, "-m", module, "--host", self.management, "--port", "8000", *arguments]
        own = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(words), env={**os.environ, **own, **env}, stdout=output, stderr=subprocess.STDOUT
            )
        self.started = process
        try:
            yield f"http://{self.management}:8000"
        finally:
            process.kill()  # what it started ends with the host
            process.wait()

    def await_ready(self, log: Path) -> None:
        """Wait until the engine of this host is ready. AssertionError with the end of its log if it does not start."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.started is not None and self.started.poll() is None:
            connection = http.client.HTTPConnection(self.management, 8000, timeout=2)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.5)
        raise AssertionError(f"the engine on {self.name} does not start: {log.read_text()[-3000:]}")


@contextmanager
def host(number: int) -> Iterator[Host]:
    """Make a host with `mgmt0`, and without `data0`."""
    name = f"host{number}"
    # /sys as this network has it: UCX looks there for its interfaces.
    mounts = "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys"
    prepare = f"hostname {name} && {mounts} && ip link set lo up && echo ready && exec sleep infinity"
    process = subprocess.Popen(
        ["unshare", "-n", "-i", "-p", "-m", "-u", "--fork", "--kill-child", "--mount-proc", "sh", "-c", prepare],
        stdout=subprocess.PIPE,
        text=True,
    )
    outside = f"adr{os.getpid() % 100000}m{number}"
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the host does not start"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        made = Host(name, int(children[0]), f"10.78.0.{number}", f"10.77.{number}.2")
        ip("link", "add", outside, "type", "veth", "peer", "name", "mgmt0", "netns", str(made.pid))
        ip("address", "add", f"10.77.{number}.1/24", "dev", outside)
        ip("link", "set", outside, "up")
        made.run("ip", "address", "add", f"{made.management}/24", "dev", "mgmt0")
        made.run("ip", "link", "set", "mgmt0", "up")
        yield made
    finally:
        process.kill()  # its child, and with that one everything on the host, ends with it
        process.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make two hosts, and the wire between them."""
    with host(1) as first, host(2) as second:
        ends = ["data0", "netns", str(first.pid), "type", "veth", "peer", "name", "data0", "netns", str(second.pid)]
        ip("link", "add", *ends)
        for each in (first, second):
            each.run("ip", "address", "add", f"{each.data}/24", "dev", "data0")
            each.run("ip", "link", "set", "data0", "up")
        yield first, second
