"""What a section of a recipe may hold: its numbers and texts, with a unit where the name has none.

Bounds are those of what takes the numbers: float32, Parquet's 32-bit columns, vLLM's requests,
timers. Infinities and NaN are none anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Of a checkpoint of before: what it has no key for was as the default is."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            if name not in self.__dict__:
                self.__dict__[name] = field.get_default(call_default_factory=True)


Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Seconds = Annotated[float, Field(gt=0, le=1e9), "seconds"]
Megabytes = Annotated[float, Field(gt=0, le=1e9), "MB"]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Between = Annotated[float, Field(ge=1e-6, le=1 - 1e-6)]  # a share that is neither 0 nor 1
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1), "tokens"]
Updates = Annotated[int, Field(ge=0, le=2**31 - 1), "steps"]  # of training
Some = Annotated[int, Field(ge=1, le=65_536)]  # what is asked, or started, at once
Processes = Annotated[int, Field(ge=1, le=1024), "processes"]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Steps = Annotated[int, Field(ge=1, le=26)]  # of an arithmetic problem: it names them by letters
Tag = Annotated[str, Field(min_length=1)]
#: texts in TOML, where all else must be of its own type: true is no 1, and "8" no 8
Written = Annotated[Path, Strict(False)]
#: vLLM takes no higher one, and in silence makes 0.01 of what is lower
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
Temperature = Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)]


def _server_url(url: str) -> str:
    """Refuse what no server can be reached at."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}; a port lies in 1 to 65535") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"{url!r} must be written as http://host:port, with a port of 1 to 65535")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"{url!r}: leave out /v1")
    return url


def _greedy_or_not(temperature: float) -> float:
    if temperature and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"must be 0, which is greedy, or lie in {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
        )
    return temperature


ServerUrl = Annotated[str, AfterValidator(_server_url)]
GreedyOrNot = Annotated[float, AfterValidator(_greedy_or_not)]
