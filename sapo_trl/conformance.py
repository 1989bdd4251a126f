"""Does a loss do what its paper says? Any SAPO, GSPO or GRPO loss against stored cases, and the mistake it looks like.

    python -m sapo_trl.conformance my_package.losses:sapo_loss
    python -m sapo_trl.conformance my_package.losses:loss --algorithm grpo --layout packed

The function returns the loss to be minimised (a scalar, or a tuple that begins with it) and is called with tensors

    padded   loss(logps (B, T), old_logps (B, T), advantages (B,), mask (B, T))        mask: 1 for a trained token
    packed   loss(logps (T,), old_logps (T,), advantages (T,), rows (T,))              rows: the token's row, from 0

`conformance.json` holds the cases: inputs, loss and gradient, from closed forms with 50 digits. SAPO has temperatures 1
and 1.05, GSPO clips at 3e-4 and 4e-4, GRPO at 0.2 and 0.27; each is the mean over a row's tokens, then over rows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapo_trl.errors import imported

CASES = Path(__file__).with_name("conformance.json")
ALGORITHMS = ("sapo", "gspo", "grpo")
TOLERANCE = 2e-5  # of the largest element; the inputs are fp32
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | tuple]


@dataclass(frozen=True)
class Case:
    """One batch of ragged rows.

    Attributes:
        logps, old_logps, mask: a list per row; masked tokens may have any value.
        advantages: one per row.
        loss: what the paper's formula gives, rows and tokens averaged.
        gradient: of the loss with respect to `logps`, a list per row; 0 for masked tokens.
    """

    name: str
    algorithm: str
    logps: list[list[float]]
    old_logps: list[list[float]]
    mask: list[list[int]]
    advantages: list[float]
    loss: float
    gradient: list[list[float]]


def load_cases(algorithm: str) -> list[Case]:
    """The stored cases of one algorithm."""
    return [case for case in (Case(**row) for row in json.loads(CASES.read_text())) if case.algorithm == algorithm]


def padded(rows: Sequence[Sequence[float]], fill: float = 0.0) -> Tensor:
    """Rows as (B, T), short ones filled at their end."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


class NoLossError(ValueError):
    """What a function returned is no loss of `logps`."""


def measure(loss: Loss, case: Case, layout: str) -> tuple[float, Tensor]:
    """The function's loss of a case and its gradient as (B, T).

    Raises:
        NoLossError: it returned no scalar tensor, or one without a gradient.
    """
    logps, old, mask = padded(case.logps).requires_grad_(), padded(case.old_logps), padded(case.mask)
    advantages, trained = torch.tensor(case.advantages), mask.bool()
    if layout == "padded":
        value = loss(logps, old, advantages, mask)
    else:
        rows = torch.arange(len(mask))[:, None].expand_as(mask)[trained]
        value = loss(logps[trained], old[trained], advantages[rows], rows)
    value = value[0] if isinstance(value, tuple) else value
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise NoLossError(
            f"the function returned {found}; return the loss, a scalar tensor, or a tuple that begins so."
        )
    gradient = torch.autograd.grad(value, logps, allow_unused=True)[0] if value.requires_grad else None
    if gradient is None:
        raise NoLossError("the loss has no gradient: it does not depend on logps. Remove detach() or no_grad().")
    return value.item(), gradient


# ---- what mistakes look like ----------------------------------------------------------------------------------------

MISTAKES = {
    "the loss is maximised: its sign is reversed": {"sign": -1.0},
    "the mean goes over all tokens, not over a row's tokens and then over rows": {"token_mean": True},
    "a row is divided by the padded length, not by its own": {"padded_length": True},
    "rows without trained tokens are left out of the mean over rows": {"skips_empty": True},
    "masked tokens are counted": {"ignores_mask": True},
    "the temperatures are swapped": {"temperatures": (1.05, 1.0)},
    "tau_pos is used for both signs": {"temperatures": (1.0, 1.0)},
    "tau_neg is used for both signs": {"temperatures": (1.05, 1.05)},
    "the factor 4/tau is missing": {"scaled": False},
    "the gate is detached and multiplies log pi": {"detached": True},
    "the gate takes log r in place of r - 1": {"in_log": True},
    "the ratio is the row's, not the token's": {"sequence": True},
    "the ratio is the token's, not the row's": {"sequence": False},
    "the clip ranges are swapped": {"swapped_clip": True},
    "the surrogate is not clipped": {"clipped": False},
}


EMPTY_ROW = "a row without trained tokens"  # the name of a case
OVERFLOWS = "exp(log r) overflows near 89, and 0 x inf is NaN: clamp log r before exp, mask before exp"
DIVIDES_BY_ZERO = "a row without trained tokens is divided by 0: clamp its number of tokens at 1"
SAME_TRAINING = "every gradient is right and only the value differs: training is the same"


def formula(case: Case, **mistake: Any) -> tuple[float, Tensor]:
    """Loss and gradient of a case in float64, with one thing done otherwise."""
    counted = padded(case.mask).double()
    if mistake.get("ignores_mask"):  # padding too
        counted = torch.ones_like(counted)
    logps = padded(case.logps).double().masked_fill(counted == 0, 0.0).requires_grad_()
    z = logps - padded(case.old_logps).double().masked_fill(counted == 0, 0.0)
    advantages = torch.tensor(case.advantages, dtype=torch.float64)[:, None]
    z = z.clamp(-20, 20)
    if mistake.get("sequence", case.algorithm == "gspo"):
        z = ((z * counted).sum(1) / counted.sum(1).clamp(min=1))[:, None].expand_as(z)
    surrogate = _surrogate(case.algorithm, z, logps, advantages, mistake)
    if mistake.get("token_mean"):
        value = (surrogate * counted).sum() / counted.sum()
    else:
        length = counted.shape[1] if mistake.get("padded_length") else counted.sum(1).clamp(min=1)
        rows = (counted.sum(1) > 0).sum() if mistake.get("skips_empty") else len(counted)
        value = ((surrogate * counted).sum(1) / length).sum() / rows
    loss = -value * mistake.get("sign", 1.0)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient


def _surrogate(algorithm: str, z: Tensor, logps: Tensor, advantages: Tensor, mistake: dict) -> Tensor:
    ratio = z.exp()
    if algorithm == "sapo":
        positive, negative = mistake.get("temperatures", (1.0, 1.05))
        tau = torch.where(advantages > 0, positive, negative)
        gate = torch.sigmoid(tau * (z if mistake.get("in_log") else ratio - 1))
        gate = gate * 4 / tau if mistake.get("scaled", True) else gate
        return (gate.detach() * logps if mistake.get("detached") else gate) * advantages
    low, high = (3e-4, 4e-4) if algorithm == "gspo" else (0.2, 0.27)
    low, high = (high, low) if mistake.get("swapped_clip") else (low, high)
    clipped = ratio.clamp(1 - low, 1 + high) if mistake.get("clipped", True) else ratio
    return torch.minimum(ratio * advantages, clipped * advantages)


def equal(found: tuple[float, Tensor], value: float, gradient: Tensor) -> tuple[bool, bool]:
    """Whether loss and gradient agree, to `TOLERANCE` of the larger."""
    size = gradient.abs().max().clamp(min=1e-6)
    is_loss = math.isclose(found[0], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return is_loss, bool(((found[1] - gradient).abs().max() <= TOLERANCE * size).item())


@dataclass(frozen=True)
class Verdict:
    """What a loss does in one case."""

    case: str
    loss: bool  # agrees
    gradient: bool  # agrees
    finite: bool
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.loss and self.gradient


def check(loss: Loss, algorithm: str = "sapo", layout: str = "padded") -> tuple[list[Verdict], list[str]]:
    """(the verdict of each case, the mistakes whose numbers it has in every case where they differ from the paper's).

    An offset of the loss that is constant in the policy, as f(1) - 1, changes no gradient: such a loss passes no case's
    loss and every case's gradient.
    """
    verdicts, measured = [], []
    for case in load_cases(algorithm):
        try:
            found = measure(loss, case, layout)
        except Exception as error:  # the function is anybody's, and its error is the result
            said = str(error) if isinstance(error, NoLossError) else f"{type(error).__name__}: {error}"
            verdicts.append(Verdict(case.name, False, False, False, said))
            continue
        finite = math.isfinite(found[0]) and bool(found[1].isfinite().all())
        verdicts.append(Verdict(case.name, *equal(found, case.loss, padded(case.gradient)), finite))
        if finite and not case.name.startswith("extreme"):
            measured.append((case, found))
    looks_like = [name for name, mistake in MISTAKES.items() if _explains(mistake, measured)]
    looks_like += _not_finite(verdicts)
    if all(v.gradient for v in verdicts):
        looks_like.append(SAME_TRAINING)
    return verdicts, looks_like if not all(v.passed for v in verdicts) else []


def _not_finite(verdicts: Sequence[Verdict]) -> list[str]:
    """What numbers that are not finite come from; nothing where ordinary cases have them too."""
    names = [v.case for v in verdicts if not v.finite and not v.error]
    extreme, empty = any(name.startswith("extreme") for name in names), EMPTY_ROW in names
    if any(name != EMPTY_ROW and not name.startswith("extreme") for name in names):
        return []
    return [OVERFLOWS] * extreme + [DIVIDES_BY_ZERO] * empty


def _explains(mistake: dict, measured: Sequence[tuple[Case, tuple[float, Tensor]]]) -> bool:
    differs = False
    for case, found in measured:
        wrong = formula(case, **mistake)
        if not equal(found, *wrong)[1]:
            return False
        differs |= not equal(wrong, case.loss, padded(case.gradient).double())[1]
    return differs


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per case and the likely mistakes; status 0 if every gradient and loss agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="module:function")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="sapo")
    parser.add_argument("--layout", choices=("padded", "packed"), default="padded")
    arguments = parser.parse_args(argv)
    module, _, name = arguments.function.partition(":")
    sys.path.insert(0, "")  # as for `python -m`: modules of this folder
    try:
        function = getattr(imported(module, arguments.function), name)
    except AttributeError as error:
        print(f"error: {arguments.function} cannot be loaded: {error}. Write module:function.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error} Write module:function.", file=sys.stderr)
        return 1
    verdicts, looks_like = check(function, arguments.algorithm, arguments.layout)
    errors = {v.error for v in verdicts}
    if len(errors) == 1 and "" not in errors:
        print(f"every case: {errors.pop()}")
        return 1
    words = {True: "equal", False: "DIFFERS"}
    for v in verdicts:
        numbers = f"loss {words[v.loss]:8s} gradient {words[v.gradient]:8s}{'' if v.finite else ' NOT FINITE'}"
        print(f"{v.case:32s} {v.error or numbers}")
    for mistake in looks_like:
        print(f"looks like: {mistake}")
    return 0 if all(v.passed for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
