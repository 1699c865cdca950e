"""The configuration: Hydra composes it, dataclasses hold it, and the rules that span several groups."""

import argparse
import difflib
import itertools
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from dist_vlcl.data.settings import DataConfig, check_name
from dist_vlcl.dist.first_order import FirstOrderConfig
from dist_vlcl.dist.world import ClusterConfig, World
from dist_vlcl.masking import explained, masked_values
from dist_vlcl.model.clip import ModelConfig
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.options import declared, flatten, matches, option, split_options, validate
from dist_vlcl.orders import ORDERS, OrderPlan
from dist_vlcl.paper import CONFIG_FOLDER, expand_paper
from dist_vlcl.run.environment import ELASTIC
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.signals import print_error, report_failure
from dist_vlcl.saved import BUILT_IN, MAY_CHANGE, PATH_OPTIONS, read_config, untrusted_options
from dist_vlcl.zo.update import ZerothOrderConfig

FULL_ERROR = "HYDRA_FULL_ERROR"  # set: errors of the user have their traceback, too


@dataclass
class TaskConfig:
    """How the classes are divided into tasks."""

    increment: int = option(2, "Number of classes in each task.", min=1)
    base: int = option(0, "Number of classes in the first task; 0 means the same as in the others.", min=0)
    order: Any = option("natural", "Order of the classes: natural, paper, seed:N for a random order, or a list of class ids.")
    num_tasks: int | None = option(None, "Train only the first tasks; null trains all.", min=1)
    sets: list[str] = option([], "Several data sets below data.root or data.url, each one task, in this order; increment does not count.")

    def check(self) -> None:
        """Raise ValueError for an order that is no list and has no known name, and for sets with options of a single set."""
        for name in self.sets:
            check_name("tasks.sets", name)
        if self.sets and (self.order != "natural" or self.base):
            options = f"tasks.order={self.order!r} and tasks.base={self.base} mean nothing; use data=sets"
            raise ValueError(f"tasks.sets={self.sets}: each set is one task, in the order of the list, so {options}")
        named = re.fullmatch(r"natural|paper|seed:(\d{1,10})", str(self.order))
        if not (named and int(named[1] or 0) < 2**32) and not (isinstance(self.order, list) and all(type(c) is int for c in self.order)):
            raise ValueError(f"tasks.order={self.order!r}: choose from natural, paper, seed:N (below 2^32), or a list of class ids")


@dataclass
class TrainConfig:
    """How long a task is trained, and on which batches."""

    batch_size: int | None = option(128, "Samples in the global batch, for any number of ranks; null fits it to the images.", min=1)
    epochs: int | None = option(1, "Passes over the training samples of each task; null takes enough for 100 steps of each task.", min=1)
    warmup_steps: int | None = option(30, "Steps of linear warm-up in each task; null takes a tenth of the task's steps.", min=0)
    max_steps: int | None = option(None, "Steps per task at most, for a short look or a memory probe; null takes all.", min=1)
    micro_batches: int = option(1, "Gradient accumulation: parts into which a rank divides its share of a batch.", min=1)
    max_skips: int = option(10, "The run fails after so many consecutive steps whose loss or gradient is not finite.", min=1)
    check_every_steps: int = option(50, "Steps between two comparisons of all adapters over ranks, also before a checkpoint.", min=1)


@dataclass
class EvalConfig:
    """How the model is evaluated."""

    batch_size: int = option(512, "Test samples in a batch, which the ranks divide.", min=1)
    train_transform: bool = option(False, "Evaluate with the random training transform, as the baseline does.")
    zero_shot: bool = option(True, "Also evaluate before the first task.")
    holdout: float = option(0.0, "Part of each class's training samples, held out and evaluated instead of test samples.", min=0, below=1)


@dataclass
class Config:
    """Every setting of a run."""

    seed: int = option(0, "Seed of adapters, batches, directions and noise.", min=0, max=10**18)
    paper: str | None = option(None, "Id of the run in configs/paper_runs.yaml that this one repeats.")
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Any = MISSING
    orders: OrderPlan = field(default_factory=OrderPlan)
    zo: ZerothOrderConfig = field(default_factory=ZerothOrderConfig)
    first_order: FirstOrderConfig = field(default_factory=FirstOrderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise ValueError for options of different groups that contradict each other. `validate` calls this after all other checks."""
        if self.data.timeout_s >= self.cluster.timeout_s and self.data.url:
            most = f"cluster.timeout_s={self.cluster.timeout_s:g}, because the other ranks wait while one reads"
            raise ValueError(f"data.timeout_s={self.data.timeout_s:g}: give less than {most}")
        if self.orders.order == "zeroth" and self.zo.granularity == "joint" and self.orders.branch in ("vision", "language"):
            raise ValueError("zo.granularity=joint: moves both branches by one estimate; use orders.branch=dual")
        if getattr(self.adapter, "init", None) and self.orders.in_use() == {"frozen"}:
            raise ValueError("adapter.init: this plan trains no unit; to measure an earlier run: dist-vlcl evaluate RUN --data FOLDER")

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries."""
        return asdict(self)


ADAPTERS = {"moe": MoEConfig, "lora": LoRAConfig}
_store = ConfigStore.instance()
_store.store(name="schema", node=Config)
for _name, _config in ADAPTERS.items():
    _store.store(group="adapter", name=f"{_name}_schema", node=_config)


def compose_config(overrides: Iterable[str], folder: str | None = None) -> Config:
    """Return the validated configuration that the options of a command line mean. Raises ValueError for a wrong option.

    `folder`: one with more groups and files than configs/ has. Raises FileNotFoundError if there is none.
    """
    overrides = list(overrides)
    if several := next((word for word in overrides if "=[" in word and (CONFIG_FOLDER / word.partition("=")[0]).is_dir()), None):
        raise ValueError(f"{several}: give one value; sweep takes several, such as zo=mozo,sign")
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            options = compose("config", [*search_path(folder), *map(quoted, expand_paper(overrides))])
    except HydraException as error:
        raise ValueError(format_error(error)) from error
    return from_hydra(options)


def search_path(folder: str | None) -> list[str]:
    """Return --config-dir FOLDER as an option, for a command line of several runs. Raises FileNotFoundError if there is no such folder."""
    return [f"hydra.searchpath=[{in_quotes(f'file://{Path(folder).resolve(strict=True)}')}]"] if folder else []


def quoted(word: str) -> str:
    """Return an option as Hydra reads it. Texts get quotes: it would change 2026_11_30 to 20261130, and refuse /home/jörg and {1..9}."""
    [(key, value)] = split_options([word])
    field = (declared(Config) | declared(MoEConfig, "adapter.")).get(key.lstrip("+"))
    is_text = field is not None and field.type in (str, str | None) and value.lower() not in ("", "null") and value[0] not in "'\"$"
    word = f"{key}={in_quotes(os.path.expanduser(value))}" if is_text else word
    return f"++{word}" if key.startswith("zo.estimator_options") else word  # whose keys are the user's own


def in_quotes(text: str) -> str:
    """Return a text in Hydra's quotes, in which a backslash before a quote is doubled."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def from_hydra(options: Any) -> Config:
    """Return a composed configuration as dataclasses, validated. Raises ValueError that names the option."""
    try:
        given, config = cast(dict[str, Any], OmegaConf.to_container(options)), OmegaConf.to_object(options)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    known = flatten(config.as_dict())
    # Hydra accepts keys that no dataclass declares after a `+`, and OmegaConf then drops them.
    if unknown := next((key for key in flatten(given) if key not in known), None):
        raise ValueError(unknown_option(unknown))
    if isinstance(config.adapter, dict):  # the user's dataclass, which `adapter.kind` names, filled with these values
        kind, errors = config.adapter.get("kind"), (ImportError, AttributeError, TypeError, ValueError, OmegaConfBaseException)
        with explained(f"adapter.kind={kind!r}: give module:Class of a dataclass that Python can import", kinds=errors):
            adapter = OmegaConf.merge(OmegaConf.structured(pkgutil.resolve_name(str(kind))), config.adapter)
        config.adapter = OmegaConf.to_object(adapter)
    if config.tasks.sets:
        config.data = replace(config.data, name="-".join(config.tasks.sets).replace("/", "-"), reader="folder")
    validate(config)
    if re.match("auto(-|$)", config.run.name):
        config.run.name = default_name(config) + config.run.name.removeprefix("auto")
        config.run.check()
    return config


def unknown_option(key: str) -> str:
    """Return the message for an option that does not exist: which adapter has it, or which options are near."""
    of_adapters = {name: declared(kind, "adapter.") for name, kind in ADAPTERS.items()}
    if owner := next((name for name, options in of_adapters.items() if key in options), None):
        return f"{key}: an option of adapter={owner}, which was not chosen; add adapter={owner}"
    groups = (path.name for path in CONFIG_FOLDER.iterdir() if path.is_dir())
    known = [*declared(Config), *itertools.chain(*of_adapters.values()), *groups]
    near = [name for name in known if name.split(".")[-1] == key.split(".")[-1]] or difflib.get_close_matches(key, known, 1)
    return f"{key}: no such option; " + (f"did you mean {near[0]}?" if near else "--help lists all options")


def load_config(path: Path, options: Sequence[str] = (), places: Sequence[str] = PATH_OPTIONS) -> Config:
    """Return the configuration that a run has written, validated. `options` of this command line replace its values.

    A saved configuration is data. Code, commands, and the addresses and files in `places` must be among the options.
    Raises FileNotFoundError, or ValueError that names what is missing, damaged or of another version.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give the folder of a run")
    content, given = read_config(path), {key: os.path.expanduser(value) for key, value in split_options(options)}
    if isinstance(content.get("adapter"), dict):
        content["adapter"].pop("init", None)  # its tensors are in the run's checkpoints
    if odd := [key for key in given if not matches(key, (*MAY_CHANGE, *PATH_OPTIONS, *BUILT_IN))]:
        raise ValueError(f"{odd[0]}: the run decides this; give only options that lead to code, data or weights, or change no result")
    if needed := [word for word in untrusted_options(content, places) if word.partition("=")[0] not in given]:
        advice = f"which only a command line may name. To trust them, add: {shlex.join(needed)}"
        raise ValueError(f"{path} names code, commands, addresses or files, {advice}")
    schema = OmegaConf.structured(Config)
    with explained(path):
        try:
            saved: Any = OmegaConf.create(content)
            if not saved.adapter.get("kind"):
                schema.adapter = OmegaConf.structured(LoRAConfig if "rank" in saved.adapter else MoEConfig)
            saved = OmegaConf.merge(schema, saved)
            for key, value in given.items():
                try:
                    OmegaConf.update(saved, key, OmegaConf.create(value) if value.startswith("[") else None if value == "null" else value)
                except Exception as error:  # of OmegaConf, or of YAML for a broken list
                    raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}") from error
            return from_hydra(saved)
        except ConfigKeyError as error:
            raise ValueError(f"this version has no option {error.full_key}; use the version that saved the run") from error
        except (OmegaConfBaseException, AttributeError, TypeError) as error:
            raise ValueError(f"damaged, or of another version of dist_vlcl, which can read it ({str(error).splitlines()[0]})") from error


def default_name(config: Config) -> str:
    """Return a name made of data, adapter, estimator, plan and seed. A run of `paper=ID` gets its name from paper.run_name."""
    plan, layers = config.orders, config.orders.layers
    data = re.sub(r"[^\w.-]", "-", config.data.name, flags=re.A) + ("" if config.model.name == "small_clip" else f"-{config.model.name}")
    data += "" if config.model.precision == "fp32" else f"-{config.model.precision}"
    named = layers + (str(plan.span) if plan.span and layers.endswith("fix") else "") if isinstance(layers, str) else "list"
    how = {"zeroth": config.zo.name, "frozen": "frozen", "first": "fo"}[plan.order]
    rest = "" if plan.rest == "first" else f"-rest-{plan.rest if plan.rest in ORDERS else 'mixed'}"
    orders = f"{how}-{plan.branch}-{named}{rest}"
    if plan.branch == "none":
        orders = {"frozen": "zero-shot", "zeroth": f"{config.zo.name}-dual-all"}.get(str(plan.rest), "fo")
    data += "" if config.tasks.sets else f"-inc{config.tasks.increment}"
    adapter = f"{config.adapter.label}{'-warm' if getattr(config.adapter, 'init', None) else ''}"
    return f"{data}-{adapter}-{orders}-seed{config.seed}"


def check_saved(config: Config) -> None:
    """Raise ValueError for an option that decides the result, and that config.yaml would hold as *** because it looks like a secret."""
    values, saved = flatten(config.as_dict()), flatten(masked_values(config.as_dict()))
    if hidden := next((key for key in values if saved[key] != values[key] and not matches(key, (*MAY_CHANGE, *PATH_OPTIONS))), None):
        raise ValueError(f"{hidden}: its value looks like a secret, or a variable like TOKEN has it; config.yaml would hold ***; change it")


def hydra_main(work: Callable[[Config], Any], document: str | None = "") -> None:
    """Call `work` with the configuration of the command line. A user's error becomes one line on rank 0 and exit status 2.

    `--help` prints the command's `document`, then groups and options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--config-dir")
    flags, words = parser.parse_known_args()
    with errors_refused():
        refuse_flags(words)
        config = compose_config(words, flags.config_dir)
        if flags.help:
            from dist_vlcl.help import help_text

            print(help_text(document, config, flags.config_dir) if World.announced().is_main else "", end="")
        else:
            check_saved(config)
            work(config)


def refuse_flags(words: Iterable[str]) -> None:
    """Raise ValueError for a flag, such as --epochs: options are NAME=VALUE."""
    if flag := next((word for word in words if word.startswith("-")), None):
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        meant = [option for option in declared(Config) if name in (option, option.split(".")[-1])]
        raise ValueError(f"{flag}: options are NAME=VALUE; " + (f"did you mean {meant[0]}=...?" if meant else "--help lists them"))


def format_error(error: Exception) -> str:
    """Return Hydra's message about an option in one line, without its search path, and with our advice instead of Hydra's."""
    causes = [error, *([error.__cause__] if isinstance(error.__cause__, OmegaConfBaseException) else [])]
    text = ": ".join(" ".join(str(cause).split()) for cause in causes)
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_option(found[1])
    if found := re.search(r"Ambiguous value for argument '([^=']+)=([^']+)'|override ([^=\s]+)=(\S+): .*is not a ListConfig", text):
        key, given = filter(None, found.groups())
        takes_list = key in ("tasks.order", "tasks.sets", "orders.layers", "first_order.betas", "run.trackers")
        advice = f"write a list in brackets and quotes: '{key}=[{given}]'" if takes_list else "give one value; sweep takes several"
        return f"{key}={given}: {advice}"
    if found := re.search(r"override (\S+)=(\S+): Cannot assign \w+ to Dict", text):
        return f"{found[1]}={found[2]}: give each branch its value: {found[1]}.language={found[2]} {found[1]}.vision={found[2]}"
    if found := re.search(r"Could not find '(\w+)/([^']+)' Available options in '\w+': (.*?)(?: Config search path|$)", text):
        group, name, choices = found[1], found[2], [choice for choice in found[3].split() if not choice.endswith("_schema")]
        advice = f"; your own images: data=folder data.name={name} data.source=PATH" if group == "data" else ""
        return f"{group}={name}: choose from {', '.join(choices)}{advice}"
    return re.split("To append to your config|Config search path| full_key|See https", text)[0].strip(" .:")


@contextmanager
def errors_refused() -> Iterator[None]:
    """Report an error of the user that is raised inside on rank 0, and exit with status 2. It also serves as a decorator."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get(FULL_ERROR):
            raise
        is_main = World.announced().is_main or ELASTIC in os.environ  # any rank may end its agent, and with it the others
        print_error(f"error: {error}", is_main)
        report_failure(ValueError(error), is_main)  # another start would end in the same way
        sys.exit(2)
