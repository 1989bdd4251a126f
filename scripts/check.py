"""Check a config without loading a model: `python scripts/check.py --config FILE [--num_processes n]`. See `--help`."""

import sys

from sapo_trl.cli.check import main

if __name__ == "__main__":
    sys.exit(main())
