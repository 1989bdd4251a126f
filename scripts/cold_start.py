"""Make the small mathematics model of `configs/tiny/`: `python scripts/cold_start.py --output_dir runs/tiny`."""

import sys

from sapo_trl.cli.cold_start import main

if __name__ == "__main__":
    sys.exit(main())
