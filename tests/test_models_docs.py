"""docs/models.md is what its script prints: every architecture of open_clip, adapted or refused with a reason."""

import importlib.util
import runpy
from pathlib import Path

import open_clip
import pytest

from dist_vlcl.model.clip import MLP_INPUT, NEAR, ModelConfig, tower_depths, unit_ids

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "tools/models_docs.py"))


def test_the_page_is_what_the_script_prints_and_at_least_100_architectures_work():
    """The versions of open_clip and timm in constraints.txt may know more architectures than a newer page."""
    page = SCRIPT["page"]()
    assert (ROOT / "docs/models.md").read_text() == page, "run: python tools/models_docs.py > docs/models.md"
    works, refused = page.split("## Architectures that do not work")
    assert works.count("\n| ") - 1 >= 100 and works.count("\n| ") + refused.count("\n| ") - 2 >= 144


def test_the_model_that_a_refusal_names_works():
    for name in {*NEAR.values(), "ViT-B-16-quickgelu"}:
        assert tower_depths(name)["vision"] >= 12


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RN50", "its vision tower is a ResNet, and adapters need transformer blocks of open_clip or timm; use a model such as ViT-B-16"),
        ("MobileCLIP-S1", "its vision tower is timm's FastVit, and adapters need .* such as MobileCLIP-B"),
        ("roberta-ViT-B-32", "its language tower is roberta-base of the package transformers, and adapters need .* such as ViT-B-32"),
    ],
)
def test_other_towers_are_refused_with_the_reason_and_a_model_that_works(name, words):
    with pytest.raises(ValueError, match=words):
        unit_ids(ModelConfig(name=name, pretrained="random"))


def test_blocks_that_we_do_not_know_are_refused(monkeypatch):
    monkeypatch.delitem(MLP_INPUT, "EvaBlockPostNorm")
    with pytest.raises(ValueError, match="its vision tower is timm's Eva"):
        tower_depths("EVA02-E-14")


def test_a_tokenizer_that_needs_another_package_is_refused_before_any_download(monkeypatch):
    name = "ViT-B-16-SigLIP"
    assert open_clip.get_model_config(name)["text_cfg"]["hf_tokenizer_name"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"its tokenizer needs the package transformers: pip install 'dist-vlcl\[transformers\]'"):
        unit_ids(ModelConfig(name=name, pretrained="random"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package == "transformers")
    assert len(unit_ids(ModelConfig(name=name, pretrained="random"))) == 24
