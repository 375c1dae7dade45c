"""`python -m espo_rl.evaluate`: avg@k, pass@k and maj@k of a model."""
