"""Private names of TRL, transformers and accelerate."""

from contextlib import contextmanager

from accelerate import Accelerator
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import use_adapter

__all__ = ["disable_gradient_checkpointing", "use_adapter"]


def set_sync_gradients(accelerator: Accelerator, value: bool) -> None:
    accelerator.gradient_state._set_sync_gradients(value)


@contextmanager
def texts_stay_local(is_text):
    gather = grpo_trainer.gather_object
    grpo_trainer.gather_object = lambda x: x if is_text(x) else gather(x)
    try:
        yield
    finally:
        grpo_trainer.gather_object = gather
