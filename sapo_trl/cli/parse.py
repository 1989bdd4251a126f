"""From a YAML file and a command line to validated configs, with every wrong key refused by name."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, TrlParser
from yaml.resolver import BaseResolver

from sapo_trl.algorithms import ALGORITHMS
from sapo_trl.bounds import CHOICES, NEEDS, SCRIPT_NEEDS, SCRIPT_RANGES, check_ranges
from sapo_trl.checkpoints.resume import NEWEST
from sapo_trl.cli.names_elsewhere import suggestion
from sapo_trl.cli.recipes import config_path, names
from sapo_trl.cli.shapes import model_config
from sapo_trl.config import SAPOConfig
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import check_arguments, check_sets
from sapo_trl.data.mixing import check_mixture
from sapo_trl.data.preflight import check_old_logprobs
from sapo_trl.errors import did_you_mean, from_path
from sapo_trl.files import masked
from sapo_trl.metrics.table import METRICS, find
from sapo_trl.model import max_positions
from sapo_trl.rewards import accuracy_reward, load_reward
from sapo_trl.rewards.contract import reward_name, unique_names
from sapo_trl.trl_seams import parser_options
from sapo_trl.validation import check_needs, convert, require_choice

SECRETS = ("hub_token", "push_to_hub_token")
KINDS = (ScriptArguments, SAPOConfig, ModelConfig)


@dataclass(frozen=True)
class RunArguments:
    """The arguments of one launch, parsed and validated."""

    script: ScriptArguments
    config: SAPOConfig
    model: ModelConfig


# ---- the YAML file -------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the last."""


def _mapping_without_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen: dict = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in seen:
            raise ValueError(f"the key {key!r} stands twice, in lines {seen[key]} and {line}. Remove one.")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The YAML mapping of a file, or of a recipe by its name.

    Raises:
        ValueError: no such file, not a mapping, or a key that stands twice.
    """
    path = config_path(path)
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else names()
        raise ValueError(f"the config {path} does not exist.{did_you_mean(str(path), known)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a mapping of settings.")
    return content


def _config_values(path: str) -> dict[str, Any]:
    """The settings of a config file as the command line gives them, where numbers are texts that the parser reads."""
    known, values = known_fields(), read_yaml(path)
    hints = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
    for key, value in values.items():
        if key == "env":
            raise ValueError(
                f"{path}: env is not read: it would set variables after the launcher and the libraries have read "
                "theirs, and secrets do not belong in a config. Set them in the shell: export NAME=value."
            )
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}.{suggestion(str(key), known)}")
        types = get_args(hints[key]) or (hints[key],)
        if isinstance(value, str) and _means_null(key, value):
            values[key] = None
        elif hints[key] == list[str] and isinstance(value, str):
            values[key] = [value]
        elif {int, float} & {*types} and str not in types and not (value is None and type(None) in types):
            values[key] = str(value)
    return values


# ---- the command line ----------------------------------------------------------------------------------------------


def known_fields() -> list[str]:
    """Every key that a config file or the command line may set."""
    return [f.name for kind in KINDS for f in fields(kind) if f.init]


def _refuse_unknown(words: Sequence[str]) -> None:
    known = known_fields()
    for word in words:
        option = word.split("=")[0]  # without its value, which may be a secret
        name = option[2:].replace("-", "_")
        if word.startswith("--") and name not in known and not (name.startswith("no_") and name[3:] in known):
            raise ValueError(f"unknown argument {option}.{suggestion(name, known)}")


@cache
def _optional() -> dict[str, tuple]:
    """Field that may be None -> texts that mean something else in it."""
    hints = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
    found = [f for kind in KINDS for f in fields(kind) if f.init and type(None) in get_args(hints[f.name])]
    return {f.name: (f.default, *CHOICES.get(f.name, ())) for f in found}


def _means_null(name: str, text: str) -> bool:
    """Whether a text is `null`, or `none` where that is no value of its own, for a field that may be None."""
    return name in _optional() and text.lower() in ("null", "none") and text not in _optional()[name]


def _without_nulls(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command line without `--name null`, and the names that stood so."""
    kept, names = list(words), []
    for i in reversed(range(len(words))):
        option, equals, text = words[i].partition("=")
        name = option[2:].replace("-", "_")
        alone = i + 2 >= len(words) or words[i + 2].startswith("--")
        text = text if equals else words[i + 1] if i + 1 < len(words) and alone else ""
        if option.startswith("--") and _means_null(name, text):
            del kept[i : i + (1 if equals else 2)]
            names.append(name)
    return kept, names


def _drop_what_is_switched_off(given: dict[str, Any], in_file: Iterable[str], words: Sequence[str]) -> None:
    """Give fields of the file their defaults where the command line switches off what they belong to."""
    own = {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    defaults = {f.name: f.default for kind in KINDS for f in fields(kind)}
    for name in {*in_file} - own:
        for need in (NEEDS | SCRIPT_NEEDS).get(name, ()):
            if need.other in own and not need.is_met(given):
                given[name] = defaults[name]


def _parser() -> tuple[TrlParser, dict[str, tuple]]:
    """The parser of all fields, and the values that some of them are limited to."""
    # abbreviations off: --learning 1 would otherwise be accepted for --learning_rate
    kinds: list[Any] = list(KINDS)  # TRL's own type for a dataclass takes nothing else
    parser = TrlParser(kinds, allow_abbrev=False, exit_on_error=False, add_help=False, conflict_handler="resolve")
    hints, choices = get_type_hints(SAPOConfig), {}
    for f in fields(SAPOConfig):
        if hints[f.name] == int | str:  # TrlParser would take the number alone, and refuse `auto`
            parser.add_argument(f"--{f.name}", f"--{f.name.replace('_', '-')}", default=f.default)
    for name, option in parser_options(parser).items():
        if option.choices is not None:  # checked with those of a file, and with the nearest one named
            choices[name], option.choices = tuple(option.choices), None
    return parser, choices


def parse_run(argv: Sequence[str] | None = None) -> RunArguments:
    """`--config file.yaml --any_field value ...` to configs; the command line wins over the file.

    Raises:
        ValueError: unknown or duplicate keys (with the nearest known one), all that `SAPOConfig` refuses, and what is
            wrong with the data's arguments, the rewards and the lengths, before anything is read.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    (parser, choices), in_file = _parser(), {}
    if "--config" in words:
        place = words.index("--config")
        if place + 1 == len(words):
            raise ValueError("--config needs the path of a YAML file, or a recipe such as tiny/sapo.")
        in_file = _config_values(words[place + 1])
        parser.set_defaults_with_config(**in_file)
        del words[place : place + 2]
    _refuse_unknown(words)
    words, nulls = _without_nulls(given_words := words)
    parser.set_defaults(**dict.fromkeys(nulls))
    try:
        namespace, stray = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).split("/")[0].lstrip("-")
        raise ValueError(f"{name}: {error.message.rstrip('.')}.") from error
    if stray:
        hint = f" Did you mean --config {stray[0]}?" if stray[0].endswith((".yaml", ".yml")) else ""
        raise ValueError(
            f"the arguments could not be read: {shlex.join(stray)} is no option, nor a value of one.{hint}"
        )
    given = vars(namespace)
    for name, known in choices.items():
        if given[name] is not None and not isinstance(given[name], bool):  # YAML's no, without quotes
            require_choice(name, given[name], known)
    _drop_what_is_switched_off(given, in_file, given_words)
    _refuse_replaced(given)
    _require_device(given)
    script, config, model = ({f.name: given[f.name] for f in fields(kind) if f.init} for kind in KINDS)
    run = RunArguments(ScriptArguments(**script), SAPOConfig(**config), ModelConfig(**model))
    convert(run.script)
    convert(run.model)
    check_ranges(vars(run.script) | vars(run.model), SCRIPT_RANGES)
    check_needs(given, {f.name: f.default for kind in KINDS for f in fields(kind)}, SCRIPT_NEEDS)
    check_arguments(run.script)
    check_sets(run.script, run.config.evaluation_sets)
    turns = turn_arguments(run.script)
    check_old_logprobs(run.config, has_rollout_func="rollout_func" in turns)
    if not run.script.reward_funcs and "environment_factory" not in turns:
        raise ValueError("reward_funcs is empty, so that nothing could be learned. Set reward_funcs: [accuracy].")
    rewards = [load_reward(entry) for entry in run.script.reward_funcs]
    if run.config.mixture:
        check_mixture(run.script, run.config.mixture)
    weights, num = run.config.reward_weights, len(run.script.reward_funcs)
    if weights is not None and len(weights) != num:
        raise ValueError(f"reward_weights holds {len(weights)} numbers for {num} reward_funcs. Give one per function.")
    if not (turns or run.config.mixture):
        _check_best_metric(run.config, rewards)
    _check_folders(run)
    if run.model.model_name_or_path:
        _check_model(run)
    return run


def _check_folders(run: RunArguments) -> None:
    """Refuse a checkpoint that is nowhere, and the revision of a model that has none."""
    wanted, model = run.config.resume_from_checkpoint, Path(str(run.model.model_name_or_path)).expanduser()
    if wanted and wanted.lower() not in (*NEWEST, "false", "none") and not Path(wanted).is_dir():
        raise ValueError(
            f"resume_from_checkpoint={wanted!r} is no folder. Give one, or true for the newest valid one of output_dir."
        )
    if run.model.model_revision not in (None, "main") and model.is_dir():
        raise ValueError(f"model_revision={run.model.model_revision!r} has no effect: {model} is a folder. Remove it.")


def _check_best_metric(config: SAPOConfig, rewards: Sequence[Callable]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation will log. A reward of somebody else's may log any name."""
    metric, sets = config.metric_for_best_model, config.evaluation_sets
    if metric is None:
        return
    full = metric if metric.startswith("eval_") else f"eval_{metric}"
    prefix = max((f"eval_{name}_" for name in sets if full.startswith(f"eval_{name}_")), key=len, default="eval_")
    names, k = unique_names(rewards), config.num_generations_eval or config.num_generations
    plain = [one.name for one in METRICS if one.section in ("Reward", "Completions")]
    known = [f"rewards/{name}/{kind}" for name in names for kind in ("mean", "std")]
    known += [name for name in plain if "<" not in name and not name.startswith("eval_")]
    if reward_name(accuracy_reward) in names:
        known += ["pass_at_1", f"pass_at_{k}", f"maj_at_{k}"]
    rest = re.sub("_(low|high)$", "", full.removeprefix(prefix))
    is_score = re.fullmatch(r"(pass|maj)_at_\d+", rest) is not None
    if not (is_score or all(type(one).__module__.startswith("sapo_trl.") for one in rewards)):
        return
    row = find(rest)
    is_measured = row is not None and (row.reduction != "host" or row.section in ("Completions", "Verdicts"))
    is_known = rest in known or is_measured
    if not is_known and not (sets and is_score):  # the sets have told theirs
        raise ValueError(
            f"metric_for_best_model={metric!r} is logged by no evaluation: of {', '.join(names)} it logs "
            f"{prefix}reward, {prefix}rewards/{names[0]}/mean and others (docs/metrics.md)."
            f"{did_you_mean(full, [prefix + name for name in known])}"
        )


def _check_model(run: RunArguments) -> None:
    """Refuse what the model's config does not allow, where that is there without a download of weights."""
    own = [run.script, *run.config.mixture.values()]
    name, prompt = run.model.model_name_or_path, max(one.max_prompt_tokens or 1 for one in own)
    sets = run.config.evaluation_sets.values()
    completion = max(x or 0 for x in (run.config.max_completion_length, *(one.max_completion_length for one in sets)))
    try:
        config = model_config(str(name), run.model.model_revision).get_text_config()
    except (OSError, ValueError):
        return  # said later, by whoever needs the config
    most = max_positions(config)
    if most is not None and prompt + completion > most:
        raise ValueError(
            f"max_completion_length={completion} and prompts of {prompt} tokens are longer than the {most} positions "
            f"of {name} (max_position_embeddings). Set max_completion_length: {max(1, most - prompt)}."
        )
    if run.config.replay != "none" and not any("expert" in field for field in config.to_dict()):
        fix = "routing_replay: none" if run.config.row.replay == "none" else "algorithm: grpo"
        raise ValueError(f"routing replay needs a Mixture-of-Experts model, and {name} is dense. Set {fix}.")


def _refuse_replaced(given: dict[str, Any]) -> None:
    """Refuse TRL's names for what `algorithm` and `num_mini_batches` set, with the value that replaces them."""
    algorithm, steps = given["algorithm"], given["steps_per_generation"]
    for name, attribute in (("loss_type", "loss_type"), ("importance_sampling_level", "level")):
        values = {row_name: vars(row)[attribute] for row_name, row in ALGORITHMS.items()}
        meant = [row_name for row_name, value in values.items() if value == given[name]]
        if algorithm in list(values) and meant and algorithm not in meant:
            raise ValueError(
                f"{name}={given[name]!r} contradicts algorithm={algorithm!r}, which sets {name}={values[algorithm]!r}. "
                f"Remove {name} and set algorithm: {' or '.join(meant)}."
            )
    accumulation, mini_batches = given["gradient_accumulation_steps"], given["num_mini_batches"]
    if steps and accumulation > 0 and steps % accumulation == 0 and steps != mini_batches * accumulation:
        raise ValueError(
            f"steps_per_generation={steps} contradicts {mini_batches} num_mini_batches x {accumulation} "
            f"gradient_accumulation_steps = {mini_batches * accumulation}. Remove steps_per_generation and set "
            f"num_mini_batches: {steps // accumulation}."
        )


def _require_device(given: dict[str, Any]) -> None:
    bf16 = given["bf16"] or (given["bf16"] is None and not given["fp16"])  # TRL's default
    if bf16 and not given["use_cpu"] and not is_torch_bf16_gpu_available():
        raise ValueError(
            "this machine has no GPU that computes in bfloat16, and bf16 is on. For a try on a CPU add --use_cpu true "
            "--bf16 false (--config tiny/sapo is made for one); sapo-trl check shows the plan without a GPU."
        )


def turn_arguments(script: ScriptArguments) -> dict[str, Any]:
    """Those of TRL's arguments `tools`, `environment_factory` and `rollout_func` that are set, loaded from their paths.

    Raises:
        ValueError: there is nothing to load, or two of them that would both make the completions.
    """
    if script.rollout_func and (script.tools or script.environment_factory):
        raise ValueError(
            "rollout_func generates the completions itself, and tools and environment_factory would not be used. "
            "Remove one of the two."
        )
    paths = {"environment_factory": script.environment_factory, "rollout_func": script.rollout_func}
    found: dict[str, Any] = {name: from_path(path, f"{name}:") for name, path in paths.items() if path}
    return found | ({"tools": [from_path(path, "tools:") for path in script.tools]} if script.tools else {})


# ---- the record of a run -------------------------------------------------------------------------------------------


def resolved_fields(run: RunArguments) -> dict[str, Any]:
    """All fields of all three configs, as plain data for YAML; secrets are left out, or masked inside a value."""
    merged = masked(asdict(run.script) | run.config.for_trl().to_dict() | asdict(run.model))
    return {key: json.loads(json.dumps(merged[key], default=str)) for key in sorted(merged) if key not in SECRETS}
