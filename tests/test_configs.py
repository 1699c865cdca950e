"""Every configuration file is valid; every published run is what the paper's table says; every wrong option is refused by name."""

import dataclasses
import itertools
import re
from functools import cache

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dist_vlcl.config import CONFIG_FOLDER, Config, check_saved, default_name, expand_paper, from_hydra, load_config
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.model.units import UnitId
from dist_vlcl.orders import Order, OrderPlan, assign
from dist_vlcl.paper import published
from dist_vlcl.run.folder import RunConfig
from dist_vlcl.zo.update import ZerothOrderConfig

GROUPS = {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in CONFIG_FOLDER.iterdir() if folder.is_dir()}
RUNS = {row["id"]: row for row in published()["runs"]}
UNITS = [UnitId(branch, layer) for branch in ("language", "vision") for layer in range(1, 13)]
EXTRA = {("data", name): ["data.name=mine"] for name in ("folder", "hf", "torchvision", "webdataset")}


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        yield


def configured(*overrides: str) -> Config:
    return from_hydra(compose("config", list(overrides)))


def test_the_defaults_are_mozo_on_the_digits():
    config = configured()
    assert (config.data.name, config.model.name, config.zo.name) == ("digits", "small_clip", "mozo")
    assert (config.orders.branch, config.orders.layers, config.tasks.increment) == ("dual", "hop_odd", 2)
    assert config.run.name == "digits-inc2-moe-mozo-dual-hop_odd-seed0"


def test_the_name_of_a_run_says_what_becomes_of_the_other_units():
    late = ["orders=language_late", "zo=many_probes"]
    assert configured(*late).run.name == "digits-inc2-moe-many_probes-language-suffix4-rest-mixed-seed0"
    assert configured(*late, "orders.rest=frozen").run.name == "digits-inc2-moe-many_probes-language-suffix4-rest-frozen-seed0"
    assert configured("orders=language_all", "orders.span=4").run.name == "digits-inc2-moe-mozo-language-all-seed0"
    assert configured("orders=language_suffix", "orders.span=4").run.name == "digits-inc2-moe-mozo-language-suffix4-seed0"
    assert configured("data=folder", "data.name='ORG/grün'").run.name == "ORG-gr-n-inc2-moe-mozo-dual-hop_odd-seed0"


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_every_file_of_a_group_composes_and_checks(group, name):
    config = configured(f"{group}={name}", *EXTRA.get((group, name), []))
    if group == "orders":
        orders = assign(UNITS, config.orders)
        named = [unit for unit, order in orders.items() if order is Order.ZEROTH]
        assert bool(named) == (name not in ("first", "zero_shot"))
        usual = {Order.ZEROTH, Order.FIRST}
        assert set(orders.values()) <= {"zero_shot": {Order.FROZEN}, "language_late": set(Order)}.get(name, usual)
    if group == "data":
        assert config.data.name == ("mine" if (group, name) in EXTRA else name)


def test_every_branch_and_layer_plan_has_its_file():
    plans = {f"{b}_{p}" for b, p in itertools.product(("dual", "vision", "language"), ("all", "hop_odd", "hop_even", "prefix", "suffix"))}
    assert set(GROUPS["orders"]) == plans | {"first", "zero_shot", "language_late"}
    for name in plans:
        assert OmegaConf.load(CONFIG_FOLDER / "orders" / f"{name}.yaml") == dict(zip(("branch", "layers"), name.split("_", 1), strict=True))


def test_the_strategy_files_are_the_rows_of_the_table():
    """docs/concepts.md, 2."""
    table = {
        "naive": ("identity", "always", 1e-3, 1e-3),
        "sign": ("sign", "always", 1e-3, 1e-3),
        "conservative": ("identity", "best_of_three", 1e-3, 1e-3),
        "mozo": ("sign", "always", 1e-3, 5e-4),
    }
    assert set(GROUPS["zo"]) == {*table, "many_probes"}
    for name, expected in table.items():
        zo = configured(f"zo={name}").zo
        assert (zo.name, zo.transform, zo.acceptance, zo.epsilon["language"], zo.epsilon["vision"]) == (name, *expected)
        assert (zo.sides, zo.probes, zo.directions, zo.granularity, zo.lr_scale) == (1, 1, "gaussian", "branch", 1.0)


def test_first_order_is_the_baseline_s_optimiser():
    """concepts.md 1.6."""
    config = configured("data=cifar100")
    first = config.first_order
    assert (first.lr, first.weight_decay, first.betas, first.max_grad_norm) == (1e-3, 0.0, [0.9, 0.999], None)
    assert (config.train.epochs, config.train.warmup_steps, config.train.batch_size) == (1, 30, 128)
    assert config.model.prompt == "a bad photo of a {}."


def test_the_adapter_files_are_those_of_the_paper():
    """With the paper's model: the small one may ask for another scale."""
    assert configured("model=vit_b16", "adapter=moe").adapter == MoEConfig(2, 2, 64, 0.1, 0.1)
    assert configured("model=vit_b16", "adapter=lora").adapter == LoRAConfig(10, ["k", "v"], 1.0)
    assert configured("model=vit_b16", "adapter=lora_mlp").adapter == LoRAConfig(64, ["mlp"], 0.1)


def test_there_are_92_published_runs():
    assert len(RUNS) == 92


LAYERS = {"all": range(1, 13), "hop_odd": range(1, 13, 2), "hop_even": range(2, 13, 2), "prefix": range(1, 7), "suffix": range(7, 13)}


@cache
def strategy(name: str) -> ZerothOrderConfig:
    return configured(f"zo={name}").zo


@pytest.mark.parametrize("id", RUNS)
def test_a_published_run_is_what_its_row_says(id):
    run, config = RUNS[id], configured(*expand_paper([f"paper={id}"]))
    assert (config.paper, config.run.name) == (id, f"{id}-seed0")
    assert (config.data.name, config.tasks.increment, config.tasks.base) == (run["dataset"], run["increment"], 0)
    assert config.tasks.order == ("natural" if run["dataset"] == "imagenet_r" else "paper")
    assert (config.model.name, config.model.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert config.train.batch_size == (64 if run["dataset"] == "tiny_imagenet" else 128)  # concepts.md 1.6
    assert (config.train.epochs, config.train.warmup_steps, config.first_order.lr) == (1, 30, 1e-3)
    assert config.adapter == (MoEConfig() if run["adapter"] == "moe" else LoRAConfig())
    orders = assign(UNITS, config.orders)
    branches = {"none": (), "dual": ("language", "vision")}.get(run["branch"], (run["branch"],))
    expected = {UnitId(branch, layer) for branch in branches for layer in LAYERS[run["layers"]]}
    assert {unit for unit, order in orders.items() if order is Order.ZEROTH} == expected
    assert {orders[unit] for unit in UNITS if unit not in expected} <= {Order.FIRST}
    if run["variant"] != "none":
        assert config.zo == strategy(run["variant"])
        assert config.zo.name == run["variant"]


def test_a_user_s_own_overrides_come_after_a_published_run_s_and_win():
    arguments = expand_paper(["train.batch_size=32", "paper=t1-moe-cifar20-dual", "orders.order=frozen", "seed=3"])
    config = configured(*arguments)
    assert (config.train.batch_size, config.orders.order, config.seed) == (32, "frozen", 3)
    assert config.run.name.startswith("t1-moe-cifar20-dual-seed3-order_frozen-batch_size_32-")
    assert expand_paper(["seed=3"]) == ["seed=3"]


def test_a_published_run_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(ValueError) as caught:
        expand_paper(["paper=t2-moe-cifar10-dual-hopodd"])
    assert "paper='t2-moe-cifar10-dual-hopodd': no such run" in str(caught.value) and "t2-moe-cifar10-dual-hop_odd" in str(caught.value)
    with pytest.raises(ValueError, match="paper=table2: a group of runs; train it by dist-vlcl sweep paper=table2"):
        expand_paper(["paper=table2"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "digits-inc2-moe-mozo-dual-hop_odd-seed0"),
        (["orders=first", "adapter=lora", "seed=2"], "digits-inc2-lora-fo-seed2"),
        (["orders=zero_shot"], "digits-inc2-moe-zero-shot-seed0"),
        (["orders=vision_all", "zo=naive", "orders.order=frozen"], "digits-inc2-moe-frozen-vision-all-seed0"),
        (["orders.layers=[1,2]"], "digits-inc2-moe-mozo-dual-list-seed0"),
        (["orders=first", "orders.rest=zeroth"], "digits-inc2-moe-mozo-dual-all-seed0"),
    ],
    ids=str,
)
def test_a_run_s_name_says_what_was_learned_and_how(overrides, name):
    assert default_name(configured(*overrides)) == name


BAD = {
    "orders.branch=both": "orders.branch='both': choose from",
    "orders.layers=odd": "orders.layers='odd': choose from",
    "orders.layers=7": "orders.layers=7",
    "orders.layers=[]": "orders.layers=[]",
    "orders.layers={vision:odd}": "orders.layers",
    "orders.layers={vison:[1]}": "orders.layers",
    "orders.span=0": "orders.span=0: give a number of at least 1, or null",
    "orders.order=second": "orders.order='second': choose from",
    "orders.rest=none": "orders.rest='none': choose from",
    "orders.rest={vision:first}": "orders.rest={'vision': 'first'}: choose from",
    "orders.rest={vision:first,language:second}": "orders.rest={'vision': 'first', 'language': 'second'}: choose from",
    "zo.transform=cube": "zo.transform='cube': choose from",
    "zo.sides=3": "zo.sides=3: choose from 1, 2",
    "zo.directions=cauchy": "zo.directions='cauchy': choose from",
    "zo.granularity=layer": "zo.granularity='layer': choose from",
    "zo.epsilon.vision=0": "zo.epsilon.vision=0.0: give a number of at least 1e-07",
    "zo.epsilon.vision=9e-8": "zo.epsilon.vision=9e-08: give a number of at least 1e-07",
    "zo.clip=-1": "zo.clip=-1.0: give a number of more than 0, or null",
    "zo.probes=0": "zo.probes=0: give a number of at least 1",
    "zo.lr_scale=-1": "zo.lr_scale=-1: give a number above 0, or auto",
    "zo.lr_scale=nan": "zo.lr_scale=nan",
    "zo.granularity=joint orders=vision_all": "zo.granularity=joint: moves both branches",
    "adapter.top_k=3": "adapter.top_k=3: choose from 1 to adapter.experts=2",
    "adapter.scale=0": "adapter.scale=0.0: give a number of more than 0",
    "adapter.dropout=1": "adapter.dropout=1.0: give a number of at least 0 and less than 1",
    "adapter=lora adapter.rank=0": "adapter.rank=0: give a number of at least 1",
    "adapter=lora adapter.targets=[o]": "adapter.targets=['o']: choose from q, k, v",
    "model.context=half": "model.context='half': choose from",
    "model.prompt=photo": "model.prompt='photo': must contain {}",
    "model.name=ViT-B-16-quickgelu": "model.pretrained=shipped: dist_vlcl has weights for model.name=small_clip only",
    "first_order.lr=0": "first_order.lr=0.0: give a number of more than 0",
    "first_order.betas=[0.9]": "first_order.betas",
    "first_order.max_grad_norm=0": "first_order.max_grad_norm=0.0: give a number of more than 0, or null",
    "train.batch_size=0": "train.batch_size=0: give a number of at least 1",
    "train.epochs=0": "train.epochs=0: give a number of at least 1",
    "train.max_steps=0": "train.max_steps=0: give a number of at least 1, or null",
    "run.record_every_steps=-1": "run.record_every_steps=-1: give a number of at least 0",
    "train.micro_batches=0": "train.micro_batches=0: give a number of at least 1",
    "train.warmup_steps=-1": "train.warmup_steps=-1: give a number of at least 0",
    "eval.batch_size=0": "eval.batch_size=0: give a number of at least 1",
    "eval.holdout=1": "eval.holdout=1.0: give a number of at least 0 and less than 1",
    "cluster.device=tpu": "cluster.device='tpu': choose from auto, cpu, cuda",
    "cluster.timeout_s=0": "cluster.timeout_s=0.0: give a number of more than 0",
    "cluster.threads=0": "cluster.threads=0: give a number of at least 1 and at most 1024, or null",
    "cluster.direction_groups=0": "cluster.direction_groups=0: give a number of at least 1",
    "data.reader=mnist": "data.reader='mnist': choose from",
    "data.name=a/b/c data.reader=folder": "data.name='a/b/c': give a plain folder name",
    "data.on_error=ignore": "data.on_error='ignore': choose from stop, skip",
    "data.test_fraction=1": "data.test_fraction=1.0",
    "data=folder": "data.name",
    "run.name=a/b": "run.name='a/b': use letters",
    "data.name=a+b data.reader=folder": "data.name='a+b': give a plain folder name of letters",
    "run.trackers=[comet]": "run.trackers=['comet']: choose from wandb, tensorboard, mlflow",
    "run.keep=0": "run.keep=0: give a number of at least 1",
    "tasks.order=papr": "tasks.order='papr': choose from natural, paper, seed:N (below 2^32), or a list of class ids",
    "tasks.order=seed:x": "tasks.order='seed:x': choose from natural, paper, seed:N (below 2^32), or a list of class ids",
    "tasks.order=seed:4294967296": "tasks.order='seed:4294967296': choose from",
    "tasks.order=5": "tasks.order=5: choose from",
    "tasks.order=null": "tasks.order=None: choose from",
    "tasks.order=[a,b]": "tasks.order=['a', 'b']: choose from",
    "first_order.lr=inf": "first_order.lr=inf: give a number of more than 0",
}


@pytest.mark.parametrize("overrides", BAD)
def test_an_impossible_option_is_refused_by_name_before_anything_is_built(overrides):
    with pytest.raises(ValueError) as caught:
        assign(UNITS, configured(*overrides.split()).orders)  # what needs the model's depth is refused when it is known
    assert BAD[overrides] in str(caught.value)


def test_a_result_s_option_that_config_yaml_could_not_hold_is_refused():
    """With *** in its place, `evaluate` and `load` would use another prompt than the training did."""
    with pytest.raises(ValueError, match=r"model\.prompt: its value looks like a secret, .*config\.yaml would hold \*\*\*"):
        check_saved(configured("model.prompt='a basic Photograph of a {}.'"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=many", "train.batch_size"),
        ("train.batchsize=3", "train.batchsize"),
        ("zo.epsilon.visoin=1", "zo.epsilon.visoin"),
        ("adapter=lora adapter.experts=3", "adapter.experts"),
        ("orders=hop_odd", "dual_hop_odd"),
    ],
)
def test_a_misspelt_option_is_refused_by_hydra_with_its_name(override, words):
    with pytest.raises(Exception, match=words):
        configured(*override.split())


def test_values_live_in_one_place():
    """Configuration files hold values; a part's defaults live beside the part."""
    config = configured()
    assert config.zo == ZerothOrderConfig()
    assert config.orders == OrderPlan()
    assert dataclasses.replace(config.run, name="default") == RunConfig()
    assert OmegaConf.structured(Config).seed == config.seed == 0


@pytest.mark.parametrize("damage", ["zo: {update: simultaneous}", "adapter: null", "[]", "a: [", "zo: 3"])
def test_a_configuration_that_is_damaged_or_of_another_version_is_refused_in_one_sentence(tmp_path, damage):
    saved = configured().as_dict()
    try:
        content = yaml.safe_load(damage)
        text = yaml.safe_dump(saved | {key: saved[key] | value if isinstance(value, dict) else value for key, value in content.items()})
    except (yaml.YAMLError, AttributeError):
        text = damage
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml(: this version has no option zo\.update;|: damaged| is damaged)") as refused:
        load_config(tmp_path / "config.yaml")
    assert ("zo.update" in str(refused.value)) == ("update" in damage)


def test_a_saved_configuration_is_read_as_it_was(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configured().as_dict()))
    assert load_config(tmp_path / "config.yaml") == configured()


def test_an_option_beside_a_saved_configuration_is_read_as_on_a_command_line(tmp_path):
    path, address = tmp_path / "config.yaml", "data.url=https://host/shards"
    path.write_text(yaml.safe_dump(configured(address).as_dict()))
    assert load_config(path, [address]).data.url == "https://host/shards"
    assert load_config(path, ["data.url=null", "data.num_workers=2"]) == configured("data.num_workers=2")
    wrong = {
        "data.root": "'data.root' is not an option: give OPTION=VALUE",
        "run.trackers=[": "run.trackers=[: ",
        "cluster.timeout_s=abc": "cluster.timeout_s=abc: Value 'abc'",
        "run.foo=1": "run.foo=1: Key 'foo' not in 'RunConfig'",
    }
    assert load_config(path, ["data.url=null", "run.trackers=[]"]).run.trackers == []
    for option, words in wrong.items():
        with pytest.raises(ValueError, match=re.escape(words)) as refused:
            load_config(path, ["data.url=null", option])
        assert "damaged" not in str(refused.value) and "object_type" not in str(refused.value)
