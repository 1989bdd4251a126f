"""The problems that a model solves sometimes: `python scripts/filter_by_pass_rate.py --help` says how."""

import sys

from sapo_trl.cli.filter_by_pass_rate import main

if __name__ == "__main__":
    sys.exit(main())
