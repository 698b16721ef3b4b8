"""`python sample.py --web`: the chat as a page, and a server that speaks OpenAI's API.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.chat.completions.create(model="vicuna", messages=[dict(role="user", content="Hi!")])

    GET  /                       assets/chat.html
    GET  /v1/models              the model; also /v1/models/NAME
    POST /v1/chat/completions    an answer, whole or as a stream of server-sent events
    POST /inside                 for the page: what the model computed for one token of an answer

The server stores no conversation: each request brings all its messages, and the KV cache is reused
for the prefix that it shares with the previous request. A lock lets requests be answered one after
the other.

Beyond OpenAI's fields, a request may have top_k, repetition_penalty, and return_token_ids, which
adds to each piece of text the ids it was decoded from. A setting that a request leaves out has its
value from the command line. Any website that the user visits could send requests to this machine,
so those with a foreign Host or Origin header are refused.
"""

import base64
import contextlib
import copy
import functools
import ipaddress
import json
import select
import socket
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import data
import model
from tools import inside
from tools.config import UserError

PAGE = Path(__file__).parent.parent / "assets" / "chat.html"
PAGE_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
               "img-src data:; connect-src 'self'; frame-ancestors 'none'")
MAX_BODY = 20 * 2 ** 20  # bytes; most of it pictures
LOCAL = ("127.0.0.1", "localhost")

# field of a request: the option of sample.py, its type, its lowest and its highest value
NUMBERS = {
    "temperature": ("temperature", float, 0, 100),
    "top_p": ("top_p", float, 0, 1),
    "top_k": ("top_k", int, 0, 2 ** 31),
    "repetition_penalty": ("repetition_penalty", float, 0.01, 100),
    "max_tokens": ("max_new_tokens", int, 1, 2 ** 31),
    "max_completion_tokens": ("max_new_tokens", int, 1, 2 ** 31),
    "seed": ("seed", int, -2 ** 63, 2 ** 63 - 1),
}
# Fields that we do not support, with the values that ask for nothing.
UNSUPPORTED = {
    "n": (1,), "logprobs": (False,), "tools": ([],), "functions": ([],),
    "presence_penalty": (0,), "frequency_penalty": (0,), "response_format": ({"type": "text"},),
}


class RequestError(UserError):
    """A refused request: the HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400,
                 code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


# -- reading a request ----------------------------------------------------------------------------

@dataclass
class Question:
    """A validated request for an answer."""
    turns: list[data.Turn]
    system: str | None
    pictures: list[str]  # data: URLs, one for each turn that has slots
    settings: object  # sample.SampleConfig
    stops: list[str]  # strings that end the answer, besides the template's own
    stream: bool
    include_usage: bool  # at the end of a stream
    return_token_ids: bool


def parse_question(body: dict, settings, n_slots: int) -> Question:
    """Raises RequestError. n_slots: image slots of a picture; 0 if the model cannot see."""
    for name, harmless in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise RequestError(f"{name}={body[name]!r} is not supported", name)
    settings = copy.copy(settings)
    for name, (setting, kind, low, high) in NUMBERS.items():
        if body.get(name) is not None:
            setattr(settings, setting, parse_number(body[name], name, kind, low, high))
    system, turns, pictures = parse_messages(body.get("messages"), n_slots)
    for name in ("stream", "return_token_ids"):
        if body.get(name) not in (None, False, True):
            raise RequestError(f"{name} must be true or false", name)
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise RequestError("stream_options must be an object", "stream_options")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(s and is_text(s) for s in stops):
        raise RequestError("stop must be a string, or a list of up to four", "stop")
    return Question(turns, system, pictures, settings, stops, stream=bool(body.get("stream")),
                    include_usage=bool(stream_options.get("include_usage")),
                    return_token_ids=bool(body.get("return_token_ids")))


def parse_number(value, name: str, kind: type, low: float, high: float):
    is_number = type(value) in (int, kind)  # isinstance would take True for an int
    if not is_number or not low <= value <= high:  # NaN is not between them
        what = "an integer" if kind is int else "a number"
        raise RequestError(f"{name} must be {what} from {low} to {high}", name)
    return kind(value)


def is_text(value) -> bool:
    """Whether it is text for UTF-8. JSON can spell half of a character: "\\ud83d"."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_messages(messages, n_slots: int) -> tuple[str | None, list[data.Turn], list[str]]:
    """OpenAI's messages -> the system text, the turns, and the data: URLs of their pictures."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RequestError("messages must be a list of objects", "messages")
    system, turns, pictures = None, [], []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        text, urls = parse_content(message.get("content"), where)
        if i == 0 and message.get("role") in ("system", "developer"):
            system = text
            continue
        expected = "assistant" if len(turns) % 2 else "user"
        if message.get("role") != expected:
            raise RequestError(f"{where}: expected the role {expected}: a system message, if any, "
                               "then user and assistant in turn", "messages")
        if len(urls) > 1 or (urls and expected != "user"):
            raise RequestError(f"{where}: one picture in a message, and only in the user's",
                               "messages")
        turns.append(data.Turn(expected, text, slots=n_slots if urls else 0))
        pictures += urls
    if len(turns) % 2 == 0:
        raise RequestError("the last message must be the user's", "messages")
    return system, turns, pictures


def parse_content(content, where: str) -> tuple[str, list[str]]:
    """A message's content, a string or a list of parts -> its text and the URLs of its images."""
    parts = [dict(type="text", text=content)] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise RequestError(f"{where}.content must be a string or a list of parts", "messages")
    texts, urls = [], []
    for part in parts:
        image = part.get("image_url")
        if part.get("type") == "text" and is_text(part.get("text")):
            texts.append(part["text"])
        elif part.get("type") == "image_url" and isinstance(image, dict):
            url = image.get("url")
            if not isinstance(url, str) or not url.startswith("data:image/"):
                raise RequestError(f"{where}: this server downloads nothing; send the image as a "
                                   "URL that begins with data:image/", "messages")
            urls.append(url)
        else:
            raise RequestError(f"{where}: expected parts of type text or image_url", "messages")
    return "\n".join(texts), urls


# -- answering ------------------------------------------------------------------------------------

class Service:
    """One model that answers one question at a time. `chat` is a sample.Chat."""

    def __init__(self, chat):
        self.chat, self.settings = chat, chat.cfg
        self.lock = threading.Lock()
        self.model, self.n_questions = self.describe(), 0
        # The same URL gives the same Picture, with its number: so the KV cache still fits.
        self.picture = functools.lru_cache(16)(self.open_picture)

    def describe(self) -> dict:
        """The model's entry in /v1/models, with what the page needs to know."""
        c, s = self.chat.net.config, self.settings
        defaults = dict(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                        repetition_penalty=s.repetition_penalty, max_tokens=s.max_new_tokens)
        return dict(id=self.chat.name, object="model", created=int(time.time()),
                    owned_by="nanoVicuna", max_model_len=self.chat.window, n_layers=c.n_layers,
                    n_heads=c.n_heads, parameters=model.count_parameters(c),
                    sees=self.chat.vlm is not None, template=self.chat.template,
                    system=data.get_template(self.chat.template).system, defaults=defaults)

    def parse(self, body: dict) -> Question:
        name = body.get("model")
        if name not in (None, self.chat.name):
            raise RequestError(f"no model {name!r}; this server has {self.chat.name!r}", "model",
                               404, "model_not_found")
        settings = copy.copy(self.settings)
        settings.seed += self.n_questions  # unless the request brings its own
        self.n_questions += 1
        return parse_question(body, settings, self.chat.vlm.n_queries if self.chat.vlm else 0)

    def open_picture(self, url: str):
        """A data: URL -> a sample.Picture."""
        kind, _, encoded = url.partition(",")
        try:
            content = base64.b64decode(encoded, validate=True)
        except ValueError:
            content = b""
        if not kind.endswith(";base64") or not content:
            raise RequestError("expected an image as data:image/...;base64,...", "messages")
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                return self.chat.open_picture(file.name)
            except UserError as error:
                raise RequestError(str(error).replace(file.name, "the picture"),
                                   "messages") from None

    def prompt(self, question: Question) -> list[int]:
        """Gives the chat the question's messages and settings; returns the tokens up to the reply.
        """
        chat = self.chat
        chat.turns, chat.system, chat.notices = question.turns, question.system, []
        chat.pictures = [self.picture(url) for url in question.pictures]
        chat.cfg = question.settings
        return chat.prompt()

    def answer(self, question: Question, left: Callable[[], bool]) -> Iterator[dict]:
        """Yields the pieces of the answer as dict(text, token_ids, usage so far), and then one
        without text, but with a finish_reason and notices. Ends early if the client leaves."""
        with self.lock:
            if left():  # while it waited for the lock
                return
            prompt, n_given = self.prompt(question), 0
            with contextlib.closing(self.chat.stream(prompt, attempt=0)) as pieces:
                for text, stopped in cut_at_stop(pieces, question.stops):  # noqa: B007
                    if left():
                        return
                    if text:
                        ids = self.chat.reply_ids
                        yield dict(text=text, token_ids=ids[n_given:], usage=usage(prompt, ids))
                        n_given = len(ids)
            ids = self.chat.reply_ids
            ended = ids[-1:] == [self.chat.tokenizer.eos] or self.chat.text_of(ids, True)[1]
            yield dict(text="", token_ids=ids[n_given:], usage=usage(prompt, ids),
                       finish_reason="stop" if ended or stopped else "length",
                       notices=self.chat.notices)

    def look_inside(self, body: dict) -> dict:
        """Explains body["token"], which follows the ids body["before"] in an answer: its
        probability, the likeliest tokens in its place, and how much each head of a layer attended
        to each token before it."""
        question, chat = self.parse(body), self.chat
        layer = parse_number(body.get("layer", 0), "layer", int, 0, chat.net.config.n_layers - 1)
        before = body.get("before")
        if not isinstance(before, list):
            raise RequestError("before must be a list of token ids", "before")
        ids = [*before, body.get("token")]
        for token in ids:
            parse_number(token, "before and token", int, 0, chat.net.config.vocab_size - 1)
        with self.lock:
            prompt = self.prompt(question)
            tokens = prompt + ids[:-1]
            if len(tokens) > chat.window:
                raise RequestError(f"{len(tokens)} tokens exceed the context of {chat.window}")
            shown, _ = chat.mark_pictures(prompt)
            images = [picture.vectors for picture in shown]
            logits, weights = inside.forward_textbook(
                chat.net, tokens, layer, torch.cat(images) if images else None)
        likeliest = [dict(text=self.chat.spell(token), probability=p, token=token)
                     for token, p in inside.likeliest(logits[-1], k=5)]
        probability = logits[-1].float().softmax(-1)[ids[-1]].item()
        heads = [[round(weight, 4) for weight in head.tolist()] for head in weights[:, -1]]
        return dict(likeliest=likeliest, text=self.chat.spell(ids[-1]), probability=probability,
                    heads=heads, tokens=[self.chat.spell(token) for token in tokens],
                    prompt_tokens=len(prompt))


def usage(prompt: list[int], ids: list[int]) -> dict:
    return dict(prompt_tokens=len(prompt), completion_tokens=len(ids),
                total_tokens=len(prompt) + len(ids))


def cut_at_stop(pieces: Iterator[str], stops: list[str]) -> Iterator[tuple[str, bool]]:
    """The pieces up to the first stop string, each with whether one was found. Text that may be
    the beginning of one is held back."""
    text, n_given = "", 0
    for piece in pieces:
        text += piece
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            yield text[n_given:min(found)], True
            return
        n_safe = len(text)
        for stop in stops:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]):
                    n_safe = min(n_safe, len(text) - n)
        yield text[n_given:n_safe], False
        n_given = n_safe
    yield text[n_given:], False


# -- HTTP -----------------------------------------------------------------------------------------

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a client that neither sends nor reads

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def guarded(self, respond: Callable[[], None]) -> None:
        """Responds, or sends the error in OpenAI's form."""
        self.streaming = False
        try:
            self.body = self.read_body()
            self.refuse_foreign()
            respond()
        except RequestError as error:
            self.send_problem(error.status, str(error), error.param, error.code)
            if error.status in (411, 413):
                self.discard_body()
        except UserError as error:
            self.send_problem(400, str(error))
        except OSError:  # the client has left
            self.close_connection = True
        except Exception as error:  # a bug of ours: printed here, not sent
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            self.send_problem(500, "the server failed; its terminal says why")

    def read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if self.headers.get("Transfer-Encoding") or not length.isdecimal():
            raise RequestError("a body needs its Content-Length", status=411)
        if len(length) > 15 or int(length) > MAX_BODY:
            raise RequestError(f"a body of {length} bytes; at most {MAX_BODY}", status=413)
        return self.rfile.read(int(length))

    def discard_body(self) -> None:
        """Reads what still comes, for a moment. A connection that is closed with data unread is
        reset, and the client may never see the response."""
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            for _ in range(4 * MAX_BODY // 2 ** 16):
                if not self.rfile.read(2 ** 16):
                    break

    def refuse_foreign(self) -> None:
        """A website can make its visitor's browser send requests here: then the Origin header
        names the website. It can also point its own name to 127.0.0.1 (DNS rebinding): then the
        Host header is that name."""
        hosts = self.headers.get_all("Host", [])
        origin = self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.is_own(hosts[0]):
            raise RequestError(f"foreign Host header {', '.join(hosts)!r}", status=403)
        if origin is not None and origin != f"http://{hosts[0]}":
            raise RequestError(f"foreign Origin header {origin!r}", status=403)

    def get(self) -> None:
        path, entry = self.path.partition("?")[0], self.server.service.model
        if path == "/":
            self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            self.send_json(200, dict(object="list", data=[entry]))
        elif path == "/v1/models/" + urllib.parse.quote(entry["id"]):
            self.send_json(200, entry)
        else:
            raise RequestError(f"nothing at GET {path}", status=404)

    def post(self) -> None:
        path, service = self.path.partition("?")[0], self.server.service
        if path not in ("/v1/chat/completions", "/inside"):
            raise RequestError(f"nothing at POST {path}", status=404)
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object")
        if path == "/inside":
            self.send_json(200, service.look_inside(body))
            return
        question = service.parse(body)
        with contextlib.closing(service.answer(question, self.left)) as pieces:
            respond = self.send_stream if question.stream else self.send_answer
            respond(question, pieces)

    def left(self) -> bool:
        """Whether the client has closed the connection. A closed one can be read, and yields b"".
        """
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def head(self, kind: str) -> dict:
        return dict(id=f"chatcmpl-{uuid.uuid4().hex}", object=kind, created=int(time.time()),
                    model=self.server.service.chat.name)

    def send_answer(self, question: Question, pieces: Iterator[dict]) -> None:
        pieces = list(pieces)
        if not pieces or "finish_reason" not in pieces[-1]:
            raise ConnectionAbortedError  # the client has left
        last = pieces[-1]
        message = dict(role="assistant", content="".join(piece["text"] for piece in pieces))
        choice = dict(index=0, message=message, finish_reason=last["finish_reason"], logprobs=None)
        if question.return_token_ids:
            choice["token_ids"] = [token for piece in pieces for token in piece["token_ids"]]
        self.send_json(200, dict(self.head("chat.completion"), choices=[choice],
                                 usage=last["usage"], notices=last["notices"]))

    def send_stream(self, question: Question, pieces: Iterator[dict]) -> None:
        head, piece = self.head("chat.completion.chunk"), {}
        for piece in pieces:  # headers wait for the first one: an error can still be a 400
            delta = dict(content=piece["text"]) if piece["text"] else {}
            if not self.streaming:
                self.start_stream()
                delta["role"] = "assistant"
            choice = dict(index=0, delta=delta, finish_reason=piece.get("finish_reason"))
            event = dict(head, choices=[choice])
            if question.return_token_ids:
                choice["token_ids"], event["usage"] = piece["token_ids"], piece["usage"]
            if "notices" in piece:
                event["notices"] = piece["notices"]
            self.send_event(event)
        if "finish_reason" in piece:
            if question.include_usage:
                self.send_event(dict(head, choices=[], usage=piece["usage"]))
            self.send_event("[DONE]")

    def start_stream(self) -> None:
        self.streaming = self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()

    def send_event(self, content) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.wfile.write(f"data: {text}\n\n".encode())

    def send_json(self, status: int, content) -> None:
        self.send(status, json.dumps(content).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", PAGE_POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        if status >= 400:
            self.close_connection = True
            self.send_header("Connection", "close")
            self.send_header("x-should-retry", "false")  # else the openai client asks again
        self.end_headers()
        self.wfile.write(content)

    def send_problem(self, status: int, message: str, param=None, code=None) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        content = dict(error=dict(message=message, type=kind, param=param, code=code))
        with contextlib.suppress(OSError):  # the client may have left
            if self.streaming:
                self.send_event(content)
            else:
                self.send_json(status, content)

    def send_error(self, code, message=None, explain=None):
        """Called by the standard library for what is not HTTP, and for methods without a do_X."""
        self.streaming = False
        self.send_problem(405 if code == 501 else code, message or "no such method")

    def log_message(self, *_):
        pass  # the terminal is for problems


class Server(ThreadingHTTPServer):
    daemon_threads = True  # Ctrl-C does not wait for answers
    request_queue_size = 128  # connections that wait to be accepted

    def __init__(self, service: Service, host: str, port: int):
        self.service, self.host = service, host
        super().__init__((host, port), Handler)

    def handle_error(self, *_):
        pass  # the client has left between two requests

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server. With --host=0.0.0.0, any IP address does: DNS
        rebinding needs a name."""
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname
            if name in (*LOCAL, self.host):
                return True
            return self.host == "0.0.0.0" and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def serve(chat, host: str, port: int) -> None:
    """Runs until Ctrl-C."""
    server = Server(Service(chat), host, port)
    url = f"http://{host}:{server.server_port}"
    if host not in LOCAL:
        print("warning: anyone who can reach this machine can use the model; there is no password",
              file=sys.stderr)
    print(f"chat: {url}\nOpenAI's API: {url}/v1\nCtrl-C ends it.", flush=True)
    with server:
        server.serve_forever()
