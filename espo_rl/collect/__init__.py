"""`python -m espo_rl.collect`: full rollouts with outcomes."""
