"""MiniGPT-4: a frozen encoder, a frozen language model, and a linear projection between them.

    python train_sft.py && python train_vlm.py     # toy pictures: all stages, then the exam
    python train_vlm.py --fast                     # a tenth of the steps: a smoke test
    python train_vlm.py --images=FOLDER            # your pictures (image/ID.jpg, filter_cap.json)
    python train_vlm.py minigpt4-7b --stage=1 --images=FOLDER         # weights in minigpt4/
    python train_vlm.py minigpt4-7b --stage=2 --images=cc_sbu_align   # after stage 1

Each stage writes to its own folder under --out. Finished stages are skipped, interrupted ones
resume:

  vision    stage 0 trains a small ViT and Q-Former, which stand in for EVA-CLIP's and BLIP-2's, to
            name what is in a picture. Then they are frozen.
  words     photos only: the small language model learns the words of the captions.
  align     stage 1: the projection learns from short, noisy alt-text.
  curated   the aligned model describes pictures, a text-only teacher (if given) repairs the
            descriptions, and wrong ones are dropped.
  minigpt4  stage 2: the projection learns from the descriptions that remain.

References: Zhu et al. 2023, MiniGPT-4 (arXiv 2304.10592), sections 3.1 to 3.3; Li et al. 2023,
BLIP-2 (2301.12597).
"""

import hashlib
import json
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import train_sft
import vision
from tools import checkpoint, config, teacher
from tools.config import UserError, refuse_unused
from tools.machine import Machine, choose_machine, use_threads
from tools.run import Plan, lock


@dataclass
class VLMConfig:
    stage: Literal["all", "0", "1", "curate", "2"] = "all"  # last stage; with --images 2 runs alone
    images: str = ""  # folder of pictures with captions; toy pictures when not given
    init: str = "out/vicuna"  # the language model
    vision: str = ""  # ViT and Q-Former: checkpoint folder or published files; stage 0's by default
    out: str = ""  # folder of the run; default: out, or out/fast with --fast
    teacher: str = ""  # repairs descriptions: MODEL@URL, a checkpoint; for toy pictures, the oracle
    review: bool = False  # check every remaining description by hand: accept, edit or drop
    steps: int = 0  # optimizer steps of the chosen --stage; 0: as in the recipe
    batch_size: int = 0  # pictures per step of the chosen --stage; 0: as in the recipe
    learning_rate: float = 0.0  # peak in the chosen --stage; 0: as in the recipe
    micro_batch: int = 0  # pictures per forward pass and process; 0: no gradient accumulation
    checkpointing: bool = False  # activation checkpointing in the language model: less memory
    recipe: Literal["auto", "toy", "photos", "published"] = "auto"  # hyperparameters, text format
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is fast
    device: str = "auto"  # cuda, mps or cpu
    threads: int = 0  # CPU threads of a process; 0: OMP_NUM_THREADS, else one per core
    seed: int = 0  # of the pictures, the initialization, and the shuffling
    save_minutes: float = 5.0  # between checkpoints
    resume: Literal["auto", "never"] = "auto"  # never: train every stage again
    fast: bool = False  # toy pictures: fewer steps
    full: bool = False  # toy pictures: also the random-encoder control and minimal pairs

    def __post_init__(self):
        self.out = self.out or ("out/fast" if self.fast else "out")
        config.check_at_least(self, 0, "steps", "batch_size", "learning_rate", "micro_batch",
                              "seed", "threads")
        config.check_above(self, 0, "save_minutes")


# What each stage passes to SFTConfig: warmup and min_lr are fractions of the steps and of the peak.
# Toy pictures and photos differ in steps, and in the learning rate of stage 2.
ENCODE = dict(batch_size=64, learning_rate=2e-3, min_lr=0.05, weight_decay=0.05, optimizer="muon")
ALIGN = dict(batch_size=32, learning_rate=3e-4, weight_decay=0.05)
DESCRIBE = dict(batch_size=16, learning_rate=1e-3, seq_len=160, weight_decay=0.05)
RECIPES = {
    "toy": {"0": dict(ENCODE, steps=1000), "1": dict(ALIGN, steps=2000),
            "2": dict(DESCRIBE, steps=100, learning_rate=1e-4)},
    "photos": {"0": dict(ENCODE, steps=3000), "1": dict(ALIGN, steps=1200),
               "2": dict(DESCRIBE, steps=200),
               "words": dict(steps=150, learning_rate=1e-3, optimizer="muon")},
    "published": {  # from MiniGPT-4's configuration files, which do not clip gradients
        "1": dict(steps=20000, batch_size=256, learning_rate=1e-4, warmup=0.25, min_lr=0.8,
                  weight_decay=0.05, beta2=0.999, clip=1e9),
        "2": dict(steps=1000, batch_size=12, learning_rate=3e-5, warmup=0.2, min_lr=1 / 3,
                  seq_len=256, weight_decay=0.05, beta2=0.999, clip=1e9)}}
PRESETS = {
    "minigpt4-7b": dict(recipe="published", init="minigpt4/vicuna", vision="minigpt4",
                        out="out/minigpt4-7b"),
    "minigpt4-13b": dict(recipe="published", init="minigpt4-13b/vicuna", vision="minigpt4-13b",
                         out="out/minigpt4-13b")}
# Our own prompt for the teacher in curation.
REPAIR = ("Below is a paragraph that a program has written. Correct its errors: remove sentences "
          "that repeat others, meaningless characters and what is not English; complete or remove "
          "sentences that break off. Do not add anything. Answer with the corrected paragraph "
          "alone. If nothing is wrong, return it unchanged. If nothing can be saved, answer: "
          "INCOMPLETE")


def recipe_of(cfg: VLMConfig) -> str:
    """auto: "photos" if an encoder is to be trained on --images. With --vision, the language model
    is assumed to know the words of the captions already, as for toy pictures."""
    if cfg.recipe != "auto":
        return cfg.recipe
    return "photos" if cfg.images and not cfg.vision else "toy"


def stage_config(cfg: VLMConfig, stage: str) -> train_sft.SFTConfig:
    """The recipe's hyperparameters for a stage, replaced by those on the command line."""
    numbers = dict(RECIPES[recipe_of(cfg)][stage])
    if cfg.fast:
        numbers["steps"] = max(20, numbers["steps"] // 10)
    if stage == cfg.stage:
        for key in ("steps", "batch_size", "learning_rate"):
            numbers[key] = getattr(cfg, key) or numbers[key]
    shared = ("out", "micro_batch", "checkpointing", "dtype", "device", "seed", "save_minutes",
              "resume")
    return train_sft.SFTConfig(**numbers, **{key: getattr(cfg, key) for key in shared})


@dataclass
class VLMRun:
    """What the stages share: the command line, the machine, and the language model."""
    cfg: VLMConfig
    machine: Machine
    llama: torch.nn.Module
    tokenizer: data.Tokenizer
    template: str
    folder: Path  # checkpoint folder of the language model
    window: int  # the context length that the language model was trained on
    began: float  # start time, in seconds


def open_run(cfg: VLMConfig, machine: Machine) -> VLMRun:
    llama, path, meta = checkpoint.load(cfg.init)
    template = meta["template"]
    if template == "vicuna_v0":
        template = "minigpt4"  # MiniGPT-4's own prompt for Vicuna v0
    return VLMRun(cfg, machine, llama, data.Tokenizer(path), template,
                  folder=checkpoint.find(cfg.init), window=checkpoint.window(meta, llama.config),
                  began=time.time())


# -- pictures with captions -----------------------------------------------------------------------

class Captioned(NamedTuple):
    path: Path
    caption: str


def load_album(folder) -> list[Captioned]:
    """Loads pictures and captions in MiniGPT-4's layout (image/ID.jpg and filter_cap.json), or from
    a folder of pictures with captions.json: [{"image": file name, "caption": ...}, ...], or COCO's.

    Prints how many annotations are skipped. Raises UserError if none can be used.
    """
    folder, skipped, album, names = Path(folder), Counter(), [], {}
    file = folder / "filter_cap.json"
    if not file.exists():
        file = folder / "captions.json"
    if not file.exists():
        raise UserError(f"--images={folder} has neither filter_cap.json nor captions.json")
    records = data.parse_records(data.read_text(file), file)
    if len(records) == 1 and isinstance(records[0], dict):  # {"annotations": [...]}
        names = coco_names(records[0])
        records = records[0].get("annotations", records) or []
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file}: expected a list of objects with image and caption")
    paths = pictures_by_name(folder)
    for record in records:
        name = record.get("image_id")
        name = str(record.get("image", "") if name is None else name)
        name = names.get(name, name)
        path = paths.get(same_spelling(name), folder / name)  # a name may be an absolute path
        caption = record.get("caption")
        if not path.is_file():
            skipped["without a picture"] += 1
        elif not isinstance(caption, str) or not re.search(r"\w", caption):
            skipped["without a caption"] += 1
        else:
            album.append(Captioned(path, caption))
    damaged = find_damaged(list(dict.fromkeys(c.path for c in album)))
    if damaged:
        print(f"{file}: {len(damaged)} unreadable pictures; {next(iter(damaged.values()))}")
        skipped["with an unreadable picture"] = sum(c.path in damaged for c in album)
        album = [c for c in album if c.path not in damaged]
    if skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        print(f"{file}: skipped annotations: {reasons}")
    if records and not album:
        raise UserError(f"{file}: none of {len(records)} annotations has both a picture and "
                        "a caption")
    return album


def pictures_by_name(folder: Path) -> dict[str, Path]:
    """The pictures in folder and below, by relative path; those in folder and folder/image also by
    file name with and without suffix."""
    by_name, extensions = {}, Image.registered_extensions()
    for path in sorted(folder.rglob("*")):
        if extensions.get(path.suffix.lower()) not in vision.FORMATS:
            continue
        by_name[same_spelling(str(path.relative_to(folder)))] = path
        if path.parent in (folder, folder / "image"):
            by_name[same_spelling(path.stem)] = by_name[same_spelling(path.name)] = path
    return by_name


def same_spelling(name: str) -> str:
    """A file name as every system may spell it: with slashes instead of Windows' backslashes, and
    composed characters, which macOS takes apart."""
    return unicodedata.normalize("NFC", Path(name.replace("\\", "/")).as_posix())


def coco_names(content: dict) -> dict[str, str]:
    """COCO's captions name pictures by numbers; its "images" have their file names."""
    images = [image for image in content.get("images") or [] if isinstance(image, dict)]
    return {str(image.get("id")): str(image.get("file_name")) for image in images}


def find_damaged(paths: Sequence[Path]) -> dict[Path, str]:
    """The pictures that cannot be decoded, and why. A single one would end the training."""
    with ThreadPool() as pool:  # decodes several pictures at a time
        opened = pool.imap(why_unreadable, paths)
        reasons = list(tqdm(opened, "opening pictures", len(paths), leave=False, delay=1))
    return {path: reason for path, reason in zip(paths, reasons) if reason}


def why_unreadable(path: Path) -> str:
    """Why a picture cannot be decoded; "" if it can."""
    try:
        vision.open_image(path)
    except UserError as error:
        return str(error)
    return ""


def album_digest(album: Sequence[Captioned]) -> str:
    """Identifies captions and pictures, wherever the files are."""
    key = hashlib.sha256()
    for c in album:
        picture = hashlib.sha256(c.path.read_bytes()).hexdigest()
        key.update(f"{picture} {c.caption}\n".encode())
    return key.hexdigest()[:16]


# -- stage 0: the encoder learns to name what it sees ---------------------------------------------

@dataclass
class PretrainerConfig:
    vit: vision.ViTConfig
    qformer: vision.QFormerConfig
    symbols: list  # the classes that a query may predict


class VisionPretrainer(torch.nn.Module):
    """ViT, Q-Former, and a classification head that is discarded after training. Query i predicts
    the i-th symbol, all of them in parallel."""

    def __init__(self, config: PretrainerConfig):
        super().__init__()
        self.config = config
        self.vit, self.qformer = vision.ViT(config.vit), vision.QFormer(config.qformer)
        self.head = torch.nn.Linear(config.qformer.dim, len(config.symbols))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.qformer(self.vit(pixels)))  # (N, Q, symbols)

    def nll(self, tokens, labels, images, segments=None) -> tuple[torch.Tensor, int]:
        """The loss and the number of predictions, in the form that the training loop expects: it
        shifts labels by one, so labels (N, 1 + Q) have an unused first column.

        Label smoothing pulls the features of a symbol together (1906.02629), so that a linear layer
        can separate them.
        """
        logits, targets = self(images).flatten(0, 1).float(), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1)
        return loss, targets.numel()

    def set_fused(self, fused: bool) -> None:
        pass  # called by the training loop; only LLaMA has attention written by hand


class SymbolRows:
    """Batches for stage 0. pick(step, n) gives n pictures and the symbols of each; it depends only
    on the step, so that a resumed run sees the same batches."""

    def __init__(self, pick: Callable, symbols: list[str], image_size: int):
        self.pick, self.image_size = pick, image_size
        self.index = {symbol: i for i, symbol in enumerate(symbols)}

    def __len__(self) -> int:
        return 2 ** 31  # endless: every step draws new pictures

    def batch(self, index: int, size: int) -> tuple:
        pictures, symbols = self.pick(index, size)
        labels = [[data.IGNORE] + [self.index[symbol] for symbol in row] for row in symbols]
        pixels = [vision.preprocess(picture, self.image_size) for picture in pictures]
        labels = torch.tensor(labels)
        return labels, labels, None, torch.stack(pixels)  # labels in place of tokens, no segments


NOTHING = "<nothing>"  # the symbol of a query that has no word to predict


def caption_words(album: Sequence[Captioned], n: int) -> tuple[list[list[str]], list[str]]:
    """For photos, whose captions are the only labels. Returns the n rarest words of each caption,
    rarest first, padded with NOTHING; and the vocabulary: the (at most 5,000) words that occur in
    five captions or more."""
    bags = [list(dict.fromkeys(re.findall(r"\w+", c.caption.lower()))) for c in album]
    count = Counter(word for bag in bags for word in bag)
    vocabulary = {word for word, times in count.most_common(5000) if times >= 5}
    rows = []
    for bag in bags:
        known = [word for word in bag if word in vocabulary]
        row = sorted(known, key=lambda word: (count[word], word))[:n]
        rows.append(row + [NOTHING] * (n - len(row)))
    return rows, [NOTHING, *sorted(vocabulary)]


def photo_batches(album: Sequence[Captioned], symbols: list[list[str]], seed: int) -> Callable:
    """pick(step, n) for SymbolRows: random photos, randomly cropped and mirrored."""
    def pick(step: int, n: int) -> tuple[list, list]:
        rng = np.random.default_rng((seed, step))
        chosen = rng.integers(len(album), size=n)
        pictures = [random_crop(vision.open_image(album[i].path), rng) for i in chosen]
        return pictures, [symbols[i] for i in chosen]
    return pick


def random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Like RandomResizedCrop: 50 to 100% of the area, aspect ratio scaled by 3/4 to 4/3; half are
    mirrored."""
    share, aspect = rng.uniform(0.5, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(image.width, max(1, round(image.width * (share * aspect) ** 0.5)))
    height = min(image.height, max(1, round(image.height * (share / aspect) ** 0.5)))
    left = rng.integers(image.width - width + 1)
    top = rng.integers(image.height - height + 1)
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


# -- stages 1 and 2: one picture in each row ------------------------------------------------------

class PictureRows(data.Rows):
    """Rows with one picture each; images(rows) gives their features, or pixels, as a tensor."""

    def __init__(self, examples: Sequence[data.Example], seq_len: int, pad: int, seed: int,
                 images: Callable):
        tokens = np.full((len(examples), seq_len), pad, np.int32)
        labels = np.full((len(examples), seq_len), data.IGNORE, np.int32)
        for row, e in enumerate(examples):
            tokens[row, :len(e.tokens)] = e.tokens
            labels[row, :len(e.labels)] = e.labels
        super().__init__(tokens, labels, None, seed)
        self.images = images

    def batch(self, index: int, size: int) -> tuple:
        rows = self.indices(index, size)
        return (*self.at(rows), self.images(rows))


def plain_alt_text(caption: str) -> str:
    """The caption in lower case, without the characters .!"()*#:;~, cut to 50 words."""
    words = re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()
    return " ".join(words[:50])


def alt_text_example(caption: str, slots: int, tokenizer: data.Tokenizer) -> data.Example:
    """Stage 1, as published: <s>, the picture, the caption, and a newline; at most 32 tokens of
    text; no question and no </s>."""
    ids = tokenizer.encode(plain_alt_text(caption) + "\n")[:32]
    before = [tokenizer.bos] + [data.IMAGE_SLOT] * slots
    return data.Example(before + ids, [data.IGNORE] * len(before) + ids)


def description_example(caption: str, instruction: str, slots: int, template: str,
                        tokenizer: data.Tokenizer, seq_len: int) -> data.Example:
    """Stage 2: an instruction about the picture, and a description. A long description is
    truncated, but keeps its end token."""
    turns = [data.Turn("user", instruction, slots=slots), data.Turn("assistant", caption)]
    tokens, labels = data.render(data.Conversation(turns), template, tokenizer)
    end = data.get_template(template).end
    end_tokens = len(tokenizer.encode(end, continues=True)) if end else 1  # else </s>
    keep = min(len(tokens), seq_len) - end_tokens
    return data.Example(tokens[:keep] + tokens[-end_tokens:], labels[:keep] + labels[-end_tokens:])


def load_pixels(net: vision.MiniGPT4, pictures: Sequence, rows: Sequence[int]) -> torch.Tensor:
    """The pictures (files or arrays) at these indices, as (n, 3, h, w)."""
    size = net.vit.config.image_size
    return torch.stack([vision.load_image(pictures[i], size) for i in rows])


def encode_images(net: vision.MiniGPT4, pictures: Sequence, machine: Machine) -> torch.Tensor:
    """The frozen encoder's features of all pictures (files or arrays), (n, Q, C) on the CPU."""
    parts = []
    for begin in tqdm(range(0, len(pictures), 64), desc="encoding pictures", leave=False):
        rows = range(begin, min(len(pictures), begin + 64))
        pixels = load_pixels(net, pictures, rows).to(machine.device)
        with torch.no_grad(), machine.autocast():
            parts.append(net.features(pixels).float().cpu())
    return torch.cat(parts)


def frozen_images(net: vision.MiniGPT4, pictures: Sequence, machine: Machine) -> Callable:
    """A function for PictureRows: rows -> features, which are computed once since the encoder is
    frozen. If they would take more than 2 GB: rows -> pixels."""
    n_bytes = len(pictures) * net.n_queries * net.llama_proj.in_features * 4
    if n_bytes > 2e9:
        return lambda rows: load_pixels(net, pictures, rows)
    features = encode_images(net, pictures, machine)
    return lambda rows: features[list(rows)]


def ask(net: vision.MiniGPT4, vlm: VLMRun, questions: Sequence, features: torch.Tensor | None,
        max_new_tokens: int = 64) -> tuple[list[str], list[bool]]:
    """One reply per picture, and whether it ended with the end token. A question is a text, or a
    list of turns. Without features, no picture is shown."""
    slots = 0 if features is None else net.n_queries
    conversations = []
    for question in questions:
        turns = [data.Turn("user", question)] if isinstance(question, str) else question
        first = turns[0]._replace(slots=slots)
        conversations.append(data.Conversation([first, *turns[1:]]))
    images = None
    if features is not None:
        images = [f[None].to(net.llama_proj.weight.device) for f in features]
    return data.generate_replies(net, vlm.tokenizer, vlm.template, conversations,
                                 max_new_tokens, images=images)


# -- curation -------------------------------------------------------------------------------------

# What the paper removes from the teacher's replies.
APOLOGY = re.compile(r"(I['’]m|I am) sorry[^.!?]*[.!?]|I apologi[sz]e[^.!?]*[.!?]", re.I)


class VLMData(NamedTuple):
    """The data of all stages: toy pictures, or a folder of photos."""
    learn: Sequence[Captioned]  # for stage 1, and for the encoder of photos
    pool: Sequence[Captioned]  # to be described and curated
    repair: Callable  # texts -> repaired texts
    is_true: Callable  # (index in the pool, description) -> keep it?
    min_tokens: int  # shorter descriptions are continued
    evaluate: Callable  # (run, net, projection after stage 1) -> figures


def curate(vlm: VLMRun, net: vision.MiniGPT4, work: VLMData) -> None:
    """Section 3.2 of the paper. Writes the descriptions that are kept into curated/, with a report.

    If it is interrupted, pictures are described again, but the teacher's replies and the user's
    verdicts are kept in files.
    """
    out = Path(vlm.cfg.out) / "curated"
    reviewed = teacher.ReplyCache(out / "reviewed.jsonl")
    said = describe_pool(vlm, net, work)
    repaired = work.repair(said)
    report = Counter(asked=len(said))
    kept = []
    for i, (text, before) in enumerate(zip(repaired, said)):
        no_answer = text is None
        text = APOLOGY.sub("", text or "").strip()
        if no_answer:
            verdict = "dropped: no answer from the teacher"
        elif "INCOMPLETE" in text or len(text) < 5:
            verdict = "dropped: nothing could be saved"
        elif not work.is_true(i, text):
            verdict = "dropped: does not match the picture"
        else:
            verdict = "kept as it was" if text == before.strip() else "repaired and kept"
            if vlm.cfg.review:
                text, verdict = review(work.pool[i].path, text, verdict, reviewed)
        report[verdict] += 1
        if not verdict.startswith("dropped"):
            path = str(work.pool[i].path.resolve())
            kept.append(dict(image=path, caption=text, before=before))
    print("curation: " + "; ".join(f"{verdict}: {n}" for verdict, n in report.items()))
    with data.atomic_write(out / "report.json") as file:
        json.dump(report, file, indent=1)
    with data.atomic_write(out / "filter_cap.json") as file:
        json.dump(dict(annotations=kept, **curated_by(vlm.cfg)), file, indent=1,
                  ensure_ascii=False)


def curated_by(cfg: VLMConfig) -> dict:
    """Who curates; as a digest, since the address of a server may hold a password."""
    return dict(teacher=teacher.digest(cfg.teacher), review=cfg.review)


def is_curated(cfg: VLMConfig) -> bool:
    """False if it was not done yet, or if the command names another teacher or adds --review."""
    file = Path(cfg.out) / "curated" / "filter_cap.json"
    if cfg.resume == "never" or not file.exists():
        return False
    (before,) = data.parse_records(data.read_text(file), file)
    same_teacher = before.get("teacher") == curated_by(cfg)["teacher"]
    return (same_teacher or not cfg.teacher) and (before.get("review") or not cfg.review)


def describe_pool(vlm: VLMRun, net: vision.MiniGPT4, work: VLMData) -> list[str]:
    """The aligned model's descriptions; short ones are continued once, with "Continue"."""
    features = encode_images(net, [c.path for c in work.pool], vlm.machine)
    said, _ = ask(net, vlm, [data.IMAGE_REQUEST] * len(work.pool), features, 96)
    short = [i for i, text in enumerate(said) if len(vlm.tokenizer.encode(text)) < work.min_tokens]
    again = []
    for i in short:
        again.append([data.Turn("user", data.IMAGE_REQUEST), data.Turn("assistant", said[i]),
                      data.Turn("user", "Continue")])
    more, _ = ask(net, vlm, again, features[short], 96)
    for i, text in zip(short, more):
        said[i] = f"{said[i]} {text}".strip()
    return said


def review(path: Path, text: str, verdict: str,
           reviewed: teacher.ReplyCache) -> tuple[str, str]:
    """--review: the user accepts, drops or rewrites a description, and is asked only once."""
    key = teacher.digest(str(path), text)
    if key not in reviewed.replies:
        print(f"\n{path}\n{text}")
        try:
            typed = input("[Enter] keep  [d] drop  or type a replacement: ").strip()
        except (EOFError, KeyboardInterrupt):
            raise config.Stopped("the verdicts so far are kept") from None
        reviewed.add(key, teacher.Reply(typed, ended=True))
    answer = reviewed.replies[key].text
    if answer.lower() == "d":
        return text, "dropped: by you"
    return (answer, "repaired and kept") if answer else (text, verdict)


def caption_repairer(spec: str, out: str) -> Callable:
    """A text-only teacher as a function: texts -> repaired texts, None where it failed. Its replies
    are kept under `out`."""
    ask_teacher = teacher.teacher(spec, temperature=0.7, max_new_tokens=200)
    cache = teacher.ReplyCache(Path(out) / "curated" / "replies.jsonl")

    def repair_captions(texts: Sequence[str]) -> list[str | None]:
        conversations = []
        for text in texts:
            turns = [data.Turn("user", text)]
            extra = dict(repair=text)  # for the oracle, which does not read prompts
            conversations.append(data.Conversation(turns, system=REPAIR, extra=extra))
        replies = cache.ask(ask_teacher, conversations, [], "repairing")
        return [reply.text if reply else None for reply in replies]
    return repair_captions


# -- the stages -----------------------------------------------------------------------------------

def learn_caption_words(vlm: VLMRun, album: Sequence[Captioned]) -> VLMRun:
    """Unlike LLaMA, a small language model does not know the words of photo captions. So it is
    first fine-tuned to write each caption from its rarest words, without the picture."""
    cfg, path = vlm.cfg, Path(vlm.cfg.out) / "data" / "captions.json"
    rng, conversations = random.Random(cfg.seed), []
    rows, _ = caption_words(album, 4)
    for c, words in zip(album, rows):
        shown = " ".join(word for word in words if word != NOTHING)
        text = f"<Img>{shown}</Img> {rng.choice((data.IMAGE_REQUEST, *data.IMAGE_INSTRUCTIONS))}"
        turns = [data.Turn("user", text), data.Turn("assistant", c.caption)]
        conversations.append(data.Conversation(turns))
    data.save_conversations(conversations, path)
    train_sft.fine_tune(stage_config(cfg, "words"), "words", vlm.machine, path, cfg.init)
    return with_words(vlm)


def with_words(vlm: VLMRun) -> VLMRun:
    """The same run with the language model that has learned the captions' words."""
    words = str(Path(vlm.cfg.out) / "words")
    return replace(open_run(replace(vlm.cfg, init=words), vlm.machine), began=vlm.began)


def train_encoder(vlm: VLMRun, album: Sequence[Captioned]) -> Path:
    """Stage 0, on toy scenes if there is no album. Returns the folder with ViT and Q-Former."""
    cfg = vlm.cfg
    vit_sizes, qformer_sizes = vision.PRESETS["photos" if album else "toy"]
    vit, qformer = vision.ViTConfig(**vit_sizes), vision.QFormerConfig(**qformer_sizes)
    if album:
        words, vocabulary = caption_words(album, qformer.n_queries)
        pick = photo_batches(album, words, cfg.seed)
        source = album_digest(album)
    else:
        from toy import pictures
        vocabulary = pictures.SYMBOLS
        pick = pictures.symbol_batches(cfg.seed, vit.image_size)
        source = "toy pictures"
    rows = SymbolRows(pick, vocabulary, vit.image_size)
    torch.manual_seed(cfg.seed)
    net = VisionPretrainer(PretrainerConfig(vit, qformer, vocabulary))
    sft = replace(stage_config(cfg, "0"), seq_len=1 + qformer.n_queries)
    train_sft.run_stage(sft, "vision", vlm.machine, rows, vlm.tokenizer, vlm.template, source,
                        network=net)
    return Path(cfg.out) / "vision"


def build_minigpt4(vlm: VLMRun, encoder: Path) -> tuple[vision.MiniGPT4, dict]:
    """A MiniGPT-4 with an untrained projection, and what it was assembled from."""
    vit, qformer = vision.load_encoder(encoder)
    torch.manual_seed(vlm.cfg.seed)
    net = vision.MiniGPT4(vlm.llama, vit, qformer).to(vlm.machine.device)
    step = checkpoint.find(encoder)
    parts = dict(llama=str(vlm.folder.resolve()), llama_crc=checkpoint.fingerprint(vlm.folder),
                 vision=str(step.resolve()), vision_crc=checkpoint.fingerprint(step))
    return net, parts


def train_projection(vlm: VLMRun, stage: str, net: vision.MiniGPT4, parts: dict,
                     album: Sequence[Captioned], name: str, parent: str = "") -> None:
    """Trains stage 1 or 2 and saves it in the folder `name`. Skips stage 2 if there are fewer
    descriptions than one batch."""
    sft, rng = stage_config(vlm.cfg, stage), random.Random(vlm.cfg.seed)
    if stage == "2" and len(album) < sft.batch_size:
        print(f"stage 2 is skipped: {len(album)} descriptions, fewer than one batch of "
              f"{sft.batch_size}")
        return
    recipe = recipe_of(vlm.cfg)
    if stage == "1" and recipe != "published" and not parent:
        # From zero: with a language model of a million parameters, training never recovered from a
        # random projection. (toy/claims.py has one of three layers; only its last one is zero.)
        linear = [m for m in net.llama_proj.modules() if isinstance(m, torch.nn.Linear)]
        for w in linear[-1].parameters():
            torch.nn.init.zeros_(w)
    examples = []
    for c in album:
        if stage == "1" and recipe == "published":
            examples.append(alt_text_example(c.caption, net.n_queries, vlm.tokenizer))
            continue
        # Elsewhere captions are replies, also in stage 1: a small model knows them as nothing else.
        if stage == "1" and recipe == "toy":
            caption, instruction = plain_alt_text(c.caption), ""
        else:
            caption, instruction = c.caption, rng.choice(data.IMAGE_INSTRUCTIONS)
        examples.append(description_example(caption, instruction, net.n_queries, vlm.template,
                                            vlm.tokenizer, sft.seq_len))
    sft = replace(sft, seq_len=max(len(e.tokens) for e in examples))
    images = frozen_images(net, [c.path for c in album], vlm.machine)
    rows = PictureRows(examples, sft.seq_len, vlm.tokenizer.eos, vlm.cfg.seed, images)
    train_sft.run_stage(sft, name, vlm.machine, rows, vlm.tokenizer, vlm.template,
                        album_digest(album), network=net, extra_settings=parts, parent=parent,
                        window=vlm.window)


def copy_projection(net: vision.MiniGPT4) -> dict:
    return {name: w.clone() for name, w in net.llama_proj.state_dict().items()}


def run_stages(vlm: VLMRun) -> dict:
    """All stages, or those up to the chosen one. Returns the exam's figures, or the last folder."""
    cfg, out = vlm.cfg, Path(vlm.cfg.out)
    if cfg.stage == "2" and cfg.images:
        return train_on_descriptions(vlm)
    if cfg.images:
        work = photo_data(vlm)
    else:
        from toy import exam
        work = exam.toy_pictures(vlm)
    plan = make_plan(cfg)
    if cfg.vision:
        encoder = Path(cfg.vision)
    else:
        plan.begin("0", "the vision encoder learns to name what it sees")
        encoder = train_encoder(vlm, work.learn if cfg.images else ())
    if cfg.stage == "0":
        return dict(folder=str(encoder))
    if recipe_of(cfg) == "photos":
        plan.begin("words", "the language model learns the words of the captions")
        vlm = learn_caption_words(vlm, work.learn)
    net, parts = build_minigpt4(vlm, encoder)
    plan.begin("1", "the projection learns from alt-text")
    train_projection(vlm, "1", net, parts, work.learn, "align")
    if cfg.stage == "1":
        return dict(folder=str(out / "align"))
    plan.begin("curate", "the aligned model describes pictures, which are curated")
    aligned, curated = copy_projection(net), out / "curated"
    if cfg.stage != "curate" and is_curated(cfg):
        print(f"{curated} already exists; --stage=curate writes it again")
    else:
        curate(vlm, net.eval(), work)
    if cfg.stage == "curate":
        return dict(folder=str(curated))
    plan.begin("2", "the projection learns from descriptions")
    train_projection(vlm, "2", net, parts, load_album(curated), "minigpt4", str(out / "align"))
    plan.begin("exam", "the exam")
    return work.evaluate(vlm, net.eval(), aligned)


def train_on_descriptions(vlm: VLMRun) -> dict:
    """--stage=2 --images: stage 2 on your own descriptions, from the projection in out/align."""
    cfg, out = vlm.cfg, Path(vlm.cfg.out)
    if recipe_of(cfg) == "photos":
        vlm = with_words(vlm)  # as stage 1 did
    work = photo_data(vlm)
    least = stage_config(cfg, "2").batch_size
    if len(work.learn) < least:
        raise UserError(f"{cfg.images} has {len(work.learn)} descriptions, fewer than one batch of "
                        f"{least}")
    net, parts = build_minigpt4(vlm, Path(cfg.vision or out / "vision"))
    checkpoint.load(out / "align", network=net)
    aligned = copy_projection(net)
    train_projection(vlm, "2", net, parts, work.learn, "minigpt4", str(out / "align"))
    if vlm.machine.sharded:  # the weights are sharded: evaluate in a separate process
        return dict(folder=str(out / "minigpt4"))
    return work.evaluate(vlm, net.eval(), aligned)


# The cost of a step in each stage, relative to stage 1; curation and exam count as 500 steps each.
# Measured on two CPU cores.
COSTS = {"0": 1.3, "words": 2.0, "1": 1.0, "curate": 0.1, "2": 0.75, "exam": 0.2}


def make_plan(cfg: VLMConfig) -> Plan:
    """The stages of this command and their costs, for the estimate of the time left."""
    recipe, costs = RECIPES[recipe_of(cfg)], {}
    for stage, cost in COSTS.items():
        skipped = cfg.vision if stage == "0" else stage == "words" and stage not in recipe
        if skipped:
            continue
        steps = stage_config(cfg, stage).steps if stage in recipe else 500
        costs[stage] = cost * steps
        if stage == cfg.stage and stage != "2":  # the exam follows stage 2
            break
    if cfg.full and "exam" in costs:  # a control that goes through both stages
        costs["exam"] += costs["1"] + costs["2"]
    return Plan(costs, seconds=0.075)  # a first guess, for a step of stage 1


# -- your own pictures ----------------------------------------------------------------------------

def photo_data(vlm: VLMRun) -> VLMData:
    """A folder of pictures with captions. A tenth, by the hash of the file name, is held out for
    the exam; the published recipe holds out nothing."""
    cfg = vlm.cfg
    album = load_album(cfg.images)
    held, learn = [], []
    for c in album:
        digest = hashlib.sha256(c.path.name.encode()).hexdigest()
        if int(digest, 16) % 10 == 0 and recipe_of(cfg) != "published":
            held.append(c)
        else:
            learn.append(c)
    if not learn:
        raise UserError(f"{cfg.images} has no pictures with captions to learn from")
    print(f"{cfg.images}: {len(album)} pictures with captions, {len(held)} of them held out")
    pool = random.Random(cfg.seed).sample(learn, min(len(learn), 5000))
    rarest_words, _ = caption_words(pool, 1)
    if recipe_of(cfg) == "photos" and all(row == [NOTHING] for row in rarest_words):
        raise UserError(f"{cfg.images}: no word occurs in five captions; give more captions, or "
                        "--vision with a pretrained encoder")

    def is_true(i: int, text: str) -> bool:  # NOTHING, for a caption of rare words, is never found
        return rarest_words[i][0] in re.findall(r"\w+", text.lower())

    def evaluate(vlm: VLMRun, net: vision.MiniGPT4, aligned: dict) -> dict:
        return photo_exam(vlm, net, learn, held)

    def unchanged(texts: Sequence[str]) -> Sequence[str]:
        return texts

    repair = caption_repairer(cfg.teacher, cfg.out) if cfg.teacher else unchanged
    return VLMData(learn, pool, repair, is_true, min_tokens=1, evaluate=evaluate)


def photo_exam(vlm: VLMRun, net: vision.MiniGPT4, learn: Sequence[Captioned],
               held: Sequence[Captioned]) -> dict:
    """The fraction of held-out pictures whose description and caption have the same first label
    word. A label word is the rarest word of some training caption. shuffled: the model sees another
    picture."""
    rows, _ = caption_words(learn, 1)
    labels = {word for (word,) in rows}

    def first_label(text: str) -> str | None:
        return next((word for word in re.findall(r"\w+", text.lower()) if word in labels), None)

    held = [c for c in held if first_label(c.caption)]
    if not held:
        return {}
    truth = [first_label(c.caption) for c in held]
    features = encode_images(net, [c.path for c in held], vlm.machine)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    shuffled = features.clone()
    shuffled[order] = features[order.roll(1)]  # nobody keeps its own
    figures = {}
    for name, seen in (("MiniGPT-4", features), ("shuffled", shuffled)):
        replies, _ = ask(net, vlm, [data.IMAGE_INSTRUCTIONS[0]] * len(held), seen)
        right = [first_label(reply) == t for reply, t in zip(replies, truth)]
        figures[name] = sum(right) / len(held)
        print(f"{name}: first label word right in {100 * figures[name]:.1f}% of {len(held)} "
              "held-out pictures")
    return figures


# -- python train_vlm.py --------------------------------------------------------------------------

def check_options(cfg: VLMConfig) -> None:
    """Raises UserError for an option that would have no effect."""
    if cfg.stage not in ("0", "1", "2"):
        refuse_unused(cfg, ("steps", "batch_size", "learning_rate"),
                      "it differs between stages; choose one with --stage=0, 1 or 2")
    if cfg.images:
        refuse_unused(cfg, ("fast", "full"), "it is for toy pictures; drop --images")
    elif recipe_of(cfg) == "photos":
        raise UserError("--recipe=photos needs --images")
    if recipe_of(cfg) == "published" and not cfg.vision:
        raise UserError("the published recipe has no stage 0: give --vision=FOLDER with a "
                        "pretrained ViT and Q-Former")
    if cfg.stage in ("0", "1") or (cfg.stage == "2" and cfg.images):
        refuse_unused(cfg, ("teacher", "review"), "this command has no curation")
    if cfg.stage in ("0", "1", "curate"):
        refuse_unused(cfg, ("full",), "this command has no exam")
    if cfg.stage == "0":
        refuse_unused(cfg, ("vision", "checkpointing"), "stage 0 only trains a new, small encoder")


def main(cfg: VLMConfig) -> dict:
    check_options(cfg)
    if recipe_of(cfg) == "toy" and not cfg.images and cfg.dtype == "auto":
        cfg = replace(cfg, dtype="float32")  # like the toy language model
    use_threads(cfg.threads, cfg.device)
    machine = choose_machine(cfg.device, cfg.dtype)
    try:
        if machine.sharded and not (cfg.images and cfg.vision and cfg.stage in ("1", "2")):
            raise UserError("torchrun is for --stage=1 or 2 with --images and --vision; everything "
                            "else runs in a single process")
        with lock(cfg.out, machine):
            return run_stages(open_run(cfg, machine))
    finally:
        if machine.sharded:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config.run(main, VLMConfig, PRESETS)
