"""Answer probes along rollouts that were recorded without."""
