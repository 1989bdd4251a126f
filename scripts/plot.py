"""Pictures and reports: `python scripts/plot.py gate --output docs`; `--help` for more."""

import sys

from sapo_trl.cli.plot import main

if __name__ == "__main__":
    sys.exit(main())
