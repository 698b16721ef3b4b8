"""A lab for toy/claims.py: it trains a model of the toy chain with one ingredient changed, and
measures it.

What may be changed is an argument here: the size, the initialization and the documents of a base
model; the data, the loss, the row length and the trained weights of a fine-tuning; the architecture
of a MiniGPT-4. Other settings of train_sft.py are passed on.
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

TOY = train_sft.TOY  # steps of the toy chain
STEP_TOKENS = 2048  # in a step, whatever the row length
# Sizes of the language model by their number of parameters. The first is the toy chain's.
SIZES = {"1.1M": model.PRESETS["toy"],
         "0.3M": dict(model.PRESETS["toy"], dim=64, hidden_dim=192),
         "0.1M": dict(model.PRESETS["toy"], dim=32, hidden_dim=96)}


def chain_folder(run: Path, seed: int) -> Path:
    """Where the toy chain of a seed is: in `run` itself (seed 0), or in run/seed1 and so on."""
    own = run / f"seed{seed}"
    return own if seed or own.exists() else run


class Lab:
    """The models of one seed. Those of the toy chain are taken from `run` if they exist there. All
    others are trained in a folder of `out`; a finished one is loaded, an interrupted one resumes.
    """

    def __init__(self, out: Path, run: Path, seed: int, fast: bool, machine: Machine):
        self.out, self.run, self.seed = out / f"seed{seed}", chain_folder(run, seed), seed
        self.fast, self.machine = fast, machine
        self.sizes = train_sft.FAST if fast else TOY

    def scaled(self, n: int) -> int:
        """A number of steps or records: n, or with --fast about a tenth of it."""
        return max(1, n * self.sizes["vicuna"] // TOY["vicuna"])

    # -- the toy chain ----------------------------------------------------------------------------

    def is_taken(self, *names: str) -> bool:
        """Does the run have these models, and the base whose tokenizer they share?"""
        return all((self.run / name / "latest").exists() for name in ("base", *names))

    def chain(self, name: str) -> str:
        """The folder of base, alpaca or vicuna, as train_sft.py trains them."""
        if self.is_taken(name):
            return str(self.run / name)
        if name == "base":
            self.pretrain("base", TOY["base"])
        elif name == "alpaca":
            self.fine_tune("alpaca", self.files["alpaca"], TOY["alpaca"], template="alpaca",
                           seq_len=256)
        else:
            self.fine_tune("vicuna", self.files["vicuna"], TOY["vicuna"])
        return str(self.out / name)

    def base(self, size: str, steps: int = TOY["base"]) -> str:
        """The folder of a base of this size, pre-trained for so many steps."""
        if size == "1.1M" and steps == TOY["base"]:
            return self.chain("base")
        self.pretrain(f"base-{size}-{steps}", steps, size)
        return str(self.out / f"base-{size}-{steps}")

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """The training files of the chain: base, alpaca, vicuna."""
        return world.write_files(self.out / "data", self.sizes, self.seed)

    @functools.cached_property
    def tokenizer(self) -> data.Tokenizer:
        """The chain's."""
        if self.is_taken():
            return data.find_tokenizer(self.run / "base")
        if (self.out / "base" / "latest").exists():
            return data.find_tokenizer(self.out / "base")
        return exam.toy_tokenizer(self.files, 1024, self.out / "data" / "toy.model")

    # -- data with one ingredient changed ---------------------------------------------------------

    def documents(self, times_told: int = 3) -> tuple[list[str], list[str]]:
        """Documents to train on, and the tenth that is held out. A scene is told so many times."""
        rng = random.Random(self.seed)
        texts = [world.document(rng, times_told) for _ in range(self.sizes["documents"])]
        return train_sft.hold_out_a_tenth(texts)

    def conversations(self, one_round: bool = False, short: bool = False) -> Path:
        """A file of conversations as the chain's, or of a single round, or with terse answers."""
        rng, n = random.Random(self.seed), self.sizes["conversations"]
        records = [world.conversation(rng, one_round, short) for _ in range(n)]
        name = "chats"
        if one_round:
            name += "-of-one-round"
        if short:
            name += "-short"
        return self.write(name, records)

    def noisy_conversations(self, clean: int, noisy: int) -> Path:
        """A file of conversations. In the last `noisy` of them, half of the replies are wrong."""
        rng, errors = random.Random(self.seed), random.Random(self.seed + 1)
        records = [world.conversation(rng) for _ in range(clean + noisy)]
        for record in records[clean:]:
            for reply in record["conversations"][1::2]:
                if errors.random() < 0.5:
                    reply["value"] = with_error(reply["value"], errors)
        return self.write(f"clean-{clean}-noisy-{noisy}", records)

    def write(self, name: str, records: list[dict]) -> Path:
        path = self.out / "data" / f"{name}.json"
        with data.atomic_write(path) as file:
            json.dump(records, file)
        return path

    # -- training with one ingredient changed -----------------------------------------------------

    def config(self, steps: int, seq_len: int, **settings) -> train_sft.SFTConfig:
        """The chain's settings, with others in `settings`."""
        settings = {"optimizer": "muon", **settings}
        return train_sft.SFTConfig(
            out=str(self.out), seed=self.seed, steps=self.scaled(steps), seq_len=seq_len,
            batch_size=STEP_TOKENS // seq_len, **settings)

    def pretrain(self, name: str, steps: int, size: str = "1.1M", retrieval_init: bool = True,
                 times_told: int = 3, **settings) -> model.LLaMA:
        """A base model."""
        cfg = self.config(steps, 256, **settings)
        texts, _ = self.documents(times_told)
        rows = train_sft.pack_documents(texts, self.tokenizer, cfg)
        shape = model.LLaMAConfig(**SIZES[size], vocab_size=self.tokenizer.vocab_size)
        torch.manual_seed(self.seed)
        net = model.LLaMA(shape, retrieval_init)
        return train_sft.run_stage(
            cfg, name, self.machine, rows, self.tokenizer, "plain", teacher.digest(texts),
            network=net, window=cfg.seq_len,
            extra_settings=dict(size=size, retrieval_init=retrieval_init))

    def fine_tune(self, name: str, file: Path, steps: int, base: str = "", random_size: str = "",
                  template: str = "vicuna_v1.1", seq_len: int = 512, loss_on: str = "replies",
                  head_only: bool = False, **settings) -> model.LLaMA:
        """The chain's base fine-tuned on a file; or another base; or a network of random weights.
        `loss_on` is "replies" or "everything". `head_only` trains nothing but the output matrix.
        """
        cfg = self.config(steps, seq_len, **settings)
        rows = train_sft.conversation_rows(file, template, self.tokenizer, cfg)
        if loss_on == "everything":
            supervise_everything(rows)
        base = base or self.chain("base")
        depends_on = dict(loss_on=loss_on, head_only=head_only)
        if random_size:
            start = dict(shape=SIZES[random_size])
        elif head_only:
            start = dict(network=trainable(base, head_only=True), window=cfg.seq_len)
            depends_on["base_crc"] = checkpoint.fingerprint(base)
        else:
            start = dict(parent=base)
        return train_sft.run_stage(
            cfg, name, self.machine, rows, self.tokenizer, template, checkpoint.digest(file),
            extra_settings=depends_on, **start)

    def chat(self, steps: int, base: str = "", one_round: bool = False, short: bool = False,
             **changed) -> model.LLaMA:
        """Vicuna after so many steps, with options of fine_tune or train_sft.py changed. Its folder
        is named after what was changed, so that claims share the models they have in common."""
        file = self.conversations(one_round, short)
        name = f"{file.stem}-{steps}"
        if base and Path(base).name != "base":
            name += f"-{Path(base).name}"
        for option, value in changed.items():
            name += f"-{option}-{value}"
        return self.fine_tune(name, file, steps, base, **changed)

    def steps_of_equal_flops(self, size: str) -> int:
        """The steps in which pre-training a model of this size takes the FLOPs of the chain's base.
        """
        flops = []
        for shape in (SIZES["1.1M"], SIZES[size]):
            shape = model.LLaMAConfig(**shape, vocab_size=self.tokenizer.vocab_size)
            flops.append(train_flops(shape, STEP_TOKENS, STEP_TOKENS, seq_len=256))
        return round(TOY["base"] * flops[0] / flops[1])

    # -- measures ---------------------------------------------------------------------------------

    def examine(self, net, template: str = "vicuna_v1.1", rows: dict = exam.SHORT_ROWS,
                shots: str = "") -> dict:
        """The share of right answers in each row of the exam, and their mean, "right"."""
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
        """In nats per token of the documents that no base model was trained on."""
        _, texts = self.documents()
        rows = train_sft.pack_documents(texts, self.tokenizer, self.config(1, 256))
        total, count = train_sft.validate(net, rows, self.machine)
        return total / count

    def retrieved(self, net) -> dict:
        """A document tells a new scene once, then begins "The ring is": the share in which the true
        color is the likeliest of ten."""
        n, rng, right = 2 * self.sizes["questions"], random.Random("retrieved"), 0
        for _ in range(n):
            scene = ()
            while len({o.shape for o in scene}) < 2 or len({o.color for o in scene}) < 2:
                scene = world.pick_scene(rng, "scenes", 2)
            o = rng.choice(scene)
            text = f"{world.tell_in_sentences(scene, rng)} The {o.shape} is"
            context = [self.tokenizer.bos, *self.tokenizer.encode(text)]
            rows = [(context, self.tokenizer.encode(color)) for color in world.COLORS]
            best = int(evaluate.log_likelihoods(net, rows).argmax())
            right += world.COLORS[best] == o.color
        return dict(retrieved=right / n, questions=n)

    def ranked_facts(self, net) -> dict:
        """The share of people whose true town is the likeliest of eight after "NAME lives in":
        those whom fine-tuning does not mention ("ranked"), and those whom it does ("asked")."""
        file, right = self.out / "data" / "facts.jsonl", dict(asked=[], unasked=[])
        world.write_facts(file)
        for item in evaluate.read_items(file)[0]:
            rows = evaluate.make_rows(item, "", self.tokenizer)
            best = int(evaluate.scores(net, item, rows).argmax())
            right[item.group].append(best == item.right)
        return dict(ranked=statistics.mean(right["unasked"]),
                    asked=statistics.mean(right["asked"]), questions=len(right["unasked"]))

    def judged(self, name: str, both_orders: bool) -> dict:
        """An oracle judges the chain, a noisy player and a true one. "agrees": the share of its
        verdicts that are true. "leans": of the pairs of equally right answers, the share that the
        answer shown first wins, minus the share that it loses."""
        players = [self.chain("vicuna"), self.chain("alpaca"), "noisy", "oracle"]
        report = judge.main(judge.JudgeConfig(
            players=",".join(players), judge=name, swap=both_orders, out=str(self.out / "judge")))
        rows = [row for pair in report["pairs"] for row in pair["rows"]]
        agrees = [row["verdict"] == row["truth"] for row in rows]
        equal = [row["verdict"] for row in rows if row["truth"] == 0]
        return dict(agrees=sum(agrees) / len(rows), leans=-sum(equal) / max(1, len(equal)),
                    questions=len(rows))

    def judged_by_model(self, net, split: str, kinds: Sequence[str]) -> dict:
        """A small model as judge of a true and a wrong answer. It cannot write a review; it prefers
        the answer that it finds likelier per token."""
        n, rng, right, items = self.sizes["questions"], random.Random(0), 0, []
        for item in world.test_set(split, 8 * n):
            is_wanted = item.question.kind in kinds and "yesno" not in item.question.truth
            if is_wanted and len(items) < n:
                items.append(item)
        for item in items:
            turns = [data.Turn(role, text) for role, text in item.turns]
            prompt = data.render(data.Conversation(turns), "vicuna_v1.1", self.tokenizer).tokens
            answers = [item.question.full, with_error(item.question.full, rng)]
            rows = [(prompt, self.tokenizer.encode(answer)) for answer in answers]
            lengths = torch.tensor([len(answer) for _, answer in rows])
            true, wrong = evaluate.log_likelihoods(net, rows) / lengths
            right += int(true > wrong)
        return dict(agrees=right / len(items), questions=len(items))

    # -- seeing -----------------------------------------------------------------------------------

    @functools.cached_property
    def sight(self) -> Path:
        """The folder with the encoder, the projection after stage 1, and the curated descriptions:
        that of train_vlm.py, or one that is made here."""
        if self.is_taken("vicuna", "vision", "align") and (self.run / "curated").exists():
            return self.run
        if not (self.out / "curated" / "filter_cap.json").exists():
            train_vlm.main(train_vlm.VLMConfig(
                stage="curate", init=self.chain("vicuna"), out=str(self.out), seed=self.seed,
                fast=self.fast))
        return self.out

    def open_vlm(self, stage: str = "all", steps: int = 0) -> train_vlm.VLMRun:
        """What the stages share. `steps` replaces those of the stage's recipe."""
        return train_vlm.open_run(train_vlm.VLMConfig(
            stage=stage, steps=steps, init=self.chain("vicuna"), out=str(self.out),
            seed=self.seed, fast=self.fast), self.machine)

    def build(self, vlm: train_vlm.VLMRun, architecture: type) -> tuple[vision.MiniGPT4, dict]:
        """A MiniGPT-4 with an untrained projection, and what it depends on."""
        vit, qformer = vision.load_encoder(self.sight / "vision")
        torch.manual_seed(self.seed)
        net = architecture(vlm.llama, vit, qformer).to(self.machine.device)
        parts = dict(architecture=architecture.__name__,
                     llama_crc=checkpoint.fingerprint(vlm.folder),
                     vision_crc=checkpoint.fingerprint(self.sight / "vision"))
        return net, parts

    def train_minigpt4(self, name: str, architecture: type) -> dict:
        """Both stages with another architecture, then the measures."""
        vlm = self.open_vlm()
        net, parts = self.build(vlm, architecture)
        if architecture is vision.MiniGPT4 and self.is_taken("minigpt4"):
            checkpoint.load(self.run / "minigpt4", network=net)
            return self.seen(vlm, net.eval())
        alt = train_vlm.load_album(self.sight / "data" / "alt")
        curated = train_vlm.load_album(self.sight / "curated")
        train_vlm.train_projection(vlm, "1", net, parts, alt, f"{name}-1")
        train_vlm.train_projection(vlm, "2", net, parts, curated, f"{name}-2",
                                   str(self.out / f"{name}-1"))
        return self.seen(vlm, net.eval())

    def continue_stage(self, stage: str, steps: int) -> dict:
        """The measures after stage 1 and so many steps of stage 2, or so many more of stage 1."""
        vlm = self.open_vlm(stage, self.scaled(steps))
        net, parts = self.build(vlm, vision.MiniGPT4)
        aligned = self.sight / "align"
        checkpoint.load(aligned, network=net)
        if steps:
            folder = self.sight / ("curated" if stage == "2" else "data/alt")
            train_vlm.train_projection(vlm, stage, net, parts, train_vlm.load_album(folder),
                                       f"stage-{stage}-{steps}", str(aligned))
        return self.seen(vlm, net.eval())

    def seen(self, vlm: train_vlm.VLMRun, net: vision.MiniGPT4) -> dict:
        """On held-out scenes: the shares of exact descriptions, of right answers, and of
        descriptions that fail in one of the ways that stage 2 is meant to cure."""
        def play(e, texts, texts_with_scene):
            features = train_vlm.encode_images(net, e.pictures, vlm.machine)
            return train_vlm.ask(net, vlm, texts, features)

        n = 2 * self.sizes["questions"]
        table, said = exam.see_and_tell({"model": play}, n, ["scenes"])
        described, answered = (cells["model"] for cells in table.values())
        scenes = exam.picture_exam("scenes", n).scenes
        fails = [bool(exam.failure(*one)) for one in zip(scenes, *said["scenes", "model"])]
        return dict(described=described, answered=answered, fails=sum(fails) / n, questions=n)


# -- ingredients ----------------------------------------------------------------------------------

def supervise_everything(rows: data.Rows) -> None:
    """The loss of pre-training: every token is a label, but not the padding. (Nor the first one of
    a conversation, which nothing predicts: model.shift_labels.)"""
    is_text = rows.segments >= 0
    rows.labels[is_text] = rows.tokens[is_text]


def trainable(folder: str, lora_rank: int = 0, head_only: bool = False) -> model.LLaMA:
    """A checkpoint in which the adapters, the output matrix, or all weights require gradients."""
    net, _, _ = checkpoint.load(folder)
    if lora_rank:
        model.add_lora(net, lora_rank)
    if head_only:
        net.requires_grad_(False)
        net.output.requires_grad_(True)
    return net


def trained_share(net: model.LLaMA) -> float:
    """Parameters that are trained, relative to those of the model without adapters."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return trained / model.count_parameters(net.config)


def with_error(text: str, rng: random.Random) -> str:
    """The text with another size, color, shape, place or number instead of the last one. It names
    no held-out pair that the text did not name."""
    kinds = (world.SIZES, world.COLORS, world.SHAPES, world.PLACES)
    words = "|".join(word for kind in kinds for word in kind)
    found = list(re.finditer(rf"\b(?:{words})\b|\d+", text))
    if not found:
        return text
    last = found[-1]
    if last[0].isdigit():
        others = [str(int(last[0]) + i) for i in (1, 2, 3)]
    else:
        kind = next(kind for kind in kinds if last[0] in kind)
        others = [word for word in kind if word != last[0]]
    wrong = [text[:last.start()] + word + text[last.end():] for word in others]
    return rng.choice([t for t in wrong if held_pairs(t) <= held_pairs(text)])


def held_pairs(text: str) -> set[tuple[str, str]]:
    """The held-out pairs whose color and shape are both in the text."""
    words = set(re.findall(r"\w+", text))
    return {pair for pair in world.HELD_PAIRS if words.issuperset(pair)}


# -- architectures --------------------------------------------------------------------------------

class ThreeLayers(vision.MiniGPT4):
    """A projection of three layers instead of one."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.llama_proj = Projection(qformer.config.dim, llama.config.dim)


class Projection(torch.nn.Sequential):
    """Three linear layers with GELU between them. It is used like a single one, so it has what
    MiniGPT4 reads of that."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(torch.nn.Linear(in_features, out_features), torch.nn.GELU(),
                         torch.nn.Linear(out_features, out_features), torch.nn.GELU(),
                         torch.nn.Linear(out_features, out_features))
        self.in_features = in_features

    @property
    def weight(self) -> torch.Tensor:
        return self[0].weight


class WithoutQFormer(vision.MiniGPT4):
    """The projection reads the ViT's output: the class token, and one vector per patch."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.n_queries = vit.pos_embed.shape[1]
        self.llama_proj = torch.nn.Linear(vit.config.dim, llama.config.dim)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels)


class TunedQFormer(vision.MiniGPT4):
    """The Q-Former is trained together with the projection. Only the ViT is frozen, so `features`,
    which are computed once, are its output."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vit, qformer)
        self.qformer.requires_grad_(True)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() == 4:
            images = self.features(images)
        return super().encode(self.qformer(images))


class RandomEncoder(vision.MiniGPT4):
    """ViT and Q-Former with random weights: the pictures can tell the model little."""

    def __init__(self, llama, vit, qformer):
        super().__init__(llama, vision.ViT(vit.config), vision.QFormer(qformer.config))
