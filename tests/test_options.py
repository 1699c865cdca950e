"""Claims of declared options: what is outside of the allowed values is refused, by the option's name on a command line."""

import math
from dataclasses import dataclass, field

import pytest

from dist_vlcl.options import option, validate, values_of


@dataclass
class Part:
    steps: int = option(3, "how many", min=1)
    rate: float | None = option(None, "how fast", above=0, below=1)
    kind: str = option("plain", "which", choices=("plain", "fancy"))
    epsilon: dict[str, float] = option({"vision": 1e-3}, "how far", above=0)
    betas: list[float] = option([0.9, 0.99], "averages", min=0, below=1)

    def check(self) -> None:
        if self.kind == "fancy" and self.steps == 1:
            raise ValueError("part.kind=fancy: needs part.steps of at least 2")


@dataclass
class Whole:
    part: Part = field(default_factory=Part)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 0}, "part.steps=0: give a number of at least 1"),
        ({"steps": True}, "part.steps=True: give a number of at least 1"),
        ({"rate": 0.0}, "part.rate=0.0: give a number of more than 0 and less than 1, or null"),
        ({"rate": math.nan}, "part.rate=nan: give a number of more than 0 and less than 1, or null"),
        ({"kind": "odd"}, "part.kind='odd': choose from plain, fancy"),
        ({"epsilon": {"vision": -1.0}}, "part.epsilon.vision=-1.0: give a number of more than 0"),
        ({"betas": [0.9, 1.0]}, "part.betas=[0.9, 1.0]: give a number of at least 0 and less than 1"),
        ({"kind": "fancy", "steps": 1}, "part.kind=fancy: needs part.steps of at least 2"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_what_is_allowed(values, message):
    with pytest.raises(ValueError) as refused:
        validate(Whole(Part(**values)))
    assert str(refused.value) == message


def test_defaults_are_allowed_and_are_copies():
    validate(Whole())
    Part().betas.append(2.0)
    assert Part().betas == [0.9, 0.99]


def test_commas_separate_values_but_not_in_quotes_and_brackets():
    values = ["'a, b'", '"c,d"', "[1, 2]", "{x: [1,2], y: 3}", "range(0,3)", "null", ""]
    assert values_of(" , ".join(values)) == values
    assert values_of("[[1,2],[3]]") == ["[[1,2],[3]]"]
