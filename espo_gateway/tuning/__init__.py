"""A gateway that finds its own threshold, and keeps it over a restart."""
