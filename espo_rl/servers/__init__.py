"""The processes of a run, and the weights that are sent to them."""
