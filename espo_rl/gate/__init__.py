"""The trainer's side of `espo_gateway.stop`: warm-up, threshold, estimator, each batch's gate."""
