"""Ablations for toy/claims.py: train a model of the toy chain with one thing changed, and evaluate
it.

The toy chain is base, then alpaca and vicuna (both fine-tuned from base), then MiniGPT-4. Each
thing that can change is an argument: the size, initialization and documents of a base model; the
data, loss, sequence length and trainable weights of a fine-tuned one; the architecture of a
MiniGPT-4. The optimizer, learning rate and LoRA rank are passed on to train_sft.py.
"""

import functools
import json
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import data
import judge
import model
import train_sft
import train_vlm
import vision
from tools import checkpoint, evaluate, teacher
from tools.machine import Machine, train_flops
from toy import exam, world

TOY = train_sft.TOY  # steps and data sizes of the toy chain
STEP_TOKENS = 2048  # per step, at any sequence length
BASE_SEQ_LEN = 256  # of all base models, so that their FLOPs are comparable
# Shapes of the language model by their number of parameters. The first is the toy chain's.
LLAMAS = {"1.1M": model.PRESETS["toy"],
          "0.3M": dict(model.PRESETS["toy"], dim=64, hidden_dim=192),
          "0.1M": dict(model.PRESETS["toy"], dim=32, hidden_dim=96)}


def chain_folder(run: Path, seed: int) -> Path:
    """The folder of a seed's toy chain: run/seed0, run/seed1, ... For seed 0, `run` itself if there
    is no run/seed0."""
    folder = run / f"seed{seed}"
    if seed == 0 and not (folder / "base").exists():
        return run
    return folder


class Lab:
    """All models of one seed. Those of the toy chain are loaded from `run` if they are there. The
    others are trained in `out`: finished ones are loaded, and interrupted ones resume."""

    def __init__(self, out: Path, run: Path, seed: int, fast: bool, machine: Machine):
        self.out = out / f"seed{seed}"
        self.run = chain_folder(run, seed)
        self.seed, self.fast, self.machine = seed, fast, machine
        self.sizes = train_sft.FAST if fast else TOY

    def scaled(self, n: int) -> int:
        """n steps or records, scaled down with --fast by the same factor as Vicuna's steps: to a
        tenth."""
        return max(1, n * self.sizes["vicuna"] // TOY["vicuna"])

    # -- the toy chain ----------------------------------------------------------------------------

    def in_run(self, *names: str) -> bool:
        """Whether the run has these models, and the base, whose tokenizer they share."""
        return all((self.run / name / "latest").exists() for name in ("base", *names))

    def load(self, folder: str) -> torch.nn.Module:
        net, _, _ = checkpoint.load(folder)
        return net

    def chain(self, name: str) -> str:
        """The folder of base, alpaca or vicuna. Trains it first if needed."""
        if self.in_run(name):
            return str(self.run / name)
        steps = TOY[name]
        if name == "base":
            self.pretrain("base", steps)
        elif name == "alpaca":
            self.fine_tune("alpaca", self.files["alpaca"], steps, template="alpaca", seq_len=256)
        else:  # vicuna also starts from base, not alpaca
            self.fine_tune("vicuna", self.files["vicuna"], steps)
        return str(self.out / name)

    def base(self, size: str, steps: int = TOY["base"]) -> str:
        """The folder of a base of this size, pre-trained for `steps` steps. With --fast the run's
        own base is not reused: bases are compared, so all must train for a tenth of the steps."""
        if size == "1.1M" and steps == TOY["base"] and not self.fast:
            return self.chain("base")
        self.pretrain(f"base-{size}-{steps}", steps, size)
        return str(self.out / f"base-{size}-{steps}")

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """The chain's training files, by the name of the model."""
        return world.write_files(self.out / "data", self.sizes, self.seed)

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """The tokenizer of all models."""
        if self.in_run():
            return data.find_tokenizer(self.run / "base")
        if (self.out / "base" / "latest").exists():
            return data.find_tokenizer(self.out / "base")
        return exam.toy_tokenizer(self.files, 1024, self.out / "data" / "toy.model")

    # -- data with one thing changed --------------------------------------------------------------

    def documents(self, times_told: int = 3) -> tuple[list[str], list[str]]:
        """Documents to train on, and the tenth that is held out. Each tells a scene `times_told`
        times."""
        rng = random.Random(self.seed)
        texts = [world.document(rng, times_told) for _ in range(self.sizes["documents"])]
        return train_sft.hold_out_a_tenth(texts)

    def conversations(self, single_turn: bool = False, short: bool = False) -> Path:
        """A file of conversations like the chain's, or single-turn, or with short answers."""
        rng, n = random.Random(self.seed), self.sizes["conversations"]
        records = [world.conversation(rng, single_turn, short) for _ in range(n)]
        name = "chats"
        if single_turn:
            name += "-single-turn"
        if short:
            name += "-short"
        return self.write(name, records)

    def noisy_conversations(self, clean: int, noisy: int) -> Path:
        """A file of conversations. In the last `noisy` of them, each reply is corrupted with
        probability 1/2 if there is anything to corrupt."""
        rng, noise = random.Random(self.seed), random.Random(self.seed + 1)
        records = [world.conversation(rng) for _ in range(clean + noisy)]
        for record in records[clean:]:
            for reply in record["conversations"][1::2]:
                if noise.random() < 0.5:
                    reply["value"] = corrupt(reply["value"], noise)
        return self.write(f"clean-{clean}-noisy-{noisy}", records)

    def write(self, name: str, records: list[dict]) -> Path:
        path = self.out / "data" / f"{name}.json"
        with data.atomic_write(path) as file:
            json.dump(records, file)
        return path

    # -- training with one thing changed ----------------------------------------------------------

    def config(self, steps: int, seq_len: int, optimizer: str = "muon",
               **settings) -> train_sft.SFTConfig:
        """The chain's settings, plus `settings`."""
        return train_sft.SFTConfig(
            out=str(self.out), seed=self.seed, steps=self.scaled(steps), seq_len=seq_len,
            batch_size=STEP_TOKENS // seq_len, optimizer=optimizer, **settings)

    def shape(self, size: str) -> model.LLaMAConfig:
        return model.LLaMAConfig(**LLAMAS[size], vocab_size=self.tokenizer.vocab_size)

    def pretrain(self, name: str, steps: int, size: str = "1.1M", retrieval_init: bool = True,
                 times_told: int = 3, **settings) -> model.LLaMA:
        """A base model, trained in the folder `name`."""
        cfg = self.config(steps, BASE_SEQ_LEN, **settings)
        texts, _ = self.documents(times_told)
        rows = train_sft.pack_documents(texts, self.tokenizer, cfg)
        torch.manual_seed(self.seed)
        net = model.LLaMA(self.shape(size), retrieval_init)
        return train_sft.run_stage(
            cfg, name, self.machine, rows, self.tokenizer, "plain", teacher.digest(texts),
            network=net, window=cfg.seq_len,
            extra_settings=dict(size=size, retrieval_init=retrieval_init))

    def fine_tune(self, name: str, file: Path, steps: int, base: str = "", from_scratch: str = "",
                  template: str = "vicuna_v1.1", seq_len: int = 512, loss_on: str = "replies",
                  head_only: bool = False, **settings) -> model.LLaMA:
        """Fine-tunes the chain's base, or the one in the folder `base`, or a randomly initialized
        model of size `from_scratch`. `loss_on` is "replies" or "everything". With `head_only`, only
        the output matrix is trained."""
        assert loss_on in ("replies", "everything")
        assert not (from_scratch and (base or head_only))
        cfg = self.config(steps, seq_len, **settings)
        rows = train_sft.conversation_rows(file, template, self.tokenizer, cfg)
        if loss_on == "everything":
            supervise_everything(rows)
        depends_on = dict(loss_on=loss_on, head_only=head_only)
        if from_scratch:
            start = dict(shape=LLAMAS[from_scratch])
        else:
            base = base or self.chain("base")
            start = dict(parent=base)
        if head_only:
            start = dict(network=load_trainable(base, head_only=True), window=cfg.seq_len)
            depends_on["base_crc"] = checkpoint.fingerprint(base)
        return train_sft.run_stage(
            cfg, name, self.machine, rows, self.tokenizer, template, checkpoint.digest(file),
            extra_settings=depends_on, **start)

    def train_vicuna(self, steps: int, base: str = "", single_turn: bool = False,
                     short: bool = False, **changed) -> model.LLaMA:
        """Vicuna after `steps` steps, with arguments of `conversations`, `fine_tune` or
        train_sft.py changed. Its folder is named after the changes, so that claims share models."""
        file = self.conversations(single_turn, short)
        name = f"{file.stem}-{steps}"
        if base and Path(base).name != "base":  # not the chain's
            name += f"-{Path(base).name}"
        for option, value in sorted(changed.items()):
            name += f"-{option}-{value}"
        return self.fine_tune(name, file, steps, base, **changed)

    def steps_of_equal_flops(self, size: str) -> int:
        """How many pre-training steps a model of this size gets for the FLOPs of the chain's base.
        """
        return round(TOY["base"] * self.step_flops("1.1M") / self.step_flops(size))

    def step_flops(self, size: str) -> float:
        """FLOPs of a step of pre-training."""
        return train_flops(self.shape(size), tokens=STEP_TOKENS, supervised=STEP_TOKENS,
                           seq_len=BASE_SEQ_LEN)

    # -- evaluation -------------------------------------------------------------------------------

    def examine(self, net, template: str = "vicuna_v1.1", rows: dict = exam.SHORT_ROWS,
                shots: str = "") -> dict:
        """The accuracy in each row of the exam, and their mean, "right"."""
        n = self.sizes["questions"]
        play = exam.model_player(net, self.tokenizer, template, shots)
        table, _ = exam.examine({"model": play}, rows, n)
        shares = {row: cells["model"] for row, cells in table.items()}
        right = sum(shares.values()) / len(shares)
        return dict(right=right, **shares, questions=n * len(shares))

    def shots(self) -> str:
        """Four solved examples for a base model."""
        rng = random.Random(self.seed)
        return exam.few_shot_examples([world.instruction(rng) for _ in range(4)])

    def held_out_loss(self, net) -> float:
        """Loss on documents that no base model was trained on, in nats per token."""
        _, texts = self.documents()
        rows = train_sft.pack_documents(texts, self.tokenizer, self.config(1, BASE_SEQ_LEN))
        total, count = train_sft.validate(net, rows, self.machine)
        return total / count

    def retrieve(self, net) -> dict:
        """Accuracy of in-context retrieval: given a document that describes a new scene once, then
        "The ring is", the true color must be the most likely. (Each color is one token.)"""
        n, rng = 2 * self.sizes["questions"], random.Random("retrieved")
        right = 0
        for _ in range(n):
            scene = pick_different(rng)
            o = rng.choice(scene)
            text = f"{world.tell_in_sentences(scene, rng)} The {o.shape} is"
            context = [self.tokenizer.bos, *self.tokenizer.encode(text)]
            candidates = [(context, self.tokenizer.encode(color)) for color in world.COLORS]
            best = int(evaluate.log_likelihoods(net, candidates).argmax())
            right += int(world.COLORS[best] == o.color)
        return dict(retrieved=right / n, questions=n)

    def rank_facts(self, net) -> dict:
        """Accuracy of ranking the towns after "NAME lives in" by likelihood: for people the
        fine-tuning data asks about ("asked"), and for others ("unasked")."""
        right = dict(asked=[], unasked=[])
        file = self.out / "data" / "facts.jsonl"
        world.write_facts(file)
        for item in evaluate.read_items(file)[0]:
            candidates = evaluate.make_rows(item, "", self.tokenizer)
            best = int(evaluate.scores(net, item, candidates).argmax())
            right[item.group].append(best == item.right)
        return dict(unasked=statistics.mean(right["unasked"]),
                    asked=statistics.mean(right["asked"]), questions=len(right["unasked"]))

    def judge_by_oracle(self, oracle: str, both_orders: bool) -> dict:
        """One of judge.py's oracles judges Vicuna, Alpaca, a noisy player and an always-right one.
        "agrees": the share of its verdicts that are true. "leans": among equally good pairs, how
        often the first answer wins minus how often it loses."""
        players = [self.chain("vicuna"), self.chain("alpaca"), "noisy", "oracle"]
        report = judge.main(judge.JudgeConfig(
            players=",".join(players), judge=oracle, swap=both_orders, seed=self.seed,
            out=str(self.out / "judge")))
        judged = [row for pair in report["pairs"] for row in pair["rows"]]
        agrees = [row["verdict"] == row["truth"] for row in judged]
        equal = [row["verdict"] for row in judged if row["truth"] == 0]
        first_wins, first_loses = equal.count(-1), equal.count(1)
        return dict(agrees=sum(agrees) / len(judged),
                    leans=(first_wins - first_loses) / len(equal), questions=len(equal))

    def judge_by_likelihood(self, net, split: str, kinds: Sequence[str]) -> dict:
        """Uses a small model to choose between a true and a corrupted answer. It cannot write a
        review, so it picks the one with the higher likelihood per token. Yes/no questions are
        skipped: `corrupt` cannot change their answers."""
        n, rng = self.sizes["questions"], random.Random(0)
        items = [item for item in world.test_set(split, 8 * n)  # about one in eight qualifies
                 if item.question.kind in kinds and "yesno" not in item.question.truth][:n]
        right = 0
        for item in items:
            turns = [data.Turn(role, text) for role, text in item.turns]
            prompt = data.render(data.Conversation(turns), "vicuna_v1.1", self.tokenizer).tokens
            answers = [item.question.full, corrupt(item.question.full, rng)]
            candidates = [(prompt, self.tokenizer.encode(answer)) for answer in answers]
            lengths = torch.tensor([len(answer) for _, answer in candidates])
            true, wrong = evaluate.log_likelihoods(net, candidates) / lengths
            right += int(true > wrong)
        return dict(agrees=right / len(items), questions=len(items))

    # -- MiniGPT-4 --------------------------------------------------------------------------------

    @functools.cached_property
    def vision_folder(self) -> Path:
        """The folder with the encoder, the projection after stage 1, and the curated descriptions:
        train_vlm.py's if it has all of them; otherwise they are made in `out`."""
        curated = Path("curated") / "filter_cap.json"
        if self.in_run("vicuna", "vision", "align") and (self.run / curated).exists():
            return self.run
        if not (self.out / curated).exists():  # up to curation: also trains encoder and stage 1
            train_vlm.main(train_vlm.VLMConfig(
                stage="curate", init=self.chain("vicuna"), out=str(self.out), seed=self.seed,
                fast=self.fast))
        return self.out

    def open_vlm(self, stage: str = "all", steps: int = 0) -> train_vlm.VLMRun:
        """Opens a MiniGPT-4 run. `steps` overrides the stage's recipe; 0 keeps it."""
        return train_vlm.open_run(train_vlm.VLMConfig(
            stage=stage, steps=steps, init=self.chain("vicuna"), out=str(self.out),
            seed=self.seed, fast=self.fast), self.machine)

    def build(self, vlm: train_vlm.VLMRun, architecture: type) -> tuple[vision.MiniGPT4, dict]:
        """A MiniGPT-4 with an untrained projection, and what it depends on."""
        vit, qformer = vision.load_encoder(self.vision_folder / "vision")
        torch.manual_seed(self.seed)
        net = architecture(vlm.llama, vit, qformer).to(self.machine.device)
        parts = dict(architecture=architecture.__name__,
                     llama_crc=checkpoint.fingerprint(vlm.folder),
                     vision_crc=checkpoint.fingerprint(self.vision_folder / "vision"))
        return net, parts

    def examine_architecture(self, name: str, architecture: type) -> dict:
        """Trains both stages with this architecture (or loads the run's MiniGPT-4, if that is the
        one), and evaluates it."""
        vlm = self.open_vlm()
        net, parts = self.build(vlm, architecture)
        in_run = self.vision_folder == self.run and self.in_run("minigpt4")
        if architecture is vision.MiniGPT4 and in_run and not self.fast:
            checkpoint.load(self.run / "minigpt4", network=net)
        else:
            alt = train_vlm.load_album(self.vision_folder / "data" / "alt")
            curated = train_vlm.load_album(self.vision_folder / "curated")
            train_vlm.train_projection(vlm, "1", net, parts, alt, f"{name}-1")
            train_vlm.train_projection(vlm, "2", net, parts, curated, f"{name}-2",
                                       parent=str(self.out / f"{name}-1"))
        return self.examine_vlm(vlm, net.eval())

    def examine_after_stage(self, stage: str, steps: int) -> dict:
        """Evaluates the model after stage 1 plus `steps` more steps of stage 1 or 2."""
        vlm = self.open_vlm(stage, self.scaled(steps))
        net, parts = self.build(vlm, vision.MiniGPT4)
        aligned = self.vision_folder / "align"
        checkpoint.load(aligned, network=net)
        if steps:
            folder = self.vision_folder / ("curated" if stage == "2" else "data/alt")
            train_vlm.train_projection(vlm, stage, net, parts, train_vlm.load_album(folder),
                                       f"stage-{stage}-{steps}", parent=str(aligned))
        return self.examine_vlm(vlm, net.eval())

    def examine_vlm(self, vlm: train_vlm.VLMRun, net: vision.MiniGPT4) -> dict:
        """On pictures of held-out scenes: the shares of exact descriptions, of right answers, and
        of descriptions that fail in any way, which includes being wrong."""
        def play(e, texts, _texts_with_scene):
            features = train_vlm.encode_images(net, e.pictures, vlm.machine)
            return train_vlm.ask(net, vlm, texts, features)

        n = 2 * self.sizes["questions"]
        table, said = exam.see_and_tell({"model": play}, n, ["scenes"])
        described, answered = (cells["model"] for cells in table.values())  # the only two rows
        descriptions, ended = said["scenes", "model"]
        scenes = exam.picture_exam("scenes", n).scenes
        fails = [bool(exam.failure(scene, text, done))
                 for scene, text, done in zip(scenes, descriptions, ended)]
        return dict(described=described, answered=answered, fails=sum(fails) / n, questions=n)


# -- helpers --------------------------------------------------------------------------------------

def pick_different(rng: random.Random) -> world.Scene:
    """A held-out scene of two objects that differ in shape and in color."""
    while True:
        a, b = world.pick_scene(rng, "scenes", 2)
        if a.shape != b.shape and a.color != b.color:
            return a, b


def supervise_everything(rows: data.Rows) -> None:
    """Puts the loss on every token except padding, in place, as in pre-training. (Nothing predicts
    the first token of a conversation: see model.shift_labels.)"""
    is_text = rows.segments >= 0
    rows.labels[is_text] = rows.tokens[is_text]


def load_trainable(folder: str, lora_rank: int = 0, head_only: bool = False) -> model.LLaMA:
    """Loads a checkpoint with only the adapters, only the output matrix, or everything trainable.
    """
    assert not (lora_rank and head_only)
    net, _, _ = checkpoint.load(folder)
    if lora_rank:
        model.add_lora(net, lora_rank)
    if head_only:
        net.requires_grad_(False)
        net.output.requires_grad_(True)
    return net


def trained_fraction(net: model.LLaMA) -> float:
    """Trained parameters, adapters included, as a fraction of the original model's."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return trained / model.count_parameters(net.config)


def corrupt(text: str, rng: random.Random) -> str:
    """Replaces the last size, color, shape, place, or number in digits with a different one. Text
    with none of these is unchanged. Never introduces a held-out pair of color and shape."""
    kinds = (world.SIZES, world.COLORS, world.SHAPES, world.PLACES)
    words = "|".join(word for kind in kinds for word in kind)
    found = list(re.finditer(rf"\b(?:{words})\b|\d+", text))
    if not found:
        return text
    last = found[-1]
    old = last.group()
    if old.isdigit():
        others = [str(int(old) + i) for i in (1, 2, 3)]
    else:
        kind = next(kind for kind in kinds if old in kind)
        others = [word for word in kind if word != old]
    wrong = [text[:last.start()] + word + text[last.end():] for word in others]
    return rng.choice([t for t in wrong if held_out_pairs(t) <= held_out_pairs(text)])


def held_out_pairs(text: str) -> set[tuple[str, str]]:
    """The held-out pairs whose color and shape are both in the text, even of different objects."""
    words = set(re.findall(r"\w+", text))
    return {pair for pair in world.HELD_PAIRS if words.issuperset(pair)}


# -- architectures --------------------------------------------------------------------------------

class ThreeLayers(vision.MiniGPT4):
    """Three linear layers between Q-Former and language model instead of one."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.llama_proj = ThreeLayerProjection(qformer.config.dim, llama.config.dim)


class ThreeLayerProjection(torch.nn.Sequential):
    """Three linear layers with GELU between them, and the attributes that MiniGPT4 reads from its
    single one."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(torch.nn.Linear(in_features, out_features), torch.nn.GELU(),
                         torch.nn.Linear(out_features, out_features), torch.nn.GELU(),
                         torch.nn.Linear(out_features, out_features))
        self.in_features = in_features

    @property
    def weight(self) -> torch.Tensor:
        return self[0].weight


class WithoutQFormer(vision.MiniGPT4):
    """The projection reads the output of the ViT (N, 1 + P, C): the class token comes first."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.n_queries = vit.pos_embed.shape[1]  # vectors per image
        self.llama_proj = torch.nn.Linear(vit.config.dim, llama.config.dim)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels)


class TunedQFormer(vision.MiniGPT4):
    """The Q-Former is trained as well. Only the ViT is frozen, so `features`, which are cached, are
    its output: (N, 1 + P, C)."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.qformer.requires_grad_(True)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images) if images.dim() == 4 else images  # pixels have 4 dims
        return super().encode(self.qformer(features))


class RandomEncoder(vision.MiniGPT4):
    """ViT and Q-Former have random weights, so their output says little about a picture."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vision.ViT(vit.config), vision.QFormer(qformer.config))
