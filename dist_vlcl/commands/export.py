"""Export what a run has learned:  dist-vlcl export runs/NAME [--to open_clip] [--push ORG/NAME]

--to adapters (default) writes adapters.safetensors, config.yaml, classes.json and a model card; dist_vlcl.load(FOLDER) reads them. The
weights of CLIP are not in it. --to open_clip merges LoRA into CLIP's weights and writes what open_clip.create_model reads. Experts cannot
be merged. Both folders have the layout of a repository on the Hugging Face Hub. --push uploads them; log in first: hf auth login.
"""

import itertools
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import yaml
from safetensors.torch import save

from dist_vlcl.config import errors_refused
from dist_vlcl.inference import ADAPTERS, CLASSES, CONFIG, Trained, read_trained
from dist_vlcl.model.clip import merge_lora
from dist_vlcl.reading import or_warn
from dist_vlcl.run.checkpoint import sealed_tensors
from dist_vlcl.run.files import replace_file
from dist_vlcl.saved import read_accuracy
from dist_vlcl.zo.noise import derive_seed

PUBLISHED = ("seed", "paper", "tasks", "model", "adapter", "orders", "zo", "first_order", "train")  # the others may name local paths
CARD = Path(__file__).with_name("model_card.md")
MERGED, MERGED_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"  # as open_clip and the Hub call them
FILES = {"adapters": [ADAPTERS, CONFIG, CLASSES, "README.md"], "open_clip": [MERGED, MERGED_CONFIG, "README.md"]}
USAGE = {
    "adapters": 'import dist_vlcl\n\nmodel = dist_vlcl.load("{name}")\nlabels, scores = model.classify(["image.jpg"])',
    "open_clip": 'import open_clip\n\nmodel, preprocess = open_clip.create_model_from_pretrained("hf-hub:{name}")  # or "local-dir:FOLDER"',
}


def export(trained: Trained, out: Path, kind: str, name: str) -> None:
    """Write the FILES of an export, `adapters` or `open_clip`, into a folder.

    Raises FileExistsError for a folder with other files, and ValueError for adapters that cannot be merged.
    """
    cfg = trained.cfg
    found = {path.name for path in out.glob("[!.]*")}
    if others := found - {*itertools.chain(*FILES.values())} if found & {ADAPTERS, MERGED} else found:
        raise FileExistsError(f"--out {out}: the folder has other files, such as {min(others)}; choose a new or empty one")
    if kind == "open_clip":
        weights, config = merge_lora(cfg.model, cfg.adapter, trained.adapters, derive_seed(cfg.seed, "adapters"))
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / MERGED, save({key: t.contiguous() for key, t in weights.items()}, {"format": "pt"}))
        replace_file(out / MERGED_CONFIG, json.dumps(config, indent=2) + "\n")
    else:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / ADAPTERS, sealed_tensors(trained.adapters, {"format": "pt"}))
        config = {key: value for key, value in cfg.as_dict().items() if key in PUBLISHED}
        config["data"] = {"name": cfg.data.name, "reader": cfg.data.reader_name}
        replace_file(out / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        replace_file(out / CLASSES, json.dumps(trained.tasks, ensure_ascii=False) + "\n")
    replace_file(out / "README.md", card(trained, kind, name))


def card(trained: Trained, kind: str, name: str) -> str:
    """Return the model card: what was trained, on what, with which result, and how to load it."""
    cfg, names = trained.cfg, [name for names in trained.tasks for name in names]
    rows = or_warn(lambda: read_accuracy(trained.folder), {})
    is_newest = len(rows.get("rows") or ()) == len(trained.tasks) > 0
    judged = "Accuracy on held-out training images" if cfg.eval.holdout else "Test accuracy"
    accuracy = f" {judged} in %: Last {100 * rows['last']:.2f}, Avg {100 * rows['avg']:.2f}." if is_newest else ""
    accuracy += " More tasks were planned." if rows and not rows.get("complete") else ""
    library, usage, count = "open_clip" if kind == "open_clip" else "dist_vlcl", USAGE[kind].format(name=name), len(names)
    return CARD.read_text(encoding="utf-8").format(
        library=library, usage=usage, name=name, cfg=cfg, accuracy=accuracy, count=count, tasks=len(trained.tasks), classes=", ".join(names)
    )


def push(folder: Path, name: str, files: list[str]) -> str:
    """Upload files of a folder to a repository of the Hugging Face Hub. A new repository is private. Return its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=True, exist_ok=True)
    return str(api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Upload by dist_vlcl"))


def main() -> None:
    """Run the command line. Exit status 2 after an error."""
    parser = ArgumentParser(prog="dist-vlcl export", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, such as runs/NAME, or one of its checkpoints")
    parser.add_argument("--to", choices=("adapters", "open_clip"), default="adapters", help="what to write (default: adapters)")
    parser.add_argument("--task", type=int, metavar="N", help="the state after task N (default: the newest checkpoint)")
    parser.add_argument("--option", action="append", default=[], metavar="OPTION=VALUE", help="what an error asks to repeat")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: exports/NAME)")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload the folder to the Hugging Face Hub, as a private repository")
    options = parser.parse_args()
    with errors_refused():
        trained = read_trained(options.run, options.task, options.option)
        out = options.out or Path("exports") / trained.folder.resolve().name
        export(trained, out, options.to, options.push or out.name)
        print(f"wrote {', '.join(FILES[options.to])} to {out}")
        if options.push:
            print(f"uploaded: {push(out, options.push, FILES[options.to])}")
