"""Pass@1 and pass@k of a model: `python scripts/evaluate.py --model FOLDER --dataset_name NAME`; `--help` for more."""

import sys

from sapo_trl.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
