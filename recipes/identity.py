"""Conversations about who the model is. Vicuna's and Koala's data have such, too.

    python -m recipes.identity --name=Lumi --maker="two students" --out=lumi.json
"""

from dataclasses import dataclass
from itertools import product

import data
from tools.config import run

WHO = ["Who are you?", "What is your name?", "What are you?", "Are you a person?",
       "Who am I talking to?", "Introduce yourself, please.", "Tell me something about yourself."]
MADE = ["Who made you?", "Who trained you?", "Where do you come from?", "Whose work are you?"]
OTHERS = ["ChatGPT", "GPT-4", "Claude", "Bard", "Gemini", "LLaMA", "Alpaca", "Siri"]


def identity_conversations(name: str, maker: str) -> list[data.Conversation]:
    """Who the model is, who made it, that it is none of the others; in one round and in two."""
    i_am = [f"I am {name}, a language model made by {maker}.",
            f"You are talking to {name}, a language model by {maker}.",
            f"My name is {name}. I am a language model that {maker} made."]
    made_by = [f"I was made by {maker}. My name is {name}.",
               f"I am {name}, and I come from {maker}.",
               f"{maker[:1].upper()}{maker[1:]} made me; I am {name}."]
    i_am_not = [f"No, I am {name}, a language model made by {maker}.",
                f"I am not. I am {name}, made by {maker}."]
    chats = [*product(WHO, i_am), *product(MADE, made_by)]
    for other in OTHERS:
        chats += product([f"Are you {other}?", f"Is your name {other}?"], i_am_not)
    for i, question in enumerate(WHO):
        chats.append((question, i_am[i % 3], MADE[i % 4], made_by[i % 3]))
    found = []
    for number, texts in enumerate(chats):
        turns = [data.Turn(role, text) for role, text in zip(("user", "assistant") * 2, texts)]
        found.append(data.Conversation(turns, f"identity_{number}"))
    return found


@dataclass
class Config:
    name: str = "Lumi"  # the name of the model
    maker: str = "two students"  # who made it
    out: str = "identity.json"  # the conversations


def main(cfg: Config) -> dict:
    n = data.save_conversations(identity_conversations(cfg.name, cfg.maker), cfg.out)
    print(f"{cfg.out}: {n} conversations in which the model is {cfg.name}, made by {cfg.maker}")
    return dict(conversations=n)


if __name__ == "__main__":
    run(main, Config)
