"""An untrained policy with PushT's features, in float32 and float16."""

import int8
import pytest
from workshop import Workshop

from vqbet_edge.runtime.bundle import Bundle


@pytest.fixture(scope="session")
def floating(workshop: Workshop) -> Bundle:
    return Bundle.open(workshop.bundle(int8.CASE, "fp32").bundle)


@pytest.fixture(scope="session")
def half(workshop: Workshop) -> Bundle:
    return Bundle.open(workshop.bundle(int8.CASE, "fp16").bundle)
