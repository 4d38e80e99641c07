"""Test helper: finetune_grpo.py with answers that hang on nothing but the prompt, not on chance."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "finetune_grpo"))
END = 0  # conftest.py's EOS


def answer(prompt, number):
    """The ids of the number-th answer to a prompt: 1 to 5 tokens, and an end behind every second."""
    draw = torch.Generator().manual_seed(sum(prompt) + 1000 * number)
    tokens = torch.randint(3, 259, (1 + (len(prompt) + 3 * number) % 5,), generator=draw).tolist()
    return tokens + [END] * (number % 2 == 0)


def reward(row, answer):
    return {"right": float(len(answer) % 3), "form": 0.25 * (answer[:1] < "m")}


def fix(script):
    """Let a script's trainer take these answers, and rewards for them."""

    def generate(trainer, prompts, *_):
        trainer.counted = trainer.counted or 0
        return [answer(p, prompts[:i].count(p)) for i, p in enumerate(prompts)], None

    script.reward = reward
    script.RewardTrainer._generate_single_turn = generate


def main(arguments):
    import finetune_grpo

    fix(finetune_grpo)
    finetune_grpo.main(arguments)
