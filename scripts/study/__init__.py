"""Many training runs, compared: `scripts/reproduce.py`."""
