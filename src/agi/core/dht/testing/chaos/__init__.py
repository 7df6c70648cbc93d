"""Real nodes under real faults: processes are killed and frozen, networks cut, a disk is filled, power is lost, clocks
are wrong, members come and go; and clients whose every operation is checked at the end (docs/chaos.md).

plan.py       what a seed does and when; pure
auditor.py    the bookkeeping of plain operations and the judgement; pure
network.py    a network of namespaces that ends with the process that made it
disk.py       disks that can be filled, or lose power
skew.py       wall clocks that are wrong
nodes.py      node processes: started, killed, frozen, started again
faults.py     performs a plan
load.py       the clients of plain keys
histories.py  the clients of keys under consensus, and the judgement of what they recorded
holder.py     a client process that holds locks, to be frozen; holders.py  all of them
settle.py     after the faults: is the cluster whole, are its replicas equal, is everything there?
report.py     counts, the table, the lines of JSON
run.py        all of it, from the command line

    make chaos CHAOS_SECONDS=180 SEED=7
"""
