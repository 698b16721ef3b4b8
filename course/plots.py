"""Pictures for a lecture, drawn with the real code: what the slide shows is what the program does.

    python -m course.plots all --out=plots         # every picture that --run has the files for
    python -m course.plots retrieval --run=out     # what a head of a trained model attends to

Needs matplotlib. Each function draws one picture. --run is the output folder of train_sft.py and
train_vlm.py; where one language model is enough, it may be a checkpoint.
"""

import contextlib
import importlib.util
import io
import json
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import judge
import model
import train_sft
import vision
from tools import checkpoint, config, inside, quantize, show
from tools.config import UserError, refuse_unused
from tools.run import read_metrics
from toy import exam, pictures, world

GREEN, GRAY = "#4caf50", "#d9d9d9"


def subplots(rows: int = 1, columns: int = 1, width: float = 9, height: float = 3.2, **options):
    """A figure, and a flat array of its axes."""
    from matplotlib.figure import Figure  # pyplot would open windows and keep state
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options).flatten()


def load(run: Path, name: str = "vicuna") -> tuple[model.LLaMA, data.Tokenizer, str]:
    """The network, tokenizer and template of a stage; `run` may be a checkpoint itself."""
    net, tokenizer, meta = checkpoint.load(run / name if (run / name).exists() else run)
    return net.eval(), data.Tokenizer(tokenizer), meta["template"]


def texts_of(tokenizer: data.Tokenizer, tokens) -> list[str]:
    """The text of each token on one line, as `data.py show` spells it."""
    return [show.spell_one(tokenizer, token).replace("\n", "") for token in tokens]


def held_out_conversation(rounds: int) -> data.Conversation:
    """A conversation about a scene that is not in the training data, with the true answers."""
    item = world.converse(random.Random(5), "scenes", rounds)
    turns = [data.Turn(role, text) for role, text in item.turns]
    return data.Conversation([*turns, data.Turn("assistant", item.question.full)])


# -- the model ------------------------------------------------------------------------------------

def rope():
    """RoPE: how far each pair is turned at each position, and how scores fall with distance."""
    figure, (left, right) = subplots(1, 2)
    cos, _ = model.rope_table(256, 64, theta=2000.0)
    image = left.imshow(cos, aspect="auto", cmap="RdBu", interpolation="nearest")
    left.set(title="cos of the angle, theta = 2,000", xlabel="pair i", ylabel="position")
    figure.colorbar(image, ax=left)
    ones = torch.ones(1, 512, 1, 64)
    for theta in (500.0, 2000.0, 10000.0):
        rotated = model.apply_rope(ones, *model.rope_table(512, 64, theta))[0, :, 0]
        right.plot(rotated @ rotated[0] / 64, label=f"theta = {theta:,.0f}")
    right.axhline(0, color="black", linewidth=0.5)
    right.set(title="score of two equal vectors, 1 at distance 0", xlabel="distance in tokens")
    right.legend()
    return figure


def masks():
    """Which key each query may attend to: in a plain row, a packed row, a row with left padding."""
    figure, axes = subplots(1, 3, height=3.6)
    index = torch.arange(10)
    packed = model.packed_positions_and_mask(torch.tensor([[0] * 4 + [1] * 3 + [2] * 3]))
    padded = model.padded_positions_and_mask(10, 0, torch.tensor([3]))
    shown = {"causal": (index, model.causal_mask(10, 10, "cpu")),
             "packed: three conversations": (packed[0][0], packed[1][0, 0]),
             "left padding: three positions": (padded[0][0], padded[1][0, 0])}
    for axis, (title, (positions, mask)) in zip(axes, shown.items()):
        axis.imshow(mask, cmap="Greens", vmin=0, vmax=1.6)
        axis.set(title=title, xlabel="key (its position)", xticks=range(10), yticks=range(10))
        axis.set_xticklabels(positions.tolist())
        axis.set_yticklabels(positions.tolist())
    axes[0].set_ylabel("query (its position)")
    return figure


def retrieval_head(net: model.LLaMA, tokens: list[int], scene: range,
                   reply: range) -> tuple[int, int, torch.Tensor]:
    """The layer and head that attend most to the token of the scene that comes next in the reply,
    and the head's attention weights (T, T)."""
    best = (-1.0, 0, 0, None)
    for layer in range(net.config.n_layers):
        _, weights = inside.forward_textbook(net, tokens, layer)
        for head, weights_of_head in enumerate(weights):
            found = 0.0
            for t in reply:
                for s in scene:
                    if tokens[s] == tokens[t]:
                        found += weights_of_head[t - 1, s].item()
            if found > best[0]:
                best = (found, layer, head, weights_of_head)
    return best[1:]


def retrieval(run: Path):
    """The head that retrieves the answer from the scene. A row is a token of the reply, and shows
    the attention of the position that predicts it."""
    net, tokenizer, template = load(run)
    tokens, marks = data.render(held_out_conversation(1), template, tokenizer)
    begin = next(a for a, _, supervised in data.runs(marks) if supervised)
    nothing = data.render(data.Conversation([data.Turn("user", "")]), template, tokenizer)
    scene = range(len(nothing.tokens) - 3, begin)  # without the system prompt
    reply = range(begin, len(tokens))
    layer, head, weights = retrieval_head(net, tokens, scene, reply)
    shown = weights[begin - 1:-1, scene.start:scene.stop]
    figure, (axis,) = subplots(width=12, height=1.8 + 0.22 * len(shown))
    axis.imshow(shown, cmap="Greens", aspect="auto", vmin=0)
    axis.set(title=f"attention of head {head} in layer {layer} while the reply is predicted",
             xticks=range(len(scene)), yticks=range(len(shown)))
    axis.set_xticklabels(texts_of(tokenizer, tokens[scene.start:scene.stop]), rotation=90, size=8)
    axis.set_yticklabels(texts_of(tokenizer, tokens[begin:]), size=8)
    return figure


def sampling():
    """One distribution under temperature, top-k and top-p: 20,000 draws of model.sample each."""
    words = ["blue", "red", "green", "pink", "black", "white", "brown", "gray"]
    logits = torch.tensor([3.0, 2.4, 1.8, 1.2, 0.4, -0.2, -1.0, -2.0])
    figure, axes = subplots(1, 5, width=11, height=3, sharey=True)
    settings = [dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=3),
                dict(top_p=0.7)]
    for axis, changes in zip(axes, settings):
        options = dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0) | changes
        many = logits.expand(20000, -1)
        drawn = model.sample(many, torch.zeros_like(many, dtype=torch.bool),
                             generator=torch.Generator().manual_seed(0), **options)
        axis.bar(words, torch.bincount(drawn, minlength=len(words)) / 20000, color=GREEN)
        title = ", ".join(f"{name} = {value}" for name, value in changes.items())
        axis.set_title(title or "temperature = 1", size=10)
        axis.tick_params("x", rotation=90)
    axes[0].set_ylabel("drawn")
    return figure


def lora(run: Path):
    """Full fine-tuning: how much of its change to each matrix a low rank would hold."""
    before, after = (load(run, name)[0].state_dict() for name in ("base", "vicuna"))
    figure, axes = subplots(1, 2, sharey=True)
    for axis, name in zip(axes, ("attention.wq", "feed_forward.w1")):
        matrices = [key for key in after if name in key]
        for layer, key in enumerate(matrices):
            energy = torch.linalg.svdvals(after[key].float() - before[key].float()) ** 2
            share = (energy.cumsum(0) / energy.sum()).tolist()
            axis.plot(range(len(share) + 1), [0, *share], label=f"layer {layer}")
        axis.set(title=f"{name}: Vicuna minus base", xlabel="rank", ylim=(0, 1.02))
        axis.axvline(8, color="black", linestyle=":", linewidth=1)
        axis.text(9.5, 0.02, "rank 8")
    axes[0].set_ylabel("share of the squared change")
    axes[1].legend()
    return figure


def quantization(run: Path):
    """The error of quantization to eight and to four bits: of blocks of 32 weights, relative to the
    block's norm, and of single weights."""
    weight = load(run)[0].layers[0].feed_forward.w1.weight.detach().float()
    figure, (left, right) = subplots(1, 2)
    for kind in ("Q8_0", "Q4_0"):
        error = quantize.dequantize(quantize.quantize_rows(weight, kind)) - weight
        blocks = error.unflatten(1, (-1, 32)).norm(dim=-1)
        blocks = blocks / weight.unflatten(1, (-1, 32)).norm(dim=-1)
        left.hist(100 * blocks.flatten(), bins=60, label=f"{kind}, mean {100 * blocks.mean():.1f}%")
    left.set(title="error of a block, in % of its norm", xlabel="%", ylabel="blocks", xscale="log")
    left.legend()
    image = right.imshow(error[:48, :96], cmap="RdBu", aspect="auto")
    for column in range(32, 96, 32):
        right.axvline(column - 0.5, color="black", linewidth=1)
    right.set(title="error of single weights, four bits", xlabel="column (a block has 32)",
              ylabel="row")
    figure.colorbar(image, ax=right)
    return figure


# -- data and training ----------------------------------------------------------------------------

def chips(run: Path):
    """A conversation as tokens: gray if not supervised, green if in the loss; the larger the loss,
    the darker."""
    from matplotlib import colormaps
    net, tokenizer, template = load(run)
    example = data.render(held_out_conversation(3), template, tokenizer)
    loss = np.nan_to_num(show.token_losses(net, example))
    darkness = np.log10(loss.clip(1e-3, 1)) / 3 + 1  # 0 at 0.001 nats, 1 from 1 nat on
    figure, (axis,) = subplots(width=11, height=2.6)
    column, row = 0, 0
    for label, mark, dark in zip(texts_of(tokenizer, example.tokens), example.labels, darkness):
        if column + len(label) > 154:
            column, row = 0, row + 1
        shade = GRAY if mark == data.IGNORE else colormaps["Greens"](0.2 + 0.6 * dark)
        axis.text(column, -row, label.replace("$", r"\$"), family="monospace", size=8,
                  bbox=dict(facecolor=shade, edgecolor="white", pad=1.5))
        column += len(label) + 1
    axis.set(xlim=(0, 160), ylim=(-row - 0.5, 0.8))
    axis.set_axis_off()
    axis.set_title("gray: not supervised; green: in the loss, darker from 0.001 to 1 nat", size=10)
    return figure


def schedule():
    """Learning rate with warmup and cosine decay: ours, and Alpaca's and Vicuna's."""
    figure, (axis,) = subplots(width=6)
    shown = {"ours: warmup 10%, down to a tenth": dict(warmup=0.1, min_lr=0.1),
             "Alpaca's and Vicuna's: warmup 3%, down to 0": dict(warmup=0.03, min_lr=0.0)}
    for label, settings in shown.items():
        cfg = train_sft.SFTConfig(steps=1000, learning_rate=1.0, **settings)
        axis.plot([train_sft.learning_rate(step, cfg) for step in range(1000)], label=label)
    axis.set(xlabel="step", ylabel="learning rate / peak", ylim=(0, 1.4))
    axis.legend(loc="upper right")
    return figure


def losses(run: Path):
    """Loss, with its plateau and drop; right answers while training; and at the end."""
    figure, (left, middle, right) = subplots(1, 3, width=13, height=3.6)
    logs = {}
    for name in ("base", "alpaca", "vicuna"):
        if lines := read_metrics(run / name / "metrics.jsonl"):
            logs[name] = lines
    if not logs or not (run / "table.json").exists():
        raise UserError(f"{run} has no metrics.jsonl or no table.json; run `python train_sft.py`")
    for name, lines in logs.items():
        left.plot(*exam.smoothed([line["loss"] for line in lines]), label=name)
        asked = [line for line in lines if "accuracy" in line]
        middle.plot([line["step"] + 1 for line in asked],
                    [100 * line["accuracy"] for line in asked], marker=".", label=name)
    left.set(title="training loss", xlabel="step", ylabel="nats per supervised token",
             yscale="log")
    left.legend()
    middle.set(title="right answers while training, %", xlabel="step", ylim=(0, 100))
    middle.legend(loc="center right")
    table = json.loads((run / "table.json").read_text(encoding="utf-8"))["table"]
    rows = dict(scenes="held-out\nscenes", pairs="held-out\npairs", later="earlier\nturns")
    for i, player in enumerate(("base", "Alpaca", "Vicuna", "no scene")):
        heights = [100 * table[row][player] for row in rows]
        right.bar(np.arange(len(rows)) + 0.2 * i - 0.3, heights, 0.18, label=player)
    right.set(title="right answers, %", xticks=range(len(rows)), ylim=(0, 100))
    right.set_xticklabels(rows.values())
    right.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, -0.16))
    return figure


# -- vision and the judge -------------------------------------------------------------------------

def toy_picture() -> tuple[world.Scene, np.ndarray]:
    rng = random.Random(3)
    scene = world.pick_scene(rng, "scenes")
    return scene, pictures.draw(scene, rng)


def patches():
    """What the ViT reads: the patches of a picture, numbered row by row."""
    picture, size = toy_picture()[1], vision.ViTConfig().patch_size
    figure, (left, right) = subplots(1, 2, width=7, height=3.6)
    left.imshow(picture)
    n, gap = len(picture) // size, 2
    apart = np.full((n * (size + gap), n * (size + gap), 3), 255, np.uint8)
    for row in range(n):
        for column in range(n):
            y, x = row * (size + gap), column * (size + gap)
            patch = picture[row * size:(row + 1) * size, column * size:(column + 1) * size]
            apart[y:y + size, x:x + size] = patch
            right.text(x, y + 2, row * n + column + 1, size=7, color="white")
    right.imshow(apart)
    for axis, title in ((left, f"{len(picture)} x {len(picture)} pixels"),
                        (right, f"{n * n} patches, in reading order")):
        axis.set_title(title)
        axis.set_axis_off()
    return figure


def cross_attention(net: vision.MiniGPT4, pixels: torch.Tensor) -> torch.Tensor:
    """How each query divides its attention among class token and patches, (Q, 1 + P): the mean over
    the heads of the last cross-attention."""
    part = next(layer.cross_attention for layer in reversed(net.qformer.layers)
                if layer.cross_attention is not None)
    seen = []
    part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        net.features(pixels)
        x, source = seen[0]
        q = part.query(x).unflatten(-1, (part.n_heads, -1)).transpose(1, 2)  # (1, H, Q, D)
        k = part.key(source).unflatten(-1, (part.n_heads, -1)).transpose(1, 2)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]


def qformer(run: Path):
    """What the queries attend to in the picture, and what the words of the description attend to
    through the queries."""
    net, path, meta = vision.load(run / "minigpt4")
    tokenizer, picture = data.Tokenizer(path), toy_picture()[1]
    pixels = vision.preprocess(picture, net.vit.config.image_size)[None]
    of_queries = cross_attention(net.eval(), pixels)[:, 1:]  # (Q, P)
    vectors = net.encode(pixels).detach()
    asked = data.Turn("user", data.IMAGE_INSTRUCTIONS[0], slots=net.n_queries)
    prompt = data.render(data.Conversation([asked]), meta["template"], tokenizer).tokens
    said = [i for (i,) in net.generate([prompt], 24, images=pixels)]
    slots = [i for i, token in enumerate(prompt) if token == data.IMAGE_SLOT]
    maps = [inside.forward_textbook(net.llama, prompt + said, layer, vectors)[1].mean(0)
            for layer in range(net.llama.config.n_layers)]
    to_slots = torch.stack(maps).mean(0)[len(prompt) - 1:-1, slots]  # (words, Q)
    of_words = to_slots @ of_queries  # (words, P)
    shown = [(f"query {i + 1}", row) for i, row in enumerate(of_queries)]
    shown += list(zip(texts_of(tokenizer, said), of_words))[:20]
    n_rows = math.ceil(len(shown) / 10)
    figure, axes = subplots(n_rows, 10, width=12, height=1.5 * n_rows)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, row) in zip(axes, shown):
        side, n = len(picture), round(len(row) ** 0.5)
        axis.imshow(picture, extent=(0, side, side, 0))
        axis.imshow(row.view(n, n), extent=(0, side, side, 0), cmap="magma", alpha=0.65)
        axis.set_title(title, size=9)
    return figure


def position_bias():
    """Three judges that review the same answers in both orders: how often the orders agree."""
    figure, (axis,) = subplots(width=7, height=2.6)
    for kind in ("oracle", "longer", "first"):
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            cfg = judge.JudgeConfig(players="noisy,oracle", judge=kind, out=out)
            biases = judge.main(cfg)["biases"]
        left = 0.0
        for figure_name, color in (("consistent", GREEN), ("first", "#e57373"),
                                   ("second", "#64b5f6")):
            share = 100 * biases[figure_name]["value"]
            axis.barh(f"judge: {kind}", share, left=left, color=color)
            if share > 4:
                axis.text(left + share / 2, f"judge: {kind}", f"{share:.0f}", ha="center",
                          va="center")
            left += share
    axis.set(xlim=(0, 100), xlabel="% of the questions", title="green: both orders agree. red: "
             "leans to the answer shown first. blue: second")
    axis.title.set_size(10)
    return figure


# -- python -m course.plots -----------------------------------------------------------------------

PLOTS = dict(rope=rope, masks=masks, sampling=sampling, schedule=schedule, patches=patches,
             judge=position_bias)
RUN_PLOTS = dict(retrieval=retrieval, lora=lora, quantization=quantization, chips=chips,
                 losses=losses, qformer=qformer)
ALL = [*PLOTS, *RUN_PLOTS]


@dataclass
class PlotsConfig:
    name: str  # rope, masks, ... (`all` draws every one)
    run: str = "out"  # output folder of the training scripts, or a checkpoint
    out: str = "plots"  # folder to write to

    def __post_init__(self):
        if self.name not in (*ALL, "all"):
            raise UserError(f"unknown plot {self.name}; choose from all, {', '.join(ALL)}")
        if self.name in PLOTS:
            refuse_unused(self, ("run",), f"{self.name} is drawn without a run")


def main(cfg: PlotsConfig) -> dict:
    """Writes NAME.png. With "all", a plot whose files are missing is left out with a message."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install matplotlib")
    out, written = Path(cfg.out), []
    out.mkdir(parents=True, exist_ok=True)
    for name in ALL if cfg.name == "all" else [cfg.name]:
        try:
            figure = PLOTS[name]() if name in PLOTS else RUN_PLOTS[name](Path(cfg.run))
        except UserError as error:
            if cfg.name != "all":
                raise
            print(f"left out {name}: {error}")
            continue
        path = out / f"{name}.png"
        figure.savefig(path, dpi=100)
        written.append(name)
        print(path)
    return dict(written=written)


if __name__ == "__main__":
    config.run(main, PlotsConfig)
