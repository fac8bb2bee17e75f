"""What tests of training share."""

import pytest

from train import rehearsal
from train.rehearsal import Rehearsal


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """What an estimate is told of seconds and memory, at once, where real workers would take some
    seconds to find it out."""
    found = Rehearsal(2.0, 5.0, 1.5, 20.0, peak_bytes=700 << 20, steps=5)
    monkeypatch.setattr(rehearsal, "rehearse", lambda job, start: found)
    return found
