"""The loop that the trainers share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tools.seedling.training import Optimizer, fit


def test_a_model_goes_down_its_losses_and_is_saved_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    seen: list[float] = []
    saved: list[torch.Tensor] = []

    def losses() -> Iterator[torch.Tensor]:
        while True:
            loss = (model(torch.ones(1, 4)) ** 2).sum()
            seen.append(loss.item())
            yield loss

    fit(losses(), Optimizer(model, 60, 1, 60, rate=0.05), 60, lambda: saved.append(model.weight.detach().clone()))

    assert len(seen) == 60
    assert seen[-1] < seen[0] / 10
    assert [torch.equal(one, model.weight) for one in saved] == [True]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["50/60", "60/60"]
