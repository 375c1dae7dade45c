"""The operator's side: the gate, the live page, what Prometheus reads."""
