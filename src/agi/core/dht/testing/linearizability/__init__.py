"""Whether a history of operations (history.py) is linearizable, and where it is not (docs/histories.md).

checker.py   the search, and what it found
models.py    what a register and a lock do when operations come one at a time; models of one's own
__main__.py  the command: python -m agi.core.dht.testing.linearizability FILE...
"""

from agi.core.dht.testing.linearizability.checker import LIMIT, Result, Verdict, Violation, check
from agi.core.dht.testing.linearizability.models import UNTOLD, LockModel, Model, RegisterModel, State, Step

__all__ = [
    "LIMIT",
    "UNTOLD",
    "LockModel",
    "Model",
    "RegisterModel",
    "Result",
    "State",
    "Step",
    "Verdict",
    "Violation",
    "check",
]
