"""Every private part of TRL, transformers and accelerate that the package uses, and what each was checked against.

No other module imports or reads a private name of these libraries (a test walks the code). Three tables say what is
relied upon: `TESTED` the versions, `SOURCES` the code that is overridden, called or copied, `ATTRIBUTES` the attributes
that are read or set. `check_installed` compares the first two with what is installed; `sapo_trl.trainer` calls it when
it is imported. After an upgrade, read each changed source against its use here, then take over its new hash:

>>> changed_names("trl"), changed_names("transformers"), changed_names("accelerate")
([], [], [])
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

TESTED = {"trl": "1.16.0", "transformers": "5.23.0", "accelerate": "1.15.0"}

# Allows other versions, and changed sources, with a warning instead of an error
ALLOW_VARIABLE = "SAPO_TRL_UNTESTED_VERSIONS"


def _install() -> str:
    return f"pip install {' '.join(f'{package}=={tested}' for package, tested in TESTED.items())}"


try:
    # `as` hands them on to the other modules
    from accelerate.commands.config.config_args import ClusterConfig as ClusterConfig
    from accelerate.commands.launch import launch_command_parser as launch_command_parser
    from transformers.core_model_loading import revert_weight_conversion as revert_weight_conversion
    from transformers.initialization import no_init_weights as no_init_weights
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as INTEGRATION_TO_CALLBACK
    from transformers.integrations.sdpa_attention import repeat_kv as repeat_kv
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ALL_ATTENTION_FUNCTIONS
    from transformers.trainer_utils import HubStrategy as HubStrategy
    from transformers.trainer_utils import SaveStrategy as SaveStrategy
    from transformers.trainer_utils import TrainOutput as TrainOutput
    from transformers.training_args import OptimizerNames as OptimizerNames
    from trl.generation.vllm_client import VLLMClient as VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration as VLLMGeneration
    from trl.kernels import ChunkedLogProbFunction as ChunkedLogProbFunction
    from trl.models.utils import disable_gradient_checkpointing as disable_gradient_checkpointing
    from trl.trainer.utils import RepeatSampler as RepeatSampler
    from trl.trainer.utils import maybe_gather_lm_head_ctx as maybe_gather_lm_head_ctx
    from trl.trainer.utils import print_prompt_completions_sample as print_prompt_completions_sample
    from trl.trainer.utils import split_pixel_values_by_grid as split_pixel_values_by_grid
    from trl.trainer.utils import use_adapter as use_adapter
except ImportError as error:
    installed = ", ".join(f"{package} {version(package)}" for package in TESTED)
    raise ImportError(f"{error}. sapo_trl needs this private name; installed: {installed}. {_install()}") from error

# What torch's sdpa calls on a CPU, and the only way to a log-sum-exp there (torch 2.13)
cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# (package, module to find it in) -> name -> start of the sha256 of its source in the tested version. The module can
# belong to another package: what TRL inherits is looked up in TRL, so that an override there is seen.
SOURCES: dict[tuple[str, str], dict[str, str]] = {
    ("trl", "trl.trainer.grpo_trainer"): {
        "GRPOTrainer.__init__": "18f01b7a46c9",
        "GRPOTrainer.training_step": "9e18632f7dd8",
        "GRPOTrainer._prepare_inputs": "f824e7fb0714",
        "GRPOTrainer._generate": "2a27fdf8f5e6",
        "GRPOTrainer._generate_and_score_completions": "1fa48922792d",
        "GRPOTrainer._generate_single_turn": "e0f02e4fc094",
        "GRPOTrainer._tokenize_prompts": "d2d27f7c9bfd",
        "GRPOTrainer._calculate_rewards": "736ae29b0838",
        "GRPOTrainer._log_completion_extra": "afe43ddaa96c",
        "GRPOTrainer._log_metric": "bcd19b9ca101",
        "GRPOTrainer._get_per_token_logps_and_entropies": "ea73c3909275",
        "GRPOTrainer.compute_loss": "a2d6ef8bd29c",
        "GRPOTrainer._compute_loss": "80295546bbdb",
        "GRPOTrainer.prediction_step": "008b55545107",
        "GRPOTrainer.log": "1e7772819cc8",
        "GRPOTrainer._get_train_sampler": "36497afb4d31",
        "GRPOTrainer._save_checkpoint": "ec91bde12364",
        "GRPOTrainer.create_model_card": "4f8a407fd9fd",
        "RepeatSampler.__iter__": "d80412d80424",
    },
    ("trl", "trl.trainer.grpo_config"): {"GRPOConfig.__post_init__": "e833cd8d6b46"},
    ("trl", "trl.trainer.utils"): {
        "add_fused_lm_head": "422d009f04b6",
        "maybe_gather_lm_head_ctx": "d4d59d011506",
        "split_pixel_values_by_grid": "3aca66e33a79",
        "use_adapter": "edd0e493f99f",
    },
    ("trl", "trl.models.utils"): {"disable_gradient_checkpointing": "1f3a5e7ca9cb"},
    ("trl", "trl.kernels"): {
        "ChunkedLogProbFunction.forward": "1d8220b44273",
        "ChunkedLogProbFunction.backward": "be5711d60511",
    },
    ("trl", "trl.generation.vllm_client"): {"VLLMClient": "f35a9f244359"},
    ("trl", "trl.generation.vllm_generation"): {
        "VLLMGeneration._init_vllm": "0e584002e0f6",
        "VLLMGeneration._iter_named_params": "baab615d5c7b",
        "VLLMGeneration.generate": "2d2ac2be5b13",
        "VLLMGeneration.sync_weights": "63d669fb3230",
    },
    ("transformers", "trl.trainer.grpo_trainer"): {
        "GRPOTrainer.evaluate": "47001f3acc99",
        "GRPOTrainer.evaluation_loop": "a0fe4d6536f8",
        "GRPOTrainer.save_model": "705727ee10c8",
        "GRPOTrainer._load_from_checkpoint": "a2804e8d93a2",
        "GRPOTrainer._load_optimizer_and_scheduler": "5c1772becdfd",
        "GRPOTrainer._load_best_model": "0e183d55a9db",
        "GRPOTrainer._finalize_training": "6d6d83d6a271",
        "GRPOTrainer._init_training_state": "8fbd17ebb7d3",
        "GRPOTrainer._load_rng_state": "d5ebdfc0a088",
        "GRPOTrainer._save_rng_state": "27a97d106124",
        "GRPOTrainer._save_optimizer_and_scheduler": "c5ef974db69a",
        "GRPOTrainer._save_scaler": "fd1ce04cfea4",
        "GRPOTrainer._push_from_checkpoint": "2523da925347",
        "GRPOTrainer._get_output_dir": "97172085342a",
    },
    ("transformers", "transformers.trainer"): {
        "Trainer.train": "9a3c2bcd066d",
        "Trainer._inner_training_loop": "20ec4276e99f",
        "Trainer._run_epoch": "31aff00f34c3",  # when the random state is loaded, and what waits in a logging window
        "Trainer._save_checkpoint": "a9111e30faa9",  # copied in `checkpoints/saving.py`
    },
    ("transformers", "transformers.generation.utils"): {  # copied in `rollout/generation.py`: the first two
        "GenerationMixin._sample": "9f5d2e3906df",
        "GenerationMixin._prefill": "4c6ef98b165c",
        "GenerationMixin._prepare_special_tokens": "fad2642e8184",
        "GenerationMixin._update_model_kwargs_for_generation": "fb244c4da033",
        "GenerationMixin.prepare_inputs_for_generation": "fd5e907d7a1b",
    },
    ("transformers", "transformers.configuration_utils"): {
        "PretrainedConfig._attn_implementation": "0ecad559168e",
        "PretrainedConfig._experts_implementation": "3ffb18b04ef4",
    },
    ("transformers", "transformers.initialization"): {"no_init_weights": "1efb0d0d1fa2"},
    ("transformers", "transformers.core_model_loading"): {"revert_weight_conversion": "fc94e3462e01"},
    ("transformers", "transformers.integrations.sdpa_attention"): {"repeat_kv": "e9b1ad4a8df3"},
    ("accelerate", "trl.trainer.grpo_trainer"): {"gather_object": "5e9899c183e9"},
    ("accelerate", "accelerate.commands.launch"): {"launch_command_parser": "5be48632896a"},
    ("accelerate", "accelerate.state"): {"GradientState._set_sync_gradients": "c853f24eddce"},
}


class Attribute(NamedTuple):
    """A private attribute that is read or set: the class of the object, its name, its type, and what it holds."""

    owner: str
    name: str
    kind: type
    holds: str


ATTRIBUTES = (
    Attribute("GRPOTrainer", "_metrics", dict, "train or eval -> metric -> values since the last log, which clears it"),
    Attribute("GRPOTrainer", "_step", int, "calls of training_step; decides when the next rollout is generated"),
    Attribute("GRPOTrainer", "_current_train_step_time", float, "seconds of the calls since the last optimizer step"),
    Attribute("GRPOTrainer", "_logs", dict, "columns of the table of completions"),
    Attribute("GRPOTrainer", "_tokenizer", PreTrainedTokenizerBase, "the one inside processing_class, or it"),
    Attribute("GRPOTrainer", "_is_vlm", bool, "whether processing_class is a processor"),
    Attribute("GRPOTrainer", "_has_async_funcs", bool, "whether async_loop exists"),
    Attribute("GRPOTrainer", "_entropy_bonus_enabled", bool, "entropy_coef is not 0, or adaptive"),
    Attribute("GRPOTrainer", "_last_world_entropy", float, "entropy of the last step, over all processes"),
    Attribute("GRPOTrainer", "_tag_names", list, "tags of the model card"),
    Attribute("PreTrainedModel", "_supports_attention_backend", bool, "every layer calls a registered attention"),
    Attribute("PretrainedConfig", "_attn_implementation", str, "name of the registered attention; a property"),
    Attribute("PretrainedConfig", "_experts_implementation", str, "how the experts' products are computed; a property"),
    Attribute("PretrainedConfig", "_name_or_path", str, "what the model was loaded from"),
    Attribute("GenerationConfig", "_pad_token_tensor", Tensor, "id of the padding token, (); set by generate"),
)


# ------------------------------------------------------------------------------------------------ installed or not


def digest(module: str, name: str) -> str:
    """Start of the sha256 of a function's source, or `missing`, or `no source`."""
    try:
        found = attrgetter(name)(import_module(module))
        source = inspect.getsource(found.fget if isinstance(found, property) else found)
    except (ImportError, AttributeError):
        return "missing"
    except (OSError, TypeError):
        return "no source"
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def changed_names(package: str) -> list[str]:
    """Names in `SOURCES` whose source of this package is not the tested one."""
    return [
        name
        for (owner, module), names in SOURCES.items()
        for name, tested in names.items()
        if owner == package and digest(module, name) != tested
    ]


def untested_packages() -> list[str]:
    """A sentence for each package whose minor version, or part that is built on, differs from what was tested."""
    sentences = []
    for package, tested in TESTED.items():
        installed, changed = version(package), changed_names(package)
        if changed or installed.split(".")[:2] != tested.split(".")[:2]:
            parts = f"these have changed: {', '.join(changed)}" if changed else "none has changed"
            sentences.append(
                f"sapo_trl was tested with {package} {tested}, and {package} {installed} is installed; of the private "
                f"parts that it builds on, {parts}."
            )
    return sentences


def check_installed() -> None:
    """Refuse versions of TRL, transformers and accelerate whose private parts are not known to fit.

    Raises:
        ImportError: another minor version, or a changed source, and `SAPO_TRL_UNTESTED_VERSIONS` is not 1; with it,
            a warning says the same.
    """
    sentences = " ".join(untested_packages())
    if not sentences:
        return
    if os.environ.get(ALLOW_VARIABLE) != "1":
        raise ImportError(
            f"{sentences} Install what was tested ({_install()}), or set {ALLOW_VARIABLE}=1 to run at your own risk."
        )
    warnings.warn(f"{sentences} {ALLOW_VARIABLE}=1 lets it run: check its numbers.", stacklevel=2)


# ------------------------------------------------------------------------------------------------------------- TRL


@contextmanager
def texts_stay_local(texts: list[list]) -> Generator[None]:
    """Inside, TRL's rollout does not gather the lists in `texts` (these objects) from all processes.

    TRL gathers prompts and completions of every process for its table of completions, also where none is logged. The
    caller adds to `texts` while the context is open, as soon as it knows the lists.
    """
    from trl.trainer import grpo_trainer  # here, because it takes seconds to import

    gather = grpo_trainer.gather_object
    vars(grpo_trainer)["gather_object"] = lambda x: x if any(x is text for text in texts) else gather(x)
    try:
        yield
    finally:
        vars(grpo_trainer)["gather_object"] = gather


def convert_sent_parameters(
    generation: VLLMGeneration, convert: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]
) -> None:
    """Let `convert` rewrite the (name, tensor) pairs that TRL sends to vLLM."""
    named = generation._iter_named_params
    vars(generation)["_iter_named_params"] = lambda: convert(named())


def sent_parameters(generation: VLLMGeneration) -> Iterable[tuple[str, Tensor]]:
    """The (name, tensor) pairs that TRL sends to vLLM, one at a time; gathering them is collective."""
    return generation._iter_named_params()


def send_weights_by(generation: VLLMGeneration, sync: Callable[[], None]) -> None:
    """Call `sync` where TRL would send the weights to its in-process engine."""
    vars(generation)["sync_weights"] = sync


@contextmanager
def engine_made_with(arguments: Callable[[], dict[str, Any]], client: VLLMClient | None = None) -> Generator[None]:
    """Inside, TRL makes its in-process vLLM engine with more arguments, asked for once the policy is there, and takes
    `client` as that of its server."""
    from trl.generation import vllm_generation

    names, changed = vars(vllm_generation), {}
    if made := names.get("LLM"):  # without vLLM TRL says so
        changed["LLM"] = lambda **given: made(**given, **arguments())
    if client is not None:
        changed["VLLMClient"] = lambda **given: client
    before = {name: names[name] for name in changed}
    names.update(changed)
    try:
        yield
    finally:
        names.update(before)


def engine_runner(generation: VLLMGeneration) -> Any:
    """What runs vLLM's own model inside its in-process engine."""
    return generation.llm.llm_engine.model_executor.driver_worker.model_runner


# ---------------------------------------------------------------------------------------------------- transformers


def run_folder(trainer: Trainer, trial: Any) -> str:
    """Where a trainer's checkpoints lie."""
    return trainer._get_output_dir(trial=trial)


def push_checkpoint(trainer: Trainer, folder: str) -> None:
    """Send a checkpoint to the Hub as transformers does."""
    trainer._push_from_checkpoint(folder)


def attention_name(config: PretrainedConfig) -> str:
    """The registered attention that a model calls; empty where none was chosen."""
    return config._attn_implementation or ""


@contextmanager
def attention_named(config: PretrainedConfig, name: str) -> Generator[None]:
    """Inside, the model calls the registered attention `name`; transformers also loads flash kernels by it."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def calls_registered_attention(model: PreTrainedModel) -> bool:
    """Whether every attention layer goes through transformers' interface and hands its arguments on."""
    return model._supports_attention_backend


def experts_name(config: PretrainedConfig) -> str | None:
    """How the experts' products are computed, such as `grouped_mm`."""
    return config._experts_implementation


def loaded_from(config: PretrainedConfig) -> str:
    """The path or Hub id that a model was loaded from."""
    return config._name_or_path


def padding_token(config: GenerationConfig) -> Tensor:
    """Id of the padding token, (), of a configuration as `generate` hands it to a decoding loop.

    Raises:
        ValueError: the configuration has none.
    """
    if config._pad_token_tensor is None:
        raise ValueError("generation has no padding token: set pad_token_id in the generation config.")
    return config._pad_token_tensor


def next_model_kwargs(model: GenerationMixin, outputs: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the next decoding step: the cache, and one column more of masks and positions."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs)


def save_training_state(trainer: Trainer, folder: str) -> None:
    """Write optimizer, scheduler, loss scaler and random states, as transformers does; every process calls it."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


# ------------------------------------------------------------------------------------------------------ accelerate


def set_sync_gradients(accelerator: Accelerator, value: bool) -> None:
    """Tell accelerate whether the next backward pass is the last one before the optimizer step."""
    accelerator.gradient_state._set_sync_gradients(value)


@contextmanager
def accelerate_state_kept() -> Generator[None]:
    """Inside, configurations can be made in a process that trains: making one resets accelerate's state, which the
    trainer still reads when it saves."""
    before = [(kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
    try:
        yield
    finally:
        for shared, state in before:
            shared.clear()
            shared.update(state)


def parser_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser by the names of their values: type and choices."""
    return {action.dest: action for action in parser._actions}
