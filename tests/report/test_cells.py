"""Which runs may stand in one cell, and which may not pass for the paper's."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dist_vlcl.config import CONFIG_FOLDER, expand_paper, from_hydra
from dist_vlcl.paper import control_of
from dist_vlcl.report.build import published_paper, reference
from dist_vlcl.report.cells import (
    ZERO_SHOT,
    Entry,
    Method,
    Stream,
    cell_of,
    classify,
    departures,
    first_order,
    published_cells,
    sections_of,
)
from dist_vlcl.report.records import Run

CELLS = published_cells(published_paper()["runs"])
HOP = "paper=t2-moe-cifar10-dual-hop_odd"
CIFAR10 = Stream("cifar100", 10)
PLAN = Method("moe", "dual", "hop_odd", "conservative")


def run(*overrides: str, of_class: int = 100, images: int = 50000) -> Run:
    """A complete run of these overrides, on so many training images and test images of a class."""
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        config = from_hydra(compose("config", expand_paper(list(overrides)))).as_dict()
    rows, steps = [[(1, of_class)] * 100], images // config["train"]["batch_size"] * config["train"]["epochs"]
    return Run(Path("runs") / "-".join(overrides), config, {"complete": True, "rows": rows, "steps": steps, "last": 0.5, "avg": 0.6})


def entry(*overrides: str, **counts: int) -> Entry:
    return classify(run(*overrides, **counts), reference)


def shown(found: Entry) -> list[str]:
    return [str(departure) for departure in found.departures]


@pytest.mark.parametrize("id", ["t1-moe-tiny20-fo", "t1-lora-imgr20-vision", "t2-moe-cifar20-dual-prefix6", "t3-moe-cifar10-mozo-hop_even"])
def test_a_published_run_departs_in_nothing_from_its_cell(id):
    found, cell = entry(f"paper={id}", images=0), next(cell for cell in CELLS if cell.id == id)
    assert (found.stream, found.method) == (cell.stream, cell.method)
    assert [d for d in shown(found) if not d.startswith("the ")] == []
    without_id = {**found.run.config, "paper": None}
    assert (classify(Run(Path("x"), without_id, {}), reference).method, found.stream) == (cell.method, cell.stream)


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (["paper=t1-moe-cifar20-fo", "orders=dual_hop_odd", "zo=mozo"], Method("moe", "dual", "hop_odd", "mozo")),
        (["paper=t1-moe-cifar20-fo", "adapter=lora"], first_order("lora")),
        (["paper=t1-moe-cifar20-dual", "orders=vision_all"], Method("moe", "vision", "all", "conservative")),
        (["paper=t1-moe-cifar20-dual", "orders=first"], first_order("moe")),
        (["paper=t2-moe-cifar20-dual-hop_odd", "orders=dual_hop_even"], Method("moe", "dual", "hop_even", "conservative")),
        (["paper=t2-moe-cifar20-dual-prefix6", "orders.span=4"], Method("moe", "dual", "prefix4", "conservative")),
        (["paper=frozen-moe-cifar20-dual-hop_odd", "orders.order=zeroth", "zo=mozo"], Method("moe", "dual", "hop_odd", "mozo")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_id_is_no_authority_over_the_options_beside_it(overrides, method):
    found = entry(*overrides)
    assert (found.stream, found.method) == (Stream("cifar100", 20), method)
    assert [d for d in shown(found) if not d.startswith("orders.span")] == []


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_plan_has_a_method_that_says_what_learns(plan, branch, layers, variant):
    found = entry("data=cifar100", "model=vit_b16", "tasks.increment=20", "zo=conservative", *plan)
    assert (found.method.branch, found.method.layers, found.method.variant) == (branch, layers, variant)
    if found.method == PLAN:
        assert shown(found) == ["orders.rest frozen (not first)"]


def test_an_adapter_of_the_user_s_own_is_not_taken_for_lora():
    config = run("paper=t1-moe-cifar20-fo", "adapter=lora").config
    config["adapter"]["kind"] = "low_rank:Mine"
    assert classify(Run(Path("x"), config, {}), reference).method == first_order("low_rank.Mine")


def test_92_cells_are_92_methods_on_streams():
    assert len({(cell.stream, cell.method) for cell in CELLS}) == len(CELLS) == 92


def test_a_frozen_run_is_the_control_of_its_plan_whatever_its_id():
    assert entry(HOP, "orders.order=frozen").method == PLAN.twin == Method("moe", "dual", "hop_odd", "frozen")
    assert entry("paper=t3-moe-cifar10-mozo-hop_odd", "orders.order=frozen").method == PLAN.twin


def test_where_nothing_is_left_to_learn_the_control_is_zero_shot():
    assert entry("data=cifar100", "tasks.increment=10", "orders=dual_all", "orders.order=frozen").method == ZERO_SHOT
    assert entry("data=cifar100", "tasks.increment=10", "orders=zero_shot").method == ZERO_SHOT
    assert Method("lora", "dual", "all", "sign").twin == ZERO_SHOT and Method("moe", "vision", "all", "sign").twin != ZERO_SHOT


def test_the_data_are_what_the_run_had_whatever_its_id_says():
    found = entry("paper=t1-moe-cifar10-dual", "data=digits", "tasks.increment=2", "tasks.order=natural")
    assert (found.stream, found.method.branch) == (Stream("digits", 2), "dual")
    assert entry("paper=t1-moe-cifar10-dual", "tasks.increment=20").stream == Stream("cifar100", 20)


def test_another_data_set_under_an_id_of_imagenet_r_has_tables_of_its_own():
    own = ["data=folder", "data.name=pacs", "tasks.base=3", "tasks.increment=2"]
    ids = ("t1-moe-imgr20-fo", "t1-moe-imgr20-vision", "frozen-moe-imgr20-vision-all", "zero-shot-imgr20")
    (section,) = sections_of([entry(f"paper={id}", *own, images=0) for id in ids])
    pacs = Stream("pacs", 2)
    assert section.streams == [pacs] and not section.is_paper and [d.key for d in section.departures] == ["tasks.base"]
    vision = Method("moe", "vision", "all", "conservative")
    assert all(len(section.find(pacs, method)) == 1 for method in (first_order("moe"), vision, vision.twin, ZERO_SHOT))


@pytest.mark.parametrize(
    "id", ["t1-moe-tiny20-dual", "t1-lora-imgr20-vision", "t2-moe-cifar20-dual-prefix6", "t3-moe-cifar10-mozo-hop_odd"]
)
def test_the_catalogue_s_control_of_a_run_is_filed_as_its_twin(id):
    (stream, method), (own_stream, own) = (cell_of(run(f"paper={name}").config) for name in (control_of(id), id))
    assert (stream, method) == (own_stream, own.twin)


def test_seeds_places_and_ranks_are_no_departure():
    assert shown(entry(HOP, "seed=3", "run.name=other", "data.root=elsewhere", "cluster.num_processes=4", "train.micro_batches=2")) == []


def test_another_model_is_never_the_paper_s():
    other = entry(HOP, "model=small")
    assert {d.key for d in other.departures} == {"model.name", "model.pretrained", "adapter.scale"}
    (section,) = sections_of([other])
    assert not section.is_paper and section.title == "Part 1, small_clip (shipped): not the paper's model"
    assert other.note == () and section.entries[0].note == ()


def test_weights_from_a_file_are_not_taken_for_openai_s():
    found = entry(HOP, "model.pretrained=/somewhere/weights.safetensors")
    assert shown(found) == ["model.pretrained weights.safetensors (not openai)"]
    assert not sections_of([found])[0].is_paper


def test_another_regime_is_another_section():
    first, second = sections_of([entry(HOP, "train.epochs=2"), entry(HOP), entry(HOP, "seed=1")])
    assert first.is_paper and [e.run.seed for e in first.entries] == [0, 1]
    assert second.title == "Part 2, ViT-B-16-quickgelu (openai): the paper's model, not its settings" and [
        str(d) for d in second.departures
    ] == ["train.epochs 2 (not 1)"]


def test_a_part_of_the_images_is_a_departure():
    assert shown(entry(HOP, of_class=50)) == ["the test set a part (not whole)"]
    assert shown(entry(HOP, images=25000)) == ["the training set a part (not whole)"]
    assert not sections_of([entry(HOP, of_class=50)])[0].is_paper


def test_equal_settings_are_one_regime_where_the_paper_has_two():
    """The paper trains Tiny-ImageNet in batches of 64, CIFAR-100 of 128."""
    cifar, tiny = entry(HOP, "train.batch_size=64"), entry("paper=t1-moe-tiny20-fo")
    (section,) = sections_of([cifar, tiny])
    assert [str(d) for d in section.departures] == ["train.batch_size 64 (not 128)"] and len(section.entries) == 2


def test_a_method_s_own_settings_are_a_note_unless_all_share_them():
    plain, tuned, first = entry(HOP), entry(HOP, "zo.lr_scale=3.0"), entry("paper=t1-moe-cifar10-fo")
    (section,) = sections_of([plain, tuned, first])
    assert section.notes(PLAN) == [(), ("zo.lr_scale 3.0 (not 1.0)",)]
    assert [e.run for e in section.find(CIFAR10, PLAN, ())] == [plain.run]
    (section,) = sections_of([tuned, first])
    assert section.is_paper and section.notes(PLAN) == [()] and [d.key for d in section.departures] == ["zo.lr_scale"]


def test_zero_shot_belongs_to_every_regime_of_its_model():
    zero_shot = entry("data=cifar100", "tasks.increment=10", "model=vit_b16", "orders=zero_shot", images=0)
    assert [len(section.entries) for section in sections_of([entry(HOP), entry(HOP, "train.epochs=2"), zero_shot])] == [2, 2]
    assert [len(section.entries) for section in sections_of([entry(HOP, "tasks.order=natural"), zero_shot])] == [1, 1]


def test_of_two_runs_with_one_seed_the_first_counts():
    (section,) = sections_of([entry(HOP, "run.name=a"), entry(HOP, "run.name=b")])
    assert [e.run.config["run"]["name"] for e in section.entries] == ["a"]


def test_a_class_order_of_each_seed_s_own_is_one_setting():
    orders = [entry(HOP, f"seed={seed}", f"tasks.order=seed:{seed}") for seed in (0, 1)]
    (section,) = sections_of(orders)
    assert [str(d) for d in section.departures] == ["tasks.order seed:N (not paper)"] and len(section.entries) == 2


def test_options_of_another_version_are_no_departure():
    found = entry(HOP)
    older = {**found.run.config, "train": {k: v for k, v in found.run.config["train"].items() if k != "epochs"}, "new": {"option": 1}}
    assert departures(older, reference(found.run, found.stream, found.method), found.method) == []


def test_a_probe_of_memory_stands_in_the_paper_s_part_but_in_no_cell():
    found = entry(HOP, "tasks.num_tasks=1", of_class=50, images=640)
    found.run.config["train"]["max_steps"] = 5
    probe = classify(found.run, reference)
    first, *others = sections_of([entry(HOP, "train.epochs=2"), entry(HOP), probe])
    assert first.is_paper and first.probes == [probe] and len(first.entries) == 1
    assert [len(section.probes) for section in others] == [0]
