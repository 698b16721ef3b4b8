"""Vicuna's data: ShareGPT conversations, cleaned and split to the length of the context.

    python -m recipes.sharegpt clean sharegpt.json --out=clean.json
    python -m recipes.sharegpt split clean.json --seq_len=2048 --out=split.json

The rules are FastChat's, in its order and without its mistakes; each rule says what those are. Two
more things differ. Lengths and words are judged after the edits, so that HTML does not count.
Duplicates come last; otherwise the beginning of a conversation could be dropped in favor of one
that is then dropped itself.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import data
from data import Conversation, Report, Tokenizer, Turn
from recipes.output import refuse_overwrite, write_result
from tools.config import UserError, run


@dataclass
class CleanConfig:
    file: str  # ShareGPT or Alpaca
    out: str = "clean.json"  # the report is written beside it: clean.json.report.json
    blocked: str = "openai,chatgpt"  # drop conversations that contain one of these, in any case
    language: str = ""  # ISO codes: en,ko keeps only these, -ko drops Korean; empty keeps all

    def __post_init__(self):
        for code in comma_separated(self.language):
            if code.removeprefix("-") not in language_identifier().nb_classes:
                raise UserError(f"--language={code}: expected ISO codes, such as en,ko or -ko")


def comma_separated(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


# -- edits: the text of a message -> its new text -------------------------------------------------

CODE_BLOCK = re.compile(r"^(?P<mark>`{3,})[^\n`]*\n(?P<body>.*?)(?:^(?P=mark)[ \t\r]*$|\Z)",
                        re.M | re.S)


def sub_in_prose(pattern: str, replacement: str, text: str) -> str:
    """re.sub that leaves code blocks alone."""
    out, at = [], 0
    for block in CODE_BLOCK.finditer(text):
        out += [re.sub(pattern, replacement, text[at:block.start()]), block[0]]
        at = block.end()
    return "".join(out) + re.sub(pattern, replacement, text[at:])


FIRST_TAG = re.compile(r"\s*<(p|div|span|pre|ul|ol|table|h[1-6]|blockquote)\b[^<>]*>", re.I)
LAST_TAG = re.compile(r"(</\w+\s*>|<(br|hr|img)\b[^<>]*>)\s*$", re.I)


def html_to_markdown(text: str) -> str:
    """A message that begins and ends with a tag. The original converts all messages, which damages
    "a < b" and code, and it escapes underscores (in 15% of its conversations)."""
    if not FIRST_TAG.match(text) or not LAST_TAG.search(text):
        return text
    converter = markdown_converter()
    import bs4  # comes with markdownify
    try:
        soup = bs4.BeautifulSoup(text, "html.parser")
        for tag in soup(["script", "style", "button"]):
            tag.decompose()
        return converter.convert_soup(soup).strip()
    except (RecursionError, AssertionError, bs4.ParserRejectedMarkup):
        return ""  # cannot be parsed; the conversation is cut here


@functools.cache
def markdown_converter():
    try:
        import markdownify
    except ImportError:
        raise UserError("HTML needs a library: pip install markdownify") from None

    class Converter(markdownify.MarkdownConverter):
        def convert_pre(self, pre, text, parent_tags):
            return code_block(pre)

    return Converter(heading_style="ATX", bullets="-", table_infer_header=True,
                     escape_asterisks=False, escape_underscores=False, escape_misc=False)


def code_block(pre) -> str:
    """A <pre> element in Markdown, with its language, and a fence longer than any within."""
    code = pre.find("code") or pre
    body = code.get_text().strip("\n")
    language = re.search(r"language-([\w+#.-]+)", " ".join(code.get("class") or []))
    name = language[1] if language else ""
    longest = max(map(len, re.findall("`+", body)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"\n\n{mark}{name}\n{body}\n{mark}\n\n"


def remove_copy_button(text: str) -> str:
    """"pythonCopy codeprint(1)" in a code block, or a line "Copy code". The original matches from
    one code block into the next, and keeps blocks with nothing but the button."""
    text = CODE_BLOCK.sub(without_button, text)
    return sub_in_prose(r"(?m)^Copy code[ \t]*(\n|\Z)", "", text)


def without_button(block: re.Match) -> str:
    """The code block with its language after the fence, or nothing if it has no code."""
    if not block["body"].replace("Copy code", "").strip():
        return ""
    return re.sub(r"\A(`{3,})\n?([\w+#.-]*?)\n?(?:Copy code)+\n?", r"\1\2\n", block[0])


# The reply follows on a new line, or directly with any letter but a-z: "2 / 2Sure"
COUNTER = re.compile(r"\s*(\d{1,4}) / (\d{1,4})(?:\s*\n|\Z|(?=[^\W\d_a-z]))")


def remove_counters(text: str) -> str:
    """"2 / 2" before a regenerated reply; "Copy12 chars / 3 words". The original also removes the
    beginning of "1 / 2 cup"."""
    counter = COUNTER.match(text)
    if counter and 1 <= int(counter[1]) <= int(counter[2]):
        text = text[counter.end():]
    return re.sub(r"Copy\d+ chars / \d+ words", "", text)


def unescape_underscores(text: str) -> str:
    """my\\_name, in files that went through the original's conversion."""
    return sub_in_prose(r"(?<=\w)\\_(?=\w)", "_", text)


def trim_spaces(text: str) -> str:
    """CRLF, blank lines around the text, several blank lines within. The original also edits code,
    and leaves none or one blank line, depending on how many there were."""
    text = text.replace("\r\n", "\n")
    return sub_in_prose(r"\n{3,}", "\n\n", text).lstrip("\n").rstrip()


# what the report says: the function, in the order in which they are applied
EDITS = {
    "HTML became Markdown": html_to_markdown,
    'the words "Copy code"': remove_copy_button,
    "counters of the web page": remove_counters,
    "escaped underscores": unescape_underscores,
    "line ends": trim_spaces,
}


def edit(c: Conversation) -> tuple[Conversation, list[str]]:
    """The conversation after EDITS, and what they changed."""
    changes = []
    for what, function in EDITS.items():
        turns = [turn._replace(text=function(turn.text)) for turn in c.turns]
        if turns != c.turns:
            c = replace(c, turns=turns)
            changes.append(what)
    return c, changes


# -- what ends a conversation, or drops it --------------------------------------------------------

def why_end(turn: Turn) -> str | None:
    """Why a conversation ends before this message, or None."""
    notice = r"\s*!?Too many requests in 1 hour\. Try again later\."
    if turn.role == "assistant" and re.match(notice, turn.text):
        return "the notice of a rate limit"  # the original drops the whole conversation
    if data.is_blank(turn.text):
        return "a message without visible text"  # the original looks at the first character only
    return None


def part(c: Conversation, begin: int, end: int) -> Conversation:
    """Some of the turns. "cut" and "rejected" describe the last reply, and stay with it."""
    extra = c.extra
    if end < len(c.turns):
        extra = {key: value for key, value in extra.items() if key not in ("cut", "rejected")}
    return replace(c, turns=c.turns[begin:end], extra=extra)


def why_dropped(c: Conversation, cfg: CleanConfig) -> str | None:
    """Why a conversation is not kept, or None."""
    if sum(len(turn.text.encode()) for turn in c.turns) < 16:
        return "too short"  # the original counts characters, of which Korean needs fewer
    if has_blocked_word(c, comma_separated(cfg.blocked.lower())):
        return "a blocked word"
    if c.extra.get("plugins"):
        return "made with plugins"
    if is_other_language(c, comma_separated(cfg.language)):
        return "another language"
    replies = [CODE_BLOCK.sub("", turn.text) for turn in c.turns[1::2]]
    if any(map(has_broken_numbers, replies)):
        return "a list with broken numbers"
    # A number of nine or more equal digits. The original also drops 1000000000 and 0x000000000.
    if any(re.search(r"(?<![\w.,])(\d)\1{8,}(?!\w)", reply) for reply in replies):
        return "repetitive"
    return None


def without_links(c: Conversation) -> str:
    return re.sub(r"https?://\S+", "", "\n".join(turn.text for turn in c.turns))


def has_blocked_word(c: Conversation, blocked: list[str]) -> bool:
    """The original also finds them in links and in HTML attributes."""
    text = without_links(c).lower()
    return any(word in text for word in blocked)


def is_other_language(c: Conversation, languages: list[str]) -> bool:
    """A language that --language does not keep. The conversation stays if the language is
    uncertain, or if there are few letters outside code."""
    text = CODE_BLOCK.sub("", without_links(c))
    if not languages or sum(map(str.isalpha, text)) < 12:
        return False
    code, probability = language_identifier().classify(text[:4000])
    if probability <= 0.9:
        return False
    kept = [name for name in languages if not name.startswith("-")]
    return f"-{code}" in languages or bool(kept) and code not in kept


@functools.cache
def language_identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError("--language needs a library: pip install py3langid") from None
    return LanguageIdentifier.from_pickled_model(MODEL_FILE, norm_probs=True)


def has_broken_numbers(reply: str) -> bool:
    """A list "1.", "1.". The original overlooks lists at the start of a reply, and those with a
    digit 2 in between."""
    numbers = re.findall(r"^(\d+)\. ", reply, re.M)
    return ("1", "1") in zip(numbers, numbers[1:])


def unique(conversations: list[Conversation], report: Report) -> list[Conversation]:
    """Drops conversations that equal another one or are the beginning of another one. The original
    keeps only one of all that begin with the same round."""
    seen, kept = set(), []
    for c in conversations:
        for n in range(2, len(c.turns), 2):
            seen.add(tuple(c.turns[:n]))
    for c in conversations:
        if tuple(c.turns) in seen:
            report.add(c.id, "dropped: a duplicate, or the beginning of another conversation")
        else:
            seen.add(tuple(c.turns))
            kept.append(c)
    return kept


def clean(conversations: Iterable[Conversation], cfg: CleanConfig,
          report: Report) -> list[Conversation]:
    """The conversations that are kept, edited."""
    kept = []
    for c in conversations:
        c, changes = edit(c)
        for i, turn in enumerate(c.turns):
            reason = why_end(turn)
            if reason:
                c = part(c, 0, i - i % 2)
                changes.append(f"cut at {reason}")
                break
        reason = why_dropped(c, cfg)
        if reason:
            report.add(c.id, f"dropped: {reason}")
            continue
        for change in changes:
            report.add(c.id, f"changed: {change}")
        kept.append(c)
    return unique(kept, report)


def clean_file(cfg: CleanConfig) -> dict:
    """Turns the HTML of replies into Markdown, and drops what Vicuna dropped."""
    refuse_overwrite(cfg.file, cfg.out)
    report = Report()
    conversations = data.load_conversations(cfg.file, report)
    cleaned = clean(conversations, cfg, report)
    return write_result(cleaned, cfg.out, report, data.kind_of(cfg.file))


# -- split ----------------------------------------------------------------------------------------

@dataclass
class SplitConfig:
    file: str  # ShareGPT or Alpaca
    out: str = "split.json"  # the pieces; the report is written beside it
    seq_len: int = 2048  # longest piece in tokens, the system text included
    tokenizer: str = "out/base"  # checkpoint folder or tokenizer.model
    template: str = ""  # alpaca for Alpaca files, else vicuna_v1.1


def split(c: Conversation, template: str, tokenizer: Tokenizer, seq_len: int,
          report: Report) -> list[Conversation]:
    """Pieces of at most `seq_len` tokens, cut between rounds. The original does not count the
    system text, and loses a last round that does not fit."""
    def size(c: Conversation) -> int:
        return len(data.render(c, template, tokenizer).tokens)

    if size(c) <= seq_len:
        return [c]
    begins = [0]
    for end in range(4, len(c.turns) + 1, 2):
        if size(part(c, begins[-1], end)) > seq_len:
            begins.append(end - 2)
    if len(begins) > 1:
        report.add(c.id, "split")
    pieces = []
    for begin, end in zip(begins, [*begins[1:], len(c.turns)]):
        piece = replace(part(c, begin, end), id=f"{c.id}_{begin}")
        pieces.append(cut_round(piece, size, tokenizer, seq_len, report))
    return pieces


def cut_round(c: Conversation, size: Callable[[Conversation], int], tokenizer: Tokenizer,
              seq_len: int, report: Report) -> Conversation:
    """Cuts a round that is too long by itself to `seq_len` tokens. Question and reply get half of
    the room each, and either may use what the other does not need. A reply that was cut is marked,
    so that its end is not supervised."""
    def prompt_size(asked: Turn) -> int:
        return size(replace(c, turns=[asked]))

    if size(c) <= seq_len:
        return c
    asked, reply = c.turns
    frame = prompt_size(asked._replace(text="", input=""))
    room = seq_len - frame
    if room < 16:
        raise UserError(f"--seq_len={seq_len}: the template alone has {frame} tokens")
    reply_size = size(c) - prompt_size(asked)
    limit = frame + max(room // 2, room - reply_size)
    while (excess := prompt_size(asked) - limit) > 0:
        asked = drop_tokens(asked, excess, tokenizer)
    if asked != c.turns[0]:
        report.add(c.id, "cut: a question")
    c = replace(c, turns=[asked, reply])
    if size(c) > seq_len:
        report.add(c.id, "cut: a reply; its end is not supervised")
        c = replace(c, extra={**c.extra, "cut": True})
    while (excess := size(c) - seq_len) > 0:
        reply = drop_tokens(reply, excess, tokenizer)
        c = replace(c, turns=[asked, reply])
    return c


def drop_tokens(turn: Turn, n: int, tokenizer: Tokenizer) -> Turn:
    """The turn without the last n tokens of its input, or of its text if it has none; or a little
    less of it: half characters are dropped, too, and always at least one character."""
    field = "input" if turn.input else "text"
    text = getattr(turn, field)
    kept = tokenizer.decode(tokenizer.encode(text)[:-n]).rstrip("\ufffd")
    return turn._replace(**{field: text[:min(len(kept), len(text) - 1)]})


def split_file(cfg: SplitConfig) -> dict:
    """Cuts long conversations, between rounds, into parts that fit the context."""
    refuse_overwrite(cfg.file, cfg.out)
    report, pieces = Report(), []
    tokenizer, kind = data.find_tokenizer(cfg.tokenizer), data.kind_of(cfg.file)
    template = cfg.template or data.default_template(kind)
    for c in data.load_conversations(cfg.file, report):
        pieces += split(c, template, tokenizer, cfg.seq_len, report)
    return write_result(pieces, cfg.out, report, kind)


if __name__ == "__main__":
    run(None, dict(clean=(clean_file, CleanConfig), split=(split_file, SplitConfig)))
