"""MiniGPT-4: a frozen encoder, a frozen language model, and one linear layer between them that learns.

    python train_sft.py && python train_vlm.py     # toy pictures: all stages, then the table
    python train_vlm.py --fast                     # the same, too short to learn much
    python train_vlm.py --images=FOLDER            # your pictures: image/ID.jpg and filter_cap.json
    python train_vlm.py minigpt4-7b --stage=1 --images=FOLDER         # published sizes; their files in minigpt4/
    python train_vlm.py minigpt4-7b --stage=2 --images=cc_sbu_align   # after stage 1

Stages, each of them a folder under --out that is trained once and goes on where it was interrupted:
  vision    0: stands in for the published EVA and BLIP-2 weights. ViT and Q-Former learn to name what they
            see, by symbols, in an order and in words that are not the captions'. Then both are frozen.
  align     1: the linear layer learns from short, noisy alt-text; nothing else does.
  curated   the aligned model describes pictures, a teacher who does not see them repairs it, truth prunes.
  minigpt4  2: the linear layer learns from the descriptions that are left, with the published instructions.
References: Zhu et al. 2023, MiniGPT-4 (arXiv 2304.10592), sections 3.1 to 3.3; Li et al. 2023, BLIP-2
(2301.12597).
"""

import hashlib
import json
import random
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal, NamedTuple, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import judge
import model
import teacher
import toy
import train_sft
import vision
from config import Problem, describe, run


@dataclass
class VLMConfig:
    stage: Literal["all", "0", "1", "curate", "2"] = "all"  # one of them alone
    images: str = ""  # folder of pictures with captions; toy pictures when not given
    init: str = "out/vicuna"  # the language model
    vision: str = ""  # ViT and Q-Former: our checkpoint or the published files; stage 0 trains them when not given
    out: str = "out"  # folder of the run
    teacher: str = ""  # repairs descriptions: MODEL@URL or a checkpoint; the toy oracle when not given
    review: bool = False  # accept, edit or drop every curated description yourself
    steps: int = 0  # of each stage; 0: the preset's
    batch_size: int = 0  # pictures in an optimizer step; 0: the preset's
    learning_rate: float = 0.0  # peak; 0: the preset's
    micro_batch: int = 0  # pictures in one forward pass of one process; 0: all of them
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more work
    recipe: Literal["", "toy", "photos", "published"] = ""  # steps, rates; photos with --images alone, else toy
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 where the chip is good at it
    device: str = "auto"  # cuda, mps or cpu
    seed: int = 0  # of everything
    save_minutes: float = 5.0  # between checkpoints
    resume: Literal["auto", "never"] = "auto"  # auto: go on where it stopped; never: train it again
    fast: bool = False  # toy: fewer steps
    full: bool = False  # toy: minimal pairs, too


# Numbers of a stage: what SFTConfig takes, and how many pictures there are to learn from.
RECIPES = {
    "toy": {
        "0": dict(steps=1000, batch_size=64, learning_rate=2e-3, min_lr=0.05, weight_decay=0.05, optimizer="muon"),
        "1": dict(steps=1500, batch_size=32, learning_rate=3e-4, weight_decay=0.05),
        "2": dict(steps=400, batch_size=16, learning_rate=1e-3, seq_len=160, weight_decay=0.05)},
    "photos": {
        "words": dict(steps=150, learning_rate=1e-3, optimizer="muon"),
        "0": dict(steps=3000, batch_size=64, learning_rate=2e-3, min_lr=0.05, weight_decay=0.05, optimizer="muon"),
        "1": dict(steps=1200, batch_size=32, learning_rate=3e-4, weight_decay=0.05),
        "2": dict(steps=200, batch_size=16, learning_rate=1e-3, seq_len=160, weight_decay=0.05)},
    "published": {  # the originals' configuration files; there, no gradient is clipped
        "1": dict(steps=20000, batch_size=256, learning_rate=1e-4, warmup=0.25, min_lr=0.8, weight_decay=0.05,
                  beta2=0.999, clip=1e9),
        "2": dict(steps=1000, batch_size=12, learning_rate=3e-5, warmup=0.2, min_lr=1 / 3, seq_len=256,
                  weight_decay=0.05, beta2=0.999, clip=1e9)}}
PRESETS = {
    "minigpt4-7b": dict(recipe="published", init="minigpt4/vicuna", vision="minigpt4", out="out/minigpt4-7b"),
    "minigpt4-13b": dict(recipe="published", init="minigpt4-13b/vicuna", vision="minigpt4-13b", out="out/minigpt4-13b")}
TOY = dict(alt=4000, curate=1000, questions=100)
FAST = dict(alt=300, curate=40, questions=10)

INSTRUCTIONS, REQUEST = toy.INSTRUCTIONS, toy.REQUEST  # the published ones, which the toy language model also reads
REPAIR = ("Below is a paragraph that a program has written. Correct its errors: remove sentences that repeat "
          "others, meaningless characters and what is not English; complete or remove sentences that break "
          "off. Do not add anything. Answer with the corrected paragraph alone. If nothing is wrong, repeat "
          "it unchanged. If nothing can be saved, answer: INCOMPLETE")


# -- pictures with captions ----------------------------------------------------------------------------------

def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Captioned(NamedTuple):
    path: Path
    caption: str


# what would end a reply, or pose as a picture
FORBIDDEN = re.compile(r"###|</s>|</?Img>|<Image\w*>|[\x00-\x08\x0b-\x1f\x7f]")


def load_album(folder, report: Counter) -> list[Captioned]:
    """MiniGPT-4's layout (image/ID.jpg, filter_cap.json), or pictures beside a captions.json, which holds
    [{"image_id" or "image" or "file_name": ..., "caption": ...}, ...] or {"name.jpg": "caption", ...}.

    What is left out or mended is counted in `report`; Problem when nothing is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Problem(f"--images={folder} is no folder")
    names = ("filter_cap.json", "captions.json", "captions.jsonl")
    file = next((folder / name for name in names if (folder / name).exists()), None)
    if file is None:
        raise Problem(f"{folder} has no filter_cap.json or captions.json, which says what is in each picture")
    records = list(data.read_records(file))
    if len(records) == 1 and isinstance(records[0], dict) and "caption" not in records[0]:
        only = records[0]
        records = only.get("annotations", [dict(image=name, caption=text) for name, text in only.items()])
    places = [folder / "image", folder]
    files = {p.stem: p for place in reversed(places) if place.is_dir() for p in sorted(place.iterdir())
             if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")}
    album, missing = [], []
    for r in records:
        r = r if isinstance(r, dict) else {}
        name = str(r.get("image_id", r.get("image", r.get("file_name", ""))))
        path = next((p / name for p in places if name and (p / name).is_file()), files.get(name))
        caption = r.get("caption")
        if path is None:
            report["left out: no such picture"] += 1
            missing.append(name)
        elif not isinstance(caption, str) or not re.search(r"\w", FORBIDDEN.sub(" ", caption)):
            report["left out: no caption"] += 1
        else:
            mended = FORBIDDEN.sub(" ", caption)
            report["mended: a caption with control text"] += mended != caption
            album.append(Captioned(path, mended))
    if missing:
        print(f"{folder}: {len(missing)} pictures are missing, such as {missing[0] or 'one without a name'}")
    if records and not album:
        raise Problem(f"{file}: none of {len(records)} annotations is usable ("
                      + "; ".join(f"{why}: {n}" for why, n in report.items() if n) + ")")
    return album


def write_toy_album(folder: Path, n: int, seed: str, text: Callable) -> None:
    """n toy pictures in MiniGPT-4's layout, and scenes.json with what is true of them. Written once for this seed."""
    rng, note = random.Random(seed), folder / "scenes.json"
    scenes = [toy.pick_scene(rng) for _ in range(n)]
    truth = json.dumps(scenes)
    if not note.exists() or note.read_text() != truth:
        pictures = [toy.draw(s, rng) for s in tqdm(scenes, desc=f"drawing {folder}", leave=False)]
        toy.write_album(folder, pictures, [text(s, rng) for s in scenes])
        note.write_text(truth)


# -- stage 0: the encoder learns to name what it sees --------------------------------------------------------

@dataclass
class SightConfig:
    vit: vision.ViTConfig
    qformer: vision.QFormerConfig
    symbols: list  # what the queries may say


class Sight(torch.nn.Module):
    """ViT, Q-Former, and a head that is thrown away: each query says one symbol, all of them at once."""

    def __init__(self, config: SightConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.vit, self.qformer = vision.ViT(config.vit), vision.QFormer(config.qformer)
        self.head = torch.nn.Linear(config.qformer.dim, len(config.symbols))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.vit.checkpointing = self.checkpointing
        return self.head(self.qformer(self.vit(pixels)))  # (N, Q, symbols)

    def nll(self, tokens, labels, images, segments=None) -> tuple[torch.Tensor, torch.Tensor]:
        """labels (N, 1 + Q): the loop never scores the first column, so it is empty."""
        logits = self(images).flatten(0, 1).float()
        # Smoothed, because it draws what is seen of one symbol close together: all that a linear layer can read.
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.1)
        return loss, labels[:, 1:].numel()

    def set_fused(self, fused: bool) -> None:
        pass  # attention by hand is LLaMA's

    def flops(self, tokens, labels, segments, images) -> float:
        """6 per parameter and patch in the ViT, per parameter and query in the Q-Former."""
        size = lambda part: sum(p.numel() for p in part.parameters())
        vit = size(self.vit.blocks) * self.vit.pos_embed.shape[1]
        return 6.0 * len(images) * (vit + size(self.qformer.layers) * labels.shape[1])


NOTHING, END = "nothing", "end"
SYMBOLS = [NOTHING, END, *toy.SHAPES, *toy.PLACES, *toy.COLORS, *toy.SIZES]


def scene_symbols(scene: toy.Scene) -> list[str]:
    """Four symbols and an end for each of one or two objects, the last place first, then nothing."""
    objects = sorted(scene, key=lambda o: -toy.PLACES.index(o.place))
    said = [symbol for o in objects for symbol in (o.shape, o.place, o.color, o.size, END)]
    return said + [NOTHING] * (10 - len(said))


def caption_symbols(album: Sequence[Captioned], n: int) -> tuple[list[list[str]], list[str]]:
    """For photos there is no other truth than captions: of each, its n rarest words, the rarest first.

    Returns them, and every word that stands in five captions or more (the others are nothing).
    """
    bags = [list(dict.fromkeys(re.findall(r"\w+", c.caption.lower()))) for c in album]
    count = Counter(word for bag in bags for word in bag)
    known = sorted(w for w, k in count.items() if k >= 5)[:5000]
    said = [sorted((w for w in bag if count[w] >= 5), key=lambda w: (count[w], w))[:n] for bag in bags]
    return [row + [NOTHING] * (n - len(row)) for row in said], [NOTHING, *known]


class Scenes:
    """New toy pictures in every step: a pure function of (seed, step), as data.Rows."""
    symbols = SYMBOLS

    def __init__(self, seed: int, size: int):
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return 2 ** 31

    def pick(self, step: int, size: int) -> tuple[list, list]:
        """Pictures, and what the queries have to say of each."""
        rng = random.Random(f"stage 0, {self.seed}, {step}")
        scenes = [toy.pick_scene(rng) for _ in range(size)]
        return [toy.draw(s, rng, self.size) for s in scenes], [scene_symbols(s) for s in scenes]

    def batch(self, step: int, size: int) -> tuple:
        pictures, said = self.pick(step, size)
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        labels = torch.tensor([[data.IGNORE] + [number[s] for s in row] for row in said])
        return labels, labels, None, torch.stack([vision.preprocess(p, self.size) for p in pictures])


class Photos(Scenes):
    """The album's pictures instead, cropped and mirrored by chance, with `n` symbols each."""

    def __init__(self, album: Sequence[Captioned], n: int, seed: int, size: int):
        super().__init__(seed, size)
        self.album = album
        self.said, self.symbols = caption_symbols(album, n)

    def __len__(self) -> int:
        return len(self.album)

    def pick(self, step: int, size: int) -> tuple[list, list]:
        dice = np.random.default_rng((self.seed, step))
        at = dice.integers(len(self.album), size=size)
        return [cropped(vision.open_image(self.album[i].path), dice) for i in at], [self.said[i] for i in at]


def cropped(image: Image.Image, dice: np.random.Generator) -> Image.Image:
    """50 to 100 % of the area, aspect 3/4 to 4/3, as in MiniGPT-4's training; half of them mirrored."""
    share, aspect = dice.uniform(0.5, 1.0), np.exp(dice.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(image.width, max(1, round(image.width * (share * aspect) ** 0.5)))
    height = min(image.height, max(1, round(image.height * (share / aspect) ** 0.5)))
    left, top = dice.integers(image.width - width + 1), dice.integers(image.height - height + 1)
    image = image.crop((left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if dice.random() < 0.5 else image


# -- stages 1 and 2: rows of tokens with a picture each ------------------------------------------------------

class PictureRows(data.Rows):
    """Rows that hold one picture each; `images` gives those of some rows as a tensor."""

    def __init__(self, examples: Sequence[data.Example], seq_len: int, pad: int, seed: int, images: Callable):
        tokens = np.full((len(examples), seq_len), pad, np.int32)
        labels = np.full((len(examples), seq_len), data.IGNORE, np.int32)
        for row, e in enumerate(examples):
            tokens[row, :len(e.tokens)], labels[row, :len(e.labels)] = e.tokens, e.labels
        super().__init__(tokens, labels, None, seed)
        self.images = images

    def batch(self, step: int, size: int) -> tuple:
        at = [self._row(i) for i in range(step * size, (step + 1) * size)]
        return (*super().batch(step, size), self.images(at))


def alt_example(caption: str, slots: int, tokenizer: data.Tokenizer, system: str = "", limit: int = 32) -> data.Example:
    """Stage 1: <s>, the picture, the caption in lower case, a newline; no question and no </s>. As published:
    without punctuation, 50 words and 32 tokens at most, and no `system` prompt in front."""
    caption = " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:50])
    ids = tokenizer.encode(caption + "\n")[:limit]
    before = [tokenizer.bos] + (tokenizer.encode(system) if system else []) + [model.IMAGE_SLOT] * slots
    return data.Example(before + ids, [data.IGNORE] * len(before) + ids)


def described(caption: str, instruction: str, slots: int, template: str, tokenizer: data.Tokenizer,
              seq_len: int) -> data.Example:
    """Stage 2: instruction about the picture, description. What is too long loses words, but not its end."""
    turns = [data.Turn("user", instruction, slots=slots), data.Turn("assistant", caption)]
    example = data.render(data.Conversation(turns), template, tokenizer)
    end = data.get_template(template).end
    keep = len(tokenizer.encode(end, continuation=True)) if end else 1
    over = max(0, len(example.tokens) - seq_len)
    return data.Example(*(part[:len(part) - keep - over] + part[-keep:] for part in example))


def frozen_images(net: vision.MiniGPT4, pictures: Sequence, machine: train_sft.Machine) -> Callable:
    """Numbers of pictures (files, or arrays) -> what the frozen encoder makes of them, (n, Q, C) on the CPU.

    Computed once when that fits into 2 GB, since the encoder never changes; else pixels, in every step."""
    def pixels(at: Sequence[int]) -> torch.Tensor:
        opened = [p if isinstance(p, np.ndarray) else vision.open_image(p) for p in (pictures[i] for i in at)]
        return torch.stack([vision.preprocess(p, net.vit.config.image_size) for p in opened])

    size = len(pictures) * net.n_queries * net.llama_proj.in_features * 4
    if size > 2e9:
        print(f"features of {len(pictures)} pictures would take {size / 1e9:.1f} GB: computed in every step")
        return pixels
    done = []
    for at in tqdm(range(0, len(pictures), 64), desc="pictures through the frozen encoder", leave=False):
        with torch.no_grad(), machine.autocast():
            part = net.features(pixels(range(at, min(len(pictures), at + 64))).to(machine.device))
            done.append(part.float().cpu())
    features = torch.cat(done)
    return lambda at: features[list(at)]


def look(net: vision.MiniGPT4, pictures: Sequence, machine: train_sft.Machine) -> torch.Tensor:
    return frozen_images(net, pictures, machine)(range(len(pictures)))


def ask(net: vision.MiniGPT4, job: "Job", questions: Sequence, features: Optional[torch.Tensor],
        limit: int = 64) -> tuple[list[str], list[bool]]:
    """Replies to one question about each picture, and whether they ended. A question is a text, or turns."""
    slots, conversations = net.n_queries if features is not None else 0, []
    for q in questions:
        turns = [data.Turn("user", q)] if isinstance(q, str) else list(q)
        conversations.append(data.Conversation([turns[0]._replace(slots=slots), *turns[1:]]))
    images = None if features is None else [f[None].to(net.llama_proj.weight.device) for f in features]
    return data.chat(net, job.tokenizer, job.template, conversations, limit, images=images)


# -- curation ------------------------------------------------------------------------------------------------

APOLOGY = re.compile(r"(I'm|I am) sorry[^.!?]*[.!?]|I apologi[sz]e[^.!?]*[.!?]", re.I)


def curate(job: "Job", net: vision.MiniGPT4, material: "Material") -> None:
    """Section 3.2 of the paper. Writes the descriptions that are left into curated/, and a report."""
    album = material.pool
    if material.mend is list:
        print("no --teacher: a description is kept as it is when it names the rarest word of the caption")
    features = look(net, [c.path for c in album], job.machine)
    said, _ = ask(net, job, [REQUEST] * len(album), features, 96)
    short = [i for i, text in enumerate(said) if len(job.tokenizer.encode(text)) < material.shortest]
    again = [[data.Turn("user", REQUEST), data.Turn("assistant", said[i]), data.Turn("user", "Continue")]
             for i in short]
    if short:
        more, _ = ask(net, job, again, features[short], 96)
        for i, text in zip(short, more):
            said[i] = f"{said[i]} {text}".strip()
    report, kept = Counter(asked=len(album), continued=len(short)), []
    for i, (mended, before) in enumerate(zip(material.mend(said), said)):
        text = APOLOGY.sub("", mended or "").strip()
        if "incomplete" in text.lower() or len(text) < 5:
            why = "dropped: nothing could be saved"
        elif not material.true(i, text):
            why = "dropped: not true of the picture"
        else:
            why = "kept as it was" if text == before else "repaired and kept"
            if job.cfg.review:
                print(f"\n{album[i].path}\n{text}")
                try:
                    answer = input("[Enter] keep  [d] drop  or type a better text: ").strip()
                except EOFError:
                    raise Problem("--review asks you about every description, but there is nobody to ask") from None
                text, why = answer or text, "repaired and kept" if answer else why
                why = "dropped: by you" if answer.lower() == "d" else why
        report[why] += 1
        if "kept" in why:
            kept.append(dict(image=str(album[i].path.resolve()), caption=text, before=before))
    print("curation: " + "; ".join(f"{what}: {n}" for what, n in report.items()))
    out = Path(job.cfg.out) / "curated"
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "filter_cap.json").write_text(json.dumps(dict(annotations=kept), indent=1, ensure_ascii=False))


def mender(spec: str) -> Callable:
    """A teacher, who does not see the pictures: texts -> repaired texts, None where there is none."""
    ask = teacher.teacher(spec, temperature=0.7, max_new_tokens=200)

    def mend(texts: Sequence[str]) -> list[Optional[str]]:
        replies = ask([data.Conversation([data.Turn("user", text)], system=REPAIR, extra=dict(repair=text))
                       for text in texts])
        return [reply and reply.text for reply in replies]
    return mend


# -- the stages ----------------------------------------------------------------------------------------------

def recipe_of(cfg: VLMConfig) -> str:
    """Photos when all is trained here; a given encoder comes with a language model that knows words, and stays as it is."""
    return cfg.recipe or ("photos" if cfg.images and not cfg.vision else "toy")


def stage_config(cfg: VLMConfig, stage: str) -> train_sft.SFTConfig:
    """The recipe's numbers for a stage, with what the command line says instead."""
    recipe = RECIPES[recipe_of(cfg)]
    if stage not in recipe:
        raise Problem(f"there is no published stage {stage}; give --vision=FOLDER with a ViT and a Q-Former")
    numbers = dict(recipe[stage])
    if cfg.fast:
        numbers["steps"] = max(20, numbers["steps"] // 10)
    numbers.update({k: getattr(cfg, k) for k in ("steps", "batch_size", "learning_rate") if getattr(cfg, k)})
    same = ("out", "micro_batch", "checkpointing", "dtype", "device", "seed", "save_minutes", "resume")
    return train_sft.SFTConfig(**numbers, **{k: getattr(cfg, k) for k in same})


@dataclass
class Job:
    """What the stages share: the command line, the machine, and the language model that is given eyes."""
    cfg: VLMConfig
    machine: train_sft.Machine
    llama: model.LLaMA
    tokenizer: data.Tokenizer
    template: str
    folder: Path  # of the language model


def open_job(cfg: VLMConfig, machine: train_sft.Machine) -> Job:
    llama, path, meta = model.load(cfg.init)
    template = {"vicuna_v0": "minigpt4"}.get(meta["template"], meta["template"])  # as published
    return Job(cfg, machine, llama, data.Tokenizer(path), template, model.find(cfg.init))


def read_captions(job: Job, album: Sequence[Captioned]) -> Job:
    """A small language model does not know the words of your captions, as LLaMA would: first it reads them, without the
    pictures, told by their rarest words. Then it is frozen like any other."""
    cfg, path = job.cfg, Path(job.cfg.out) / "data" / "captions.json"
    said, _ = caption_symbols(album, 4)
    rng = random.Random(cfg.seed)
    told = [f"<Img>{' '.join(w for w in words if w != NOTHING)}</Img> {rng.choice((REQUEST, *INSTRUCTIONS))}"
            for words in said]
    data.save_conversations((data.Conversation([data.Turn("user", text), data.Turn("assistant", c.caption)])
                             for text, c in zip(told, album)), path)
    train_sft.fine_tune(stage_config(cfg, "words"), "words", job.machine, path, cfg.init)
    return open_job(replace(cfg, init=str(Path(cfg.out) / "words")), job.machine)


def train_encoder(job: Job, album: Sequence[Captioned]) -> Path:
    """Stage 0, on toy scenes when there is no album. Returns the folder with ViT and Q-Former."""
    cfg, (vit, qformer) = job.cfg, vision.PRESETS["photos" if album else "toy"]
    vit, qformer = vision.ViTConfig(**vit), vision.QFormerConfig(**qformer)
    if album:
        rows = Photos(album, qformer.n_queries, cfg.seed, vit.image_size)
    else:
        rows = Scenes(cfg.seed, vit.image_size)
    torch.manual_seed(cfg.seed)
    net = Sight(SightConfig(vit, qformer, rows.symbols))
    sft = replace(stage_config(cfg, "0"), seq_len=1 + qformer.n_queries)
    source = text_digest("\n".join(c.caption for c in album)) if album else "toy pictures"
    train_sft.run_stage(sft, "vision", job.machine, rows, job.tokenizer, job.template, source, network=net)
    return Path(cfg.out) / "vision"


def give_eyes(job: Job, encoder: Path) -> tuple[vision.MiniGPT4, dict]:
    """A MiniGPT-4 whose projection knows nothing yet, and what it was put together from."""
    vit, qformer, _ = vision.load_encoder(encoder)
    torch.manual_seed(job.cfg.seed)
    net = vision.MiniGPT4(job.llama, vit, qformer).to(job.machine.device)
    parts = dict(llama=job.folder, vision=model.find(encoder))
    return net, {name: str(path) for name, path in parts.items()} | {
        f"{name}_crc": model.fingerprint(path) for name, path in parts.items()}


def project(job: Job, stage: str, net: vision.MiniGPT4, beside: dict, album: Sequence[Captioned], name: str,
            parent: str = "") -> None:
    """Stage 1 or 2, into the folder `name`. Stage 2 is left out, and says so, with less than one batch."""
    sft, rng = stage_config(job.cfg, stage), random.Random(job.cfg.seed)
    if stage == "2" and len(album) < sft.batch_size:
        print(f"{name}: stage 2 is left out: {len(album)} descriptions are fewer than a batch of "
              f"{sft.batch_size}; train stage 1 for longer, on more pictures, or give --teacher")
        return
    recipe, system = recipe_of(job.cfg), ""
    if stage == "1" and recipe != "published":
        # Deviations, for a language model of a million parameters. From zero: what random weights see is junk that
        # training never takes away. Behind the system prompt: vectors that were learned with nothing in front of them
        # cannot be told from a crowd of words. And photos are learned as answers (as LLaVA's projection is): so small
        # a model has seen their words in chats alone.
        system = data.get_template(job.template).system
        for w in net.llama_proj.parameters():
            torch.nn.init.zeros_(w)
    if stage == "1" and recipe != "photos":
        examples = [alt_example(c.caption, net.n_queries, job.tokenizer, system) for c in album]
    else:
        examples = [described(c.caption, rng.choice(INSTRUCTIONS), net.n_queries, job.template, job.tokenizer,
                              sft.seq_len) for c in album]
    sft = replace(sft, seq_len=max(len(e.tokens) for e in examples))
    images = frozen_images(net, [c.path for c in album], job.machine)
    rows = PictureRows(examples, sft.seq_len, job.tokenizer.eos, job.cfg.seed, images)
    source = text_digest("\n".join(c.caption for c in album))
    train_sft.run_stage(sft, name, job.machine, rows, job.tokenizer, job.template, source, network=net,
                        beside=beside, parent=parent)


def copied(net: vision.MiniGPT4) -> dict:
    return {name: w.clone() for name, w in net.llama_proj.state_dict().items()}


class Material(NamedTuple):
    """What the stages work on: toy pictures, or somebody's."""
    learn: Sequence[Captioned]  # for stage 1; the encoder may learn from them, too
    pool: Sequence[Captioned]  # to be described and curated
    mend: Callable  # the teacher: texts -> repaired texts
    true: Callable  # (number in the pool, text) -> may it stay?
    shortest: int  # tokens of a description; a shorter one is continued
    table: Callable  # (the model, the projection after stage 1) -> figures


def chain(job: Job) -> dict:
    """All stages, or the one asked for."""
    cfg, out = job.cfg, Path(job.cfg.out)
    material = (photo_material if cfg.images else toy_material)(job)
    encoder = Path(cfg.vision) if cfg.vision else train_encoder(job, material.learn if cfg.images else ())
    if cfg.stage == "0":
        return dict(folder=str(encoder))
    if recipe_of(cfg) == "photos":
        job = read_captions(job, material.learn)
    net, beside = give_eyes(job, encoder)
    descriptions = out / "curated"
    if cfg.stage == "2" and cfg.images:  # your own descriptions: nothing to curate
        model.load(out / "align", network=net)
        descriptions = Path(cfg.images)
    else:
        project(job, "1", net, beside, material.learn, "align")
        if cfg.stage == "1":
            return dict(folder=str(out / "align"))
        if cfg.stage == "curate" or cfg.resume == "never" or not (descriptions / "filter_cap.json").exists():
            curate(job, net.eval(), material)
        if cfg.stage == "curate":
            return dict(folder=str(descriptions))
    aligned = copied(net)
    project(job, "2", net, beside, load_album(descriptions, Counter()), "minigpt4", str(out / "align"))
    return dict(folder=str(out / "minigpt4")) if job.machine.sharded else material.table(net.eval(), aligned)


# -- the toy chain, and what it must be compared with --------------------------------------------------------

class Exam(NamedTuple):
    """Pictures with a question each."""
    scenes: list
    pictures: list
    questions: list  # toy.Question


SPLITS = dict(scenes="(a) unseen scenes", pairs="(b) unseen color x shape",
              minimal="minimal pairs, both right")


def exam(split: str, n: int, seed: int = 1) -> Exam:
    """The same for everybody; in "pairs" the question is about an object whose pair was never met. In
    "minimal" they come in twos: the same scene on the same ground, but for one colour or size."""
    rng, e = random.Random(f"pictures {split} {seed}"), Exam([], [], [])
    kinds = [k for k in toy.SCENE_KINDS if k != "describe"]
    while len(e.scenes) < n:
        if split == "minimal":
            pair = toy.minimal_pair(rng)
            scenes = [sorted(toy.found("objects", item.told), key=lambda o: toy.PLACES.index(o.place))
                      for item in pair]
            if all(len(scene) == 2 for scene in scenes):  # told in words that can be read back
                ground = rng.random()
                e.scenes.extend(scenes)
                e.pictures.extend(toy.draw(scene, random.Random(ground)) for scene in scenes)
                e.questions.extend(item.question for item in pair)
            continue
        scene = toy.pick_scene(rng, split)
        about = next((o for o in scene if (o.color, o.shape) in toy.HELD_PAIRS), None)
        q = toy.ask_scene(rng.choice(kinds), scene, rng, about=about)
        if q:
            e.scenes.append(scene)
            e.questions.append(q)
    e.pictures.extend(toy.draw(s, rng) for s in e.scenes[len(e.pictures):])
    return e


def exact(scene: toy.Scene, reply: str) -> bool:
    return toy.found("objects", reply) == set(scene)


def toy_material(job: Job) -> Material:
    cfg, sizes, out = job.cfg, FAST if job.cfg.fast else TOY, Path(job.cfg.out)
    for name, text in (("alt", toy.alt_text), ("curate", lambda scene, rng: toy.caption(scene))):
        write_toy_album(out / "data" / name, sizes[name], f"{name} {cfg.seed}", text)
    alt, pool = (load_album(out / "data" / name, Counter()) for name in ("alt", "curate"))
    truth = json.loads((out / "data" / "curate" / "scenes.json").read_text())
    scenes = [tuple(toy.Object(*o) for o in scene) for scene in truth]
    return Material(alt, pool, mender(cfg.teacher or "oracle"), lambda i, text: exact(scenes[i], text), 8,
                    lambda net, aligned: table(job, net, aligned, alt, sizes["questions"]))


def random_eyes(job: Job, net: vision.MiniGPT4, alt: Sequence[Captioned]) -> vision.MiniGPT4:
    """Control: a frozen encoder that has learned nothing, and a linear layer trained as long as the other."""
    torch.manual_seed(job.cfg.seed + 1)
    blind = vision.MiniGPT4(job.llama, vision.ViT(net.vit.config), vision.QFormer(net.qformer.config))
    blind, out = blind.to(job.machine.device), Path(job.cfg.out)
    beside = dict(llama=str(job.folder), vision="random")
    project(job, "1", blind, beside, alt, "random-align")
    project(job, "2", blind, beside, load_album(out / "curated", Counter()), "random-minigpt4",
            str(out / "random-align"))
    return blind.eval()


def table(job: Job, net: vision.MiniGPT4, aligned: dict, alt: Sequence[Captioned], n: int) -> dict:
    """Captions and zero-shot questions on held-out splits, beside the controls; failures, hallucinations."""
    blind, rng, figures, said, out = random_eyes(job, net, alt), random.Random(0), {}, {}, Path(job.cfg.out)
    untrained, final = blind.llama_proj.state_dict(), copied(net)
    exams = {split: exam(split, n) for split in SPLITS if split != "minimal" or job.cfg.full}
    for split, e in exams.items():
        seen, asked = look(net, e.pictures, job.machine), [q.text for q in e.questions]
        wishes, told = [INSTRUCTIONS[i % 4] for i in range(len(asked))], [toy.tell(s, rng) for s in e.scenes]
        in_words = [f"{t} {q}" for t, q in zip(told, asked)], [t + " Describe the scene." for t in told]
        players = {  # name: who, with which projection, questions, requests for a description, what is seen
            "MiniGPT-4": (net, final, asked, wishes, seen),
            "in words": (net, final, *in_words, None),
            "no picture": (net, final, asked, wishes, None),
            "shuffled": (net, final, asked, wishes, seen.roll(1, 0)),
            "random eyes": (blind, untrained, asked, wishes, look(blind, e.pictures, job.machine)),
            "stage 1": (net, aligned, asked, wishes, seen)}
        for name, (who, weights, questions, requests, features) in players.items():
            who.llama_proj.load_state_dict(weights)
            said[split, name] = captions, _ = ask(who, job, requests, features)
            answers, _ = ask(who, job, questions, features)
            for what, right in (("captions", list(map(exact, e.scenes, captions))),
                                ("questions", [toy.grade(q, a) == 1 for q, a in zip(e.questions, answers)])):
                if split == "minimal":  # they come in twos
                    right = [a and b for a, b in zip(right[::2], right[1::2])]
                figures[split, what, name] = sum(right) / len(right)
    print(f"\n{'right, %':<40}" + "".join(f"{name:>13}" for name in players))
    for split, what in dict.fromkeys(key[:2] for key in figures):
        row = [figures[split, what, name] for name in players]
        print(f"{SPLITS[split] + ', ' + what:<40}" + "".join(f"{100 * x:>13.0f}" for x in row)
              + f"   picture / words: {100 * row[0] / max(0.01, row[1]):.0f}%")
    figures |= faults(job, net, exams["scenes"], said, aligned, final)
    show(exams["scenes"], said["scenes", "MiniGPT-4"][0], out / "seen.png")
    minutes = (time.time() - train_sft.STARTED) / 60
    written = {" ".join(key): value for key, value in figures.items()}
    (out / "seeing.json").write_text(json.dumps(dict(written, seed=job.cfg.seed, minutes=minutes), indent=1))
    print(f"\n{minutes:.1f} minutes in all; four pictures with their descriptions: {out / 'seen.png'}. Now "
          f"type:\n  python sample.py --ckpt={out}/minigpt4 --image={out}/data/curate/image/0.png")
    return figures


def faults(job: Job, net: vision.MiniGPT4, e: Exam, said: dict, aligned: dict, final: dict) -> dict:
    """Stage 1 alone against stage 2: how descriptions fail, and what is seen that is not there."""
    figures, rng, n = {}, random.Random(3), len(e.scenes)
    yes_no = [(i, q) for i, scene in enumerate(e.scenes) for q in judge.pope_questions(scene, rng)]
    seen, questions = look(net, e.pictures, job.machine)[[i for i, _ in yes_no]], [q for _, q in yes_no]
    for name, weights in (("stage 1", aligned), ("MiniGPT-4", final)):
        captions, ended = said["scenes", name]
        why = Counter(judge.failure(text, end) or ("" if exact(s, text) else "is wrong")
                      for s, text, end in zip(e.scenes, captions, ended))
        net.llama_proj.load_state_dict(weights)
        answers, _ = ask(net, job, [q.text for q in questions], seen)
        chair = judge.chair(captions, [{(o.color, o.shape) for o in s} for s in e.scenes])
        pope = judge.pope(questions, answers)
        rows = {kind: why[kind] / n for kind in ("empty", "repeats", "does not stop", "fragment", "is wrong")}
        rows |= {"fails in one of these ways": 1 - why[""] / n,
                 "things named that are not there": chair["instances"],
                 "descriptions with such a thing": chair["sentences"],
                 "yes/no right (chance 50)": pope["accuracy"], "yes said (true of 50)": pope["yes"]}
        figures |= {("faults", title, name): share for title, share in rows.items()}
    print(f"\n{'of descriptions and answers, %':<40}{'stage 1':>13}{'MiniGPT-4':>13}")
    for title in rows:
        row = [figures["faults", title, name] for name in ("stage 1", "MiniGPT-4")]
        print(f"{title:<40}" + "".join(f"{100 * x:>13.0f}" for x in row))
    return figures


def show(e: Exam, replies: Sequence[str], path: Path) -> None:
    """Four pictures with what is said of them; a wrong one among them, if there is any."""
    right = [i for i, (s, r) in enumerate(zip(e.scenes, replies)) if exact(s, r)]
    wrong = [i for i in range(len(replies)) if i not in right]
    chosen = (right[:4 - bool(wrong)] + wrong)[:4]
    sheet = Image.new("RGB", (4 * 260, 330), "white")
    pen = ImageDraw.Draw(sheet)
    for column, i in enumerate(chosen):
        picture = Image.fromarray(e.pictures[i]).resize((240, 240), Image.Resampling.NEAREST)
        sheet.paste(picture, (260 * column + 10, 10))
        lines = textwrap.wrap(replies[i] + " [wrong]" * (i not in right), 32)
        color = "black" if i in right else "firebrick"
        pen.multiline_text((260 * column + 10, 256), "\n".join(lines[:4]), fill=color,
                           font=ImageFont.load_default(15))
    sheet.save(path)


# -- your own pictures ---------------------------------------------------------------------------------------

def photo_material(job: Job) -> Material:
    """A folder of pictures with captions; a tenth of it, by a hash of the name, is held out."""
    cfg, report = job.cfg, Counter()
    album = load_album(cfg.images, report)
    held = [c for c in album if text_digest(c.path.name) < "1999"]
    learn = [c for c in album if text_digest(c.path.name) >= "1999"]
    print(f"{cfg.images}: {len(album)} pictures with captions, {len(held)} of them held out"
          + "".join(f"; {why}: {k}" for why, k in report.items() if k))
    pool = random.Random(cfg.seed).sample(learn, min(len(learn), 5000))
    words, _ = caption_symbols(pool, 1)
    return Material(learn, pool, mender(cfg.teacher) if cfg.teacher else list,
                    lambda i, text: words[i][0] in text.lower(), 1,
                    lambda net, aligned: photo_table(job, net, learn, held))


def photo_table(job: Job, net: vision.MiniGPT4, learn: Sequence, held: Sequence[Captioned]) -> dict:
    """How often a description of a held-out picture names its caption's rarest word before another such."""
    if not held:
        return {}
    names = {row[0] for row in caption_symbols(learn, 1)[0]}
    truth = [next((w for w in re.findall(r"\w+", c.caption.lower()) if w in names), "") for c in held]
    features, figures = look(net, [c.path for c in held], job.machine), {}
    others = features[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))]  # not the next: of its kind
    for name, seen in (("MiniGPT-4", features), ("shuffled", others)):
        replies, _ = ask(net, job, [INSTRUCTIONS[0]] * len(held), seen)
        named = [[w for w in re.findall(r"\w+", r.lower()) if w in names][:1] for r in replies]
        figures[name] = sum(row == [t] for row, t in zip(named, truth)) / len(held)
        print(f"{name}: names the right thing in {100 * figures[name]:.1f}% of {len(held)} held-out pictures")
    return figures


def main(cfg: VLMConfig) -> dict:
    if recipe_of(cfg) == "toy" and not cfg.images and cfg.dtype == "auto":
        cfg = replace(cfg, dtype="float32")  # as the toy language model
    machine = train_sft.choose_machine(train_sft.SFTConfig(dtype=cfg.dtype, device=cfg.device))
    print(describe(cfg))
    if machine.sharded and not (cfg.images and cfg.vision and cfg.stage in ("1", "2")):
        raise Problem("torchrun is for stage 1 or 2 on your own pictures (--images, --vision, --stage=1 or "
                      "2); the rest writes files, and is for one process")
    job = open_job(cfg, machine)
    try:
        return chain(job)
    except train_sft.Stopped as stopped:
        script = " ".join(sys.argv) if sys.argv[0].endswith(".py") else "train_vlm.py"
        print(f"\n{stopped}. To go on: python {script}")
        raise KeyboardInterrupt from None
    finally:
        if machine.sharded:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main, VLMConfig, PRESETS)
