"""Claims about ranks: what they send has the same bits everywhere, and a launch that would train alone is refused."""

import pytest
import torch

from dist_vlcl.dist.agree import DisagreementError, agree, digest
from dist_vlcl.dist.world import DIRECT_BYTES, ClusterConfig, World
from dist_vlcl.options import validate
from dist_vlcl.run.folder import RunRefused
from tests.helpers.ranks import run_ranks


def call_collectives(world: World) -> dict:
    return {
        "sum": world.sum_exact(torch.tensor([world.rank + 1, 2**60 + world.rank, -7])).tolist(),
        "many": world.sum_exact(torch.arange(DIRECT_BYTES // 8) * 2**40 + world.rank)[-2:].tolist(),  # too many to send directly
        "main's": world.on_main(lambda: {"from": world.rank}, "a value"),
        "objects": world.gather_objects(world.rank * 10),
        "main": world.is_main,
    }


def test_collectives_give_every_rank_the_same_and_sums_are_exact():
    results = run_ranks(call_collectives, 3)
    for result in results:
        assert result["sum"] == [6, 3 * 2**60 + 3, -21]
        assert result["many"] == [3 * (DIRECT_BYTES // 8 - k) * 2**40 + 3 for k in (2, 1)]
        assert result["main's"] == {"from": 0}
        assert result["objects"] == [0, 10, 20]
    assert [r["main"] for r in results] == [True, False, False]


def fail_on_main(world: World) -> tuple[str, list[int]]:
    ran: list[int] = []

    def work() -> None:
        ran.append(world.rank)
        raise RunRefused("rank 0 has no folder")

    with pytest.raises(RunRefused) as refused:
        world.on_main(work, "the folder")
    return str(refused.value), ran


def test_work_of_rank_0_is_done_there_alone_and_its_error_is_raised_on_every_rank():
    assert run_ranks(fail_on_main, 2) == [("rank 0 has no folder", [0]), ("rank 0 has no folder", [])]


def test_one_rank_is_not_a_special_case():
    alone = {"sum": [1, 2**60, -7], "main's": {"from": 0}, "objects": [0], "main": True}
    alone["many"] = [(DIRECT_BYTES // 8 - k) * 2**40 for k in (2, 1)]
    assert call_collectives(World.alone()) == alone


def disagree(world: World) -> str:
    facts = {"the code": "c0de", "the configuration": {"seed": 0, "train": {"batch_size": 8 if world.rank != 2 else 9}}}
    try:
        agree(world, facts if world.rank != 1 else {**facts, "the class order": "xyz"}, "Use one file.")
    except DisagreementError as error:
        return str(error)
    return ""


def test_a_disagreement_names_each_fact_and_the_ranks_on_every_rank():
    messages = run_ranks(disagree, 3)
    assert len(set(messages)) == 1
    assert "the configuration.train.batch_size: ranks [2] differ from rank 0 (rank 0: 8; rank 2: 9)" in messages[0]
    assert "the class order: ranks [1] differ from rank 0 (rank 0: None; rank 1: xyz)" in messages[0]
    assert messages[0].endswith("Use one file.") and "the code" not in messages[0] and "seed" not in messages[0]


def test_digest_sees_a_flipped_bit_and_swapped_tensors():
    a, b = torch.arange(6.0), torch.arange(6.0) + 1
    flipped = a.clone()
    flipped.view(torch.int32)[3] ^= 1
    assert digest({"a": a, "b": b}) != digest({"a": flipped, "b": b})
    assert digest({"a": a, "b": b}) != digest({"a": b, "b": a})
    assert digest({"a": a, "b": b}) == digest({"b": b, "a": a.clone()})


def test_a_launch_of_another_size_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match=r"cluster.num_processes=2, but the launcher started 1(.|\n)*--multi_gpu"):
        World.from_environment(ClusterConfig(num_processes=2, device="cpu"))


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"cluster.device='tpu': choose from auto, cpu, cuda"):
        validate(ClusterConfig(device="tpu"), "cluster")


def too_many_groups(world: World) -> str:
    try:
        World.from_environment(ClusterConfig(direction_groups=3, device="cpu", threads=1))
    except RuntimeError as error:
        return str(error)
    return ""


def test_direction_groups_that_do_not_divide_the_ranks_are_refused():
    assert run_ranks(too_many_groups, 2) == ["cluster.direction_groups=3: choose a divisor of the 2 ranks"] * 2


@pytest.mark.parametrize(("of_shell", "rank"), [({"RANK": "3"}, 0), ({"WORLD_SIZE": "2"}, 0), ({"RANK": "1", "WORLD_SIZE": "2"}, 1)])
def test_only_a_launcher_which_sets_both_announces_a_rank(of_shell, rank, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in of_shell.items():
        monkeypatch.setenv(name, value)
    assert World.announced().rank == rank
