"""Where problems come from, and what an answer is worth."""
