"""The update: samples, advantages, losses, what is asked of the models, DeepSpeed engines, ranks."""
