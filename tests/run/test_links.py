"""A run folder may be someone else's: a link or a pipe in it leads nowhere, and nothing waits for it."""

import os

import pytest

from dist_vlcl.data.shards import ShardError
from dist_vlcl.dist.collectives import is_network_error
from dist_vlcl.run.files import replace_file
from dist_vlcl.run.folder import _lock


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    folder.mkdir()
    victim.write_text("mine")
    (folder / "config.yaml.tmp").symlink_to(victim)
    replace_file(folder / "config.yaml", "a: 1\n")
    assert victim.read_text() == "mine"
    assert (folder / "config.yaml").read_text() == "a: 1\n" and not (folder / "config.yaml").is_symlink()


def test_a_pipe_in_the_place_of_a_temporary_file_hangs_nothing(tmp_path):
    os.mkfifo(tmp_path / "env.json.tmp")
    replace_file(tmp_path / "env.json", "{}")
    assert (tmp_path / "env.json").read_text() == "{}"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.parent / "elsewhere")], ids=["pipe", "link"])
def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(OSError, match=r"\.lock"):
        _lock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("text", ["igloo_17.jpg: no image", "http://host: Connection refused"])
def test_an_error_about_data_is_not_taken_for_one_of_the_network(text):
    assert not is_network_error(ShardError(text)) and is_network_error(RuntimeError(text))
