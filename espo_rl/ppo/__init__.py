"""The update: samples, advantages, losses, DeepSpeed engines, ranks."""
