import json
from dataclasses import asdict

import pytest

from dist_vlcl.run.state import TrainState


def test_a_state_survives_json():
    state = TrainState(task=2, epoch=1, batch=3, step=40, accuracy=[[[3, 4]]], zero_shot={0: 0.5}, seconds=1.5, world_size=2)
    assert TrainState.from_dict(json.loads(json.dumps(asdict(state)))) == state


def test_batches_epochs_and_tasks_count_up_and_their_parts_start_over():
    state = TrainState()
    state.advance()
    state.advance()
    assert (state.task, state.epoch, state.batch, state.step) == (0, 0, 2, 2)
    state.next_epoch()
    state.advance()
    assert (state.task, state.epoch, state.batch, state.step) == (0, 1, 1, 3)
    state.next_task()
    assert (state.task, state.epoch, state.batch, state.step) == (1, 0, 0, 3)


@pytest.mark.parametrize("wrong", [{"task": "1"}, {"accuracy": [[["3", 4]]]}, {"zero_shot": []}, {"step": True}])
def test_a_field_of_another_type_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainState.from_dict({**asdict(TrainState()), **wrong})


def test_a_missing_field_is_named():
    saved = asdict(TrainState())
    del saved["epoch"]
    with pytest.raises(ValueError, match="epoch"):
        TrainState.from_dict(saved)
