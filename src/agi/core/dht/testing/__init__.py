"""Whole-cluster simulation for programs built on this package: virtual time, hosts that die, and faults from a seed.

loop.py        an asyncio loop in virtual time; which host owns which callback
host.py        boot, kill and pause a host; clock.py its clocks, disk.py its disk
network.py     the network between hosts, on transport/memory.py
faults.py      plans of faults and the driver that performs them
trace.py       the digest that shows two runs to be the same
simulation.py  `run_simulation`, the entry

and on top of these, the simulation of this package's own clusters:

scenario.py    what a seed runs; workload.py its clients, conditional.py and locking.py what they do under consensus
cluster.py     nodes on hosts, watched from outside; votes.py: what they tell of votes on keys
checks.py      judges a history of client calls
trial.py       `run_seed`: one seed of a cluster; formation.py: `run_formation`, one seed of its bootstrap
report.py      what a seed ended with
history.py     histories of operations under consensus, and linearizability/, which judges them (docs/histories.md)
run.py         many seeds, from the command line (docs/simulation.md)
membership.py  thousands of failure detectors alone; scale.py: what they, and the ring, do at such sizes
"""

from agi.core.dht.testing.checks import Action, Call, Finding, History, Outcome, check_history
from agi.core.dht.testing.clock import SimClock
from agi.core.dht.testing.cluster import SimCluster
from agi.core.dht.testing.disk import DiskFaults, SimDisk, SimStore
from agi.core.dht.testing.faults import Fault, FaultDriver, FaultKind, FaultMix, FaultPlan
from agi.core.dht.testing.formation import run_formation
from agi.core.dht.testing.history import Function, MalformedHistory
from agi.core.dht.testing.history import History as OperationHistory
from agi.core.dht.testing.host import Host
from agi.core.dht.testing.linearizability import Verdict
from agi.core.dht.testing.linearizability import check as check_linearizability
from agi.core.dht.testing.loop import Deadlock, LimitReached, SimLoop, SimulationError
from agi.core.dht.testing.membership import MemberNet
from agi.core.dht.testing.network import LinkFaults, SimNetwork, SimTransport
from agi.core.dht.testing.report import Report, quiet_logs
from agi.core.dht.testing.scenario import Profile, Scenario
from agi.core.dht.testing.simulation import Run, Simulation, run_simulation
from agi.core.dht.testing.trace import Trace
from agi.core.dht.testing.trial import run_seed
from agi.core.dht.testing.workload import Operation, Workload

__all__ = [
    "Action",
    "Call",
    "Deadlock",
    "DiskFaults",
    "Fault",
    "FaultDriver",
    "FaultKind",
    "FaultMix",
    "FaultPlan",
    "Finding",
    "Function",
    "History",
    "Host",
    "LimitReached",
    "LinkFaults",
    "MalformedHistory",
    "MemberNet",
    "Operation",
    "OperationHistory",
    "Outcome",
    "Profile",
    "Report",
    "Run",
    "Scenario",
    "SimClock",
    "SimCluster",
    "SimDisk",
    "SimLoop",
    "SimNetwork",
    "SimStore",
    "SimTransport",
    "Simulation",
    "SimulationError",
    "Trace",
    "Verdict",
    "Workload",
    "check_history",
    "check_linearizability",
    "quiet_logs",
    "run_formation",
    "run_seed",
    "run_simulation",
]
