"""A run can start from the adapters of an earlier run (adapter.init), and a start that does not fit is refused before any work."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dist_vlcl
from dist_vlcl import train as train_module
from dist_vlcl.commands.evaluate import evaluate_elsewhere, evaluate_run
from dist_vlcl.commands.export import export
from dist_vlcl.config import compose_config
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import Experiment
from dist_vlcl.inference import read_start, read_trained
from dist_vlcl.run import checkpoint
from dist_vlcl.saved import read_accuracy
from dist_vlcl.train import train
from tests.helpers.tiny_clip import architecture

RUN = [f"model.name={architecture(3, 3)}", "model.pretrained=random", "orders=first", "first_order.lr=0.01", "adapter.scale=1.0"]
RUN += ["tasks.num_tasks=1", "train.epochs=1", "train.batch_size=60", "train.warmup_steps=1", "cluster.threads=1", "run.keep=9"]
RUN += ["run.trackers=[]", "run.progress=false", "run.plots=false", "run.record_every_steps=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with the run `first`, which has learned one task, and its export."""
    root = tmp_path_factory.mktemp("runs")
    train(config(root, "first", init=None), World.alone())
    export(read_trained(root / "first"), root / "export", "adapters", "first")
    return root


def config(root: Path, name: str, *options: str, init: Path | str | None):
    options = (*options, *([f"adapter.init={init}"] if init else []))
    return compose_config([*RUN, f"run.root={root}", f"run.name={name}", f"data.root={root}/data", *options])


@pytest.mark.parametrize("source", ["first", "first/checkpoints/step-00000005.safetensors", "export", "export/adapters.safetensors"])
def test_every_form_of_a_trained_run_gives_its_adapters(root, source):
    expected, start = read_trained(root / "first").adapters, read_start(config(root, "new", init=root / source))
    assert start.keys() == expected.keys() and all(torch.equal(start[name], t) for name, t in expected.items())


def test_a_run_starts_from_the_adapters_of_another_and_resumes_without_it(root, tmp_path, capsys):
    shutil.copytree(root / "first", tmp_path / "source")
    cfg = config(root, "warm", "tasks.order=[4,5,0,1,2,3,6,7,8,9]", init=tmp_path / "source")
    train(cfg, World.alone())
    start, end = (checkpoint.load(cfg.run.folder, step).tensors for step in (0, checkpoint.saved_steps(cfg.run.folder)[-1]))
    for name, tensor in read_trained(tmp_path / "source").adapters.items():
        assert torch.equal(start[f"adapters/{name}"], tensor)

    shutil.rmtree(tmp_path / "source")
    (cfg.run.folder / "accuracy.json").unlink()
    for step in checkpoint.saved_steps(cfg.run.folder)[1:]:
        (cfg.run.folder / "checkpoints" / f"step-{step:08d}.safetensors").unlink()
    train(cfg, World.alone())  # from the checkpoint of step 0
    again = checkpoint.load(cfg.run.folder, checkpoint.saved_steps(cfg.run.folder)[-1]).tensors
    assert all(torch.equal(again[key], tensor) for key, tensor in end.items())
    assert not torch.equal(end[f"adapters/{name}"], start[f"adapters/{name}"])
    assert evaluate_run(cfg.run.folder, World.alone(), [f"data.root={root}/data"]).rows == [
        list(map(tuple, row)) for row in read_accuracy(cfg.run.folder)["rows"]
    ]


def test_a_run_without_checkpoints_starts_again_repeats_the_journal_and_saves_under_its_last_step(root):
    """Saved before that, a kill would leave the first adapters under the number of a later step."""
    options = ["orders=dual_all", "zo=naive", "train.warmup_steps=0", "run.save_every_steps=1"]
    cfg = config(root, "journalled", *options, init=root / "first")
    train(cfg, World.alone())
    last = checkpoint.saved_steps(cfg.run.folder)[-1]
    whole = checkpoint.load(cfg.run.folder, last).tensors
    journal = (cfg.run.folder / "journal.jsonl").read_text().splitlines(keepends=True)
    (cfg.run.folder / "journal.jsonl").write_text("".join(journal[:2]))
    (cfg.run.folder / "accuracy.json").unlink()
    second = checkpoint.load(cfg.run.folder, 2).tensors
    for path in (cfg.run.folder / "checkpoints").iterdir():
        path.unlink()
    train(cfg, World.alone())
    steps = checkpoint.saved_steps(cfg.run.folder)
    assert steps[0] == 2 and steps[-1] == last
    again = checkpoint.load(cfg.run.folder, 2).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())
    assert all(torch.equal(checkpoint.load(cfg.run.folder, last).tensors[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("is_other", [True, False])
def test_adapters_of_other_weights_of_clip_are_used_with_a_warning(root, is_other, tmp_path):
    """A file of weights can be written anew under its name."""
    shutil.copytree(root / "first", tmp_path / "first")
    if is_other:
        (tmp_path / "first/env.json").write_text(json.dumps([{"weights": "0123456789abcdef0123"}]))
    options = [f"data.root={root}/data"]
    uses = {
        "load": lambda: dist_vlcl.load(tmp_path / "first"),
        "evaluate": lambda: evaluate_run(tmp_path / "first", World.alone(), options),
        "elsewhere": lambda: evaluate_elsewhere(tmp_path / "first", f"{root}/data/digits", World.alone(), options),
        "init": lambda: train(config(root, f"of-other-{is_other}", "train.max_steps=1", init=tmp_path / "first"), World.alone()),
    }
    for use in uses.values():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()
        text = "first was trained with other weights or precision of CLIP (digest was 0123456789abcdef, is "
        assert sum(text in str(warning.message) for warning in caught) == is_other


def test_zero_shot_means_clip_without_the_earlier_adapters(root, monkeypatch):
    changes, measure = [], Experiment.evaluate_untrained

    def observed(experiment, *arguments):
        changes.extend(float(unit.tensors()["up_weight"].abs().max()) for unit in experiment.towers.units.values())
        return measure(experiment, *arguments)

    monkeypatch.setattr(Experiment, "evaluate_untrained", observed)
    train(config(root, "compared", "train.max_steps=1", init=root / "first"), World.alone())
    assert changes == [0.0] * 6


def test_a_run_whose_start_is_lost_is_not_started_from_new_adapters(root, tmp_path):
    cfg = config(root, "broken", init=root / "first")
    train(cfg, World.alone())
    (cfg.run.folder / "accuracy.json").unlink()
    for path in (cfg.run.folder / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    with (
        pytest.warns(RuntimeWarning, match="no intact checkpoint"),
        pytest.raises(ValueError, match="no intact checkpoint, and began with"),
    ):
        train(cfg, World.alone())


def test_an_export_names_no_path_of_its_start(root, tmp_path):
    cfg = config(root, "exported", "train.max_steps=1", init=root / "first")
    train(cfg, World.alone())
    export(read_trained(cfg.run.folder), tmp_path / "out", "adapters", "exported")
    assert str(root) in (cfg.run.folder / "config.yaml").read_text() and str(root) not in (tmp_path / "out" / "config.yaml").read_text()


REFUSED = {
    "adapter=lora": "they were trained with adapter.experts=2, and here it is None",
    f"model.name={architecture(4, 3)}": "they were trained with model.name=tiny-3-3, and here it is tiny-4-3",
    "adapter.scale=0.5": "they were trained with adapter.scale=1.0, and here it is 0.5",
    "adapter.experts=3": "they were trained with adapter.experts=2, and here it is 3",
    "adapter.init=runs/none": "no such",
    "orders=zero_shot": "this plan trains no unit",
}


@pytest.mark.parametrize("option", REFUSED)
def test_adapters_that_do_not_fit_are_refused_before_the_data_are_opened(root, option, monkeypatch):
    monkeypatch.setattr(train_module.Experiment, "open", lambda *_: pytest.fail("opened the data"))
    with pytest.raises(ValueError, match=REFUSED[option]) as caught:
        train(config(root, "refused", f"adapter.init={root}/first", option, init=None), World.alone())
    assert str(caught.value).startswith("adapter.init") and not (root / "refused").exists()


def test_a_file_of_tensors_alone_is_checked_by_names_and_shapes(root, tmp_path):
    tensors = load_file(root / "export" / "adapters.safetensors")
    save_file(tensors, tmp_path / "alone.safetensors")
    train(config(root, "alone", "train.max_steps=1", init=tmp_path / "alone.safetensors"), World.alone())
    with pytest.raises(ValueError, match=r"shapes of 18 .*down_weight: the model has \(2, 32, 32\), the file \(2, 64, 32\)"):
        train(config(root, "misshapen", "adapter.bottleneck=32", init=tmp_path / "alone.safetensors"), World.alone())
    save_file({name: t for name, t in tensors.items() if "vision.2" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"shapes of 6 .*vision.2/down_bias: the model has .*, the file None"):
        train(config(root, "part", init=tmp_path / "part.safetensors"), World.alone())
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad.safetensors is damaged"):
        train(config(root, "bad", init=tmp_path / "bad.safetensors"), World.alone())


def test_a_warm_run_has_another_name():
    assert compose_config(["run.name=auto", "adapter.init=runs/first"]).run.name == "digits-inc2-moe-warm-mozo-dual-hop_odd-seed0"
