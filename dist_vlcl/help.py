"""What `--help` prints: the choices of every group, and every option with its value, its meaning and what it allows."""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from dist_vlcl.config import ADAPTERS, CONFIG_FOLDER, Config, format_error
from dist_vlcl.masking import masked
from dist_vlcl.options import allowed_values, declared

USAGE = """
Options are NAME=VALUE, in any order; GROUP=NAME sets several at once. Quote values with { } [ ] or *. The values below are those that this
command line would give. paper=ID repeats a published run of configs/paper_runs.yaml, such as paper=t2-moe-cifar10-dual-hop_odd.
--check validates the options and exits; --cfg job prints the configuration and exits; --config-dir FOLDER adds your own groups.
"""
TRAIN = "Train CLIP continually:  dist-vlcl train [OPTION=VALUE ...], or accelerate launch -m dist_vlcl.train for several processes\n"


def groups(folders: Sequence[Path] = (CONFIG_FOLDER,)) -> dict[str, list[Path]]:
    """Return the configuration files of every group."""
    files = sorted(path for folder in folders for path in folder.glob("*/*.yaml"))
    return {name: [path for path in files if path.parent.name == name] for name in sorted({path.parent.name for path in files})}


def options_of(adapter: type | None) -> dict[str, Field]:
    """Return every option of the configuration with an adapter."""
    return {k: item for k, item in declared(Config).items() if k != "adapter"} | (declared(adapter, "adapter.") if adapter else {})


def help_text(document: str | None, words: Sequence[str]) -> str:
    """Return the help of a command on configurations. Raises ValueError if the options among the words are wrong."""
    own = [Path(folder) for flag, folder in itertools.pairwise(words) if flag == "--config-dir"]
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            config = compose("config", [*overrides, *(f"hydra.searchpath=[file://{folder.absolute()}]" for folder in own)])
    except HydraException as error:
        raise ValueError(format_error(error)) from error
    choices = [f"  {name:8} {', '.join(path.stem for path in files)}" for name, files in groups([CONFIG_FOLDER, *own]).items()]
    adapter = OmegaConf.get_type(config.adapter)
    lines = [document or TRAIN, USAGE, "Groups", *choices, "", "Options"]
    for key, item in options_of(adapter if adapter in ADAPTERS.values() else None).items():
        value: Any = OmegaConf.select(config, key)
        allowed = allowed_values(item.metadata)
        meaning = f"{item.metadata.get('help', '')}{f' {allowed[0].upper()}{allowed[1:]}.' if allowed else ''}"
        shown = OmegaConf.to_container(value) if OmegaConf.is_config(value) else "null" if value is None else value
        lines += [f"  {key}={shown}", textwrap.fill(meaning, 100, initial_indent="      ", subsequent_indent="      ")]
    return masked("\n".join(lines) + "\n")
