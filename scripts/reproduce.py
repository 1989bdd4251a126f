"""Cold start, evaluation, training and evaluation, end to end: `python scripts/reproduce.py --output_dir runs/demo`."""

import sys

from sapo_trl.cli.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
