"""`python -m agi.core.dht.testing.chaos`: see run.py."""

import sys

from agi.core.dht.testing.chaos.run import main

if __name__ == "__main__":
    sys.exit(main())
