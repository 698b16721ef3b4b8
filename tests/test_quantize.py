"""Tests of tools/quantize.py: blocks byte for byte, GGUF files read back, and llama.cpp itself.

    pytest tests/test_quantize.py
    npm install node-llama-cpp --ignore-scripts --prefix=/tmp/llama     # then against llama.cpp:
    LLAMA_CPP=/tmp/llama pytest tests/test_quantize.py -k llama_cpp
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from test_convert import MICRO, assert_close, make_tokenizer, random_ids, random_llama
from tools import bench, checkpoint, convert, quantize
from toy import world


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("quantize"))


# -- blocks ---------------------------------------------------------------------------------------

def awkward_rows() -> torch.Tensor:
    """Weights that tell rounding rules apart: ties, zeros, halves, tiny and huge blocks."""
    x = torch.randn(64, 256)
    x[0] = 0
    x[1, :32] = torch.tensor([3.0, -3.0] * 16)  # which extreme is taken decides the sign of d
    x[2, :32] = torch.tensor([-3.0, 3.0] * 16)
    x[3, :32] = torch.arange(-16, 16) + 0.5  # halves, since the scale is 1
    x[3, 0] = 127
    x[4] *= 1e-6
    x[5] *= 1e4
    x[6, 1:] = 0
    return x


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_blocks_equal_llama_cpps(kind):
    """Byte for byte, against the gguf package. Another rule for halves or for the sign of d changes
    thousands of bytes."""
    gguf = pytest.importorskip("gguf")
    many = torch.randn(1500, 256) * torch.rand(1500, 1)  # more than one chunk
    weight = torch.cat([awkward_rows(), many])
    blocks = quantize.quantize_rows(weight, kind)
    theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    assert (blocks.flatten(1).numpy() == theirs).all()
    values = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[kind])
    assert (quantize.dequantize(blocks).numpy() == values).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("rows", [97, 2080])
def test_fast_kernel_equals_readable_body(kind, rows):
    """97 rows are no multiple of 16, and 2080 are several chunks. Only bfloat16 makes a
    difference."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this torch has no int4 kernel")
    blocks = quantize.quantize_rows(torch.randn(rows, 128), kind)
    readable, fast = (quantize.QuantLinear(blocks, kind, fast) for fast in (False, True))
    x = torch.randn(2, 5, 128)
    got, want = fast(x), readable(x)
    assert got.shape == want.shape == (2, 5, rows)
    assert (got - want).norm() < 0.006 * want.norm()
    assert (fast(x.bfloat16()).float() - want).norm() < 0.006 * want.norm()


@pytest.mark.parametrize("bits, kind, per_weight", [("q8", "Q8_0", 8.5), ("q4", "Q4_0", 4.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_model(bits, kind, per_weight, tied, tmp_path, tokenizer, monkeypatch):
    """Every matrix but the embedding is in blocks, and computes what its unpacked weights would."""
    net = random_llama(tokenizer.vocab_size, tied=tied)
    folder = checkpoint.save(tmp_path, net, dict(step=1, template="plain"), tokenizer.path)
    fast, _, _ = checkpoint.load(folder, quantize=bits)
    # replaced where `load` looks it up, which is another module under --impl
    readable = (False, "readable")
    monkeypatch.setitem(convert.load.__globals__, "choose_kernel", lambda device: readable)
    small, _, _ = checkpoint.load(folder, quantize=bits)
    layers = {name: layer for name, layer in small.named_modules()
              if isinstance(layer, quantize.QuantLinear)}
    assert len(layers) == 7 * 2 + 1
    assert layers.pop("output").kind == "Q8_0"
    assert {layer.kind for layer in layers.values()} == {kind}
    w1 = net.layers[0].feed_forward.w1.weight
    assert convert.size(small.layers[0].feed_forward.w1) * 8 == per_weight * w1.numel()
    expected = random_llama(tokenizer.vocab_size)
    expected.load_state_dict(net.state_dict())
    for name, layer in [*layers.items(), ("output", small.output)]:
        expected.get_submodule(name).weight.data = quantize.dequantize(layer.blocks)
    ids = random_ids(tokenizer.vocab_size)
    with torch.no_grad():
        want = expected(ids)
        assert_close(small(ids), want)
        error = (fast(ids) - want).norm() / want.norm()
    assert error < 0.05, "random weights magnify bfloat16's rounding, but not that much"


def test_kernel_is_chosen_by_trying_it(monkeypatch):
    """Where torch's int4 kernel is not for the device, or computes something else, the readable
    body is used."""
    assert not quantize.choose_kernel("cuda")[0]
    monkeypatch.setattr(quantize, "dequantize", lambda blocks, dtype: torch.ones(64, 64))
    assert not quantize.choose_kernel()[0]


# -- GGUF -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [None, "q8", "q4"])
def test_gguf_reads_back(bits, tied, tmp_path, tokenizer):
    """Every tensor, name, shape, type and key, with the gguf package's reader."""
    gguf = pytest.importorskip("gguf")
    net = random_llama(tokenizer.vocab_size + 2, tied=tied, rope_scaling=4.0)  # 2 without a piece
    folder = checkpoint.save(tmp_path, net, dict(step=1, template="vicuna_v1.1"), tokenizer.path)
    path = tmp_path / "m.gguf"
    assert quantize.write_gguf(folder, path, bits) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    names = {convert.gguf_name(name): name for name in net.state_dict()}
    if tied:
        del names["output.weight"]
    assert {t.name for t in reader.tensors} == set(names)
    matrices = {None: "F16", "q8": "Q8_0", "q4": "Q4_0"}
    for t in reader.tensors:
        want = net.state_dict()[names[t.name]]
        assert tuple(reversed(t.shape.tolist())) == tuple(want.shape) and t.data_offset % 32 == 0
        kind = matrices[bits]
        if want.dim() == 1:
            kind = "F32"
        elif bits == "q4" and t.name in ("token_embd.weight", "output.weight"):
            kind = "Q8_0"
        assert t.tensor_type.name == kind, t.name
        blocks = gguf.quants.quantize(want.numpy(), t.tensor_type)
        assert t.data.tobytes() == blocks.tobytes(), t.name
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama" and keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.scaling.factor"] == 4 and keys["llama.rope.dimension_count"] == 16
    assert keys["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert len(set(keys["tokenizer.ggml.tokens"])) == tokenizer.vocab_size + 2
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[-2:] == [5, 5]


CHATS = [
    [("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello there."), ("user", "Who's \"x\"?\n{{ 7 }} </b>")],
]


@pytest.mark.parametrize("name", ["vicuna_v1.1", "vicuna_v0", "alpaca", "koala", "oasst", "plain"])
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_spells_what_render_does(name, system, chat, tokenizer):
    """As text: the tokens are compared with llama.cpp's below."""
    jinja2 = pytest.importorskip("jinja2")
    turns = [data.Turn(role, text) for role, text in chat]
    ids = data.render(data.Conversation(turns, system=system), name, tokenizer).tokens
    messages = [dict(role=role, content=text) for role, text in chat]
    if system:
        messages.insert(0, dict(role="system", content=system))
    text = jinja2.Template(quantize.jinja(name)).render(messages=messages)
    # without spaces, since SentencePiece adds some
    assert "<s>" + text.replace(" ", "") == data.spell(tokenizer, ids).replace(" ", "")


# -- llama.cpp itself -----------------------------------------------------------------------------

needs_llama_cpp = pytest.mark.skipif("LLAMA_CPP" not in os.environ,
                                     reason="LLAMA_CPP does not name a folder of node-llama-cpp")
ODD = ["", " ", "  two", "tab\tand\nlines\r\n\n\n",
       "naïve café", "日本語のテキスト", "🙂👩‍👩‍👧", "a\u00a0b", "1234567890", "x" * 300,
       "</s> <s> <unk> <0x0A>", "USER: hi ASSISTANT:", "\u200bzero", "İstanbul ﬁ", "end ",
       "…“quotes”…", "\x00\x01", "مرحبا"]
QUESTIONS = ["Who are you?", "Tell me a story.", "What is three plus four?",
             "There is a small red square on the left. What is on the left?",
             "Hello! My name is Ada."]


def varied_texts(n: int = 200) -> list[str]:
    """Odd ones, and words of this file in random order."""
    words = Path(__file__).read_text(encoding="utf-8").split(" ")
    rng = np.random.default_rng(0)
    return ODD + [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(n - len(ODD))]


TALKER = os.environ.get("CKPT", str(MICRO))  # what is exported; a larger vocabulary is harder


@needs_llama_cpp
@torch.no_grad()
def test_llama_cpp_tokenizes_and_generates_the_same(tmp_path):
    """F16: 200 strings give the same ids, and five prompts the same 50 greedy tokens."""
    net, path, meta = checkpoint.load(TALKER)
    tokenizer, texts, prompts = data.Tokenizer(path), varied_texts(), []
    for question in QUESTIONS:
        conversation = data.Conversation([data.Turn("user", question)])
        prompts.append(data.render(conversation, meta["template"], tokenizer).tokens)
    file = tmp_path / "m.gguf"
    quantize.write_gguf(TALKER, file)
    job = dict(model=str(file), texts=texts, prompts=prompts, max_tokens=50)
    said = bench.llama_cpp(job)
    assert said["template"] == quantize.jinja(meta["template"])
    for text, ids in zip(texts, said["tokens"]):
        assert ids == tokenizer.encode(text), text
    same = 0
    for prompt, theirs in zip(prompts, said["replies"]):
        own = [i for (i,) in net.generate([prompt], 50, stop=-1)]
        assert len(own) == len(theirs) == 50
        same += own == theirs
        if own != theirs:  # only at a tie: llama.cpp computes in half precision
            at = next(i for i in range(50) if own[i] != theirs[i])
            logits = net(torch.tensor([prompt + own[:at]]), last_only=True)[0, -1]
            assert float(logits[own[at]] - logits[theirs[at]]) < 0.005, (own, theirs)
    assert same >= 4


@needs_llama_cpp
def test_llama_cpp_renders_the_same_prompt(tmp_path):
    """The chat template's text, tokenized by llama.cpp, is what the model was trained on."""
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = data.find_tokenizer(TALKER)
    quantize.write_gguf(TALKER, tmp_path / "m.gguf")
    template, texts = jinja2.Template(quantize.jinja("vicuna_v1.1")), []
    for chat in CHATS:
        messages = [dict(role=role, content=text) for role, text in chat]
        texts.append(template.render(messages=messages))
    said = bench.llama_cpp(dict(model=str(tmp_path / "m.gguf"), texts=texts, special=True))
    for chat, ids in zip(CHATS, said["tokens"]):
        conversation = data.Conversation([data.Turn(role, text) for role, text in chat])
        ours = data.render(conversation, "vicuna_v1.1", tokenizer).tokens
        assert [tokenizer.bos, *ids] == ours


@needs_llama_cpp
@pytest.mark.parametrize("bits", ["q8", "q4"])
def test_llama_cpp_agrees_on_fewer_bits(bits, tmp_path):
    """The same blocks with other kernels (llama.cpp rounds activations to 8 bits): perplexity
    within 1 %."""
    net, path, meta = checkpoint.load(TALKER, quantize=bits)
    tokenizer, rows = data.Tokenizer(path), []
    for item in world.test_set("scenes", 12):
        ids = data.render(bench.answered(item), meta["template"], tokenizer).tokens
        rows.append(ids[:net.config.max_seq_len])
    quantize.write_gguf(TALKER, tmp_path / "m.gguf", bits)
    said = bench.llama_cpp(dict(model=str(tmp_path / "m.gguf"), score=rows))
    theirs = sum(sum(nll) for nll in said["nll"])
    ours = 0.0
    with torch.no_grad():
        for row in rows:
            nll, _ = net.nll(torch.tensor([row]), torch.tensor([row]))
            ours += float(nll)
    count = sum(len(row) - 1 for row in rows)
    assert abs(math.exp((theirs - ours) / count) - 1) < 0.01, (ours / count, theirs / count)
