"""Talk to it in a terminal.

    python sample.py                                # the newest chat model under out/
    python sample.py --ckpt=out/alpaca --temperature=0.7
    python sample.py --prompt="Who are you?"        # one answer, then exit
    cat questions.txt | python sample.py            # one message a line, answers on standard output
    python sample.py --ckpt=out/minigpt4 --image=photo.jpg   # about a picture
    python sample.py --ckpt=out/base --prompt="Once there was"   # a base model continues text

In the chat: /image FILE /reset /undo /retry /save FILE /load FILE /quit. Ctrl-C stops an answer only.
What was read once stays in the KV cache: a new turn costs only its own tokens, however long the chat is.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Literal, NamedTuple, Optional

import torch

import data
import model
import vision
from config import Problem, run


@dataclass
class SampleConfig:
    ckpt: str = ""  # folder of ours, Meta's or Hugging Face's; the newest of ours when not given
    prompt: str = ""  # ask this once and exit
    image: str = ""  # a picture that the first question is about
    template: str = ""  # the model's own when not given
    max_new_tokens: int = 256  # longest answer
    temperature: float = 0.0  # 0: always the likeliest token; Vicuna's demo used 0.7
    top_k: int = 0  # sample among so many likeliest tokens; 0: all
    top_p: float = 1.0  # sample among the likeliest tokens that have this probability together
    repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
    seed: int = 0  # of the sampling
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 from 1 B parameters up
    quantize: Optional[Literal["q8", "q4"]] = None  # matrices in eight or four bits, llama.cpp's blocks

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise Problem("--temperature and --top_k must not be negative, --top_p lies in (0, 1], "
                          "--repetition_penalty is above 0")
        try:
            torch.empty(0, device="cpu" if self.device == "auto" else self.device)
        except (RuntimeError, AssertionError) as error:  # none such in the world, or in this machine
            raise Problem(f"--device={self.device}: {str(error).splitlines()[0]}") from None
        if self.max_new_tokens < 1:
            raise Problem(f"--max_new_tokens={self.max_new_tokens} must be at least 1")


class Picture(NamedTuple):
    path: str
    number: int  # no two have the same
    vectors: torch.Tensor  # (Q, C), for as many image slots


class Chat:
    """One conversation with a model. The cache holds the tokens of `read`; a turn reads only what is new."""

    def __init__(self, net: model.LLaMA, tokenizer: data.Tokenizer, template: str, cfg: SampleConfig):
        self.eyes = net if isinstance(net, vision.MiniGPT4) else None
        self.net, self.tokenizer = getattr(net, "llama", net), tokenizer
        self.template, self.cfg, self.retries = template, cfg, 0
        weight = self.net.tok_embeddings.weight
        self.cache = model.KVCache(net.config, 1, None, weight.dtype, weight.device)
        self.read: list[int] = []  # ids; below 0: the slots of a picture, by its number
        self.pictures: list[Picture] = []  # of the turns that have one, in order
        self.seen = 0  # pictures opened so far
        self.waiting: Optional[Picture] = None  # for the next question
        self.turns: list[data.Turn] = []
        self.system: Optional[str] = None  # of a loaded chat
        self.speed = ""

    def prompt(self) -> list[int]:
        """Tokens up to the reply; the oldest rounds are left out when all of them would not fit."""
        room = self.net.config.max_seq_len - min(self.cfg.max_new_tokens, 64)
        conversation = data.Conversation(self.turns, system=self.system)
        return data.prompt(conversation, self.template, self.tokenizer, room)

    def look(self, path: str) -> None:
        """The next question is about this picture. Raises Problem when it is none, or nobody sees."""
        if not self.eyes:
            raise Problem("this model cannot see; `python train_vlm.py` trains one that can, out/minigpt4")
        vectors = self.eyes.look(path)
        self.seen += 1
        self.waiting = Picture(path, self.seen, vectors)

    def answer(self, text: str, retry: int = 0) -> Iterator[str]:
        """Streams the reply to `text` in pieces of valid UTF-8. Stop any time: what was said is kept."""
        self.turns.append(data.Turn("user", text, slots=self.eyes.n_queries if self.waiting else 0))
        said, picture, self.waiting = "", self.waiting, None
        self.pictures += [picture] if picture else []
        try:
            for said, piece in self._stream(self.prompt(), retry):
                yield piece
        except Problem:
            self.turns.pop()
            self.waiting = self.pictures.pop() if picture else None
            raise
        finally:
            if self.turns and self.turns[-1].role == "user":
                self.turns.append(data.Turn("assistant", said))

    def _stream(self, prompt: list[int], retry: int) -> Iterator[tuple[str, str]]:
        # which picture fills which slot: the oldest rounds, and their pictures, may have been left out
        n = self.eyes.n_queries if self.eyes else 1
        shown = self.pictures[len(self.pictures) - prompt.count(model.IMAGE_SLOT) // n:]
        number = iter([-p.number for p in shown for _ in range(n)])
        marks = [next(number) if t == model.IMAGE_SLOT else t for t in prompt]
        same = 0  # how much of the prompt the cache holds; the last token is read again to get its logits
        while same < min(len(prompt) - 1, len(self.read)) and marks[same] == self.read[same]:
            same += 1
        self.cache.truncate(same)
        self.read = list(marks)
        images = torch.cat([p.vectors for p in shown])[sum(t < 0 for t in marks[:same]):] if shown else None
        cfg, ids, said, start = self.cfg, [], "", time.perf_counter()
        temperature = max(cfg.temperature, 0.7) if retry else cfg.temperature  # not the same answer again
        try:
            for (i,) in self.net.generate([prompt], cfg.max_new_tokens, temperature, cfg.top_k, cfg.top_p,
                                          cfg.repetition_penalty, (self.tokenizer.eos,), cfg.seed + retry,
                                          images, self.cache):
                ids.append(i)
                if i == self.tokenizer.eos:
                    break
                text = self.tokenizer.decode(ids, data.get_template(self.template).glued)
                text, ended = data.said(text, self.template, complete=False)
                if text.endswith("\ufffd"):  # a character whose last bytes are still to come
                    continue
                yield text, text[len(said):]
                said = text
                if ended:  # an end that is text: ### of Vicuna v0
                    break
        finally:
            self.read = (marks + ids)[:self.cache.length]
            seconds = time.perf_counter() - start
            self.speed = (f"{len(ids)} tokens, {len(ids) / max(seconds, 1e-9):.0f} tok/s, "
                          f"{len(prompt) - same} of {len(prompt)} prompt tokens read")

    def undo(self) -> str:
        """Takes the last round back; returns what was asked."""
        if not self.turns:
            raise Problem("nothing to take back yet")
        asked = self.turns[-2]
        del self.turns[-2:]
        if asked.slots:
            self.waiting = self.pictures.pop()
        return asked.text

    def reset(self) -> None:
        self.turns, self.system, self.pictures, self.waiting = [], None, [], None

    def save(self, path: str) -> None:
        """As ShareGPT, with "images": [number of the round, file]. A loader would cut the chat at an empty reply, so such
        a round is left out."""
        paths, turns, images = iter(str(Path(p.path).resolve()) for p in self.pictures), [], []
        for asked, reply in zip(self.turns[::2], self.turns[1::2]):
            seen = [[len(turns) // 2, next(paths)]] if asked.slots else []
            if reply.text.strip():
                turns, images = turns + [asked, reply], images + seen
        chat = data.Conversation(turns, "chat", self.system, dict(images=images) if images else {})
        Path(path).write_text(json.dumps([data.as_record(chat)], indent=1, ensure_ascii=False), encoding="utf-8")

    def load(self, path: str) -> None:
        chat, opened = data.load_conversations(path)[0], []
        for turn, image in chat.extra.get("images", []):
            self.look(image)
            opened.append(self.waiting)
            chat.turns[2 * turn] = chat.turns[2 * turn]._replace(slots=self.eyes.n_queries)
        self.turns, self.system, self.pictures, self.waiting = chat.turns, chat.system, opened, None


def newest(out: Path = Path("out")) -> Path:
    """The last trained checkpoint under out/, chat models before base models."""
    names = [out / n for n in ("vicuna", "alpaca")]
    names += sorted(out.glob("*/"), key=lambda p: (p.name == "base", -p.stat().st_mtime))
    for folder in names:
        if (folder / "latest").exists():
            return folder
    message = ("nothing is trained yet. `python train_sft.py` trains the toy chain LLaMA -> Alpaca -> "
               "Vicuna in minutes")
    if Path("tests/micro/model.pt").exists():
        message += "; `python sample.py --ckpt=tests/micro` talks to a tiny one that came with the code"
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Problem(message)
    print(message + ".")
    if input("Train it now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Problem("nothing to talk to")
    import train_sft  # only here: this file otherwise needs no training code
    train_sft.main(train_sft.SFTConfig())
    return out / "vicuna"


def open_chat(cfg: SampleConfig) -> Chat:
    seeing = "out/minigpt4" if cfg.image and Path("out/minigpt4/latest").exists() else ""
    folder = cfg.ckpt or seeing or newest()
    dtype = dict(auto=None, float32=torch.float32, bfloat16=torch.bfloat16)[cfg.dtype]
    net, tokenizer_path, meta = vision.load(folder, cfg.device, dtype=dtype, quantize=cfg.quantize)
    template = cfg.template or data.CHAT.get(meta["template"], meta["template"])
    data.get_template(template)
    return Chat(net, data.Tokenizer(tokenizer_path), template, cfg)


def say(chat: Chat, text: str, retry: int = 0) -> None:
    """Prints the answer as it comes. Ctrl-C ends it, not the program."""
    if chat.eyes and not chat.turns and not chat.waiting:
        print("(no picture was shown, so this is answered from words alone: /image FILE, or --image)",
              file=sys.stderr)
    try:
        for piece in chat.answer(text, retry):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    if sys.stdout.isatty():
        print(f"\033[90m({chat.speed})\033[0m")


def command(chat: Chat, line: str) -> bool:
    """A line that begins with a slash. False: leave."""
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit"):
        return False
    try:
        if word == "/reset":
            chat.reset()
            print("(a new chat)")
        elif word == "/image" and rest:
            chat.look(rest)
            print("(the next question is about this picture)")
        elif word == "/undo":
            print(f"(took back: {chat.undo()})")
        elif word == "/retry":
            chat.retries += 1
            say(chat, chat.undo(), chat.retries)
        elif word == "/save" and rest:
            chat.save(rest)
            print(f"(saved {len(chat.turns) // 2} rounds in {rest})")
        elif word == "/load" and rest:
            chat.load(rest)
            for turn in chat.turns:
                print(("> " if turn.role == "user" else "") + turn.text)
        else:
            print("/image FILE  /reset  /undo  /retry  /save FILE  /load FILE  /quit")
    except (Problem, OSError) as problem:
        print(f"({problem})")
    return True


def main(cfg: SampleConfig) -> dict:
    chat = open_chat(cfg)
    if cfg.image:
        chat.look(cfg.image)
    if cfg.prompt:
        say(chat, cfg.prompt)
        return dict(rounds=1, speed=chat.speed)
    interactive = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a stray Latin-1 byte is no reason to stop
    if interactive:
        try:
            import readline  # noqa: F401  arrow keys and history, where Python has it
        except ImportError:
            pass
        print(f"{model.count(chat.net.config) / 1e6:.1f} M parameters, template {chat.template}. "
              f"{'/image ' * bool(chat.eyes)}/reset /undo /retry /save /load /quit; Ctrl-C stops an answer.")
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except KeyboardInterrupt:
            print("\n(/quit leaves)")
            continue
        except EOFError:
            print()
            break
        if not interactive and not line:
            break
        line = line.strip()
        if line.startswith("/"):
            if not command(chat, line):
                break
        elif line:
            try:
                say(chat, line)
            except Problem as problem:
                print(f"({problem})")
    return dict(rounds=len(chat.turns) // 2, speed=chat.speed)


if __name__ == "__main__":
    run(main, SampleConfig)
