"""The catalogue: what the ids, groups and names of the paper's runs mean, and which cell a configuration realises."""

from operator import attrgetter

import pytest

from dist_vlcl.config import Config, compose_config
from dist_vlcl.options import flatten
from dist_vlcl.orders import Order, assign
from dist_vlcl.paper import catalogue, cell_of, groups, paper_runs, run_name, select
from dist_vlcl.report.records import CELL, WITHOUT_ZEROTH, _configuration_of, _differing
from dist_vlcl.report.records import CONTROLS as CONTROL_VARIANTS
from dist_vlcl.report.tables import tasks_label
from tests.test_configs import UNITS

IDENTITY = attrgetter(*CELL)  # of a cell, whatever its id

CONTROLS = {cell.id: control.id for cell in catalogue().values() if (control := cell.control())}


def configured(*options: str) -> Config:
    return compose_config(options)


def realised(*options: str) -> tuple:
    return IDENTITY(cell_of(configured(*options).as_dict()))


def test_the_groups_are_as_large_as_the_paper():
    sizes = {name: len(ids) for name, ids in groups().items()}
    assert sizes == {
        **{"table1": 32, "table2": 48, "table3": 6, "table4": 6, "table5": 8, "figure8": 6, "all": 92},
        **{"lora-layers": 48, "frozen": 68, "walks": 129, "zero-shot": 4},  # of 84 rows, Table 3's and 4's share Table 1's and 2's controls
    }
    # The last: frozen of Table 1, 2 and LoRA layer-wise; zero-shot; random walks; sign beside MoZO.
    assert len(catalogue()) == 92 + 8 + 48 + 16 + 48 + 48 + 4 + 129 + 6
    assert len({IDENTITY(cell) for cell in paper_runs().values()}) == 92


def test_every_zeroth_order_run_has_a_control_of_its_units_and_every_run_its_zero_shot():
    for cell in catalogue().values():
        control = cell.control()
        assert (control is not None) == (cell.variant not in (*WITHOUT_ZEROTH, *CONTROL_VARIANTS) and cell.table != 5)
        assert control is None or (catalogue()[control.id] == control and control.tasks_id == cell.tasks_id)
        if control and control.variant == "frozen":
            assert (control.adapter, control.branch, control.layers) == (cell.adapter, cell.branch, cell.layers)
        variants = [other.variant for other in cell.controls()]
        assert variants[-1:] == ([] if cell.table == 5 else ["zero_shot"])
        assert ("walk" in variants) == (cell.variant in ("naive", "conservative") and cell.table != 5)
        assert ("sign" in variants) == (cell.variant == "mozo") and ("signwalk" in variants) == (cell.variant in ("sign", "mozo"))
        assert all(catalogue()[other.id] == other for other in cell.controls())
    assert CONTROLS["t4-moe-cifar10-vision-sign"] == CONTROLS["t1-moe-cifar10-vision"] == "frozen-moe-cifar10-vision-all"
    assert CONTROLS["t1-lora-cifar20-dual"] == "zero-shot-cifar20"  # with dual/all frozen nothing learns


@pytest.mark.parametrize(
    "id", ["frozen-moe-cifar10-dual-hop_odd", "frozen-lora-tiny20-vision-all", "frozen-moe-imgr20-language-prefix6", "zero-shot-cifar20"]
)
def test_a_control_trains_the_rest_and_nothing_of_its_units(id):
    cell, config = catalogue()[id], configured(f"paper={id}")
    orders = assign(UNITS, config.orders)
    if id.startswith("zero-shot"):
        assert set(orders.values()) == {Order.FROZEN}
    else:
        twin = assign(UNITS, configured(f"paper={next(i for i, control in CONTROLS.items() if control == id)}").orders)
        assert {u for u in UNITS if orders[u] is Order.FROZEN} == {u for u in UNITS if twin[u] is Order.ZEROTH}
        assert all(orders[u] is Order.FIRST for u in UNITS if twin[u] is Order.FIRST)
    assert (config.data.name, config.tasks.increment, config.paper) == (cell.dataset, cell.increment, id)


def test_lora_by_layers_is_table_2_with_lora():
    ours, theirs = configured("paper=x2-lora-cifar10-dual-suffix6"), configured("paper=t2-moe-cifar10-dual-suffix6")
    assert (ours.orders, ours.zo, ours.train, ours.tasks) == (theirs.orders, theirs.zo, theirs.train, theirs.tasks)
    assert ours.adapter == configured("paper=t1-lora-cifar10-fo").adapter != theirs.adapter


def test_a_memory_probe_is_a_few_steps_of_one_task():
    config, like = configured("paper=t5-lora-dual"), configured("paper=t1-lora-tiny20-dual")
    assert (config.tasks.increment, config.train.batch_size) == (125, 64)  # as in benchmarks.memory
    assert (config.tasks.num_tasks, config.train.max_steps, config.eval.zero_shot) == (1, 5, False)
    assert not config.run.record_every_steps and not config.model.graphs  # these take memory
    assert (config.orders, config.zo, config.adapter, config.data) == (like.orders, like.zo, like.adapter, like.data)


@pytest.mark.parametrize("id", [*list(catalogue())[::7], "zero-shot-imgr20", "frozen-moe-cifar10-dual-hop_odd"])
def test_the_configuration_of_a_cell_realises_that_cell(id):
    assert realised(f"paper={id}") == IDENTITY(catalogue()[id])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["paper=t1-moe-cifar20-fo", "orders=dual_hop_odd", "zo=mozo"], ("moe", "dual", "hop_odd", "mozo")),
        (["paper=t1-moe-cifar20-fo", "adapter=lora"], ("lora", "none", "none", "none")),
        (["paper=t1-moe-cifar20-vision", "zo.random_signs=true"], ("moe", "vision", "all", "walk")),
        (["paper=walk-moe-cifar20-vision-all", "zo=many_probes"], ("moe", "vision", "all", "manywalk")),
        (["paper=walk-moe-cifar20-vision-all", "zo.transform=sign"], ("moe", "vision", "all", "signwalk")),
        (["paper=t1-moe-cifar20-dual", "orders=vision_all"], ("moe", "vision", "all", "conservative")),
        (["paper=t1-moe-cifar20-dual", "orders=first"], ("moe", "none", "none", "none")),
        (["paper=t2-moe-cifar20-dual-prefix6", "orders.span=4"], ("moe", "dual", "prefix4", "conservative")),
        (["paper=frozen-moe-cifar20-dual-hop_odd", "orders.order=zeroth", "zo=mozo"], ("moe", "dual", "hop_odd", "mozo")),
        (["paper=t3-moe-cifar10-mozo-hop_odd", "tasks.increment=20", "orders.order=frozen"], ("moe", "dual", "hop_odd", "frozen")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_realises_what_its_options_say_whatever_its_id(options, expected):
    assert realised(*options) == ("cifar100", 20, *expected)


@pytest.mark.parametrize(
    ("plan", "branch", "layers", "variant"),
    [
        (["orders=first"], "none", "none", "none"),
        (["orders=first", "orders.rest=zeroth"], "dual", "all", "conservative"),
        (["orders=dual_hop_odd", "orders.rest=zeroth"], "dual", "all", "conservative"),
        (["orders=vision_all", "orders.order=first"], "none", "none", "none"),
        (["orders=vision_all", "orders.order=frozen", "orders.rest=frozen"], "none", "none", "zero_shot"),
        (["orders=vision_all", "orders.order=first", "orders.rest=frozen"], "dual", "all but vision all", "frozen"),
        (["orders=dual_hop_odd", "orders.order=frozen", "orders.rest=zeroth"], "dual", "all but dual hop_odd", "conservative"),
        (["orders=dual_hop_odd", "orders.rest=frozen"], "dual", "hop_odd", "conservative"),
        (["orders=dual_hop_odd", "orders.order=first", "orders.rest=zeroth"], "dual", "all but dual hop_odd (first order)", "conservative"),
        (
            ["orders.layers={language: suffix, vision: suffix}", "orders.span=3"],
            "dual",
            "{'language':'suffix','vision':'suffix'}3",
            "conservative",
        ),
        (["orders=dual_all", "orders.order=frozen"], "none", "none", "zero_shot"),
        (["orders=language_late"], "language", "suffix4", "conservative"),
        (["orders=language_late", "orders.order=frozen"], "language", "suffix4", "frozen"),
        (["orders=language_late", "orders.rest=frozen", "orders.order=first"], "dual", "all but language suffix4", "frozen"),
        (["orders=language_late", "orders.order=first"], "dual", "all but language suffix4", "frozen"),
        (["orders=language_all", "orders.rest={language: frozen, vision: frozen}"], "language", "all", "conservative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_plan_realises_a_cell_that_says_what_learns(plan, branch, layers, variant):
    assert realised("data=cifar100", "model=vit_b16", "tasks.increment=20", "zo=conservative", *plan)[3:] == (branch, layers, variant)


def test_an_adapter_of_the_user_s_own_is_not_mistaken_for_lora():
    config = configured("paper=t1-moe-cifar20-fo", "adapter=lora").as_dict()
    config["adapter"]["kind"] = "low_rank:Mine"
    assert cell_of(config).adapter == "low_rank.Mine"
    assert "adapter=moe" in cell_of(config).overrides()


def test_data_sets_as_tasks_have_no_number_of_classes_and_are_compared_with_the_same_defaults():
    cell = cell_of(configured("data=sets", "tasks.sets=[cifar100,pacs]", "orders=first").as_dict())
    assert (cell.dataset, cell.increment, tasks_label(cell.dataset, cell.increment)) == ("cifar100-pacs", 0, "cifar100-pacs")
    assert configured(*cell.overrides()).tasks == configured("data=folder", "data.name=cifar100-pacs").tasks
    assert tasks_label("pacs", 2) == "pacs Inc2"
    given = configured("data=sets", "tasks.sets=[cifar100,pacs]", "tasks.increment=20", "orders=first").as_dict()
    assert cell_of(given) == cell and not {"tasks.increment"} & set(_differing(given, _configuration_of(cell), "none"))


def test_a_selection_is_ids_groups_and_wildcards_each_once():
    assert select(["table3", "t3-moe-cifar10-mozo-hop_odd", "t3-*"]) == groups()["table3"]
    assert len(select(["t2-*-cifar20-*"])) == 12 and all("t2-" in id for id in select(["t2-*"]))
    with pytest.raises(ValueError, match="paper='tabel2': no such run; the nearest are table2"):
        select(["tabel2"])


def test_names_distinguish_runs_and_do_not_depend_on_the_order_of_options():
    id = next(iter(paper_runs()))
    assert run_name(id, []) == run_name(id, ["run.root=/a", "data.source=/b", "cluster.num_processes=2"]) == f"{id}-seed0"
    assert run_name(id, ["seed=3", "model.pretrained=/a/clip.safetensors"]) == f"{id}-seed3"
    one, other = ["model=small", "train.epochs=2"], ["model=small", "train.epochs=20"]
    assert run_name(id, one) == run_name(id, one[::-1]) != run_name(id, other)
    assert run_name(id, one).startswith(f"{id}-seed0-model_small-epochs_2-")
    long = [f"orders.layers=[{','.join(map(str, range(1, n)))}]" for n in (10, 11)]
    assert len({run_name(id, [option]) for option in long}) == 2 and all(len(run_name(id, [option])) < 120 for option in long)
    assert run_name(id, ["a.b=[1,2]"]) != run_name(id, ["a.b=1_2"])


def test_own_options_win_over_the_cell_s_and_are_in_the_name():
    words = ["paper=t3-moe-cifar10-mozo-hop_odd", "zo.lr_scale=0.5", "zo.acceptance=best_of_three"]
    config = configured(*words)
    assert configured(*reversed(words)).zo == config.zo and (config.zo.lr_scale, config.zo.acceptance) == (0.5, "best_of_three")
    assert config.zo.transform == "sign" and "acceptance_best_of_three" in config.run.name


def test_flattening_keeps_every_leaf_under_its_dotted_key():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [1]}) == {"a.b": 1, "a.c.d": None, "f": [1]}
