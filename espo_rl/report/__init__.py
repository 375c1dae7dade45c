"""`python -m espo_rl.report`: a run as one HTML page."""
