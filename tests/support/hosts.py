"""Hosts on one machine: network namespaces with their own addresses, scratch directory and shared memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

NETWORK = "10.213.77"
SCRATCH = "/tmp/ray"
_MOUNTS = f"mkdir -p {SCRATCH} && mount -t tmpfs scratch {SCRATCH} && mount -t tmpfs -o size=256m shm /dev/shm"


class NoRights(Exception):
    """This process may not make network namespaces."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoRights(f"ip {' '.join(words)}: {done.stderr.strip()}")


@dataclass
class Host:
    """A network namespace with a process that keeps its mounts.

    Attributes:
        name: of the namespace.
        address: of its interface.
        keeper: the process.
    """

    name: str
    address: str
    keeper: subprocess.Popen[bytes]

    def popen(self, words: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a process on the host, in a session of its own."""
        enter = ["nsenter", "-t", str(self.keeper.pid), "-m", "-n", f"--wd={os.getcwd()}"]
        return subprocess.Popen([*enter, *words], env=environment, start_new_session=True)


@contextmanager
def make_hosts(count: int) -> Iterator[list[Host]]:
    """Yield hosts that reach each other by a bridge.

    Raises:
        NoRights: this process may not make them.
    """
    if os.geteuid() or not shutil.which("ip") or not shutil.which("nsenter"):
        raise NoRights("network namespaces need root, ip and nsenter")
    bridge = f"tracin{os.getpid()}"[:15]
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("link", "set", bridge, "up")
        hosts = []
        for i in range(count):
            name, inside, outside = f"{bridge}-{i}", f"in{os.getpid()}-{i}"[:15], f"out{os.getpid()}-{i}"[:15]
            address = f"{NETWORK}.{i + 2}"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
            _ip("link", "set", outside, "master", bridge, "up")
            _ip("link", "set", inside, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", inside)
            _ip("-n", name, "link", "set", inside, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            words = ["ip", "netns", "exec", name, "sh", "-c", f"{_MOUNTS} && echo ready && exec sleep infinity"]
            keeper = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            stack.callback(_end, keeper)
            assert keeper.stdout is not None and keeper.stderr is not None
            if keeper.stdout.readline() != b"ready\n":
                raise NoRights(keeper.stderr.read().decode())
            hosts.append(Host(name, address, keeper))
        yield hosts


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all processes of its session, unless they have ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
