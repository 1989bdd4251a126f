"""Pass@1, pass@k and maj@k of a model, with intervals, on a preset, a Hub dataset, a local file, or several named sets.

sapo-trl evaluate --model runs/tiny/model --dataset_name runs/tiny/test.jsonl --max_new_tokens 96
sapo-trl evaluate --model MODEL --config qwen3-8b/sapo --output r.json --baseline Qwen/Qwen3-8B

With --output every sample is kept beside the summary (r.samples.jsonl), and a call that was killed goes on from
there. The samples of one evaluation can be the baseline of another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, ProcessorMixin

from sapo_trl.cli.models import adapter_base, load_tokenizer, require_model
from sapo_trl.cli.parse import read_yaml
from sapo_trl.cli.terminal import refuse
from sapo_trl.data.arguments import ScriptArguments
from sapo_trl.data.loading import check_arguments as check_data_arguments
from sapo_trl.data.loading import load_set
from sapo_trl.data.pictures import check_pictures
from sapo_trl.data.preflight import check_tasks
from sapo_trl.errors import did_you_mean
from sapo_trl.eval_sets import EvalSet, read_sets
from sapo_trl.evaluation.engines import load_vllm, sample_from_server, sample_with_vllm
from sapo_trl.evaluation.evaluate import compare, problems_of, refuse_other_problems, summarise
from sapo_trl.evaluation.samples import Engine, Sample, check_problems, collect, read_samples
from sapo_trl.evaluation.sampling import sample_completions
from sapo_trl.files import masked, write_json
from sapo_trl.rewards import code_digest, load_reward
from sapo_trl.vision import text_tokenizer

ENGINES = ("transformers", "vllm", "openai")
# Read from the YAML of --config where the command line does not say otherwise
SHARED = ("prompt_format", "prompt_template", "system_prompt", "prompt_column", "answer_column")
# Options that may have no value: `null` on the command line takes back what the config says
NULLABLE = (
    *SHARED[1:], "dataset_name", "dataset_split", "dataset_config", "eval_sets", "baseline", "base_url",
    "chat_template_kwargs",
)  # fmt: skip
FROM_CONFIG = (*SHARED, "temperature", "max_completion_length", "chat_template_kwargs")
DATA = {"eval_dataset_name": "dataset_name", "eval_dataset_split": "dataset_split", "eval_sets": "eval_sets"}


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the table, write the result; returns the exit status."""
    try:
        run(parse_arguments(argv))
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Check everything, then sample, grade, print and write."""
    sets = check_arguments(arguments)
    reward = load_reward(arguments.reward)
    baseline = None if arguments.baseline is None or is_file(arguments.baseline) else arguments.baseline
    names = [arguments.model] if baseline is None else [arguments.model, baseline]
    tokenizers = {name: tokenizer_of(name, arguments.engine) for name in names}
    problems = load_problems(arguments, sets, tokenizers[arguments.model])
    for label, dataset in problems.items():
        check_tasks(dataset, [reward], label or "eval")
    samples: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}  # model -> set -> samples
    compared = samples[baseline] if baseline else read_baseline(arguments.baseline, problems)
    written: dict[str, Any] = {}
    seconds: dict[tuple[str, str], float] = {}
    for name in names:
        engine_of = load_engine(arguments, name, tokenizers[name])
        for label, one in sets.items():
            started = time.perf_counter()
            part = [label, *(["baseline"] if name == baseline else [])]
            samples[name][label] = collect(
                engine_of(one), problems[label], reward, one.num_samples or 1, arguments.seed, arguments.batch_size,
                samples_path(arguments.output, *part), made_by(arguments, name, one),
            )  # fmt: skip
            seconds[name, label] = time.perf_counter() - started
        del engine_of  # before the next model loads
    for label, one in sets.items():
        result = summarise(samples[arguments.model][label], one.ks or (1,), seconds=seconds[arguments.model, label])
        print(f"--- {label}\n{result.table()}" if label else result.table())
        own = {name: value for name, value in asdict(one).items() if value is not None}
        given = {name: str(value) for name, value in (vars(arguments) | own).items() if name != "trained_on"}
        if arguments.chat_template_kwargs is None:  # as in the results from before this option
            del given["chat_template_kwargs"]
        written[label] = {"arguments": masked(given), **result.to_dict()}
        if label in compared:
            comparison = compare(compared[label], samples[arguments.model][label])
            print(comparison.table())
            written[label]["comparison"] = asdict(comparison)
    if arguments.output is not None:
        write_json(arguments.output, written.get("", written))
        print(f"written to {arguments.output}, every sample to {samples_path(arguments.output, next(iter(sets)))}")


# ---- arguments -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that a wrong option is one sentence too, with the nearest right one."""

    def error(self, message: str) -> NoReturn:
        unknown = [word for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        near = did_you_mean(unknown[0], re.findall(r"--\w+", self.format_usage())) if unknown else ""
        raise ValueError(f"{message}.{near} --help shows every option.")


def parse_arguments(
    argv: Sequence[str] | None = None, description: str | None = __doc__, more: Mapping[str, dict[str, Any]] = {}
) -> argparse.Namespace:
    """The command's options, and `more` of a command that builds on this one: name -> what argparse takes.

    Raises:
        ValueError: a --config that can't be read, or words that are no options.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    option = parser.add_argument
    option("--model", required=True, help="folder or Hub id of a model or a LoRA adapter; with openai the served name")
    option("--dataset_name", help="preset, Hub id, or a .jsonl/.json/.parquet/.csv file")
    option("--dataset_split", help="default: the preset's evaluation split, else test")
    option("--dataset_config", help="configuration name of a Hub dataset")
    option("--config", help="a YAML for training: its eval_sets, prompts, temperature, length and only reward")
    option("--eval_sets", help="named sets as JSON, as the config's field of that name")
    option("--prompt_column", help="default: the preset's, else prompt")
    option("--answer_column", help="default: the preset's, else answer")
    option("--prompt_format", default="chat", help="chat (default) or plain")
    option("--prompt_template", help="text with {prompt}, to append instructions")
    option("--system_prompt", help="system message put before each chat prompt")
    option("--chat_template_kwargs", help='what the chat template reads, as JSON: {"enable_thinking": false}')
    option("--reward", default="accuracy", help="name or dotted path, as in reward_funcs; right is a reward of 1")
    option("--num_problems", type=int, help="only the first ones of the dataset")
    option("--num_samples", type=int, default=16, help="completions per problem (default 16)")
    option("--ks", type=int, nargs="+", help="report pass@k and maj@k for these k (default 1 and num_samples)")
    option("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    option("--top_p", type=float, default=1.0)
    option("--max_completion_length", "--max_new_tokens", type=int, default=2048, help="in tokens (default 2048)")
    option("--batch_size", type=int, default=256, help="completions sampled and kept at once (default 256)")
    option("--seed", type=int, default=0)
    option("--engine", default="transformers", help=f"{', '.join(ENGINES)}: the last is a server (--base_url)")
    option("--base_url", help="of an OpenAI-compatible server, such as http://localhost:8000/v1")
    option("--output", type=Path, help="write the result here as JSON, and every sample beside it")
    option("--baseline", help="compare with a model, or with the result (.json) or samples (.jsonl) of another call")
    for name, how in more.items():
        option(name, **how)
    parser.set_defaults(trained_on=None)  # the config's dataset_name, where the evaluation sets are the config's too
    arguments = parser.parse_args(argv)
    if arguments.config is not None:
        parser.set_defaults(**from_config(arguments, for_training=bool(more)))
        arguments = parser.parse_args(argv)
    if not isinstance(arguments.reward, str):
        raise ValueError(f"--config has {len(arguments.reward)} reward_funcs; name one with --reward.")
    nulls = [name for name in NULLABLE if str(vars(arguments)[name]).lower() in ("null", "none")]
    vars(arguments).update(dict.fromkeys(nulls))
    arguments.chat_template_kwargs = read_template_options(arguments.chat_template_kwargs)
    return arguments


def from_config(arguments: argparse.Namespace, for_training: bool) -> dict[str, Any]:
    """What the YAML of --config says, by the names of the options, as training would take it.

    Args:
        for_training: the problems are those of --dataset_name, not the evaluation sets.
    """
    values = read_yaml(arguments.config)
    own_data = bool(arguments.dataset_name or arguments.eval_sets or for_training)
    wanted = {name: name for name in FROM_CONFIG} | ({} if own_data else DATA)
    found = {ours: values[name] for name, ours in wanted.items() if values.get(name) is not None}
    if rewards := values.get("reward_funcs"):  # of several none says by itself what is right
        listed = [str(x) for x in rewards] if isinstance(rewards, list) else [str(rewards)]
        found["reward"] = listed[0] if len(listed) == 1 else listed
    dataset, config = values.get("dataset_name"), values.get("dataset_config")
    columns = (arguments.prompt_column, arguments.answer_column, arguments.dataset_config)
    if not own_data and columns == (None, None, None):  # given ones are for the evaluation sets
        found |= {"trained_on": dataset, "dataset_config": config}
    elif own_data and dataset is not None and dataset == arguments.dataset_name:
        found["dataset_config"] = config
    return found


def read_template_options(given: Any) -> dict[str, Any] | None:
    """--chat_template_kwargs or the config's, None where there are none.

    Raises:
        ValueError: not a JSON object, or an option that is set here.
    """
    example = '{"enable_thinking": false}'
    try:
        options = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"--chat_template_kwargs is not JSON: {error}. Write it as {example}.") from error
    if not isinstance(options, dict | None):
        raise ValueError(f"--chat_template_kwargs {options!r} is not a JSON object, such as {example}.")
    fixed = [name for name in options or {} if name in ("conversation", "tokenize", "add_generation_prompt")]
    if fixed:
        raise ValueError(f"--chat_template_kwargs has {fixed[0]}, which is no option of a template. Leave it out.")
    return options or None


def check_arguments(arguments: argparse.Namespace) -> dict[str, EvalSet]:
    """The sets to evaluate by name, a single one under "". Refuses what would fail, or mislead, hours later.

    Raises:
        ValueError: with the option and the nearest fix.
    """
    for name, least in (("batch_size", 1), ("seed", 0)):
        if vars(arguments)[name] < least:
            raise ValueError(f"--{name} {vars(arguments)[name]} is less than {least}.")
    if arguments.engine not in ENGINES:
        raise ValueError(
            f"--engine {arguments.engine} is not one of {', '.join(ENGINES)}.{did_you_mean(arguments.engine, ENGINES)}"
        )
    if (arguments.engine == "openai") != (arguments.base_url is not None):
        raise ValueError("--engine openai and --base_url http://… go together. Give both, or neither.")
    if arguments.base_url is not None and not arguments.base_url.lower().startswith(("http://", "https://")):
        raise ValueError(f"--base_url {masked(arguments.base_url)} must begin with http:// or https://.")
    own = [name for name in EvalSet.__dataclass_fields__ if not name.startswith("dataset")]
    usual = EvalSet(**{name: vars(arguments)[name] for name in own})
    given = arguments.eval_sets or {}
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValueError(f"--eval_sets is not JSON: {error}.") from error
    sets = read_sets(given, usual) or {"": EvalSet().over(usual)}
    if "" in sets:
        sets[""].check("--")
    check_dataset(arguments, sets)
    output, baseline = arguments.output, arguments.baseline
    if output is not None and output.is_dir():
        raise ValueError(f"--output {output} is a folder. Name a file in it: {output}/result.json")
    if baseline is not None and is_file(baseline):
        for label in sets:
            if not baseline_path(baseline, label).is_file():
                raise ValueError(f"--baseline {baseline}: there is no {baseline_path(baseline, label)}.")
    check_data_arguments(data_arguments(arguments))
    return sets


def check_dataset(arguments: argparse.Namespace, sets: Mapping[str, EvalSet]) -> None:
    """Refuse sets without problems, and options of the dataset that no set uses.

    Raises:
        ValueError: with the nearest fix.
    """
    name, split = arguments.dataset_name, arguments.dataset_split
    shared = [one for one in sets.values() if one.dataset_name is None]
    if name is None and any(arguments.trained_on is None or not (one.dataset_split or split) for one in shared):
        raise ValueError("--dataset_name is missing: a preset, a Hub id or a file. --config takes the evaluation sets.")
    is_used = bool(shared) or any(one.dataset_name == name for one in sets.values())
    useless = {
        "dataset_name": name is not None and not is_used,
        "dataset_split": split is not None and all(one.dataset_split is not None for one in shared),
        "dataset_config": arguments.dataset_config is not None and arguments.trained_on is None and not is_used,
    }
    for option, is_useless in useless.items():
        if is_useless:
            what = "split" if option == "dataset_split" else "dataset"
            raise ValueError(f"every set of eval_sets has its own {what}, so that --{option} does nothing. Remove it.")


def data_arguments(arguments: argparse.Namespace) -> ScriptArguments:
    """The same for the loader of datasets."""
    given = {name: vars(arguments)[name] for name in (*SHARED, "dataset_config")}
    name = arguments.dataset_name
    return ScriptArguments(
        **given, dataset_name=arguments.trained_on or name, eval_dataset_name=name,
        eval_dataset_split=arguments.dataset_split,
    )  # fmt: skip


def load_problems(arguments: argparse.Namespace, sets: Mapping[str, EvalSet], tokenizer: Any) -> dict[str, Dataset]:
    """The problems of each set, checked."""
    problems = {label: load_set(data_arguments(arguments), one, tokenizer) for label, one in sets.items()}
    for label, dataset in problems.items():
        check_problems(dataset)
        if check_pictures(dataset, f"evaluation set {label}".strip()) and arguments.engine != "transformers":
            raise ValueError(f"--engine {arguments.engine} gets no pictures here. Use --engine transformers.")
    return problems


# ---- files ---------------------------------------------------------------------------------------------------------


def samples_path(output: Path | None, *parts: str) -> Path | None:
    """Where the samples of a result lie: result.json, aime -> result.aime.samples.jsonl."""
    named = "".join(f".{part}" for part in parts if part)
    return None if output is None else output.with_name(f"{output.stem}{named}.samples.jsonl")


def is_file(baseline: str) -> bool:
    """Whether a baseline is the result or the samples of another evaluation, not a model."""
    return baseline.endswith((".json", ".jsonl"))


def baseline_path(baseline: str, label: str) -> Path:
    """The samples of a set in another evaluation."""
    path = Path(baseline)
    return path if path.suffix == ".jsonl" else samples_path(path, label) or path


def read_baseline(baseline: str | None, problems: Mapping[str, Dataset]) -> dict[str, list[Sample]]:
    """Set -> samples of another evaluation, none without a baseline.

    Raises:
        ValueError: they are of other problems.
    """
    found = {} if baseline is None else {x: read_samples(baseline_path(baseline, x)) for x in problems}
    for label, samples in found.items():
        refuse_other_problems(problems_of(samples), problems_of(problems[label]))
    return found


def made_by(arguments: argparse.Namespace, name: str, one: EvalSet) -> str:
    """What decides the samples besides problems, seed and number: weights, engine, sampling and reward.

    The weights of a folder count by parts of their bytes: a model that was trained on is another one.
    """
    weights = hashlib.sha256()
    for path in sorted(p for p in Path(name).glob("*") if p.suffix in (".safetensors", ".bin")):
        with open(path, "rb") as file:
            size = path.stat().st_size
            for place in range(0, size, max(1, size // 64)):
                file.seek(place)
                weights.update(file.read(4096))
    sampling = [one.temperature, one.top_p, one.max_completion_length, arguments.batch_size]
    more = {
        "base_url": arguments.base_url and arguments.base_url.rstrip("/"),
        "chat_template_kwargs": arguments.chat_template_kwargs,
        "reward_code": code_digest(arguments.reward),
    }
    given = {key: value for key, value in more.items() if value is not None}  # none: as before there were these
    parts = [name, weights.hexdigest(), arguments.engine, sampling, arguments.reward, *([given] if given else [])]
    return json.dumps(parts, sort_keys=True)


# ---- engines -------------------------------------------------------------------------------------------------------


def tokenizer_of(name: str, engine: str) -> Any:
    """The tokenizer of a model or of an adapter's base; None for a server, which has its own."""
    if engine == "openai":
        return None
    base = adapter_base(name)
    if base is not None and engine == "vllm":
        raise ValueError(
            f"{name} is an adapter, and --engine vllm takes whole models here. Merge it, or use transformers."
        )
    tokenizer = load_tokenizer(require_model(name if base is None else base))
    text = text_tokenizer(tokenizer)
    if text.pad_token is None:
        text.pad_token = text.eos_token  # as TRL does for training
    return tokenizer


def load_engine(arguments: argparse.Namespace, name: str, tokenizer: Any) -> Callable[[EvalSet], Engine]:
    """Loads the model; returns set -> engine."""
    engine: Any
    if arguments.engine == "openai":
        engine = partial(sample_from_server, arguments.base_url, name)
    elif arguments.engine == "vllm":
        engine = partial(sample_with_vllm, load_vllm(name, arguments.seed), tokenizer)
    else:
        base = adapter_base(name)
        place = "cuda" if torch.cuda.is_available() else "cpu"
        kind = AutoModelForImageTextToText if isinstance(tokenizer, ProcessorMixin) else AutoModelForCausalLM
        whole = kind.from_pretrained(base or name, dtype="auto", device_map=place)
        model = whole if base is None else PeftModel.from_pretrained(whole, name)
        engine = partial(sample_completions, cast(Any, model), tokenizer, batch_size=arguments.batch_size)

    def of_set(one: EvalSet) -> Engine:
        sampling: dict[str, Any] = {"temperature": one.temperature, "top_p": one.top_p}
        if arguments.chat_template_kwargs is not None:
            sampling["chat_template_kwargs"] = arguments.chat_template_kwargs
        return partial(engine, max_new_tokens=one.max_completion_length, **sampling)

    return of_set
