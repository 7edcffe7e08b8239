import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest

pytest.register_assert_rewrite("helpers", "stand_in_hub")

import torch  # noqa: E402
from stand_in_hub import hub  # noqa: E402

__all__ = ["hub"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
