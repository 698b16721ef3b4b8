"""Checks of single functions by hand, for weeks of the course (course/weeks.py) that no other test
covers. Small enough to be computed on paper.

    pytest tests/test_weeks.py
    pytest --impl=my_course/week2.py -m week2     # these and others, on your own functions
"""

import math
from types import SimpleNamespace

import pytest
import torch

import data
import judge
import model
import train_sft
import vision
from test_model import close, tiny, words
from tools import inside, machine, quantize, report

MACHINE = machine.Machine("cpu", torch.float32, 1e11)


# -- week 2 ---------------------------------------------------------------------------------------

def test_rope_table_by_hand():
    """At position 1 the first pair has turned by one radian, the second by 1/10 (theta = 100)."""
    cos, sin = model.rope_table(2, 4, 100.0)
    assert cos.shape == sin.shape == (2, 2), "one angle for each position and pair"
    close(cos, torch.tensor([[1, 1], [math.cos(1), math.cos(0.1)]]), "the cosines")
    close(sin, torch.tensor([[0, 0], [math.sin(1), math.sin(0.1)]]), "the sines")


def test_apply_rope_by_hand():
    """A quarter turn takes (1, 2) to (-2, 1); no turn leaves (3, 4) where it is."""
    cos, sin = torch.tensor([[0.0, 1]]), torch.tensor([[1.0, 0]])
    got = model.apply_rope(torch.tensor([[[[1.0, 2, 3, 4]]]]), cos, sin)
    close(got, torch.tensor([[[[-2.0, 1, 3, 4]]]]), "(a cos - b sin, a sin + b cos)")


def test_rope_knows_distances_only():
    """The score of a query and a key is the same 5 and 45 tokens into the text."""
    cos, sin = model.rope_table(50, 16)
    q, k = torch.randn(2, 16)
    q, k = (model.apply_rope(v.expand(1, 50, 1, 16), cos, sin)[0, :, 0] for v in (q, k))
    close(q[45] @ k[42], q[5] @ k[2], "the same distance, another score", 1e-4)
    assert abs(q[45] @ k[42] - q[45] @ k[30]) > 1e-3, "another distance, the same score"
    close(q.norm(dim=-1), q[0].norm().expand(50), "a rotation keeps lengths")


def test_rope_as_complex_numbers():
    """At position t, pair i has turned by t / 2 * 100^(-2i/8): theta is 100, positions are halved.
    """
    c = model.LLaMAConfig(dim=16, n_heads=2, rope_theta=100.0, rope_scaling=2.0)
    x = torch.randn(9, 2, 8)
    got = inside.rotate(x, c)
    for t in range(9):
        for i in range(4):
            a, b, angle = x[t, :, 2 * i], x[t, :, 2 * i + 1], t / 2 * 100 ** (-2 * i / 8)
            close(got[t, :, 2 * i], a * math.cos(angle) - b * math.sin(angle), "the real part")
            close(got[t, :, 2 * i + 1], a * math.sin(angle) + b * math.cos(angle), "the imaginary")


def test_swiglu_by_hand():
    """w2(SiLU(w1 x) * w3 x): 3 * SiLU(2) * 5 with one channel each."""
    layer = model.FeedForward(1, 1)
    for linear, value in ((layer.w1, 2.0), (layer.w3, 5.0), (layer.w2, 3.0)):
        linear.weight.data.fill_(value)
    silu = 2 / (1 + math.exp(-2))
    close(layer(torch.ones(1)), torch.tensor([15 * silu]), "w1 makes the gate, w3 the values")


@torch.no_grad()
def test_a_block_adds_twice():
    """x + attention(norm(x)), and from there on + feed_forward(norm(...)): with parts that only
    double or triple what they get, and norms that add 1."""
    block = tiny().layers[0]
    block.attention_norm.forward = block.ffn_norm.forward = lambda x: x + 1
    block.attention.forward = lambda x, *_: 2 * x
    block.feed_forward.forward = lambda x: 3 * x
    x = torch.tensor([[[1.0]]])  # 1 + 2 * 2 = 5, and 5 + 3 * 6 = 23
    assert block(x, None, None).item() == 23


# -- week 3 ---------------------------------------------------------------------------------------

def test_causal_mask_by_hand():
    want = [[True, True, True, False], [True, True, True, True]]
    assert model.causal_mask(2, 4, "cpu").tolist() == want, "the queries are the last positions"
    assert model.causal_mask(2, 2, "cpu").tolist() == [[True, False], [True, True]]


def test_attention_by_hand():
    """Scores 0 and 2 ln 3 / sqrt(4): weights 1/4 and 3/4. The third key is hidden."""
    q, v = torch.tensor([[[[1.0, 0, 0, 0]]]]), torch.tensor([[[[0.0], [8], [100]]]])
    k = torch.zeros(1, 1, 3, 4)
    k[..., 1, 0] = k[..., 2, 0] = 2 * math.log(3)
    got = model.attention_textbook(q, k, v, torch.tensor([[True, True, False]]))
    close(got, torch.tensor([[[[6.0]]]]), "1/4 * 0 + 3/4 * 8")


def test_left_padding_by_hand():
    positions, mask = model.padded_positions_and_mask(3, 0, torch.tensor([2, 0]))
    assert positions.tolist() == [[0, 0, 0], [0, 1, 2]], "the first real token is position 0"
    assert mask.shape == (2, 1, 3, 3)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False],
                                   [False, False, True]], "no real token sees padding"
    assert mask[1, 0].tolist() == torch.ones(3, 3).tril().bool().tolist()


def test_greedy_decoding_by_hand():
    """Token for token what reading everything again would give."""
    m, text = tiny(), words(5).tolist()
    said = list(m.generate_textbook(text, 6, stop=-1))
    with torch.no_grad():
        for token in said:
            assert token == int(m(torch.tensor([text]))[0, -1].argmax())
            text.append(token)
    assert len(said) == 6 and len(list(m.generate_textbook(text[:5], 99, stop=-1))) == 59


# -- week 4 ---------------------------------------------------------------------------------------

def test_micro_batches_are_all_rows_once():
    tokens = torch.arange(10).view(5, 2)
    parts = train_sft.micro_batches((tokens, -tokens, None), 2, "cpu")
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part[0] for part in parts]), tokens)
    assert all(torch.equal(part[1], -part[0]) and part[2] is None for part in parts)


def test_clipping_keeps_the_direction():
    """The gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8)."""
    net = torch.nn.Linear(2, 1, bias=False)
    for clip, want in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        net.weight.grad = torch.tensor([[3.0, 4.0]])
        assert train_sft.clip_gradients(net, clip) == pytest.approx(5)
        assert net.weight.grad[0].tolist() == pytest.approx(want, rel=1e-4)


def test_muon_by_hand():
    """Two steps with the gradients e1 and e2. The momentum is e1, then 0.95 e1 + e2; Nesterov looks
    ahead, so that the second update has the direction 0.9025 e1 + 1.95 e2."""
    alone, momentum, want = torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4, 1)
    p = torch.nn.Parameter(torch.zeros(4, 1))
    optimizer = train_sft.Muon([dict(params=[p], in_blocks=True)], lr=0.1)
    e1, e2 = torch.eye(4)[:, :1], torch.eye(4)[:, 1:2]
    for gradient, update in ((e1, e1), (e2, 0.9025 * e1 + 1.95 * e2)):
        alone.grad, p.grad = gradient.clone(), gradient.clone()
        train_sft.muon_textbook(alone, momentum, 0.1, 0.5)
        with torch.no_grad():
            optimizer.muon_step([p], 0.1, 0.5)
        assert p.grad is None, "AdamW would take it for its own"
        direction = train_sft.orthogonalize(update[None])[0]
        want = want * (1 - 0.1 * 0.5) - 0.4 * 0.1 * 2 * direction  # sqrt(4) = 2
        close(alone, want, "muon_textbook")
        close(p, want, "Muon.muon_step")


# -- week 5 ---------------------------------------------------------------------------------------

def test_runs_by_hand():
    assert data.runs([-100, -100, 7, 8, -100]) == [(0, 2, False), (2, 4, True), (4, 5, False)]
    assert data.runs([5]) == [(0, 1, True)] and data.runs([]) == []


# -- week 6 ---------------------------------------------------------------------------------------

class Letters:
    """A tokenizer whose ids are letters: 97 is "a"."""
    eos = 2

    def decode(self, ids, continues=False):
        return ("" if continues else "^") + "".join(map(chr, ids))


def test_a_reply_ends_where_the_template_says():
    def reply(text: str, template: str):
        return data.decode_reply([2 if c == "$" else ord(c) for c in text], template, Letters())

    assert reply("yes$no", "vicuna_v1.1") == ("^yes", True)
    assert reply("yes", "alpaca") == ("yes", False)
    assert reply("yes\n###no", "vicuna_v0") == ("^yes", True)


# -- week 7 ---------------------------------------------------------------------------------------

def test_records_of_alpaca_and_its_relatives():
    def texts(record):
        return [[m["value"] for m in r["conversations"]] for r in data.parse_alpaca(record)]

    task = dict(instruction="Add.", input="1, 2", output="3")
    (found,) = data.parse_alpaca(task)
    assert found["conversations"][0]["input"] == "1, 2" and texts(task) == [["Add.", "3"]]
    dolly = dict(instruction="Add.", context="1, 2", response="3", category="math")
    (found,) = data.parse_alpaca(dolly)
    assert found["category"] == "math" and found["conversations"][1]["value"] == "3"
    seed = dict(instruction="Add.", instances=[dict(input="1", output="1"),
                                               dict(input="2", output="2")])
    assert texts(seed) == [["Add.", "1"], ["Add.", "2"]]
    assert texts(dict(task, history=[["Hi.", "Hello."]])) == [["Hi.", "Hello.", "Add.", "3"]]


@pytest.fixture(scope="module")
def micro_tokenizer():
    return data.find_tokenizer("tests/micro")


def test_rows_of_a_file(tmp_path, capsys, micro_tokenizer):
    """Every conversation, packed; what is supervised is counted aloud. Nothing supervised is an
    error, not a loss of 0/0."""
    turns = [data.Turn("user", "Who are you?"), data.Turn("assistant", "A cat.")]
    data.save_conversations([data.Conversation(turns)] * 3, tmp_path / "c.json")
    cfg = train_sft.SFTConfig(seq_len=200)
    args = tmp_path / "c.json", "vicuna_v1.1", micro_tokenizer
    rows = train_sft.conversation_rows(*args, cfg)
    example = data.render(data.Conversation(turns), "vicuna_v1.1", micro_tokenizer)
    want = sum(label != -100 for label in example.labels)
    assert (rows.labels != -100).sum() == 3 * want
    said = capsys.readouterr().out
    assert f"3 conversations, {3 * len(example.tokens)} tokens, {3 * want} supervised" in said
    with pytest.raises(train_sft.UserError, match="nothing is supervised"):
        train_sft.conversation_rows(*args, train_sft.SFTConfig(seq_len=10))


def test_validation_counts_each_token_once():
    """Seven rows in batches of three: the last batch is filled up with rows that count again."""
    net, tokens = tiny(), words(7, 12)
    rows = data.Rows(tokens.numpy(), tokens.numpy())
    with torch.no_grad():
        want, count = net.nll(tokens, tokens)
    total, n = train_sft.validate(net, rows, MACHINE, batch=3)
    assert n == count, "a repeated row was scored"
    assert total == pytest.approx(want.item(), rel=1e-5)


# -- week 8 ---------------------------------------------------------------------------------------

def test_stored_scores_by_hand():
    assert judge.two_scores([9, 8.5]) == (9.0, 8.5)
    for wrong in ([-1, -1], [11, 2], [True, 2], [1], "12", None, [1, "2"]):
        assert judge.two_scores(wrong) is None, wrong


def test_a_win_must_hold_in_both_orders():
    """The second review saw the answers the other way round: 8 7 there is a loss for the first."""
    def verdict(*scores):
        return report.outcome([SimpleNamespace(scores=s, text="") for s in scores])

    won = verdict((9, 8), (7, 8))
    assert won["verdict"] == -1 and won["agree"] and won["scores"] == [8.5, 7.5]
    split = verdict((9, 8), (8, 7))  # the judge likes what is shown first
    assert split["verdict"] == 0 and not split["agree"] and split["position"] > 0
    assert verdict((9, 8))["verdict"] == -1 and not verdict((9, 8))["swapped"]


def test_a_ratio_and_its_interval():
    """Two wins of four. All rows of a question are drawn together; nothing to divide by is None."""
    rows = [dict(id=i, win=i < 2) for i in range(4)]
    figure = report.ratio(rows, lambda r: r["win"])
    assert figure["value"] == 0.5 and figure["low"] == 0 and figure["high"] == 1
    twice = report.ratio(rows * 25, lambda r: r["win"])
    assert (twice["low"], twice["high"]) == (0, 1), "25 reviews of a question are not 25 questions"
    assert report.ratio(rows, lambda r: 1, lambda r: 0) is None


def test_biases_by_hand():
    """A judge who takes the longer of two equally right answers, and once leans to the first."""
    def row(i, verdict, longer, truth, position=0):
        return dict(id=i, swapped=True, agree=not position, position=position, longer=longer,
                    verdict=verdict, truth=truth, people={})

    rows = [row(1, 1, 1, 0), row(2, -1, -1, 0), row(3, 1, -1, 1), row(4, 0, 0, 0, position=2)]
    b = report.biases(rows)
    assert b["length"]["value"] == 1, "question 3 was decided by the truth, not by length"
    assert b["longer_wins"]["value"] == pytest.approx(2 / 3)
    assert (b["first"]["value"], b["second"]["value"], b["position"]["value"]) == (0.25, 0, 0.25)
    assert b["consistent"]["value"] == 0.75 and b["truth"]["decided"] == 1


# -- week 9 ---------------------------------------------------------------------------------------

def test_patches_are_read_row_by_row():
    """Every patch gives its mean: 1 2 / 3 4."""
    embed = vision.PatchEmbed(vision.ViTConfig(image_size=4, patch_size=2, dim=1))
    embed.proj.weight.data.fill_(1 / 12)
    embed.proj.bias.data.zero_()
    patches = torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    got = embed(patches.expand(1, 3, 4, 4))
    close(got, torch.tensor([[[1.0], [2], [3], [4]]]), "(N, 3, h, w) -> (N, P, C)")


def test_heads_attend_apart():
    """Two heads of one channel: each is an attention of its own, without a mask."""
    q, k, v = torch.randn(3, 1, 3, 2)
    heads = []
    for h in (0, 1):
        scores = q[0, :, h, None] * k[0, None, :, h]
        heads.append(scores.softmax(-1) @ v[0, :, h])
    close(vision.attend(q, k, v, 2), torch.stack(heads, -1)[None], "the heads are mixed up")


# -- week 10 --------------------------------------------------------------------------------------

def block(*values: float) -> torch.Tensor:
    """One row of one block, filled up with zeros: (1, 1, 32)."""
    x = torch.zeros(1, 1, 32)
    x[0, 0, :len(values)] = torch.tensor(values)
    return x


def test_eight_bits_by_hand():
    """The largest weight is 127 steps; half a step is rounded away from zero, as in C."""
    codes, d = quantize.decode(quantize.encode_q8(block(127.0, -2.5, 2.5, 0.4)))
    assert d.item() == 1 and codes[0, 0, :5].tolist() == [127, -3, 3, 0, 0]
    codes, d = quantize.decode(quantize.encode_q8(block()))
    assert d.item() == 0 and not codes.any()


def test_four_bits_by_hand():
    """The largest weight becomes -8, so the scale has the other sign. Byte 0 holds weights 0 and
    16."""
    x = block(4.0, -1.0, 0.2)
    x[0, 0, 16] = -3.5
    blocks = quantize.encode_q4(x)
    codes, d = quantize.decode(blocks)
    assert blocks.shape == (1, 1, 18) and d.item() == -0.5
    assert codes[0, 0, [0, 1, 2, 16]].tolist() == [-8, 2, 0, 7]
    assert blocks[0, 0, 2].item() == 0 + 16 * 15
    want = torch.tensor([4.0, -1.0, 0.0])
    close(quantize.dequantize(blocks)[0, :3], want, "code times scale")


def test_vectors_stay_and_the_ends_get_eight_bits():
    name = "layers.0.attention.wq.weight"
    assert quantize.block_type("norm.weight", (64,), "q4") == "F32"
    assert quantize.block_type(name, (64, 64), "q4") == "Q4_0"
    assert quantize.block_type(name, (64, 64), "q8") == "Q8_0"
    assert quantize.block_type(name, (64, 64), "") == "F16"
    assert quantize.block_type(name, (64, 48), "q4") == "F16", "48 is no multiple of 32"
    for end in ("tok_embeddings.weight", "output.weight"):
        assert quantize.block_type(end, (64, 64), "q4") == "Q8_0"
