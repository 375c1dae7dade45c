"""Early-Stopping PPO (arXiv 2605.29860): rollouts through the gateway, DeepSpeed updates, live sync."""
