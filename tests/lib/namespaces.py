"""Two hosts on one machine, for the tests: network namespaces that a pair of virtual interfaces joins."""

# pyright: standard

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from tests.lib.slurm import find


class Host(NamedTuple):
    """A command runs on it behind `inside`."""

    name: str  # of the namespace and of its interface
    address: str

    @property
    def inside(self) -> list[str]:
        return [str(find("ip")), "netns", "exec", self.name]


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts while it lasts.

    Raises: PermissionError where this machine does not let us make them.
    """
    # the number of this process, because others may run the tests at the same time
    hosts = [Host(f"pm{os.getpid()}{letter}", f"10.213.0.{number}") for number, letter in enumerate("ab", 1)]
    with contextlib.ExitStack() as made:
        for host in hosts:
            _permitted("netns", "add", host.name)
            made.callback(_ip, "netns", "del", host.name)  # ends the interfaces, too
        one, other = (host.name for host in hosts)
        _permitted("link", "add", one, "netns", one, "type", "veth", "peer", "name", other, "netns", other)
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.name)
            _ip("-n", host.name, "link", "set", host.name, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts


def _ip(*arguments: str) -> None:
    done = subprocess.run([str(find("ip")), *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _permitted(*arguments: str) -> None:
    try:
        _ip(*arguments)
    except OSError as error:
        raise PermissionError(str(error)) from None
