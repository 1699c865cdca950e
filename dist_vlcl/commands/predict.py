"""Classify images with a trained run:  dist-vlcl predict runs/NAME IMAGE... [--classes cat,dog]"""

import json
from argparse import ArgumentParser
from pathlib import Path

from dist_vlcl.config import errors_refused
from dist_vlcl.data.names import distinct
from dist_vlcl.inference import load
from dist_vlcl.masking import masked


def main() -> None:
    """Run the command line. Exit status 2 after an error."""
    parser = ArgumentParser(prog="dist-vlcl predict", description=__doc__)
    parser.add_argument("run", help="the folder of a run or of an export, or ORG/NAME on the Hugging Face Hub")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG or WebP files")
    parser.add_argument("--classes", metavar="NAME,NAME", help="class names to choose from (default: those that the run has learned)")
    parser.add_argument("--task", type=int, metavar="N", help="the state after task N (default: the newest checkpoint)")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="print the K most probable classes (default: 3)")
    parser.add_argument("--option", action="append", default=[], metavar="OPTION=VALUE", help="what an error asks to repeat")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    options = parser.parse_args()
    with errors_refused():
        model = load(options.run, options.task, options=options.option)
        classes = [name.strip() for name in options.classes.split(",")] if options.classes else model.class_names
        names, scores = distinct(classes), model.classify(options.images, classes)[1]
    for image, row in zip(options.images, scores, strict=True):
        best = row.topk(min(max(1, options.top), len(names)))
        pairs = [(names[place], score) for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        text = ", ".join(f"{name} {100 * score:.1f} %" for name, score in pairs)
        print(json.dumps({"image": str(image), "classes": dict(pairs)}) if options.json else masked(f"{image}: {text}"))
