"""The table of rotary angles against Python's own cosine, and against itself when it has grown."""

import math

import numpy as np
import pytest
import torch

from kernels.reference.rope import Frequencies, inverse_frequencies
from kernels.rope import RopeConfig
from models.angles import FIRST_POSITIONS, Angles

POSITIONS = np.array([0, 1, 17, 511, FIRST_POSITIONS - 1, 3 * FIRST_POSITIONS])


@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_they_are_those_of_the_position(scale: float):
    frequencies = Frequencies(inverse_frequencies(RopeConfig(), 64).inverse, scale)
    cosines, sines = Angles(frequencies).of(POSITIONS, int(POSITIONS[-1]) + 1)
    assert cosines.shape == sines.shape == (len(POSITIONS), 32)
    for row, position in enumerate(POSITIONS):
        for column, inverse in enumerate(frequencies.inverse):
            angle = float(torch.tensor(float(position)) * inverse)  # float32, as the model has it
            assert cosines[row, column] == pytest.approx(scale * math.cos(angle), abs=2e-7)
            assert sines[row, column] == pytest.approx(scale * math.sin(angle), abs=2e-7)


def test_growing_and_company_change_no_bit():
    frequencies = inverse_frequencies(RopeConfig(), 64)
    grown, at_once = Angles(frequencies), Angles(frequencies)
    early = POSITIONS[:4]
    before = grown.of(early, 512)
    after = at_once.of(POSITIONS, 5 * FIRST_POSITIONS)
    grown.of(POSITIONS, int(POSITIONS[-1]) + 1)
    for old, new, again in zip(before, after, grown.of(early[::-1], 512), strict=True):
        assert np.array_equal(old, new[:4])
        assert np.array_equal(old, again[::-1])
