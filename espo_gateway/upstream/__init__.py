"""The servers' side: which one, is it well, and a connection to it."""
