"""`python -m espo_rl.pretrain_critic`: a critic fitted to recorded rollouts."""
