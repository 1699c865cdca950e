"""Without an extra, whatever needs it says what to install. A module that is None in sys.modules counts as not installed."""

import importlib
import sys

import pytest

from dist_vlcl.__main__ import main
from dist_vlcl.config import compose_config
from dist_vlcl.data.sets import digits
from dist_vlcl.dist.zero import prepare_deepspeed
from dist_vlcl.train import require_extras


def remove(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make a module unavailable to this process, also to those of our modules that have imported it."""
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(("dist_vlcl.report", "dist_vlcl.commands"))]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("module", ["matplotlib", "pandas", "pyarrow", "scipy", "markdown_it"])
def test_report_says_what_to_install(module, monkeypatch, capsys):
    remove(monkeypatch, module)
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "report", "runs/x"])
    with pytest.raises(SystemExit) as stopped:
        main()
    expected = f"error: dist-vlcl report: {module} is not installed: pip install 'dist-vlcl[report]'\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == expected


def test_a_missing_module_of_the_users_own_code_is_not_taken_for_one_of_the_report(monkeypatch):
    command = importlib.import_module("dist_vlcl.commands.report")
    monkeypatch.setattr(command, "main", lambda: importlib.import_module("module_of_my_adapter"))
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "report", "runs/x"])
    with pytest.raises(ModuleNotFoundError, match="module_of_my_adapter"):
        main()


def test_a_command_that_is_interrupted_ends_in_one_word(monkeypatch):
    command = importlib.import_module("dist_vlcl.commands.report")
    monkeypatch.setattr(command, "main", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "report", "runs/x"])
    with pytest.raises(SystemExit, match=r"^stopped$"):
        main()


def test_a_run_that_would_draw_or_record_says_so_before_it_starts(monkeypatch, capsys):
    remove(monkeypatch, "matplotlib")
    with pytest.raises(ValueError, match=r"matplotlib is not installed: pip install 'dist-vlcl\[report\]', or give run.plots=false"):
        require_extras(compose_config([]))
    monkeypatch.setattr("sys.argv", ["dist-vlcl", "train", "--check"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "matplotlib is not installed" in capsys.readouterr().err
    remove(monkeypatch, "pyarrow")
    with pytest.raises(ValueError, match=r"pyarrow is not installed: pip install 'dist-vlcl\[report\]', or give run.record_every_steps=0"):
        require_extras(compose_config(["run.plots=false"]))
    require_extras(compose_config(["run.plots=false", "run.record_every_steps=0"]))


def test_the_digits_and_deepspeed_say_what_to_install(monkeypatch):
    for module in ("sklearn", "sklearn.datasets", "deepspeed"):
        remove(monkeypatch, module)
    with pytest.raises(ValueError, match=r"data=digits: scikit-learn is not installed: .*pip install 'dist-vlcl\[digits\]'"):
        digits(compose_config([]).data)
    with pytest.raises(RuntimeError, match=r"DeepSpeed, which is not installed: pip install 'dist-vlcl\[deepspeed\]'"):
        prepare_deepspeed(on_cpu=False, timeout_s=600)
