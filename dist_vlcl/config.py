"""The configuration: Hydra's groups in, the parts' dataclasses out, and the checks that span parts."""

import os
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_vlcl.data.settings import DataConfig
from dist_vlcl.dist.first_order import FirstOrderConfig
from dist_vlcl.dist.world import ClusterConfig
from dist_vlcl.masking import masked
from dist_vlcl.model.clip import ModelConfig
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.options import validate
from dist_vlcl.orders import OrderPlan
from dist_vlcl.paper import CONFIG_FOLDER, expand_paper
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.run.status import report_status
from dist_vlcl.zo.update import ZerothOrderConfig

FULL_ERROR = "HYDRA_FULL_ERROR"


@dataclass
class TaskConfig:
    """How the classes become tasks."""

    increment: int = 2
    base: int = 0
    order: Any = "natural"  # or paper, seed:N, a list
    num_tasks: int | None = None

    def check(self) -> None:
        if self.increment < 1:
            raise ValueError(f"tasks.increment={self.increment}: give a positive number of classes")


@dataclass
class TrainConfig:
    """How long a task is trained, and on what batches."""

    batch_size: int = 128  # of the global batch, whatever the number of ranks
    epochs: int = 1
    warmup_steps: int = 30
    max_steps: int | None = None  # of a task, for a short look or a memory probe; null: all
    micro_batches: int = 1  # gradient accumulation: the parts in which a rank takes its share of a batch
    max_skips: int = 10  # steps in a row that a non-finite loss may cost
    check_every_steps: int = 50  # ranks compare a digest of all adapters; also before every checkpoint
    on_disagreement: str = "stop"  # ranks that come apart: stop, or reload what they last agreed on, and take the steps since again

    def check(self) -> None:
        for option in ("batch_size", "epochs", "micro_batches", "max_skips", "check_every_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"train.{option}={getattr(self, option)}: give a positive number")
        if self.on_disagreement not in ("stop", "reload"):
            raise ValueError(f"train.on_disagreement={self.on_disagreement!r}: choose from stop, reload")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"train.max_steps={self.max_steps}: give a positive number, or null for all")
        if self.warmup_steps < 0:
            raise ValueError(f"train.warmup_steps={self.warmup_steps}: give a number of steps, or 0 for none")


@dataclass
class EvalConfig:
    """How the test sets are read."""

    batch_size: int = 512
    train_transform: bool = False  # the baseline's defect Q2, to reproduce it
    zero_shot: bool = True  # also before the first task
    holdout: float = 0.0  # hold out this part of every class's training images and evaluate on it, not on the test images

    def check(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"eval.batch_size={self.batch_size}: give a positive number")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"eval.holdout={self.holdout}: choose from [0, 1); 0 evaluates on the test images")


@dataclass
class Config:
    """Everything that a run depends on."""

    seed: int = 0
    paper: str | None = None  # the id of the run in the paper's catalogue that this one repeats
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
        """Raise ValueError for what cannot be, before anything is built."""
        for name in ("tasks", "model", "adapter", "orders", "zo", "train", "eval", "first_order", "cluster", "run"):
            validate(getattr(self, name), name)
        if self.data.timeout_s >= self.cluster.timeout_s and self.data.url:
            raise ValueError(
                f"data.timeout_s={self.data.timeout_s:g}: give less than cluster.timeout_s={self.cluster.timeout_s:g}, "
                "or the other ranks give up before this one does"
            )
        if self.cluster.direction_groups > 1 and self.data.on_error == "skip":
            raise ValueError(
                "data.on_error=skip: not with cluster.direction_groups, since all groups have to see the same samples; use stop"
            )
        if self.orders.order == "zeroth" and self.zo.granularity == "joint" and self.orders.branch in ("vision", "language"):
            raise ValueError("zo.granularity=joint: moves both branches by one estimate, so it needs orders.branch=dual")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="adapter", name="moe_schema", node=MoEConfig)
    store.store(group="adapter", name="lora_schema", node=LoRAConfig)


_register()


def from_hydra(options: DictConfig) -> Config:
    """Return the dataclasses of a composed configuration, checked; raises ValueError in the words of the option."""
    try:
        config = OmegaConf.to_object(options)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    if isinstance(config.adapter, dict):
        config.adapter = OmegaConf.to_object(_own_adapter(config.adapter))
    config.check()
    if config.run.name == "auto":
        config.run.name = default_name(config)
        config.run.check()
    return config


def load_config(path: Path) -> Config:
    """Return the configuration that a run has written, checked; raises FileNotFoundError or ValueError in words for its user."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the folder of a run")
    saved = OmegaConf.create(yaml.safe_load(path.read_text()))
    schema = OmegaConf.structured(Config)
    if "kind" in saved.adapter:
        saved.adapter = _own_adapter(saved.adapter)
    else:
        schema.adapter = OmegaConf.structured(LoRAConfig if "rank" in saved.adapter else MoEConfig)
    merged = OmegaConf.merge(schema, saved)
    assert isinstance(merged, DictConfig)
    return from_hydra(merged)


def _own_adapter(options: Any) -> DictConfig:
    """Return the user's own dataclass, which `adapter.kind` names as module:Class, with these values in it."""
    kind = options.get("kind")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(pkgutil.resolve_name(kind)), options)
    except (ImportError, AttributeError, TypeError, ValueError, OmegaConfBaseException) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"adapter.kind={kind!r}: give module:Class of a dataclass that Python can import ({said})") from error
    assert isinstance(merged, DictConfig)
    return merged


def default_name(config: Config) -> str:
    """Return a name that tells runs apart by what was learned and how; a run of `paper=ID` has its own (paper.run_name)."""
    plan, layers = config.orders, config.orders.layers
    data = config.data.name if config.model.name == "small_clip" else f"{config.data.name}-{config.model.name}"
    data += "" if config.model.precision == "fp32" else f"-{config.model.precision}"
    named = layers + (str(plan.span) if plan.span else "") if isinstance(layers, str) else "list"
    how = {"zeroth": config.zo.name, "frozen": "frozen", "first": "fo"}[plan.order]
    orders = "fo" if plan.branch == "none" else f"{how}-{plan.branch}-{named}"
    if plan.branch == "none" and plan.rest == "frozen":
        orders = "zero-shot"
    return f"{data}-inc{config.tasks.increment}-{config.adapter.label}-{orders}-seed{config.seed}"


def hydra_main(work: Callable[[Config], Any], document: str | None = None) -> None:
    """Run a command on the composed configuration. Errors of the user are one message on rank 0, and exit status 2."""
    import hydra
    from hydra.errors import HydraException

    is_main = os.environ.get("RANK", "0") == "0"
    try:
        is_multirun = any(a in ("-m", "hydra.mode=MULTIRUN") or re.match("--mu", a) for a in sys.argv[1:])
        if is_multirun and int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(
                "--multirun: ranks that a launcher has started can meet for one run only; use python -m dist_vlcl.commands.sweep"
            )
        sys.argv[1:] = expand_paper(sys.argv[1:])
    except ValueError as error:
        _refuse(error, is_main)

    asks_for_full_error = FULL_ERROR in os.environ

    @hydra.main(version_base=None, config_path=str(CONFIG_FOLDER), config_name="config")
    def run(options: DictConfig) -> None:
        if not asks_for_full_error:
            os.environ.pop(FULL_ERROR, None)  # from here on errors are not Hydra's
        try:
            config = from_hydra(options)
        except ValueError as error:
            _refuse(error, is_main)
        work(config)

    if not is_main and any(
        a in ("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help") or a.startswith("--cfg") for a in sys.argv[1:]
    ):
        return  # one voice is enough
    os.environ.setdefault(FULL_ERROR, "1")  # Hydra then raises what it would print on every rank, in many lines
    try:
        run()
    except (HydraException, ValueError) as error:
        if asks_for_full_error:
            raise
        _refuse(ValueError(format_error(error)), is_main)
    finally:
        if not asks_for_full_error:
            os.environ.pop(FULL_ERROR, None)


def format_error(error: Exception) -> str:
    """Return as one line what Hydra says of an option, without its search path."""
    causes = [error, *([error.__cause__] if isinstance(error.__cause__, OmegaConfBaseException) else [])]
    said = [re.split("Config search path|\n    full_key|See https", str(cause))[0] for cause in causes]
    return ": ".join(" ".join(words.split()) for words in said)


def _refuse(error: Exception, is_main: bool) -> None:
    if is_main:
        report_status("failed")
        print(masked(f"error: {error}"), file=sys.stderr, flush=True)
    sys.exit(2)
