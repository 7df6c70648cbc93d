"""`python -m agi.core.dht.cli` is `agi-dht`."""

import sys

from agi.core.dht.cli import main

if __name__ == "__main__":
    sys.exit(main())
