"""Train: `python scripts/train.py --config configs/tiny/sapo.yaml [--any_field value]`. See `--help`."""

import sys

from sapo_trl.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
