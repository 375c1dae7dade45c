"""`python -m espo_rl.evaluate`."""

import sys

from espo_rl.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
