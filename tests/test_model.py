"""Tests of model.py. Each says which mistake it is there to catch.

    pytest tests/test_model.py
    pytest tests/test_model.py --impl=my_model.py        # your own classes and functions instead
    NANOVICUNA_DATA=FOLDER pytest tests/test_model.py    # also with published weights

FOLDER holds stories260K (from karpathy/tinyllamas, in Meta's layout).
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from tools import checkpoint, machine
from tools.config import UserError

GOLDEN = Path(__file__).parent / "golden_model.json"


def tiny(**changes):
    """Two layers with grouped queries. Every weight is random: norms start at one, and a norm of
    ones could be forgotten."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, hidden_dim=48,
                 max_seq_len=64)
    m = model.LLaMA(model.LLaMAConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.25 + (p.dim() == 1))
    return m


def words(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape)


def close(got: torch.Tensor, want: torch.Tensor, story: str, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}: {story}"
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"off by {error:.1e}: {story}"  # also catches NaN


def gradients(m, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


def close_gradients(got: dict, want: dict, story: str, tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        close(gradient, want[name], f"gradient of {name}: {story}", tolerance)


# -- the whole network, against other implementations ---------------------------------------------

def hf_name(name: str) -> str:
    """Meta's name of a weight -> transformers'."""
    if name == "output.weight":
        return "lm_head.weight"
    for meta, hf in {"tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm",
                     "ffn_norm": "post_attention_layernorm", "attention.w": "self_attn.",
                     "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                     "feed_forward.w3": "mlp.up_proj"}.items():
        name = name.replace(meta, hf)
    if "self_attn" in name:
        name = name.replace(".weight", "_proj.weight")
    return "model." + name


def hf_layout(name: str, w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face rotates (x[i], x[i + D/2]) and Meta neighbors, so the rows of wq and wk are in
    another order."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return w
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


@pytest.mark.parametrize("changes", [
    dict(n_kv_heads=1, tied=True), dict(n_kv_heads=4, rope_theta=500.0, rope_scaling=4.0)], ids=str)
def test_equals_transformers(changes):
    """Logits, loss, and every gradient."""
    transformers = pytest.importorskip("transformers")
    m, tokens = tiny(**changes), words(2, 12)
    c = m.config
    linear = dict(rope_type="linear", factor=c.rope_scaling)
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        vocab_size=c.vocab_size, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_scaling=linear, use_cache=False,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tied)).eval()

    def theirs(tensors) -> dict[str, torch.Tensor]:
        return {hf_name(name): hf_layout(name, t, c.head_dim) for name, t in tensors.items()}

    twin.load_state_dict(theirs(m.state_dict()))
    want = twin(tokens, labels=tokens)
    their_loss = want.loss * 22  # transformers' is a mean over 2 x 11 predictions
    close(m(tokens), want.logits, "logits differ from transformers'")
    loss, _ = m.nll(tokens, tokens)
    close(loss, their_loss, "the loss differs from transformers'")
    ours = theirs(gradients(m, loss))
    close_gradients(ours, gradients(twin, their_loss), "differs from transformers'", 2e-5)


STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the \
park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do."""


def test_a_published_model_tells_its_story():
    """What llama2.c's own test expects of these weights, word for word."""
    folder = Path(os.environ.get("NANOVICUNA_DATA", "no such folder")) / "stories260K"
    if not folder.is_dir():
        pytest.skip("NANOVICUNA_DATA names no folder with stories260K")
    m, tokenizer, _ = checkpoint.load(folder)
    assert data.Tokenizer(tokenizer).decode(say(m, [1], 120)).startswith(STORY)


def by_formula(sizes: dict):
    """Weights without a random generator, so that they are the same in any version of torch. The
    angle grows with n^2, because the plain sin(n) would make matrices of rank two."""
    m = model.LLaMA(model.LLaMAConfig(**sizes)).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(m.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            wave = torch.sin(0.37 * n * n + i)
            scale = 3e-3 if "embeddings" in name else 0.25
            p.copy_(1 + 0.3 * wave if p.dim() == 1 else scale * wave)
    return m


def test_equals_golden_values():
    """The same without transformers. If only this is red: rotary pairs? eps? heads per group?
    gate?"""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    m, tokens = by_formula(golden["config"]), torch.tensor(golden["tokens"])
    assert m.state_dict().keys() == golden["gradient_norm"].keys(), "Meta's names, and no tables"
    logits = torch.tensor(golden["logits[:, :, :8]"])
    close(m(tokens)[:, :, :8], logits, "logits differ from the golden ones")
    loss, _ = m.nll(tokens, tokens)
    close(loss, torch.tensor(golden["nll"]), "the loss differs from the golden one")
    for name, g in gradients(m, loss).items():
        norm = torch.tensor(golden["gradient_norm"][name])
        close(g.norm(), norm, f"the gradient of {name} has another norm", 2e-5)


@pytest.mark.parametrize("name, count", [
    ("7B", 6738415616), ("13B", 13015864320), ("30B", 32528943616), ("65B", 65285660672)])
def test_published_sizes(name, count):
    """Fails when hidden_dim is not 2/3 of 4 x dim, rounded *up* to a multiple of 256, or when there
    is a bias somewhere."""
    assert model.count_parameters(model.LLaMAConfig(**model.PRESETS[name])) == count


def test_impossible_shapes_are_refused():
    for wrong in (dict(dim=34, n_heads=4), dict(dim=36, n_heads=4), dict(n_heads=4, n_kv_heads=3)):
        with pytest.raises(UserError):
            model.LLaMAConfig(**wrong)


def test_train_flops():
    """Counted by torch during a real step, but for attention: it is causal, and torch counts what
    lies above the diagonal, too. 128 supervised tokens, since nll pads to multiples of that."""
    m, tokens = tiny(max_seq_len=129), words(1, 129)
    m.set_fused(False)  # the fused kernel is not counted on a CPU
    with FlopCounterMode(display=False) as counter:
        m.nll(tokens, tokens)[0].backward()
    upper_half = 2 * 3 * m.config.n_layers * 129 * 129 * m.config.dim
    expected = machine.train_flops(m.config, tokens=129, supervised=128, seq_len=129)
    assert counter.get_total_flops() == expected + upper_half


# -- initialization -------------------------------------------------------------------------------

def test_plain_initialization():
    """Normal with std 0.6 / sqrt(fan-in), smaller where a block writes into the residual stream."""
    c = model.LLaMAConfig(dim=96, n_layers=3, n_heads=4, vocab_size=400, hidden_dim=256)
    matrices = [(name, p) for name, p in model.LLaMA(c).named_parameters() if p.dim() == 2]
    for name, p in matrices:
        std = 0.6 / math.sqrt(p.shape[1])
        if name.endswith(("wo.weight", "w2.weight")):
            std /= math.sqrt(6)
        z = p.detach() / std
        assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.04, name


@torch.no_grad()
def test_retrieval_init_attends_to_recent_and_to_identical_tokens():
    """Before any training, layer 0 spends most of its attention on the last three tokens and passes
    on what it finds; in later layers the same word weighs more than another, also 40 tokens
    away."""
    c = model.LLaMAConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=500,
                          rope_theta=500.0)
    m = model.LLaMA(c, retrieval_init=True)
    tokens, scores = torch.randperm(500)[None, :80].clone(), []
    tokens[0, 70:75] = tokens[0, 30:35]
    for layer in m.layers:  # the scores of each layer if it came first
        x = layer.attention_norm(m.tok_embeddings(tokens))
        q, k = layer.attention.wq(x).view(1, 80, -1, 64), layer.attention.wk(x).view(1, 80, -1, 64)
        q, k = (model.apply_rope(y, m.cos[:80], m.sin[:80]).transpose(1, 2) for y in (q, k))
        scores.append(q[0] @ k[0].repeat_interleave(2, dim=0).mT / 8)  # (H, T, T)
    future = torch.ones(80, 80, dtype=torch.bool).triu(1)
    weights = scores[0].masked_fill(future, -math.inf).softmax(-1)
    recent = sum(weights.diagonal(-distance, 1, 2)[:, 20:].mean(1) for distance in range(3))
    assert (recent > 0.7).all()
    wv, wo = m.layers[0].attention.wv.weight, m.layers[0].attention.wo.weight
    close(wv @ wv.T, 0.33 ** 2 * torch.eye(len(wv)), "wv is orthogonal")
    for member in wo.view(256, 2, 2, 64).unbind(2):  # of each group, one query head
        assert torch.equal(member.flatten(1), wv.T), "wo = wv^T"
    first = scores[1][::2]  # of each group: its keys are copies of this head's queries
    again = first.diagonal(-40, 1, 2)[:, 30:35].mean(1)
    others = first[:, 70:75, 20:60].mean((1, 2))
    assert (again > others + 0.5).all(), "the same word 40 tokens ago weighs no more than any other"


# -- building blocks ------------------------------------------------------------------------------

def test_rmsnorm_by_hand():
    """No mean is subtracted (LayerNorm would give zeros here); the weight multiplies after
    dividing."""
    norm = model.RMSNorm(2, 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    x = torch.tensor([[3.0, 3.0], [1.0, 7.0]])  # root mean squares 3 and 5
    want = torch.tensor([[1.0, 10.0], [0.2, 14.0]])
    close(norm(x), want, "x / sqrt(mean(x^2)) * weight", 1e-6)


def test_rmsnorm_eps_is_inside_the_root():
    """x / sqrt(mean(x^2) + eps), with the eps that was asked for. Small inputs show it."""
    x = torch.full((8,), 1e-3)
    close(model.RMSNorm(8, 3e-6)(x), x / 2e-3, "eps belongs under the root, and is the one given")


def test_rmsnorm_computes_in_fp32():
    """A row of equal numbers is its own root mean square, so the result is exactly 1. With squares
    rounded to bfloat16 it is 0.996 or 1.008."""
    x = (1 + torch.arange(128) / 128).bfloat16()  # all bfloat16 numbers from 1 to 2
    y = model.RMSNorm(64, 1e-6)(x[:, None].expand(128, 64))
    assert y.dtype == torch.bfloat16, "what comes in as bfloat16 leaves as bfloat16"
    assert (y == 1).all(), "squares in half precision: convert to fp32 first, back last"


def test_rope_rotates_neighbors():
    """Meta's form: neighbors (x[2i], x[2i+1]) are a complex number, turned by t / theta^(2i/D).
    Hugging Face pairs x[i] with x[i + D/2]; mixed up, a model runs and talks nonsense. Vicuna-16k
    divides positions by 4."""
    x = torch.randn(2, 50, 3, 8)
    numbers = torch.view_as_complex(x.view(2, 50, 3, 4, 2))
    angles = torch.arange(50)[:, None] / 4 / 100.0 ** (torch.arange(0, 8, 2) / 8)  # (T, D/2)
    want = torch.view_as_real(numbers * torch.exp(1j * angles)[:, None]).flatten(3)
    cos, sin = model.rope_table(50, 8, 100.0, scaling=4.0)
    close(model.apply_rope(x, cos, sin), want, "the rotary embedding")


def test_a_half_precision_model():
    """.bfloat16() converts buffers, too: from position 256 on, the slow pairs of the rotary table
    could not tell neighbors apart. The loss is summed in fp32."""
    m, tokens = tiny(max_seq_len=512), words(2, 12)
    cos, (want, _) = m.cos.clone(), m.nll(tokens, tokens)
    close(m.bfloat16().cos, cos, "the rotary table lost its precision with the weights", 1e-6)
    loss, _ = m.nll(tokens, tokens)
    assert loss.dtype == torch.float32
    close(loss, want, "far from the fp32 loss", 0.03)


@pytest.mark.parametrize("T, S", [(6, 6), (1, 7), (3, 8)])
def test_attention(T, S):
    """T queries are the *last* T of S positions: a kernel's own is_causal puts them first, which
    T = S and T = 1 do not show. True in a mask means "may attend"; some libraries mean the
    opposite."""
    q = torch.randn(1, 4, T, 8) * 3
    k, v = torch.randn(2, 1, 2, S, 8)  # two query heads share one of keys and values
    causal = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    random = torch.rand(T, S) < 0.5
    random[:, 0] = True  # every query attends to something
    for mask, visible in ((None, causal), (random, random)):
        heads = []
        for h in range(4):
            scores = q[0, h] @ k[0, h // 2].T / math.sqrt(8)
            scores[~visible] = -math.inf
            heads.append(scores.softmax(-1) @ v[0, h // 2])
        for fused in (False, True):
            got = model.attention(q, k, v, mask, fused)
            close(got, torch.stack(heads)[None], f"mask={mask is not None}, fused={fused}")


# -- the cache and generation ---------------------------------------------------------------------

def say(m, prompt: list[int], n: int, **options) -> list[int]:
    return [i for (i,) in m.generate([prompt], n, **{"stop": -1, **options})]


@torch.no_grad()
def test_reading_in_chunks():
    """Several tokens fed to a filled cache: their positions start at cache.length, and they attend
    to all of it."""
    m, tokens = tiny(), words(2, 16)
    cache = model.KVCache(m.config, batch=2)
    logits = [m(piece, cache=cache) for piece in tokens.split(5, dim=1)]
    close(torch.cat(logits, dim=1), m(tokens), "5 at a time differ from all at once")


def test_cached_generation_equals_uncached():
    """Token for token, against a forward that reads everything again. Temperature 0, top_k=1 and a
    top_p near 0 are the same thing: the most likely word."""
    m, prompt = tiny(), words(6).tolist()
    said = say(m, prompt, 20)
    assert len(set(said)) > 5, "too dull an answer to prove anything"
    assert m(torch.tensor([prompt + said]))[0, 5:-1].argmax(-1).tolist() == said
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=0.0)):
        assert say(m, prompt, 20, temperature=1.0, **options) == said, options


def test_generation_continues_from_a_cache():
    """What the cache holds is a prefix of the prompt and is not read again, even when it holds all
    of it. What was truncated, where a chat forks, leaves no trace."""
    m = tiny()
    prompt = words(8).tolist()
    want = say(m, prompt, 10)
    for held in (3, 7, 8):
        cache = model.KVCache(m.config)
        with torch.no_grad():
            m(torch.tensor([prompt[:held] + words(5).tolist()]), cache=cache)
        cache.truncate(held)
        assert cache.length == held
        assert say(m, prompt, 10, cache=cache) == want, f"{held} of 8 tokens were in the cache"


def test_prompts_of_unequal_length():
    """They are padded on the left, and padding must be invisible: each row says what it says
    alone."""
    m = tiny()
    prompts = [words(n).tolist() for n in (3, 9, 1, 6)]
    together = list(zip(*m.generate(prompts, 12, stop=-1)))
    for prompt, said in zip(prompts, together):
        assert list(said) == say(m, prompt, 12), f"the others disturb the prompt of {len(prompt)}"


def test_stop():
    """The stop token is yielded, then nothing. A row that is done repeats it while the others
    finish."""
    m = tiny()
    prompts = [words(4).tolist(), words(4).tolist()]
    first, second = (say(m, p, 12) for p in prompts)
    stop = next(i for i in first if i not in second)
    end = first.index(stop) + 1
    assert say(m, prompts[0], 12, stop=stop) == first[:end], "it ends with the stop token"
    assert list(m.generate_textbook(prompts[0], 12, stop)) == first[:end]
    rows = [list(row) for row in zip(*m.generate(prompts, 12, stop=stop))]
    assert rows[0] == first[:end] + [stop] * (12 - end), "a finished row only repeats it"
    assert rows[1] == second, "the other row continues undisturbed"


@pytest.mark.parametrize("options, inside", [
    (dict(top_k=3), 3), (dict(top_p=0.6), 2), (dict(temperature=0.5), 5)], ids=str)
def test_sample(options, inside):
    """How often each of five words is drawn. top_p keeps the word that crosses the threshold."""
    p = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05])
    given = {**dict(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0), **options}
    order = torch.tensor([3, 0, 4, 1, 2])  # the likeliest is not the first
    logits, seen = p.log()[order].expand(8000, 5), torch.zeros(8000, 5, dtype=torch.bool)
    drawn = model.sample(logits, seen, generator=torch.Generator().manual_seed(1), **given)
    want = p ** (1 / given["temperature"])
    want[inside:] = 0
    got = torch.bincount(drawn, minlength=5)[order.argsort()] / 8000
    assert (got - want / want.sum()).abs().max() < 0.02, got
    assert not got[inside:].any(), "drawn from outside"


@pytest.mark.parametrize("options", [
    dict(temperature=1e-38), dict(temperature=1e-6), dict(repetition_penalty=1e38),
    dict(repetition_penalty=1e-38), dict(top_p=1e-300), dict(top_k=10 ** 30)], ids=str)
def test_options_near_zero_draw_the_likeliest_word(options):
    """Divided by 1e-38, logits are infinite: a traceback of torch.multinomial."""
    given = {**dict(temperature=0.7, top_k=1, top_p=1.0, repetition_penalty=1.0), **options}
    logits, seen = torch.tensor([[-1.0, 5.0, 20.0, 3.0]]), torch.zeros(1, 4, dtype=torch.bool)
    seen[0, 2] = options.get("repetition_penalty", 1) < 1
    drawn = model.sample(logits, seen, generator=torch.Generator().manual_seed(1), **given)
    assert drawn.tolist() == [2]


def test_same_seed_same_words():
    m, prompt = tiny(), [1, 5, 9]
    first = say(m, prompt, 12, temperature=1.0, seed=1)
    torch.manual_seed(77)  # other code's random numbers must not matter
    assert say(m, prompt, 12, temperature=1.0, seed=1) == first
    assert say(m, prompt, 12, temperature=1.0, seed=2) != first


def test_repetition_penalty():
    """CTRL's rule: positive logits of words in the text are divided, negative ones multiplied
    (dividing those would reward repetition). The prompt counts as text."""
    seen = torch.tensor([[True, False, False]])
    for logits in ([2.0, 1.5, -9.0], [-1.0, -1.5, -9.0]):
        assert model.sample(torch.tensor([logits]), seen, 0, 0, 1.0, 2.0, None).tolist() == [1]
    prompt = words(20).tolist()
    said = say(tiny(), prompt, 10, repetition_penalty=1e6)
    assert len({*prompt, *said}) == len({*prompt}) + 10, "so high a penalty forbids repetition"


def test_the_context_has_an_end():
    """A small cache ends the answer; a large one does not make the context longer than the rotary
    table."""
    m = tiny(max_seq_len=16)
    for prompt in (words(16).tolist(), []):
        with pytest.raises(UserError, match="prompt"):
            say(m, prompt, 4)
    with pytest.raises(UserError, match="16"):
        m(words(1, 17), cache=model.KVCache(m.config, max_len=99))
    prompt, small = words(10).tolist(), model.KVCache(m.config, max_len=12)
    assert len(say(m, prompt, 100)) == 6, "an answer ends where the context ends"
    assert len(say(m, prompt, 100, cache=small)) == 2


# -- the loss and packed rows ---------------------------------------------------------------------

def test_nll_shifts_by_one():
    """A network that counts: after n it says n + 1 with probability 0.3, anything else with 0.1.
    Labels align with their tokens, and the model shifts. Shifted twice or not at all, each word
    costs ln 10. The loss is a sum: only the caller knows how many tokens the whole step has."""
    m = tiny(dim=8, n_heads=1, n_kv_heads=1, vocab_size=8)
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)  # every block adds nothing
        m.tok_embeddings.weight.copy_(torch.eye(8))  # its root mean square is sqrt(1/8)
        m.output.weight.copy_(torch.eye(8).roll(1, dims=0) * math.log(3) / math.sqrt(8))
    tokens = torch.tensor([[2, 3, 4, 5]])
    for nll in (m.nll, m.nll_textbook):
        loss, count = nll(tokens, tokens)
        assert count == 3, "four tokens are three predictions: nothing predicts the first"
        assert loss.item() == pytest.approx(-3 * math.log(0.3), abs=1e-4)
        loss, count = nll(tokens, torch.tensor([[-100, -100, 4, -100]]))
        assert count == 1 and loss.item() == pytest.approx(-math.log(0.3), abs=1e-4)


def packed():
    """Two rows: three conversations and two positions of padding; two conversations. Also where
    each segment is: (row, mask)."""
    tokens = words(2, 100)
    segments = torch.tensor([[0] * 25 + [1] * 53 + [2] * 20 + [3] * 2, [0] * 60 + [1] * 40])
    labels = tokens.masked_fill(torch.rand(2, 100) < 0.2, -100)
    labels[0, 98:] = -100
    parts = [(row, segments[row] == s) for row in (0, 1) for s in segments[row].unique().tolist()]
    return tokens, labels, segments, parts


@pytest.mark.parametrize("in_parts", [False, True])
def test_nll_equals_textbook(in_parts):
    """The same sum, count and gradients as logits, shift and cross-entropy over everything. The
    gradient of the images is what the projection in front of the language model learns from."""
    m = tiny(max_seq_len=128).train()
    tokens, labels, segments, _ = packed()
    tokens[0, 30:33] = tokens[1, 3:5] = model.IMAGE_SLOT
    labels = labels.masked_fill(tokens == model.IMAGE_SLOT, -100)
    m.images = torch.nn.Parameter(torch.ones(5, 32))
    want, n = m.nll_textbook(tokens, labels, m.images, segments)
    assert n > 128, "one chunk is not enough to test chunks"
    textbook = gradients(m, want)
    assert textbook["images"].any(dim=1).all()
    if in_parts:
        m.checkpointing = True
        m.config.vocab_size = 2 ** 25  # a lie: the size of the chunks is computed from it
    loss, count = m.nll(tokens, labels, m.images, segments)
    assert count == n
    close(loss, want, "another loss than the textbook's")
    close_gradients(gradients(m, loss), textbook, "another gradient than the textbook's")


def test_nothing_supervised():
    """A conversation cut before its first answer. 0/0 would put NaN into every weight, for good."""
    m, tokens = tiny(), words(2, 6)
    loss, count = m.nll(tokens, torch.full_like(tokens, -100))
    assert (loss.item(), int(count)) == (0.0, 0)
    for name, g in gradients(m, loss).items():  # with None, other processes would wait for ever
        assert g.isfinite().all() and not g.any(), f"gradient of {name} must be zero"


def test_packed_rows_equal_conversations_one_by_one():
    """Loss and gradients. When red, conversations attend to each other, or the first word of one is
    predicted from the last of the one before it."""
    m = tiny(max_seq_len=128)
    tokens, labels, segments, parts = packed()
    labels[0, 25] = tokens[0, 25]
    alone = [m.nll(tokens[row, here][None], labels[row, here][None]) for row, here in parts]
    want = sum(loss for loss, _ in alone)
    grads = gradients(m, want)
    loss, count = m.nll(tokens, labels, segments=segments)
    assert count == sum(n for _, n in alone), "a segment's first token must not be a target"
    close(loss, want, "packed and alone differ")
    close_gradients(gradients(m, loss), grads, "packed and alone differ")


@torch.no_grad()
def test_positions_restart_in_each_segment():
    """Rotary scores know distances only, so on paper this changes nothing; but no conversation
    should begin at position 2,000. Positions past the longest segment are never used."""
    m = tiny(max_seq_len=128)
    tokens, _, segments, _ = packed()
    m.cos[60:], m.sin[60:] = math.nan, math.nan  # the longest segment has 60 tokens
    logits = m(tokens, segments=segments)
    assert logits.isfinite().all(), "positions count on into the next conversation"


# -- images ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_image_slots_are_filled_in_order():
    """Vectors that are the embeddings of words must act as these words: row after row, left to
    right."""
    m, tokens = tiny(), words(2, 8)
    slots = torch.zeros(2, 8, dtype=torch.bool)
    slots[0, 2:5] = slots[1, 6] = True
    images = m.tok_embeddings.weight[tokens[slots]]
    with_slots = tokens.masked_fill(slots, model.IMAGE_SLOT)
    close(m(with_slots, images), m(tokens), "image vectors are in the wrong slots", 1e-6)


@pytest.mark.parametrize("shape", [(1, 32), (3, 32), (2, 64)])
def test_images_that_do_not_fit_the_slots(shape):
    """If the two slots were filled with whatever there is, a picture would end up in the wrong
    sentence."""
    with pytest.raises(UserError, match="image"):
        tiny()(torch.tensor([[1, -1, -1, 5]]), torch.randn(shape))


# -- LoRA -----------------------------------------------------------------------------------------

def test_lora_begins_at_the_base_model_and_merges_exactly():
    """Only adapters are trained. The merged weights are a plain LLaMA that computes the same."""
    m, tokens = tiny(), words(2, 20)
    before = m(tokens)
    model.add_lora(m, 4)
    assert torch.equal(m(tokens), before), "B is zero"
    trained = {name: p for name, p in m.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name in m.state_dict() if ".lora_" in name}
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.2)
    merged, adapters = model.merge_lora(m.state_dict())
    assert adapters.keys() == trained.keys()
    plain = tiny()
    plain.load_state_dict(merged)
    close(plain(tokens), m(tokens), "merged and separate adapters differ")


def test_lora_by_hand():
    """[6]: W x + (alpha / r) B A x, with alpha / r = 2. A is random with std 1 / sqrt(in)."""
    wide = model.LoRALinear(torch.nn.Linear(400, 8, bias=False), rank=100)
    assert abs(wide.lora_a.std() * 20 - 1) < 0.05 and not wide.lora_b.any()
    linear = torch.nn.Linear(3, 2, bias=False)
    lora = model.LoRALinear(linear, rank=1)
    lora.lora_a.data, lora.lora_b.data = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0], [-1]])
    x = torch.tensor([1.0, 1, 1])
    close(lora(x), linear(x) + torch.tensor([12.0, -12]), "W x + 2 B A x")
