"""Layers and width of a checkpoint, and whether a head of V fits it. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    layers: int
    width: int

    @classmethod
    def told_by(cls, config: Mapping[str, Any]) -> Shape | None:
        """Of the text model of a config.json; None where it does not tell."""
        text = config.get("text_config")
        told = {**config, **text} if isinstance(text, dict) else config
        layers, width = told.get("num_hidden_layers"), told.get("hidden_size")
        return cls(layers, width) if isinstance(layers, int) and isinstance(width, int) else None


def check_fits(head: Path, of_head: Shape, of_model: Shape) -> None:
    """Raise ValueError for a head that cannot stand on the model's layers."""
    if of_head.layers > of_model.layers or of_head.width != of_model.width:
        raise ValueError(
            f"{head}: of {of_head.layers} layers of width {of_head.width}, and the model has "
            f"{of_model.layers} of {of_model.width}: fit one to this model"
        )
