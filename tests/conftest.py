"""Shared by all tests. Its presence puts this folder on sys.path, for reference.py."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
