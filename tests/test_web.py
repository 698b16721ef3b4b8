"""Tests of `sample.py --web`: OpenAI's API with its own client, what is refused, the look inside,
and the page in a real browser. The model is tiny, and says only words."""

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image

import browser
import data
import model
import sample
import vision
from test_sample import WORDS, talker
from test_sample import tokenizer as tokenizer
from tools import inside, web
from tools.config import UserError

PAGE = Path(web.PAGE).read_text(encoding="utf-8")


def png(color: str, size: int = 12) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def seeing(llama):
    """The talker with random eyes of three vectors."""
    vit = vision.ViT(vision.ViTConfig(12, 6, 16, 1, 2, 16))
    qformer = vision.QFormer(vision.QFormerConfig(16, 16, 1, 2, 16, n_queries=3))
    return vision.MiniGPT4(llama, vit, qformer).eval()


@contextlib.contextmanager
def serving(net, tokenizer, **settings):
    cfg = sample.SampleConfig(**{"max_new_tokens": 12, "web": True, **settings})
    chat = sample.Chat(net, tokenizer, "vicuna_v1.1", cfg)
    chat.name = "talker"
    server = web.Server(web.Service(chat), cfg.host, 0)
    server.client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1",
                                  api_key="none", max_retries=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(tokenizer):
    with serving(seeing(talker(tokenizer)), tokenizer) as server:
        yield server


def ask(server, text: str, **options):
    return server.client.chat.completions.create(
        model="talker", messages=[dict(role="user", content=text)], **options)


def fresh_answer(server, *questions: str) -> list[str]:
    """What the terminal's chat says, with the same model."""
    chat = server.service.chat
    cfg = sample.SampleConfig(max_new_tokens=12)
    other = sample.Chat(chat.vlm or chat.net, chat.tokenizer, chat.template, cfg, chat.window)
    return ["".join(other.answer(question)) for question in questions]


def request(server, method: str, path: str, body=None, **headers) -> tuple[int, dict]:
    """Status and JSON of a raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content.startswith(b"{") else content


def never_ends(server) -> None:
    server.service.chat.net.output.weight.data[server.service.chat.tokenizer.eos] = 0


# -- OpenAI's API, with OpenAI's client -----------------------------------------------------------

def test_the_official_client_lists_asks_and_streams(server):
    """It reads every field strictly; and a stream must say what the whole answer says."""
    listed = server.client.models.list().data
    assert [entry.id for entry in listed] == ["talker"]
    assert server.client.models.retrieve("talker").owned_by == "nanoVicuna"
    (expected,) = fresh_answer(server, "cat house")
    whole = ask(server, "cat house")
    assert whole.choices[0].message.content == expected != ""
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(ask(server, "cat house", stream=True, stream_options=dict(include_usage=True)))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == expected and len(pieces) > 2


def test_earlier_messages_are_the_conversation(server):
    """The server keeps none: each request brings the messages, and the cache changes nothing."""
    said, messages = [], [dict(role="system", content=data.TEMPLATES["vicuna_v1.1"].system)]
    for word in WORDS[:4]:
        messages.append(dict(role="user", content=word))
        ask(server, "something else in between")
        answer = server.client.chat.completions.create(model="talker", messages=messages)
        said.append(answer.choices[0].message.content)
        messages.append(dict(role="assistant", content=said[-1]))
    assert said == fresh_answer(server, *WORDS[:4])


def test_an_answer_says_why_it_ended(server):
    assert ask(server, "cat", max_tokens=1).choices[0].finish_reason == "length"
    never_ends(server)
    text = ask(server, "cat").choices[0].message.content
    words = text.split()
    stop = next(word for word in words if word != words[0])
    cut = ask(server, "cat", stop=[stop, "nowhere"])
    assert cut.choices[0].message.content == text[:text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = ask(server, "cat", stop=stop, stream=True)  # nothing of it may slip out first
    pieces = [chunk.choices[0].delta.content or "" for chunk in streamed]
    assert "".join(pieces) == text[:text.index(stop)]


@pytest.mark.parametrize("pieces", [["a STOP b"], list("a STOP b"), ["a S", "TO", "P b"]])
def test_no_part_of_a_stop_string_slips_out(pieces):
    """What may be its beginning waits until the next piece decides."""
    for stops in (["STOP"], ["TOPS", "STOP"]):
        given = list(web.cut_at_stop(iter(pieces), stops))
        assert "".join(text for text, _ in given) == "a " and given[-1][1]
    given = list(web.cut_at_stop(iter([*pieces[:1], " STO"]), ["b STOP"]))
    assert "".join(text for text, _ in given) == pieces[0] + " STO" and not given[-1][1]


def test_sampling_as_the_request_says(server):
    never_ends(server)
    hot = [ask(server, "cat", temperature=2).choices[0].message.content for _ in range(4)]
    assert len(set(hot)) > 1, "every request has the same seed"
    same = {ask(server, "cat", temperature=2, seed=5).choices[0].message.content for _ in "ab"}
    assert len(same) == 1
    cold = ask(server, "cat", temperature=2, extra_body=dict(top_k=1)).choices[0].message.content
    assert [cold] == fresh_answer(server, "cat")


def picture_message(url: str) -> list[dict]:
    parts = [dict(type="image_url", image_url=dict(url=url)), dict(type="text", text="What?")]
    return [dict(role="user", content=parts)]


def test_pictures_come_in_data_urls_only(server, tokenizer, tmp_path):
    """Fetching a URL for a client would reach what the client cannot: the network behind us."""
    file = tmp_path / "red.png"
    file.write_bytes(png("red"))
    chat = server.service.chat
    terminal = sample.Chat(chat.vlm, tokenizer, chat.template, chat.cfg, chat.window)
    terminal.show_image(str(file))
    expected = "".join(terminal.answer("What?"))
    answers = server.client.chat.completions
    seen = answers.create(model="talker", messages=picture_message(data_url(png("red"))))
    assert seen.choices[0].message.content == expected
    for url in ("http://127.0.0.1/red.png", "file:///etc/passwd", str(file), "data:text/html,x",
                "data:image/png;base64,!", "data:image/png,red", data_url(b"GIF8nonsense")):
        with pytest.raises(openai.BadRequestError) as error:
            answers.create(model="talker", messages=picture_message(url))
        assert "/tmp" not in str(error.value)


def test_a_blind_model_says_so(tokenizer):
    with serving(talker(tokenizer), tokenizer) as server:
        with pytest.raises(openai.BadRequestError, match="cannot see"):
            server.client.chat.completions.create(
                model="talker", messages=picture_message(data_url(png("red"))))


# -- what is refused ------------------------------------------------------------------------------

HI = [dict(role="user", content="Hi")]
WRONG_BODIES = [
    b"", b"{", b"[]", b"\xff", b"[" * 100000, {}, dict(messages=[]), dict(messages="Hi"),
    dict(messages=[1]), dict(messages=[dict(role="user")]), dict(messages=[*HI, *HI]),
    dict(messages=[dict(role="assistant", content="Hi")]),
    dict(messages=[dict(role="user", content=[dict(type="audio")])]),
    dict(messages=[dict(role="user", content=[dict(type="image_url", image_url="x")])]),
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1%s}' % (b"0" * 400),
    dict(messages=HI, temperature="hot"), dict(messages=HI, temperature=True),
    dict(messages=HI, top_p=1.5), dict(messages=HI, max_tokens=0), dict(messages=HI, top_k=-1),
    dict(messages=HI, n=2), dict(messages=HI, tools=[{}]), dict(messages=HI, stream="yes"),
    dict(messages=HI, stop=[1]), dict(messages=HI, stop=[""]), dict(messages=HI, stream_options=3),
    dict(messages=[dict(role="user", content="cat " * 600)]),
    dict(messages=[dict(role="user", content="cat " * 600)], stream=True),
]


def test_a_wrong_body_is_a_4xx_in_openais_form(server):
    """Never a traceback, nor a 500, after which the client would ask twice more."""
    for body in WRONG_BODIES:
        status, content = request(server, "POST", "/v1/chat/completions", body)
        assert status == 400, body
        assert set(content["error"]) == {"message", "type", "param", "code"}, body
        assert content["error"]["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="this server has 'talker'"):
        server.client.chat.completions.create(model="gpt-4", messages=HI)
    assert ask(server, "cat").choices[0].message.content, "it still answers"


def test_wrong_requests_to_look_inside(server):
    good = dict(messages=HI, before=[], token=5, layer=0)
    assert request(server, "POST", "/inside", good)[0] == 200
    for wrong in (dict(before=3), dict(token=None), dict(token=10 ** 6), dict(before=["a"]),
                  dict(layer=9), dict(before=[5] * 600), dict(messages=[])):
        assert request(server, "POST", "/inside", {**good, **wrong})[0] == 400, wrong


def test_what_is_not_there_and_what_is_too_large(server):
    assert request(server, "GET", "/etc/passwd")[0] == 404
    assert request(server, "POST", "/v1/completions", {})[0] == 404
    assert request(server, "PUT", "/")[0] == 405
    status, content = request(server, "POST", "/inside", b"x", **{"Content-Length": "9" * 12})
    assert status == 413 and "at most" in content["error"]["message"]
    assert request(server, "POST", "/inside", iter([b"x"]))[0] == 411  # sent in chunks


def test_foreign_hosts_and_origins_are_refused(server):
    """Any page in the user's browser can send requests to 127.0.0.1: by its own name that points
    there (Host), or across origins (Origin)."""
    own = f"127.0.0.1:{server.server_port}"
    body = dict(messages=HI)
    for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST")):
        given = body if method == "POST" else None
        assert request(server, method, path, given)[0] == 200
        assert request(server, method, path, given, Origin=f"http://{own}")[0] == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", ""):
            assert request(server, method, path, given, Host=host)[0] == 403, host
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{own}"):
            assert request(server, method, path, given, Origin=origin)[0] == 403, origin


def test_only_this_machine_unless_asked(server, monkeypatch, capsys):
    """A model that answers everybody in the café is not what `--web` promises."""
    assert server.server_address[0] == "127.0.0.1" == sample.SampleConfig().host
    monkeypatch.setattr(web.Server, "serve_forever", lambda self: None)
    web.serve(server.service.chat, "127.0.0.1", 0)
    assert "warning" not in capsys.readouterr().err
    web.serve(server.service.chat, "0.0.0.0", 0)
    assert "warning" in capsys.readouterr().err
    wide = web.Server(server.service, "0.0.0.0", 0)
    wide.server_close()
    assert wide.is_own("192.168.1.5:8000") and not wide.is_own("evil.example:8000")


def test_options_of_the_page_and_of_the_terminal():
    for wrong in (dict(port=8001), dict(host="0.0.0.0"), dict(web=True, prompt="Hi"),
                  dict(web=True, image="a.png"), dict(web=True, port=70000)):
        with pytest.raises(UserError, match=list(wrong)[-1]):
            sample.SampleConfig(**wrong)


# -- many clients, and clients that leave ---------------------------------------------------------

def test_fifty_at_once_are_answered_one_after_the_other(server):
    """The standard library's server lets five connections wait; and the cache holds one chat."""
    questions = [f"{a} {b}" for a in WORDS[:7] for b in WORDS[:8]][:50]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda text: ask(server, text), questions))
    texts = [answer.choices[0].message.content for answer in answers]
    for i in (0, 17, 49):
        assert [texts[i]] == fresh_answer(server, questions[i])
    assert len(set(texts)) > 10, "this test cannot fail"


def slowly(server, seconds: float) -> list[int]:
    """Lets each token take longer than the one before, so that whoever wants to stop has the time;
    returns a list that grows with every token."""
    net, made = server.service.chat.net, []
    generate = net.generate

    def slow(*args, **options):
        for token in generate(*args, **options):
            made.append(token)
            yield token
            time.sleep(seconds * len(made))
    net.generate = slow
    return made


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_generation(server, stream):
    """Else an abandoned answer of a thousand tokens keeps everybody else waiting."""
    never_ends(server)
    made = slowly(server, 0.005)
    body = json.dumps(dict(messages=HI, stream=stream, max_tokens=300)).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.server_port)) as leaving:
        leaving.sendall(head.encode() + body)
        while len(made) < 3:
            time.sleep(0.01)
    # The whole answer would take minutes.
    assert server.service.lock.acquire(timeout=20), "it goes on although nobody listens"
    server.service.lock.release()
    assert ask(server, "cat", max_tokens=3).choices[0].finish_reason == "length"


def test_a_failure_of_ours_is_told_without_a_traceback(server, capsys):
    server.service.chat.net.generate = lambda *_, **__: 1 / 0
    status, content = request(server, "POST", "/v1/chat/completions", dict(messages=HI))
    assert status == 500 and "division" not in json.dumps(content)
    assert "division by zero" in capsys.readouterr().err


# -- inside ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_the_pass_by_hand_computes_what_the_model_computes(n_kv_heads):
    """It is written out again, so it can be wrong by itself: then the page would explain another
    model than the one that answers."""
    c = model.LLaMAConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=n_kv_heads, hidden_dim=48,
                          vocab_size=60, max_seq_len=64, rope_scaling=1.5, rope_theta=500.)
    net = model.LLaMA(c).eval()
    tokens = torch.randint(60, (20,))
    tokens[3:6] = model.IMAGE_SLOT
    images = torch.randn(3, 32)
    with torch.no_grad():
        fused = net(tokens[None], images)[0]
    for layer in range(3):
        logits, weights = inside.forward_textbook(net, tokens.tolist(), layer, images)
        torch.testing.assert_close(logits, fused, atol=1e-5, rtol=1e-5)
        assert weights.shape == (4, 20, 20)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 20))
        assert not weights.triu(1).any(), "it looks into the future"


def test_the_weights_shown_are_those_of_that_layer_and_head(monkeypatch):
    """Each is compared with what textbook attention multiplies the values by."""
    c = model.LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=60)
    net = model.LLaMA(c).eval()
    net.set_fused(False)
    tokens, seen = torch.randint(60, (9,)), []

    def noted(q, k, v, mask):
        one_hot = torch.eye(k.shape[-2]).expand(1, 4, -1, -1)
        seen.append(textbook(q, k, one_hot, mask)[0])
        return textbook(q, k, v, mask)

    textbook = model.attention_textbook
    monkeypatch.setattr(model, "attention_textbook", noted)
    with torch.no_grad():
        net(tokens[None])
    for layer in range(2):
        _, weights = inside.forward_textbook(net, tokens.tolist(), layer)
        torch.testing.assert_close(weights, seen[layer])


def test_a_clicked_token_is_explained_as_it_was_sampled(server):
    """At temperature 0 each token of an answer is the likeliest in its place: also behind a
    picture and an earlier round, and only if the page's request rebuilds the same prompt."""
    messages = [*picture_message(data_url(png("blue"))), dict(role="assistant", content="red tree"),
                dict(role="user", content="moon")]
    body = dict(messages=messages, return_token_ids=True)
    _, answer = request(server, "POST", "/v1/chat/completions", body)
    ids = answer["choices"][0]["token_ids"]
    assert len(ids) == answer["usage"]["completion_tokens"] > 2
    for i, token in enumerate(ids):
        body = dict(messages=messages, before=ids[:i], token=token, layer=1)
        _, seen = request(server, "POST", "/inside", body)
        assert seen["likeliest"][0]["token"] == token
        assert seen["likeliest"][0]["probability"] == pytest.approx(seen["probability"])
        assert len(seen["likeliest"]) == 5
        assert seen["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert len(seen["tokens"]) == len(seen["heads"][0]) == seen["prompt_tokens"] + i
    assert seen["tokens"].count("▦") == 3


def test_the_attention_shown_is_that_of_the_layer_asked_for(server):
    """And that of the last token read, from which the chosen one was predicted."""
    chat, before = server.service.chat, [5, 6, 7]
    prompt = data.render(data.Conversation([data.Turn("user", "Hi")]), chat.template,
                         chat.tokenizer).tokens
    for layer in range(2):
        body = dict(messages=HI, before=before, token=8, layer=layer)
        _, seen = request(server, "POST", "/inside", body)
        _, weights = inside.forward_textbook(chat.net, prompt + before, layer)
        shown = torch.tensor(seen["heads"])
        torch.testing.assert_close(shown, weights[:, -1], atol=1e-4, rtol=0)


def test_the_probabilities_are_the_models():
    """Before temperature and top-k, as the page says: they sum to 1 over the whole vocabulary."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    powers = logits.exp()
    expected = [(i, (powers[i] / powers.sum()).item()) for i in range(3)]
    assert inside.likeliest(logits, k=3) == [(i, pytest.approx(p)) for i, p in expected]


# -- the page -------------------------------------------------------------------------------------

def test_the_page_loads_nothing_from_elsewhere(server):
    status, content = request(server, "GET", "/")
    assert status == 200 and content.decode() == PAGE
    assert request(server, "GET", "/", Host="evil.example")[0] == 403
    assert not re.search(r"https?://|\bsrc=|@import|<link|innerHTML|url\(", PAGE)


@pytest.fixture
def page(server, tmp_path):
    if not browser.CHROMIUM:
        pytest.skip("no chromium")
    never_ends(server)
    with browser.open_page(f"http://127.0.0.1:{server.server_port}/", tmp_path / "profile") as page:
        page.resize(1400, 900)
        page.until("typeof model !== 'undefined' && !!model")
        yield page
        assert not page.errors


def say(page, text: str) -> None:
    count = page.run("rounds.length")
    page.click("#input")
    page.type(text + "\n")
    page.until(f"rounds.length == {count + 1} && !running")


def answers(page) -> list[str]:
    return page.run("rounds.map(round => textOf(round.answer))")


# A wait in it once did not end, perhaps because a click missed its target: see Page.click.
@pytest.mark.flaky(reruns=2)
def test_the_page_in_a_browser(server, page, tmp_path):
    """A chat as a person has it: type, stream, stop, retry, edit, undo, save, load, a picture, and
    a click on a token."""
    say(page, "cat house")
    assert answers(page) == fresh_answer(server, "cat house") != [""]
    assert page.run("document.querySelector('.answer').textContent") == answers(page)[0]

    made = slowly(server, 0.02)  # it streams, and can be stopped
    page.run("get('max_tokens').value = 300")
    page.click("#input")
    page.type("tree\n")
    page.until("rounds.length == 2 && rounds[1].answer.pieces.length > 3")
    page.click("#stop")
    page.until("!running")
    with server.service.lock:
        assert 3 < len(made) < 250, "the server goes on"
    assert "stopped" in page.run("document.body.innerText")
    del server.service.chat.net.generate
    page.run("get('max_tokens').value = 12")

    stopped = answers(page)[1]  # retry: another answer to the same question
    page.run("get('temperature').value = 2")
    page.run("[...document.querySelectorAll('button')].find(b => b.textContent == 'Retry').click()")
    page.until("!running")
    assert page.run("rounds.length") == 2 and answers(page)[1] != stopped
    page.run("get('temperature').value = 0")

    page.click(".question button")  # edit the first message: what came after it goes
    page.run("document.querySelector('.question textarea').select()")
    page.type("moon")
    page.click(".question button.main")
    page.until("!running && rounds.length == 1")
    assert answers(page) == fresh_answer(server, "moon")

    say(page, "bird")
    both = answers(page)
    assert both == fresh_answer(server, "moon", "bird")
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#save")
    saved = tmp_path / "chat.json"
    for _ in range(600):  # at most a minute
        if saved.exists():
            break
        time.sleep(0.1)
    turns = data.load_conversations(saved)[0].turns
    assert [turn.text for turn in turns] == ["moon", both[0], "bird", both[1]]
    page.run("[...document.querySelectorAll('button')].find(b => b.textContent == 'Undo').click()")
    assert page.run("[rounds.length, get('input').value]") == [1, "bird"]
    page.click("#new")
    assert page.run("rounds.length") == 0
    page.choose_file("#file", saved)
    page.until("rounds.length == 2")
    assert answers(page) == both
    page.run("get('input').value = ''")

    red = tmp_path / "red.png"  # a picture by the button
    red.write_bytes(png("red", 40))
    page.choose_file("#image", red)
    page.until("!!picture")
    say(page, "stone")
    assert page.run("document.querySelectorAll('.question img').length") == 1
    with_picture = answers(page)[2]

    page.click(".round:last-child .token:nth-child(4)")  # and a look inside its fourth token
    page.until("!!seen")
    said = page.run("document.querySelector('.likely.said code').textContent")
    assert said.replace("·", " ") == " " + with_picture.split()[3]
    assert page.run("document.querySelectorAll('.likely').length") == 5
    assert "▦▦▦" in page.run("get('context').textContent")
    shading = "[...document.querySelectorAll('#context span')].map(s => s.style.background).join()"
    mean = page.run(shading)
    page.click("#heads button:nth-child(3)")
    assert page.run(shading) != mean
    second = page.run(shading)
    page.run("get('layer').value = 0; get('layer').onchange()")
    page.until(f"({shading}) != {json.dumps(second)}")


def test_pictures_dropped_and_pasted(page):
    content = base64.b64encode(png("red")).decode()
    for kind, carrier in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.run(f"""(() => {{
            const bytes = Uint8Array.from(atob("{content}"), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "red.png", {{type: "image/png"}}));
            const Kind = "{kind}" == "drop" ? DragEvent : ClipboardEvent;
            dispatchEvent(new Kind("{kind}", {{{carrier}: transfer, cancelable: true}}));
        }})()""")
        assert page.until("picture") == data_url(png("red"))
        page.click("#unpicture")
        assert page.run("picture === null && get('picture').hidden")


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_a_phone_and_a_desk(page, width):
    """Nothing is cut off at the right, and the input is on the screen, with the panel open, too.
    Words with much attention were light on light in the dark scheme."""
    page.resize(width, 844)
    page.run("get('system').value = ''")
    say(page, "cat " * 30)
    for _ in range(2):
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.run("get('rounds').scrollWidth <= get('rounds').clientWidth")
        page.click(".token")
        page.until("!!seen")
    for scheme in ("light", "dark"):
        page.resize(width, 844, scheme)
        lowest, text = page.run(browser.LOWEST_CONTRAST)
        assert lowest >= 4.5, f"{scheme}: {text}"
    assert page.run("get('inside').getBoundingClientRect().right <= innerWidth")
    page.click("#close")
    box = page.run("get('send').getBoundingClientRect().toJSON()")
    assert box["right"] <= width and box["bottom"] <= 844


def test_an_error_of_the_server_is_shown_and_the_question_kept(page):
    say_too_much = "cat " * 600
    page.click("#input")
    page.run(f"get('input').value = {json.dumps(say_too_much)}")
    page.click("#send")
    page.until("!running && get('error').textContent.includes('context')")
    assert page.run("[rounds.length, get('input').value]") == [0, say_too_much.strip()]
