"""The command line: `agi-dht`.

    agi-dht serve | demo | bench           run nodes
    agi-dht get | put | delete | scan      single keys and ranges
    agi-dht load | dump                    folders and JSON Lines files, in and out
    agi-dht status | topology | ring | locate   the cluster
    agi-dht config check | show            settings

What was asked for goes to stdout, everything else (progress, notes, errors, logs) to stderr. Exit codes: 0 done, 2
wrong usage, 3 the key holds no value, 130 interrupted, 141 whoever read the output closed it; else that of the error
(docs/errors.md), which is one line on stderr: `error: ...`.

`app` holds the commands; `main` runs one.
"""

from agi.core.dht.cli.app import app, main

__all__ = ["app", "main"]
