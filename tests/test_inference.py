"""What a run has learned can be used outside of it: loaded, exported, published, and read by plain open_clip."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import dist_vlcl
from dist_vlcl.commands import evaluate as evaluate_command
from dist_vlcl.commands import export as export_command
from dist_vlcl.commands import predict as predict_command
from dist_vlcl.commands.evaluate import evaluate_run
from dist_vlcl.config import EvalConfig, compose_config
from dist_vlcl.data.loader import Loader
from dist_vlcl.data.shards import open_index
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.world import World
from dist_vlcl.inference import read_trained
from dist_vlcl.reading import seal
from dist_vlcl.train import train
from tests.helpers.hub import Hub
from tests.helpers.ranks import warm_python
from tests.helpers.tiny_clip import architecture

RUN = [f"model.name={architecture(3, 3)}", "model.pretrained=random", "orders=first", "first_order.lr=0.01", "adapter.scale=1.0"]
RUN += ["tasks.num_tasks=3", "train.epochs=1", "train.batch_size=60", "train.warmup_steps=1", "eval.zero_shot=false", "cluster.threads=1"]
RUN += ["run.trackers=[]", "run.progress=false", "run.plots=false", "run.record_every_steps=0", "run.keep=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return finished runs by their adapter."""
    root = tmp_path_factory.mktemp("runs")
    for adapter in ("moe", "lora"):
        train(
            compose_config([*RUN, f"adapter={adapter}", f"run.root={root}", f"run.name={adapter}", f"data.root={root}/data"]), World.alone()
        )
    return {adapter: root / adapter for adapter in ("moe", "lora")}


@pytest.fixture(scope="module")
def digits(runs) -> tuple[list[np.ndarray], list[str]]:
    """Return test images of the classes learned, as they are stored, and the names of their classes."""
    data = compose_config([f"data.root={runs['moe'].parent}/data"]).data
    index = open_index(data)
    reader = Loader(index, data).test(range(6), batch_size=500, rank=0, size=1, transform=EvalTransform(32))
    batch = next(iter(reader))
    return [image.permute(1, 2, 0).numpy() for image in batch.images], [index.class_names[k] for k in batch.labels]


def test_importing_the_package_imports_no_torch():
    code = "import sys, dist_vlcl; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("adapter", ["moe", "lora"])
def test_a_loaded_run_classifies_as_the_run_s_own_evaluation(runs, digits, adapter):
    model, (images, truth) = dist_vlcl.load(runs[adapter]), digits
    assert model.class_names == [f"handwritten digit {name}" for name in ("zero", "one", "two", "three", "four", "five")]
    labels, scores = model.classify(images)
    counts = evaluate_run(runs[adapter], World.alone(), [f"data.root={runs[adapter].parent}/data"]).rows[-1]
    assert [sum(a == b == name for a, b in zip(labels, truth, strict=True)) for name in model.class_names] == [c for c, _ in counts[:6]]
    assert scores.shape == (len(images), 6) and torch.allclose(scores.sum(1), torch.ones(len(images)))
    assert torch.equal(scores.argmax(1), torch.tensor([model.class_names.index(label) for label in labels]))


def test_trained_adapters_are_what_is_loaded(runs, digits):
    trained, untrained = dist_vlcl.load(runs["moe"]), dist_vlcl.load(runs["moe"])
    for unit in untrained.towers.units.values():
        unit.tensors()["up_weight"].data.zero_()
        unit.tensors()["up_bias"].data.zero_()
    assert not torch.allclose(trained.encode_image(digits[0][:4]), untrained.encode_image(digits[0][:4]), atol=1e-3)


def test_every_kind_of_image_gives_the_same_features(runs, digits, tmp_path):
    model, image = dist_vlcl.load(runs["lora"]), np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = model.encode_image([image])
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for other in (image, Image.fromarray(image), tmp_path / "image.png", str(tmp_path / "image.png"), [tensor], tensor[None], image[None]):
        assert torch.equal(model.encode_image(other), expected)
    ready = model.preprocess(Image.fromarray(image))
    assert ready.shape == (3, 16, 16) and ready.dtype == torch.float32
    for floats in (ready[None], [ready], ready):
        assert torch.allclose(model.encode_image(floats), expected, atol=1e-6)
    assert torch.allclose(model.encode_image([image, image]).norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="give a path, a Pillow image"):
        model.encode_image([image.astype(float)])


def test_a_pillow_image_is_read_as_its_file_is(runs, tmp_path):
    """Pillow's own conversion saturates 16-bit grey, and keeps an image lying on its side."""
    model, deep = dist_vlcl.load(runs["lora"]), np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    lying = Image.Exif()
    lying[0x0112] = 6
    Image.fromarray((deep >> 8).astype(np.uint8)).save(tmp_path / "lying.jpg", exif=lying)
    for path in (tmp_path / "deep.png", tmp_path / "lying.jpg"):
        with Image.open(path) as image:
            assert torch.equal(model.encode_image(image), model.encode_image(path))
            assert image.size == (40, 30)  # the caller's image is left as it is


def test_names_need_not_have_been_learned(runs, digits):
    model = dist_vlcl.load(runs["moe"])
    labels, scores = model.classify(digits[0][:3], ["cat", "dog"])
    assert set(labels) <= {"cat", "dog"} and scores.shape == (3, 2)
    prompts = model.encode_text(["a bad photo of a cat.", "a bad photo of a dog."])
    expected = (model.towers.logit_scale * model.encode_image(digits[0][:3]) @ prompts.T).softmax(1)
    assert torch.allclose(scores, expected, atol=1e-5)
    with pytest.raises(ValueError, match="class_names='cat': give a list of names"):
        model.classify(digits[0][:1], "cat")


def test_the_shipped_clip_can_be_merged_in_a_new_process():
    """`export --to open_clip` of a run with the small CLIP: open_clip did not know its architecture."""
    merged = "clip.merge_lora(clip.ModelConfig(), lora.LoRAConfig(), {}, 0)"
    program = f"from dist_vlcl.model import clip, lora; print({merged}[1]['model_cfg']['embed_dim'])"
    done = subprocess.run([warm_python(), "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "128", done.stderr


def test_an_error_names_the_file_that_is_missing_or_changed(runs, digits, tmp_path, monkeypatch):
    """Found by tools/fuzz.py, inputs 987, 1831 and 1867."""
    folder = tmp_path / "run"
    shutil.copytree(runs["moe"], folder)
    (folder / "classes.json").unlink()
    with pytest.raises(ValueError, match=r"class_names=None: give a list of names.*classes\.json"):
        dist_vlcl.load(folder).classify(digits[0][:1])
    trained = read_trained(runs["moe"])
    changed = replace(trained, folder=folder, cfg=replace(trained.cfg, adapter=replace(trained.cfg.adapter, bottleneck=34)))
    monkeypatch.setattr("dist_vlcl.inference.read_trained", lambda *_: changed)
    with pytest.raises(ValueError, match=r"run/config\.yaml describes other adapters than were trained"):
        dist_vlcl.load(folder)
    monkeypatch.undo()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"run has neither adapters\.safetensors nor an intact checkpoint"):
        dist_vlcl.load(folder)


def test_an_earlier_task_is_loaded_by_its_number(runs):
    earlier = read_trained(runs["moe"], task=2)
    assert len(earlier.tasks) == 2 and len(read_trained(runs["moe"]).tasks) == 3
    newest = read_trained(runs["moe"]).adapters
    assert any(not torch.equal(earlier.adapters[name], newest[name]) for name in newest)
    with pytest.raises(ValueError, match=r"task=1: .* has checkpoints after task 2, 3; run\.keep=N keeps more"):
        read_trained(runs["moe"], task=1)


def test_a_checkpoint_of_another_configuration_is_not_taken_for_that_of_a_task(runs, tmp_path):
    run = shutil.copytree(runs["moe"], tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1", 1))
    with pytest.warns(RuntimeWarning, match="was saved with another configuration"), pytest.raises(ValueError, match="after task none"):
        read_trained(run, task=2)


def test_a_damaged_checkpoint_of_another_task_does_not_matter(runs, tmp_path):
    run = shutil.copytree(runs["moe"], tmp_path / "run")
    newest = max((run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=f"{newest.name}.*going on without it"):
        earlier = read_trained(run, task=2)
    assert all(torch.equal(tensor, earlier.adapters[name]) for name, tensor in read_trained(runs["moe"], task=2).adapters.items())


def test_names_of_others_do_not_command_the_terminal(runs, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(runs["moe"], tmp_path / "run")
    classes = json.loads((run / "classes.json").read_text())
    (run / "classes.json").write_text(json.dumps([[f"{name}\x1b[2J" for name in names] for names in classes]))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "image.png")
    run_command(predict_command, monkeypatch, run, tmp_path / "image.png")
    run_command(evaluate_command, monkeypatch, run, f"data.root={runs['moe'].parent}/data", "--classes")
    said = capsys.readouterr().out
    assert "\x1b" not in said and said.count("\\x1b[2J") == 9


def run_command(command, monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dist-vlcl", *map(str, words)])
    command.main()


def test_merged_lora_is_plain_open_clip_with_the_same_features(runs, digits, tmp_path, monkeypatch):
    run_command(export_command, monkeypatch, runs["lora"], "--to", "open_clip", "--out", tmp_path / "out")
    model, images, prompts = dist_vlcl.load(runs["lora"]), digits[0][:20], ["a photo of a seven", "zero"]
    pixels = torch.stack([model.preprocess(image) for image in images])
    weights = str(tmp_path / "out" / "open_clip_model.safetensors")
    by_file = open_clip.create_model(architecture(3, 3), pretrained=weights).eval()
    by_folder, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    for plain in (by_file, by_folder.eval()):
        with torch.no_grad():
            assert torch.allclose(plain.encode_image(pixels, normalize=True), model.encode_image(images), atol=2e-6)
            assert torch.allclose(plain.encode_text(model.tokenizer(prompts), normalize=True), model.encode_text(prompts), atol=2e-6)
    assert preprocess.transforms[0].size == 16
    untrained = dist_vlcl.load(runs["lora"])
    for name, tensor in untrained.towers.units.state_dict().items():
        if "up" in name:
            tensor.zero_()
    assert not torch.allclose(untrained.encode_image(images), model.encode_image(images), atol=1e-3)


def test_what_a_run_names_outside_of_itself_must_be_given(runs, tmp_path):
    """A run folder is data: weights that its configuration names by an absolute path are read only if the user names them, too."""
    shutil.copytree(runs["moe"], tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("pretrained: random", "pretrained: /none.safetensors"))
    with pytest.raises(ValueError, match=r"To trust them, add: model\.pretrained=/none\.safetensors"):
        dist_vlcl.load(tmp_path / "run")
    with pytest.raises(ValueError, match="was saved with another configuration"):
        dist_vlcl.load(tmp_path / "run", options=["model.pretrained=/none.safetensors"])


def test_experts_cannot_be_merged(runs, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(export_command, monkeypatch, runs["moe"], "--to", "open_clip", "--out", tmp_path / "out")
    assert stopped.value.code == 2 and "cannot be merged; only adapter=lora can" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["notes.txt", "README.md", "the run", "an export and notes.txt"])
def test_an_export_replaces_no_other_files(runs, tmp_path, monkeypatch, capsys, other):
    folder = tmp_path / "out"
    if other == "the run":
        shutil.copytree(runs["moe"], folder)
    elif other.startswith("an export"):
        run_command(export_command, monkeypatch, runs["moe"], "--out", folder)
        (folder / "notes.txt").write_text("mine")
    else:
        folder.mkdir()
        (folder / other).write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run_command(export_command, monkeypatch, runs["moe"], "--out", folder)
    assert stopped.value.code == 2
    named = "README.md" if other == "README.md" else "accuracy.json" if other == "the run" else "notes.txt"
    assert f"the folder has other files, such as {named};" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_another_task_is_not_taken_for_the_one_asked_for(runs):
    newest = max((runs["moe"] / "checkpoints").glob("*.safetensors"))
    assert len(read_trained(newest, task=3).tasks) == 3
    with pytest.raises(ValueError, match=r"task=1: .*safetensors has the state of task 3; give the folder of the run"):
        read_trained(newest, task=1)


def test_an_export_is_loaded_without_the_run(runs, digits, tmp_path, monkeypatch):
    for _ in range(2):  # an earlier export is replaced
        run_command(export_command, monkeypatch, runs["moe"], "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "adapters.safetensors", "classes.json", "config.yaml"}
    assert str(runs["moe"].parent) not in (tmp_path / "out" / "config.yaml").read_text()  # no paths of this machine
    exported, original = dist_vlcl.load(tmp_path / "out"), dist_vlcl.load(runs["moe"])
    assert exported.class_names == original.class_names
    assert torch.equal(exported.classify(digits[0][:9])[1], original.classify(digits[0][:9])[1])
    weights = bytearray((tmp_path / "out/adapters.safetensors").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "out/adapters.safetensors").write_bytes(weights)
    with pytest.raises(RuntimeError, match=r"adapters\.safetensors: its content differs from its SHA-256"):
        dist_vlcl.load(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    accuracy = json.loads((runs["moe"] / "accuracy.json").read_text())
    assert f"Last {100 * accuracy['last']:.2f}" in card and "handwritten digit five" in card
    assert "handwritten digit six" not in card


def test_a_pushed_export_is_loaded_from_the_hub(runs, digits, tmp_path, monkeypatch, capsys):
    with Hub(tmp_path) as hub:
        hub.use(monkeypatch)
        run_command(export_command, monkeypatch, runs["moe"], "--out", tmp_path / "out", "--push", "ours/digits")
        assert f"uploaded: {hub.address}/ours/digits" in capsys.readouterr().out
        assert hub.files("ours/digits").keys() == {"README.md", "adapters.safetensors", "classes.json", "config.yaml"}
        loaded, original = dist_vlcl.load("ours/digits"), dist_vlcl.load(runs["moe"])
        assert torch.equal(loaded.classify(digits[0][:9])[1], original.classify(digits[0][:9])[1])
        with pytest.raises(FileNotFoundError, match="ours/nothing: no such folder, and could not load it from the Hugging Face Hub"):
            dist_vlcl.load("ours/nothing")


def test_predict_prints_the_top_classes_of_an_image_file(runs, digits, tmp_path, monkeypatch, capsys):
    Image.fromarray(digits[0][0]).save(tmp_path / "zero.png")
    run_command(predict_command, monkeypatch, runs["moe"], tmp_path / "zero.png", "--top", "2")
    labels, scores = dist_vlcl.load(runs["moe"]).classify(digits[0][:1])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/zero.png: {labels[0]} {100 * float(scores.max()):.1f} %, ")
    run_command(predict_command, monkeypatch, runs["moe"], tmp_path / "zero.png", "--classes", "cat,dog", "--json")
    assert set(json.loads(capsys.readouterr().out)["classes"]) == {"cat", "dog"}
    (tmp_path / "bad.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hugging Face Hub"))
    for source, image, words in (
        (runs["moe"], "bad.png", "bad.png: no image"),
        (runs["moe"], "none.png", "No such file"),
        (tmp_path / "nope", "zero.png", "no such file or folder; give the folder of a run"),
        ("runs/nope", "zero.png", "runs/nope: no such file or folder; give the folder of a run"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_command(predict_command, monkeypatch, source, tmp_path / image)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def evaluated(runs, monkeypatch, capsys, *words: object) -> str:
    run_command(evaluate_command, monkeypatch, runs["moe"], f"data.root={runs['moe'].parent}/data", *words)
    return capsys.readouterr().out


def test_evaluate_prints_json_and_the_accuracy_of_every_class(runs, monkeypatch, capsys):
    saved, root = json.loads((runs["moe"] / "accuracy.json").read_text()), f"data.root={runs['moe'].parent}/data"
    said = json.loads(evaluated(runs, monkeypatch, capsys, "--json", root))
    assert (said["last"], said["avg"], said["forgetting"]) == pytest.approx((saved["last"], saved["avg"], saved["forgetting"]))
    fractions = [correct / total for correct, total in zip(saved["correct"], saved["total"], strict=True)]
    assert list(said["classes"].values()) == pytest.approx(fractions) and next(iter(said["classes"])) == "handwritten digit zero"
    *classes, last = evaluated(runs, monkeypatch, capsys, "--classes", root).splitlines()
    assert classes[5] == f"{100 * fractions[5]:6.2f}  handwritten digit five" and last.startswith(f"Last {100 * saved['last']:.2f}  Avg ")


def test_a_path_in_the_home_folder_is_found(runs, tmp_path, monkeypatch, capsys):
    home = runs["moe"].parent
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    run_command(evaluate_command, monkeypatch, runs["moe"], "data.root=~/data")
    assert capsys.readouterr().out.startswith("Last ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"), [("cluster.num_processes=4", "the launcher started 1"), ("cluster.device=cuda", "torch sees no GPU")]
)
def test_evaluate_follows_the_options_of_its_own_launch(runs, monkeypatch, capsys, option, message):
    if option.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        evaluated(runs, monkeypatch, capsys, option)
    assert f"{option}" in (said := capsys.readouterr().err) and message in said


def test_evaluate_and_a_card_say_when_tasks_are_still_to_come(runs, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(runs["moe"], tmp_path / "moe")
    max((folder / "checkpoints").glob("*.safetensors")).unlink()
    run_command(evaluate_command, monkeypatch, folder, f"data.root={runs['moe'].parent}/data")
    assert capsys.readouterr().out.startswith("after task 2 of 3: Last ")
    whole = json.loads((folder / "accuracy.json").read_text())
    (folder / "accuracy.json").write_text(json.dumps(seal({**whole, "complete": False, "rows": whole["rows"][:2]})))
    run_command(export_command, monkeypatch, folder, "--out", tmp_path / "out")
    assert (
        "in 2 tasks. Test accuracy in %: Last " in (card := (tmp_path / "out/README.md").read_text())
        and " More tasks were planned." in card
    )
    run_command(export_command, monkeypatch, runs["moe"], "--out", tmp_path / "whole")
    assert "planned" not in (tmp_path / "whole/README.md").read_text()
    (folder / "accuracy.json").write_text("x")
    with pytest.warns(RuntimeWarning, match=r"accuracy\.json is damaged"):
        run_command(export_command, monkeypatch, folder, "--out", tmp_path / "damaged")
    assert "in 2 tasks.\n" in (tmp_path / "damaged/README.md").read_text()
    judged = replace(read_trained(runs["moe"]), cfg=replace(read_trained(runs["moe"]).cfg, eval=EvalConfig(holdout=0.2)))
    assert "tasks. Accuracy on held-out training images in %: Last " in export_command.card(judged, "adapters", "one")


def test_evaluate_measures_how_much_zero_shot_accuracy_is_kept_on_other_data(runs, monkeypatch, capsys):
    """Its own data are other data, too: all ten classes then compete."""
    data = runs["moe"].parent / "data" / "digits"
    said = json.loads(evaluated(runs, monkeypatch, capsys, "--data", data, "--json"))
    trained, index = dist_vlcl.load(runs["moe"]), open_index(compose_config([f"data.root={data.parent}"]).data)
    untrained = dist_vlcl.load(runs["moe"])
    for unit in untrained.towers.units.values():
        unit.tensors()["up_weight"].data.zero_()
        unit.tensors()["up_bias"].data.zero_()
    reader = Loader(index, compose_config([]).data).test(range(10), batch_size=500, rank=0, size=1, transform=EvalTransform(16))
    batch = next(iter(reader))
    truth, accuracy = [index.class_names[k] for k in batch.labels], {}
    for model, key in ((trained, "accuracy"), (untrained, "zero_shot")):
        right = [label == name for label, name in zip(model.classify(batch.images, index.class_names)[0], truth, strict=True)]
        accuracy[key] = {name: float(np.mean([r for r, t in zip(right, truth, strict=True) if t == name])) for name in index.class_names}
        assert said[key] == pytest.approx(np.mean(right))
    assert said["classes"] == pytest.approx(accuracy["accuracy"]) and accuracy["accuracy"] != pytest.approx(accuracy["zero_shot"])
    assert said["retention"] == pytest.approx(said["accuracy"] - said["zero_shot"]) and len(said["classes"]) == 10
