import pytest

from tests.training.tiny import Toy


@pytest.fixture
def toy(monkeypatch):
    """`fit` trains a toy instead of a transformer."""
    monkeypatch.setattr("posjax.training.loop.Transformer", Toy)
