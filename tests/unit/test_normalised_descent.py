"""Steps along normalised gradients: lengths, scale, rows without a gradient."""

from __future__ import annotations

import pytest
import torch

from sphere_easyedit.editing.normalised_descent import NormalisedDescent


def test_step_lengths_fall_to_a_tenth_whatever_the_gradients_scale() -> None:
    values, lengths = torch.zeros(3, 5), torch.tensor([[2.0], [0.5], [1.0]])
    optimiser = NormalisedDescent(values, lengths, steps=4)
    direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1e-3, 1.0, 1e4, 1.0):
        before = values.clone()
        values.grad = scale * direction
        values.grad[2] = 0.0
        optimiser.step()
        found.append((values - before).norm(dim=1).tolist())
    assert [step[0] for step in found] == pytest.approx([2.0, 1.736, 1.1, 0.464], abs=1e-3)
    assert [step[1] for step in found] == pytest.approx([0.25 * step[0] for step in found])
    assert torch.allclose(values[0] / values[0].norm(), -direction[0] / direction[0].norm(), atol=1e-6)
    assert values[2].tolist() == [0.0] * 5
