"""The live view of a run: a panel on a terminal, plain lines elsewhere, and the printed table of completions."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from sapo_trl.metrics.table import LIVE_LABELS
from sapo_trl.monitor.files import Logs
from sapo_trl.text import visible
from sapo_trl.trl_seams import print_prompt_completions_sample

# What its shortest labels mean, said once per run
EXPLAINED = (
    "update ratio: mean gate weight, a token's at most 1; 1 where nothing is damped. leak: share of the weight on "
    "tokens of bad answers that have already fallen below r = 0.8. drift: mean (log r)²/2, how far the policy has "
    "moved since the rollout. tok/s: trained tokens per second."
)
# Stops the live view of the run that is training, because a run that fails never reaches on_train_end.
_SCREEN = ExitStack()
atexit.register(_SCREEN.close)


def short(value: float) -> str:
    """The number with three significant digits.

    >>> short(1e-6), short(0.8571), short(41.25), short(0.0), short(math.nan)
    ('1e-06', '0.857', '41.2', '0', 'nan')
    """
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """The time in at most two units.

    >>> duration(8.4), duration(125), duration(7322), duration(200000)
    ('8 s', '2 min 05 s', '2 h 02 min', '2 d 07 h')
    """
    whole = round(seconds)
    for name, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part:02d} {smaller}"
    return f"{whole} s"


def _labelled(logs: Logs) -> dict[str, str]:
    """Label -> text of the numbers that are shown; the loss, which is near 0 by design, only if it is not finite."""
    loss = logs.get("loss", 0.0)
    shown = {"loss": loss} if loss is None or not math.isfinite(loss) else {}
    shown |= {label: logs[name] for name, label in LIVE_LABELS.items() if name in logs}
    return {label: short(math.nan if value is None else value) for label, value in shown.items()}


class Progress(TrainerCallback):
    """The last value of each number of `LIVE_LABELS`: a panel with a progress bar on a terminal; plain lines elsewhere
    and with `disable_tqdm`, at most one each `SECONDS_BETWEEN_LINES`, and the last step's once, at the end.

    tok/s counts trained tokens over whole rollouts, by `step_time`; the time left follows from the steps so far.
    """

    SECONDS_BETWEEN_LINES = 5.0

    def __init__(self):
        self._last: dict[str, str] = {}
        self._is_training, self._began, self._printed = False, (0.0, 0), float("-inf")
        self._paces: deque[tuple[float, float]] = deque()
        self._title, self._live, self._is_due = "", None, False

    def on_train_begin(self, args, state, control, **kwargs):
        self._last, self._is_training, self._printed, self._is_due = {}, True, float("-inf"), False
        self._began = time.monotonic(), state.global_step
        self._paces = deque(maxlen=args.num_mini_batches * args.num_iterations)
        self._title = visible(args.run_name or Path(args.output_dir).name)
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            self._live = open_live()

    def on_step_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._live.update(self._panel(state))

    def on_log(self, args, state, control, logs: Logs | None = None, **kwargs):
        logs = logs or {}
        if not state.is_world_process_zero or not LIVE_LABELS.keys() & logs.keys():  # the last record has only times
            return
        if "loss" in logs:
            self._last.pop("loss", None)
        if self._live is None and "effective_update_ratio" in logs and "update ratio" not in self._last:
            print(EXPLAINED, flush=True)
        self._last |= _labelled(logs)
        if "Pass@1" in self._last:
            self._last.pop("eval", None)
        tokens, seconds = logs.get("update/trained_tokens"), logs.get("step_time")
        if tokens is not None and seconds:
            self._paces.append((tokens, seconds))
            self._last["tok/s"] = f"{sum(x for x, _ in self._paces) / sum(x for _, x in self._paces):,.0f}"
        if self._live is not None:
            self._live.update(self._panel(state))
        elif not self._is_training:  # an evaluation on its own
            print(self._shown(), flush=True)
        else:
            self._is_due = True  # the last line waits for the end: an evaluation may add to it
            is_time = time.monotonic() - self._printed > self.SECONDS_BETWEEN_LINES
            if is_time and state.global_step < state.max_steps:
                self._print_line(state)

    def _print_line(self, state) -> None:
        self._printed, self._is_due = time.monotonic(), False
        left = f"  left {self._left(state)}" if state.global_step < state.max_steps else ""
        print(f"step {state.global_step}/{state.max_steps}  {self._shown()}{left}", flush=True)

    def _shown(self) -> str:
        return "  ".join(f"{label} {value}" for label, value in self._last.items())

    def on_train_end(self, args, state, control, **kwargs):
        if self._live is not None:
            self._live.update(self._panel(state))
            _SCREEN.close()
        elif self._is_due:
            self._print_line(state)
        self._is_training, self._live, self._last = False, None, {}

    def _left(self, state) -> str:
        began, first = self._began
        done = state.global_step - first
        return duration((time.monotonic() - began) / done * (state.max_steps - state.global_step)) if done else "?"

    def _panel(self, state) -> Panel:
        bar = Table.grid(expand=True)  # a bar alone does not end its line
        bar.add_row(ProgressBar(total=state.max_steps, completed=state.global_step))
        numbers = [Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in self._last.items()]
        title = f"{self._title}  step {state.global_step}/{state.max_steps}  left {self._left(state)}"
        explained = Text(EXPLAINED, "dim")
        return Panel(Group(bar, Columns(numbers, padding=(0, 3)), explained), title=Text(title), title_align="left")


def open_live() -> Live:
    """A started `Live` on stderr, which `_SCREEN` stops. Other output appears above it; a redirected stdout stays so.

    The cursor stays visible, so that even a killed process leaves a usable terminal.
    """
    _SCREEN.close()
    console = Console(stderr=True)
    live = Live(console=console, redirect_stdout=sys.stdout.isatty(), refresh_per_second=4)
    live.start()
    console.show_cursor(True)
    _SCREEN.callback(live.stop)
    return live


def _visible(entry: Any) -> Any:
    """A prompt, a completion or a logged value with all its texts made visible."""
    if isinstance(entry, str):
        return visible(entry)
    if isinstance(entry, dict):
        return {_visible(key): _visible(value) for key, value in entry.items()}
    return [_visible(value) for value in entry] if isinstance(entry, list) else entry


def print_completions(logs: dict[str, Any], step: int, num_samples: int | None) -> None:
    """Print TRL's table of the rollout's completions, with escape sequences shown and not executed.

    Args:
        logs: TRL's `GRPOTrainer._logs`, one value per completion in each column.
        num_samples: so many at random; None: all.
    """
    columns = {key: _visible(list(logs[key])) for key in ("prompt", "completion", "advantages")}
    rewards, extra = (
        {visible(name): _visible(list(values)) for name, values in logs[key].items()} for key in ("rewards", "extra")
    )
    num_samples = len(columns["prompt"]) if num_samples is None else num_samples
    print_prompt_completions_sample(
        columns["prompt"], columns["completion"], rewards, columns["advantages"], step, num_samples, extra
    )
