"""The check of a GPU machine, in what needs no GPU."""

from __future__ import annotations

import check_gpu
import pytest


@pytest.mark.parametrize(
    ("given", "first"),
    [(None, "0"), ("3", "3"), ("5,2", "5"), (" GPU-8932f937 , 1", "GPU-8932f937"), ("", "")],
)
def test_a_server_is_on_the_first_gpu_that_it_is_left(given: str | None, first: str) -> None:
    environment = {"HOME": "/home"} | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given})
    told = check_gpu.server_environment(environment)
    assert (told["CUDA_VISIBLE_DEVICES"], told["HOME"]) == (first, "/home")
