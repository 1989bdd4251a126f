"""Histograms for wandb, trackio and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from sapo_trl.monitor.files import Logs

Histograms = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (counts (B,), edges (B+1,))


def raw_histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, float | int | list[float]]:
    """TensorBoard's form of B bins: counts (B,), edges (B+1,).

    A bucket begins where the one before it ends, so the first edge is that of an empty bucket. Sums are those of the
    bins' centres, because the values themselves are not kept.
    """
    counts, edges = np.asarray(counts, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    if edges.shape != (len(counts) + 1,) or not np.isfinite(edges).all():
        raise ValueError(f"{len(counts)} counts need {len(counts) + 1} finite edges; got {edges.tolist()}.")
    centres = (edges[:-1] + edges[1:]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(counts.sum()),
        "sum": float(counts @ centres),
        "sum_squares": float(counts @ centres**2),
        "bucket_limits": edges.tolist(),
        "bucket_counts": [0.0, *counts.tolist()],
    }


class TrackerHistograms(TrainerCallback):
    """Logs histograms, as `train/<name>`, to those of wandb, trackio and TensorBoard that `report_to` names.

    Args:
        histograms: returns those of the last step, none if there is nothing new.
        handler: the trainer's `callback_handler`, whose TensorBoard writer is used.
    """

    def __init__(self, histograms: Callable[[], Histograms], handler: CallbackHandler):
        self.histograms, self.handler = histograms, handler

    def on_log(self, args, state, control, logs: Logs | None = None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        found = {f"train/{name}": pair for name, pair in self.histograms().items()}
        if found and "tensorboard" in args.report_to:
            self._to_tensorboard(found, state.global_step)
        for name in ("wandb", "trackio") if found else ():
            if name in args.report_to:
                module = import_module(name)  # only where it is reported to
                tracked = {key: module.Histogram(np_histogram=pair) for key, pair in found.items()}
                module.log(tracked | {"train/global_step": state.global_step})

    def _to_tensorboard(self, found: Histograms, step: int) -> None:
        for callback in self.handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, pair in found.items():
                    callback.tb_writer.add_histogram_raw(name, **raw_histogram(*pair), global_step=step)
