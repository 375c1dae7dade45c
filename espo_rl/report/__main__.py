"""`python -m espo_rl.report`."""

import sys

from espo_rl.report.command import main

if __name__ == "__main__":
    sys.exit(main())
