"""docs/configuration.md is what its script prints, and every option has a meaning."""

import runpy
from pathlib import Path

from dist_vlcl.config import Config
from dist_vlcl.model.lora import LoRAConfig
from dist_vlcl.model.moe import MoEConfig
from dist_vlcl.options import declared

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "tools/configuration_docs.py"))


def test_the_page_is_what_the_script_prints():
    told = "run: python tools/configuration_docs.py > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == SCRIPT["page"](), told


def test_every_option_of_every_group_is_on_the_page():
    page = SCRIPT["page"]()
    names = {*declared(Config), *declared(MoEConfig, "adapter."), *declared(LoRAConfig, "adapter.")} - {"adapter"}
    assert len(names) > 80 and [name for name in names if f"| `{name}` |" not in page] == []


def test_no_option_lacks_a_meaning():
    lacking = [
        SCRIPT["option_name"](name, item)
        for name, config in SCRIPT["sections"]()
        for item in SCRIPT["options"](config)
        if not item.metadata.get("help")
    ]
    assert lacking == []
