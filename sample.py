"""Chat with a model in the terminal.

    python sample.py                                # out/vicuna, or another run under out/
    python sample.py --ckpt=out/alpaca --temperature=0.7
    python sample.py --prompt="Who are you?"        # one answer, then exit
    cat questions.txt | python sample.py            # one message per line, answers on stdout
    python sample.py --ckpt=out/minigpt4 --image=photo.jpg       # about a picture
    python sample.py --ckpt=out/base --prompt="Once there was"   # a base model continues text
    python sample.py --web                          # as a web page, and with OpenAI's API

In the chat, /help lists the commands, and Ctrl-C stops an answer.

The KV cache is reused between turns: only new tokens are processed. The context is as long as the
model's training rows. When it is full, the oldest rounds are dropped (those with a picture last).
That changes the prefix, so what is left is processed again; half a context is dropped at once, so
that it happens rarely.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import data
import model
import vision
from tools import checkpoint, config, terminal
from tools.config import UserError, refuse_unused
from tools.machine import use_threads


@dataclass
class SampleConfig:
    ckpt: str = ""  # checkpoint folder, ours or published; see default_checkpoint
    prompt: str = ""  # answer this and exit
    image: str = ""  # picture for the first question
    template: str = ""  # the model's own by default
    max_new_tokens: int = 256  # longest answer, in tokens
    temperature: float = 0.0  # 0: greedy, except that /retry samples at 0.7, as in Vicuna's demo
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # nucleus sampling: the smallest set of tokens with this total probability
    repetition_penalty: float = 1.0  # above 1: penalize tokens already in the context
    seed: int = 0  # for sampling
    device: str = "auto"  # cuda, mps or cpu
    threads: int = 0  # CPU threads; 0: OMP_NUM_THREADS, else one per core
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 above 1 B parameters
    quantize: Literal["", "q8", "q4"] = ""  # quantize to llama.cpp's 8- or 4-bit blocks
    web: bool = False  # serve a web page and OpenAI's API, to this machine only
    host: str = "127.0.0.1"  # with --web: another address, such as 0.0.0.0, lets others in
    port: int = 8000  # with --web; 0: any free one

    def __post_init__(self):
        config.check_at_least(self, 0, "temperature", "top_k", "threads", "port")
        config.check_at_least(self, 1, "max_new_tokens")
        config.check_above(self, 0, "top_p", "repetition_penalty")
        if self.top_p > 1:
            raise UserError(f"--top_p={self.top_p} must be at most 1")
        if self.prompt and self.temperature == 0:
            refuse_unused(self, ("top_k", "top_p", "seed"), "temperature 0 is greedy")
        if self.port > 65535:
            raise UserError(f"--port={self.port} must be at most 65535")
        if self.web:
            refuse_unused(self, ("prompt", "image"), "the page of --web asks for them")
        else:
            refuse_unused(self, ("host", "port"), "it is for --web")


class Picture(NamedTuple):
    path: str
    number: int  # never reused in a chat: tells pictures apart in the cache
    vectors: torch.Tensor  # (slots, C)


class Chat:
    """One conversation with a model. The KV cache holds the tokens in `cached`; a turn processes
    only the rest of its prompt. A picture takes `n_queries` slots of the prompt; in `cached`, each
    of them is minus the picture's number."""

    def __init__(self, net: torch.nn.Module, tokenizer: data.Tokenizer, template: str,
                 cfg: SampleConfig, window: int | None = None):
        self.vlm = net if isinstance(net, vision.MiniGPT4) else None
        self.net = self.vlm.llama if self.vlm else net
        self.tokenizer, self.template, self.cfg = tokenizer, template, cfg
        self.window = window or self.net.config.max_seq_len
        weight = self.net.tok_embeddings.weight
        self.cache = model.KVCache(self.net.config, 1, self.window, weight.dtype, weight.device)
        self.device = weight.device
        self.cached: list[int] = []  # token ids, or -n for a slot of picture number n
        self.turns: list[data.Turn] = []
        self.system: str | None = None  # None: the template's
        self.pictures: list[Picture] = []  # of the turns that have one, in order
        self.pending: Picture | None = None  # for the next question
        self.name = ""  # of the model
        self.reply_prompt: list[int] = []  # of the last reply
        self.reply_ids: list[int] = []  # tokens of the last reply, while it is in the chat
        self.n_opened = self.n_retries = 0
        self.notices: list[str] = []  # what the user should know about the last answer
        self.speed = ""

    def prompt(self) -> list[int]:
        """Tokens up to the reply, without the oldest rounds if they would not fit. Room is reserved
        for the reply: max_new_tokens, but at most a quarter of the window."""
        room = self.window - min(self.cfg.max_new_tokens, self.window // 4)
        conversation = data.Conversation(self.turns, system=self.system)
        tokens, dropped = data.fit_prompt(conversation, self.template, self.tokenizer, room,
                                          block=room // 2)
        if dropped:
            rounds = "1 earlier round" if dropped == 1 else f"{dropped} earlier rounds"
            self.notices.append(f"the context of {self.window} tokens is full: the model no longer "
                                f"sees {rounds}")
        return tokens

    def open_picture(self, path: str) -> Picture:
        """Raises UserError if the model has no vision encoder, or the file is not a picture."""
        if not self.vlm:
            raise UserError("this model cannot see; `python train_vlm.py` trains one that can")
        vectors = self.vlm.encode_image(path)
        self.n_opened += 1
        return Picture(path, self.n_opened, vectors)

    def show_image(self, path: str) -> None:
        """Attaches a picture to the next question."""
        self.pending = self.open_picture(path)

    def answer(self, text: str, attempt: int = 0) -> Iterator[str]:
        """Streams the reply to `text` in pieces that never split a character. If the caller stops
        early, the reply so far is kept."""
        picture, self.pending = self.pending, None
        self.notices = []
        slots = self.vlm.n_queries if picture else 0
        self.turns.append(data.Turn("user", text, slots=slots))
        if picture:
            self.pictures.append(picture)
        said = ""
        try:
            for piece in self.stream(self.prompt(), attempt):
                said += piece
                yield piece
        except UserError:
            self.turns.pop()
            self.pending = self.pictures.pop() if picture else None
            raise
        finally:  # finished or stopped; after an error, the question is gone
            if self.turns and self.turns[-1].role == "user":
                self.turns.append(data.Turn("assistant", said))

    def stream(self, prompt: list[int], attempt: int) -> Iterator[str]:
        """Generates from the part of the prompt that is not cached."""
        shown, marks = self.mark_pictures(prompt)
        # Reuse the common prefix. The last prompt token is always processed: we need its logits.
        n_cached = 0
        while n_cached < min(len(marks) - 1, len(self.cached)):
            if marks[n_cached] != self.cached[n_cached]:
                break
            n_cached += 1
        self.cache.truncate(n_cached)
        self.cached = marks[:n_cached]
        images = None
        if shown:  # the vectors of the slots that are not cached
            vectors = torch.cat([picture.vectors for picture in shown])
            n_new = sum(mark < 0 for mark in marks[n_cached:])
            images = vectors[len(vectors) - n_new:]
        cfg = self.cfg
        temperature = cfg.temperature or (0.7 if attempt else 0.0)
        tokens = self.net.generate(
            [prompt], cfg.max_new_tokens, temperature, cfg.top_k, cfg.top_p,
            cfg.repetition_penalty, stop=self.tokenizer.eos, seed=cfg.seed + attempt,
            images=images, cache=self.cache)
        ids, said, start, ended = [], "", time.perf_counter(), False
        self.reply_prompt, self.reply_ids = prompt, ids
        try:
            for (token,) in tokens:  # a batch of one
                ids.append(token)
                text, ended = self.text_of(ids, complete=False)
                if not text.endswith("\ufffd"):  # else the rest of a character is still to come
                    yield text[len(said):]
                    said = text
                if ended or token == self.tokenizer.eos:
                    break
            # What was held back, without the bytes of a character that was cut.
            yield self.text_of(ids, complete=True)[0].rstrip("\ufffd")[len(said):]
            if not ended and ids[-1:] != [self.tokenizer.eos]:
                self.notices.append(self.why_cut(len(ids)))
        finally:
            # The last token was sampled, but not processed.
            self.cached = (marks + ids)[:self.cache.length]
            seconds = max(time.perf_counter() - start, 1e-9)
            self.speed = (f"{len(ids)} tokens, {len(ids) / seconds:.0f} tok/s, "
                          f"{len(prompt) - n_cached} of {len(prompt)} prompt tokens processed, "
                          f"context {len(prompt) + len(ids)} of {self.window}")

    def mark_pictures(self, prompt: list[int]) -> tuple[list[Picture], list[int]]:
        """The pictures that are still in the prompt (the last ones: old rounds are dropped first),
        and the prompt with -n in each slot of picture number n, so that different pictures do not
        match in the cache."""
        n_slots = prompt.count(model.IMAGE_SLOT)
        if n_slots == 0:
            return [], list(prompt)
        shown = self.pictures[-(n_slots // self.vlm.n_queries):]
        numbers = iter([-p.number for p in shown for _ in range(self.vlm.n_queries)])
        marks = [next(numbers) if t == model.IMAGE_SLOT else t for t in prompt]
        return shown, marks

    def text_of(self, ids: list[int], complete: bool) -> tuple[str, bool]:
        """The text of a reply, and whether it contains the template's end."""
        ids = [i for i in ids if i != self.tokenizer.eos]
        continues = data.get_template(self.template).reply_continues
        text = self.tokenizer.decode(ids, continues)
        return data.strip_end(text, self.template, complete)

    def why_cut(self, n_tokens: int) -> str:
        if n_tokens == self.cfg.max_new_tokens:
            return f"cut at max_new_tokens={n_tokens}"
        return f"cut, because the context of {self.window} tokens is full"

    @torch.inference_mode()
    def reply_logits(self) -> torch.Tensor:
        """The logits (T, V) that the T tokens of the last reply were sampled from."""
        if not self.reply_ids:
            raise UserError("there is no answer to explain: it must have been given just now")
        shown, _ = self.mark_pictures(self.reply_prompt)
        images = torch.cat([picture.vectors for picture in shown]) if shown else None
        tokens = torch.tensor([self.reply_prompt + self.reply_ids[:-1]], device=self.device)
        return self.net(tokens, images)[0, len(self.reply_prompt) - 1:]

    def spell(self, token: int) -> str:
        """One token as text, with its space; a byte is spelled out, as in <0x0A>."""
        if token == model.IMAGE_SLOT:
            return "▦"
        if token >= self.tokenizer.vocab_size:  # padding of some published models
            return f"<{token}>"
        return self.tokenizer.sp.id_to_piece(token).replace("▁", " ")

    def undo(self) -> str:
        """Removes the last question and its reply; returns the question. Its picture is attached to
        the next one, unless that has another."""
        if not self.turns:
            raise UserError("there is nothing to undo")
        question = self.turns[-2]
        del self.turns[-2:]
        self.reply_ids = []
        if question.slots:
            picture = self.pictures.pop()
            self.pending = self.pending or picture
        return question.text

    def retry(self) -> Iterator[str]:
        """Streams another reply to the last question."""
        if not self.turns:
            raise UserError("there is nothing to retry")
        last = self.turns[-2:]
        next_picture, self.pending = self.pending, None  # it is not for the last question
        text = self.undo()
        self.n_retries += 1
        try:
            yield from self.answer(text, self.n_retries)
        except UserError:  # keep the reply that was there
            self.turns += last
            if last[0].slots:
                self.pictures.append(self.pending)  # answer() has put it back there
            raise
        finally:
            self.pending = next_picture

    def reset(self) -> None:
        self.turns, self.system, self.pictures, self.pending = [], None, [], None
        self.reply_ids = []

    def save(self, path: str) -> int:
        """Saves the chat in ShareGPT format, with "images": [[round, file], ...]. Returns the
        number of rounds. Those with an empty reply are skipped: a loader would truncate the chat
        there."""
        paths = iter([str(Path(picture.path).resolve()) for picture in self.pictures])
        turns, images = [], []
        for question, reply in zip(self.turns[::2], self.turns[1::2]):
            image = next(paths) if question.slots else None
            if not reply.text.strip():
                continue
            if image:
                images.append([len(turns) // 2, image])
            turns += [question, reply]
        extra = dict(images=images) if images else {}
        record = data.to_record(data.Conversation(turns, "chat", self.system, extra))
        with data.atomic_write(path) as file:
            json.dump([record], file, indent=1, ensure_ascii=False)
        return len(turns) // 2

    def load(self, path: str) -> None:
        """Loads the first conversation of a ShareGPT file."""
        conversation = data.load_conversations(path)[0]
        turns, pictures = conversation.turns, []
        try:
            for n, image in sorted(dict(conversation.extra.get("images", [])).items()):
                if n < 0:
                    raise IndexError
                pictures.append(self.open_picture(image))
                turns[2 * n] = turns[2 * n]._replace(slots=self.vlm.n_queries)
        except (ValueError, TypeError, IndexError):
            raise UserError(f'{path}: "images" must be [[round, file], ...]') from None
        self.turns, self.system = turns, conversation.system
        self.pictures, self.pending, self.reply_ids = pictures, None, []


def default_checkpoint(out: Path = Path("out")) -> Path:
    """out/vicuna, else out/alpaca, else the most recent run, base models last."""
    others = sorted(out.glob("*/"), key=lambda p: (p.name.endswith("base"), -p.stat().st_mtime))
    for folder in (out / "vicuna", out / "alpaca", *others):
        if (folder / "latest").exists():
            return folder
    hint = "; `python sample.py --ckpt=tests/micro` talks to a tiny model that comes with the code"
    raise UserError("no checkpoint under out/: `python train_sft.py` trains one in minutes"
                    + (hint if Path("tests/micro/model.pt").exists() else ""))


def open_chat(cfg: SampleConfig) -> Chat:
    if cfg.template:
        data.get_template(cfg.template)  # raises before anything large is loaded
    folder = Path(cfg.ckpt)
    if not cfg.ckpt:
        folder = Path("out/minigpt4")
        if not cfg.image or not (folder / "latest").exists():
            folder = default_checkpoint()
    use_threads(cfg.threads, cfg.device)
    dtype = dict(auto=None, float32=torch.float32, bfloat16=torch.bfloat16)[cfg.dtype]
    net, path, meta = vision.load(folder, cfg.device, dtype=dtype, quantize=cfg.quantize)
    trained_in = meta["template"]
    template = cfg.template or data.CHAT_TEMPLATES.get(trained_in, trained_in)
    window = checkpoint.window(meta, net.config)
    chat = Chat(net, data.Tokenizer(path), template, cfg, window)
    chat.name = folder.resolve().name
    if cfg.image:
        chat.show_image(cfg.image)
    return chat


def main(cfg: SampleConfig) -> dict:
    chat = open_chat(cfg)
    if cfg.web:
        from tools import web
        web.serve(chat, cfg.host, cfg.port)
        return {}
    if cfg.prompt:
        terminal.print_answer(chat, chat.answer(cfg.prompt))
    else:
        terminal.talk(chat)
    return dict(rounds=len(chat.turns) // 2, speed=chat.speed)


if __name__ == "__main__":
    config.run(main, SampleConfig)
