"""Which cell of the paper a run belongs to, and in what it departs from it: runs are averaged and compared only where they are alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dist_vlcl.report.records import Run

BRANCHES = ("dual", "vision", "language")
PLANS = ("hop_odd", "hop_even", "prefix", "suffix")
DATASETS = {"cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "imagenet_r": "ImageNet-R"}
IMAGES_A_CLASS = {
    "cifar100": (500, 100),
    "tiny_imagenet": (500, 50),
    "imagenet_r": (120, 30),
}  # whole sets, training and test; the last on average

# What changes neither a result nor its meaning.
IMMATERIAL = (
    *("seed", "paper", "run.*", "cluster.*", "eval.batch_size", "eval.zero_shot", "model.graphs"),
    *(f"data.{key}" for key in ("root", "url", "source", "test_source", "reader", "allow_pipe", "on_error")),
    *(f"data.{key}" for key in ("num_workers", "cache_gib", "encoding", "samples_per_shard", "timeout_s")),
    *(f"train.{key}" for key in ("micro_batches", "max_skips", "check_every_steps", "on_disagreement")),
    *("orders.branch", "orders.layers", "orders.order", "zo.name"),  # these are the cell itself: _method_of reads them
)
OF_METHOD = ("adapter.*", "orders.*", "zo.*")  # a departure in these is another method; in any other key another regime
OF_TRAINING = ("train.*", "first_order.*")
OF_PROBES = ("train.max_steps", "tasks.num_tasks", "the training set", "the test set")  # memory is the same however short the run


@dataclass(frozen=True)
class Stream:
    """A data set in tasks of so many classes."""

    dataset: str
    increment: int

    @property
    def label(self) -> str:
        return f"{DATASETS.get(self.dataset, self.dataset)} Inc{self.increment}"

    @property
    def slug(self) -> str:
        return f"{self.dataset}-inc{self.increment}"

    @property
    def order(self) -> tuple:
        """Sorts streams as the paper lists them."""
        return (*_place(self.dataset, tuple(DATASETS)), -self.increment)


@dataclass(frozen=True)
class Method:
    """What learns how. variant: none (first order everywhere), zero_shot, frozen, or the name of a zeroth-order strategy."""

    adapter: str
    branch: str
    layers: str
    variant: str

    @property
    def label(self) -> str:
        return f"{self.short}{'' if self.adapter in ('moe', '') else f' ({self.adapter})'}"

    @property
    def short(self) -> str:
        """The label without the adapter."""
        fixed = {"none": "first order", "zero_shot": "zero-shot CLIP"}
        return fixed.get(self.variant) or f"{self.branch} {self.layers}, {self.variant}"

    @property
    def order(self) -> tuple:
        """Sorts methods as the paper lists them."""
        variants = ("none", "frozen", "naive", "sign", "conservative", "mozo")
        return (
            *_place(self.adapter, ("moe", "lora")),
            *_place(self.branch, ("none", *BRANCHES)),
            *_place(self.layers, ("none", "all", *PLANS)),
            *_place(self.variant, variants),
        )

    @property
    def is_zeroth(self) -> bool:
        return self.variant not in ("none", "frozen", "zero_shot")

    @property
    def twin(self) -> "Method":
        """The control in which the zeroth-order units are not trained; without any first-order unit that is zero-shot CLIP."""
        return ZERO_SHOT if (self.branch, self.layers) == ("dual", "all") else replace(self, variant="frozen")


def _place(name: str, names: tuple[str, ...]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)


ZERO_SHOT = Method("", "none", "none", "zero_shot")


def first_order(adapter: str) -> Method:
    """The baseline."""
    return Method(adapter, "none", "none", "none")


@dataclass(frozen=True)
class Published:
    """A cell of the paper; accuracies in percent."""

    id: str
    stream: Stream
    method: Method
    last: float
    avg: float


def published_cells(runs: Iterable[Mapping[str, Any]]) -> list[Published]:
    """The cells of the runs of paper_runs.yaml."""
    return [
        Published(
            run["id"],
            Stream(run["dataset"], run["inc"]),
            Method(run["adapter"], run["zo_branch"], run["zo_layers"].removesuffix("6"), run["zo_variant"]),
            run["last"],
            run["avg"],
        )
        for run in runs
    ]


def cell_of(config: Mapping[str, Any]) -> tuple[Stream, Method]:
    """The cell of a run's resolved settings. Its `paper` id is no authority: options beside it may have made another run of it."""
    return Stream(config["data"]["name"], config["tasks"]["increment"]), _method_of(config)


def _method_of(config: Mapping[str, Any]) -> Method:
    orders, zo = config["orders"], config["zo"]["name"]
    own = config["adapter"].get("kind", "").replace(":", ".")  # of the user's own, whatever its options are called
    adapter = own or ("lora" if "rank" in config["adapter"] else "moe" if "experts" in config["adapter"] else "other")
    branch, order, rest = orders["branch"], orders["order"], orders["rest"]
    layers = orders["layers"] if isinstance(orders["layers"], str) else str(orders["layers"]).replace(" ", "")
    if layers in ("prefix", "suffix") and orders.get("span") not in (None, 6):  # six is half of the paper's towers
        layers += str(orders["span"])
    if branch == "none":
        branch, layers, order = "dual", "all", rest
    if order == rest or (branch, layers) == ("dual", "all"):  # every unit has one order
        everywhere = {"first": first_order(adapter), "frozen": ZERO_SHOT}
        return everywhere.get(order) or Method(adapter, "dual", "all", zo)
    if order == "first" or rest == "zeroth":  # what it is about are the units that the plan does not name
        branch, layers, order = "dual", f"all but {branch} {layers}", rest
    return Method(adapter, branch, layers, "frozen" if order == "frozen" else zo)


@dataclass(frozen=True)
class Departure:
    """A setting that is not the cell's own."""

    key: str
    paper: str
    ours: str

    def __str__(self) -> str:
        return f"{self.key} {self.ours} (not {self.paper})"

    @property
    def is_of_method(self) -> bool:
        return _matches(self.key, OF_METHOD)


def departures(config: Mapping[str, Any], reference: Mapping[str, Any], method: Method) -> list[Departure]:
    """In what a configuration is not the cell's, leaving aside what changes no result and what this method does not read."""
    unread = () if method.is_zeroth else (*OF_METHOD, *OF_TRAINING) if method == ZERO_SHOT else ("zo.*",)
    own, cell = flat(config), flat(reference)
    # A key that only one of the two has is an option of another version, or of an adapter of the user's own.
    keys = [key for key in own if key in cell and not _matches(key, (*IMMATERIAL, *unread))]
    found = [Departure(key, _value(cell, key), _value(own, key)) for key in keys if _value(cell, key) != _value(own, key)]
    return [d for d in found if d.key != "orders.span" or own[d.key] not in (None, 6)]


def incomplete_data(run: Run) -> list[Departure]:
    """Where a run had only a part of a data set of the paper: counted, since a configuration does not say it."""
    rows, of_class = run.accuracy.get("rows"), IMAGES_A_CLASS.get(run.config["data"]["name"])
    if not rows or not of_class:
        return []
    num_classes, train = len(rows[-1]), run.config["train"]
    counted = {
        "training set": run.accuracy.get("steps", 0) * train["batch_size"] / train["epochs"] / num_classes,  # an upper bound
        "test set": sum(total for _, total in rows[-1]) / num_classes,
    }
    # 0: nothing was trained
    return [
        Departure(f"the {what}", "whole", "a part")
        for (what, n), whole in zip(counted.items(), of_class, strict=True)
        if 0 < n < 0.9 * whole
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _value(config: Mapping[str, Any], key: str) -> str:
    """A leaf as it is compared and printed."""
    value = config.get(key)
    if key == "tasks.order" and value == f"seed:{config['seed']}":
        return "seed:N"  # a class order of every seed's own is one setting
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Entry:
    """A complete run in its cell. note: what sets it apart from other runs of the cell in its section."""

    run: Run
    stream: Stream
    method: Method
    departures: tuple[Departure, ...]
    note: tuple[str, ...] = ()

    @property
    def is_probe(self) -> bool:
        """Whether it was cut short, as memory probes are: its accuracy means nothing."""
        return self.run.config["train"].get("max_steps") is not None


@dataclass
class Section:
    """Runs that may stand in one table: of one model, one regime of training. Departures of the methods are in the entries' notes."""

    number: int
    model: str
    is_paper_model: bool
    departures: list[Departure]  # those that every run has to which they apply
    entries: list[Entry] = field(default_factory=list)
    probes: list[Entry] = field(default_factory=list)  # runs of a few steps, of which memory alone counts

    @property
    def is_paper(self) -> bool:
        """Whether everything but the methods' own settings is the paper's."""
        return self.is_paper_model and not any(not d.is_of_method for d in self.departures)

    @property
    def title(self) -> str:
        """What a reader must know of the runs at every table and figure."""
        if self.is_paper:
            what = "the paper's model and settings"
        else:
            what = "the paper's model, not its settings" if self.is_paper_model else "not the paper's model"
        return f"Part {self.number}, {self.model}: {what}"

    @property
    def streams(self) -> list[Stream]:
        return sorted({entry.stream for entry in self.entries}, key=lambda stream: stream.order)

    def find(self, stream: Stream, method: Method, note: tuple[str, ...] | None = None) -> list[Entry]:
        """The runs of a cell by rising seed; with a note, only those that bear it, which are one a seed."""
        return [e for e in self.entries if (e.stream, e.method) == (stream, method) and note in (None, e.note)]

    def notes(self, method: Method) -> list[tuple[str, ...]]:
        """The notes under which a method was run; the plain one first."""
        return sorted({entry.note for entry in self.entries if entry.method == method}, key=lambda note: (len(note), note))


Reference = Callable[[Run, Stream, Method], Mapping[str, Any]]
Regime = tuple[tuple[str, str], ...]


def classify(run: Run, reference: Reference) -> Entry:
    """Put a run into its cell. reference: gives the configuration that the cell means."""
    stream, method = cell_of(run.config)
    found = [*departures(run.config, reference(run, stream, method), method), *incomplete_data(run)]
    entry = Entry(run, stream, method, tuple(found))
    return replace(entry, departures=tuple(d for d in found if d.key not in OF_PROBES)) if entry.is_probe else entry


def sections_of(entries: Sequence[Entry]) -> list[Section]:
    """Cut entries into sections: the paper's own first, then the largest. Of runs with the same cell, note and seed the first counts."""
    found: list[Section] = []
    for model in dict.fromkeys(map(_model, entries)):
        of_model = [entry for entry in entries if _model(entry) == model]
        keys = sorted({d.key for e in of_model for d in e.departures if not d.is_of_method})
        regimes: list[Regime] = []
        for entry in sorted(of_model, key=lambda e: e.method == ZERO_SHOT):
            if not any(_belongs(entry, regime, keys) for regime in regimes):
                regimes.append(_regime(entry, keys))
        found += [_section(model, [e for e in of_model if _belongs(e, regime, keys)]) for regime in regimes]
    found.sort(key=lambda section: (not section.is_paper, not section.is_paper_model, -len(section.entries)))
    return [replace(section, number=number) for number, section in enumerate(found, 1)]


def _model(entry: Entry) -> str:
    config = flat(entry.run.config)
    return f"{_value(config, 'model.name')} ({_value(config, 'model.pretrained')})"


def _regime(entry: Entry, keys: Sequence[str]) -> Regime:
    """The values of the keys in which some run of the model departs. Equal values are one regime, also where the paper has two."""
    own = flat(entry.run.config)
    departing = {d.key: d.ours for d in entry.departures}
    return tuple((key, departing.get(key) or ("None" if entry.is_probe and key in OF_PROBES else _value(own, key))) for key in keys)


def _belongs(entry: Entry, regime: Regime, keys: Sequence[str]) -> bool:
    """Whether a run is of a regime; for a model that is not trained, how the others are trained is no matter."""
    pairs = zip(_regime(entry, keys), regime, strict=True)
    return all(own == other or (entry.method == ZERO_SHOT and _is_of_training(own[0])) for own, other in pairs)


def _is_of_training(key: str) -> bool:
    return _matches(key, OF_TRAINING) or key == "the training set"


def _section(model: str, entries: list[Entry]) -> Section:
    everywhere = [d for d in dict.fromkeys(d for e in entries for d in e.departures) if not d.is_of_method or _is_everywhere(d, entries)]
    noted = [replace(e, note=tuple(sorted(str(d) for d in e.departures if d not in everywhere))) for e in entries]
    unique = {(e.stream, e.method, e.note, e.run.seed, e.is_probe): e for e in reversed(noted)}  # the first of equals stays
    section = Section(0, model, not any(d.key.startswith("model.") for e in entries for d in e.departures), everywhere)
    ordered = sorted(unique.values(), key=lambda e: (e.stream.order, e.method.order, e.note, e.run.seed))
    section.entries = [entry for entry in ordered if not entry.is_probe]
    section.probes = [entry for entry in noted if entry.is_probe]
    return section


def _is_everywhere(departure: Departure, entries: Iterable[Entry]) -> bool:
    """Whether each run for which the paper has the departed value departs alike."""
    is_zo = departure.key.startswith("zo.")
    concerned = [flat(e.run.config) for e in entries if e.method != ZERO_SHOT and (e.method.is_zeroth or not is_zo)]
    return all(_value(config, departure.key) == departure.ours for config in concerned if departure.key in config)
