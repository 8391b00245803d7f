import pytest


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of judges try again at once, unless a server asks it to wait."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
