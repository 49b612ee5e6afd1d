"""What every test needs: one thread, and a home of its own."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FASTIDMM_HOME."""
    monkeypatch.setenv("FASTIDMM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
