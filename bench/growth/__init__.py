"""Cost as work grows: nodes, replicas, keys, bytes of a value and callers, one at a time around a base point.

    python -m bench.growth [--dimensions nodes,keys] [--keys-max 10000000] [--quick] [--json FILE] [--docs FILE]

`plan` says what is varied and over what, `site` runs one cluster, `measure` drives and measures it, `runner` takes
turns, `theory` says how each figure may grow and holds what was measured against it, `report` and `plots` show.

In a round every cluster has its turn: it is started on its data, all its points are measured, it is stopped. So nothing
else runs beside what is measured, a machine that drifts does so for all points alike, and every round times a start.
"""
