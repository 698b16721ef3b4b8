"""Tests that are known to bite: with each of these bugs planted, the named test must turn red.

A bug is (what it is, function, source text, replacement, test). The text must stand exactly once in
that function ("" is the whole file). The test is in the file that belongs to the bug's, unless it
names another one, and must fail by an assertion of its own: a bug that merely breaks the import
proves nothing. To add a bug, add a line.

    pytest tests/test_mutants.py -k causal
"""

import ast
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
from course import bugs


class Bug(NamedTuple):
    file: str
    what: str
    function: str
    source: str
    replacement: str
    test: str


MODEL = [
    # the loss
    ("labels not shifted", "shift_labels",
     "targets = labels[:, 1:]", "targets = labels[:, :-1]",
     "test_nll_shifts_by_one"),
    ("predictions one position too late", "LLaMA.nll",
     "segments)[:, :-1]", "segments)[:, 1:]",
     "test_nll_shifts_by_one"),
    ("mean instead of sum", "LLaMA._chunk_nll",
     'reduction="sum"', 'reduction="mean"',
     "test_nll_shifts_by_one"),
    ("NaN where nothing is supervised", "LLaMA._chunk_nll",
     'reduction="sum"', 'reduction="mean"',
     "test_nothing_supervised"),
    ("last chunk of the loss lost", "LLaMA.nll",
     "zip(x.split(chunk_rows), ", "zip(x.split(chunk_rows)[:-1], ",
     "test_nll_equals_textbook"),

    # the network
    ("rotary pairs of halves", "apply_rope",
     "a, b = pairs.unbind(-1)", "a, b = x.float().chunk(2, -1)",
     "test_rope_rotates_neighbors"),
    ("rotary layout of Hugging Face", "apply_rope",
     "(-1, 2))  # (B, T, H, D/2, 2)\n", "(2, -1)).mT\n",
     "test_equals_golden_values"),
    ("rotation in the wrong direction", "apply_rope",
     "(a * cos - b * sin, a * sin + b * cos)", "(a * cos + b * sin, b * cos - a * sin)",
     "test_rope_rotates_neighbors"),
    ("positions multiplied by the scaling", "rope_table",
     ".float() / scaling", ".float() * scaling",
     "test_rope_rotates_neighbors"),
    ("rotary tables in the checkpoint", "LLaMA.__init__",
     '"cos", cos, persistent=False', '"cos", cos',
     "test_equals_golden_values"),
    ("norm in half precision", "RMSNorm.forward",
     "y = x.float()", "y = x",
     "test_rmsnorm_computes_in_fp32"),
    ("norm with an eps of its own", "RMSNorm.__init__",
     "self.eps = eps", "self.eps = 1e-5",
     "test_rmsnorm_eps_is_inside_the_root"),
    ("eps outside the root", "RMSNorm.forward",
     "y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)",
     "y / (y.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)",
     "test_rmsnorm_eps_is_inside_the_root"),
    ("the configured eps is not passed on", "Block.__init__",
     "self.attention_norm = RMSNorm(config.dim, config.norm_eps)",
     "self.attention_norm = RMSNorm(config.dim)",
     "test_equals_golden_values"),
    ("mean subtracted as in LayerNorm", "RMSNorm.forward",
     "y = x.float()", "y = x.float() - x.float().mean(-1, keepdim=True)",
     "test_rmsnorm_by_hand"),
    ("gate and value exchanged", "FeedForward.forward",
     "F.silu(self.w1(x)) * self.w3(x)", "F.silu(self.w3(x)) * self.w1(x)",
     "test_equals_golden_values"),
    ("hidden_dim rounded down", "LLaMAConfig.__post_init__",
     "math.ceil(8 * self.dim / 3 / 256)", "(8 * self.dim // 3 // 256)",
     "test_published_sizes"),
    ("tied only in name", "LLaMA.tie",
     "if self.config.tied:", "if False:",
     "test_checkpoint.py::test_save_and_load"),

    # attention
    ("no division by sqrt(D)", "attention_textbook",
     "(q / math.sqrt(q.shape[-1])) @", "q @",
     "test_attention"),
    ("fused: causal from the wrong end", "attention",
     "if mask is None and 1 < T < S:", "if False:",
     "test_attention"),
    ("cache: causal from the wrong end", "attention",
     "if mask is None and 1 < T < S:", "if False:",
     "test_reading_in_chunks"),
    ("by hand: causal from the wrong end", "causal_mask",
     ".tril(S - T)", ".tril()",
     "test_attention"),
    ("key/value heads dealt out in turn", "attention",
     "k.repeat_interleave(n_rep, dim=1), v.repeat_interleave(n_rep, dim=1)",
     "k.repeat(1, n_rep, 1, 1), v.repeat(1, n_rep, 1, 1)",
     "test_attention"),

    # packed rows
    ("logits depend on another conversation", "packed_positions_and_mask",
     "segments[:, :, None] == segments[:, None, :]", "segments[:, :, None] >= segments[:, None, :]",
     "test_packed_rows_equal_conversations_one_by_one"),
    ("first token predicted from another conversation", "shift_labels",
     "if segments is not None:", "if False:",
     "test_packed_rows_equal_conversations_one_by_one"),
    ("positions do not restart", "packed_positions_and_mask",
     "return index - segment_start,", "return index.expand(segments.shape),",
     "test_positions_restart_in_each_segment"),
    ("checkpointing forgets the mask", "LLaMA.hidden",
     "checkpoint(block, x, cos, sin, mask,", "checkpoint(block, x, cos, sin, None,",
     "test_nll_equals_textbook"),

    # generation
    ("positions start at 0 in a filled cache", "positions_and_mask",
     "torch.arange(past, past + T", "torch.arange(0, T",
     "test_cached_generation_equals_uncached"),
    ("truncate does nothing", "KVCache.truncate",
     "self.length = min(self.length, n)", "pass",
     "test_generation_continues_from_a_cache"),
    ("padding is seen", "padded_positions_and_mask",
     "not_padding = k_pos >= n_pad[:, None, None]",
     "not_padding = k_pos >= 0 * n_pad[:, None, None]",
     "test_prompts_of_unequal_length"),
    ("a finished row goes on talking", "LLaMA.generate",
     "new = torch.where(done, stop, sampled)", "new = sampled",
     "test_stop"),
    ("top_p drops the token that crosses it", "sample",
     "before = probs.cumsum(-1) - probs",
     "before = probs.cumsum(-1) - probs * (probs.cumsum(-1) == probs)",
     "test_sample"),
    ("temperature multiplies", "sample",
     "logits = logits / temperature", "logits = logits * temperature",
     "test_sample"),
    ("penalty rewards negative logits", "sample",
     "logits * repetition_penalty)", "logits / repetition_penalty)",
     "test_repetition_penalty"),
    ("the seed is ignored", "LLaMA.generate",
     ".manual_seed(seed)", ".manual_seed(0)",
     "test_same_seed_same_words"),

    # images and initialization
    ("images in the wrong order", "LLaMA.embed",
     "images.to(x.dtype)", "images.flip(0).to(x.dtype)",
     "test_image_slots_are_filled_in_order"),
    ("too many images are dropped", "LLaMA.embed",
     "if n_slots != n_vectors:", "if n_slots > n_vectors:",
     "test_images_that_do_not_fit_the_slots"),
    ("a fresh network does not attend nearby", "init_for_retrieval",
     "wq[:, 0::2] += shift", "wq[:, 0::2] += 0 * shift",
     "test_retrieval_init_attends_to_recent_and_to_identical_tokens"),
    ("fresh keys differ from queries", "init_for_retrieval",
     "wk.copy_(wq[::n_rep])", "pass",
     "test_retrieval_init_attends_to_recent_and_to_identical_tokens"),

    # LoRA
    ("merging forgets the scale", "merge_lora",
     "LORA_SCALE * adapters", "adapters",
     "test_lora_begins_at_the_base_model_and_merges_exactly"),
    ("the base weights are not frozen", "add_lora",
     "model.requires_grad_(False)", "pass",
     "test_lora_begins_at_the_base_model_and_merges_exactly"),
]

CHECKPOINT = [
    ("checksums are not verified", "read",
     "archive.testzip() or any(p.external_attr & 16 for p in archive.infolist())", "None",
     "test_flipped_bits_are_noticed"),
]

DATA = [
    # what is supervised
    ("prompt supervised", "question_spans",
     "continues=continues)", "continues=continues, supervised=True)",
     "test_only_replies_are_supervised"),
    ("</s> not supervised", "spans",
     "Span(eos=True, supervised=turn.supervised)", "Span(eos=True)",
     "test_only_replies_are_supervised"),
    ("bos supervised", "render",
     "[tokenizer.bos], [IGNORE]", "[tokenizer.bos], [tokenizer.bos]",
     "test_only_replies_are_supervised"),
    ("padding supervised", "pack",
     "labels = np.full((len(packed), seq_len), IGNORE, np.int32)",
     "labels = np.full((len(packed), seq_len), pad, np.int32)",
     "test_padding_is_not_supervised"),
    ("a space before a reply that has none", "spans",
     "supervised=turn.supervised, continues=t.reply_continues)", "supervised=turn.supervised)",
     "test_string"),
    ("a space before a question that has none", "question_spans",
     "continues = i > 0 and t.ask_continues", "continues = False",
     "test_string"),
    ("no space after </s> in Vicuna", "question_spans",
     "continues = i > 0 and t.ask_continues", "continues = i > 0",
     "test_ids"),
    ("continues is ignored", "Tokenizer.encode",
     'ids = self.sp.encode("\\n" + text)', "return self.sp.encode(text)",
     "test_continuation_adds_no_space"),
    ("a tokenizer that normalizes is used", "Tokenizer.why_unusable",
     "!= NORMALIZED", "== None",
     "test_other_tokenizers_are_refused"),
    ("a base model goes on with the line of the question", "",
     'between="", ask="{text}\\n", end="\\n"', 'between="", ask="{text}", end="\\n"',
     "test_teacher.py::test_a_base_model_reads_plain_text_and_says_one_line"),

    # rows
    ("conversations of a row share a segment", "pack",
     "segments[r, columns] = s", "segments[r, columns] = 0",
     "test_packed_examples_stay_whole"),
    ("the order depends on the past", "Rows.row",
     "if self._epoch != epoch:", "if self._order is None:",
     "test_each_epoch_has_every_row_once"),
    ("the same order in each epoch", "Rows.row",
     "default_rng((self.seed, epoch))", "default_rng((self.seed, 0))",
     "test_each_epoch_has_every_row_once"),
    ("windows overlap", "windows",
     "labels[row, 1 + at - begin:1 + end - begin] = ids[at:end]",
     "labels[row, 1:1 + end - begin] = ids[begin:end]",
     "test_windows"),
    ("replies in another order", "generate_replies",
     "replies[i], ended[i] = decode_reply(", "replies[group.index(i)], ended[i] = decode_reply(",
     "test_generate_replies"),
    ("a long prompt cuts its neighbor's reply", "generate_replies",
     "if len(prompts[i]) + max_new_tokens <= limit]", "]",
     "test_asking_near_the_end_of_the_context"),
    ("an end in mid-sentence is supervised", "spans",
     'truncated = i == last and conversation.extra.get("cut") is True', "truncated = False",
     "test_recipes.py::test_a_reply_that_is_cut_has_no_end"),
    ("a rejected reply is learned like any other", "question_spans",
     "ask = t.ask_rejected", "pass",
     "test_recipes.py::test_sources_of_koala"),

    # files
    ("a repair is not counted", "parse_sharegpt",
     'repairs.append("repaired: merged consecutive messages of one role")', "pass",
     "test_data_files.py::test_bad_input"),
    ("a record that is cut off is skipped", "parse_json",
     "raise broken_json(path, line_number, error) from None", "return records",
     "test_data_files.py::test_bad_file"),
]

OPENASSISTANT = [
    ("unranked replies count among rivals", "is_picked",
     'is_alone and rank(reply) == float("inf")', 'rank(reply) == float("inf")',
     "test_recipes.py::test_paths_through_a_tree"),
]

SELF_INSTRUCT = [
    ("tasks that are just not too similar are dropped", "Filter.keeps",
     "> 0.7", ">= 0.7",
     "test_recipes.py::test_completions"),
]

SHAREGPT = [
    ("the last round is lost", "split",
     "[*begins[1:], len(c.turns)]", "begins[1:]",
     "test_recipes.py::test_the_last_round_is_not_lost"),
]

TRAIN_SFT = [
    ("a mean of means over the micro-batches", "loss_backward",
     "(nll * machine.world / count).backward()",
     "(nll / max(1, model.count_targets(labels, segments)) / len(parts)).backward()",
     "test_train.py::test_micro_batches_do_not_change_the_gradient"),
    ("segments are not passed on", "loss_backward",
     "segments=segments)", "segments=None)",
     "test_train.py::test_packed_conversations_are_trained_on_as_if_they_were_alone"),
    ("weight decay on vectors", "make_optimizer",
     "cfg.weight_decay if is_matrix else 0.0", "cfg.weight_decay",
     "test_train.py::test_weight_decay_is_for_matrices_only"),
    ("the first step has learning rate 0", "learning_rate",
     "(step + 1) / warm", "step / warm",
     "test_train.py::test_learning_rate_warms_up_and_ends_at_a_tenth"),
    ("Muon forgets Nesterov", "Muon.muon_step",
     "p.grad + 0.95 * state", "state",
     "test_train.py::test_muon_equals_the_textbook_matrix_by_matrix"),
    ("the cosine ends at zero", "learning_rate",
     "(cfg.min_lr + (1 - cfg.min_lr) * cosine)", "cosine",
     "test_train.py::test_learning_rate_warms_up_and_ends_at_a_tenth"),
    ("the last micro-batch is lost if it is small", "micro_batches",
     "range(0, len(batch[0]), size)", "range(0, len(batch[0]) - size + 1, size)",
     "test_weeks.py::test_micro_batches_are_all_rows_once"),

    # fine-tuning
    ("what is held out is trained on", "hold_out_a_tenth",
     "return texts[:cut], texts[cut:]", "return texts, texts[cut:]",
     "test_train.py::test_a_tenth_is_held_out"),
    ("rows that fill up the last batch are scored", "validate",
     "labels[torch.from_numpy(index >= len(rows))] = data.IGNORE", "pass",
     "test_weeks.py::test_validation_counts_each_token_once"),
]

EXAM = [
    ("one of a minimal pair is enough", "share_right",
     "a and b for a, b", "a or b for a, b",
     "test_a_minimal_pair_counts_only_if_both_are_right"),
    ("a reply that was cut off counts", "check",
     "end and world.grade(", "world.grade(",
     "test_a_reply_that_does_not_end_is_wrong"),
    ("the control changes the questions of the others", "without_scene",
     "blind.append(replace(item, turns=turns))",
     "item.turns[:] = turns\n            blind.append(item)",
     "test_without_scene_exchanges_the_scene_everywhere"),
    ("frequent words count like rare ones", "nearest_neighbor",
     "idf = np.log(len(bags) / matrix.sum(0))", "idf = np.ones(len(index), np.float32)",
     "test_the_nearest_neighbor_goes_by_rare_words"),
]

JUDGE = [
    ("the judge reads one answer twice", "judge_prompt",
     "answer_1=in_turns(said[0])", "answer_1=in_turns(said[1])",
     "test_prompts_from_a_published_file"),
    ("braces in an answer are filled in", "judge_prompt",
     'text = FIELDS.sub(lambda match: parts[match[1]], record["prompt_template"])',
     'text = record["prompt_template"]\n'
     '    for name in parts:\n'
     '        text = text.replace("{" + name + "}", parts[name])',
     "test_prompts_have_the_published_structure"),
    ("a player does not see its own answers", "player_prompt",
     '[data.Turn("user", text), data.Turn("assistant", reply.text)]', '[data.Turn("user", text)]',
     "test_a_second_turn_shows_the_first_answer_and_an_interrupted_run_resumes"),
    ("True is a score", "two_scores",
     "type(v) in (int, float)", "isinstance(v, (int, float))",
     "test_stored_scores_count_and_else_the_text_is_read"),
]

REPORT = [
    ("the second order is not turned back", "outcome",
     "scores[1] = scores[1][::-1]", "pass",
     "test_weeks.py::test_a_win_must_hold_in_both_orders"),
    ("a win in one order is enough", "outcome",
     "verdict=winners[0] if agree else 0", "verdict=winners[0]",
     "test_weeks.py::test_a_win_must_hold_in_both_orders"),
    ("ties count as decided", "agreement",
     " for x, y in votes if x and y]", " for x, y in votes]",
     "test_judge.py::test_agreement_with_and_without_ties"),
    ("the better answer counts as the longer one's win", "biases",
     'if r["swapped"] and r["truth"] == 0]', 'if r["swapped"]]',
     "test_weeks.py::test_biases_by_hand"),
    ("a coin's result is called a win", "verdict",
     'preferred["low"] <= 0.5 <= preferred["high"]', "wins == losses",
     "test_judge.py::test_a_verdict_is_claimed_only_if_the_interval_excludes_a_coin"),
    ("five wins are enough", "",
     "ENOUGH_DECIDED = 6", "ENOUGH_DECIDED = 5",
     "test_judge.py::test_a_verdict_is_claimed_only_if_the_interval_excludes_a_coin"),
    ("the loser's interval for the winner's", "interval",
     "low, high = 1 - high, 1 - low", "pass",
     "test_judge.py::test_the_evidence_for_a_verdict_is_seen_from_the_winner"),
]

SAMPLE = [
    ("the chat believes that everything was read", "Chat.stream",
     "self.cached = (marks + ids)[:self.cache.length]", "self.cached = marks + ids",
     "test_cache_changes_nothing"),
    ("the cache is not truncated where the chat forks", "Chat.stream",
     "self.cache.truncate(n_cached)", "pass",
     "test_undo_retry_reset"),
    ("everything is read again", "Chat.stream",
     "marks[n_cached] != self.cached[n_cached]", "True",
     "test_a_turn_reads_only_what_is_new"),
    ("half a character is printed", "Chat.stream",
     'if not text.endswith("\\ufffd"):', "if True:",
     "test_streaming_is_utf8"),
]

TERMINAL = [
    ("a typo gets no suggestion", "command",
     'config.suggest(name, COMMANDS, "; /help lists the commands")', '""',
     "test_sample.py::test_help_and_typos"),
    ("a changed setting is only checked", "set_option",
     "chat.cfg = dataclasses.replace(", "dataclasses.replace(",
     "test_sample.py::test_settings_change_in_the_chat"),
    ("a completion without its prompt", "print_answer",
     'echo = chat.template == "plain"', "echo = False",
     "test_sample.py::test_a_completion_follows_its_prompt"),
    ("a pipe is left at a line that says quit", "respond",
     'elif interactive and line in ("quit", "exit"):', 'elif line in ("quit", "exit"):',
     "test_sample.py::test_quit_and_exit_need_no_slash"),
    ("quit is a message", "respond",
     'elif interactive and line in ("quit", "exit"):', "elif False:",
     "test_sample.py::test_quit_and_exit_need_no_slash"),
    ("a message of several lines is cut after the first", "read_block",
     "while not text.rstrip().endswith(QUOTES):", "while False:",
     "test_sample.py::test_a_message_of_several_lines"),
    ("an open message is lost at the end of the input", "read_block",
     "contextlib.suppress(EOFError)", "contextlib.nullcontext()",
     "test_sample.py::test_a_message_of_several_lines"),
    ("the history is not written", "history",
     "readline.write_history_file(history_file())", "pass",
     "test_sample.py::test_lines_are_remembered"),
]

WEB = [
    ("a foreign Host is answered", "Handler.refuse_foreign",
     "if len(hosts) != 1 or not self.server.is_own(hosts[0]):", "if len(hosts) != 1:",
     "test_foreign_hosts_and_origins_are_refused"),
    ("a foreign Origin is answered", "Handler.refuse_foreign",
     'if origin is not None and origin != f"http://{hosts[0]}":', "if False:",
     "test_foreign_hosts_and_origins_are_refused"),
    ("the generation goes on when the client has left", "Handler.left",
     'return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""', "return False",
     "test_a_client_that_leaves_stops_the_generation[False]"),
    ("a picture may be any file of this machine", "parse_content",
     'url = image.get("url")',
     'url = image.get("url")\n'
     "            if Path(url).is_file():\n"
     "                encoded = base64.b64encode(Path(url).read_bytes())\n"
     '                url = f"data:image/png;base64,{encoded.decode()}"',
     "test_pictures_come_in_data_urls_only"),
    ("an answer that was cut is reported as finished", "Service.answer",
     'finish_reason="stop" if ended or stopped else "length"', 'finish_reason="stop"',
     "test_an_answer_says_why_it_ended"),
    ("half of a stop string is sent", "cut_at_stop",
     "if text.endswith(stop[:n]):", "if False:",
     "test_no_part_of_a_stop_string_slips_out"),
    ("every request samples with the same seed", "Service.parse",
     "settings.seed += self.n_questions", "pass",
     "test_sampling_as_the_request_says"),
    ("attention of the first layer, whatever was asked for", "Service.look_inside",
     "chat.net, tokens, layer,", "chat.net, tokens, 0,",
     "test_the_attention_shown_is_that_of_the_layer_asked_for"),
    ("the alternatives of the token after the clicked one", "Service.look_inside",
     "tokens = prompt + ids[:-1]", "tokens = prompt + ids",
     "test_a_clicked_token_is_explained_as_it_was_sampled"),
]

INSIDE = [
    ("attention of the wrong layer", "forward_textbook",
     "if i == layer:", "if i == len(net.layers) - 1:",
     "test_web.py::test_the_weights_shown_are_those_of_that_layer_and_head"),
    ("key/value heads dealt out in turn", "attend",
     "group = head * c.n_kv_heads // c.n_heads", "group = head % c.n_kv_heads",
     "test_web.py::test_the_pass_by_hand_computes_what_the_model_computes"),
    ("probabilities at another temperature", "likeliest",
     "F.softmax(logits.float(), dim=-1)", "F.softmax(logits.float() / 0.7, dim=-1)",
     "test_web.py::test_the_probabilities_are_the_models"),
]

VISION = [
    # five that read well and see wrong
    ("class token dropped", "ViT.forward",
     "cls = self.cls_token.expand(len(x), -1, -1).type_as(x)", "cls = torch.zeros_like(x[:, :1])",
     "test_equals_golden_values"),
    ("queries and keys exchanged", "ViTAttention.forward",
     "q, k, v = self.qkv(x).chunk(3, dim=-1)", "k, q, v = self.qkv(x).chunk(3, dim=-1)",
     "test_equals_golden_values"),
    ("GELU by tanh", "MLP.forward",
     "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")',
     "test_equals_golden_values"),
    ("ViT blocks with another eps", "ViTBlock.__init__",
     "self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)",
     "self.norm1 = nn.LayerNorm(config.dim)",
     "test_equals_golden_values"),
    ("cross-attention in the odd layers", "QFormerLayer.__init__",
     "if layer % config.cross_every == 0:", "if layer % config.cross_every == 1:",
     "test_equals_golden_values"),

    # more of the network
    ("ln_vision with the ViT's eps", "QFormer.__init__",
     "nn.LayerNorm(config.vision_dim, 1e-5)", "nn.LayerNorm(config.vision_dim, 1e-6)",
     "test_equals_golden_values"),
    ("Q-Former with the ViT's eps", "",
     "norm_eps: float = 1e-12", "norm_eps: float = 1e-6",
     "test_equals_golden_values"),
    ("queries not normalized", "QFormer.forward",
     "x = self.norm(self.query_tokens).expand", "x = self.query_tokens.expand",
     "test_equals_golden_values"),
    ("the last block used after all", "ViT.__init__",
     "config.n_layers - 1 if config.penultimate else config.n_layers", "config.n_layers",
     "test_equals_golden_values"),

    # what is trained
    ("the Q-Former is trained", "MiniGPT4.__init__",
     "for part in (vit, qformer, llama):", "for part in (vit, llama):",
     "test_only_the_projection_learns"),

    # picture files
    ("hidden colors shown", "to_rgb",
     'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)', "pass",
     "test_transparency_becomes_white"),
    ("the camera's rotation ignored", "open_image",
     "to_rgb(ImageOps.exif_transpose(image))", "to_rgb(image)",
     "test_exif_rotation"),
    ("16 bits clipped", "to_rgb",
     "white = 65535", "white = 255",
     "test_16_bits"),
    ("another filter", "preprocess",
     "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR",
     "test_preprocessing_equals_golden_values"),
    ("colors in another order", "",
     "MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])",
     "MEAN = torch.tensor([0.40821073, 0.4578275, 0.48145466])",
     "test_preprocessing_equals_golden_values"),
]

CONVERT = [
    ("q and k left in Hugging Face's order", "open_hugging_face",
     "return interleave(weight, config.n_heads)", "return weight",
     "test_hugging_face[tinyllama-False-1GB-True]"),
    ("k permuted as if it had all heads", "open_hugging_face",
     "interleave(weight, config.n_kv_heads)", "interleave(weight, config.n_heads)",
     "test_hugging_face[tinyllama-False-1GB-True]"),
    ("linear RoPE scaling ignored", "open_hugging_face",
     'float(rope["factor"]) if rope_type == "linear" else 1.0', "1.0",
     "test_hugging_face[vicuna-v1.5-16k-False-1GB-True]"),
    ("unknown tensors ignored", "Tensors.check_names",
     "if not re.search(ignored, name):", "if False:",
     "test_bad_files[unknown tensor]"),
    ("Meta's shards in the wrong order", "open_meta",
     "for shard in shards], dim", "for shard in reversed(shards)], dim",
     "test_meta"),
]

QUANTIZE = [
    ("halves rounded to even", "encode_q8",
     "codes = (floor + (2 * (scaled.abs() - floor)).floor()) * scaled.sign()",
     "codes = scaled.round()",
     "test_blocks_equal_llama_cpps"),
    ("neighbors share a byte", "encode_q4",
     "codes[..., :16] | codes[..., 16:] << 4", "codes[..., ::2] | codes[..., 1::2] << 4",
     "test_blocks_equal_llama_cpps"),
    ("the scale of a block without its sign", "encode_q4",
     "d = extreme / -8", "d = extreme.abs() / 8",
     "test_blocks_equal_llama_cpps"),
    ("output matrix in four bits", "block_type",
     'name in ("tok_embeddings.weight", "output.weight")', 'name == "tok_embeddings.weight"',
     "test_quantized_model"),
    ("the zero of a four-bit code moved by one", "int4_operands",
     "(codes + 8)", "(codes + 7)",
     "test_fast_kernel_equals_readable_body"),
    ("eight-bit codes rounded down", "int8_operands",
     ".round()", ".floor()",
     "test_one_scale_per_row_changes_a_weight_by_half_a_step"),
    ("GGUF's dimensions in torch's order", "write_gguf",
     "*reversed(shape)", "*shape",
     "test_gguf_reads_back"),
    ("GGUF without the padding rows' names", "vocabulary",
     'f"[PAD{i}]"', '"[PAD]"',
     "test_gguf_reads_back"),
]

FILES = {
    "model.py": MODEL, "data.py": DATA, "train_sft.py": TRAIN_SFT, "vision.py": VISION,
    "sample.py": SAMPLE, "judge.py": JUDGE, "toy/exam.py": EXAM, "tools/report.py": REPORT,
    "tools/checkpoint.py": CHECKPOINT, "tools/convert.py": CONVERT, "tools/quantize.py": QUANTIZE,
    "tools/terminal.py": TERMINAL, "tools/web.py": WEB, "tools/inside.py": INSIDE,
    "recipes/sharegpt.py": SHAREGPT, "recipes/openassistant.py": OPENASSISTANT,
    "recipes/self_instruct.py": SELF_INSTRUCT}
BUGS = [Bug(file, *bug) for file, bugs in FILES.items() for bug in bugs]


def body(code: str, function: str) -> tuple[int, int]:
    """Where the source of a function ("Class.method") begins and ends in the text of its file."""
    if not function:
        return 0, len(code)
    node = ast.parse(code)
    for name in function.split("."):
        node = next(n for n in node.body if getattr(n, "name", "") == name)
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]


def planted(bug: Bug) -> str:
    """The file's text with the bug in it."""
    code = (ROOT / bug.file).read_text(encoding="utf-8")
    begin, end = body(code, bug.function)
    count = code[begin:end].count(bug.source)
    where = f"{bug.function or 'the file'} of {bug.file}"
    assert count == 1, f"this text stands {count} times in {where}: {bug.source!r}"
    return code[:begin] + code[begin:end].replace(bug.source, bug.replacement) + code[end:]


def node(bug: Bug) -> str:
    if "::" in bug.test:
        return f"tests/{bug.test}"
    return f"tests/test_{Path(bug.file).stem}.py::{bug.test}"


def run_tests(code: str, file: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output, with the names of `code` instead of ours. Runs in a process of
    its own, without the options and plugins of the outer pytest."""
    file.write_text(code, encoding="utf-8")
    os.chdir(ROOT)
    os.environ.update(COLUMNS="200", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="")
    for name in list(os.environ):
        if name.startswith("PYTEST_XDIST"):
            del os.environ[name]
    with redirect_stdout(io.StringIO()) as output:
        status = pytest.main([f"--impl={file}", *tests, "-x", "--tb=short", "-o", "addopts=",
                              "-p", "no:cacheprovider"])
    return int(status), output.getvalue()


@pytest.fixture(scope="module")
def start(request):
    """Runs tests in a fresh process, forked from one that has imported torch."""
    if request.config.getoption("--impl"):
        pytest.skip("these tests are about our own code")
    can_fork = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(
            ["pytest", "PIL.Image", "sentencepiece", "torch.distributed.fsdp",
             "torch.distributed.checkpoint.state_dict", "torch.distributed.elastic.utils"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield lambda *job: pool.apply_async(run_tests, job).get(timeout=120)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.what}: {bug.test}")
def test_bites(bug, start, tmp_path):
    """A bug in an exercise is planted into that week's file, as `python -m course.bugs` does."""
    code = bugs.buggy_week(bug, "FILE") or planted(bug)
    status, output = start(code, tmp_path / Path(bug.file).name, [node(bug)])
    assert status != 0, f"{bug.test} stays green although {bug.file} has this bug: {bug.what}"
    own = re.search(r"^FAILED .* - (AssertionError|assert |Failed: DID NOT RAISE)", output, re.M)
    assert status == 1 and own, f"{bug.test} did not fail by its own assertion:\n{output}"


@pytest.mark.parametrize("file", sorted({bug.file for bug in BUGS}))
def test_green_without_a_bug(file, start, tmp_path):
    """The same tests pass on a copy without a bug: it is not the copying that turns them red."""
    tests = sorted({node(bug) for bug in BUGS if bug.file == file})
    code = (ROOT / file).read_text(encoding="utf-8")
    status, output = start(code, tmp_path / Path(file).name, tests)
    assert status == 0, output


# -- --impl ---------------------------------------------------------------------------------------

HOMEWORK = """
import torch
from torch import nn
from model import LLaMAConfig

def my_own_helper(x):
    return x.pow(2).mean(-1, keepdim=True).sqrt()

class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x / (my_own_helper(x) + self.eps) * self.weight
"""


@pytest.mark.parametrize("test, status", [
    ("rmsnorm_by_hand", 0), ("rmsnorm_eps_is_inside_the_root", 1), ("equals_golden_values", 1)])
def test_one_class_of_a_student(start, tmp_path, test, status):
    """A norm with its eps in the wrong place is found by its own test and inside our network. The
    header says what was replaced, and which names are not ours."""
    got, output = start(HOMEWORK, tmp_path / "homework.py", [f"tests/test_model.py::test_{test}"])
    assert got == status
    assert "replaces model.RMSNorm; all else is ours" in output
    assert "not ours, so not tested: my_own_helper" in output


@pytest.mark.parametrize("text, message", [
    (None, "no such file"), ("class RMSNrom: pass", "none of our names; did you mean RMSNorm?"),
    ("def f(:\n", "SyntaxError"),
    ("import torch\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(line 3\)"),
    ("raise SystemExit(3)", "SystemExit"),
    ("import pytest\npytest.fail('an endless loop?')\n", r"an endless loop\? \(line 2\)")])
def test_impl_says_what_is_wrong(tmp_path, text, message):
    file = tmp_path / "homework.py"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(pytest.UsageError, match=message) as caught:
        conftest.install(str(file))
    assert "\n" not in str(caught.value)
