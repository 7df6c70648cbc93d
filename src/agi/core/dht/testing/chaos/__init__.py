"""Real nodes under real faults: processes are killed and frozen, networks cut, a disk is filled, members come and go;
and clients whose every acknowledged operation is checked at the end (docs/chaos.md).

plan.py      what a seed does and when; pure
auditor.py   the bookkeeping of operations and the judgement; pure
network.py   a network of namespaces that ends with the process that made it
disk.py      a small disk that can be filled
nodes.py     node processes: started, killed, frozen, started again
faults.py    performs a plan
load.py      the clients
settle.py    after the faults: is the cluster whole, are its replicas equal, is everything there?
report.py    counts, the table, the lines of JSON
run.py       all of it, from the command line

    make chaos CHAOS_SECONDS=180 SEED=7
"""
