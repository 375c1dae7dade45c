"""Early-Stopping PPO (arXiv 2605.29860): gated rollouts, DeepSpeed updates, live weight sync."""
