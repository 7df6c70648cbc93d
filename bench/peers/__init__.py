"""The cluster beside its peers: one harness, one process, the same workloads, each through its own Python client.

    python -m bench.peers [--quick] [--peers NAME,NAME] [--rounds 5] [--seconds 1] [--bare PROGRAM] [--json FILE]

`base` says what a peer is, `systems/` has one module for each, `loads` drives and measures, `runner` takes turns,
`report` and `plots` show. In a round every peer has its turn: its servers are started on loopback with free ports, all
its cells are measured, its servers are stopped. So nothing else runs beside what is measured, and a machine that drifts
does so for all of them alike.
"""
