"""The configs that come with the package: list them, or copy one to change it.

sapo-trl recipes
sapo-trl recipes copy qwen3-8b/sapo my.yaml
sapo-trl recipes copy accelerate/zero3 zero3.yaml   # for accelerate launch --config_file
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from sapo_trl.errors import did_you_mean
from sapo_trl.files import write_text

FOLDER = Path(__file__).parents[1] / "configs"  # in a checkout a link to the folder at its root


def main(argv: Sequence[str] | None = None) -> int:
    """List or copy; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    copy = parser.add_subparsers(dest="command").add_parser("copy", help="write a recipe to a file of your own")
    copy.add_argument("name", help="as sapo-trl recipes lists it")
    copy.add_argument("target", type=Path, help="a file that is not there yet")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        print(*map(line_of, names()), sep="\n")
        return 0
    try:
        copy_recipe(arguments.name, arguments.target)
    except (ValueError, OSError) as error:
        from sapo_trl.cli.terminal import refuse  # here, because it imports torch, which takes seconds

        return refuse(error)
    return 0


def names() -> list[str]:
    """Every config: `<model>/<algorithm>` for training, `accelerate/<engine>` for the launcher."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.yaml"))


def config_path(name: str | Path) -> Path:
    """The file that `--config` means: one that is there, else the recipe `tiny/sapo` or `configs/tiny/sapo.yaml`."""
    path, recipe = Path(name), str(name).removeprefix("configs/").removesuffix(".yaml")
    return FOLDER / f"{recipe}.yaml" if not path.is_file() and recipe in names() else path


def head_of(name: str | Path) -> str:
    """The comment lines before the first key of a recipe or a file."""
    head = re.match(r"(#.*\n|\n)+", config_path(name).read_text(encoding="utf-8"))
    return head[0] if head else ""


def launch_of(name: str | Path) -> tuple[str | None, int | None, float | None]:
    """(accelerate file, processes, GB of a GPU) that the head of a recipe states; None for what it does not."""
    text = head_of(name)
    found = [re.search(part, text) for part in (r"--config_file (\S+)", r"--num_processes (\d+)", r"with (\d+) GB")]
    file, processes, memory = (match and match[1] for match in found)
    return file, None if processes is None else int(processes), None if memory is None else float(memory)


def line_of(name: str) -> str:
    """A recipe in one line: its name, its hardware where it says so, and the beginning of its head."""
    text = head_of(name)
    hardware = re.search(r"^# hardware: ([^;,(\n]*[^;,(\n ])", text, re.M)
    first = shorten(text.lstrip("# ").partition("\n")[0], 86, placeholder=" …")
    return f"{name:28}{hardware[1] if hardware else '':20}{first}"


def copy_recipe(name: str, target: Path) -> None:
    """Write a recipe to a file.

    Raises:
        ValueError: there is no such recipe, or the file is there already.
    """
    if name not in names():
        raise ValueError(f"{name!r} is no recipe: sapo-trl recipes lists them.{did_you_mean(name, names())}")
    if target.exists():
        raise ValueError(f"{target} is there already. Give another name.")
    write_text(target, config_path(name).read_text(encoding="utf-8"))
    check, launch = "sapo-trl check --config {}", "accelerate launch --config_file {} -m sapo_trl train --config …"
    print(f"written to {target}; next: {(launch if name.startswith('accelerate/') else check).format(target)}")
