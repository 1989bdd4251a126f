"""Objectives in the laboratory, beside each other: `python scripts/lab.py --quick`; `--help` for more."""

import sys

from sapo_trl.cli.lab import main

if __name__ == "__main__":
    sys.exit(main())
