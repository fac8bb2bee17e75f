"""One random model for all tests here; its replicas are made anew in each."""

from collections.abc import Iterator

import pytest
import torch

from serve.build import Model
from tests.serving.tiny import random_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small cost 25 times as much on two threads of a busy machine as on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()
