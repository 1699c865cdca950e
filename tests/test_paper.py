"""The catalogue: what the ids, groups and names of the paper's runs mean."""

import pytest
from hydra import compose, initialize_config_dir

from dist_vlcl.config import CONFIG_FOLDER, Config, expand_paper, from_hydra
from dist_vlcl.orders import Order, assign
from dist_vlcl.paper import catalogue, control_of, groups, paper_runs, run_name, select, zero_shot_of
from tests.test_configs import UNITS


def configured(*words: str) -> Config:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        return from_hydra(compose("config", expand_paper(list(words))))


def test_the_groups_are_as_large_as_the_paper():
    sizes = {name: len(ids) for name, ids in groups().items()}
    assert sizes == {
        **{"table1": 32, "table2": 48, "table3": 6, "table4": 6, "table5": 8, "figure8": 6, "all": 92},
        **{"lora-layers": 48, "frozen": 68, "zero-shot": 4},  # of 84 rows, Table 3's and 4's share Table 1's and 2's controls
    }
    assert len(catalogue()) == 92 + 8 + 48 + 16 + 48 + 48 + 4  # the last: frozen of Table 1, 2 and LoRA layer-wise; zero-shot


def test_every_zeroth_order_run_has_a_control_and_every_run_its_zero_shot():
    for id, run in catalogue().items():
        control = control_of(id)
        is_zeroth = run["zo_variant"] in ("naive", "sign", "conservative", "mozo")
        assert (control is not None) == (is_zeroth and run["table"] != 5)
        if control:
            twin = catalogue()[control]
            assert (twin["dataset"], twin["inc"]) == (run["dataset"], run["inc"])
            if twin["zo_variant"] == "frozen":
                assert [twin[k] for k in ("adapter", "zo_branch", "zo_layers")] == [run[k] for k in ("adapter", "zo_branch", "zo_layers")]
        assert catalogue()[zero_shot_of(id)]["zo_variant"] == "zero_shot"
    assert control_of("t4-moe-cifar10-vision-sign") == control_of("t1-moe-cifar10-vision") == "frozen-moe-cifar10-vision-all"
    assert control_of("t1-lora-cifar20-dual") == "zero-shot-cifar20"  # with dual/all frozen nothing learns


@pytest.mark.parametrize(
    "id", ["frozen-moe-cifar10-dual-hop_odd", "frozen-lora-tiny20-vision-all", "frozen-moe-imgr20-language-prefix6", "zero-shot-cifar20"]
)
def test_a_control_trains_the_rest_and_nothing_of_its_units(id):
    run, config = catalogue()[id], configured(f"paper={id}")
    orders = assign(UNITS, config.orders)
    if id.startswith("zero-shot"):
        assert set(orders.values()) == {Order.FROZEN}
    else:
        twin = assign(UNITS, configured(f"paper={next(i for i in catalogue() if control_of(i) == id)}").orders)
        assert {u for u in UNITS if orders[u] is Order.FROZEN} == {u for u in UNITS if twin[u] is Order.ZEROTH}
        assert all(orders[u] is Order.FIRST for u in UNITS if twin[u] is Order.FIRST)
    assert (config.data.name, config.tasks.increment, config.paper) == (run["dataset"], run["inc"], id)


def test_lora_by_layers_is_table_2_with_lora():
    ours, theirs = configured("paper=x2-lora-cifar10-dual-suffix6"), configured("paper=t2-moe-cifar10-dual-suffix6")
    assert (ours.orders, ours.zo, ours.train, ours.tasks) == (theirs.orders, theirs.zo, theirs.train, theirs.tasks)
    assert ours.adapter == configured("paper=t1-lora-cifar10-fo").adapter != theirs.adapter


@pytest.mark.parametrize("id", [id for id in catalogue() if id.startswith(("x2-", "frozen-", "zero-shot-", "t5-"))])
def test_what_is_not_published_is_a_published_run_but_for_what_its_id_says(id):
    """In words of the command line; what those mean is tested for each published run (tests/test_configs.py)."""
    own = set(expand_paper([f"paper={id}"])) - {f"paper={id}", f"run.name={id}-seed0"}
    run = catalogue()[id]
    like = id if id.startswith("x2-") else next((i for i in paper_runs() if control_of(i) == id), None)
    if id.startswith("x2-"):
        like = id.replace("x2-lora", "t2-moe")
        changed = ({"adapter=moe"}, {"adapter=lora"})
    elif id.startswith("t5-"):
        like = f"t1-{run['adapter']}-cifar20-{id.rsplit('-', 1)[1]}"
        changed = (
            set(),
            {"tasks.num_tasks=1", "train.max_steps=5", "eval.zero_shot=false", "run.record_every_steps=0", "model.graphs=false"},
        )
    elif id.startswith("zero-shot-"):
        changed = ({"orders=dual_all", "zo=conservative"}, {"orders=zero_shot"})
    else:  # the controls of LoRA layer by layer have no published run
        like = like or next(i for i in catalogue() if control_of(i) == id)
        changed = ({f"zo={catalogue()[like]['zo_variant']}"}, {"orders.order=frozen"})
    theirs = set(expand_paper([f"paper={like}"])) - {f"paper={like}", f"run.name={like}-seed0"}
    assert (theirs - own, own - theirs) == changed


def test_a_memory_probe_is_a_few_steps_of_one_task():
    config = configured("paper=t5-lora-dual")
    assert (config.tasks.num_tasks, config.train.max_steps, config.eval.zero_shot) == (1, 5, False)
    assert (config.orders.branch, config.orders.layers) == ("dual", "all") and not config.run.record_every_steps  # which takes memory


def test_a_selection_is_ids_groups_and_wildcards_each_once():
    assert select(["table3", "t3-moe-cifar10-mozo-hop_odd", "t3-*"]) == groups()["table3"]
    assert len(select(["t2-*-cifar20-*"])) == 12 and all("t2-" in id for id in select(["t2-*"]))
    with pytest.raises(ValueError, match="paper='tabel2': no such run; the nearest are table2"):
        select(["tabel2"])


def test_names_tell_runs_apart_and_are_the_same_again():
    id = next(iter(paper_runs()))
    assert run_name(id, []) == run_name(id, ["run.root=/a", "data.source=/b", "cluster.num_processes=2"]) == f"{id}-seed0"
    assert run_name(id, ["seed=3", "model.pretrained=/a/clip.safetensors"]) == f"{id}-seed3"
    one, other = ["model=small", "train.epochs=2"], ["model=small", "train.epochs=20"]
    assert run_name(id, one) == run_name(id, one[::-1]) != run_name(id, other)
    assert run_name(id, one).startswith(f"{id}-seed0-model_small-epochs_2-")
    long = [f"orders.layers=[{','.join(map(str, range(1, n)))}]" for n in (10, 11)]
    assert len({run_name(id, [word]) for word in long}) == 2 and all(len(run_name(id, [word])) < 120 for word in long)
    assert run_name(id, ["a.b=[1,2]"]) != run_name(id, ["a.b=1_2"])


def test_tuned_options_stand_where_the_word_stood_and_are_in_the_name(tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("# a comment\nzo: {lr_scale: 0.1, epsilon: {vision: 0.0002}, acceptance: best_of_three}\n")
    config = configured("paper=t3-moe-cifar10-mozo-hop_odd", f"tuned={file}", "zo.lr_scale=0.5")
    assert (config.zo.lr_scale, config.zo.epsilon["vision"], config.zo.acceptance) == (0.5, 2e-4, "best_of_three")
    assert config.zo.transform == "sign" and "acceptance_best_of_three" in config.run.name
    with pytest.raises(ValueError, match="cannot be read"):
        expand_paper([f"tuned={tmp_path}/none.yaml"])
