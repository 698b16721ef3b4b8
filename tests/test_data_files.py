"""Tests of data.py on files as people have them: read as a whole, repaired, or refused.

    pytest tests/test_data_files.py
"""

import gzip
import json
import os

import pytest

import data
from tools.config import UserError


def chat(*texts, roles=("human", "gpt"), **extra) -> dict:
    """A ShareGPT record: question, reply, question, ..."""
    messages = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return dict(conversations=messages, **extra)


def said(*pairs) -> dict:
    return dict(conversations=[{"from": role, "value": text} for role, text in pairs])


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    return path


def check_reasons(report, reasons: list[str]) -> None:
    """The report has one entry for each of these reasons, in this order."""
    entries = [entry for _, entry in report.entries]
    assert len(entries) == len(reasons), entries
    for reason, entry in zip(reasons, entries):
        assert reason in entry


QA = [["Q", "A"]]
GONE = [["Go.", "Gone."]]

# (record or records, texts of each conversation that comes out, reasons in the report)
CASES = [
    # the order of messages
    (said(("gpt", "Hi"), ("gpt", "Ho"), ("human", "Q"), ("gpt", "A")), QA,
     ["leading reply"] * 2),
    (said(("human", "Q"), ("human", "R"), ("gpt", "A"), ("gpt", "B")), [["Q\nR", "A\nB"]],
     ["merged consecutive"] * 2),
    (chat("Q", "A", "R"), QA, ["unanswered last question"]),
    # no conversation at all
    (chat("Q"), [], ["no reply"]),
    *[({"conversations": odd}, [], ["no conversation"]) for odd in (None, [])],
    ({"conversations": "Q"}, [], ["no reply"]),
    *[({"conversations": [odd]}, [], ["unknown role"]) for odd in (None, {"from": ["gpt"]})],
    ([None, 5, "x", []], [], ["no conversation"] * 4),
    # roles
    *[(chat("Q", "A", roles=roles), QA, []) for roles in (("prompter", "bing"), ("USER", "GPT"))],
    (said(("human", "Q"), ("system", "S"), ("gpt", "A")), QA, ["used the last system prompt"]),
    (said(("human", "Q"), ("tool", "3"), ("gpt", "A")), [], ["unknown role tool"]),
    (said(("user ", "Q"), ("<|Assistant|>:", "A")), QA, []),
    (said(("developer", "S"), ("Human", "Q"), ("ai", "A")), QA, []),
    # columns that are null or empty in this record, since others in the table have values there
    (dict(conversations=None, messages=chat("Q", "A")["conversations"]), QA, []),
    (dict(instruction="Q", output="A", conversations=[], messages=None), QA, []),
    (dict(instruction=None, output=None, **chat("Q", "A")), QA, []),
    # a list of lists
    ([chat("Q", "A")["conversations"]] * 2, QA * 2, []),
    ([[["Q", "A"]], ["Q", "A"], [1]], [], ["unknown role"] * 3),
    # messages without text
    *[(chat("Q", "A", value, "B"), QA, ["empty message"])
      for value in (None, 5, {"x": 1}, " \n\t", "\u200b\ufeff")],
    (chat("Q", "A", "R", ""), QA, ["empty message", "unanswered last question"]),
    # OpenAI's format, also mixed with ShareGPT's
    ({"messages": [{"role": "system", "content": ""}, {"from": "gpt", "value": "A"},
                   {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                   {"role": "assistant", "content": "A"}]}, QA, ["leading reply"]),
    # half an emoji: JSON can spell it, UTF-8 cannot, and it must not end the training
    (chat("cut \ud83d", "whole 🙂"), [["cut ?", "whole 🙂"]], []),
    *[(chat("Q", "A", id=name), QA, []) for name in (7, None)],
    # Alpaca
    (dict(instruction="Go.", response="Gone."), GONE, []),
    (dict(instruction="Go.", output=None), [], ["no conversation"]),
    *[(dict(instruction="Q", output="A", history=before), [["R", "B", "Q", "A"]], [])
      for before in ([["R", "B"]], chat("R", "B")["conversations"])],
    (dict(instruction="Q", output="A", history=["R", "B"]), [], ["unknown role"]),
    (dict(instruction=" ", output="Gone."), [], ["no reply"]),
    (dict(instruction="Go.", input=["5"], output="Gone."), [], ["no conversation"]),
    (dict(instruction="Go.", instances=[dict(input="", output="A"), dict(input="", output="B")]),
     [["Go.", "A"], ["Go.", "B"]], []),
    (dict(instruction="Go.", instances=[]), [], ["no conversation"]),
]


@pytest.mark.parametrize("record, want, reasons", CASES, ids=range(len(CASES)))
def test_bad_input(tmp_path, record, want, reasons):
    """A bad record is repaired or dropped, each with one line in the report; the good one beside
    it comes out untouched."""
    records = record if isinstance(record, list) else [record]
    good = ["What is a cat?", "An animal with whiskers."]
    first = chat(*good, id="good")
    if "instruction" in str(record):
        first = dict(id="good", instruction=good[0], output=good[1])
    report = data.Report()
    found = data.load_conversations(write(tmp_path / "people.json", [first, *records]), report)
    assert found[0].id == "good"
    assert [[t.text for t in c.turns] for c in found] == [good, *want]
    check_reasons(report, reasons)


# (record, what the report counts)
UNUSED = [
    (chat("Q", "A", mood="good", score=0, empty="", none=None), ["mood", "score"]),
    (dict(instruction="Q", output="A", response="B", kind="k", text="T"),
     ["response", "kind", "text"]),
    (dict(messages=[dict(role="system", content={"x": 1}),
                    dict(role="user", content="Q", name="Al", text="R"),
                    dict(role="ai", content="A", tool_calls=[1], weight=0.5)]),
     ["name of a message", "text of a message", "content of a message", "tool_calls of a message",
      "weight of a message"]),
    (dict(text="A document.", title="T", id=1, meta={}), ["title"]),
]


@pytest.mark.parametrize("record, unused", UNUSED)
def test_what_is_not_trained_on_is_counted(tmp_path, capsys, record, unused):
    """A column of the file can be what matters in it. None is left out in silence."""
    file, report = write(tmp_path / "people.json", [record] * 2), data.Report()
    if "title" in record:
        data.load_documents(file)
        assert "; not trained on: title: 2" in capsys.readouterr().out
        return
    data.load_conversations(file, report)
    assert report == {f"not trained on: {key}": 2 for key in unused}


def test_a_system_prompt_beside_the_conversation(tmp_path):
    """It was dropped, and the model learned to be a pirate without being told."""
    records = [chat("Q", "A", system="Be a pirate."), chat("Q", "A", system=[])]
    found = data.load_conversations(write(tmp_path / "chats.json", records))
    assert [c.system for c in found] == ["Be a pirate.", None]
    record = dict(instruction="Q", output="A", system="Be brief.", history=[["R", "B"]])
    (c,) = data.load_conversations(write(tmp_path / "tasks.json", [record]))
    assert c.system == "Be brief." and not c.extra
    data.save_conversations([c], tmp_path / "tasks.json", "alpaca")
    (again,) = data.load_conversations(tmp_path / "tasks.json")
    assert again.turns == c.turns and again.system == c.system


def test_weight_0_is_not_supervised(tmp_path):
    """OpenAI's and Axolotl's mark for a reply that is context only. It is kept in files."""
    record = chat("Q", "A", "R", "B")
    record["conversations"][1]["weight"] = 0
    file = write(tmp_path / "chats.json", [record])
    for _ in range(2):
        (c,) = data.load_conversations(file)
        spans = data.spans(c, data.TEMPLATES["vicuna_v1.1"])
        assert [span.text for span in spans if span.supervised] == ["B", ""]
        data.save_conversations([c], file)


IMAGE = {"type": "image_url", "image_url": {"url": "cat.png"}}
SEE = dict(type="text", text="See?")


@pytest.mark.parametrize("record", [
    chat("<image>\nWhat is it?", "A cat.", image="cat.jpg"),
    dict(instruction="What is it?", input="<image>", output="A cat.", image="cat.jpg"),
    chat("It is <image>", "A cat."),
    chat("Are <image> and <image> equal?", "No.", images=["1.png", "2.png"]),
    *[chat(parts, "A cat.") for parts in ([IMAGE], [SEE, IMAGE], [SEE, IMAGE, SEE])]])
def test_pictures_are_refused(tmp_path, record):
    """They were trained on as text: "<image>" as a word, and replies about what nobody can see."""
    with pytest.raises(UserError, match="people_1 has an <image>.*train_vlm.py"):
        data.load_conversations(write(tmp_path / "people.json", [chat("Q", "A"), record]))


def test_text_about_an_image_tag_is_no_picture(tmp_path):
    data.load_conversations(write(tmp_path / "c.json", [chat("Is <image> valid SVG?", "No.")]))


@pytest.mark.parametrize("given, want", [("5", "5"), (None, ""), ("<noinput>", ""), ("N/A", "")])
def test_input_of_alpaca(tmp_path, given, want):
    """A single character is an input, too; what says that there is none is not."""
    for key in ("input", "context"):  # Dolly's name for it
        record = {"instruction": "Go.", key: given, "output": "Gone."}
        (found,) = data.load_conversations(write(tmp_path / "tasks.json", [record]))
        assert found.turns[0] == data.Turn("user", "Go.", want)


def test_system_text(tmp_path):
    """An empty one says nothing, so the template's own is used."""
    records = [said(("system", text), ("human", "Q"), ("gpt", "A")) for text in ("S", "")]
    found = data.load_conversations(write(tmp_path / "chats.json", records))
    assert [c.system for c in found] == ["S", None]


LINE = json.dumps(chat("Q", "A"))

# (content, number of conversations, or what the one-line error says)
FILES = [
    (f"[{LINE}, {LINE}]", 2),
    (f"\r\n{LINE}\r\n\r\n\r\n{LINE}\r\n", 2),
    (gzip.compress(LINE.encode()), 1),
    (json.dumps(chat("Q", "A"), indent=2), 1),
    (b"\xef\xbb\xbf" + LINE.encode(), 1),
    ('{"a": NaN, "b": "\u2028", ' + LINE[1:] + "\n" + LINE, 2),
    # two files joined by cat, each with its byte order mark
    *[(f"\ufeff{LINE}{end}\ufeff{LINE}", 2) for end in ("", "\n", "\r\n")],
    (f"\ufeff[{LINE}]\n\ufeff[{LINE}]", 2),
    # broken JSON
    (f"[\n{LINE}\n{LINE}]", "broken JSON at line 3"),
    (f"{LINE}\n\n{LINE[:-5]}", "broken JSON at line 3"),
    (f"{LINE}\noops\n{LINE}", "broken JSON at line 2"),
    ('{"conversations": ' + "[" * 100000, "line 1: .*recursion"),
    # JSON is never prose: not with garbage before it, and not if its strings are broken
    *[(f"{odd}{LINE}\n{LINE}\n", "broken JSON at line 1") for odd in ("// a file\n", "data = ")],
    ("// a file\n" + json.dumps([chat("Q", "A")] * 9, indent=1), "broken JSON at line 1"),
    ('["One.", "Two."', "broken JSON at line 1"),
    ('[["One.", "Two."], ["Three', "broken JSON at line 1"),
    ('"One."\n"Two."', "no objects"),
    *[(str(odd), "single quotes") for odd in ([chat("Q", "A")], chat("Q", "A"), ["a", "b"])],
    # what is no text
    (b"PAR1\x15\x04\x15", "people.txt is a Parquet file"),
    (gzip.compress(b"PK\x03\x04\x14\x00"), "a zip file"),
    (b"\xfd7zXZ\x00\x00\x04", "an xz file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    *[(LINE.encode(encoding), "NUL bytes") for encoding in ("utf-16", "utf-16-le")],
    ("A book.\0\n", "NUL bytes"),
    # not UTF-8, damaged, empty
    (f"{LINE}\n".encode() + b'{"a": "caf\xe9"}', r"not UTF-8 \(line 2\)"),
    (gzip.compress(LINE.encode())[:-9], "corrupt gzip"),
    (gzip.compress(LINE.encode())[:12] + b"xxxx" * 9, "corrupt gzip"),
    (b"\xef\xbb\xbf \r\n", "is empty"),
    # plain text that only begins like JSON, documents, and what is of no kind
    ('{"quoted" words} in a play', "not conversations"),
    ("[Scene 1. A castle.]\nEnter KING", "not conversations"),
    ('"Who is there?" he said.\nAn object is:\n\n{"a": 1}\n\nSo.', "not conversations"),
    ('{"text": "a document"}', "not conversations"),
    ('[{"a": 1, "b": 2}]', "with the keys a, b"),
    ("[]", "no objects"),
    (json.dumps([chat("Q")] * 3), "dropped: no reply: 3"),
]


@pytest.mark.parametrize("content, want", FILES, ids=range(len(FILES)))
def test_bad_file(tmp_path, content, want):
    """A file is read as a whole, or refused with the line that is broken: the records after it
    must not be lost in silence."""
    file, report = tmp_path / "people.txt", data.Report()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(want, int):
        found = data.load_conversations(file, report)
        assert [c.turns[0].text for c in found] == ["Q"] * want and not report.entries
        return
    with pytest.raises(UserError, match=want) as caught:
        data.load_conversations(file, report)
    assert "\n" not in str(caught.value) and "people.txt" in str(caught.value)


def test_documents(tmp_path, capsys):
    """JSON lines with a "text" each, or a plain text. Records without text are left out, and that
    is said."""
    file = write(tmp_path / "texts.json", [dict(text="One."), dict(text=" "), dict(text="Two.")])
    assert data.load_documents(file) == ["One.", "Two."]
    assert "2 of 3 documents; skipped: no text: 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="conversations"):
        data.load_documents(write(file, [chat("Q", "A")]))
    text = "[Scene 1. A castle.]\nEnter KING\n"
    file.write_text(f"\ufeff{text}\ufeff{text}", encoding="utf-8")  # two files joined by cat
    assert data.load_documents(file) == [text * 2]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_saved_and_loaded_again(tmp_path, name):
    """Nothing changes on the way through a file, as an array or as lines."""
    texts = [" a\u2028b\n", "한국어 🙂", '\\n "{}" \x00', "\r\n\tx"]
    turns = [data.Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    chats = [data.Conversation(turns, "0", "S", {"k": [1]}), data.Conversation(turns[:2], "1")]
    report = data.Report()
    assert data.save_conversations(chats, tmp_path / name) == 2
    assert data.load_conversations(tmp_path / name, report) == chats and not report.entries


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """If a program dies while it writes, the old file must still be there, and no half of the new
    one under its name."""
    file = tmp_path / "new folder" / "a.json"
    with data.atomic_write(file) as out:
        out.write("한국")
    assert file.read_bytes() == "한국".encode()
    with pytest.raises(ZeroDivisionError), data.atomic_write(file) as out:
        out.write("half")
        out.write(1 / 0)
    assert file.read_bytes() == "한국".encode() and list(file.parent.iterdir()) == [file]


def test_a_device_is_not_replaced_and_a_link_stays(tmp_path):
    """--out=/dev/null, as root, made a plain file of the machine's /dev/null. A link to a file on
    a larger disk became a file on the small one."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "disk" / "a.json"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link, link):
        with data.atomic_write(path) as out:
            out.write("한국")
    assert os.read(reader, 99) == target.read_bytes() == "한국".encode()
    os.close(reader)
    assert pipe.is_fifo() and link.is_symlink()
    assert [file.name for file in target.parent.iterdir()] == ["a.json"]
