"""The update: samples, advantages, losses, what models are asked, DeepSpeed engines, ranks."""
