"""Pass@1 with its interval, and pass@k, of a model on a preset, a Hub dataset or a local file.

python scripts/evaluate.py --model runs/tiny/model --dataset_name runs/tiny/test.jsonl --max_new_tokens 96
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sapo_trl.cli.arguments import ScriptArguments
from sapo_trl.data.loading import load_split
from sapo_trl.evaluation.evaluate import evaluate
from sapo_trl.rewards import accuracy_reward


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the model and its tokenizer")
    parser.add_argument("--dataset_name", required=True, help="preset, Hub id, or a .jsonl/.json/.parquet/.csv file")
    parser.add_argument("--dataset_split", help="default: the preset's evaluation split, else test")
    parser.add_argument("--prompt_format", default="chat", help="chat (default) or plain")
    parser.add_argument("--prompt_template", help="text with {prompt}, to append instructions")
    parser.add_argument("--num_problems", type=int, help="only the first ones of the dataset")
    parser.add_argument("--num_samples", type=int, default=16, help="completions per problem (default 16)")
    parser.add_argument("--ks", type=int, nargs="+", default=[1], help="report pass@k for these k (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1; 0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=256, help="completions generated at once (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result and the arguments here as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto", device_map="cuda" if torch.cuda.is_available() else "cpu"
    )
    names = ScriptArguments(
        dataset_name=arguments.dataset_name,
        eval_dataset_name=arguments.dataset_name,
        eval_dataset_split=arguments.dataset_split,
        prompt_format=arguments.prompt_format,
        prompt_template=arguments.prompt_template,
    )
    dataset = load_split(names, "eval", tokenizer)
    if arguments.num_problems is not None:
        dataset = dataset.select(range(min(arguments.num_problems, len(dataset))))
    result = evaluate(
        model,
        tokenizer,
        dataset,
        accuracy_reward,
        num_samples=arguments.num_samples,
        ks=arguments.ks,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    print(result.table())
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"arguments": {name: str(value) for name, value in vars(arguments).items()}, **result.to_dict()}
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
