"""What `--help` prints: the choices of every group, and every option with its value, its meaning and what it allows."""

import textwrap
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from dist_vlcl.config import CONFIG_FOLDER, Config
from dist_vlcl.masking import masked
from dist_vlcl.options import allowed_values, declared, flatten

USAGE = """
Options are NAME=VALUE, in any order; GROUP=NAME sets several at once. Quote values with { } [ ] or *. The values below are those that this
command line would give. paper=ID repeats a published run of configs/paper_runs.yaml, such as paper=t2-moe-cifar10-dual-hop_odd.
--config-dir FOLDER adds your own groups.
"""


def help_text(document: str | None, config: Config, folder: str | None = None) -> str:
    """Return the help of a command on configurations. `folder`: --config-dir."""
    folders = [CONFIG_FOLDER, *([Path(folder)] if folder else [])]
    files = sorted({(path.parent.name, path.stem) for root in folders for path in root.glob("*/*.yaml")})
    choices = [f"  {group:8} {', '.join(name for _, name in found)}" for group, found in groupby(files, key=itemgetter(0))]
    lines, values = [document or "", USAGE, "Groups", *choices, "", "Options"], flatten(config.as_dict())
    for key, item in (declared(Config) | declared(type(config.adapter), "adapter.")).items():
        shown = {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")} or values.get(key, {})
        allowed = allowed_values(item.metadata)
        meaning = f"{item.metadata.get('help', '')}{f' {allowed[0].upper()}{allowed[1:]}.' if allowed else ''}"
        lines += [f"  {key}={shown}", textwrap.fill(meaning, 100, initial_indent="      ", subsequent_indent="      ")]
    return masked("\n".join(lines) + "\n")
