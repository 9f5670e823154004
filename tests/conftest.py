"""What holds for every file of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_connected() -> Iterator[None]:
    """Files share a process, and the next one may count on being alone."""
    yield
    assert not dist.is_initialized(), "a test of this file left a process group: pmod.shutdown()"
