"""Recorded streams: written, read back, judged, and a gate recommended from them."""
