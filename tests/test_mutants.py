"""Tests that are known to bite: with each of these bugs planted, the named test must turn red.

A bug is (what it is, exact source text, replacement, test), listed under its file. The text must stand in the
file exactly once. The test is in tests/test_<file> unless it names another, and must fail by an assertion of its own, since a bug
that merely breaks the import proves nothing. To add a bug, add a line.

    pytest tests/test_mutants.py -k causal
"""

import io
import multiprocessing
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

import conftest
from conftest import ROOT


class Bug(NamedTuple):
    file: str
    what: str
    source: str
    replacement: str
    test: str


MODEL = [
    # the loss
    ("labels not shifted",
     "target = labels[:, 1:]", "target = labels[:, :-1]",
     "test_nll_shifts_by_one"),
    ("predictions one place too late",
     "segments)[:, :-1][wanted]", "segments)[:, 1:][wanted]",
     "test_nll_shifts_by_one"),
    ("mean instead of sum",
     'reduction="sum"', 'reduction="mean"',
     "test_mean_of_means_is_wrong"),
    ("NaN where nothing is supervised",
     'reduction="sum"', 'reduction="mean"',
     "test_nothing_supervised"),
    ("last piece of the loss lost",
     "for a, b in pieces)", "for a, b in list(pieces)[:-1])",
     "test_nll_in_pieces"),

    # the network
    ("rotary pairs of halves",
     "x.float().unflatten(-1, (-1, 2)))", "x.float().unflatten(-1, (2, -1)).mT.contiguous())",
     "test_rope_turns_neighbours"),
    ("rotary layout of Hugging Face",
     "x.float().unflatten(-1, (-1, 2)))  # (B, T, H, D/2): x[2i] + i x[2i+1]\n"
     "    turned = pairs * torch.complex(cos, sin).unsqueeze(-2)  # (.., T, 1, D/2): the same for all heads\n"
     "    return torch.view_as_real(turned)",
     "x.float().unflatten(-1, (2, -1)).mT.contiguous())\n"
     "    turned = pairs * torch.complex(cos, sin).unsqueeze(-2)\n"
     "    return torch.view_as_real(turned).mT",
     "test_equals_golden_values"),
    ("rotation the wrong way round",
     "torch.complex(cos, sin)", "torch.complex(cos, -sin)",
     "test_rope_turns_neighbours"),
    ("positions multiplied by the scaling",
     ".float() / scaling", ".float() * scaling",
     "test_rope_scaling_divides_positions"),
    ("rotary tables in the checkpoint",
     '"cos", table[0], persistent=False', '"cos", table[0]',
     "test_state_dict_has_metas_names"),
    ("norm in half precision",
     "y = x.float()\n", "y = x\n",
     "test_rmsnorm_computes_in_fp32"),
    ("norm with an eps of its own",
     "self.eps = eps", "self.eps = 1e-5",
     "test_rmsnorm_eps_is_inside_the_root"),
    ("eps outside the root",
     "y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)",
     "y / (y.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)",
     "test_rmsnorm_eps_is_inside_the_root"),
    ("the configured eps is not passed on",
     "self.attention_norm = RMSNorm(config.dim, config.norm_eps)",
     "self.attention_norm = RMSNorm(config.dim)",
     "test_equals_golden_values"),
    ("mean subtracted as in LayerNorm",
     "y = x.float()\n", "y = x.float() - x.float().mean(-1, keepdim=True)\n",
     "test_rmsnorm_by_hand"),
    ("gate and value exchanged",
     "F.silu(self.w1(x)) * self.w3(x)", "F.silu(self.w3(x)) * self.w1(x)",
     "test_equals_golden_values"),
    ("hidden_dim rounded down",
     "math.ceil(8 * self.dim / 3 / 256)", "(8 * self.dim // 3 // 256)",
     "test_published_sizes"),
    ("tied only in name",
     "if self.config.tied:", "if False:",
     "test_save_and_load"),

    # attention
    ("no division by sqrt(D)",
     "(q / math.sqrt(q.shape[-1])) @", "q @",
     "test_attention"),
    ("fused: causal from the wrong end",
     "if mask is None and 1 < T < S:", "if False:",
     "test_attention"),
    ("cache: causal from the wrong end",
     "if mask is None and 1 < T < S:", "if False:",
     "test_reading_in_chunks"),
    ("by hand: causal from the wrong end",
     "device=q.device).tril(S - T)\n    bias =", "device=q.device).tril()\n    bias =",
     "test_attention"),
    ("key/value heads dealt out in turn",
     "k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
     "k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)",
     "test_attention"),

    # packed rows
    ("logits depend on a stranger",
     "same = segments[:, :, None] == segments[:, None, :]",
     "same = segments[:, :, None] >= segments[:, None, :]",
     "test_packed_conversations_are_strangers"),
    ("loss depends on a stranger",
     "same = segments[:, :, None] == segments[:, None, :]",
     "same = segments[:, :, None] >= segments[:, None, :]",
     "test_packed_rows_equal_conversations_one_by_one"),
    ("first token learned from a stranger",
     "wanted & (segments[:, 1:] == segments[:, :-1])", "wanted",
     "test_first_token_of_a_segment_is_no_target"),
    ("positions do not restart",
     "here.expand(B, T) - first", "here.expand(B, T)",
     "test_positions_restart_in_each_segment"),
    ("checkpointing forgets the mask",
     "checkpoint(block, x, cos, sin, mask,", "checkpoint(block, x, cos, sin, None,",
     "test_checkpointing_changes_nothing"),

    # generation
    ("positions start at 0 in a filled cache",
     "torch.arange(past, past + T", "torch.arange(0, T",
     "test_cached_generation_equals_uncached"),
    ("truncate does nothing",
     "self.length = min(self.length, n)", "pass",
     "test_truncate_and_go_on"),
    ("padding is seen",
     "(S >= start[:, None, None])", "(S >= 0 * start[:, None, None])",
     "test_prompts_of_unequal_length"),
    ("a finished row goes on talking",
     "ids = torch.where(done, ids, chosen)", "ids = chosen",
     "test_stop"),
    ("top_p drops the word that crosses it",
     "p.cumsum(-1) - p", "p.cumsum(-1) - p * (p.cumsum(-1) == p)",
     "test_top_k_and_top_p_draw_from_inside_only"),
    ("temperature multiplies",
     "logits = logits / temperature", "logits = logits * temperature",
     "test_temperature_divides_logits"),
    ("penalty rewards negative logits",
     "logits * repetition_penalty)", "logits / repetition_penalty)",
     "test_repetition_penalty"),
    ("the seed is ignored",
     ".manual_seed(seed)", ".manual_seed(0)",
     "test_same_seed_same_words"),

    # images, checkpoints
    ("images in the wrong order",
     "images.to(x.dtype)", "images.flip(0).to(x.dtype)",
     "test_image_slots_are_filled_in_order"),
    ("too many images are dropped",
     "if int(slots.sum()) != n_images:", "if int(slots.sum()) > n_images:",
     "test_too_few_or_too_many_images"),
    ("a fresh network does not look near",
     "q[:, 0::2] += share * near[:, None]", "q[:, 0::2] += 0 * share * near[:, None]",
     "test_first_weights_look_at_neighbours_and_at_equals"),
    ("fresh keys differ from queries",
     "k.copy_(q[::groups])", "k.clone().copy_(q[::groups])",
     "test_first_weights_look_at_neighbours_and_at_equals"),
    ("checksums are not looked at",
     "z.testzip()", "None",
     "test_flipped_bits_are_noticed"),
]

DATA = [
    # who learns what
    ("prompt supervised",
     "goes_on and i + k > 0), False)", "goes_on and i + k > 0), True)",
     "test_only_replies_are_learned"),
    ("</s> not supervised",
     "else [tokenizer.eos], True)", "else [tokenizer.eos], False)",
     "test_only_replies_are_learned"),
    ("bos supervised",
     "[tokenizer.bos], [IGNORE]", "[tokenizer.bos], [tokenizer.bos]",
     "test_only_replies_are_learned"),
    ("padding supervised",
     "labels = np.full((len(rows), seq_len), IGNORE, np.int32)",
     "labels = np.full((len(rows), seq_len), pad, np.int32)",
     "test_padding_is_not_learned"),
    ("a space before a glued reply",
     "tokenizer.encode(turn.text, t.glued)", "tokenizer.encode(turn.text)",
     "test_string"),
    ("a space before a glued question",
     "goes_on and i + k > 0)", "False)",
     "test_string"),
    ("no space after </s> in Vicuna",
     "goes_on and i + k > 0)", "i + k > 0)",
     "test_ids"),
    ("continuation is ignored",
     'ids = self.sp.encode("\\n" + text)', "return self.sp.encode(text)",
     "test_continuation_adds_no_space"),
    ("normalised text",
     'normalization_rule_name="identity"', 'normalization_rule_name="nfkc"',
     "test_round_trip"),

    ("a base model goes on with the line of the question",
     'ask="{text}\\n", between=""', 'ask="{text}", between=""',
     "test_teacher.py::test_a_base_model_reads_plain_text_and_says_one_line"),

    # rows
    ("conversations of a row share a segment",
     "segments[r, end:end + n] = s\n", "segments[r, end:end + n] = 0\n",
     "test_packed_examples_stay_whole"),
    ("the order depends on the past",
     "if self._order[0] != epoch:", "if self._order[1] is None:",
     "test_each_epoch_has_every_row_once"),
    ("the same order in each epoch",
     "default_rng((self.seed, epoch))", "default_rng((self.seed, 0))",
     "test_each_epoch_has_every_row_once"),
    ("windows overlap",
     "labels[row, 1 + at - begin:1 + end - begin] = ids[at:end]",
     "labels[row, 1:1 + end - begin] = ids[begin:end]",
     "test_windows"),
    ("replies in another order",
     "replies[i], found = said(", "replies[group.index(i)], found = said(",
     "test_chat"),

    # files
    ("a repair is not counted",
     'done.append("mended: joined two messages of one speaker")\n', "pass\n",
     "test_data_files.py::test_bad_input"),
    ("a record that is cut off is skipped",
     "fail(error.msg, error.pos)", "return",
     "test_bad_files"),
    ("unranked replies count among rivals",
     'alone and rank(r) == float("inf")', 'rank(r) == float("inf")',
     "test_data_files.py::test_paths_through_a_tree"),
    ("the cache does not know its tokenizer",
     "digest(tokenizer.path), digest(__file__)", "digest(__file__)",
     "test_data_recipes.py::test_a_large_file_is_tokenised_once"),

    # recipes
    ("an end in mid-sentence is learned",
     'if not (extra.get("cut") and', "if not (False and",
     "test_data_recipes.py::test_a_reply_that_is_cut_has_no_end"),
    ("a long prompt cuts its neighbour's reply",
     "if len(prompts[i]) + max_new_tokens <= limit]", "]",
     "test_data_recipes.py::test_asking_near_the_end_of_the_context"),
    ("the last round is lost",
     "pieces.append(c.turns[2 * begin:])\n", "pieces = pieces or [c.turns]\n",
     "test_data_recipes.py::test_the_last_round_is_not_lost"),
    ("a rejected reply is learned like any other",
     "ask = t.ask_rejected\n", "pass\n",
     "test_data_files.py::test_sources_of_koala"),
    ("tasks that are just not too similar are dropped",
     "> 0.7 for other in kept", ">= 0.7 for other in kept",
     "test_data_files.py::test_bad_input"),
    ("Markdown is taken for HTML the second time",
     'c = replace(c, extra={**c.extra, "format": "markdown"})', "pass",
     "test_data_recipes.py::test_markdown_about_html_is_not_converted_again"),
]

SAMPLE = [
    ("the chat believes that everything was read",
     "self.read = (marks + ids)[:self.cache.length]", "self.read = marks + ids",
     "test_cache_changes_nothing"),
    ("the cache is not cut where the chat forks",
     "self.cache.truncate(same)\n", "pass\n",
     "test_undo_retry_reset"),
    ("everything is read again",
     "marks[same] == self.read[same]:", "False:",
     "test_a_turn_reads_only_what_is_new"),
    ("half a letter is printed",
     'if text.endswith("\\ufffd"):', "if False:",
     "test_streaming_is_utf8"),
]

VISION = [
    # five that read well and see wrong
    ("class token dropped",
     "x = torch.cat((self.cls_token.expand(len(x), -1, -1).type_as(x), x), dim=1)  # (N, 1+P, C)",
     "x = torch.cat((torch.zeros_like(x[:, :1]), x), dim=1)",
     "test_equals_golden_values"),
    ("queries and keys exchanged",
     "q, k, v = self.qkv(x).chunk(3, dim=-1)", "k, q, v = self.qkv(x).chunk(3, dim=-1)",
     "test_equals_golden_values"),
    ("GELU by tanh",
     "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")',
     "test_equals_golden_values"),
    ("ViT blocks with another eps",
     "self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)", "self.norm1 = nn.LayerNorm(config.dim)",
     "test_equals_golden_values"),
    ("cross-attention in the odd layers",
     "if layer % config.cross_every == 0:", "if layer % config.cross_every == 1:",
     "test_equals_golden_values"),

    # more of the network
    ("ln_vision with the ViT's eps",
     "nn.LayerNorm(config.vision_dim, 1e-5)", "nn.LayerNorm(config.vision_dim, 1e-6)",
     "test_equals_golden_values"),
    ("Q-Former with the ViT's eps",
     "norm_eps: float = 1e-12", "norm_eps: float = 1e-6",
     "test_equals_golden_values"),
    ("queries not normalised",
     "x = self.norm(self.query_tokens).expand", "x = self.query_tokens.expand",
     "test_equals_golden_values"),
    ("the last block used after all",
     "range(config.n_layers - config.penultimate)", "range(config.n_layers)",
     "test_equals_golden_values"),
    ("positions of another grid cut instead of interpolated",
     "x = x + resize_positions(self.pos_embed, height // side, width // side).type_as(x)",
     "x = x + self.pos_embed.repeat(1, 9, 1)[:, :x.shape[1]]",
     "test_equals_golden_values"),

    # what learns
    ("the Q-Former learns",
     "for part in (vit, qformer, llama):\n", "for part in (vit, llama):\n",
     "test_only_the_projection_learns"),
    ("the Q-Former in training mode",
     "        self.qformer.eval()\n", "",
     "test_only_the_projection_learns"),

    # picture files
    ("hidden colours shown",
     "image = Image.alpha_composite(Image.new(\"RGBA\", image.size, \"white\"), image)", "pass",
     "test_transparency_becomes_white"),
    ("the camera's rotation ignored",
     "to_rgb(ImageOps.exif_transpose(image))", "to_rgb(image)",
     "test_exif_rotation"),
    ("16 bits clipped",
     'white = 65535 if image.mode.startswith("I;16") else next(', "white = 255 if True else next(",
     "test_16_bits"),
    ("another filter",
     "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR",
     "test_preprocessing_equals_golden_values"),
    ("colours in another order",
     "MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])",
     "MEAN = torch.tensor([0.40821073, 0.4578275, 0.48145466])",
     "test_preprocessing_equals_golden_values"),
]

CONVERT = [
    ("q and k left in Hugging Face's order",
     'return interleave(weight, config.n_heads if "wq" in name else config.n_kv_heads)', "return weight",
     "test_hugging_face[tinyllama-False-1-True]"),
    ("k permuted as if it had all heads",
     'config.n_heads if "wq" in name else config.n_kv_heads)', "config.n_heads)",
     "test_hugging_face[tinyllama-False-1-True]"),
    ("linear rope scaling ignored",
     'float(rope["factor"]) if kind == "linear" else 1.0', "1.0",
     "test_hugging_face[vicuna-v1.5-16k-False-1-True]"),
    ("unknown tensors ignored",
     "        if unknown:\n", "        if False:\n",
     "test_bad_files[unknown tensor]"),
    ("Meta's shards in the wrong order",
     "for shard in shards], dim", "for shard in reversed(shards)], dim",
     "test_meta"),
    ("halves rounded to even",
     "codes = (whole + (2 * (scaled.abs() - whole)).floor()) * scaled.sign()", "codes = scaled.round()",
     "test_blocks_by_hand"),
    ("neighbours share a byte",
     "codes[..., :16] | codes[..., 16:] << 4", "codes[..., ::2] | codes[..., 1::2] << 4",
     "test_blocks_by_hand"),
    ("the scale of a block without its sign",
     "d = extreme / -8", "d = extreme.abs() / 8",
     "test_blocks_by_hand"),
    ("output matrix in four bits",
     'name in ("tok_embeddings.weight", "output.weight")', 'name == "tok_embeddings.weight"',
     "test_quantised_model"),
    ("low half of an eight-bit code moved by 8",
     "(low, d, 8 * d)", "(low, d, 0 * d)",
     "test_fast_kernel_equals_readable_blocks"),
    ("GGUF's dimensions in torch's order",
     "*reversed(shape)", "*shape",
     "test_gguf_reads_back"),
    ("GGUF without the padding rows' names",
     '[f"[PAD{i}]" for i in padding]', '["[PAD]" for i in padding]',
     "test_gguf_reads_back"),
]

BUGS = [Bug(file, *bug) for file, bugs in {"model.py": MODEL, "data.py": DATA, "sample.py": SAMPLE,
                                           "vision.py": VISION, "convert.py": CONVERT}.items() for bug in bugs]


def run_tests(code: str, file: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output, with the names of `code` instead of ours. Runs in its own process."""
    file.write_text(code)
    os.chdir(ROOT)
    os.environ["COLUMNS"] = "200"  # or the reason of a failure is cut off
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and some take long to import
    with redirect_stdout(io.StringIO()) as output:
        status = pytest.main([f"--impl={file}", *tests, "-x", "-q", "--tb=short", "-p", "no:cacheprovider"])
    return int(status), output.getvalue()


@pytest.fixture(scope="module")
def start(request):
    """Begins a run of tests: two at a time, in fresh processes forked from one that has imported torch."""
    if request.config.getoption("--impl"):
        pytest.skip("these tests are about our own code")
    can_fork = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(["torch", "pytest"])
    with context.Pool(2, maxtasksperchild=1) as pool:
        yield lambda *job: pool.apply_async(run_tests, job)


def node(bug: Bug) -> str:
    return f"tests/{bug.test}" if "::" in bug.test else f"tests/test_{bug.file}::{bug.test}"


@pytest.fixture(scope="module")
def runs(request, start, tmp_path_factory):
    """All of them begin before the first is waited for."""
    chosen = [item.callspec.params["bug"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_bites"]
    return {bug: start((ROOT / bug.file).read_text().replace(bug.source, bug.replacement),
                       tmp_path_factory.mktemp("bug") / bug.file, [node(bug)]) for bug in chosen}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.what}: {bug.test}")
def test_bites(bug, runs):
    found = (ROOT / bug.file).read_text().count(bug.source)
    assert found == 1, f"this text stands {found} times in {bug.file}, and must once: {bug.source!r}"
    status, output = runs[bug].get(timeout=120)
    assert status != 0, f"{bug.test} stays green although {bug.file} has this bug: {bug.what}"
    own_assertion = re.search(r"^FAILED .* - (AssertionError|assert |Failed: DID NOT RAISE)", output, re.M)
    assert status == 1 and own_assertion, f"{bug.test} did not fail by its own assertion:\n{output}"


@pytest.mark.parametrize("file", sorted({bug.file for bug in BUGS}))
def test_green_without_a_bug(file, start, tmp_path):
    """The same tests pass on a copy without a bug: it is not the copying that turns them red."""
    tests = sorted({node(bug) for bug in BUGS if bug.file == file})
    status, output = start((ROOT / file).read_text(), tmp_path / file, tests).get(timeout=120)
    assert status == 0, output


# -- --impl --------------------------------------------------------------------------------------------------

HOMEWORK = """
import torch
from torch import nn
from model import LLaMAConfig

class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight
"""


def test_one_class_of_a_student(start, tmp_path):
    """A file with nothing but a norm, its eps in the wrong place: found there, and inside our network."""
    expected = {"rmsnorm_by_hand": 0, "rmsnorm_eps_is_inside_the_root": 1, "equals_golden_values": 1}
    runs = {name: start(HOMEWORK, tmp_path / f"{name}.py", [f"tests/test_model.py::test_{name}"])
            for name in expected}
    assert {name: run.get(timeout=120)[0] for name, run in runs.items()} == expected


@pytest.mark.parametrize("text, message", [
    (None, "no such file"), ("class RMSNrom: pass", "none of our names"), ("def f(:\n", "SyntaxError"),
    ("import torch\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(line 3\)"),
    ("raise SystemExit(3)", "SystemExit")])
def test_impl_says_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "homework.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(pytest.UsageError, match=message) as caught:
        conftest.install(str(file))
    assert "\n" not in str(caught.value)
