"""The laboratory's policies and tasks: several seeds at once, each a small network of its own, without shared numbers.

A prompt is one of `PROMPTS`, an answer has L tokens out of `SYMBOLS`, and a token's logits follow from the prompt, the
position and the previous token. The policies are cold-started on noisy demonstrations, as a language model would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SYMBOLS, PROMPTS, SCORED = 20, 64, 8  # SCORED: the last tokens of an answer, which decide its reward
WIDTH, HIDDEN = 32, 64
COLD_STEPS, COLD_ROWS, COLD_RATE = 400, 128, 5e-3


class Policies:
    """K networks; every method takes and returns tensors whose first axis is the seed."""

    def __init__(self, seeds: int, length: int, world: int):
        generator = torch.Generator().manual_seed(world)

        def weights(*shape: int, scale: float) -> Tensor:
            return (torch.randn(seeds, *shape, generator=generator) * scale).requires_grad_()

        self.seeds, self.length = seeds, length
        self.parameters = [
            weights(PROMPTS + length + SYMBOLS + 1, WIDTH, scale=0.5),
            weights(WIDTH, HIDDEN, scale=WIDTH**-0.5),
            weights(1, HIDDEN, scale=0.0),
            weights(HIDDEN, HIDDEN, scale=HIDDEN**-0.5),
            weights(1, HIDDEN, scale=0.0),
            weights(HIDDEN, SYMBOLS, scale=0.3 * HIDDEN**-0.5),
            weights(1, SYMBOLS, scale=0.0),
        ]

    def copy(self) -> Policies:
        """The same weights, in tensors of their own."""
        other = Policies(self.seeds, self.length, 0)
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            theirs.data.copy_(mine.data)
        return other

    def logits(self, prompts: Tensor, positions: Tensor, previous: Tensor) -> Tensor:
        """Of the next token: three index tensors (K, M) -> (K, M, SYMBOLS). `SYMBOLS` stands for "no token before"."""
        table, w1, b1, w2, b2, w3, b3 = self.parameters
        seed = torch.arange(self.seeds)[:, None]
        x = table[seed, prompts] + table[seed, PROMPTS + positions] + table[seed, PROMPTS + self.length + previous]
        hidden = torch.tanh(x @ w1 + b1)
        hidden = torch.tanh(hidden @ w2 + b2) + hidden
        return hidden @ w3 + b3

    def logps(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Log-probs of the tokens of answers (K, R, L) to prompts (K, R), (K, R, L)."""
        seeds, rows, length = answers.shape
        previous = torch.cat([torch.full((seeds, rows, 1), SYMBOLS), answers[:, :, :-1]], dim=2)
        positions = torch.arange(length).expand(seeds, rows, length)
        repeated = prompts[:, :, None].expand(seeds, rows, length)
        logits = self.logits(*(x.reshape(seeds, -1) for x in (repeated, positions, previous)))
        return logits.log_softmax(-1).gather(-1, answers.reshape(seeds, -1, 1)).view(seeds, rows, length)

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """An answer to each of the prompts (K, R), (K, R, L)."""
        seeds, rows = prompts.shape
        tokens = [torch.full((seeds, rows), SYMBOLS)]
        for position in range(self.length):
            logits = self.logits(prompts, torch.full((seeds, rows), position), tokens[-1])
            drawn = torch.multinomial(logits.softmax(-1).view(seeds * rows, SYMBOLS), 1, generator=generator)
            tokens.append(drawn.view(seeds, rows))
        return torch.stack(tokens[1:], dim=2)


@dataclass(frozen=True)
class Task:
    """What is right: which tokens may stand at the last `SCORED` positions of an answer to a prompt, and how many of
    them may be wrong.

    Attributes:
        allowed: tokens that are right at a position. With 1 there is one right answer, and samples with A > 0 say all
            that there is to learn. With 16 of 20 there are 16^8 right answers, and what is to be learnt is which few
            tokens to avoid, which samples with A < 0 say.
        noise: share of demonstrated tokens that are drawn from all symbols.
        tables: prompts share their right tokens with others, so many different tables there are.
    """

    allowed: int
    noise: float
    tables: int = PROMPTS

    def right_tokens(self, seeds: int, generator: torch.Generator) -> Tensor:
        """Which symbols are right, (K, PROMPTS, SCORED, SYMBOLS), bool."""
        order = torch.rand(seeds, self.tables, SCORED, SYMBOLS, generator=generator).argsort(-1)
        return (order.argsort(-1) < self.allowed).repeat_interleave(PROMPTS // self.tables, dim=1)

    def demonstrations(self, right: Tensor, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Noisy right answers (K, R, L); the tokens before the scored ones are any symbols."""
        seeds, rows = prompts.shape
        answers = torch.randint(SYMBOLS, (seeds, rows, length), generator=generator)
        chances = right[torch.arange(seeds)[:, None], prompts].float()  # (K, R, SCORED, SYMBOLS)
        drawn = torch.multinomial(chances.view(-1, SYMBOLS), 1, generator=generator).view(seeds, rows, SCORED)
        noisy = torch.rand(drawn.shape, generator=generator) < self.noise
        answers[:, :, -SCORED:] = torch.where(noisy, answers[:, :, -SCORED:], drawn)
        return answers


TASKS: dict[str, Task] = {"recall": Task(1, 0.10), "avoid": Task(16, 0.35, tables=8)}


@dataclass(frozen=True)
class World:
    """A task with its right answers, and the cold-started policies."""

    right: Tensor  # (K, PROMPTS, SCORED, SYMBOLS), bool
    policies: Policies

    def rewards(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """1 where every scored token is right, (K, R)."""
        seed = torch.arange(len(answers))[:, None]
        tokens = answers[:, :, -SCORED:]
        return self.right[seed, prompts].gather(-1, tokens[..., None]).squeeze(-1).all(-1).float()


@cache
def make_world(task: str, length: int, world: int, seeds: int) -> World:
    """The world of this number; its policies are to be copied before they are trained."""
    generator = torch.Generator().manual_seed(7 + world)
    right = TASKS[task].right_tokens(seeds, generator)
    policies = Policies(seeds, length, world)
    optimizer = torch.optim.Adam(policies.parameters, lr=COLD_RATE)
    for _ in range(COLD_STEPS):
        prompts = torch.randint(PROMPTS, (seeds, COLD_ROWS), generator=generator)
        answers = TASKS[task].demonstrations(right, prompts, length, generator)
        optimizer.zero_grad()
        (-policies.logps(prompts, answers)[:, :, -SCORED:].mean((1, 2)).sum()).backward()
        optimizer.step()
    return World(right, policies)
