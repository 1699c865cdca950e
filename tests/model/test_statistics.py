"""What a step did to every unit, against plain formulas."""

import pytest
import torch

from dist_vlcl.model.statistics import STATISTICS, UnitStatistics
from dist_vlcl.model.units import UnitId
from tests.helpers.tiny_clip import adapter_values, tiny_clip


def test_figures_are_those_of_plain_formulas():
    towers = tiny_clip(vision_layers=3, language_layers=2)
    units, before, draw = towers.units, adapter_values(towers), torch.Generator().manual_seed(0)
    statistics = UnitStatistics(units)
    statistics.begin()
    statistics.observe([id for id in units if id.branch == "language"], [torch.ones(2 * units[UnitId("language", 1)].numel)])
    statistics.compute()
    statistics.begin()  # nothing of the earlier step is left
    vision = [id for id in units if id.branch == "vision"]
    gradients = {id: 1e-6 + 1e-3 * torch.randn(units[id].numel, generator=draw) for id in vision}
    statistics.observe(vision, [gradients[id] * 9 for id in vision])
    statistics.observe(vision[1:], torch.cat([gradients[id] for id in vision[1:]]).split(7))  # the later one counts
    gradients[vision[0]] *= 9
    with torch.no_grad():
        units[UnitId("language", 2)].tensors()["up_bias"].add_(0.25)
    figures = statistics.compute()
    assert figures.shape == (5, len(STATISTICS)) and figures.dtype == torch.float32
    for id, row in zip(units, figures, strict=True):
        got = dict(zip(STATISTICS, row.tolist(), strict=True))
        after = torch.cat([t.detach().flatten() for t in units[id].tensors().values()])
        moved = after - torch.cat([before[f"{id}/{name}"].flatten() for name in units[id].names])
        assert got["parameter_norm"] == pytest.approx(float(after.double().norm()), rel=1e-5)
        assert got["update_norm"] == pytest.approx(float(moved.double().norm()), rel=1e-5)
        expected = (float(moved.double().mean()), float(moved.double().var(correction=0)))
        assert (got["update_mean"], got["update_variance"]) == pytest.approx(expected, rel=1e-4)
        if id in gradients:
            g = gradients[id].double()
            expected = (float(g.norm()), float(g.mean()), float(g.var(correction=0)))
            assert (got["gradient_norm"], got["gradient_mean"], got["gradient_variance"]) == pytest.approx(expected, rel=1e-4)
        else:
            assert all(torch.isnan(torch.tensor(got[name])) for name in STATISTICS[:3])
    assert float(figures[1, 3]) == pytest.approx(0.25 * units[UnitId("language", 2)].tensors()["up_bias"].numel() ** 0.5)
