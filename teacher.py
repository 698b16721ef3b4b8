"""A stronger model as a function: conversations in, replies out, whoever it is that answers.

    ask = teacher("out/vicuna")                          # a checkpoint folder
    ask = teacher("gpt-4@https://api.openai.com/v1")     # an OpenAI-compatible server; key in OPENAI_API_KEY
    ask = teacher("llama@http://localhost:8080/v1")      # one of your own needs no key
    ask = teacher("oracle")                              # the toy world's, which knows every true answer
    replies = ask([Conversation([Turn("user", "Who are you?")])])

    python teacher.py out/vicuna "Who are you?"              # try one

`ask(conversations, keep)` calls keep(i, reply) the moment reply i is there, so that what was paid for can be
written down at once. A reply that could not be had is None, and `ask.why` says why.
"""

import dataclasses
import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Callable, NamedTuple, Optional, Sequence
from urllib.parse import urlsplit

import torch

import data
import model
import toy
import vision
from config import Problem, run


class Reply(NamedTuple):
    text: str
    ended: bool  # by itself, not by the limit
    read: int = 0  # tokens that were paid for, where the server says so
    written: int = 0


Keep = Callable[[int, Reply], None]
Asked = Sequence[data.Conversation]


def teacher(spec: str, temperature: float = 0.0, max_new_tokens: int = 1024, quantize: Optional[str] = None,
            **server):
    """`spec`: a checkpoint folder (quantize: as in convert.load), MODEL@URL (`server`: as in Server), or one
    of TOYS."""
    if spec in TOYS:
        return Oracle(spec)
    if re.match(r"(.+@)?https?://", spec):
        return Server(spec, temperature, max_new_tokens, **server)
    return Checkpoint(spec, temperature, max_new_tokens, quantize)


def refuse_pictures(name: str, conversations: Asked) -> None:
    if any(c.extra.get("image") for c in conversations):
        raise Problem(f"{name} cannot see, and there are questions about pictures")


# -- a server ------------------------------------------------------------------------------------------------

class Server:
    """Any server that speaks OpenAI's /chat/completions. Several requests are under way at once.

    What passes (429, 5xx, a time-out, a broken connection, garbage) is tried again, later and later, or
    when the server's Retry-After says so. `per_minute` requests at most are begun, 0: no limit. After three
    requests in a row without an answer it stops: Problem.
    """

    def __init__(self, spec: str, temperature: float, max_new_tokens: int, workers: int = 4,
                 per_minute: float = 0.0, tries: int = 6, timeout: float = 120.0, pause: float = 1.0):
        self.model, url = re.fullmatch(r"(?:(.+)@)?(https?://.+)", spec).groups()
        self.url, place = url.rstrip("/") + "/chat/completions", urlsplit(url)
        self.name = f"{self.model or 'default'}@{place.hostname}"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key and place.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise Problem(f"{self.name} needs a key: put it into the environment variable OPENAI_API_KEY")
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.workers, self.tries, self.timeout, self.pause = workers, tries, timeout, pause
        self.spacing, self.next_start = 60 / per_minute if per_minute else 0.0, 0.0
        self.read = self.written = self.retries = 0
        self.why = ""
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def __call__(self, conversations: Asked, keep: Optional[Keep] = None) -> list[Optional[Reply]]:
        refuse_pictures(self.name, conversations)
        replies: list[Optional[Reply]] = [None] * len(conversations)
        failed = 0  # requests in a row
        self.stopped.clear()

        def work(i: int) -> None:
            nonlocal failed
            if self.stopped.is_set():
                return
            try:
                reply = self._ask(conversations[i])
            except Problem as problem:
                with self.lock:
                    failed, self.why = failed + 1, str(problem)
                    if failed == 3:
                        self.stopped.set()
                return
            with self.lock:
                replies[i], failed = reply, failed if self.stopped.is_set() else 0
                self.read, self.written = self.read + reply.read, self.written + reply.written
                if keep:
                    keep(i, reply)

        pool = ThreadPoolExecutor(self.workers)
        try:
            for future in as_completed([pool.submit(work, i) for i in range(len(conversations))]):
                future.result()
        finally:  # also on Ctrl-C: what is under way is waited for and kept, the rest is not begun
            self.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed >= 3:
            raise Problem(f"{self.why}; three requests in a row. What was answered is kept: the same command "
                          "goes on")
        return replies

    def _ask(self, conversation: data.Conversation) -> Reply:
        messages = [dict(role=turn.role, content=turn.text + ("\n" + turn.input if turn.input else ""))
                    for turn in conversation.turns]
        if conversation.system:
            messages.insert(0, dict(role="system", content=conversation.system))
        body = json.dumps(dict(model=self.model or "default", messages=messages, temperature=self.temperature,
                               max_tokens=self.max_new_tokens)).encode()
        for attempt in range(self.tries):
            self._wait_for_turn()
            after = None
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code} {error.reason}"
                try:
                    why += ": " + " ".join(error.read(500).decode("utf-8", "replace").split())
                except (OSError, http.client.HTTPException):
                    pass
                if error.code not in (408, 409, 425, 429) and error.code < 500 or "insufficient_quota" in why:
                    raise Problem(self._without_key(f"{self.name} refuses: {why}")) from None
                after = seconds_of(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError, AttributeError):
                why = "the answer is not in OpenAI's format"
            if attempt + 1 < self.tries:
                self.retries += 1
                if after is not None:  # the server says when: that holds for all
                    with self.lock:
                        self.next_start = max(self.next_start, time.monotonic() + after)
                else:
                    self.stopped.wait(min(60.0, self.pause * 2 ** attempt) * random.uniform(0.5, 1.5))
        why = f"{self.name} did not answer in {self.tries} tries, the last time: {why}"
        raise Problem(self._without_key(why))

    def _wait_for_turn(self) -> None:
        while not self.stopped.is_set():
            with self.lock:
                now = time.monotonic()
                if self.next_start <= now:
                    self.next_start = now + self.spacing
                    return
                rest = self.next_start - now
            self.stopped.wait(rest)
        raise Problem(self.why)

    def _post(self, body: bytes) -> Reply:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        if self.key:  # a redirection may lead to somebody else: the key does not follow
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text = choice["message"]["content"] or ""
        return Reply(self._without_key(text.strip()), choice.get("finish_reason") in ("stop", None),
                     int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))

    def _without_key(self, text: str) -> str:
        """Servers have been seen to quote the key in what they answer."""
        return text.replace(self.key, "[key]") if self.key else text


def seconds_of(header: Optional[str]) -> Optional[float]:
    """A Retry-After header: seconds, or a date (RFC 9110, 10.2.3). At most ten minutes."""
    if not header:
        return None
    try:
        seconds = float(header) if re.fullmatch(r"[0-9.]+", header.strip()) else (
            email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
    return min(600.0, max(0.0, seconds))


# -- a checkpoint --------------------------------------------------------------------------------------------

class Checkpoint:
    """A model of ours, or a published one. One that has only been pre-trained answers in one line; one with
    eyes also looks at extra["image"], a picture file that the first turn is about."""

    def __init__(self, folder: str, temperature: float, max_new_tokens: int, quantize: Optional[str] = None,
                 batch: int = 40):
        step = model.find(folder)
        net, path, meta = vision.load(step, "auto", dtype=None, quantize=quantize)
        self.eyes, self.net = net if isinstance(net, vision.MiniGPT4) else None, getattr(net, "llama", net)
        self.tokenizer = data.Tokenizer(path)
        self.template = {"plain": "lines", **data.CHAT}.get(meta["template"], meta["template"])
        self.temperature, self.max_new_tokens, self.batch, self.why = temperature, max_new_tokens, batch, ""
        self.name = (step.parent if step.name.startswith("step-") else step).name
        if (step / "model.pt").exists():  # a published folder stays as it is
            self.name += f":{model.fingerprint(step)}"
        self.name += f":{quantize}" if quantize else ""

    def __call__(self, conversations: Asked, keep: Optional[Keep] = None) -> list[Optional[Reply]]:
        conversations, images = self.look(conversations)
        replies: list[Optional[Reply]] = [None] * len(conversations)
        limit, fits = self.net.config.max_seq_len, []
        for i, c in enumerate(conversations):
            tokens = len(data.render(c, self.template, self.tokenizer).tokens)
            if tokens < limit:
                fits.append((tokens, i))
            else:
                self.why = f"{self.name}: a prompt of {tokens} tokens does not fit into {limit}"
        order = [i for _, i in sorted(fits)]
        for at in range(0, len(order), self.batch):
            group = order[at:at + self.batch]
            texts, ended = data.chat(self.net, self.tokenizer, self.template,
                                     [conversations[i] for i in group], self.max_new_tokens, self.batch,
                                     [images[i] for i in group], temperature=self.temperature)
            for i, text, end in zip(group, texts, ended):
                replies[i] = Reply(text.strip(), end)
                if keep:
                    keep(i, replies[i])
        return replies

    def look(self, conversations: Asked) -> tuple[list[data.Conversation], list[Optional[torch.Tensor]]]:
        """The conversations with image slots, and the vectors for them: (Q, C) each, or None."""
        asked, images = list(conversations), [None] * len(conversations)
        if not self.eyes:
            refuse_pictures(self.name, conversations)
        for i, c in enumerate(conversations):
            if c.extra.get("image"):
                images[i] = self.eyes.look(c.extra["image"])
                first = c.turns[0]._replace(slots=self.eyes.n_queries)
                asked[i] = dataclasses.replace(c, turns=[first, *c.turns[1:]])
        return asked, images


# -- the toy world's oracle ----------------------------------------------------------------------------------

TOYS = {"oracle": "knows every true answer, and rates by truth alone",
        "noisy": "as a player: the oracle with a slip of the tongue in every fourth answer",
        "first": "as a judge: the oracle, but two points for whoever stands first, and two off for the other",
        "longer": "as a judge: the oracle, but two points for the longer answer, and two off for the other"}


class Oracle:
    """Answers and judges questions of the toy world. It needs no text: the true answer comes in `extra`, as
    extra["question"] (a toy.Question), and for a judge extra["answers"], the two texts to compare. With
    extra["covers"], two captions: does the second one say all that the first one says? With extra["repair"],
    a description to repair."""

    def __init__(self, kind: str):
        self.name, self.why = kind, ""

    def __call__(self, conversations: Asked, keep: Optional[Keep] = None) -> list[Optional[Reply]]:
        replies = [Reply(self._say(c), True) for c in conversations]
        for i, reply in enumerate(replies if keep else ()):
            keep(i, reply)
        return replies

    def _say(self, conversation: data.Conversation) -> str:
        extra = conversation.extra
        if "covers" in extra:
            reference, caption = (toy.found("objects", text) for text in extra["covers"])
            return "Yes." if reference <= caption else "No."
        if "repair" in extra:
            return toy.mend(extra["repair"])
        if not extra.get("question"):
            raise Problem(f"{self.name} knows the toy world only; for anything else take a checkpoint or "
                          "MODEL@URL")
        return self._review(conversation) if "answers" in extra else self._answer(extra["question"])

    def _answer(self, question: toy.Question) -> str:
        rng = random.Random(question.text + question.full)
        if self.name != "noisy" or rng.random() > 0.25:
            return question.full
        for words in (toy.COLORS, toy.SHAPES, toy.SIZES):  # one word is exchanged
            found = re.search(rf"\b({'|'.join(words)})\b", question.full)
            if found:
                other = rng.choice([w for w in words if w != found[1]])
                return question.full[:found.start()] + other + question.full[found.end():]
        return "I am not sure."

    def _review(self, conversation: data.Conversation) -> str:
        question, answers = conversation.extra["question"], conversation.extra["answers"]
        right = [toy.grade(question, a) for a in answers]
        scores = [1 + 9 * r for r in right]
        length = [len(a.split()) for a in answers]
        if self.name == "first" or self.name == "longer" and length[0] != length[1]:
            favoured = 0 if self.name == "first" or length[0] > length[1] else 1
            scores[favoured] = min(10, scores[favoured] + 2)
            scores[1 - favoured] = max(1, scores[1 - favoured] - 2)
        verdict = ["wrong" if r == 0 else "right" if r == 1 else f"{100 * r:.0f}% right" for r in right]
        said = f"Assistant 1 is {verdict[0]}, Assistant 2 is {verdict[1]}. The true answer: {question.full}"
        if "tuple" in conversation.turns[-1].text:  # the prompt for mathematics wants the scores at the end
            return f"{said}\nScores: ({scores[0]:g}, {scores[1]:g})"
        return f"{scores[0]:g} {scores[1]:g}\n{said}"


# -- python teacher.py ---------------------------------------------------------------------------------------

@dataclass
class TeacherConfig:
    spec: str  # a checkpoint folder or MODEL@URL
    question: str  # what to ask it
    temperature: float = 0.0  # 0: always the likeliest token
    max_new_tokens: int = 256  # longest answer


def main(cfg: TeacherConfig) -> dict:
    ask = teacher(cfg.spec, cfg.temperature, cfg.max_new_tokens)
    (reply,) = ask([data.Conversation([data.Turn("user", cfg.question)])])
    if reply is None:
        raise Problem(ask.why)
    print(reply.text)
    return dict(text=reply.text)


if __name__ == "__main__":
    run(main, TeacherConfig)
