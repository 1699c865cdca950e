"""Pre-train the small CLIP that ships with dist_vlcl, on image-caption pairs made from class names and on rendered characters.

    python tools/pretrain_small_clip.py --data tiny-imagenet-32 --names tiny-imagenet-200/classnames.json \\
        --teacher mobilenetv2_100.safetensors --teacher-names imagenet_classnames.json --out small_clip.safetensors

DATA holds one sprite sheet `<wnid>.jpg` of 32x32 tiles per class and a `manifest.json` (tile, columns, tiles per class). NAMES lists
folder, name and synonyms of every class. The teacher is an ImageNet network. Every step pairs images with captions, each in a template
drawn anew:

- one caption per class (a synonym) and one per everyday group word of `GROUPS` ("dog", "bottle", ...);
- names of ImageNet classes that the teacher sees in the batch;
- one caption per digit and letter, for the rendered characters in the batch (tools/rendered_characters.py).

Each image is asked for its own captions among all of them (cross-entropy with soft targets). Muon trains the matrices of the blocks,
AdamW the rest. The result is the same for a given seed, thread count and torch build, interrupted or not: a second start resumes from
OUT.ckpt. It takes about two hours on one core.
dist_vlcl/model/small/README.md describes the run that made the shipped file.
"""

# B images, C captions, D embedding

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from rendered_characters import CLASSES, DIGITS, Characters
from safetensors.torch import load_file, save_file

CONFIG = Path(__file__).parents[1] / "dist_vlcl/model/small/small_clip.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DIGIT_WORDS = ("{}", "digit {}", "number {}", "handwritten digit {}")
TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a picture of a {}.", "a close photo of the {}.", "a {}.")

# Everyday words for the classes, written by hand: what a caption writer would say who does not know the species or model.
GROUPS: dict[str, tuple[str, ...]] = {
    "fish": ("goldfish",),
    "frog": ("bullfrog", "tailed frog"),
    "lizard": ("European fire salamander", "American alligator"),
    "reptile": ("American alligator", "boa constrictor"),
    "crocodile": ("American alligator",),
    "snake": ("boa constrictor",),
    "spider": ("black widow", "tarantula"),
    "worm": ("centipede", "slug", "sea cucumber"),
    "insect": ("ladybug", "fly", "bee", "grasshopper", "walking stick", "cockroach", "mantis", "dragonfly"),
    "beetle": ("ladybug",),
    "butterfly": ("monarch", "sulphur butterfly"),
    "bird": ("goose", "black stork", "king penguin", "albatross"),
    "sea animal": ("jellyfish", "brain coral", "sea slug", "dugong", "sea cucumber"),
    "seal": ("dugong",),
    "lobster": ("American lobster", "spiny lobster"),
    "crab": ("American lobster", "spiny lobster"),
    "dog": ("Chihuahua", "Yorkshire terrier", "golden retriever", "Labrador retriever", "German shepherd", "standard poodle"),
    "cat": ("tabby", "Persian cat", "Egyptian cat"),
    "big cat": ("cougar", "lion"),
    "bear": ("brown bear", "koala", "lesser panda"),
    "hamster": ("guinea pig",),
    "cattle": ("ox", "bison"),
    "sheep": ("bighorn",),
    "deer": ("gazelle",),
    "pig": ("hog",),
    "camel": ("Arabian camel",),
    "ape": ("orangutan", "chimpanzee"),
    "monkey": ("orangutan", "chimpanzee", "baboon"),
    "elephant": ("African elephant",),
    "raccoon": ("lesser panda",),
    "mammal": ("hog", "ox", "bison", "bighorn", "gazelle", "Arabian camel", "guinea pig", "cougar", "lion", "brown bear"),
    "clothes": (
        "academic gown",
        "apron",
        "bikini",
        "cardigan",
        "fur coat",
        "kimono",
        "military uniform",
        "miniskirt",
        "poncho",
        "swimming trunks",
        "vestment",
        "sock",
    ),
    "coat": ("fur coat", "academic gown"),
    "woman": ("bikini", "kimono", "miniskirt"),
    "man": ("military uniform", "swimming trunks", "neck brace"),
    "hat": ("sombrero",),
    "shoe": ("sandal",),
    "bag": ("backpack",),
    "house": ("barn", "thatch", "birdhouse"),
    "building": ("barn", "barbershop", "butcher shop", "confectionery", "cliff dwelling", "thatch", "triumphal arch"),
    "shop": ("barbershop", "butcher shop", "confectionery"),
    "tower": ("beacon", "obelisk", "water tower"),
    "monument": ("obelisk", "triumphal arch", "brass"),
    "bridge": ("steel arch bridge", "suspension bridge", "viaduct"),
    "fence": ("picket fence", "bannister", "turnstile"),
    "water": ("dam", "fountain", "lakeside", "seashore"),
    "bottle": ("beer bottle", "pop bottle", "pill bottle", "water jug"),
    "can": ("bucket", "barrel"),
    "cup": ("espresso", "beaker"),
    "bowl": ("wok", "mashed potato", "guacamole"),
    "pan": ("frying pan", "wok"),
    "plate": ("plate",),
    "pot": ("teapot",),
    "spoon": ("wooden spoon",),
    "chair": ("rocking chair",),
    "table": ("desk", "dining table"),
    "furniture": ("desk", "dining table", "rocking chair", "chest"),
    "lamp": ("lampshade", "torch", "candle"),
    "clock": ("stopwatch", "hourglass", "magnetic compass"),
    "telephone": ("pay-phone", "iPod"),
    "keyboard": ("computer keyboard",),
    "television": ("CD player", "scoreboard"),
    "electronics": ("CD player", "iPod", "remote control", "computer keyboard", "cash machine"),
    "machine": ("cash machine", "parking meter", "sewing machine", "space heater", "refrigerator"),
    "musical instrument": ("oboe", "organ", "drumstick"),
    "weapon": ("cannon", "projectile"),
    "tank": ("cannon",),
    "rocket": ("projectile", "obelisk"),
    "tool": ("broom", "plunger", "syringe", "nail", "reel", "dumbbell", "potter's wheel"),
    "car": ("beach wagon", "convertible", "limousine", "sports car"),
    "truck": ("moving van", "police van", "tractor", "freight car"),
    "van": ("moving van", "police van"),
    "bus": ("school bus", "trolleybus"),
    "streetcar": ("trolleybus",),
    "train": ("bullet train", "freight car"),
    "bicycle": ("jinrikisha", "go-kart"),
    "motor vehicle": ("go-kart", "tractor", "lawn mower", "school bus", "moving van"),
    "boat": ("gondola", "lifeboat"),
    "ball": ("basketball", "rugby ball", "volleyball", "punching bag"),
    "toy": ("teddy",),
    "pole": ("flagpole", "maypole", "pole"),
    "fruit": ("orange", "lemon", "banana", "pomegranate", "acorn"),
    "apple": ("pomegranate",),
    "pepper": ("bell pepper",),
    "vegetable": ("cauliflower", "bell pepper", "mushroom"),
    "food": ("guacamole", "meat loaf", "pizza", "potpie", "mashed potato", "pretzel", "ice cream", "ice lolly"),
    "book": ("comic book",),
    "mountain": ("alp", "cliff"),
    "sea": ("seashore", "coral reef"),
    "lake": ("lakeside",),
    "landscape": ("alp", "cliff", "lakeside", "seashore"),
}


def read_sheets(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return all tiles `[N, 3, 32, 32]` as uint8, their class indices `[N]`, and the class folders in sorted order."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tile, columns, wnids = manifest["tile"], manifest["columns"], sorted(manifest["tiles"])
    images, labels = [], []
    for label, wnid in enumerate(wnids):
        sheet = np.asarray(Image.open(folder / f"{wnid}.jpg").convert("RGB"))
        for k in range(manifest["tiles"][wnid]):
            row, column = divmod(k, columns)
            images.append(sheet[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile])
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), wnids


def caption_words(names_file: Path, wnids: list[str]) -> tuple[list[list[str]], list[str], torch.Tensor]:
    """Return the synonyms of each class, the group words, and membership `[classes, groups]` as booleans."""
    entries = {entry["folder"]: entry for entry in json.loads(names_file.read_text())}
    # Latin binomials start with a capital and are two words that no one writes in a caption; the plain name always stays.
    synonyms = [[entries[w]["name"]] + [s for s in entries[w]["synonyms"] if s != entries[w]["name"]] for w in wnids]
    index = {entries[w]["name"]: k for k, w in enumerate(wnids)}
    groups = list(GROUPS)
    member = torch.zeros(len(wnids), len(groups), dtype=torch.bool)
    for column, group in enumerate(groups):
        for name in GROUPS[group]:
            member[index[name], column] = True
    return synonyms, groups, member


def draw_captions(synonyms: list[list[str]], groups: list[str], generator: torch.Generator) -> list[str]:
    """Return a caption per class (its plain name half of the time, any of its synonyms otherwise) and per group word."""

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (), generator=generator))

    return in_templates([s[0] if pick(2) else s[pick(len(s))] for s in synonyms] + groups, generator)


def in_templates(words: list[str], generator: torch.Generator) -> list[str]:
    """Return each word in a template of its own draw."""
    drawn = torch.randint(0, len(TEMPLATES), (len(words),), generator=generator).tolist()
    return [TEMPLATES[k].format(word) for k, word in zip(drawn, words, strict=True)]


def draw_character_captions(generator: torch.Generator) -> list[str]:
    """Return a caption per class of rendered characters: "a photo of a digit seven.", "a letter b."."""
    drawn = torch.randint(0, len(DIGIT_WORDS), (len(CLASSES),), generator=generator).tolist()
    words = [DIGIT_WORDS[k].format(word) if word in DIGITS else f"letter {word}" for k, word in zip(drawn, CLASSES, strict=True)]
    return in_templates(words, generator)


def teacher_labels(images: torch.Tensor, weights: Path, cache: Path) -> torch.Tensor:
    """Return an ImageNet network's class probabilities `[N, 1000]` (fp16) for images enlarged to 128 pixels; kept in `cache`."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    import timm

    teacher = timm.create_model("mobilenetv2_100", pad_type="same")
    teacher.load_state_dict({name: t.float() for name, t in load_file(weights).items()})
    teacher.eval().to(memory_format=torch.channels_last)
    parts = []
    with torch.inference_mode():
        for k, part in enumerate(images.split(200)):
            large = F.interpolate(part.float(), size=128, mode="bicubic").clamp(0, 255)
            parts.append(teacher((large / 127.5 - 1).contiguous(memory_format=torch.channels_last)).softmax(1).half())
            if k % 40 == 0:
                print(f"teacher: {k * 200}/{len(images)} images", flush=True)
    probabilities = torch.cat(parts)
    torch.save(probabilities, cache)
    return probabilities


def teacher_words(names: list[str], chosen: torch.Tensor, generator: torch.Generator) -> list[str]:
    """Return a word per chosen ImageNet class: its name, or the name's last word, which is the everyday one ("red fox", "fox")."""
    short = torch.randint(0, 2, (len(chosen),), generator=generator).bool()
    return [names[c].split()[-1] if s else names[c] for c, s in zip(chosen.tolist(), short.tolist(), strict=True)]


def targets(labels: torch.Tensor, member: torch.Tensor, p_BT: torch.Tensor) -> torch.Tensor:
    """Return what an image should see in the captions of its step, `[B, classes + groups + T]`, rows of sum 1.

    Half for its class, a quarter shared by its group words, a quarter by the teacher's words; what is empty falls to the class. One
    distribution over words of all kinds, so that a group word is as probable as a class word when both are asked for.
    """
    own = F.one_hot(labels, len(member)).float()
    groups = member[labels].float()
    parts = [0.25 * part / part.sum(1, keepdim=True).clamp_min(1e-6) for part in (groups, p_BT)]
    return torch.cat([own * (1 - sum(part.sum(1, keepdim=True) for part in parts)), *parts], 1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip, and crop at a random place after padding by four pixels (reflection). uint8 `[B, 3, 32, 32]` in, float out."""
    x = F.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    flip = torch.rand(len(x), generator=generator) < 0.5
    x[flip] = x[flip].flip(-1)
    dy, dx = torch.randint(0, 9, (2, len(x)), generator=generator)
    rows = (dy[:, None] + torch.arange(32))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(32))[:, None, None, :]
    x = x[torch.arange(len(x))[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]
    gain = 1 + 0.2 * (torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1)
    return normalise(x * gain)


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of sprite sheets with manifest.json")
    parser.add_argument("--names", type=Path, required=True, help="classnames.json with folder, name and synonyms")
    parser.add_argument("--teacher", type=Path, required=True, help="safetensors of timm's mobilenetv2_100, trained on ImageNet")
    parser.add_argument("--teacher-names", type=Path, required=True, help="classnames.json of its 1,000 classes")
    parser.add_argument("--teacher-words", type=int, default=100, help="ImageNet names a step, drawn by the batch's mean probability")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write (fp16)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=208, help="natural images a step")
    parser.add_argument("--characters", type=int, default=48, help="rendered characters a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--held-out", type=int, default=10, help="images per class kept for validation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the vision blocks (15 %% faster, needs a C++ compiler)")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    images, labels, wnids = read_sheets(args.data)
    synonyms, groups, member = caption_words(args.names, wnids)
    taught = teacher_labels(images, args.teacher, args.out.with_suffix(".teacher.pt"))
    names = [entry["name"] for entry in json.loads(args.teacher_names.read_text())]
    characters = Characters()
    order = torch.cat([torch.nonzero(labels == c).flatten() for c in range(len(wnids))])
    position_in_class = torch.cat([torch.arange(int((labels == c).sum())) for c in range(len(wnids))])
    held_out = order[position_in_class < args.held_out]
    train = order[position_in_class >= args.held_out]

    open_clip.add_model_config(CONFIG)
    model = open_clip.create_model("small_clip", pretrained=None)
    tokenizer = open_clip.get_tokenizer("small_clip")
    if args.compile:
        model.visual.transformer.compile()
    matrices = [p for n, p in model.named_parameters() if "resblocks" in n and p.ndim == 2]
    ends = [p for n, p in model.named_parameters() if "resblocks" not in n and p.ndim >= 2 and "embedding" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    optimisers = [
        torch.optim.AdamW([{"params": ends, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
    ]
    steps_per_epoch = len(train) // args.batch
    average = {k: v.clone() for k, v in model.state_dict().items()}  # exponential moving average, the weights that ship

    def encode_text(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions)
        longest = int((tokens != 0).sum(1).max())
        return encode_truncated(model, tokens[:, :longest])

    step, checkpoint = 0, args.out.with_suffix(".ckpt")
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        average, step = saved["average"], saved["step"]
        print(f"resumed at step {step}", flush=True)

    def accuracy(pixels: torch.Tensor, answers: torch.Tensor, words: list[str]) -> float:
        """Return the averaged weights' zero-shot accuracy in percent."""
        current = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average)
        model.eval()
        with torch.inference_mode():
            text = encode_text([f"a bad photo of a {word}." for word in words])
            predicted = torch.cat([(model.encode_image(normalise(part), normalize=True) @ text.T).argmax(1) for part in pixels.split(500)])
        model.train()
        model.load_state_dict(current)
        return 100 * float((predicted == answers).float().mean())

    unseen, unseen_labels = characters.draw(3000, torch.Generator().manual_seed(args.seed - 1))
    digit = unseen_labels < len(DIGITS)
    start, first, losses = time.time(), step, []
    while step < args.steps:
        epoch, within = divmod(step, steps_per_epoch)
        permutation = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed * 1000 + epoch))]
        generator = torch.Generator().manual_seed(args.seed * 10_000_019 + step)
        lr = args.lr * min((step + 1) / 300, 0.5 * (1 + math.cos(math.pi * step / args.steps)) + 1e-3)
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = lr
        chosen = permutation[within * args.batch : (within + 1) * args.batch]
        p_B1000 = taught[chosen].float()
        subset = torch.multinomial(p_B1000.mean(0), args.teacher_words, generator=generator)
        captions = draw_captions(synonyms, groups, generator) + in_templates(teacher_words(names, subset, generator), generator)
        drawn, drawn_labels = characters.draw(args.characters, generator)
        text_CD = encode_text(captions + draw_character_captions(generator))
        pixels = torch.cat([augment(images[chosen], generator), normalise(drawn)])
        image_BD = model.encode_image(pixels, normalize=True)
        log_p_BC = (model.logit_scale.exp() * image_BD @ text_CD.T).log_softmax(1)
        natural = F.pad(targets(labels[chosen], member, p_B1000[:, subset]), (0, len(CLASSES)))
        rendered = F.one_hot(len(captions) + drawn_labels, len(captions) + len(CLASSES)).float()
        loss = -(torch.cat([natural, rendered]) * log_p_BC).sum(1).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            rate = min(0.998, (step + 1) / (step + 20))
            state = model.state_dict()
            torch._foreach_lerp_([average[k] for k in state], list(state.values()), 1 - rate)
        losses.append(float(loss.detach()))
        step += 1
        if step % 50 == 0:
            seconds = (time.time() - start) / (step - first)
            print(
                f"step {step}/{args.steps} loss {np.mean(losses[-50:]):.3f} scale {float(model.logit_scale.exp()):.1f} "
                f"{seconds:.2f} s a step, {(args.steps - step) * seconds / 60:.0f} min left",
                flush=True,
            )
        if step % args.save_every == 0 or step == args.steps:
            of_classes = accuracy(images[held_out], labels[held_out], [s[0] for s in synonyms])
            of_digits = accuracy(unseen[digit], unseen_labels[digit], [f"handwritten digit {word}" for word in DIGITS])
            print(f"step {step}: held-out images {of_classes:.2f} %, new rendered digits {of_digits:.2f} %", flush=True)
            temporary = checkpoint.with_suffix(".tmp")
            torch.save(
                {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "average": average, "step": step},
                temporary,
            )
            temporary.replace(checkpoint)
            save_file({k: v.half().contiguous() for k, v in average.items() if k != "attn_mask"}, args.out)


def encode_truncated(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's encode_text on tokens cut to the longest prompt (exact: the mask is causal). Returns unit rows `[C, D]`."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
    return F.normalize(x @ model.text_projection, dim=-1)


if __name__ == "__main__":
    main()
