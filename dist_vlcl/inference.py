"""Use what a run has learned: `dist_vlcl.load("runs/NAME")` returns CLIP with the run's adapters."""

# B images, C classes or prompts, F features, H W sides of an image, S side of the model's image

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from torch import Tensor

from dist_vlcl.config import Config, load_config
from dist_vlcl.data.images import upright
from dist_vlcl.data.shards import decode
from dist_vlcl.data.transforms import EvalTransform
from dist_vlcl.dist.agree import digest
from dist_vlcl.dist.world import World
from dist_vlcl.experiment import build_towers
from dist_vlcl.masking import explained
from dist_vlcl.model.clip import TwoTowers
from dist_vlcl.options import flatten
from dist_vlcl.reading import or_warn, read_file, read_json, warn
from dist_vlcl.run import checkpoint
from dist_vlcl.run.state import TrainState
from dist_vlcl.saved import digest_at_start, digest_of, read_config

CONFIG, CLASSES, ADAPTERS = "config.yaml", "classes.json", "adapters.safetensors"  # the files of an export
WEIGHTS = ("model.name", "model.pretrained")  # the options that may name files which are read here
OF_TRAINING = ("adapter.init", "adapter.dropout", "adapter.router_noise", "adapter.noise_at_eval")  # trained adapters do not depend on them
OWN_FOLDERS = ("runs/", "exports/")  # never the name of an organisation on the Hugging Face Hub
IMAGES_AT_A_TIME = 256


@dataclass(frozen=True)
class Trained:
    """What a run has learned, as its folder or an export of it holds it."""

    folder: Path
    cfg: Config
    adapters: dict[str, Tensor]  # under the names of Units.state_dict
    tasks: list[list[str]]  # class names of each task that was learned; empty if the run did not save them


class TrainedCLIP:
    """CLIP with trained adapters, for inference. Features have length 1.

    Images are one image or a sequence of images. An image is a path, a Pillow image, or uint8 values: an array `[H, W, 3]` or a tensor
    `[3, H, W]`, of any size. A batch of float tensors `[B, 3, S, S]` must come from `preprocess`.
    """

    def __init__(self, towers: TwoTowers, class_names: Sequence[str] = ()):
        self.towers, self.class_names, self.tokenizer = towers, list(class_names), towers.tokenizer
        self._transform = EvalTransform(towers.image_size, *towers.resizing)
        self._text: tuple[tuple[str, ...], Tensor] = (), torch.empty(0)  # the newest class names and their features

    @property
    def device(self) -> torch.device:
        """Return the device that computes."""
        return self.towers.logit_scale.device

    def preprocess(self, image: Any) -> Tensor:
        """Return one image as open_clip's preprocessing does: resized, cropped and normalised, float `[3, S, S]`."""
        stem: Any = self.towers.vision.stem_and_head
        return (self._pixels(image).float() / 255 - stem.mean.cpu()) / stem.std.cpu()

    def encode_image(self, images: Any) -> Tensor:
        """Return unit features `[B, F]`."""
        if isinstance(images, str | Path | Image.Image) or (hasattr(images, "ndim") and images.ndim == 3):
            images = [images]
        parts = [images[start : start + IMAGES_AT_A_TIME] for start in range(0, len(images), IMAGES_AT_A_TIME)]
        return torch.cat([self.towers.features("vision", self._batch(part)) for part in parts])

    def encode_text(self, prompts: str | Sequence[str] | Tensor) -> Tensor:
        """Return unit features `[C, F]` of whole prompts, or of tokens `[C, L]`."""
        tokens = prompts if isinstance(prompts, Tensor) else self.tokenizer([prompts] if isinstance(prompts, str) else list(prompts))
        return self.towers.features("language", tokens.to(self.device))

    def classify(self, images: Any, class_names: Sequence[str] | None = None) -> tuple[list[str], Tensor]:
        """Return the most probable class of each image, and the probabilities `[B, C]` in the order of the class names.

        class_names: any names; None takes the classes that the run has learned. Raises ValueError if there are none.
        """
        names = self.class_names if class_names is None else list(class_names)
        if not names or isinstance(class_names, str):
            raise ValueError(f"class_names={class_names!r}: give a list of names, such as ['seven', 'nine'], or a run with classes.json")
        if self._text[0] != tuple(names):
            self._text = tuple(names), self.towers.features("language", self.towers.prompts(names).to(self.device))
        logits_BC = self.towers.logits(self.encode_image(images), self._text[1])
        return [names[best] for best in logits_BC.argmax(1).tolist()], logits_BC.softmax(1).cpu()

    def _batch(self, images: Any) -> Tensor:
        """Return images as the vision tower takes them: values from 0 to 255, `[B, 3, S, S]`."""
        if all(isinstance(image, Tensor) and image.is_floating_point() for image in images):
            stem: Any = self.towers.vision.stem_and_head
            return (torch.stack([*images]).to(self.device) * stem.std + stem.mean) * 255
        return torch.stack([self._pixels(image) for image in images]).to(self.device)

    def _pixels(self, image: Any) -> Tensor:
        """Return one image, resized and cropped, uint8 `[3, S, S]`."""
        if isinstance(image, str | Path):
            image = decode(Path(image).read_bytes(), str(image))
        elif isinstance(image, Image.Image):
            image = upright(image)
        elif isinstance(image, Tensor):
            image = image.movedim(0, -1).cpu().numpy()
        if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            found = f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', ()))}"
            raise ValueError(f"image of {found}: give a path, a Pillow image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W]")
        return self._transform(image, Random())


def load(source: str | Path, task: int | None = None, device: str | torch.device | None = None, options: Sequence[str] = ()) -> TrainedCLIP:
    """Return CLIP with the adapters of a run, on a GPU if there is one.

    `source`: the folder of a run or of an export, a file in it, or ORG/NAME on the Hugging Face Hub.
    `task`: the state after this task, counted from 1; None takes the newest checkpoint.
    `options`: OPTION=VALUE, for code and files that the run's configuration names, such as model.pretrained=/weights.safetensors. The error
    without them lists them. Raises FileNotFoundError, or ValueError if the source cannot be used.
    """
    trained = read_trained(source, task, options)
    towers = build_towers(trained.cfg, World.alone())
    warn_of_other_weights(trained.folder, towers, World.alone())
    with explained(f"{trained.folder / CONFIG} describes other adapters than were trained"):
        towers.units.load_state_dict(trained.adapters)
    towers.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return TrainedCLIP(towers, [name for names in trained.tasks for name in names])


def read_trained(source: str | Path, task: int | None = None, options: Sequence[str] = ()) -> Trained:
    """Return what the source of `load` holds."""
    path = _locate(source)
    return Trained(_folder_of(path), load_config(_folder_of(path) / CONFIG, options, WEIGHTS), *_read_adapters(path, task))


def warn_of_other_weights(source: str | Path, towers: TwoTowers, world: World) -> None:
    """Warn on rank 0 if CLIP's own weights are not those that a run was trained with. An export does not say which these were."""
    was = digest_at_start(_folder_of(Path(source)), "weights") if world.is_main else ""
    if was and was != (now := digest(towers.frozen_weights())):
        warn(f"{source} was trained with other weights or precision of CLIP (digest was {was[:16]}, is {now[:16]}): adapters may not fit")


def read_start(cfg: Config) -> dict[str, Tensor]:
    """Return the adapters that `adapter.init` names; {} without it, or if the run has a checkpoint to continue from.

    Raises ValueError if there are none, or if they are of another kind, or were trained with other options or for another model.
    """
    source = getattr(cfg.adapter, "init", None)
    if not source or checkpoint.saved_steps(cfg.run.folder):
        return {}
    with explained(f"adapter.init={source!r}: cannot start from these adapters", kinds=(OSError, ValueError, checkpoint.BrokenCheckpoint)):
        path = _locate(source)
        config = _folder_of(path) / CONFIG
        theirs, ours = flatten(read_config(config) if config.exists() else {}), flatten(cfg.as_dict())
        fixed = [key for key in theirs if key.startswith((*WEIGHTS, "adapter.")) and key not in OF_TRAINING]
        if changed := [key for key in fixed if _last(theirs[key]) != _last(ours.get(key))]:
            raise ValueError(f"they were trained with {changed[0]}={theirs[changed[0]]}, and here it is {ours.get(changed[0])}")
        return _read_adapters(path)[0]


def _last(value: Any) -> str:
    """Return the last part of a path, or any other value as text: the same weights may lie elsewhere now."""
    return str(value).rpartition("/")[2]


def _locate(source: str | Path) -> Path:
    return Path(source) if Path(source).exists() else _download(str(source))


def _folder_of(path: Path) -> Path:
    """Return the folder of a run or of an export that a path is or lies in."""
    return path if path.is_dir() else path.parents[path.parent.name == "checkpoints"]


def _read_adapters(path: Path, task: int | None = None) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Return the adapters in a folder or a safetensors file, and the class names of each task that they have learned."""
    folder = _folder_of(path)
    tasks, is_file = read_classes(folder), path.suffix == ".safetensors" and path.parent == folder
    if is_file or (folder / ADAPTERS).exists():
        if task not in (None, len(tasks)):
            raise ValueError(f"task={task}: {folder} is an export, which has the state after task {len(tasks)} only")
        if not is_file or path.name == ADAPTERS:
            return checkpoint.adapters_in(checkpoint.read_tensors(folder / ADAPTERS)[0]), tasks
        with explained(f"{path} is damaged", kinds=SafetensorError):
            return checkpoint.adapters_in(tensors_from_bytes(read_file(path))), tasks
    match = checkpoint.NAME.fullmatch(path.name)
    saved = checkpoint.load(folder, int(match[1])) if match else _checkpoint_after(folder, task)
    state = TrainState.from_dict(saved.state)
    learned = state.task + (state.epoch > 0 or state.batch > 0)
    if task not in (None, learned):
        raise ValueError(f"task={task}: {path} has the state of task {learned}; give the folder of the run, or leave out task")
    return checkpoint.adapters_in(saved.tensors), tasks[:learned]


def read_classes(folder: Path) -> list[list[str]]:
    """Return the class names of each task of a run; [] if the run has no classes.json: early versions wrote none."""
    return read_json(folder / CLASSES, [[str]], [])


def _checkpoint_after(folder: Path, task: int | None) -> checkpoint.Checkpoint:
    """Return the checkpoint at the end of a task; the newest one without a task."""
    identity = {"config": digest_of(read_config(folder / CONFIG))}
    if task is None:
        if (saved := checkpoint.load_newest(folder, identity)) is None:
            raise FileNotFoundError(f"{folder} has neither {ADAPTERS} nor an intact checkpoint; train first")
        return saved
    found = (or_warn(lambda: checkpoint.load(folder, step, identity), None) for step in checkpoint.saved_steps(folder))  # noqa: B023, called at once
    states = ((TrainState.from_dict(saved.state), saved) for saved in filter(None, found))
    ends = {state.task: saved for state, saved in states if not state.epoch and not state.batch}
    if task not in ends:
        raise ValueError(f"task={task}: {folder} has checkpoints after task {', '.join(map(str, ends)) or 'none'}; run.keep=N keeps more")
    return ends[task]


def _download(name: str) -> Path:
    """Return the folder of a copy of a repository on the Hugging Face Hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.startswith(OWN_FOLDERS) or Path(name).parent.exists():
        raise FileNotFoundError(f"{name}: no such file or folder; give the folder of a run, such as runs/NAME")
    from huggingface_hub import constants, snapshot_download

    advice, errors = f"{name}: no such folder, and could not load it from the Hugging Face Hub", (OSError, ValueError, RuntimeError)
    folder = Path(constants.HF_HUB_CACHE) / "dist_vlcl" / name  # not the hub's cache itself, because the files there are links
    with explained(advice, kinds=errors, to=FileNotFoundError):
        return Path(snapshot_download(name, allow_patterns=[CONFIG, CLASSES, ADAPTERS], local_dir=folder))
