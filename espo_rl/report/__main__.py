"""`python -m espo_rl.report`."""

from espo_rl.report.command import main

if __name__ == "__main__":
    main()
