"""Chat models behind one interface: conversations in, replies out. Used as a player, a judge, or a
stronger model that repairs data.

    ask = teacher("out/vicuna")                         # a checkpoint folder
    ask = teacher("gpt-4@https://api.openai.com/v1")    # a server; the key: OPENAI_API_KEY
    ask = teacher("llama@http://localhost:8080/v1")     # a local server needs no key
    ask = teacher("oracle")                             # knows every true answer in the toy world
    replies = ask([Conversation([Turn("user", "Who are you?")])])

`ask(conversations, keep)` calls keep(i, reply) as reply i arrives, so that the caller can save paid
replies at once. A missing reply is None, and `ask.why` is the reason.
"""

import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

import data
import vision
from tools import checkpoint
from tools.config import UserError

SERVER = re.compile(r"(?:(.+)@)?(https?://.+)")  # MODEL@URL, or a URL
TOYS = (
    "oracle",  # answers truthfully, and judges by truth alone
    "noisy",  # a player: the oracle with an error in about a quarter of its answers
    "first",  # a judge: moves 2 points from the second answer to the first
    "longer",  # a judge: moves 2 points from the shorter answer to the longer
)


class Reply(NamedTuple):
    text: str
    ended: bool  # False if it was cut off at the length limit
    prompt_tokens: int = 0  # as the server counts them
    completion_tokens: int = 0


Keep = Callable[[int, Reply], None]
Conversations = Sequence[data.Conversation]
Replies = list[Reply | None]


def kind(spec: str) -> str:
    """toy, server or checkpoint."""
    if spec in TOYS:
        return "toy"
    return "server" if SERVER.fullmatch(spec) else "checkpoint"


def teacher(spec: str, temperature: float = 0.0, max_new_tokens: int = 1024, quantize: str = ""):
    """The teacher that `spec` names: a checkpoint folder, MODEL@URL, or one of TOYS. `quantize` (q8
    or q4) is for checkpoints."""
    if kind(spec) == "toy":
        return Oracle(spec)
    if kind(spec) == "server":
        return Server(spec, temperature, max_new_tokens)
    return Checkpoint(spec, temperature, max_new_tokens, quantize)


def refuse_images(name: str, conversations: Conversations) -> None:
    if any(c.extra.get("image") for c in conversations):
        raise UserError(f"some questions are about images, which {name} does not accept")


# -- replies that were received already -----------------------------------------------------------

def digest(*parts) -> str:
    """22 characters, as the ids of published answers and reviews have."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


def reply_key(model, c: data.Conversation, settings: list) -> str:
    """A digest of all that a reply depends on: the model, its settings, the text."""
    return digest(model.name, settings, c.system, c.turns, c.extra.get("image"))


class ReplyCache:
    """Every reply received so far, in an append-only file."""

    def __init__(self, path: Path):
        self.path, self.replies = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for line in text.split("\n"):  # not splitlines(): replies may contain U+2028
            try:
                record = json.loads(line)
                key = record.pop("key")
                self.replies[key] = Reply(**record)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                continue  # empty, or truncated when the machine stopped

    def add(self, key: str, reply: Reply) -> None:
        text = reply.text.encode("utf-8", "replace").decode()  # no file can hold half a character
        self.replies[key] = reply = reply._replace(text=text)
        line = json.dumps(dict(key=key, **reply._asdict()), ensure_ascii=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" + line)  # newline first: the last line may be truncated

    def ask(self, model, conversations: Conversations, settings: list, label: str) -> Replies:
        """The reply to each conversation, from the file or from the model. Without a label, the
        caller reports progress."""
        if model.name in TOYS:  # costs nothing, and its rules may have been edited
            return model(conversations)
        keys = [reply_key(model, c, settings) for c in conversations]
        missing = {key: c for key, c in zip(keys, conversations) if key not in self.replies}
        missing_keys = list(missing)

        with tqdm(total=len(missing), desc=label, leave=False, disable=not label) as bar:
            def keep(n: int, reply: Reply) -> None:
                self.add(missing_keys[n], reply)
                bar.update()

            model(list(missing.values()), keep)
        if label:
            print_tokens(label, [self.replies[key] for key in missing_keys if key in self.replies])
        return [self.replies.get(key) for key in keys]


def print_tokens(label: str, replies: list[Reply]) -> None:
    """Prints the token counts that a server reports."""
    read = sum(reply.prompt_tokens for reply in replies)
    written = sum(reply.completion_tokens for reply in replies)
    if read:
        print(f"{label}: {read} prompt tokens, {written} completion tokens")


# -- a server -------------------------------------------------------------------------------------

# What servers say about a setting that they do not have.
REFUSED = re.compile("n.t support|unsupported|unknown|unrecogni|unexpected|permitted|allowed", re.I)


LARGEST_ANSWER = 1 << 22  # bytes


def read_answer(response) -> None:
    """Reads an answer of a server. Raises OpenAIError if it is too large to be one: the library
    would fill the memory with it."""
    import openai
    content = bytearray()
    for part in response.iter_bytes():  # unpacked, if it is compressed
        content += part
        if len(content) > LARGEST_ANSWER:
            raise openai.OpenAIError(f"the answer is larger than {LARGEST_ANSWER >> 20} MB")
    response._content = bytes(content)  # where response.read() puts it


class Server:
    """A server with OpenAI's /chat/completions, called from several threads.

    The openai library retries after rate limits (honoring Retry-After), server errors, timeouts and
    broken connections. A setting that the server refuses is left out. Three failed requests in a
    row raise UserError.
    """

    def __init__(self, spec: str, temperature: float, max_new_tokens: int, workers: int = 4,
                 retries: int = 5, timeout: float = 120.0):
        try:
            import openai
        except ImportError:
            raise UserError("a server needs the openai library: pip install openai") from None
        model, url = SERVER.fullmatch(spec).groups("default")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.deadline = timeout * (retries + 2)  # of a request, in seconds
        try:
            address = urlsplit(url)
            host, _ = address.hostname, address.port  # both are checked when they are read
            if not host:
                raise ValueError("no host")
            self.client = openai.OpenAI(api_key=self.key or "none", base_url=url, timeout=timeout,
                                        max_retries=retries)
        except Exception as error:  # a ValueError, or one of the library that openai uses
            where = url.rpartition("@")[2]  # without a password
            raise UserError(f"{where} is not the address of a server: {error}") from None
        self.name = f"{model}@{address.netloc.rpartition('@')[2]}"  # host:port
        if not self.key and host not in ("localhost", "127.0.0.1", "::1"):
            raise UserError(f"{self.name} needs a key in the environment variable OPENAI_API_KEY")
        if not re.fullmatch("[!-~]*", self.key):  # the library would quote it
            raise UserError("OPENAI_API_KEY holds a space or a character that no key has")
        self.settings = dict(model=model, temperature=temperature, max_tokens=max_new_tokens)
        self.workers, self.why = workers, ""

    def __call__(self, conversations: Conversations, keep: Keep | None = None) -> Replies:
        refuse_images(self.name, conversations)
        replies: Replies = [None] * len(conversations)
        lock, stop, failed = threading.Lock(), threading.Event(), 0  # failed requests in a row

        def work(i: int) -> None:
            nonlocal failed
            if stop.is_set():
                return
            reply = self.request(conversations[i])
            with lock:
                replies[i] = reply
                failed = 0 if reply else failed + 1
                if failed == 3:
                    stop.set()
                    raise UserError(f"{self.why}; three requests in a row failed. Replies are "
                                    "kept: the same command resumes")
                if reply and keep:
                    keep(i, reply)

        pool = ThreadPoolExecutor(self.workers)
        try:
            for future in as_completed(pool.submit(work, i) for i in range(len(conversations))):
                future.result()
        finally:  # also on Ctrl-C: open requests are finished and kept, no others are sent
            stop.set()
            pool.shutdown(cancel_futures=True)
        return replies

    def request(self, conversation: data.Conversation) -> Reply | None:
        """One reply; None when all retries have failed, with the reason in self.why."""
        import openai
        system = conversation.system
        messages = [dict(role="system", content=system)] if system else []
        for turn in conversation.turns:
            messages.append(dict(role=turn.role, content=turn.whole()))
        hooks = dict(response=[read_answer])
        client = self.client.copy(http_client=openai.DefaultHttpxClient(event_hooks=hooks))
        # The library's timeout starts anew with every byte; this one ends the connection.
        watch = threading.Timer(self.deadline, client.close)
        watch.start()
        try:
            answer = self.complete(client, messages)
            text = (answer.choices[0].message.content or "").strip()
            text = text.encode("utf-8", "replace").decode()  # no file can hold half a character
            ended = answer.choices[0].finish_reason in ("stop", None)
            counts = [getattr(answer.usage, name, None) for name in Reply._fields[2:]]
            if any(type(n) is not int for n in counts):
                counts = []
            return Reply(self.without_key(text), ended, *counts)
        except openai.OpenAIError as error:
            why = f"{error} {error.__cause__ or ''}"
        except Exception:  # a server may send anything
            why = "the answer is not in OpenAI's format"
        finally:
            late = client.is_closed()
            watch.cancel()
            client.close()
        if late:
            why = "no answer in time"
        why = re.sub(r"[\s\x00-\x1f\x7f]+", " ", self.without_key(why)).strip()[:500]
        self.why = f"{self.name}: {why}"
        return None

    def complete(self, client, messages: list[dict]):
        """The library's answer, without the settings that the server refuses."""
        import openai
        while True:
            sent = dict(self.settings)  # another thread may change them
            try:
                return client.chat.completions.create(messages=messages, **sent)
            except openai.APIStatusError as error:
                about = str(error.param or error)
                named = [name for name in sent if name != "model" and name in about]
                if error.status_code >= 500 or not named or not REFUSED.search(str(error)):
                    raise
            value = sent.pop(named[0])
            if named[0] == "max_tokens":
                sent["max_completion_tokens"] = value  # reasoning models know only this name
            if named[0] in self.settings:
                self.settings = sent
                tqdm.write(f"{self.name} refuses {named[0]}={value}")

    def without_key(self, text: str) -> str:
        """A server may quote the key. A dummy one, such as EMPTY, may be a word of the text."""
        return text.replace(self.key, "[key]") if len(self.key) >= 16 else text


# -- a checkpoint ---------------------------------------------------------------------------------

class Checkpoint:
    """A checkpoint, ours or published. A base model stops after one line. A vision model sees the
    image file extra["image"], which belongs to the first turn."""

    def __init__(self, folder: str, temperature: float, max_new_tokens: int,
                 quantize: str = "", batch: int = 40):
        step = checkpoint.find(folder)
        net, path, meta = vision.load(step, "auto", dtype=None, quantize=quantize)
        self.vlm = net if isinstance(net, vision.MiniGPT4) else None
        self.net = net.llama if self.vlm else net
        self.tokenizer = data.Tokenizer(path)
        templates = {"plain": "lines", **data.CHAT_TEMPLATES}
        self.template = templates.get(meta["template"], meta["template"])
        self.temperature, self.max_new_tokens, self.batch = temperature, max_new_tokens, batch
        self.why = ""
        self.name = step.parent.name if step.name.startswith("step-") else step.name
        if (step / "model.pt").exists():  # two runs of one name must not share replies
            self.name += f":{checkpoint.fingerprint(step)}"
        if quantize:
            self.name += f":{quantize}"

    def __call__(self, conversations: Conversations, keep: Keep | None = None) -> Replies:
        conversations, images = self.encode_images(conversations)
        replies: Replies = [None] * len(conversations)
        limit, by_length = self.net.config.max_seq_len, []
        for i, c in enumerate(conversations):
            length = len(data.render(c, self.template, self.tokenizer).tokens)
            if length < limit:
                by_length.append((length, i))
            else:
                self.why = f"{self.name}: a prompt has {length} tokens, the context {limit}"
        order = [i for _, i in sorted(by_length)]
        for begin in range(0, len(order), self.batch):
            group = order[begin:begin + self.batch]
            texts, ended = data.generate_replies(
                self.net, self.tokenizer, self.template, [conversations[i] for i in group],
                self.max_new_tokens, self.batch, [images[i] for i in group],
                temperature=self.temperature)
            for i, text, end in zip(group, texts, ended):
                replies[i] = Reply(text.strip(), end)
                if keep:
                    keep(i, replies[i])
        return replies

    def encode_images(self, conversations: Conversations) -> tuple[Conversations, list]:
        """The conversations with image slots, and for each the (n_queries, dim) vectors that fill
        them, or None."""
        conversations, images = list(conversations), [None] * len(conversations)
        if not self.vlm:
            refuse_images(self.name, conversations)
            return conversations, images
        for i, c in enumerate(conversations):
            if c.extra.get("image"):
                images[i] = self.vlm.encode_image(c.extra["image"])
                first = c.turns[0]._replace(slots=self.vlm.n_queries)
                conversations[i] = replace(c, turns=[first, *c.turns[1:]])
        return conversations, images


# -- the toy world's oracle -----------------------------------------------------------------------

class Oracle:
    """Answers and judges questions about the toy world, whose true answers come with the question.

    conversation.extra holds one of: "question" (a toy.world.Question) to answer; "question" and two
    "answers" to compare; "repair", a caption to fix; "wanted", a step of recipes/self_instruct.py
    or recipes/evol_instruct.py, in which it has faults (toy/instruct.py).
    """

    def __init__(self, kind: str):
        from toy import world
        self.world = world
        self.name, self.why = kind, ""

    def __call__(self, conversations: Conversations, keep: Keep | None = None) -> Replies:
        replies = []
        for c in conversations:
            if "wanted" in c.extra:
                from toy import instruct
                replies.append(Reply(*instruct.reply(c)))
            else:
                replies.append(Reply(self.reply(c), True))
        if keep:
            for i, reply in enumerate(replies):
                keep(i, reply)
        return replies

    def reply(self, conversation: data.Conversation) -> str:
        extra = conversation.extra
        if "repair" in extra:
            return self.world.repair_caption(extra["repair"])
        if "answers" in extra:
            return self.review(conversation)
        return self.answer(extra["question"])

    def answer(self, question) -> str:
        rng = random.Random(question.text + question.full)
        if self.name != "noisy" or rng.random() > 0.25:
            return question.full
        for words in (self.world.COLORS, self.world.SHAPES, self.world.SIZES):
            found = re.search(rf"\b({'|'.join(words)})\b", question.full)
            if found:
                wrong = rng.choice([word for word in words if word != found[1]])
                return question.full[:found.start()] + wrong + question.full[found.end():]
        return "I am not sure."

    def review(self, conversation: data.Conversation) -> str:
        question, answers = conversation.extra["question"], conversation.extra["answers"]
        grades = [self.world.grade(question, answer) for answer in answers]
        scores = [1 + 9 * grade for grade in grades]
        lengths = [len(answer.split()) for answer in answers]
        favored = None
        if self.name == "first":
            favored = 0
        elif self.name == "longer" and lengths[0] != lengths[1]:
            favored = lengths.index(max(lengths))
        if favored is not None:
            scores[favored] = min(10, scores[favored] + 2)
            scores[1 - favored] = max(1, scores[1 - favored] - 2)
        a, b = (f"{100 * grade:.0f}% right" for grade in grades)
        explained = f"Assistant 1 is {a}, Assistant 2 is {b}. The true answer: {question.full}"
        if "tuple" in conversation.turns[-1].text:  # the prompt for math asks for it at the end
            return f"{explained}\nScores: ({scores[0]:g}, {scores[1]:g})"
        return f"{scores[0]:g} {scores[1]:g}\n{explained}"
