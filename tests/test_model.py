"""Tests of model.py. Each says which mistake it is there to catch.

    pytest tests/test_model.py
    pytest tests/test_model.py --impl=my_model.py     # your own classes and functions instead of ours
    python tests/test_model.py                        # writes golden_model.json anew (needs transformers)
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the last of the three lines above
import config  # noqa: E402
import model  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_model.json"


def tiny(**changes):
    """Two layers, grouped queries, every weight random: initial norms are ones, and could be forgotten."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, hidden_dim=48, max_seq_len=64)
    m = model.LLaMA(model.LLaMAConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn_like(p) * 0.25 + (p.dim() == 1))
    return m


def words(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape)


def close(got: torch.Tensor, want: torch.Tensor, story: str, tolerance: float = 1e-5) -> None:
    """Largest difference, relative to the largest value."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} instead of {tuple(want.shape)}: {story}"
    got, want = got.detach().double(), want.detach().double()
    off = float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))
    assert off <= tolerance, f"off by {off:.1e}, allowed is {tolerance:.0e}: {story}"  # also catches NaN


def gradients(m, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


# -- the whole network, against another implementation -------------------------------------------------------

def hf_name(name: str) -> str:
    for ours, theirs in {"tok_embeddings": "model.embed_tokens", "attention_norm": "input_layernorm",
                         "ffn_norm": "post_attention_layernorm", "attention.w": "self_attn.",
                         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                         "feed_forward.w3": "mlp.up_proj"}.items():
        name = name.replace(ours, theirs)
    if "self_attn" in name:
        name = name.replace(".weight", "_proj.weight")
    name = {"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(name, name)
    return name.replace("layers.", "model.layers.") if name.startswith("layers.") else name


def hf_layout(name: str, w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face turns (x[i], x[i + D/2]), Meta neighbours: the rows of wq and wk are in another order."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return w
    return w.view(-1, head_dim // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def hf_twin(m):
    """The same network, built by transformers from the same weights."""
    transformers = pytest.importorskip("transformers")
    c = m.config
    linear = {"rope_type": "linear", "factor": c.rope_scaling} if c.rope_scaling != 1 else None
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
        vocab_size=c.vocab_size, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, rope_scaling=linear, use_cache=False,
        max_position_embeddings=c.max_seq_len, tie_word_embeddings=c.tied)).eval()
    twin.load_state_dict({hf_name(n): hf_layout(n, w, c.head_dim) for n, w in m.state_dict().items()})
    return twin


def hf_nll(twin, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = twin(tokens).logits
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("changes", [
    dict(n_kv_heads=4), dict(n_kv_heads=2), dict(n_kv_heads=1), dict(tied=True),
    dict(rope_theta=500.0), dict(rope_scaling=4.0),
    dict(norm_eps=1e-5, embedding=1e-3), dict(norm_eps=1e-6, embedding=1e-3)], ids=str)
def test_equals_transformers(changes):
    """Logits and every gradient. With embeddings near 1 a wrong eps would not show, so some are near 1e-3."""
    changes = dict(changes)
    scale = changes.pop("embedding", None)
    m = tiny(**changes)
    if scale:
        m.tok_embeddings.weight.data.mul_(scale / 0.25)
    twin, tokens = hf_twin(m), words(2, 12)
    want, their_loss = hf_nll(twin, tokens)
    for fused in (True, False):
        m.set_fused(fused)
        close(m(tokens), want, "logits differ from transformers'")
        loss, count = m.nll(tokens, tokens)
        assert count == 2 * 11
        close(loss, their_loss, "the loss differs from transformers'")
        mine, theirs = gradients(m, loss), gradients(twin, hf_nll(twin, tokens)[1])
        for name, g in mine.items():
            g = hf_layout(name, g, m.config.head_dim)
            close(g, theirs[hf_name(name)], f"gradient of {name} differs", 2e-5)


def by_formula(sizes: dict):
    """Weights without a random generator, so that any version of torch has the same ones.

    A chirp (the angle grows with n^2), because the plain sin(n) would make matrices of rank two.
    """
    m = model.LLaMA(model.LLaMAConfig(**sizes)).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(m.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            wave = torch.sin(0.37 * n * n + i)
            p.copy_(1 + 0.3 * wave if p.dim() == 1 else wave * (3e-3 if "embeddings" in name else 0.25))
    return m


def write_golden() -> None:
    """The truth is transformers' network, not ours."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, hidden_dim=48, norm_eps=1e-5,
                 rope_theta=10000.0, max_seq_len=32)
    tokens = torch.tensor([[1, 17, 42, 63, 5, 5, 30, 2], [1, 8, 9, 10, 50, 33, 21, 60]])
    m = by_formula(sizes)
    twin = hf_twin(m)
    logits, loss = hf_nll(twin, tokens)
    grads = gradients(twin, loss)
    golden = {
        "about": "weights: by_formula() in test_model.py; values: transformers.LlamaForCausalLM in fp32",
        "config": sizes, "tokens": tokens.tolist(), "nll": round(loss.item(), 5),
        "logits[:, :, :8]": [[[round(x, 7) for x in row[:8]] for row in rows] for rows in logits.tolist()],
        "gradient_norm": {n: float(f"{grads[hf_name(n)].norm():.7g}") for n, _ in m.named_parameters()}}
    text = json.dumps(golden).replace(', "', ',\n "').replace('], [', '],\n  [')
    GOLDEN.write_text(text + "\n")


def test_equals_golden_values():
    """The same without transformers. If only this is red: rotary pairs? eps? heads per group? gate?"""
    golden = json.loads(GOLDEN.read_text())
    m, tokens = by_formula(golden["config"]), torch.tensor(golden["tokens"])
    for fused in (True, False):
        m.set_fused(fused)
        logits = torch.tensor(golden["logits[:, :, :8]"])
        close(m(tokens)[:, :, :8], logits, "logits differ from the golden ones")
        loss, count = m.nll(tokens, tokens)
        assert count == 14
        close(loss, torch.tensor(golden["nll"]), "the loss differs from the golden one")
        for name, g in gradients(m, loss).items():
            norm = torch.tensor(golden["gradient_norm"][name])
            close(g.norm(), norm, f"the gradient of {name} has another norm", 2e-5)


def test_state_dict_has_metas_names():
    """For a published consolidated.00.pth to load strictly: these names, no others (no rotary tables)."""
    layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm",
             "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm"]
    names = ["tok_embeddings.weight", *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in layer),
             "norm.weight", "output.weight"]
    for tied in (False, True):
        assert sorted(tiny(tied=tied).state_dict()) == sorted(names)


@pytest.mark.parametrize("name, count", [("7B", 6738415616), ("13B", 13015864320), ("30B", 32528943616),
                                         ("65B", 65285660672)])
def test_published_sizes(name, count):
    """Fails when hidden_dim is not 2/3 of 4 x dim rounded *up* to 256, or when there is a bias somewhere."""
    with torch.device("meta"):
        m = model.LLaMA(model.LLaMAConfig(**model.PRESETS[name]))
    assert sum(p.numel() for p in m.parameters()) == count


def test_a_fresh_network_knows_nothing():
    """The loss is a little above ln V. Far above, first weights are too large; below, it sees the answer."""
    m = model.LLaMA(model.LLaMAConfig(dim=64, n_layers=4, n_heads=2, vocab_size=1000, hidden_dim=128))
    loss, count = m.nll(tokens := torch.randint(0, 1000, (4, 64)), tokens)
    assert -0.05 < (loss / count).item() - math.log(1000) < 0.5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_first_weights_look_at_neighbours_and_at_equals(kv_heads):
    """Before any training: layer 0 spends most of its attention on the last three tokens and hands them on; in later
    layers the same word weighs more than another, also 40 tokens away."""
    m = model.LLaMA(model.LLaMAConfig(dim=256, n_layers=2, n_heads=4, n_kv_heads=kv_heads, vocab_size=500, rope_theta=500.0))
    m.requires_grad_(False)
    tokens, seen = torch.randperm(500)[None, :80].clone(), []
    tokens[0, 70:75] = tokens[0, 30:35]
    for layer in m.layers:  # what each would score if it came first
        a, x = layer.attention, layer.attention_norm(m.tok_embeddings(tokens))
        q, k = (model.apply_rope(w(x).view(1, 80, -1, 64), m.cos[:80], m.sin[:80]).transpose(1, 2) for w in (a.wq, a.wk))
        seen.append(q @ k.repeat_interleave(4 // kv_heads, dim=1).mT / 8)
    near = seen[0].masked_fill(~torch.ones(80, 80, dtype=torch.bool).tril(), float("-inf")).softmax(-1)  # (1, H, T, S)
    assert all(sum(near[0, h, 20:].diagonal(20 - d)[:60].mean() for d in range(3)) > 0.7 for h in range(4))
    first = seen[1][0, ::4 // kv_heads]  # of each group: its keys are copies of this head's queries
    again = torch.stack([first[:, t, t - 40] for t in range(70, 75)]).mean()
    others = first[:, 70:75, 20:60].mean()
    assert again > others + 0.5, "the same word 40 tokens ago weighs no more than any other"
    a = m.layers[0].attention
    copied = a.wo.weight.view(256, 4, 64) - a.wv.weight.view(kv_heads, 64, 256).repeat_interleave(4 // kv_heads, 0).permute(2, 0, 1)
    assert copied.abs().max() == 0


def test_impossible_shapes_are_refused():
    for wrong in (dict(dim=30, n_heads=4), dict(dim=36, n_heads=4), dict(n_heads=4, n_kv_heads=3)):
        with pytest.raises(config.Problem):
            model.LLaMAConfig(**wrong)


# -- RMSNorm -------------------------------------------------------------------------------------------------

def test_rmsnorm_by_hand():
    """No mean is subtracted (that would be LayerNorm: zeros here); the weight multiplies after dividing."""
    norm = model.RMSNorm(2, 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    x = torch.tensor([[3.0, 3.0], [1.0, 7.0]])  # root mean squares 3 and 5
    close(norm(x), torch.tensor([[1.0, 10.0], [0.2, 14.0]]), "x / sqrt(mean(x^2)) * weight", 1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rmsnorm_eps_is_inside_the_root(eps):
    """x / sqrt(mean(x^2) + eps), with the eps that was asked for. Small inputs show it."""
    norm, x = model.RMSNorm(8, eps), torch.full((8,), 1e-3)
    close(norm(x), x / math.sqrt(1e-6 + eps), "eps belongs under the root, and is the one given", 1e-6)
    assert not norm(torch.zeros(8)).any(), "zeros must stay zeros (NaN: eps is missing)"


def test_rmsnorm_computes_in_fp32():
    """A row of equal numbers is its own root mean square: the result is exactly 1. With squares rounded to
    bfloat16 it is 0.996 or 1.008, and in float16 the square of 300 is infinite."""
    x = (1 + torch.arange(128) / 128).bfloat16()[:, None].expand(128, 64)  # all numbers from 1 to 2 there are
    naive = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert (naive != 1).any(), "this test has lost its teeth"
    norm = model.RMSNorm(64, 1e-6)
    y = norm(x)
    assert y.dtype == torch.bfloat16, "what comes in as bfloat16 leaves as bfloat16"
    assert (y == 1).all(), "squares in half precision: convert to fp32 first, back last"
    assert (norm(torch.full((64,), 300.0, dtype=torch.float16)) == 1).all(), "300^2 overflows in float16"


# -- rotary embedding ----------------------------------------------------------------------------------------

def test_rope_table_values():
    """Angle t / theta^(2i/D): the first pair turns by 1 a position, the last slowest."""
    cos, sin = model.rope_table(50, 8, 100.0)
    assert cos.shape == sin.shape == (50, 4)
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 100 ** (2 * i / 8)
            assert cos[t, i] == pytest.approx(math.cos(angle), abs=1e-5), f"cos at position {t}, pair {i}"
            assert sin[t, i] == pytest.approx(math.sin(angle), abs=1e-5), f"sin at position {t}, pair {i}"


def test_rope_turns_neighbours():
    """Meta's files pair (x0, x1), (x2, x3), ...; Hugging Face pairs (x0, x4), (x1, x5), ... and permutes the
    weights. Mixing them up gives a model that runs, and talks nonsense."""
    cos, sin = model.rope_table(3, 8, 10000.0)
    for place, partner, sign in ((0, 1, 1), (1, 0, -1), (6, 7, 1)):
        x = torch.zeros(1, 3, 1, 8)
        x[..., place] = 1.0
        want = torch.zeros(1, 3, 1, 8)
        want[0, :, 0, place], want[0, :, 0, partner] = cos[:, place // 2], sign * sin[:, place // 2]
        close(model.apply_rope(x, cos, sin), want, f"x[{place}] must turn together with x[{partner}]", 1e-6)


def test_rope_scores_depend_on_the_distance_only():
    cos, sin = model.rope_table(300, 8)
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)

    def turn(x: torch.Tensor, t: int) -> torch.Tensor:
        return model.apply_rope(x, cos[t:t + 1], sin[t:t + 1])

    def score(i: int, j: int) -> torch.Tensor:
        return (turn(q, i) * turn(k, j)).sum(-1)

    for shift in (1, 50, 280):
        close(score(9 + shift, 4 + shift), score(9, 4), "the same distance has another score", 1e-4)
    assert not torch.allclose(score(9, 4), score(4, 9)), "the order of two words makes no difference"
    assert torch.equal(turn(q, 0), q), "position 0 is not turned"


def test_rope_scaling_divides_positions():
    """Vicuna-16k reads position 4t as LLaMA reads t. Multiplying instead is the likely slip."""
    for scaled, plain in zip(model.rope_table(32, 8, 10000.0, 4.0), model.rope_table(8, 8, 10000.0)):
        close(scaled[::4], plain, "positions are divided by the scaling", 1e-6)


def test_rope_with_positions_of_its_own_for_each_row():
    """In packed or padded batches, cos and sin are (B, T, D/2)."""
    cos, sin = model.rope_table(20, 8)
    x, where = torch.randn(2, 3, 2, 8), torch.tensor([[0, 1, 2], [7, 0, 1]])
    both = model.apply_rope(x, cos[where], sin[where])
    for row in (0, 1):
        alone = model.apply_rope(x[row:row + 1], cos[where[row]], sin[where[row]])
        close(both[row:row + 1], alone, "each row has its own positions", 1e-6)


def test_rope_keeps_its_precision_in_a_half_precision_model():
    """bfloat16 has eight bits: from position 256 on, the slow pairs could not tell neighbours apart. But
    converting a model converts its buffers too: the table must be kept out of it, or computed again."""
    m = tiny(max_seq_len=512)
    cos = m.cos.clone()
    close(m.bfloat16().cos, cos, "the rotary table lost its precision with the weights", 1e-6)
    assert m(words(1, 4)).dtype == torch.bfloat16


# -- attention -----------------------------------------------------------------------------------------------

def slow_attention(q, k, v, mask=None):
    """One query at a time, in float64: too simple to be wrong."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    y = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h * K // H].double(), v[b, h * K // H].double()
            for t in range(T):
                may = torch.arange(S) <= S - T + t if mask is None else mask[b % len(mask), 0, t]
                scores = (keys @ q[b, h, t].double() / math.sqrt(D)).masked_fill(~may, -math.inf)
                y[b, h, t] = scores.softmax(0) @ values
    return y.float()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T, S", [(1, 1), (6, 6), (1, 7), (3, 8), (7, 8)])
def test_attention(T, S, kv_heads):
    """T queries are the *last* T of S positions. A kernel's own is_causal puts them first, which is wrong
    when several tokens arrive at a filled cache; the usual tests, T = S and T = 1, do not notice."""
    q, k, v = torch.randn(2, 4, T, 8) * 3, torch.randn(2, kv_heads, S, 8), torch.randn(2, kv_heads, S, 8)
    want = slow_attention(q, k, v)
    close(model.attention(q, k, v, fused=False), want, "by hand: sqrt(D)? causal from which end? groups?")
    close(model.attention(q, k, v, fused=True), want, "fused: causal from which end? groups?")


def test_attention_with_a_mask():
    """True is 'may look'. Some libraries mean the opposite."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    for rows in (1, 2):
        mask = torch.rand(rows, 1, 5, 7) < 0.5
        mask[..., 3] = True  # everybody sees somebody
        want = slow_attention(q, k, v, mask)
        for fused in (False, True):
            close(model.attention(q, k, v, mask, fused=fused), want, f"boolean mask, fused={fused}")


def test_future_words_change_nothing():
    m, tokens = tiny(), words(1, 10)
    later = tokens.clone()
    later[0, 6:] = words(4)
    for fused in (True, False):
        m.set_fused(fused)
        close(m(later)[:, :6], m(tokens)[:, :6], "an earlier logit sees a later word", 1e-6)


# -- the cache and generation --------------------------------------------------------------------------------

def say(m, prompt: list[int], n: int, **options) -> list[int]:
    return [i for (i,) in m.generate([prompt], n, **{"stop": (), **options})]


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_reading_in_chunks(chunk, fused):
    """Several tokens fed to a filled cache: their positions start at cache.length, and they see all of it."""
    m, tokens = tiny(), words(2, 16)
    m.set_fused(fused)
    cache = model.KVCache(m.config, batch=2)
    pieces = [m(piece, cache=cache) for piece in tokens.split(chunk, dim=1)]
    assert cache.length == 16
    close(torch.cat(pieces, dim=1), m(tokens), f"reading {chunk} at a time differs from reading at once")


@torch.no_grad()
def test_truncate_and_go_on():
    """A chat forks: the common prefix stays in the cache, the rest is overwritten and must leave no trace."""
    m, tokens, other = tiny(), words(1, 9), words(1, 4)
    cache = model.KVCache(m.config)
    m(tokens, cache=cache)
    cache.truncate(3)
    assert cache.length == 3
    want = m(torch.cat((tokens[:, :3], other), dim=1))[:, 3:]
    close(m(other, cache=cache), want, "what was truncated is still seen")
    cache.truncate(100)
    assert cache.length == 7, "truncate(n) keeps at most n: it cannot lengthen"


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=1.0, seed=3),
    dict(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.2)], ids=str)
def test_cached_generation_equals_uncached(options):
    """Token for token: against the same network with a forward that forgets, and reads everything again."""
    m = tiny()
    prompt = words(6).tolist()
    cached = say(m, prompt, 20, **options)
    forward, past = m.forward, []

    def read_all(tokens, images=None, segments=None, cache=None, last_only=False):
        past.append(tokens)
        cache.length += tokens.shape[1]
        return forward(torch.cat(past, dim=1))[:, -1:]

    m.forward = read_all
    assert cached == say(m, prompt, 20, **options), "the cache changes what is said"
    assert len(set(cached)) > 5, "too dull an answer to prove anything"


def test_generation_goes_on_from_a_cache():
    """What the cache holds is a prefix of the prompt and is not read again, even when it holds all of it."""
    m = tiny()
    prompt = words(8).tolist()
    want = say(m, prompt, 10)
    for held in (0, 3, 7, 8):
        cache = model.KVCache(m.config)
        if held:
            with torch.no_grad():
                m(torch.tensor([prompt[:held]]), cache=cache)
        assert say(m, prompt, 10, cache=cache) == want, f"{held} of {len(prompt)} tokens were in the cache"


def test_prompts_of_unequal_length():
    """They are padded on the left, and padding must be invisible: each row says what it says alone."""
    m = tiny()
    prompts = [words(n).tolist() for n in (3, 9, 1, 6)]
    together = list(zip(*m.generate(prompts, 12, stop=())))
    for prompt, said in zip(prompts, together):
        assert list(said) == say(m, prompt, 12), f"the prompt of {len(prompt)} is disturbed by the others"


def test_stop():
    """The stop id is yielded, then nothing. A row that is done repeats it while the others finish."""
    m = tiny()
    prompts = [words(4).tolist(), words(4).tolist()]
    first, second = (say(m, p, 12) for p in prompts)
    stop = next(i for i in first if i not in second)
    end = first.index(stop) + 1
    assert say(m, prompts[0], 12, stop=(stop, 999)) == first[:end], "it must end with the stop id"
    rows = list(zip(*m.generate(prompts, 12, stop=(stop,))))
    assert list(rows[0]) == first[:end] + [stop] * (12 - end), "a finished row must only repeat its stop id"
    assert list(rows[1]) == second, "the other row goes on undisturbed"


def test_greedy_choices():
    """temperature 0, top_k=1 and a tiny top_p are the same thing: the likeliest word."""
    m = tiny()
    prompt = words(5).tolist()
    text = list(prompt)
    for _ in range(10):
        text.append(int(m(torch.tensor([text]))[0, -1].argmax()))
    want = text[5:]
    assert say(m, prompt, 10) == want
    assert say(m, prompt, 10, temperature=1.0, top_k=1) == want, "top_k=1"
    assert say(m, prompt, 10, temperature=1.0, top_p=1e-6) == want, "top_p=1e-6"


def test_top_p_keeps_at_least_one_word():
    m, prompt = tiny(), words(5).tolist()
    assert say(m, prompt, 10, temperature=1.0, top_p=0.0) == say(m, prompt, 10), "top_p=0 is greedy"


def draw(m, prompt: list[int], n: int, **options) -> torch.Tensor:
    """The first word of n answers, counted: (V,)."""
    (ids,) = m.generate([prompt] * n, 1, stop=(), **options)
    return torch.bincount(torch.tensor(ids), minlength=m.config.vocab_size)


def test_top_k_and_top_p_draw_from_inside_only():
    """And from all of the inside: top_p keeps the word that crosses the threshold."""
    m, prompt = tiny(), [1, 5, 9]
    p = m(torch.tensor([prompt]))[0, -1].softmax(-1)
    order = p.argsort(descending=True)
    drawn = draw(m, prompt, 2000, temperature=1.0, top_k=3)
    assert set(drawn.nonzero()[:, 0].tolist()) == set(order[:3].tolist()), "top_k=3"
    for top_p in (0.3, 0.6):
        inside = order[:int((p[order].cumsum(0) < top_p).sum()) + 1]
        drawn = draw(m, prompt, 4000, temperature=1.0, top_p=top_p)
        assert drawn[inside].sum() == 4000, f"top_p={top_p}: drawn from outside"
        assert drawn[inside[-1]] > 0, f"top_p={top_p}: the word that crosses the threshold belongs to the set"


def test_temperature_divides_logits():
    m, prompt = tiny(), [1, 5, 9]
    logits = m(torch.tensor([prompt]))[0, -1]
    for temperature in (0.5, 2.0):
        drawn = draw(m, prompt, 8000, temperature=temperature) / 8000
        apart = (drawn - (logits / temperature).softmax(-1)).abs().sum().item() / 2
        assert apart < 0.06, f"at temperature {temperature}, {apart:.0%} of the draws are misplaced"


def test_same_seed_same_words():
    m, prompt = tiny(), [1, 5, 9]
    first = say(m, prompt, 12, temperature=1.0, seed=1)
    torch.manual_seed(77)  # somebody else's random numbers must not matter
    assert say(m, prompt, 12, temperature=1.0, seed=1) == first
    assert say(m, prompt, 12, temperature=1.0, seed=2) != first


def test_repetition_penalty():
    """CTRL's rule: positive logits of words in the text are divided, negative ones multiplied (dividing those
    would reward repetition). The prompt counts as text."""
    m = tiny()
    text = prompt = words(6).tolist()
    for _ in range(10):
        logits = m(torch.tensor([text]))[0, -1]
        for i in set(text):
            logits[i] = logits[i] / 1.5 if logits[i] > 0 else logits[i] * 1.5
        text = text + [int(logits.argmax())]
    assert say(m, prompt, 10, repetition_penalty=1.5) == text[6:]
    logits, seen = torch.tensor([[-1.0, -1.5, -9.0]]), torch.tensor([[True, False, False]])
    assert model.sample(logits, seen, 0, 0, 1.0, 2.0, None).tolist() == [1], "negative logits are multiplied"


def test_context_has_an_end():
    m = tiny(max_seq_len=16)
    with pytest.raises(config.Problem, match="16"):
        say(m, words(17).tolist(), 4)
    with pytest.raises(config.Problem, match="16"):
        say(m, words(16).tolist(), 4)
    with pytest.raises(config.Problem, match="16"):
        m(words(1, 17))
    with pytest.raises(config.Problem):
        say(m, [], 4)
    assert len(say(m, words(10).tolist(), 100)) == 6, "an answer ends where the context ends"


def test_a_cache_has_an_end_too():
    """A small one ends the answer; a large one does not make the context longer than the rotary table."""
    m = tiny(max_seq_len=16)
    assert len(say(m, words(10).tolist(), 100, cache=model.KVCache(m.config, max_len=12))) == 2
    with pytest.raises(config.Problem, match="16"), torch.no_grad():
        m(words(1, 17), cache=model.KVCache(m.config, max_len=99))


# -- the loss ------------------------------------------------------------------------------------------------

def test_nll_shifts_by_one():
    """A network that counts: after n it says n + 1 with probability 0.3, anything else with 0.1. Labels stand
    under the tokens they name, and the model shifts. Shifted twice or not at all, each word costs ln 10."""
    m = tiny(dim=8, n_heads=1, n_kv_heads=1, vocab_size=8)
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)  # every block adds nothing
        m.tok_embeddings.weight.copy_(torch.eye(8))  # its root mean square is sqrt(1/8)
        m.output.weight.copy_(torch.eye(8).roll(1, dims=0) * math.log(3) / math.sqrt(8))
    tokens = torch.tensor([[2, 3, 4, 5]])
    loss, count = m.nll(tokens, tokens)
    assert count == 3, "four tokens are three predictions: nothing predicts the first"
    assert loss.item() == pytest.approx(-3 * math.log(0.3), abs=1e-4), "labels are shifted wrongly"
    loss, count = m.nll(tokens, torch.tensor([[-100, -100, 4, -100]]))
    assert (loss.item(), int(count)) == (pytest.approx(-math.log(0.3), abs=1e-4), 1)


def test_nll_is_a_sum_over_supervised_tokens():
    """Not a mean: only the caller knows how many tokens the whole step has."""
    m, tokens = tiny(), words(3, 10)
    labels = tokens.masked_fill(torch.rand(3, 10) < 0.5, -100)
    logp = m(tokens).log_softmax(-1)
    terms = [-logp[b, t - 1, labels[b, t]] for b in range(3) for t in range(1, 10) if labels[b, t] != -100]
    loss, count = m.nll(tokens, labels)
    assert int(count) == len(terms)
    close(loss, torch.stack(terms).sum(), "nll is the sum of -log p over the supervised tokens")


def test_nothing_supervised():
    """A conversation cut before its first answer. 0/0 would put NaN into every weight, for good."""
    m, tokens = tiny(), words(2, 6)
    loss, count = m.nll(tokens, torch.full_like(tokens, -100))
    assert (loss.item(), int(count)) == (0.0, 0)
    for name, g in gradients(m, loss).items():  # a gradient of None would leave other processes waiting
        assert g.isfinite().all() and not g.any(), f"gradient of {name} must be zero"


def test_nll_in_pieces():
    """Large vocabularies are done a few rows at a time: the same sum, the same gradients, no row lost."""
    m, tokens = tiny(max_seq_len=200), words(2, 200)
    want, count = m.nll(tokens, tokens)
    grads = gradients(m, want)
    m.config.vocab_size = 2 ** 25  # a lie: the size of the pieces is computed from it
    loss, same_count = m.nll(tokens, tokens)
    assert count == same_count == 398
    close(loss, want, "the pieces do not add up")
    for name, g in gradients(m, loss).items():
        close(g, grads[name], f"gradient of {name} in pieces")


def test_mean_of_means_is_wrong():
    """Two micro-batches, one with 19 supervised tokens and one with 2. Sum / total is the loss of the whole
    batch; in the mean of the two means, the two tokens weigh as much as the nineteen."""
    torch.manual_seed(1)
    m, tokens = tiny(), words(2, 20)
    labels = tokens.clone()
    labels[1, :18] = -100
    whole, total = m.nll(tokens, labels)
    (a, n), (b, k) = (m.nll(tokens[i:i + 1], labels[i:i + 1]) for i in (0, 1))
    assert (int(n), int(k), int(total)) == (19, 2, 21)
    close((a + b) / (n + k), whole / total, "accumulated micro-batches must equal the whole batch", 1e-6)
    assert abs(((a / n + b / k) / 2 - whole / total).item()) > 0.1, "here the two means happen to agree"


def test_checkpointing_changes_nothing():
    """Recomputing the blocks in the backward pass costs time, not accuracy; packed rows keep their mask."""
    m, tokens = tiny().train(), words(2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    want, _ = m.nll(tokens, tokens, segments=segments)
    grads = gradients(m, want)
    m.checkpointing = True
    loss, _ = m.nll(tokens, tokens, segments=segments)
    close(loss, want, "the loss changed", 1e-6)
    for name, g in gradients(m, loss).items():
        close(g, grads[name], f"gradient of {name} changed", 1e-6)


def test_bfloat16_autocast_stays_near():
    """The loss is summed in fp32 whatever the matrices are multiplied in."""
    m, tokens = tiny(), words(2, 12)
    want, _ = m.nll(tokens, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = m.nll(tokens, tokens)
    assert loss.dtype == torch.float32
    close(loss, want, "far from the fp32 loss", 0.03)


# -- packed rows ---------------------------------------------------------------------------------------------

def packed():
    """Two rows: three conversations and two places of padding; two conversations."""
    tokens = words(2, 20)
    segments = torch.tensor([[0] * 5 + [1] * 9 + [2] * 4 + [3] * 2, [0] * 12 + [1] * 8])
    labels = tokens.masked_fill(torch.rand(2, 20) < 0.3, -100)
    labels[0, 18:] = -100
    parts = [(row, segments[row] == s) for row in (0, 1) for s in segments[row].unique().tolist()]
    return tokens, labels, segments, parts


def test_packed_rows_equal_conversations_one_by_one():
    """Loss and gradients. When red, conversations see each other, or the first word of one is learned from
    the last of the one before it."""
    m = tiny()
    tokens, labels, segments, parts = packed()
    for fused in (True, False):
        m.set_fused(fused)
        alone = [m.nll(tokens[row, here][None], labels[row, here][None]) for row, here in parts]
        want = sum(loss for loss, _ in alone)
        grads = gradients(m, want)
        loss, count = m.nll(tokens, labels, segments=segments)
        assert int(count) == sum(int(n) for _, n in alone), "a segment's first token must not be a target"
        close(loss, want, "packed and alone differ")
        for name, g in gradients(m, loss).items():
            close(g, grads[name], f"gradient of {name} differs from that of the conversations one by one")


def test_first_token_of_a_segment_is_no_target():
    tokens, _, segments, parts = packed()
    _, count = tiny().nll(tokens, tokens, segments=segments)
    assert int(count) == tokens.numel() - len(parts)


@torch.no_grad()
def test_packed_conversations_are_strangers():
    """Changing one must not move the logits of the others at all."""
    m = tiny()
    tokens, _, segments, _ = packed()
    before = m(tokens, segments=segments)
    changed = tokens.clone()
    changed[0, :5] = 49 - changed[0, :5] + 3
    after = m(changed, segments=segments)
    assert not torch.equal(before[0, :5], after[0, :5])
    close(after[0, 5:], before[0, 5:], "a conversation sees the one before it in the row", 1e-6)
    close(after[1], before[1], "a conversation sees another row", 1e-6)


@torch.no_grad()
def test_positions_restart_in_each_segment():
    """Rotary scores know distances only, so on paper this changes nothing; but the first word of a
    conversation should not stand at position 2,000. Those past the longest must never be looked up."""
    m = tiny()
    tokens, _, segments, _ = packed()
    m.cos[12:], m.sin[12:] = math.nan, math.nan  # the longest has 12 tokens
    assert m(tokens, segments=segments).isfinite().all(), "positions count on into the next conversation"


@torch.no_grad()
def test_one_segment_is_no_segment():
    m, tokens = tiny(), words(2, 8)
    close(m(tokens, segments=torch.full((2, 8), 3)), m(tokens), "a row with a single conversation", 1e-6)


# -- images --------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_image_slots_are_filled_in_order():
    """Vectors that are the embeddings of words must read as these words, row after row, left to right."""
    m, tokens = tiny(), words(2, 8)
    slots = torch.zeros(2, 8, dtype=torch.bool)
    slots[0, 2:5] = slots[1, 6] = True
    images = m.tok_embeddings.weight[tokens[slots]]
    close(m(tokens.masked_fill(slots, -1), images), m(tokens), "image vectors are in the wrong places", 1e-6)
    prompt = tokens[0].tolist()
    with_slots = tokens[0].masked_fill(slots[0], -1).tolist()
    assert say(m, with_slots, 6, images=images[:3]) == say(m, prompt, 6)


def test_images_receive_gradients():
    """The projection in front of the language model learns through them."""
    m, images = tiny(), torch.randn(2, 32, requires_grad=True)
    m.nll(torch.tensor([[1, -1, -1, 5, 7]]), torch.tensor([[-100, -100, -100, 5, 7]]), images)[0].backward()
    assert images.grad.abs().sum(1).all()


@pytest.mark.parametrize("count", [None, 1, 3])
def test_too_few_or_too_many_images(count):
    """For two slots. Filling what is there, silently, is how a picture ends up in the wrong sentence."""
    with pytest.raises(config.Problem):
        tiny()(torch.tensor([[1, -1, -1, 5]]), None if count is None else torch.randn(count, 32))


@pytest.mark.parametrize("width", [16, 64])
def test_images_of_another_width(width):
    """A vector that is too wide would be cut, its rest put into the next slot."""
    with pytest.raises(config.Problem):
        tiny()(torch.tensor([[1, -1, -1, 5]]), torch.randn(2, width))


def test_images_without_slots():
    with pytest.raises(config.Problem):
        tiny()(words(1, 4), torch.randn(1, 32))


# -- checkpoints ---------------------------------------------------------------------------------------------

def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    return tmp_path / "out" / "base"


def save(folder, m, step: int, **more):
    return model.save(folder, m, {"step": step}, folder.parent.parent / "tokenizer.model", **more)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load(folder, tied):
    m = tiny(tied=tied, norm_eps=1e-5, rope_scaling=2.0)
    step = save(folder, m, 400, optimizer={"lr": torch.tensor(0.5)})
    assert sorted(p.name for p in step.iterdir()) == ["meta.json", "model.pt", "optim.pt", "tokenizer.model"]
    for where in (folder, step):  # the run, or one step of it
        loaded, tokenizer, meta = model.load(where)
        assert same_weights(m, loaded), "a round trip must be bit-equal"
        assert dataclasses.asdict(loaded.config) == dataclasses.asdict(m.config)
        assert not loaded.training, "a loaded model is ready to be used"
        assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
        assert tokenizer.read_bytes() == b"pieces" and meta["step"] == 400
    assert torch.equal(m(tokens := words(1, 5)), loaded(tokens))


def steps(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("step-"))


@pytest.mark.parametrize("order, kept", [
    ((100, 200, 300), [200, 300]), ((999_999, 1_000_000, 1_000_001), [1_000_000, 1_000_001]),
    ((300, 400, 100), None)], ids=["usual", "a million steps", "a new run in an old folder"])
def test_two_are_kept_and_the_newest_is_one(folder, order, kept):
    """By name, step-1000000 comes before step-999999; and a new run in an old folder begins below the last
    step of the old one. The newest must never be the one that is deleted."""
    for step in order:
        save(folder, newest := tiny(), step)
    loaded, _, meta = model.load(folder)
    assert meta["step"] == order[-1] and same_weights(loaded, newest), "load must find what was saved last"
    assert len(steps(folder)) == 2
    if kept:
        assert {int(name[5:]) for name in steps(folder)} == set(kept)


def test_the_same_step_again(folder):
    save(folder, tiny(), 100)
    save(folder, second := tiny(), 100)
    assert same_weights(model.load(folder)[0], second) and len(steps(folder)) == 1


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.rename", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writing failed"),
                                   KeyboardInterrupt()], ids=["disk full", "torch's disk full", "killed"])
def test_an_interrupted_save(folder, monkeypatch, error, call, step):
    """Whatever happens while writing, a complete checkpoint stays loadable, and the next save works."""
    for old in (1, 2):
        save(folder, before := tiny(), old)
    new, arguments = tiny(), []

    def fail(*given, **_):
        arguments.extend(given)
        if call == "torch.save":
            Path(given[1]).write_bytes(b"half a fi")
        raise error

    monkeypatch.setattr(call, fail)
    with pytest.raises((OSError, RuntimeError, KeyboardInterrupt)) as caught:
        save(folder, new, step)
    if call == "torch.save" and not isinstance(error, KeyboardInterrupt):
        assert isinstance(caught.value, OSError), "a full disk is a RuntimeError in torch; raise OSError"
    assert arguments, f"{call} was not called"
    monkeypatch.undo()
    loaded = model.load(folder)[0]
    assert same_weights(loaded, before) or same_weights(loaded, new), "neither the old nor the new weights"
    save(folder, new, step)
    assert same_weights(model.load(folder)[0], new)


def test_flipped_bits_are_noticed(folder):
    """torch.load does not look at the checksums in its own files: a bad disk would go unnoticed."""
    step = save(folder, m := tiny(), 1)
    file = step / "model.pt"
    good = file.read_bytes()
    weights = m.layers[0].feed_forward.w1.weight.detach().numpy().tobytes()
    at = good.index(weights) + 100
    file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
    with pytest.raises(config.Problem, match="model.pt"):
        model.load(folder)
    file.write_bytes(good[:len(good) // 2])
    with pytest.raises(config.Problem, match="model.pt"):
        model.load(folder)


def test_a_cut_meta_file_is_named(folder):
    (save(folder, tiny(), 1) / "meta.json").write_text('{"step": 1, "conf')
    with pytest.raises(config.Problem, match="meta.json"):
        model.load(folder)


def test_damage_anywhere_is_a_problem(folder):
    """Wherever a byte is wrong: either it did not matter, or there is one clear line. Never wrong weights."""
    step = save(folder, m := tiny(), 1)
    file = step / "model.pt"
    good = file.read_bytes()
    directory = good.index(b"PK\x01\x02")  # where the list of the parts begins
    for at in [*range(0, directory, 1499), *range(directory, len(good), 11)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 0xff]) + good[at + 1:])
        try:
            assert same_weights(model.load(folder)[0], m), f"byte {at} is wrong and nobody noticed"
        except config.Problem:
            pass


def test_no_checkpoint_there(folder):
    """Say what there is instead."""
    save(folder, tiny(), 1)
    with pytest.raises(config.Problem, match="base"):
        model.load(folder.parent / "bose")
    with pytest.raises(config.Problem):
        model.load(folder.parent / "no" / "such" / "place")


if __name__ == "__main__":
    write_golden()
