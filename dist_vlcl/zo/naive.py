"""The zeroth-order step as one would first write it: the slow, clear twin of `strategies`, for tests and benchmarks.

Every parameter is a tensor of its own, drawn with its own noise and perturbed by its own addition; every loss is one call of the whole
model; nothing is shared between evaluations.
"""

from collections.abc import Callable

from torch import Tensor

from dist_vlcl.zo.noise import Key, normals
from dist_vlcl.zo.strategies import ZerothOrderConfig

KNOWN: dict[str, tuple] = {
    "estimator": ("finite_difference",),
    "granularity": ("branch", "unit"),
    "transform": ("identity", "sign"),
    "directions": ("gaussian",),
    "optimizer": ("sgd",),
    "steps_per_fo_step": (1,),
}
Values = dict[str, Tensor]  # "vision.3/down_weight" -> tensor


def naive_step(loss: Callable[[Values], float], values: Values, config: ZerothOrderConfig, key: Key, lr: float) -> Values:
    """Return the values after one simultaneous step of `config` (SGD, one step per FO step), branch by branch.

    `loss` maps values to the loss of the whole batch, with the step's one realisation of router noise and dropout. Raises ValueError for
    options that it does not know.
    """
    for option, allowed in KNOWN.items():
        if getattr(config, option) not in allowed:
            raise ValueError(f"zo.{option}={getattr(config, option)!r}: the naive step knows {', '.join(map(str, allowed))} only")
    base = loss(values)
    updated = dict(values)
    for branch in sorted({name.split(".")[0] for name in values}):
        names = [name for name in values if name.startswith(f"{branch}.")]
        groups = (
            [names]
            if config.granularity == "branch"
            else [[n for n in names if n.split("/")[0] == u] for u in {n.split("/")[0] for n in names}]
        )
        for group in groups:
            coefficient, direction = _decide(loss, values, group, config, key, lr, config.epsilon[branch], base)
            for name in group:
                updated[name] = values[name] + direction[name] * coefficient
    return updated


def _decide(loss, values: Values, names: list[str], config: ZerothOrderConfig, key: Key, lr: float, epsilon: float, base: float):
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
