"""`python -m espo_rl.replay`: every stop rule over recorded rollouts."""
