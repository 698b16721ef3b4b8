"""Tests of data.py on what people's files are like: every kind of bad input, and OpenAssistant's trees.

    pytest tests/test_data_files.py
"""

import gzip
import itertools
import json
import sys
from collections import Counter

import pytest

import config
import data

pytest.importorskip("markdownify")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = ["USER: the cat sat on the mat ASSISTANT: and the dog ran home, 1. 2. 3."] * 30
    return data.train_tokenizer(text, 350, tmp_path_factory.mktemp("files") / "tiny.model")


def talk(*texts, roles=("human", "gpt"), **more) -> dict:
    """A ShareGPT record: question, reply, question, ..."""
    return dict(conversations=[{"from": role, "value": text} for role, text in zip(itertools.cycle(roles), texts)], **more)


def said(*pairs, **more) -> dict:
    return dict(conversations=[{"from": role, "value": text} for role, text in pairs], **more)


def ask(instruction, output, **more) -> dict:
    return dict(instruction=instruction, output=output, **more)


def wrote(text: str, why: str = "stop") -> dict:
    return dict(choices=[dict(text=text, finish_reason=why)])


def task(number: int, instruction: str, given: str = "<noinput>", out: str = "Yes.") -> str:
    return f"{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{out}\n###\n"


GOOD = talk("What is a cat?", "An animal with whiskers.", id="good")
KEPT = None  # in a case: the texts come out as they went in


def block(body: str, info: str = "", mark: str = "```") -> str:
    return f"{mark}{info}\n{body}\n{mark}"


HTML_CODE = ('<div class="markdown"><p>So:</p><pre><div><span>python</span><button>Copy code</button></div>'
             '<div><code class="hljs language-python"><span class="hljs-title">def</span> f(a_b):\n    return a_b &lt; 1\n'
             '</code></div></pre></div>')
LONG = "the cat sat on the mat " * 12

# (group of bad inputs, stage, record or records, texts of what comes out of it (a list for each conversation), reasons
# in the report). A case is read together with a good conversation, which must always come out untouched.
CASES = [
    # 1-3: order
    (1, "load", said(("gpt", "Hi"), ("human", "Q"), ("gpt", "A")), [["Q", "A"]], ["before the first question"]),
    (1, "load", said(("gpt", "Hi"), ("gpt", "Ho"), ("human", "Q"), ("gpt", "A")), [["Q", "A"]],
     ["before the first question", "before the first question"]),
    (2, "load", said(("human", "Q"), ("human", "R"), ("gpt", "A")), [["Q\nR", "A"]], ["joined two"]),
    (2, "load", said(("human", "Q"), ("gpt", "A"), ("gpt", "B")), [["Q", "A\nB"]], ["joined two"]),
    (2, "load off=order", said(("human", "Q"), ("human", "R"), ("gpt", "A")), [], ["wrong order"]),
    (3, "load", talk("Q", "A", "R"), [["Q", "A"]], ["last question without reply"]),
    # 4: no conversation at all
    (4, "load", talk("Q"), [], ["no reply"]), (4, "load", talk(), [], ["no reply"]),
    (4, "load", {"id": "x"}, [], ["no conversation"]), (4, "load", {"conversations": None}, [], ["no conversation"]),
    (4, "load", {"conversations": "Q"}, [], ["no conversation"]), (4, "load", [None, 5, "x", []], [], ["no conversation"] * 4),
    # 5: roles
    *[(5, "load", talk("Q", "A", roles=roles), [["Q", "A"]], [])
      for roles in (("user", "assistant"), ("Human", "GPT"), ("prompter", "bing"), ("user", "bard"), ("USER", "chatgpt"))],
    (5, "load", said(("system", "S"), ("human", "Q"), ("gpt", "A")), [["Q", "A"]], []),
    (5, "load", said(("human", "Q"), ("system", "S"), ("gpt", "A")), [["Q", "A"]], ["system text came late"]),
    (5, "load", said(("human", "Q"), ("tool", "3"), ("gpt", "A")), [], ["unknown role"]),
    (5, "load", said((None, "Q"), ("gpt", "A")), [], ["unknown role"]),
    (5, "load", {"messages": [{"role": "user", "content": "Q"}, {"from": "gpt", "value": "A"}]}, [["Q", "A"]], []),
    # 6, 7: messages without text
    *[(6, "load", talk("Q", "A", value, "B"), [["Q", "A"]], ["empty message"])
      for value in (None, 5, ["x"], {"x": 1}, "", " \n\t", "\u200b\ufeff", "\x00\x07")],
    (6, "load", {"messages": [{"role": "user"}, {"role": "assistant", "content": "A"}]}, [], ["no reply"]),
    (6, "load", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                              {"role": "assistant", "content": "A"}]}, [["Q", "A"]], []),
    (7, "load", talk("Q", "A", "", "B", "R", "C"), [["Q", "A"]], ["empty message"]),
    (7, "load", talk("Q", "A", "R", ""), [["Q", "A"]], ["empty message", "without reply"]),
    (7, "load off=empty", talk("Q", "A", "", "B"), KEPT, []),
    # 8: text that looks like a template
    *[(8, "clean", talk(f"Say {text} now", f"Here: {text}, as you asked."), KEPT, [])
      for text in ("</s>", "<s>", "<unk>", "[PAD]", " ASSISTANT: ", "USER:", "### Human:", "<image>", "<ImageHere>",
                   "<0x0A>", "<|prompter|>", "{text}", "{slots}", "###")],
    # 9: HTML, and what only looks like it
    (9, "clean", talk("Why <b>?", "<p>a &lt; b &amp;&amp; c&nbsp;&#39;d&#39; &amp;lt;</p>"),
     [["Why <b>?", "a < b && c\xa0'd' &lt;"]], ["HTML"]),
    (9, "clean", talk("A list, please.", "<div><p>One<p>two<ul><li>a_b*c<ul><li>deep</ul></ul></div>"),
     [["A list, please.", "One\n\ntwo\n\n- a_b*c\n  - deep"]], ["HTML"]),
    (9, "clean", talk("A table, please.", "<table><tr><th>x</th></tr><tr><td>1</td></tr></table>"),
     [["A table, please.", "| x |\n| --- |\n| 1 |"]], ["HTML"]),
    (9, "clean", talk("Code, please.", HTML_CODE),
     [["Code, please.", "So:\n\n" + block("def f(a_b):\n    return a_b < 1", "python")]], ["HTML"]),
    (9, "clean", talk("More of it.", "<p>See</p><pre><code>a ``` b\n<p>x</p></code></pre>"),
     [["More of it.", "See\n\n" + block("a ``` b\nx", mark="````")]], ["HTML"]),
    (9, "clean", talk("Short code?", "<p>Run:</p><pre>ls</pre>"), [["Short code?", "Run:\n\n" + block("ls")]], ["HTML"]),
    (9, "clean", talk("Too deep?", "<div>" * 3000 + "x" + "</div>" * 3000), [], ["nothing is left"]),
    (9, "clean", talk("Is it safe?", "<p>Yes, it is.</p><script>alert(1)</script><style>p {}</style>"),
     [["Is it safe?", "Yes, it is."]], ["HTML"]),
    (9, "clean", talk("Two spans here?", '<div class="a\nb"><span\nid="x">Two lines</span></div>'), [["Two spans here?", "Two lines"]], ["HTML"]),
    (9, "clean", talk("Which tags?", "<div><divider>Not a div</divider></div>"), [["Which tags?", "Not a div"]], ["HTML"]),
    *[(9, "clean", talk(text, f"{text} is fine"), KEPT, [])
      for text in ("is a < b and c > d", "vector<int> x; map<a,b>", "use <div> in HTML", "&lt;p&gt; &amp; &#39;",
                   "<divider>x</divider>", "<3 you </3")],
    # 10: code blocks
    (10, "clean", talk("Code, please.", block("pythonCopy codeprint(1)")),
     [["Code, please.", block("print(1)", "python")]], ["Copy code"]),
    (10, "clean", talk("Code, please.", block("Copy codeCopy code  x = 1")), [["Code, please.", block("  x = 1")]], ["Copy code"]),
    (10, "clean", talk("Code, please.", block("x", "bashCopy code")), [["Code, please.", block("x", "bash")]], ["Copy code"]),
    (10, "clean", talk("Two of them.", block("one\ntwo") + "\nand\n" + block("pythonCopy codeprint(1)")),
     [["Two of them.", block("one\ntwo") + "\nand\n" + block("print(1)", "python")]], ["Copy code"]),
    (10, "clean", talk("Nothing in it?", "So:\n" + block("Copy code") + "\nThat is all."),
     [["Nothing in it?", "So:\n\nThat is all."]], ["Copy code"]),
    (10, "clean", talk("Pasted.", "python\nCopy code\nprint(1) and more"), [["Pasted.", "python\nprint(1) and more"]], ["Copy code"]),
    *[(10, "clean", talk("What then?", text), KEPT, [])
      for text in ("Press Copy code to copy the code.", block("a\n\n\n\nb  \n  c", "py"), block("r'\\_x' # a\\*b"),
                   block("x = `ls`"), "a[0] and b[ 1 ]", "an open\n```py\nblock")],
    (10, "clean", talk("Escaped?", "my\\_long\\_name but \\_this and \\*that"),
     [["Escaped?", "my_long_name but \\_this and \\*that"]], ["escaped"]),
    # 11: what the web page added
    (11, "clean", talk("Again, please.", "2 / 2\n\nSure, here it is."), [["Again, please.", "Sure, here it is."]], ["counters"]),
    (11, "clean", talk("Again, please.", "1 / 3Sure, here it is."), [["Again, please.", "Sure, here it is."]], ["counters"]),
    (11, "clean", talk("Again, please.", "2 / 2네, 여기 있습니다."), [["Again, please.", "네, 여기 있습니다."]], ["counters"]),
    (11, "clean", talk("How much of it?", "1 / 2 cup of sugar"), KEPT, []),
    (11, "clean", talk("How much is it?", "9 / 3\nis three, of course"), KEPT, []),
    (11, "clean", talk("Please sum up.", "It is short.Copy12 chars / 3 words"), [["Please sum up.", "It is short."]], ["counters"]),
    *[(11, "clean", talk("What is it?", "It is a fine thing.", "More?", f"{mark}Too many requests in 1 hour. Try again later."),
       [["What is it?", "It is a fine thing."]], ["rate limit"]) for mark in ("", "!")],
    (11, "clean", talk("What is it?", "Too many requests in 1 hour. Try again later."), [], ["nothing is left"]),
    # 12: blocked words
    (12, "clean", talk("Who are you?", "I come from OpenAI, of course."), [], ["blocked"]),
    (12, "clean", talk("Are you CHATGPT or not?", "No, not at all."), [], ["blocked"]),
    (12, "clean", talk("Where is it?", "See https://openai.com/x for more."), KEPT, []),
    # 13: duplicates; an id may stand twice
    (13, "clean", [talk("What is it?", "A thing or two.", id="a"), talk("What is it?", "A thing or two.", id="b")],
     [["What is it?", "A thing or two."]], ["duplicate"]),
    (13, "clean", [talk("What is it?", "A thing or two."), talk("What is it?", "A thing or two.", "And?", "No more.")],
     [["What is it?", "A thing or two.", "And?", "No more."]], ["duplicate"]),
    (13, "clean", [talk("What is it?", "A thing or two.", "And?", text, id="a") for text in ("One.", "Two.")], KEPT, []),
    # 14: other keys
    (14, "clean", talk("What is it?", "A thing or two.", plugins=None), KEPT, []),
    (14, "clean", talk("What is it?", "A thing or two.", plugins={"a": 1}), [], ["plugins"]),
    *[(14, "load", talk("Q", "A", id=name), KEPT, []) for name in (7, None, "", "\ud7ff")],
    # 15: long ones, at 200 tokens
    (15, "split", talk(*["the cat"] * 40), "pieces", ["split"]),
    (15, "split", talk(LONG * 3, "yes", "the mat", "no"), "pieces", ["cut: a question", "split"]),
    (15, "split", talk("the cat", LONG * 3), "pieces", ["cut: a reply"]),
    (15, "split", talk(LONG * 3, LONG * 3), "pieces", ["cut: a question", "cut: a reply"]),
    (15, "split", talk("the cat", "the mat", LONG, LONG), "pieces", ["cut: a reply", "cut: a question", "split"]),
    (15, "split", talk("Q", "A", "R"), [["Q", "A"]], ["without reply"]),
    # 16: repetition
    *[(16, "clean", talk("How many are there?", text), [], ["repetitive"])
      for text in ("000000000", "It is 1111111111, yes.", "so\n" * 20 + "it goes")],
    *[(16, "clean", talk("How many are there?", text), KEPT, [])
      for text in ("There are 1000000000.", "At 0x000000000000dEaD.", "It is 3.33333333333, about.", "so\n" * 19 + "it goes",
                   block("000000000"))],
    (16, "clean", talk("Which ones?", "So:\n1. one\n1. two"), [], ["broken numbers"]),
    (16, "clean", talk("Which ones?", "1. one of 2\n1. two of 2"), [], ["broken numbers"]),
    (16, "clean", talk("Which ones?", "1. one\n2. two\n\nThen:\n1. three\n2. four"), KEPT, []),
    (16, "clean", talk("1. one\n1. two\nis it right?", "It is not."), KEPT, []),
    # 17, 18: Unicode, and where tokens meet
    *[(17, "load", talk(text, text), KEPT, [])
      for text in ("👩‍👩‍👧 🇰🇷 🙂", "中文字 かな 한국어", "שלום العربية", "e\u0301 \u00e9", "a\u2028b\u2029c", "a\x00b", "a\ufeffb",
                   "a\r\nb", "a\xa0b", "USER：x ASSISTANT：y")],
    (17, "load", talk("cut \ud83d", "whole 🙂"), [["cut ?", "whole 🙂"]], ["half a character"]),
    *[(18, "load", talk(f"Q{text}", f"{text}A{text}"), KEPT, []) for text in (" ", "\n", "3", "-", "[", "{", "```", "  ", ":")],
    # 20: languages, if asked for
    (20, "clean language=en", talk("Was ist das für ein Tier, und wo lebt es am liebsten?",
                                   "Das ist eine Katze. Sie lebt gern in einem warmen Haus bei den Menschen."), [], ["language"]),
    (20, "clean language=-ko", talk("이것은 어떤 동물이고 어디에서 사는 것을 좋아합니까?", "이것은 고양이이며 따뜻한 집을 좋아합니다."), [], ["language"]),
    (20, "clean language=en", talk("x = 1?", block("print(x)\nprint(y)")), KEPT, []),
    (20, "clean", talk("이것은 무엇입니까?", "고양이입니다."), KEPT, []),
    # 21: Alpaca
    *[(21, "load", ask("Go.", "Gone.", input=text), [["Go.", "Gone."]], [])
      for text in (None, "<noinput>", "No input", "N/A", "None", "  ")],
    (21, "load", ask("Go.", "Gone."), [["Go.", "Gone."]], []), (21, "load", ask("Go.", "5", input="5"), [["Go.", "5"]], []),
    (21, "load", ask("Go.", ""), [], ["no reply"]), (21, "load", ask("Go.", None), [], ["no reply"]),
    (21, "load", ask(" ", "Gone."), [], ["no reply"]), (21, "load", ask(["Go."], "Gone."), [], ["no reply"]),
    (21, "load", ask("Go.", "Gone.", input=["5"]), [], ["no conversation"]),
    *[(21, "load", ask(text, "A"), [[text, "A"]], [])
      for text in ("### Response:\nYes", "{} {text} {0}", "https://example.org", "Q\r\n")],
    (21, "split", ask(LONG * 3, "Gone."), "pieces", ["cut: a question"]),
    (21, "split", ask("Sum up.", "Gone.", input=LONG * 3), "pieces", ["cut: a question"]),
    (21, "load", dict(instruction="Go.", instances=[dict(input="", output="A"), dict(input="", output="B")]),
     [["Go.", "A"], ["Go.", "B"]], []),
    (21, "load", dict(instruction="Go.", instances=[]), [], ["no conversation"]),
    # 22: tasks that a model wrote
    (22, "load", wrote(task(4, "Say it once more.") + task(5, "Now be quiet, please.", "2\nthings")),
     [["Say it once more.", "Yes."], ["Now be quiet, please.", "Yes."]], []),
    (22, "load", wrote(" Say it once more.\n4. Input: <noinput>\n4. Output: Yes.\n###\n" + task(1, "Now be quiet, please.")),
     [["Say it once more.", "Yes."], ["Now be quiet, please.", "Yes."]], []),
    (22, "load", wrote("Say it once more.\n4. Output: Yes.\n###\n" + task(5, "Now be quiet, please.")),
     [["Now be quiet, please.", "Yes."]], ["no reply"]),
    (22, "load", wrote(task(4, "Say it once more.", out="Yes.\n4. Output: No.") + task(5, "Now be quiet, please.")),
     [["Now be quiet, please.", "Yes."]], ["no reply"]),
    (22, "load", wrote(task(4, "Say it once more.") + task(5, "Now be quiet, please."), "length"),
     [["Say it once more.", "Yes."]], ["no reply"]),
    (22, "load", wrote(task(4, "Say it once more.", out="It costs 20. Not\n20. That.\n### Title\n###\nOutput: x")),
     [["Say it once more.", "It costs 20. Not\n20. That.\n### Title\n###\nOutput: x"]], []),
    (22, "load", wrote(task(4, "Say it once more.", out="a\nb").replace("\n", "\r\n")), [["Say it once more.", "a\nb"]], []),
    (22, "load", {"choices": [dict(message=dict(content=task(4, "Say it once more.")), finish_reason="stop")]},
     [["Say it once more.", "Yes."]], []),
    (22, "load", {"choices": [dict(finish_reason="stop")]}, [], ["no conversation"]),
    (22, "load", wrote("I cannot do that."), [], ["no reply"]),
    *[(22, "load", wrote(task(4, text)), [[text, "Yes."]] * (not reason), [reason] * bool(reason)) for text, reason in (
        ("Say it again", "too short"), ("Say it once again", ""), ("a " * 149 + "a", ""), ("a " * 150 + "a", "too long"),
        ("Is mapping or drawing filed here?", ""), ("Draw me a sheep.", "cannot show"), ("DRAW me a sheep.", "cannot show"),
        ("Go to the next town.", "cannot show"), ("Write a program that sorts.", "program"), ("Write a programme for us.", "program"),
        ("- Say it once more.", "begin with a letter"), ("이것을 한 번 더 말해 주세요.", ""))],
    (22, "load", wrote(task(4, "a b c d e f g h i j") + task(5, "a b c d e f g x y z") + task(6, "a b c d e f g h y z")),
     [["a b c d e f g h i j", "Yes."], ["a b c d e f g x y z", "Yes."]], ["like an earlier one"]),  # 0.7 may stay
    (22, "load off=instructions", wrote(task(4, "Go.")), [["Go.", "Yes."]], []),
]


def texts(record) -> list[list[str]]:
    records = record if isinstance(record, list) else [record]
    return [[m["value"] for m in r["conversations"]] for r in records]


def learned(tokenizer, example, glued: bool) -> list[str]:
    """Each stretch of supervised tokens, spelled; one that ends with </s> with it."""
    out = []
    for begin, end, is_learned in data.stretches(example.labels):
        ids = list(example.tokens[begin:end])
        if is_learned:
            stop = ids[-1] == tokenizer.eos
            out.append(tokenizer.decode(ids[:len(ids) - stop], glued) + "</s>" * stop)
    return out


@pytest.mark.parametrize("group, stage, record, want, reasons", CASES,
                         ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_bad_input(tmp_path, tokenizer, group, stage, record, want, reasons):
    """Kept, mended or dropped, as the table says; nothing else happens to it and all of it is reported."""
    if "language" in stage:
        pytest.importorskip("py3langid")
    good = (dict(wrote(task(4, "What is a cat?", out="An animal with whiskers.")), id="good") if "choices" in str(record) else
            ask("What is a cat?", "An animal with whiskers.", id="good") if "instruct" in str(record) else GOOD)
    records = [good, *(record if isinstance(record, list) else [record])]
    (file := tmp_path / "people.json").write_text("\n".join(json.dumps(r) for r in records))
    report, (stage, _, option) = data.Report(), stage.partition(" ")
    off = option.removeprefix("off=").split(",")
    found = data.load_conversations(file, report, off)
    if stage == "clean":
        found = list(data.clean(found, report, languages=option.removeprefix("language=").split(",") if option else ()))
    pieces = found
    if stage == "split":
        pieces = [p for c in found for p in data.split(c, "vicuna_v1.1", tokenizer, 200, report)]
    assert pieces[0].id == "good" and [t.text for t in pieces[0].turns] == ["What is a cat?", "An animal with whiskers."]
    if want != "pieces":
        want = texts(record) if want is KEPT else want
        assert [[t.text for t in c.turns] for c in pieces[1:]] == want
    else:
        assert max(len(data.render(c, "vicuna_v1.1", tokenizer).tokens) for c in pieces) <= 200
        whole, parts = ([t.text for c in cs[1:] for t in c.turns] for cs in (found, pieces))
        assert len(whole) == len(parts) and all(a.startswith(b) and b for a, b in zip(whole, parts)), "a round is lost"
    assert len(report.entries) == sum(report.values()) == len(reasons), report
    assert all(name for name, _ in report.entries)
    left = [what for _, what in report.entries]
    for reason in reasons:
        assert (match := next((what for what in left if reason in what), None)), f"{reason} is not in {left}"
        left.remove(match)
    for c in pieces:  # and what is left of it is learned as it stands
        replies = [t.text + "</s>" for t in c.turns[1::2]]
        if c.extra.get("cut"):
            replies[-1] = replies[-1].removesuffix("</s>")
        assert learned(tokenizer, data.render(c, "vicuna_v1.1", tokenizer), False) == replies


LINE = json.dumps(talk("Q", "A"))

FILES = [  # group 19: content, number of conversations or what the one-line refusal says, reason
    (f"[{LINE}, {LINE}]", 2, ""), (f"{LINE}\n{LINE}", 2, ""), (gzip.compress(LINE.encode()), 1, ""),
    (f"\n\n{LINE}\n\n\n{LINE}\n\n", 2, ""), (LINE, 1, ""), (json.dumps(talk("Q", "A"), indent=2), 1, ""),
    (f"[\n{LINE},\n{LINE},\n]", "line 4: expected a record after the comma", ""), (f"[\n{LINE}\n{LINE}]", "line 3: expected , or ]", ""),
    (f"[{LINE}]\n{LINE}", "line 2: expected nothing after ]", ""), (f"[\n{LINE},\n", "line 3", ""),
    (f"{LINE}\n{LINE[:-5]}", "line 2", ""), (f"{LINE}\n{LINE[:30]}", "line 2", ""), (f"[{LINE},\n{LINE[:-5]}", "line 2", ""),
    (f"{LINE}\n{{'a': 1}}\n{LINE}", "line 2", ""), (f"{LINE}\noops\n", "line 2", ""),
    (f"{LINE}\n{json.dumps(LINE)}", 2, "JSON inside"), (json.dumps(LINE) + "\n" + LINE, 2, "JSON inside"),
    ('{"id": 1, "id": 2, ' + LINE[1:], 1, "stands twice"), ('{"a": NaN, "b": -Infinity, ' + LINE[1:], 1, ""),
    ('{"a": ' + "1" * 9999 + ", " + LINE[1:], "line 1: .*digits", ""), ('{"conversations": ' + "[" * 5000, "nested too deeply", ""), (json.dumps(talk("Q", "long " * 500000)), 1, ""),
    (f"{LINE}\n".encode() + b'{"a": "caf\xe9"}', "line 2", ""), (LINE.encode("utf-16"), "not UTF-8", ""),
    (b"\xef\xbb\xbf" + LINE.encode(), 1, ""), (gzip.compress(LINE.encode())[:-9], "damaged gzip", ""),
    (gzip.compress(LINE.encode())[:12] + b"xxxx" * 9, "damaged gzip", ""),
    ("{ a brace begins this story", "plain text", ""), ('{"quoted" words} in a play', "plain text", ""),
    ("[] buy milk\n[] bread", "plain text", ""), ('["Yes," she said.]', "plain text", ""), ("[1] A note", "plain text", ""),
    ('{"text": "a document"}', "plain text", ""),
]


@pytest.mark.parametrize("content, want, reason", FILES, ids=[f"19-{i}" for i in range(len(FILES))])
@pytest.mark.parametrize("chunk", [1 << 20, 7], ids=["", "small-reads"])
def test_bad_file(tmp_path, monkeypatch, content, want, reason, chunk):
    """A file is read whole or refused with the line, however the pieces fall in which it is read."""
    if chunk == 7 and len(content) > 1e5:
        pytest.skip("too slow")
    monkeypatch.setattr(sys.modules[data.read_chunks.__module__], "CHUNK", chunk)
    file, report = tmp_path / "people.json", data.Report()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(want, str):
        with pytest.raises(config.Problem, match=want) as caught:
            data.load_conversations(file, report)
        assert "\n" not in str(caught.value) and "people.json" in str(caught.value)
    else:
        assert [c.turns[0].text for c in data.load_conversations(file, report)] == ["Q"] * want
        assert reason in "".join(report) and len(report) == bool(reason)


# -- Koala's sources, as their publishers lay them out -------------------------------------------------------

WEBGPT = dict(question=dict(dataset="eli5", id="q1", full_text="Why is it so?"), answer_0="It is [1].", answer_1="No.",
              quotes_0=dict(title=["A page"], extract=["It is."]), quotes_1=dict(title=[], extract=[]), score_0=0.5, score_1=-0.5)
POST = dict(info=dict(id="t3", post="A long story."), summaries=[dict(text=" A story."), dict(text=" Nothing.")], choice=0)
HUMAN, BOT = "\n\nHuman: ", "\n\nAssistant: "


@pytest.mark.parametrize("kind, record, want, rejected", [
    ("hc3", dict(question="Why?", human_answers=["So.", "Thus."], chatgpt_answers=["Because."], source="x"),
     [["Why?", "So."], ["Why?", "Thus."], ["Why?", "Because."]], []),
    ("hh", dict(chosen=f"{HUMAN}Hi{BOT}Hello.{HUMAN}Human: or\n\nnot?{BOT}Yes.\n\nReally.",
                rejected=f"{HUMAN}Hi{BOT}Hello.{HUMAN}Human: or\n\nnot?{BOT}No."),
     [["Hi", "Hello.", "Human: or\n\nnot?", "Yes.\n\nReally."]], [["Hi", "Hello.", "Human: or\n\nnot?", "No."]]),
    ("webgpt", WEBGPT, [["Why is it so?\n\nSources for your answer:\n[1] A page: It is.", "It is [1]."]], [["Why is it so?", "No."]]),
    ("webgpt", {**WEBGPT, "score_0": 0.0, "score_1": 0.0}, [], []),
    ("summaries", POST, [["Summarize this text.\n\nA long story.", "A story."]], [["Summarize this text.\n\nA long story.", "Nothing."]]),
    ("oig", dict(text="<human>: Why <bot>: so?\n<bot>: Because.\n<human>: And?\n<bot>: No more.", metadata={}),
     [["Why <bot>: so?", "Because.", "And?", "No more."]], []),
    ("oig", dict(text="Background: a play.\n<human>: Why?\n<bot>: So."), [["Why?", "So."]], []),
    *[(kind, bad, [], []) for kind, bad in (("hc3", dict(question="Why?", human_answers=None, chatgpt_answers=[])),
                                            ("hh", dict(chosen=["Hi"], rejected=None)), ("webgpt", {**WEBGPT, "quotes_0": None}),
                                            ("summaries", {**POST, "info": {}}), ("summaries", {**POST, "summaries": [None]}))]])
def test_sources_of_koala(tmp_path, tokenizer, kind, record, want, rejected):
    """Each is recognised; a rejected reply is left out, or learned under the name that Koala gave it, and no other."""
    (file := tmp_path / "people.json").write_text(json.dumps([record]))
    assert data.kind_of(file) == kind
    for off, expected in ((), want), (["rejected"], want + rejected):
        found, report = [], data.Report()
        try:
            found = data.load_conversations(file, report, off)
        except config.Problem as problem:
            assert not expected and "no conversation" in str(problem)
        assert [[t.text for t in c.turns] for c in found] == expected
        assert sum(report.values()) == (0 if off or not want else len(rejected)) + (not want)
    for c in found:
        string = data.spell(tokenizer, data.render(c, "koala", tokenizer).tokens)
        assert string.count("An Unhelpful Answer:") == ([t.text for t in c.turns] in rejected)
        if "Unhelpful" in string:
            assert string.endswith(f"An Unhelpful Answer: {c.turns[-1].text}</s>") and string.count("GPT:") == len(c.turns) // 2 - 1
            with pytest.raises(config.Problem, match="koala has"):
                data.render(c, "vicuna_v1.1", tokenizer)
    assert kind != "oig" or "text" in record and [c.system for c in found] == ["Background: a play." if "play" in record["text"] else None]


def test_toy_sets_by_name(tokenizer):
    """The toy world is a file like any other, without a file."""
    assert [data.kind_of(name) for name in data.TOY] == ["documents", "alpaca", "sharegpt"]
    found = data.load_conversations("toy:conversations", report := data.Report())
    assert len(found) == report.read == 1000 and not report and found == data.load_conversations("toy:conversations")
    assert data.stats(data.StatsConfig("toy:instructions", str(tokenizer.path)))["conversations"] == 1000
    with pytest.raises(config.Problem, match="no such file: toy:songs"):
        data.kind_of("toy:songs")


# -- OpenAssistant -------------------------------------------------------------------------------------------

def m(name: str, *replies, **more) -> dict:
    """A message: p... asks, a... answers."""
    role = "prompter" if name[0] == "p" else "assistant"
    return dict(message_id=name, text=f"text of {name}", role=role, replies=list(replies), **more)


def tree(root: dict, **more) -> dict:
    return dict(message_tree_id=root["message_id"], tree_state="ready_for_export", prompt=root, **more)


def paths(records, pick: str = "all", synthetic: bool = False) -> tuple[list[str], data.Report]:
    report = data.Report()
    found = list(data.oasst_conversations(records, report, pick, synthetic))
    assert all(t.text == f"text of {n}" for c in found for t, n in zip(c.turns, c.extra["messages"]))
    assert all(t.role == ("user", "assistant")[i % 2] for c in found for i, t in enumerate(c.turns))
    return [" ".join(c.extra["messages"]) for c in found], report


RANKED = tree(m("p", m("a2", rank=1), m("a1", m("p2", m("a3")), m("p3", m("a4"), m("a5")), rank=0), m("a6", rank=2)))


@pytest.mark.parametrize("pick, want", [
    ("all", ["p a2", "p a1 p2 a3", "p a1 p3 a4", "p a1 p3 a5", "p a6"]),
    ("top1", ["p a1 p2 a3"]), ("top2", ["p a2", "p a1 p2 a3"]), ("best", ["p a1 p2 a3"])])
def test_paths_through_a_tree(pick, want):
    """top-k goes by rank; a reply without one counts only where it has no rival."""
    assert paths([RANKED], pick)[0] == want


@pytest.mark.parametrize("root, want, reasons", [
    (m("p", m("a", rank=None), m("b", rank=None)), ["p a", "p b"], []),
    (m("p", m("a", m("p2"), m("p3"))), ["p a"], []),  # questions that wait: the path above appears once
    (m("p", m("a", m("p2"), m("p3", m("b")))), ["p a", "p a p3 b"], []),
    (m("p", m("a", m("p2", m("b")), m("p3"))), ["p a p2 b"], []),
    (m("p", m("a", m("p2", m("b"), deleted=True))), ["p a"], ["deleted"]),
    (m("p", m("a", m("p2", m("b", synthetic=True)))), ["p a"], ["synthetic"]),
    (m("p", m("a"), synthetic=True), [], ["synthetic", "a tree without a reply"]),
    (m("p", m("a"), review_result=None), ["p a"], []), (m("p", m("a"), review_result=False), [], ["review", "a tree"]),
    (m("p"), [], ["a tree"]), ({**m("p"), "replies": None}, [], ["a tree"]),
    (m("p", m("a", m("b"))), ["p a"], ["role does not follow"]), (m("p", m("a", lang="de"), lang="en"), ["p a"], []),
    (m("p", {**m("a"), "text": " "}, m("b")), ["p b"], ["no text"]), (m("p", None, m("b")), ["p b"], ["not an object"]),
    (m("p", m("a", rank=0), m("b", rank=0)), ["p a", "p b"], []),
], ids=lambda x: "")
def test_odd_trees(root, want, reasons):
    """Group 23: what is deleted goes with all that follows it, and the path above it stays."""
    found, report = paths([tree(root)])
    assert found == want
    assert len(report.entries) == len(reasons) and all(any(r in what for _, what in report.entries) for r in reasons), report


def test_trees_in_other_states():
    found, report = paths([{**RANKED, "tree_state": "aborted_low_grade"}, {k: v for k, v in RANKED.items() if k != "tree_state"}])
    assert len(found) == 5 and "".join(report) == "dropped: the tree is aborted_low_grade"


def test_loose_messages_and_threads():
    """The same trees as messages in any order; orphans, cycles and doubles are reported, not followed."""
    flat, stack = [], [(RANKED["prompt"], None)]
    while stack:
        message, parent = stack.pop()
        flat.append({**{k: v for k, v in message.items() if k != "replies"}, "parent_id": parent, "message_tree_id": "p"})
        stack += [(r, message["message_id"]) for r in message["replies"]]
    for order in (flat, flat[::-1], flat[3:] + flat[:3]):
        found, report = paths(order)
        assert sorted(found) == sorted(paths([RANKED])[0]) and not report
    odd = [{**m("a"), "parent_id": "nobody"}, {**m("a"), "parent_id": "b"}, {**m("b"), "parent_id": "c"},
           {**m("c"), "parent_id": "b"}, m("p", message_tree_id="p", parent_id=None), {**m("d"), "parent_id": "p"}]
    found, report = paths(odd)
    assert found == ["p d"]
    assert report == {"dropped: this message_id stands twice": 1, "dropped: no path from a first message leads to it": 3}
    thread = dict(thread_id="t", thread=[m("p"), m("a"), m("p2"), m("b")])
    assert paths([thread])[0] == ["p a p2 b"]
    deep = [{**m(("p" if i % 2 == 0 else "a") + str(i)), "parent_id": ("p" if i % 2 else "a") + str(i - 1) if i else None}
            for i in range(4000)]
    assert [len(p.split()) for p in paths(deep)[0]] == [4000], "deeper than Python's stack"


def test_oasst_file(tmp_path, tokenizer, capsys):
    """Recognised by content, counted by stats, written as ShareGPT; trees are never divided."""
    trees = [tree(m("p", m("a", m("p2", m("b")), m("p3", m("c")), rank=0), m("d", rank=1))) for _ in range(10)]
    for i, t in enumerate(trees):
        t["message_tree_id"] = f"tree{i}"
    (file := tmp_path / "trees.jsonl").write_text("\n".join(map(json.dumps, trees)))
    assert data.kind_of(file) == "oasst" and len(data.load_conversations(file)) == 30
    figures = data.stats(data.StatsConfig(str(file), tokenizer=str(tokenizer.path), template="oasst"))
    assert [figures[pick]["threads"] for pick in ("all", "top2", "top1", "best")] == [30, 30, 20, 10]
    assert [figures[pick]["messages"] for pick in ("all", "top2", "top1", "best")] == [100, 100, 80, 40]
    assert figures["turns"] == 100 and "all" in capsys.readouterr().out
    out = tmp_path / "out.json"
    data.oasst_file(data.OasstConfig(str(file), out=str(out), valid=0.3))
    learn, held = (data.load_conversations(name) for name in (out, f"{out}.valid.json"))
    trees = [Counter(c.extra["tree"] for c in cs) for cs in (learn, held)]
    assert len(trees[0]) == 7 and len(trees[1]) == 3 and not trees[0].keys() & trees[1].keys()
    assert set((trees[0] + trees[1]).values()) == {3}
    for wrong in (dict(pick="top0"), dict(pick="first"), dict(valid=1.0), dict(out=str(file))):
        with pytest.raises(config.Problem):
            data.oasst_file(data.OasstConfig(**{"file": str(file), "out": str(out), **wrong}))
