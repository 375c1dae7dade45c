"""What a run leaves behind: metrics, rollouts, summary, their files."""
