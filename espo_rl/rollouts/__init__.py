"""Samples asked of the gateway, and a batch that survives a restart."""
