"""What the scripts' arguments may be."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """An argparse type: a whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def positive(text: str) -> float:
    """An argparse type: a number above 0, and finite."""
    if not 0.0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, and finite, not {number:g}")
    return number


def share(text: str) -> float:
    """An argparse type: from 0 to 1."""
    if not 0.0 <= (number := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {number:g}")
    return number
