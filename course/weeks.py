"""The ten weeks: the exercises of each, the tests that check them, and three hints for each one.

This table is the only part of the exercises that is written by hand; tests/test_course.py checks it
against the code. A check is a test function, in the module's own test file unless a file is named.
In the checks of an exercise, all other functions are ours, and it is solved when all of them pass.
Our own choices, such as the initialization, are not checked.
"""

import functools
from pathlib import Path
from typing import NamedTuple


class Exercise(NamedTuple):
    name: str  # module.function or module.Class.method
    checks: str  # test functions, separated by spaces
    hints: tuple[str, str, str]  # where to look; the idea; nearly the code

    def tests(self) -> list[str]:
        """The checks as "test_model.py::test_rmsnorm_by_hand"."""
        parts = self.name.split(".")
        module = parts[1] if parts[0] in ("tools", "toy") else parts[0]
        file = "test_train.py" if module == "train_sft" else f"test_{module}.py"
        return [check if "::" in check else f"{file}::{check}" for check in self.checks.split()]


class Week(NamedTuple):
    title: str
    exercises: list[Exercise]


WEEKS = {
    1: Week("tokenizer and templates", [
        Exercise(
            "data.Tokenizer.encode", "test_round_trip test_continuation_adds_no_space", (
                "self.sp.encode(text) gives ids, and begins every text with a space.",
                "Text that continues a line is encoded after something that is always a token of "
                "its own; that token is then dropped.",
                "Encode a newline and the text; return what follows the first self._newline.")),
        Exercise(
            "data.Tokenizer.decode", "test_round_trip test_continuation_adds_no_space", (
                "self.sp.decode(ids) removes one leading space; ids from self.vocab_size on have "
                "no text.",
                "Where the text continues a line, its leading space is real: put the newline in "
                "front as encode does.",
                "Decode [self._newline, *ids] and drop the first character.")),
        Exercise(
            "data.encode_text", "test_encode_text_in_pieces", (
                "Each chunk has at most 50,000 characters and ends after a newline if it has one.",
                "Only the first chunk begins the text: all others continue it.",
                "text.rfind(newline, begin, end) + 1 is the end of a chunk; 0 means none was "
                "found.")),
        Exercise(
            "data.question_spans",
            "test_string test_ids test_image_slots_stand_in_tags test_only_replies_are_supervised "
            "test_recipes.py::test_sources_of_koala", (
                "Template's comments say what stands before the first question and before later "
                "ones. Nothing here is supervised.",
                "Decide in this order: which system text, which form of the question (input? "
                "rejected?), what stands before it. Fill in the user's text last.",
                "Split the form at </s> and {slots} with re.split and a group, so that both stay "
                "in the list; yield one Span for each part, the text before it only once.")),
        Exercise(
            "data.spans", "test_string test_ids test_only_replies_are_supervised "
            "test_recipes.py::test_a_reply_that_is_cut_has_no_end", (
                "A user's turn is question_spans; a reply is its text, then its end.",
                "The end of a reply is the template's own, or the eos token. It is supervised like "
                "the reply, or the model never learns to stop.",
                "The end is left out only for the last turn, if conversation.extra has cut=True.")),
        Exercise(
            "data.strip_end", "test_an_end_that_is_text", (
                "get_template(template).end may be empty: then nothing is cut.",
                "If the end occurs, the reply is what stands before it. Otherwise, while "
                "streaming, the text may close with the first characters of the end.",
                "For n from len(end) - 1 down to 1: does the text end with end[:n]?")),
        Exercise(
            "data.fit_prompt", "test_fit_prompt_drops_the_oldest_rounds", (
                "A round is a question and its reply: turns 2i and 2i + 1.",
                "List the rounds in the order in which they are dropped: text rounds first, then "
                "those with image slots, the oldest first. Drop as few as possible.",
                "With block > 0, text rounds are dropped in groups of at least `block` tokens. "
                "Render again with each number of rounds that may be dropped.")),
    ]),
    2: Week("RMSNorm, RoPE and the block", [
        Exercise(
            "model.RMSNorm.forward",
            "test_rmsnorm_by_hand test_rmsnorm_eps_is_inside_the_root "
            "test_rmsnorm_computes_in_fp32 test_equals_golden_values", (
                "Equation 4 of the paper, without a mean: x / rms(x) * weight.",
                "rms(x) = sqrt(mean(x^2) + eps) over the last dimension. Compute it in fp32.",
                "y = x.float(); torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps); then "
                ".type_as(x) for the result and for the weight, and their product.")),
        Exercise(
            "model.rope_table",
            "test_rope_rotates_neighbors test_equals_golden_values "
            "test_weeks.py::test_rope_table_by_hand test_weeks.py::test_rope_knows_distances_only",
            (
                "One angle for each position and each pair: (seq_len, D/2).",
                "The frequencies are theta^(-2i/D): the first pair turns by one radian a token, "
                "later pairs more and more slowly.",
                "torch.arange(0, head_dim, 2) holds 2i; torch.outer(positions, frequencies).")),
        Exercise(
            "model.apply_rope",
            "test_rope_rotates_neighbors test_equals_golden_values "
            "test_weeks.py::test_apply_rope_by_hand test_weeks.py::test_rope_knows_distances_only",
            (
                "Neighbors x[2i], x[2i+1] are a point in the plane, which is turned.",
                "(a, b) becomes (a cos - b sin, a sin + b cos). All heads turn alike.",
                "x.float().unflatten(-1, (-1, 2)).unbind(-1) gives a and b; cos.unsqueeze(-2) "
                "makes room for the heads; stack, flatten(-2), and back to x's type.")),
        Exercise(
            "tools.inside.rotate", "test_weeks.py::test_rope_as_complex_numbers", (
                "The same rotation as in apply_rope, as one multiplication.",
                "A pair (a, b) is the complex number a + ib; turning it by an angle multiplies it "
                "by cos + i sin.",
                "Angles are (T, 1, D/2), the same for all heads; positions are divided by "
                "c.rope_scaling. torch.view_as_complex of (T, H, D/2, 2) times "
                "torch.polar(torch.ones_like(angles), angles), then torch.view_as_real.")),
        Exercise(
            "model.FeedForward.forward",
            "test_weeks.py::test_swiglu_by_hand test_equals_golden_values", (
                "Equation 6 of Shazeer's paper: three matrices, one gate.",
                "w1 makes the gate, w3 the values, w2 brings them back.",
                "F.silu of one of the two, times the other.")),
        Exercise(
            "model.Block.forward",
            "test_weeks.py::test_a_block_adds_twice test_equals_golden_values", (
                "Two steps, and each adds its output to x.",
                "Pre-norm: what goes into attention and feed-forward is normalized; x itself is "
                "not.",
                "x + self.attention(self.attention_norm(x), cos, sin, ...), then the same with "
                "ffn_norm and feed_forward on the new x.")),
        Exercise(
            "model.count_parameters", "test_published_sizes", (
                "A model of 65 B parameters can be built without allocating any.",
                'On the device "meta", tensors have a shape and no data.',
                "with torch.device(...): sum p.numel() over the parameters of LLaMA(config).")),
    ]),
    3: Week("attention, masks and the cache", [
        Exercise(
            "model.causal_mask", "test_attention test_weeks.py::test_causal_mask_by_hand", (
                "True where a query may look. A row is a query, a column a key.",
                "The T queries are the last of the S positions: query t stands at S - T + t.",
                "torch.ones(...).tril(diagonal): which diagonal?")),
        Exercise(
            "model.attention_textbook", "test_attention test_weeks.py::test_attention_by_hand", (
                "softmax(q k^T / sqrt(D)) v, as in Attention Is All You Need.",
                "A score of minus infinity has weight 0.",
                "masked_fill(~mask, -inf), then softmax over the last dimension in fp32.")),
        Exercise(
            "model.attention", "test_attention test_reading_in_chunks", (
                "Key/value heads are shared by n_rep query heads each, neighbors first.",
                "F.scaled_dot_product_attention's is_causal places the queries at the *first* T "
                "positions. With a cache that is wrong.",
                "repeat_interleave k and v over the heads; make causal_mask(T, S) where the "
                "kernel's own would be wrong; one query needs no mask at all.")),
        Exercise(
            "model.KVCache.update", "test_reading_in_chunks test_cached_generation_equals_uncached",
            (
                "self.k and self.v are (layers, B, K, max_len, D), filled up to self.length.",
                "Write after what is there; return all keys and values of this layer so far.",
                "self.length itself is advanced by LLaMA.hidden, after the last layer.")),
        Exercise(
            "model.KVCache.truncate", "test_generation_continues_from_a_cache", (
                "Nothing has to be deleted.",
                "What lies after self.length is overwritten by the next update.",
                "n may be larger than what is there: take the smaller of the two.")),
        Exercise(
            "model.Attention.forward", "test_equals_golden_values test_reading_in_chunks", (
                "Project, split into heads, rotate, (cache,) attend, join, project.",
                "Queries and keys are rotated, values are not. Rotation comes before the cache, so "
                "that cached keys stay as they are.",
                "apply_rope takes (B, T, H, D), attention and the cache (B, H, T, D): transpose "
                "between them, and back before wo.")),
        Exercise(
            "model.positions_and_mask",
            "test_cached_generation_equals_uncached test_prompts_of_unequal_length", (
                "Three cases: packed rows, left padding, neither.",
                "A row with a single segment is an ordinary row. Without segments and padding, the "
                "mask is None.",
                "Ordinary positions are past, past + 1, ..., past + T - 1.")),
        Exercise(
            "model.padded_positions_and_mask",
            "test_prompts_of_unequal_length test_weeks.py::test_left_padding_by_hand", (
                "The first n_pad[b] positions of row b are padding.",
                "The mask is causal, and keys begin at n_pad. A row of the mask without any True "
                "would give NaN, so padding attends to itself.",
                "Compare torch.arange(past + T) with n_pad[:, None, None]; positions are those of "
                "the row minus n_pad, and never negative.")),
        Exercise(
            "model.LLaMA.generate_textbook",
            "test_stop test_weeks.py::test_greedy_decoding_by_hand", (
                "Read the prompt once, then one token at a time with a cache.",
                "self.new_cache([prompt], length) makes the cache. The next token is the argmax of "
                "the last position's logits.",
                "After a yield, the next input is that token alone, as (1, 1). Stop after `stop` "
                "was yielded, or when the context is full.")),
    ]),
    4: Week("the training loop: schedule, optimizers, loss", [
        Exercise(
            "train_sft.learning_rate", "test_learning_rate_warms_up_and_ends_at_a_tenth", (
                "Two pieces: a straight line up, then half a cosine down.",
                "The first step must not have rate 0, or it is wasted.",
                "progress goes from 0 to 1 after the warmup; 0.5 * (1 + cos(pi * progress)) goes "
                "from 1 to 0; the end is min_lr times the peak.")),
        Exercise(
            "train_sft.micro_batches", "test_weeks.py::test_micro_batches_are_all_rows_once", (
                "A batch is a tuple of tensors with equally many rows; segments may be None.",
                "Slice every tensor at the same rows.",
                "range(0, len(batch[0]), size); None stays None.")),
        Exercise(
            "train_sft.loss_backward",
            "test_micro_batches_do_not_change_the_gradient "
            "test_packed_conversations_are_trained_on_as_if_they_were_alone", (
                "The loss of a step is one sum over all its supervised tokens, divided once.",
                "Count first: model.count_targets of every micro-batch, then machine.total(n)[0] "
                "over all processes. Then call backward for each micro-batch, on its sum divided "
                "by that count.",
                "FSDP averages gradients over machine.world processes, so multiply by it. Under "
                "machine.autocast(), "
                "net.nll(tokens, labels, *images, segments=segments) gives (sum, count).")),
        Exercise(
            "train_sft.clip_gradients", "test_weeks.py::test_clipping_keeps_the_direction", (
                "torch.nn.utils has a function for it.",
                "Its norm is over all parameters together, before clipping.",
                "Under FSDP the norm is a DTensor: norm.full_tensor(), if it has that.")),
        Exercise(
            "train_sft.make_optimizer",
            "test_weight_decay_is_for_matrices_only "
            "test_muon_equals_the_textbook_matrix_by_matrix", (
                "Parameter groups: matrices with weight decay, vectors without.",
                "Muon also needs to know which matrices are inside blocks: in_blocks of a group.",
                "Group by (p.dim() > 1, in_blocks); names of blocks match (layers|blocks)\\.\\d; "
                "skip what does not require a gradient.")),
        Exercise(
            "train_sft.orthogonalize", "test_muon_moves_a_matrix_equally_in_all_directions", (
                "Newton-Schulz: an odd polynomial of a matrix acts on its singular values alone.",
                "First scale each matrix so that no singular value exceeds 1; transpose tall ones, "
                "so that x x^T is the smaller product.",
                "Five times: a = x x^T; x = 3.4445 x + (-4.7750 a + 2.0315 a a) x.")),
        Exercise(
            "train_sft.muon_textbook",
            "test_weeks.py::test_muon_by_hand test_muon_equals_the_textbook_matrix_by_matrix", (
                "Momentum, Nesterov, orthogonalize, decay, step: five lines.",
                "The momentum decays by 0.95 and adds the gradient. Nesterov looks ahead: gradient "
                "+ 0.95 momentum.",
                "The step is 0.4 lr sqrt(max(p.shape)) times the orthogonalized update; the decay "
                "multiplies p by 1 - lr * weight_decay.")),
        Exercise(
            "train_sft.Muon.muon_step",
            "test_weeks.py::test_muon_by_hand test_muon_equals_the_textbook_matrix_by_matrix", (
                "muon_textbook for a list of matrices of one shape.",
                "Collect the updates of all, stack them, orthogonalize once, and apply each.",
                "self.state[p] must hold momentum and step; afterwards set p.grad to None, so that "
                "AdamW skips it.")),
    ]),
    5: Week("the loss mask and packing", [
        Exercise(
            "data.encode_span", "test_ids test_image_slots_stand_in_tags", (
                "A span is image slots, eos, or text.",
                "A slot is the number IMAGE_SLOT, which no text can produce.",
                "Text is tokenizer.encode with the span's own `continues`.")),
        Exercise(
            "data.render", "test_only_replies_are_supervised test_a_prompt_is_a_prefix test_string",
            (
                "Tokens and labels grow together, span by span.",
                "A label is the token itself or IGNORE. The bos at the beginning is not "
                "supervised.",
                "for span in spans(conversation, t): ids = encode_span(...); the labels are ids or "
                "as many IGNORE. Check the rejected case first.")),
        Exercise(
            "data.runs", "test_weeks.py::test_runs_by_hand", (
                "Where does a supervised label follow an unsupervised one, or the reverse?",
                "np.diff of a boolean array is True at a change.",
                "Borders are 0, the positions after a change, and the end; leave out empty runs.")),
        Exercise(
            "data.pack_textbook", "test_packing_by_hand", (
                "First fit: go through the rows from the first one.",
                "Keep the used length of each row. A new row is opened when none has room.",
                "An example longer than a row counts as seq_len.")),
        Exercise(
            "data.pack_best_fit", "test_packing_by_hand", (
                "Longest first, each into the fullest row that still has room.",
                "Keep the free rows sorted by their room: bisect finds the smallest room that is "
                "enough.",
                "Entries (room, -n, row) with n the number of the placement break ties: the row "
                "that was used last comes first. Rows without room leave the list.")),
        Exercise(
            "data.pack", "test_packed_examples_stay_whole test_padding_is_not_supervised", (
                "Three arrays (rows, seq_len): tokens, labels, segments.",
                "Fill them with pad, IGNORE and -1, then copy each example into its columns.",
                "Segments of a row are numbered from 0. Cut an example at seq_len.")),
        Exercise(
            "data.Rows.row",
            "test_each_epoch_has_every_row_once test_batches_depend_on_seed_and_step_only", (
                "The i-th row over all epochs: which epoch, and which position in it?",
                "Each epoch has its own permutation, from (seed, epoch) alone.",
                "np.random.default_rng((self.seed, epoch)).permutation(len(self)), kept until "
                "another epoch is asked for.")),
        Exercise(
            "model.shift_labels",
            "test_nll_shifts_by_one test_packed_rows_equal_conversations_one_by_one", (
                "Position t predicts token t + 1, and the last one predicts nothing.",
                "What is the first label of a segment predicted from?",
                "labels[:, 1:], with IGNORE where segments[:, 1:] differs from segments[:, :-1].")),
        Exercise(
            "model.LLaMA.nll_textbook", "test_nll_shifts_by_one test_nll_equals_textbook", (
                "Logits, targets, cross-entropy: a sum, not a mean.",
                "Drop the last position's logits; shift_labels gives the targets.",
                "F.cross_entropy(..., ignore_index=IGNORE, reduction=...), in fp32; the count is "
                "that of the targets.")),
        Exercise(
            "model.packed_positions_and_mask",
            "test_packed_rows_equal_conversations_one_by_one "
            "test_positions_restart_in_each_segment", (
                "A token attends to itself and to earlier tokens of its own segment.",
                "A position is the index minus that of the first token of its segment.",
                "Put the index where a segment begins and 0 elsewhere; cummax carries it on. "
                "Positions are (B, T), the mask (B, 1, T, T), with 1 for the heads.")),
    ]),
    6: Week("sampling and LoRA", [
        Exercise(
            "model.sample", "test_sample test_repetition_penalty", (
                "In this order: repetition penalty, temperature, top-k, top-p, draw.",
                "The logit of an excluded token becomes minus infinity, and softmax does the rest. "
                "Temperature 0 is the argmax.",
                "top-p: sort, softmax, cumsum; a token is excluded if those *before* it already "
                "sum to top_p. Scatter back by the sorted ids. Negative logits are multiplied by "
                "the penalty, positive ones divided.")),
        Exercise(
            "model.LLaMA.generate",
            "test_stop test_same_seed_same_words test_prompts_of_unequal_length "
            "test_generation_continues_from_a_cache", (
                "generate_textbook for several prompts, with sample instead of argmax.",
                "Pad at the left. A row that is done repeats stop until all are done. Read the "
                "last prompt token again even if the cache has it.",
                "One torch.Generator from the seed for all draws; torch.where(done, stop, "
                "sampled); after the first step the input is new[:, None] and no images.")),
        Exercise(
            "data.decode_reply", "test_weeks.py::test_a_reply_ends_where_the_template_says", (
                "Two kinds of end: the token eos, and text.",
                "Cut at eos first, then decode, then strip_end.",
                "Decode with the template's reply_continues.")),
        Exercise(
            "model.LoRALinear.forward", "test_lora_by_hand", (
                "Equation 3 of the paper: W x + B A x, scaled.",
                "A (r, in) first: the small matrix keeps the product cheap.",
                "super().forward(x) is W x; F.linear twice; LORA_SCALE.")),
        Exercise(
            "model.add_lora", "test_lora_begins_at_the_base_model_and_merges_exactly", (
                "Freeze everything, then replace linear layers.",
                "The seven linear layers of a block are children of its attention and "
                "feed_forward.",
                "setattr(part, name, LoRALinear(linear, rank)) over list(part.named_children()).")),
        Exercise(
            "model.merge_lora", "test_lora_begins_at_the_base_model_and_merges_exactly", (
                "W + scale B A is an ordinary weight.",
                "Adapters have .lora_ in their names; what remains is the base model.",
                "For each name that ends in .lora_a, add LORA_SCALE * B @ A to the weight with the "
                "same prefix.")),
    ]),
    7: Week("fine-tuning, and the controls of an experiment", [
        Exercise(
            "data.parse_alpaca",
            "test_data_files.py::test_input_of_alpaca "
            "test_weeks.py::test_records_of_alpaca_and_its_relatives", (
                "An Alpaca record has instruction, input, output. Its relatives have other names.",
                "Take the known keys out; the others become extra keys of the record. An input "
                "such as <noinput> counts as empty.",
                "instances: one record for each, with the outer keys; context is an input, "
                "response an output; history stands before the conversation.")),
        Exercise(
            "train_sft.hold_out_a_tenth", "test_a_tenth_is_held_out", (
                "Several documents are divided between two of them, a single text within itself.",
                "A text is cut at the last line break between 89% and 90%, if there is one.",
                "text.rfind(newline, begin, end) + 1; every character is in exactly one part.")),
        Exercise(
            "train_sft.conversation_rows", "test_weeks.py::test_rows_of_a_file", (
                "data.render_file, then data.pack.",
                "Padding has segment -1, so the tokens are those with segment 0 or more.",
                "Print the counts, warn_if_cut, and raise UserError if nothing is supervised.")),
        Exercise(
            "train_sft.validate", "test_weeks.py::test_validation_counts_each_token_once", (
                "A sum and a count over all rows, batch by batch.",
                "The last batch is filled up with repeated rows, which must not be scored.",
                "rows.at(index % len(rows)), labels IGNORE where index >= len(rows); rank r takes "
                "every machine.world-th batch; machine.total adds up.")),
        Exercise(
            "toy.exam.answer", "test_a_reply_that_does_not_end_is_wrong", (
                "play(items) gives replies and whether each ended.",
                "world.grade(question, reply) is 1 for a right answer.",
                "A reply is right if it ended and its grade is 1.")),
        Exercise(
            "toy.exam.share_right", "test_a_minimal_pair_counts_only_if_both_are_right", (
                "Usually the mean.",
                "In minimal pairs, neighbors belong together.",
                "zip(right[::2], right[1::2]).")),
        Exercise(
            "toy.exam.without_scene", "test_without_scene_exchanges_the_scene_everywhere", (
                "A player made of a player: it changes the questions and passes them to `play`.",
                "Replace item.told by another scene in every turn; leave the given item as it is.",
                "world.tell(world.pick_scene(rng, ...), rng) tells a scene; "
                "dataclasses.replace(item, turns=turns) copies.")),
        Exercise(
            "toy.exam.nearest_neighbor", "test_the_nearest_neighbor_goes_by_rare_words", (
                "Which training question shares the most words with this one? Its output is the "
                "answer.",
                "Rare words count more: idf = log(number of questions / questions with the word). "
                "Long questions must not win by length.",
                "A 0/1 matrix (questions, words) times idf, rows normalized; the product with a "
                "new row's vector; argmax.")),
        Exercise(
            "toy.exam.majority",
            "test_the_majority_answers_each_kind_with_its_most_frequent_answer", (
                "It knows nothing of a question but its kind.",
                "A Counter for each kind.",
                'Counter.most_common(1); a kind that was never seen gets "Yes."')),
        Exercise(
            "toy.exam.few_shot_examples", "test_shots_stand_before_the_first_question_only", (
                "Four solved examples as a text that the base model continues.",
                "A scene stands before its question, the answer on the next line.",
                "A blank line between the examples and after the last one.")),
    ]),
    8: Week("the judge, and how it is judged", [
        Exercise(
            "judge.player_prompt",
            "test_a_second_turn_shows_the_first_answer_and_an_interrupted_run_resumes", (
                "The question's turns so far, with the player's own replies between them.",
                "len(replies) says which turn comes now.",
                "data.Turn for each; extra=dict(question=..., image=q.image), where the question "
                "is q.truths of this turn, or None.")),
        Exercise(
            "judge.judge_prompt",
            "test_prompts_have_the_published_structure test_prompts_from_a_published_file", (
                'The record is prompts[q.category], or else prompts["general"]. FIELDS matches the '
                "four fields of its prompt_template.",
                'All fields are filled in one pass: answers may contain braces. "prompt" is '
                'record["defaults"]["prompt"].',
                "FIELDS.sub with a function that looks up match[1]. Several turns: in_turns, and "
                "one more sentence of instruction. References: for categories in REFERENCED. extra "
                "has question (the last truth) and answers (the last text of each).")),
        Exercise(
            "judge.read_pair", "test_scores_are_read_as_a_person_would_and_not_guessed", (
                "The PAIR pattern must match the whole line.",
                "Brackets around the scores do not matter.",
                "Replace brackets by spaces, join runs of spaces, PAIR.fullmatch.")),
        Exercise(
            "judge.two_scores",
            "test_stored_scores_count_and_else_the_text_is_read "
            "test_weeks.py::test_stored_scores_by_hand", (
                "A list of two numbers from 0 to 10.",
                "In Python, True is an int.",
                "type(v) in (int, float).")),
        Exercise(
            "tools.report.outcome", "test_weeks.py::test_a_win_must_hold_in_both_orders", (
                "One review, or two, of which the second saw the answers the other way round. The "
                "keys: verdict, agree, swapped (were there two?), position, scores (their means), "
                "reviews (their texts).",
                "Swap the scores of the second one back first. Then: who wins in each?",
                "Equal winners are the verdict, else it is a tie; position is the second winner "
                "minus the first.")),
        Exercise(
            "tools.report.agreement",
            "test_judge.py::test_agreement_with_and_without_ties", (
                "Two setups of the paper: all votes (keys n, all), and those without ties "
                "(n_decided, decided).",
                "A vote is -1, 0 or 1, and 0 is a tie.",
                "A pair is decided if neither is 0.")),
        Exercise(
            "tools.report.ratio", "test_weeks.py::test_a_ratio_and_its_interval", (
                "A sum over a sum, and how much it would vary with other questions: the keys are "
                "value, low, high.",
                "Add up the rows of each question first; resample questions, not rows.",
                "rng.integers(n, size=(2000, n)) draws questions; percentiles 2.5 and 97.5.")),
        Exercise(
            "tools.report.biases", "test_weeks.py::test_biases_by_hand", (
                "A ratio over some of the rows is each of consistent, first, second, position, "
                "longer_wins, length; an agreement is each of truth, people, people_people.",
                "Length bias is measured only over equally right answers reviewed in both orders, "
                "since nothing else there speaks for one of them.",
                "verdict * longer is 1 if the longer wins, -1 if the shorter does.")),
    ]),
    9: Week("ViT, Q-Former and the projection", [
        Exercise(
            "vision.preprocess", "test_preprocessing_equals_golden_values", (
                "Resize, scale to [0, 1], normalize.",
                "A square, whatever the aspect ratio was; bicubic, by Pillow.",
                "(height, width, 3) -> (3, size, size); MEAN and STD are per channel.")),
        Exercise(
            "vision.to_rgb", "test_transparency_becomes_white test_16_bits", (
                'image.convert("RGB") is right for most modes, and wrong for two.',
                "Gray of more than 8 bits must be scaled to 0..255; transparent pixels lie on "
                "white.",
                "Image.alpha_composite over a white RGBA image; 65535 is white in 16 bits, the "
                "largest value in 32.")),
        Exercise(
            "vision.attend", "test_weeks.py::test_heads_attend_apart test_equals_golden_values", (
                "Split C into heads, attend, join.",
                "There is no mask: patches have no future.",
                "unflatten(-1, (n_heads, -1)).transpose(1, 2), and the reverse at the end.")),
        Exercise(
            "vision.PatchEmbed.forward",
            "test_weeks.py::test_patches_are_read_row_by_row test_equals_golden_values", (
                "self.proj is a convolution whose kernel is its stride.",
                "Its output (N, C, h, w) is one vector for each patch.",
                "flatten(2).transpose(1, 2).")),
        Exercise(
            "vision.ViTAttention.forward", "test_equals_golden_values", (
                "One matrix for q, k and v, in this order.",
                "Keys have no bias.",
                "chunk(3, dim=-1); add q_bias and v_bias; attend; self.proj.")),
        Exercise(
            "vision.ViT.forward", "test_equals_golden_values", (
                "Patches, class token, positions, blocks.",
                "The class token comes first and has a position, too. No final norm.",
                "self.cls_token.expand(len(x), -1, -1); torch.cat along dim 1.")),
        Exercise(
            "vision.QFormerAttention.forward", "test_equals_golden_values", (
                "Queries from x, keys and values from the source.",
                "Post-norm: the norm comes after the sum.",
                "self.norm(x + self.dense(attend(...))).")),
        Exercise(
            "vision.QFormerLayer.forward", "test_equals_golden_values", (
                "Self-attention, perhaps cross-attention, MLP.",
                "self.cross_attention is None in some layers.",
                "The MLP is post-norm, too, with self.norm.")),
        Exercise(
            "vision.QFormer.forward", "test_equals_golden_values", (
                "The queries are learned, and the same for every image.",
                "Both inputs are normalized first: the features by ln_vision, the queries by norm.",
                "expand the queries to (N, Q, C); every layer gets x and the features.")),
        Exercise(
            "vision.MiniGPT4.encode",
            "test_files_pixels_and_features_give_the_same_vectors test_generate_about_pictures", (
                "Pixels have four dimensions, features three.",
                "Only pixels go through the frozen encoder, self.features.",
                "self.llama_proj, then (N, Q, C) -> (N * Q, C).")),
        Exercise(
            "model.LLaMA.embed",
            "test_image_slots_are_filled_in_order test_images_that_do_not_fit_the_slots", (
                "IMAGE_SLOT is no valid id: replace it before the embedding.",
                "Vectors fill the slots in order, row after row. Raise UserError if there are more "
                "or fewer vectors than slots.",
                "masked_scatter over slots.unsqueeze(-1).")),
    ]),
    10: Week("four bits, and a project", [
        Exercise(
            "tools.quantize.encode_q8",
            "test_weeks.py::test_eight_bits_by_hand test_blocks_equal_llama_cpps", (
                "One scale for 32 weights, so that the largest becomes 127.",
                "A block of zeros has scale 0. C rounds halves away from zero.",
                "d = max|x| / 127; floor(|s|) plus one if the rest is 0.5 or more, times the sign; "
                "the bytes of d (float16) and of the codes (int8), joined.")),
        Exercise(
            "tools.quantize.encode_q4",
            "test_weeks.py::test_four_bits_by_hand test_blocks_equal_llama_cpps", (
                "16 codes stand for -8 to 7, so only the negative end reaches 8.",
                "d = extreme / -8, with the sign of the extreme, so that it becomes exactly -8.",
                "codes = floor(x / d + 8.5), at most 15; byte j holds code j and, in its high "
                "half, code j + 16.")),
        Exercise(
            "tools.quantize.decode",
            "test_weeks.py::test_eight_bits_by_hand test_weeks.py::test_four_bits_by_hand", (
                "The first two bytes of a block are d, the rest are codes.",
                "16 bytes of codes are four bits each, 32 are eight.",
                "& 15 and >> 4, minus 8; tensor.view(dtype) reads bytes as another type (after "
                ".contiguous()).")),
        Exercise(
            "tools.quantize.dequantize",
            "test_weeks.py::test_four_bits_by_hand test_blocks_equal_llama_cpps", (
                "decode gives codes and scales.",
                "A weight is code times scale.",
                "(N, K/32, 32) -> (N, K), in the dtype that was asked for.")),
        Exercise(
            "tools.quantize.int4_operands", "test_fast_kernel_equals_readable_body", (
                "torch's kernel computes x ((code - 8) * scale + zero)^T for 16 * n rows.",
                "decode gives code - 8, and the kernel wants the code. With zero = 0, its weights "
                "are ours.",
                "F.pad rows of blocks; torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, "
                "2) orders int32 codes (N, K); (d, 0) as bfloat16 (K/32, N, 2), contiguous.")),
        Exercise(
            "tools.quantize.block_type",
            "test_weeks.py::test_vectors_stay_and_the_ends_get_eight_bits", (
                "Vectors are few: F32.",
                "A row whose length is not a multiple of 32 cannot be divided into blocks.",
                "Eight bits if asked for, and for the embedding and the output matrix.")),
    ]),
}


def find_test(nodeid: str) -> str:
    """tests/test_model.py::test_stop[1] -> test_model.py::test_stop."""
    path, _, test = nodeid.partition("::")
    return f"{Path(path).name}::{test.split('[')[0]}"


@functools.cache
def exercises_by_test() -> dict[str, list[tuple[int, Exercise]]]:
    """test_model.py::test_stop -> the (week, exercise) pairs that it checks."""
    found: dict[str, list[tuple[int, Exercise]]] = {}
    for week, (_, exercises) in WEEKS.items():
        for exercise in exercises:
            for test in exercise.tests():
                found.setdefault(test, []).append((week, exercise))
    return found
