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
from test_convert import MICRO, TOKENIZER, random_ids, random_llama
from test_model import close
from tools import bench, checkpoint, convert, quantize
from tools.config import UserError
from toy import world

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


@pytest.mark.parametrize("kind, tolerance", [("Q8_0", 0.012), ("Q4_0", 0.006)])
def test_fast_kernel_equals_readable_body(kind, tolerance):
    """1037 rows are two chunks, and no multiple of 16. bfloat16 makes a difference, and for eight
    bits that the kernel has one scale per row."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this torch has no int4 kernel")
    blocks = quantize.quantize_rows(torch.randn(1037, 128), kind)
    readable, fast = (quantize.QuantLinear(blocks, kind, fast) for fast in (False, True))
    x = torch.randn(2, 5, 128)
    want = readable(x)
    for got in (fast(x), fast(x.bfloat16())):
        assert got.shape == want.shape == (2, 5, 1037)
        assert (got.float() - want).norm() < tolerance * want.norm()


def test_one_scale_per_row_changes_a_weight_by_half_a_step():
    blocks = quantize.quantize_rows(awkward_rows(), "Q8_0")
    codes, scales = quantize.int8_operands(blocks)
    weight = quantize.dequantize(blocks)
    step = weight.abs().amax(1, keepdim=True) / 127
    error = codes * scales.float()[:, None] - weight
    assert (error.abs() <= 0.502 * step).all()  # the scale itself is rounded to bfloat16


@pytest.mark.parametrize("bits, kind", [("q8", "Q8_0"), ("q4", "Q4_0")])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_model(bits, kind, tied, tmp_path, monkeypatch):
    """Every matrix but the embedding is in blocks, and computes what its unpacked weights would."""
    net = random_llama(tied=tied)
    folder = checkpoint.save(tmp_path, net, dict(step=1, template="plain"), TOKENIZER.path)
    # replaced where `load` looks it up, which is another module under --impl
    readable = (False, "readable")
    monkeypatch.setitem(convert.load.__globals__, "choose_kernel", lambda device: readable)
    small, _, _ = checkpoint.load(folder, quantize=bits)
    expected = random_llama()
    expected.load_state_dict(net.state_dict())
    kinds = []
    for name, layer in small.named_modules():
        if isinstance(layer, quantize.QuantLinear):
            expected.get_submodule(name).weight.data = quantize.dequantize(layer.blocks)
            kinds.append(layer.kind)
    assert kinds == [kind] * 7 * 2 + ["Q8_0"]  # the output matrix is the last
    ids = random_ids()
    with torch.no_grad():
        close(small(ids), expected(ids), "blocks compute something else")


def test_kernel_is_chosen_by_trying_it(monkeypatch):
    """Where torch's kernels are not for the device, or compute something else, the readable body
    is used."""
    assert not quantize.choose_kernel("cuda")[0]
    monkeypatch.setattr(quantize, "dequantize", lambda blocks, dtype: torch.ones(64, 64))
    assert not quantize.choose_kernel()[0]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_slow_path_is_named_with_the_way_to_llama_cpp(capability, monkeypatch, capsys):
    """Four bits took twice as long as in llama.cpp, and nothing said so."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    checkpoint.load(MICRO, quantize="q4")
    told = f"llama.cpp is faster on this CPU: python -m tools.quantize --ckpt={MICRO} --type=q4"
    assert (told in capsys.readouterr().out) == (capability == "AVX2")


# -- GGUF -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [None, "q4"])
def test_gguf_reads_back(bits, tied, tmp_path):
    """Every tensor, name, shape, type and key, with the gguf package's reader."""
    gguf = pytest.importorskip("gguf")
    net = random_llama(vocab_size=514, tied=tied, rope_scaling=4.0)  # two rows without a piece
    folder = checkpoint.save(tmp_path, net, dict(step=1, template="vicuna_v1.1"), TOKENIZER.path)
    path = tmp_path / "m.gguf"
    assert quantize.write_gguf(folder, path, bits) == path.stat().st_size
    reader = gguf.GGUFReader(path)
    weights = {convert.gguf_name(name): w for name, w in net.state_dict().items()}
    if tied:
        del weights["output.weight"]
    assert {t.name for t in reader.tensors} == set(weights)
    for t in reader.tensors:
        want = weights[t.name]
        assert tuple(reversed(t.shape.tolist())) == tuple(want.shape) and t.data_offset % 32 == 0
        kind = "F16" if bits is None else "Q4_0"
        if want.dim() == 1:
            kind = "F32"
        elif bits and t.name in ("token_embd.weight", "output.weight"):
            kind = "Q8_0"
        assert t.tensor_type.name == kind, t.name
        blocks = gguf.quants.quantize(want.numpy(), t.tensor_type)
        assert t.data.tobytes() == blocks.tobytes(), t.name
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama" and keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.scaling.factor"] == 4 and keys["llama.rope.dimension_count"] == 16
    assert keys["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert len(set(keys["tokenizer.ggml.tokens"])) == 514
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[-2:] == [5, 5]


@pytest.mark.parametrize("bits, weight", [
    ("", 1e5), ("", float("nan")), ("q8", -1e7), ("q4", 6e5), ("q4", float("inf"))])
def test_no_weight_becomes_infinite(bits, weight, tmp_path):
    """float16 ends at 65,504, bfloat16 does not: the file held inf, and llama.cpp said nothing but
    noise. The largest that fits is kept."""
    net = random_llama()
    w2 = net.layers[1].feed_forward.w2.weight.data

    def save() -> Path:
        return checkpoint.save(tmp_path, net, dict(step=1, template="plain"), TOKENIZER.path)

    w2[0, 0] = quantize.BLOCKS[{"": "F16", "q8": "Q8_0", "q4": "Q4_0"}[bits]].largest
    quantize.write_gguf(save(), tmp_path / "m.gguf", bits)
    w2[0, 0] = weight
    folder, name = save(), "layers.1.feed_forward.w2.weight has a weight of"
    with pytest.raises(UserError, match=name):
        quantize.write_gguf(folder, tmp_path / "n.gguf", bits)
    assert not list(tmp_path.glob("n.gguf*"))
    if bits:
        with pytest.raises(UserError, match=name):
            checkpoint.load(folder, quantize=bits)


CHAT = [data.Turn("user", "Hi"), data.Turn("assistant", "Hello there."),
        data.Turn("user", "Who's \"x\"?\n{{ 7 }} </b>")]


def render_jinja(template: str, system: str | None = None) -> str:
    jinja2 = pytest.importorskip("jinja2")
    messages = [dict(role=turn.role, content=turn.text) for turn in CHAT]
    if system:
        messages.insert(0, dict(role="system", content=system))
    return jinja2.Template(quantize.jinja(template)).render(messages=messages)


@pytest.mark.parametrize("name", ["vicuna_v1.1", "vicuna_v0", "alpaca", "koala", "oasst", "plain"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_template_spells_what_render_does(name, system):
    """As text, without spaces, since SentencePiece adds some. The tokens are compared with
    llama.cpp's below."""
    ids = data.render(data.Conversation(CHAT, system=system), name, TOKENIZER).tokens
    text = "<s>" + render_jinja(name, system)
    assert text.replace(" ", "") == data.spell(TOKENIZER, ids).replace(" ", "")


@pytest.mark.parametrize("roles", [
    ["assistant", "user"], ["user", "assistant", "system", "user"], ["user", "system"],
    ["user", "user"], ["user", "assistant", "assistant"], ["system", "system", "user"], ["tool"]])
def test_chat_template_raises_where_render_would_repair(roles):
    """A greeting first, a later system text and two messages of one speaker became text that the
    model was never trained on. Published templates raise, too."""
    jinja2 = pytest.importorskip("jinja2")

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    messages = [dict(role=role, content="Hi") for role in roles]
    for name in ("vicuna_v1.1", "alpaca"):
        template = jinja2.Template(quantize.jinja(name))
        with pytest.raises(jinja2.TemplateError, match="take turns"):
            template.render(messages=messages, raise_exception=raise_exception)


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


TALKER = os.environ.get("CKPT", str(MICRO))  # what is exported; a larger vocabulary is harder


@needs_llama_cpp
@torch.no_grad()
def test_llama_cpp_tokenizes_and_generates_the_same(tmp_path):
    """F16: 200 strings (odd ones, and words of this file in random order) give the same ids, and
    of five prompts at least four the same 50 greedy tokens: llama.cpp rounds to half precision."""
    net, path, meta = checkpoint.load(TALKER)
    tokenizer, rng, prompts = data.Tokenizer(path), np.random.default_rng(0), []
    for question in QUESTIONS:
        conversation = data.Conversation([data.Turn("user", question)])
        prompts.append(data.render(conversation, meta["template"], tokenizer).tokens)
    words = Path(__file__).read_text(encoding="utf-8").split(" ")
    texts = ODD + [" ".join(rng.choice(words, 15)) for _ in range(200 - len(ODD))]
    file = tmp_path / "m.gguf"
    quantize.write_gguf(TALKER, file)
    said = bench.llama_cpp(dict(model=str(file), texts=texts, prompts=prompts, max_tokens=50))
    assert said["template"] == quantize.jinja(meta["template"])
    for text, ids in zip(texts, said["tokens"]):
        assert ids == tokenizer.encode(text), text
    same = 0
    for prompt, theirs in zip(prompts, said["replies"]):
        same += theirs == [i for (i,) in net.generate([prompt], 50, stop=-1)]
    assert same >= 4


@needs_llama_cpp
def test_llama_cpp_renders_the_same_prompt(tmp_path):
    """The chat template's text, tokenized by llama.cpp, is what the model was trained on."""
    tokenizer = data.find_tokenizer(TALKER)
    quantize.write_gguf(TALKER, tmp_path / "m.gguf")
    job = dict(model=str(tmp_path / "m.gguf"), texts=[render_jinja("vicuna_v1.1")], special=True)
    (ids,) = bench.llama_cpp(job)["tokens"]
    ours = data.render(data.Conversation(CHAT), "vicuna_v1.1", tokenizer).tokens
    assert [tokenizer.bos, *ids] == ours


@needs_llama_cpp
@pytest.mark.parametrize("bits", ["q8", "q4"])
@torch.no_grad()
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
    for row in rows:
        row = torch.tensor([row])
        ours += float(net.nll(row, row)[0])
    count = sum(len(row) - 1 for row in rows)
    assert abs(math.exp((theirs - ours) / count) - 1) < 0.01
