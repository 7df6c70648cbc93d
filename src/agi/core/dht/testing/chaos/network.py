"""A network that belongs to one run: a bridge, and for each node a namespace with an address of its own.

The run moves into a network and a mount namespace of its own first (`enter`), by way of `unshare`, and does everything
there: the bridge, the namespaces' names under a private /run, the mounts. Nothing of the machine's network changes, and
the kernel takes all of it away when the last process of the run is gone, however that came about. Root is not needed
where the kernel lets users make namespaces.

    clients 10.77.0.1 --- bridge --- n0 10.77.0.2
                              +----- n1 10.77.0.3 ...

A link is cut where packets arrive: who is not to hear somebody drops what comes from there. So one direction can be cut
alone, and a TCP connection notices nothing but silence.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from agi.core.dht.errors import ConfigError, DHTError

CLIENTS = "clients"
SUBNET = "10.77.0"
NODES_MAX = 200
TOOLS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "umount": "mount",
    "ip": "iproute2",
    "iptables": "iptables",
    "iptables-restore": "iptables",
}
"""What is used, and the Debian package that has it."""
TRIAL = """
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
ip netns add trial
ip link add bridge0 type bridge
ip link add trial0 type veth peer name eth0 netns trial
printf '*filter\\n-A INPUT -s 10.77.0.9 -j DROP\\nCOMMIT\\n' | nsenter --net=/run/netns/trial iptables-restore --noflush
"""
TRIAL_TIMEOUT_S = 30.0
COMMAND_TIMEOUT_S = 60.0

Cut = tuple[str, str]
"""(who does not hear, whom)"""


def unshare() -> list[str]:
    """What comes before a command that is to run in namespaces of its own."""
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *users, "--net", "--mount", "--propagation", "private"]


def add_sbin() -> None:
    """Where such tools are, which is not on everybody's path."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def obstacle() -> str:
    """Why no such network can be made here, for people; empty if it can."""
    add_sbin()
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        packages = " ".join(sorted({TOOLS[tool] for tool in absent}))
        return f"{', '.join(absent)} not found (apt-get install {packages})"
    try:
        tried = subprocess.run(
            [*unshare(), "sh", "-ec", TRIAL], capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"making namespaces took longer than {TRIAL_TIMEOUT_S:g} s"
    if tried.returncode:
        said = tried.stderr.strip().splitlines() or ["no reason was given"]
        return f"namespaces cannot be made here{'' if os.geteuid() == 0 else ' without root'}: {said[-1]}"
    return ""


def namespace() -> str:
    """This process's network namespace."""
    return str(Path("/proc/self/ns/net").readlink())


def enter(arguments: Sequence[str]) -> NoReturn:
    """Runs this program anew, as the same process, in namespaces of its own; it is told where it came from."""
    module = "agi.core.dht.testing.chaos"
    command = [*unshare(), sys.executable, "-m", module, *arguments, "--came-from", namespace()]
    os.execvp(command[0], command)


class Network:
    """
    Args:
        came_from: the namespace that was left; a guard against touching that of the machine.
    """

    def __init__(self, came_from: str) -> None:
        if namespace() == came_from:
            raise ConfigError("this is not a namespace of the run's own")
        self._addresses = {CLIENTS: f"{SUBNET}.1"}
        self._cuts: Counter[Cut] = Counter()
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        await command("mount", "-t", "tmpfs", "tmpfs", "/run")
        await command("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")  # libfaketime leaves files there when it is killed
        await command("ip", "link", "set", "lo", "up")
        await command("ip", "link", "add", "bridge0", "type", "bridge")
        await command("ip", "address", "add", f"{SUBNET}.1/24", "dev", "bridge0")
        await command("ip", "link", "set", "bridge0", "up")

    async def close(self) -> None:
        """Nothing runs in it any more. Another may be opened."""
        for number, name in enumerate(self._addresses, 1):
            if name != CLIENTS:
                await command("ip", "link", "delete", f"port{number}")
                await command("ip", "netns", "delete", name)
        await command("ip", "link", "delete", "bridge0")
        await command("umount", "--lazy", "/run")
        await command("umount", "--lazy", "/dev/shm")

    async def attach(self, name: str) -> str:
        """The address of a node, whose namespace is made when first asked for."""
        if name not in self._addresses:
            number = len(self._addresses) + 1
            if number > NODES_MAX:
                raise ConfigError(f"{NODES_MAX} nodes at most")
            address, port = f"{SUBNET}.{number}", f"port{number}"
            await command("ip", "netns", "add", name)
            await command("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            await command("ip", "link", "set", port, "master", "bridge0", "up")
            await command("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            await command("ip", "-n", name, "link", "set", "lo", "up")
            await command("ip", "-n", name, "link", "set", "eth0", "up")
            self._addresses[name] = address
        return self._addresses[name]

    @staticmethod
    def inside(name: str) -> list[str]:
        """What comes before a command that is to run at that node."""
        return [] if name == CLIENTS else ["nsenter", f"--net=/run/netns/{name}", "--"]

    async def cut(self, cuts: Iterable[Cut]) -> None:
        """From now on these do not hear those. A link may be cut several times, and is then mended as often."""
        async with self._changing:
            cuts = list(cuts)
            await self._change("-A", [each for each in cuts if not self._cuts[each]])
            self._cuts.update(cuts)

    async def mend(self, cuts: Iterable[Cut]) -> None:
        async with self._changing:
            cuts = list(cuts)
            await self._change("-D", [each for each in cuts if self._cuts[each] == 1])
            self._cuts -= Counter(cuts)

    async def mend_all(self) -> None:
        async with self._changing:
            self._cuts.clear()
            for place in self._addresses:
                await command(*self.inside(place), "iptables", "--flush", "INPUT")

    async def _change(self, how: str, cuts: Sequence[Cut]) -> None:
        by_place: dict[str, list[str]] = {}
        for place, source in cuts:
            by_place.setdefault(place, []).append(f"{how} INPUT -s {self._addresses[source]} -j DROP")
        await asyncio.gather(
            *(
                command(
                    *self.inside(place),
                    "iptables-restore",
                    "--noflush",
                    said="\n".join(["*filter", *rules, "COMMIT", ""]),
                )
                for place, rules in by_place.items()
            )
        )


async def command(*words: str, said: str = "") -> None:
    """Runs a command of the system. Raises DHTError with what it said, or if it does not end."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE if said else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate(said.encode() if said else None)
    if process.returncode:
        raise DHTError(f"{' '.join(words)}: {error.decode(errors='replace').strip()}")
