"""The update: samples, advantages, losses, questions to the models, DeepSpeed engines, ranks."""
