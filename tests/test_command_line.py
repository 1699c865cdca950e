"""A wrong word on a command line is refused with what to write instead; --help explains every option; dist-vlcl runs every command."""

import importlib
import os
import subprocess
import sys

import pytest

from dist_vlcl.__main__ import COMMANDS, main
from dist_vlcl.commands import launch_files
from dist_vlcl.config import CONFIG_FOLDER, Config, compose_config, hydra_main
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.options import declared
from tests.helpers.ranks import run_module

ADVICE = {
    "train.epoch=2": "train.epoch: no such option; did you mean train.epochs?",
    "+train.epoch=2": "train.epoch: no such option; did you mean train.epochs?",
    "++train.epoch=2": "train.epoch: no such option; did you mean train.epochs?",
    "+foo=1": "foo: no such option; --help lists all options",
    "+model.foo.bar=1": "model.foo.bar: no such option",
    "+adapter.epsilon=3": "adapter.epsilon: no such option",
    "epochs=2": "epochs: no such option; did you mean train.epochs?",
    "dta=digits": "dta: no such option; did you mean data?",
    "adapter.rank=8": "adapter.rank: an option of adapter=lora, which was not chosen; add adapter=lora",
    "zo.epsilon=0.001": "zo.epsilon=0.001: give each branch its value: zo.epsilon.language=0.001 zo.epsilon.vision=0.001",
    "orders.layers=1,3": "orders.layers=1,3: write a list in brackets and quotes: 'orders.layers=[1,3]'",
    "zo=mozo,sign": "zo=mozo,sign: give one value; sweep takes several",
    "seed=0,1": "seed=0,1: give one value; sweep takes several",
    "zo=[mozo,sign]": "zo=[mozo,sign]: give one value; sweep takes several",
    "train.lr=0.1": "train.lr: no such option; did you mean first_order.lr?",
    "data=cifar10": "webdataset; your own images: data=folder data.name=cifar10 data.source=PATH",
    "adapter=foo": "adapter=foo: choose from lora, lora_mlp, moe",
    "seed=-1": "seed=-1: give a number of at least 0",
    "run.save_every_steps=x": "run.save_every_steps=x: Value 'x' of type 'str' could not be converted to Integer",
    "orders=hop": "orders=hop: choose from dual_all",
    "train.epochs=0": "train.epochs=0: give a number of at least 1",
    "data.url=gs://bucket/set": "give a folder, an http(s) address or a `pipe:` command",
}


@pytest.mark.parametrize("override", ADVICE)
def test_a_wrong_option_is_refused_with_what_to_write_instead(override):
    with pytest.raises(ValueError) as caught:
        compose_config([override])
    assert ADVICE[override] in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "2"], "--epochs: options are NAME=VALUE; did you mean train.epochs=...?\n"),
        (["--multirun", "seed=0,1"], "--multirun: options are NAME=VALUE; --help lists them\n"),
        (["seed"], "'seed' is not an option: give OPTION=VALUE, such as train.epochs=2\n"),
    ],
    ids=str,
)
def test_a_word_that_is_no_option_is_refused_with_what_it_may_mean(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *words])
    with pytest.raises(SystemExit) as stopped:
        hydra_main(print)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"error: {message}"


def test_a_folder_of_configurations_that_there_is_not_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["train", "--config-dir", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        hydra_main(print)
    assert stopped.value.code == 2 and f"No such file or directory: '{tmp_path}/none'" in capsys.readouterr().err


def test_help_explains_every_option_and_lists_no_schemas(tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/mine.yaml").write_text("rank: 2\n")
    monkeypatch.setattr("sys.argv", ["train", "--help", "--config-dir", str(tmp_path), "adapter=lora", "train.epochs=7"])
    hydra_main(print)
    said = capsys.readouterr().out
    for key, item in {**declared(Config), **declared(LoRAConfig, "adapter.")}.items():
        assert key == "adapter" or (f"  {key}=" in said and " ".join(item.metadata["help"].split()) in " ".join(said.split()))
    assert "  train.epochs=7" in said and "adapter.experts" not in said and "schema" not in said
    assert "  adapter  lora, lora_mlp, mine, moe\n" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_starts_the_module_s_own_main(name, monkeypatch):
    started = []
    module = importlib.import_module(f"dist_vlcl.{COMMANDS[name][0]}")
    monkeypatch.setattr(module, "main", lambda: started.append(list(sys.argv)))
    monkeypatch.setattr("sys.argv", ["dist-vlcl", name, "some", "words"])
    main()
    assert started == [[f"dist-vlcl {name}", "some", "words"]]


def test_the_user_s_code_in_the_working_folder_is_found_by_dist_vlcl(tmp_path, monkeypatch, capsys):
    """Such a script starts with its own folder on the path; `python -m` starts with the working folder."""
    (tmp_path / "my_options.py").write_text("raise ImportError('read from the working folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", os.getcwd())])
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "train", "zo.estimator=my_options:X"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "read from the working folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2026_11_30", "1e3", "1.50", "größe", "a,b", "pics (1)", "{0..9}.tar", "it's", "c:\\", "x\\'", "x\\\n"])
def test_a_text_is_taken_as_it_is_written(text):
    """Hydra alone reads 2026_11_30 as the number 20261130, and refuses a letter that is not of ASCII."""
    assert compose_config([f"data.source={text}"]).data.source == text


def test_a_folder_of_configurations_may_have_any_name(tmp_path):
    folder = tmp_path / "größe, (1)"
    (folder / "zo").mkdir(parents=True)
    (folder / "zo" / "mine.yaml").write_text("name: mine\nepsilon: {language: 1.0e-3, vision: 1.0e-3}\n")
    assert compose_config(["zo=mine"], str(folder)).zo.name == "mine"


def test_an_unknown_command_is_refused_and_all_are_listed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "trian"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "error: trian: no such command; choose from train, data," in capsys.readouterr().err


def test_launch_files_are_copied_run_there_and_keep_the_user_s_changes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["dist-vlcl", str(tmp_path)])
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text("# mine")
    launch_files.main()
    copied = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    shipped = [path for name in ("launch", "slurm") for path in (CONFIG_FOLDER.parent / name).rglob("*.*")]
    assert copied == {path.relative_to(CONFIG_FOLDER.parent) for path in shipped}
    assert (tmp_path / "slurm" / "site.sh").read_text() == "# mine"
    command = [tmp_path / "launch" / "local.sh", "--dry-run", "--processes", "2", "seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0 and "-m dist_vlcl.train seed=1" in done.stdout
    monkeypatch.setattr("sys.argv", ["dist-vlcl", str(tmp_path / "slurm/site.sh")])
    with pytest.raises(SystemExit):
        launch_files.main()
    assert "error: [Errno" in capsys.readouterr().err


def test_a_command_has_one_name(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dist_vlcl.commands.sweep", "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: start a command as dist-vlcl NAME; dist-vlcl lists them\n"
    done = run_module("dist_vlcl", "sweep", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: dist-vlcl sweep")
