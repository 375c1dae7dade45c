"""`python -m espo_rl.replay`."""

import sys

from espo_rl.replay.command import main

if __name__ == "__main__":
    sys.exit(main())
