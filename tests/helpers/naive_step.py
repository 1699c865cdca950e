"""The zeroth-order step in its plainest form: the slow, clear twin of `update`, for tests and benchmarks.

Every parameter is a separate tensor, with its own noise and its own addition. Every loss is one call of the whole model. Nothing is
shared between evaluations.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vlcl.zo.noise import NORMALS_PER_COUNTER, Key, _to_normals, name_id, philox4x32
from dist_vlcl.zo.update import ZerothOrderConfig

SUPPORTED: dict[str, tuple] = {
    "estimator": ("finite_difference",),
    "granularity": ("branch", "unit"),
    "directions": ("gaussian",),
}
Values = dict[str, Tensor]  # "vision.3/down_weight" -> tensor


def normals(name: str, numel: int, key: Key, stream: int) -> Tensor:
    """Return the noise of one parameter `[n]`: the slow, clear twin of `NoiseField.normals`."""
    counter = (torch.arange(-(-numel // NORMALS_PER_COUNTER)), name_id(name), key.step, stream)
    return _to_normals(philox4x32(counter, key.seed)).flatten()[:numel]


def naive_step(loss: Callable[[Values], float], values: Values, config: ZerothOrderConfig, key: Key, lr: float) -> Values:
    """Return the values after one step of `config`.

    `loss` maps values to the loss of the whole batch, with the step's router noise and dropout. Raises ValueError for an option that is
    not supported here.
    """
    for option, allowed in SUPPORTED.items():
        if getattr(config, option) not in allowed:
            raise ValueError(f"zo.{option}={getattr(config, option)!r}: the naive step supports {', '.join(map(str, allowed))} only")
    base = loss(values)
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(name.split("." if config.granularity == "branch" else "/")[0], []).append(name)
    updated = dict(values)
    for group in groups.values():
        coefficient, direction = _decide(loss, values, group, config, key, lr, base)
        for name in group:
            updated[name] = values[name] + direction[name] * coefficient
    return updated


def _decide(loss, values: Values, names: list[str], config: ZerothOrderConfig, key: Key, lr: float, base: float) -> tuple[float, Values]:
    epsilon = config.epsilon[names[0].split(".")[0]]

    def moved(direction: Values, by: float) -> Values:
        return {**values, **{name: values[name] + direction[name] * by for name in names}}

    estimate: Values = {}
    for probe in range(config.probes):
        z = {name: normals(name, values[name].numel(), key, probe).view_as(values[name]) for name in names}
        if config.sides == 1:
            slope = (loss(moved(z, epsilon)) - base) / epsilon
        else:
            slope = (loss(moved(z, epsilon)) - loss(moved(z, -epsilon))) / (2 * epsilon)
        if config.clip is not None:
            slope = max(-config.clip, min(config.clip, slope))
        for name in names:
            estimate[name] = estimate.get(name, 0) + z[name] * (slope / config.probes)
    direction = {name: g.sign() if config.transform == "sign" else g for name, g in estimate.items()}
    step = lr * config.lr_scale
    if config.acceptance == "always":
        return -step, direction
    losses = [(base, 0.0), (loss(moved(direction, -step)), -step), (loss(moved(direction, step)), step)]
    return min(losses, key=lambda pair: pair[0])[1], direction
