"""Write `sapo_trl/conformance.json`: `python scripts/conformance_cases.py`. Closed forms with 50 digits, in mpmath.

No function of the package is used, and no automatic differentiation: d J/d log pi is A w r for SAPO (Eq. 16), A r or 0
for GRPO, and A s or 0, shared by the row's tokens, for GSPO. A test compares the file with what this script makes.
"""

import json
from pathlib import Path

from mpmath import exp, mp, mpf

mp.dps = 50
TARGET = Path(__file__).parents[1] / "sapo_trl" / "conformance.json"
MAX_LOG_RATIO = 20
# (log pi, log r, mask) of each row's tokens; A of each row
ROWS = {
    "on-policy": ([[(-1.5, 0, 1), (-0.25, 0, 1)], [(-2, 0, 1), (-0.5, 0, 1), (-3, 0, 1)]], [1.5, -0.75]),
    "off-policy": (
        [[(-1.5, 0.21875, 1), (-0.25, -0.75, 1)], [(-2, 0.25, 1), (-0.5, -1, 1), (-3, 1, 1), (-1, -0.28125, 1)]],
        [1.25, -0.5],
    ),
    "small ratios": (
        [[(-1, 2**-13, 1), (-2, 2**-12, 1)], [(-1, -(2**-13), 1)], [(-1, -(2**-11), 1)], [(-1, 23 * 2**-16, 1)]],
        [1.0, -1.0, -2.0, 1.0],
    ),
    "masked tokens": (
        [[(-1.5, 0.5, 1), (-4, 3, 0), (-0.25, -0.75, 1)], [(-2, -0.5, 0), (-0.5, -0.375, 1)]],
        [-1.0, 2.0],
    ),
    "zero advantage": ([[(-1.5, 0.5, 1)], [(-2, 0.75, 1), (-1, -0.5, 1)]], [0.0, -1.0]),
    "a row without trained tokens": ([[(-2, 0.75, 0), (-1, -0.5, 0)], [(-1.5, 0.5, 1)]], [-1.0, 1.0]),
    "extreme ratios": (
        [[(-1, 89, 1), (-1, 0.25, 1)], [(-200, -199, 1), (-1, -0.25, 1)], [(-1, 150, 1), (-1, 0.5, 1)]],
        [1.0, -1.0, -0.5],
    ),
    "extreme ratios of masked tokens": (
        [[(-1, 200, 0), (-1, 0.25, 1)], [(-300, -299, 0), (-1, -0.25, 1)]],
        [1.0, -1.0],
    ),
}


def token(algorithm: str, z: mpf, advantage: mpf) -> tuple[mpf, mpf]:
    """J and d J/d z. Beyond the clamp the gradient is 0; SAPO's is, there, below 1e-30 of an ordinary one or 0."""
    inside, z = abs(z) <= MAX_LOG_RATIO, max(min(z, mpf(MAX_LOG_RATIO)), mpf(-MAX_LOG_RATIO))
    ratio = exp(z)
    if algorithm == "sapo":
        tau = mpf(1) if advantage > 0 else mpf("1.05")
        sigma = 1 / (1 + exp(-tau * (ratio - 1)))
        return 4 / tau * sigma * advantage, 4 * sigma * (1 - sigma) * ratio * advantage * inside
    low, high = (mpf("3e-4"), mpf("4e-4")) if algorithm == "gspo" else (mpf("0.2"), mpf("0.27"))
    clipped = max(min(ratio, 1 + high), 1 - low)
    if ratio * advantage <= clipped * advantage:
        return ratio * advantage, ratio * advantage * inside
    return clipped * advantage, mpf(0)


def make_case(name: str, algorithm: str) -> dict:
    rows, advantages = ROWS[name]
    loss, gradient = mpf(0), []
    for row, advantage in zip(rows, map(mpf, advantages), strict=True):
        trained = [max(min(mpf(z), mpf(MAX_LOG_RATIO)), mpf(-MAX_LOG_RATIO)) for _, z, mask in row if mask]
        mean = sum(trained) / len(trained) if trained else mpf(0)
        made = []
        for _, z, mask in row:
            value, slope = token(algorithm, mean if algorithm == "gspo" else mpf(z), advantage)
            if algorithm == "gspo":
                slope *= abs(z) <= MAX_LOG_RATIO
            share = mpf(mask) / (max(len(trained), 1) * len(rows))
            loss -= value * share
            made.append(float(-slope * share))
        gradient.append(made)
    columns = [[[float(t[0]) for t in row] for row in rows], [[t[0] - t[1] for t in row] for row in rows]]
    return {
        "name": name,
        "algorithm": algorithm,
        "logps": columns[0],
        "old_logps": columns[1],
        "mask": [[t[2] for t in row] for row in rows],
        "advantages": advantages,
        "loss": float(loss),
        "gradient": gradient,
    }


def all_cases() -> list[dict]:
    return [make_case(name, algorithm) for algorithm in ("sapo", "gspo", "grpo") for name in ROWS]


if __name__ == "__main__":
    TARGET.write_text(json.dumps(all_cases(), indent=1) + "\n")
    print(f"written to {TARGET}")
