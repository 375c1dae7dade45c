"""`python -m espo_rl.pretrain_critic`."""

import sys

from espo_rl.pretrain_critic.command import main

if __name__ == "__main__":
    sys.exit(main())
