"""Methods beside each other, many runs at once or one after the other: `python scripts/compare.py --help`."""

import sys

from sapo_trl.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
