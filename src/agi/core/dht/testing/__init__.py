"""Whole-cluster simulation for programs built on this package: virtual time, hosts that die, and faults from a seed.

loop.py        an asyncio loop in virtual time; which host owns which callback
host.py        boot, kill and pause a host; clock.py its clocks, disk.py its disk
network.py     the network between hosts, on transport/memory.py
faults.py      plans of faults and the driver that performs them
trace.py       the digest that shows two runs to be the same
simulation.py  `run_simulation`, the entry
"""

from agi.core.dht.testing.clock import SimClock
from agi.core.dht.testing.disk import DiskFaults, SimDisk, SimStore
from agi.core.dht.testing.faults import Fault, FaultDriver, FaultKind, FaultMix, FaultPlan
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.loop import Deadlock, LimitReached, SimLoop, SimulationError
from agi.core.dht.testing.network import LinkFaults, SimNetwork, SimTransport
from agi.core.dht.testing.simulation import Run, Simulation, run_simulation
from agi.core.dht.testing.trace import Trace

__all__ = [
    "Deadlock",
    "DiskFaults",
    "Fault",
    "FaultDriver",
    "FaultKind",
    "FaultMix",
    "FaultPlan",
    "Host",
    "LimitReached",
    "LinkFaults",
    "Run",
    "SimClock",
    "SimDisk",
    "SimLoop",
    "SimNetwork",
    "SimStore",
    "SimTransport",
    "Simulation",
    "SimulationError",
    "Trace",
    "run_simulation",
]
