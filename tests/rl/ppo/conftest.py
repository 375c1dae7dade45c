"""Models that the tests of updates start from."""

from __future__ import annotations

import pytest

from tests.helpers.reference import Reference
from tests.helpers.trainer import Paths, make_models, make_rollouts


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(paths: Paths) -> Reference:
    """After one update."""
    made = Reference(paths)
    made.update(make_rollouts())
    return made
