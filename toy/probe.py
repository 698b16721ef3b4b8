"""Where does MiniGPT-4 lose what is in the picture? A ladder from the encoder to plain words. The
third row is MiniGPT-4 itself. Each later row replaces more of it with something better, so the gain
over the row above suggests what the replaced part loses; only the alt-text row stands apart, since
it is graded differently. Then: the same for yes/no questions, and how far back the language model
can still recall a scene.

    python -m toy.exam --probe                 # after train_sft.py and train_vlm.py
    python -m toy.exam --probe --out=out/seed1
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
PROMPT_LENGTHS = (120, 250, 480)  # in tokens; the scene is told in the first turn


def probe(out: Path, n: int) -> dict:
    """Prints the ladder of a run and returns it, {row: {split: share}}. n pictures per split, the
    same on every row."""
    machine = choose_machine("auto", "float32")
    net, _, meta = vision.load(out / "minigpt4", device=machine.device)
    cfg = train_vlm.VLMConfig(init=meta["settings"]["llama"], out=str(out))
    vlm = train_vlm.open_run(cfg, machine)
    projections, residual = load_projections(net, vlm, out)
    head = encoder_head(net, meta)
    ladder = {}
    for split in SPLITS:
        e = exam.picture_exam(split, n)
        features = train_vlm.encode_images(net, e.pictures, machine)
        rows = {"encoder: all ten symbols right": symbols_right(head(features), e.scenes)}
        replies = ask_about_pictures(net, vlm, projections, features, e.scenes,
                                     exam.instructions(n))
        rows |= {row: exact_share(e.scenes, said) for row, said in replies.items()}
        rows |= in_words(vlm, e.scenes)
        for row, share in rows.items():
            ladder.setdefault(row, {})[split] = share
    exam.print_table("right, %", ladder)
    print(f"{n} pictures per column. A description counts if it is exact; in the alt-text row, a "
          "reply counts\nif it is a complete list or a true remark. The least-squares projection "
          f"leaves {100 * residual:.1f}% of the variance\nof the word embeddings unexplained, on "
          "the scenes to which it was fitted.")
    yes_no = yes_no_rows(net, vlm, projections, n)
    exam.print_table("right, %", yes_no)
    for tokens in PROMPT_LENGTHS:
        share = share_recalled(vlm, tokens, n)
        ladder[f"scene told first, {tokens}-token prompt"] = dict(scenes=share)
        print(f"scene told in the first turn, question at the end of a {tokens}-token prompt: "
              f"{100 * share:.0f}% right")
    with data.atomic_write(out / "probe.json") as file:
        json.dump(dict(ladder, residual=residual, yes_no=yes_no), file, indent=1)
    return ladder


def load_projections(net: vision.MiniGPT4, vlm: train_vlm.VLMRun, out: Path) -> tuple[dict, float]:
    """The projections to compare, by row, and what the least-squares one leaves unexplained. Leaves
    the one after stage 1 in `net`."""
    final = train_vlm.copy_projection(net)
    checkpoint.load(out / "align", network=net)
    aligned = train_vlm.copy_projection(net)
    ridge, residual = ridge_projection(net, vlm)
    projections = {"projection after stage 1": aligned, "projection after stage 2": final,
                   "least-squares projection": ridge}
    return projections, residual


def ask_about_pictures(net: vision.MiniGPT4, vlm: train_vlm.VLMRun, projections: dict,
                       features: torch.Tensor, scenes: Sequence, texts: Sequence[str]) -> dict:
    """Asks one text per picture and returns {row: replies}: one row for each projection (loaded
    into `net`, applied to the features (N, Q, C)), and one with the exact word embeddings of the
    scenes in the slots."""
    replies = {}
    for row, weights in projections.items():
        net.llama_proj.load_state_dict(weights)
        replies[row] = ask(net, vlm, texts, list(features.split(1)))
    embeddings = embed_symbols(vlm, scenes)
    replies["exact embeddings in the slots"] = ask(vlm.llama, vlm, texts, embeddings)
    return replies


def yes_no_rows(net: vision.MiniGPT4, vlm: train_vlm.VLMRun, projections: dict, n: int) -> dict:
    """The share of right answers to questions like "Is there a red ring?", about two for each of n
    pictures."""
    e = exam.yes_no_exam(exam.picture_exam("scenes", n))
    features = train_vlm.encode_images(net, e.pictures, vlm.machine)
    texts = [q.text for q in e.questions]
    replies = ask_about_pictures(net, vlm, projections, features, e.scenes, texts)
    return {row: {"yes/no": exam.pope(e.questions, said)[exam.YES_NO]}
            for row, said in replies.items()}


def ask(net, vlm: train_vlm.VLMRun, texts: Sequence[str],
        images: Sequence | None = None) -> list[str]:
    """The replies to these questions; "" for one that does not end. With images, one is put in
    front of each: the Q-Former's output for a MiniGPT4, embeddings for a LLaMA."""
    slots = 0 if images is None else world.N_SYMBOLS
    conversations = [data.Conversation([data.Turn("user", text, slots=slots)]) for text in texts]
    if images is not None:
        images = [image.to(vlm.machine.device) for image in images]
    replies, ended = data.generate_replies(net, vlm.tokenizer, vlm.template, conversations, 64,
                                           images=images)
    return [reply if end else "" for reply, end in zip(replies, ended)]


def exact_share(scenes: Sequence, replies: Sequence[str]) -> float:
    return sum(map(exam.exact, scenes, replies)) / len(scenes)


def in_words(vlm: train_vlm.VLMRun, scenes: Sequence) -> dict:
    """Without a picture: the scene as bare words (those that the image vectors stand for, but with
    the attributes in any order) and as sentences. The alt-text row asks no question, as in stage 1,
    where alt-text is the reply to the picture alone."""
    rng = random.Random(3)
    symbols = [world.tell_symbols(scene, rng) for scene in scenes]
    sentences = [world.tell_in_sentences(scene, rng) for scene in scenes]
    alt_texts = ask(vlm.llama, vlm, symbols)
    rows = {"bare words, true alt-text": sum(map(is_true, scenes, alt_texts)) / len(scenes)}
    for name, told in (("bare words", symbols), ("sentences", sentences)):
        asked = [f"{text} {wish}" for text, wish in zip(told, exam.instructions(len(told)))]
        rows[name] = exact_share(scenes, ask(vlm.llama, vlm, asked))
    return rows


def is_true(scene: world.Scene, alt_text: str) -> bool:
    """Does it list all objects, or make a remark that is true of one of them?"""
    remarks = {remark.format(o=o) for remark in world.REMARKS for o in scene}
    return alt_text in remarks or exam.exact(scene, alt_text)


# -- the encoder, and the best that a linear layer can do -----------------------------------------

def encoder_head(net: vision.MiniGPT4, meta: dict) -> torch.nn.Linear:
    """The classification head of stage 0, which MiniGPT-4 itself does not use."""
    weights = checkpoint.read(Path(meta["settings"]["vision"]) / "model.pt")
    head = torch.nn.Linear(net.llama_proj.in_features, len(pictures.SYMBOLS))
    head.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")})
    return head.requires_grad_(False)


def symbols_right(logits: torch.Tensor, scenes: Sequence) -> float:
    """The share of scenes for which every query's symbol is right; logits (N, Q, symbols)."""
    right = 0
    for row, scene in zip(logits.argmax(-1).tolist(), scenes):
        right += [pictures.SYMBOLS[i] for i in row] == pictures.scene_symbols(scene)
    return right / len(scenes)


def embed_symbols(vlm: train_vlm.VLMRun, scenes: Sequence) -> list[torch.Tensor]:
    """For each scene the word embeddings of its symbols, (Q, C). Raises UserError if a symbol is
    not a single token."""
    table, rows = vlm.llama.tok_embeddings.weight.detach(), []
    for scene in scenes:
        ids = [vlm.tokenizer.encode(symbol) for symbol in pictures.scene_symbols(scene)]
        if any(len(pieces) != 1 for pieces in ids):
            raise UserError("this tokenizer splits a symbol of the toy world into pieces")
        rows.append(table[[pieces[0] for pieces in ids]])
    return rows


def ridge_projection(net: vision.MiniGPT4, vlm: train_vlm.VLMRun) -> tuple[dict, float]:
    """Ridge regression from the features of training scenes to the embeddings of their symbols: the
    projection, and the share of the embeddings' variance that it leaves unexplained there."""
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

def share_recalled(vlm: train_vlm.VLMRun, tokens: int, n: int) -> float:
    """The share of right answers about a scene that was told in the first turn, at the end of
    prompts of about this many tokens."""
    rng = random.Random(tokens)
    items = [far_item(vlm, tokens, rng) for _ in range(n)]
    right, _ = exam.answer(exam.model_player(vlm.llama, vlm.tokenizer, vlm.template), items)
    return sum(right) / n


def far_item(vlm: train_vlm.VLMRun, tokens: int, rng: random.Random) -> world.Item:
    """A conversation whose prompt is 90% to 100% of `tokens` long. It tells a scene in its
    first turn, makes a detour, and finally asks for an object's attribute."""
    while True:
        item = world.converse(rng, "scenes", rounds=2, detour=rng.randint(1, tokens // 20))
        turns = [data.Turn(role, text) for role, text in item.turns]
        prompt = data.render(data.Conversation(turns), vlm.template, vlm.tokenizer)
        asks_attribute = item.question.kind in ("color", "shape", "size", "where")
        if asks_attribute and 0.9 * tokens < len(prompt.tokens) <= tokens:
            return item
