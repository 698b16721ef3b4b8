"""Where is seeing lost? Each rung of the ladder replaces one more part of MiniGPT-4 by what is
exactly right, so that the difference between two rungs is what a part loses.

    python -m toy.exam --probe                 # after train_sft.py and train_vlm.py
    python -m toy.exam --probe --out=out/seed1

From top to bottom: what the encoder sees, the trained projection, the best linear projection there
is, exact word embeddings in the image slots, and the same scene in words. Then how far back the
language model finds a scene that was told in the first turn.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

import data
import train_vlm
import vision
from tools import checkpoint
from tools.config import UserError
from tools.machine import choose_machine
from toy import exam, pictures, world

SPLITS = ("scenes", "pairs")
FAR = (120, 250, 480)  # tokens of a prompt whose first turn tells the scene


def probe(out: Path, n: int) -> dict:
    """Prints the ladder of a run and returns it, {rung: {split: share}}. n pictures for each."""
    machine = choose_machine("auto", "float32")
    net, path, meta = vision.load(out / "minigpt4", device=machine.device)
    cfg = train_vlm.VLMConfig(init=meta["settings"]["llama"], out=str(out))
    vlm = train_vlm.open_run(cfg, machine)
    final = train_vlm.copy_projection(net)
    checkpoint.load(out / "align", network=net)
    aligned = train_vlm.copy_projection(net)
    ridge, residual = ridge_projection(net, vlm)
    head = encoder_head(net, meta)
    ladder = {}
    for split in SPLITS:
        e = exam.picture_exam(split, n)
        features = train_vlm.encode_images(net, e.pictures, machine)
        rungs = {"encoder: all symbols right": symbols_right(head(features), e.scenes)}
        for name, weights in (("projection after stage 1", aligned),
                              ("projection after stage 2", final),
                              ("best linear projection", ridge)):
            net.llama_proj.load_state_dict(weights)
            rungs[name] = described(net, vlm, e.scenes, list(features.split(1)))
        exact = embed_symbols(vlm, e.scenes)
        rungs["exact embeddings in the slots"] = described(vlm.llama, vlm, e.scenes, exact)
        rungs |= in_words(vlm, e.scenes)
        for rung, share in rungs.items():
            ladder.setdefault(rung, {})[split] = share
    exam.print_table("right descriptions, %", ladder)
    print(f"{n} pictures per column. The best linear projection (ridge regression onto the word "
          f"embeddings) leaves {100 * residual:.1f}% of the variance.")
    for tokens in FAR:
        share = share_found(vlm, tokens, n)
        ladder[f"scene told {tokens} tokens ago"] = dict(scenes=share)
        print(f"a scene told in the first turn of {tokens} tokens: {100 * share:.0f}% right")
    with data.atomic_write(out / "probe.json") as file:
        json.dump(dict(ladder, residual=residual), file, indent=1)
    return ladder


def described(net, vlm: train_vlm.VLMRun, scenes: Sequence, images: Sequence | None,
              told: Sequence[str] = (), request: str | None = None) -> float:
    """The share of scenes that are described exactly, from images or told in words."""
    conversations = []
    for i in range(len(scenes)):
        text = data.IMAGE_INSTRUCTIONS[i % 4] if request is None else request
        if told:
            text = f"{told[i]} {text}".strip()
        slots = 0 if images is None else world.N_SYMBOLS
        conversations.append(data.Conversation([data.Turn("user", text, slots=slots)]))
    if images is not None:
        images = [image.to(vlm.machine.device) for image in images]
    replies, _ = data.generate_replies(net, vlm.tokenizer, vlm.template, conversations, 64,
                                       images=images)
    right = [exam.exact(scene, reply) for scene, reply in zip(scenes, replies)]
    return sum(right) / len(right)


def in_words(vlm: train_vlm.VLMRun, scenes: Sequence) -> dict:
    """Without a picture: the bare words that image vectors stand for, and sentences. The first is
    asked as in stage 1, whose captions are replies without a question."""
    rng = random.Random(3)
    symbols = [world.tell_symbols(scene, rng) for scene in scenes]
    sentences = [world.tell_in_sentences(scene, rng) for scene in scenes]
    return {"bare words, alt-text": described(vlm.llama, vlm, scenes, None, symbols, ""),
            "bare words": described(vlm.llama, vlm, scenes, None, symbols),
            "sentences": described(vlm.llama, vlm, scenes, None, sentences)}


# -- the encoder, and the best that a linear layer can do -----------------------------------------

def encoder_head(net: vision.MiniGPT4, meta: dict) -> torch.nn.Linear:
    """The classification head of stage 0, which MiniGPT-4 itself does not use."""
    weights = checkpoint.read(Path(meta["settings"]["vision"]) / "model.pt")
    head = torch.nn.Linear(net.llama_proj.in_features, len(pictures.SYMBOLS))
    head.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")})
    return head.requires_grad_(False)


def symbols_right(logits: torch.Tensor, scenes: Sequence) -> float:
    """The share of scenes of which every query names its symbol; logits (N, Q, symbols)."""
    right = 0
    for row, scene in zip(logits.argmax(-1).tolist(), scenes):
        right += [pictures.SYMBOLS[i] for i in row] == pictures.scene_symbols(scene)
    return right / len(scenes)


def embed_symbols(vlm: train_vlm.VLMRun, scenes: Sequence) -> list[torch.Tensor]:
    """For each scene the word embeddings of its symbols, (Q, C). Every symbol is one piece."""
    table, rows = vlm.llama.tok_embeddings.weight.detach(), []
    for scene in scenes:
        ids = [vlm.tokenizer.encode(symbol) for symbol in pictures.scene_symbols(scene)]
        if any(len(pieces) > 1 for pieces in ids):
            raise UserError("this tokenizer splits a symbol of the toy world into pieces")
        rows.append(table[[pieces[0] for pieces in ids]])
    return rows


def ridge_projection(net: vision.MiniGPT4, vlm: train_vlm.VLMRun) -> tuple[dict, float]:
    """Ridge regression from features of training scenes to embeddings of their symbols: a
    projection, and the share of the variance that it leaves."""
    rng = random.Random(9)
    scenes = [world.pick_scene(rng) for _ in range(1500)]
    drawn = [pictures.draw(scene, rng) for scene in scenes]
    x = train_vlm.encode_images(net, drawn, vlm.machine).flatten(0, 1).double()  # (N * Q, C)
    y = torch.cat(embed_symbols(vlm, scenes)).double().cpu()
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1)  # the last weight is the bias
    w = torch.linalg.solve(x1.T @ x1 + torch.eye(x1.shape[1]), x1.T @ y)
    residual = ((x1 @ w - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    return dict(weight=w[:-1].T.float(), bias=w[-1].float()), residual.item()


# -- how far back a scene is found ----------------------------------------------------------------

def share_found(vlm: train_vlm.VLMRun, tokens: int, n: int) -> float:
    """The share of right answers about a scene that was told in the first turn, at the end of
    prompts of about so many tokens."""
    rng = random.Random(tokens)
    items = [far_item(vlm, tokens, rng) for _ in range(n)]
    replies, ended = exam.model_player(vlm.llama, vlm.tokenizer, vlm.template)(items)
    right = [end and world.grade(item.question, reply) == 1
             for item, reply, end in zip(items, replies, ended)]
    return sum(right) / n


def far_item(vlm: train_vlm.VLMRun, tokens: int, rng: random.Random) -> world.Item:
    """A conversation of at most so many tokens, and hardly fewer, that tells a scene in its first
    turn, talks about something else, and asks for an attribute of an object at last."""
    while True:
        item = world.converse(rng, "scenes", rounds=2, pause=rng.randint(0, tokens // 20))
        turns = [data.Turn(role, text) for role, text in item.turns]
        prompt = data.render(data.Conversation(turns), vlm.template, vlm.tokenizer)
        asks_attribute = item.question.kind in ("color", "shape", "size", "where")
        if asks_attribute and 0.9 * tokens < len(prompt.tokens) <= tokens:
            return item
