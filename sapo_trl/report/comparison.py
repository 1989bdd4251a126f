"""Many runs beside each other: a row for each run, a row for each of its rollouts, and pictures of both.

`runs.csv` and `rollouts.csv` of `scripts/compare.py` and `lab.csv` of `scripts/lab.py` are all that is needed. A run
has **collapsed** if the reward of its last two rollouts is under half of its best rollout's, where that is above 0, and
has **survived** if it ends above where it began: held-out Pass@1, in the laboratory the reward.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sapo_trl.metrics.table import title
from sapo_trl.report.plots import DPI, SERIES, STYLE, line_style, new_axes
from sapo_trl.report.runs import Run

SETTING = ("world", "method", "mini_batches", "learning_rate", "rollouts_ahead")  # what all seeds of a setting share
# What the tables and pictures read of each file
COLUMNS = {
    "runs.csv": ("run", *SETTING, "seed", "reward_last", "collapsed_at", "pass_at_1_before", "pass_at_1_after"),
    "lab.csv": ("task", "regime", "method", "curve", "rewards"),
    "rollouts.csv": ("run", "rollout", "reward", "entropy", "grad_norm", "drift", "leak"),
}
LAST = 2  # rollouts whose mean reward is the run's last one
# column of rollouts.csv -> (metric, taken as): the mean over a rollout's steps, or at its last mini-batch, before its
# own update, where the policy is furthest from the rollout
ROLLOUT = {
    "reward": ("reward", "mean"),
    "length": ("completions/mean_length", "mean"),
    "entropy": ("entropy", "mean"),
    "grad_norm": ("grad_norm", "mean"),
    "drift": ("log_ratio/drift", "last"),
    "leak": ("gate/leak_neg", "last"),
    "update_ratio": ("effective_update_ratio", "last"),
}
TAU_NEG, PAPER_TAU = re.compile(r"sapo(?: sapo_temperature_neg=(\S+))?$"), "1.05"  # runs of Figure 5, and the default
PANELS = ("reward", "entropy", "grad_norm", "drift", "leak")


def rollout_table(run: Run) -> pd.DataFrame:
    """A line per rollout of a run, 0 ..., with the columns of `ROLLOUT`; what was not logged is empty."""
    table = run.table.reindex(columns=[metric for metric, _ in ROLLOUT.values()])
    by_rollout = table.groupby((table.index - 1) // run.steps_per_rollout)
    columns = {name: by_rollout[metric].agg(how) for name, (metric, how) in ROLLOUT.items()}
    return pd.DataFrame(columns).rename_axis("rollout").reset_index()


def ending(rewards: Sequence[float]) -> dict[str, Any]:
    """`reward_best`, `reward_last` and `collapsed_at`: from which rollout on the reward stays under half of the best.

    >>> ending([0.5, 0.8, 0.3, 0.5, 0.1, 0.2])
    {'reward_best': 0.8, 'reward_last': 0.15, 'collapsed_at': 4}
    >>> ending([0.5, 0.8, 0.3, 0.7])["collapsed_at"], ending([-1.0, -0.2, -0.9])["collapsed_at"]  # they have not
    (None, None)
    """
    best, last = max(rewards), float(np.mean(rewards[-LAST:]))
    above = [i for i, reward in enumerate(rewards) if reward >= best / 2]
    at = None if best <= 0 or last >= best / 2 else min(above[-1] + 1, len(rewards) - 1)
    return {"reward_best": round(best, 4), "reward_last": round(last, 4), "collapsed_at": at}


def differ_in_rollouts(runs: pd.DataFrame) -> bool:
    """Whether runs of one world were trained on different numbers of rollouts."""
    return "rollouts" in runs and bool((runs.groupby("world")["rollouts"].nunique() > 1).any())


def setting_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A line per setting: seeds, Pass@1 after training (mean, least, greatest), collapsed and surviving seeds.

    The number of rollouts is part of the setting, and a column, only where it differs within a world.
    """
    found = runs.assign(survived=runs["pass_at_1_after"] > runs["pass_at_1_before"])
    own = []
    if differ_in_rollouts(runs):
        own = ["rollouts"]
        found["rollouts"] = ["" if pd.isna(x) else str(int(x)) for x in runs["rollouts"]]
    by_setting = found.groupby([*SETTING, *own], sort=False)
    after = by_setting["pass_at_1_after"]
    numbers = {
        "seeds": after.size(),
        "before": by_setting["pass_at_1_before"].mean(),
        "after": after.mean(),
        "least": after.min(),
        "greatest": after.max(),
        "reward_last": by_setting["reward_last"].mean(),
        "collapsed": by_setting["collapsed_at"].count(),
        "survived": by_setting["survived"].sum(),
    }
    return pd.DataFrame(numbers).reset_index()


def survival_table(settings: pd.DataFrame) -> pd.DataFrame:
    """By world, rollouts ahead and method, the largest learning rate at which every seed survives, a column for each N.

    0 where there is none; methods that were tried at one rate only are left out.
    """
    rows, keys = [], ["world", "rollouts_ahead", "method", *(["rollouts"] if "rollouts" in settings else [])]
    groups: Any = settings.groupby([*keys, "mini_batches"], sort=False)
    for (*setting, n), group in groups:
        survived = group["learning_rate"].where(group["survived"] == group["seeds"], 0.0)
        largest = survived.max() if len(group) > 1 else np.nan
        rows.append([*setting, n, largest])
    table = pd.DataFrame(rows, columns=[*keys, "N", "rate"])
    return table.pivot_table("rate", keys, "N", sort=False).sort_index(axis=1)


def _legend(figure: Figure, ax: Axes, heading: str = "") -> None:
    handles, labels = ax.get_legend_handles_labels()
    options = {"ncols": min(6, len(labels)), "handlelength": 3, "title": heading or None}
    figure.legend(handles, labels, loc="outside upper center", **options)


@matplotlib.rc_context(STYLE)
def curve_figure(runs: pd.DataFrame, rollouts: pd.DataFrame) -> Figure:
    """Figure 4: `PANELS` by rollout, the mean of the seeds in a band from least to greatest, and held-out Pass@1.

    Args:
        runs: of one world, N and number of rollouts ahead; methods may differ in their learning rate.
    """
    rows = rollouts.merge(runs[["run", "method"]], on="run")
    figure, axes = new_axes(2, 3, (9.6, 5.4))
    for name, ax in zip(PANELS, axes):
        for number, method in enumerate(dict.fromkeys(runs["method"])):
            colour, dashes, marker = line_style(number)
            seeds = rows[rows["method"] == method].groupby("rollout")[name]
            mean = seeds.mean()
            ax.fill_between(mean.index, seeds.min(), seeds.max(), color=colour, alpha=0.12, lw=0)
            ax.plot(mean.index, mean, c=colour, ls=dashes, marker=marker, ms=3.5, lw=1.7, label=method)
        ax.set(title=fill(title(ROLLOUT[name][0]), 42), xlabel="rollout")
        if name == "drift" and (rows[name] > 0).any():  # with one mini-batch there is none
            ax.set_yscale("log")
    _dots(axes[5], runs, "method")
    axes[5].set(title="Held-out Pass@1 of each seed", ylim=(-0.03, 1.03))
    _legend(figure, axes[0])
    return figure


def _dots(ax: Axes, runs: pd.DataFrame, x: str) -> None:
    """Held-out Pass@1 of every run, and a bar at their mean, by the values of `x`."""
    values = list(dict.fromkeys(runs[x]))
    for place, value in enumerate(values):
        after, colour = runs.loc[runs[x] == value, "pass_at_1_after"], SERIES[place % len(SERIES)][0]
        ax.plot(place + np.linspace(-0.15, 0.15, len(after)), after, "o", c=colour, ms=4)
        ax.hlines(after.mean(), place - 0.3, place + 0.3, color=colour, lw=2)
    ax.axhline(runs["pass_at_1_before"].mean(), color=SERIES[5][0], lw=1, ls=":")
    ax.set_xticks(range(len(values)), [str(value) for value in values], rotation=20, ha="right")


@matplotlib.rc_context(STYLE)
def grid_figure(runs: pd.DataFrame, x: str, panel: str, label: str) -> Figure:
    """What runs end with against `x`, mean and range of the seeds, a line for each value of `label`.

    Args:
        x, panel, label: columns; a panel for each value of `panel`. Dotted: where the runs began.
    """
    groups, ticks = list(runs.groupby(panel)), sorted(set(runs[x]))  # equally far apart: 0.95, 1 and 1.05 beside 10
    lines = list(dict.fromkeys(runs[label])) if label == "method" else sorted(set(runs[label]))
    figure, axes = new_axes(1, len(groups), (3.2 * max(len(groups), 2), 3.4), sharey=True)
    for ax, (value, rows) in zip(axes, groups):
        for number, line in enumerate(lines):
            colour, dashes, marker = line_style(number)
            seeds = rows[rows[label] == line].groupby(x)["pass_at_1_after"]
            beside = 0.04 * (number - (len(lines) - 1) / 2)  # so that bars at one place do not hide each other
            mean, places = seeds.mean(), [ticks.index(at) + beside for at in seeds.groups]
            bars, name = [mean - seeds.min(), seeds.max() - mean], str(line) if label == "method" else f"{line:g}"
            ax.errorbar(places, mean, bars, c=colour, ls=dashes, marker=marker, ms=4, capsize=2, label=name)
        ax.axhline(rows["pass_at_1_before"].mean(), color=SERIES[5][0], lw=1, ls=":")
        ax.set(xlabel=AXIS[x], xlim=(-0.4, len(ticks) - 0.6), ylim=(-0.03, 1.03), title=f"{AXIS[panel]}: {value:g}")
        ax.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel(END.get(str(runs["world"].iloc[0]).partition("-")[0], "held-out Pass@1"))
    _legend(figure, axes[0], "" if label == "method" else AXIS[label])
    return figure


AXIS = {"mini_batches": "mini-batches per rollout", "learning_rate": "learning rate", "tau_neg": "τ where A < 0"}
END = {"lab": "reward of the last rollouts"}  # world -> what its runs end with, in place of Pass@1


def lab_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `lab.csv` that differ in nothing but N and the learning rate, in the form of runs.csv: a run a seed,
    whose Pass@1 is its reward, in the first rollout (the median of the seeds) and in the last ones. Which seeds have
    collapsed is not told: the table has their number."""
    rows = []
    for row in table.to_dict("records"):
        found = re.fullmatch(r"N=(\d+) lr=(\S+)(?: task=\S+)?", str(row["regime"]))
        if found is None:
            continue
        setting = {"world": f"lab-{row['task']}", "method": row["method"], "mini_batches": int(found[1])}
        setting |= {"learning_rate": float(found[2]), "rollouts_ahead": 0}
        curve = json.loads(row["curve"])
        for seed, reward in enumerate(json.loads(row["rewards"])):
            ends = {"pass_at_1_before": curve[0], "pass_at_1_after": reward, "reward_last": reward}
            rows.append(setting | {"seed": seed, "collapsed_at": None} | ends)
    return pd.DataFrame(rows)


def tuned(runs: pd.DataFrame, seeds: int = 2) -> pd.DataFrame:
    """The runs of each method at its own learning rate, the one with the highest mean Pass@1 over its first `seeds`
    seeds; the result has the other seeds only, so that none is judged by what chose it."""
    chosen = []
    for _, mine in runs.groupby("method", sort=False):
        first = sorted(mine["seed"].unique())[:seeds]
        for_choice = mine[mine["seed"].isin(first)]
        best = for_choice.groupby("learning_rate")["pass_at_1_after"].mean().idxmax()
        at_best = mine[mine["learning_rate"] == best]
        chosen.append(at_best[~at_best["seed"].isin(first)])
    return pd.concat(chosen)


def read_runs(folder: Path) -> pd.DataFrame:
    """The rows of `runs.csv` and of `lab.csv` in the folder, those that are there.

    Raises:
        FileNotFoundError: neither is.
        ValueError: a file lacks columns, or none has a run.
    """
    files = {"runs.csv": pd.DataFrame, "lab.csv": lab_runs}
    found = [read(read_table(folder / name)) for name, read in files.items() if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"{folder} has neither runs.csv (scripts/compare.py) nor lab.csv (scripts/lab.py).")
    if not any(map(len, found)):
        raise ValueError(
            f"{folder}: runs.csv and lab.csv have no run to compare. Of lab.csv only rows count whose regime is N and "
            "the learning rate, as in N=4 lr=1e-3."
        )
    return pd.concat([rows for rows in found if len(rows)])


def read_table(path: Path) -> pd.DataFrame:
    """One of the files of `COLUMNS`.

    Raises:
        ValueError: it lacks some of its columns, or is no CSV.
    """
    try:
        table = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is no CSV: {error}. Make it again with the script that wrote it.") from error
    if missing := [name for name in COLUMNS[path.name] if name not in table]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table))}. Make it again with "
            "the script that wrote it."
        )
    return table


def sapo_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of SAPO that differ in nothing but the temperature where A < 0, as `tau_neg`; no rollout ahead."""
    mine = runs[(runs["rollouts_ahead"] == 0) & runs["method"].str.match(TAU_NEG.pattern)]
    return mine.assign(tau_neg=mine["method"].str.extract(TAU_NEG, expand=False).fillna(PAPER_TAU).astype(float))


def tau_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Each temperature against the paper's: what its runs end with minus that, paired over settings and seeds.

    error: standard error of the mean over seeds; least and greatest: means of single settings.
    """
    rows = []
    for world, mine in sapo_runs(runs).groupby("world"):
        wide = mine.pivot_table("pass_at_1_after", ["mini_batches", "learning_rate", "seed"], "tau_neg")
        paper = float(PAPER_TAU)
        for tau in (tau for tau in wide if tau != paper and paper in wide):
            pairs = (wide[tau] - wide[paper]).dropna()
            seeds, settings = pairs.groupby("seed").mean(), pairs.groupby(["mini_batches", "learning_rate"]).mean()
            numbers = pairs.mean(), seeds.sem(), settings.min(), settings.max()
            cells = [f"{x:+.4f}" if i != 1 else f"{x:.4f}" for i, x in enumerate(numbers)]
            rows.append([world, f"{tau:g}", len(settings), len(seeds), *cells])
    return pd.DataFrame(rows, columns=["world", "τ", "settings", "seeds", "difference", "error", "least", "greatest"])


def paired_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What a method's runs end with minus what another's do, of the same setting and paired by seed: mean ± half of the
    95 % interval of a t distribution, a column for each of the others. From two seeds on."""
    rows = []
    groups: Any = runs.groupby(["world", "rollouts_ahead", "mini_batches", "learning_rate"], sort=False)
    for setting, group in groups:
        wide = group.pivot_table("pass_at_1_after", "seed", "method", sort=False)
        for mine in wide:
            row = dict(zip(("world", "rollouts_ahead", "mini_batches", "learning_rate"), setting)) | {"method": mine}
            for other in wide.columns.drop(mine):
                pairs = (wide[mine] - wide[other]).dropna()
                if len(pairs) > 1:
                    row[f"minus {other}"] = f"{pairs.mean():+.3f} ± {t_95(len(pairs) - 1) * pairs.sem():.3f}"
            rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    return table[table.filter(like="minus ").ne("").any(axis=1)] if len(table.columns) > 5 else pd.DataFrame()


def t_95(freedom: int) -> float:
    """97.5 % of a t distribution lie below it; beyond 10 degrees of freedom by its expansion, within 0.003."""
    known = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    z = 1.959964
    further = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return known[freedom - 1] if freedom <= len(known) else further


def figures(runs: pd.DataFrame, rollouts: pd.DataFrame) -> dict[str, Figure]:
    """Name -> picture, of every question that these runs say something about; of the laboratory's methods six."""
    found = {}
    sapo, has_options = sapo_runs(runs), runs["method"].str.contains("=")
    is_lab, own_picture = runs["world"].str.startswith("lab-"), runs["method"].str.match(TAU_NEG.pattern)
    for world, rows in runs[~(has_options & (is_lab | own_picture))].groupby("world"):
        if world.startswith("lab-"):  # a sweep of 13
            rows = rows[rows["method"].isin(list(dict.fromkeys(rows["method"]))[: len(SERIES)])]
        now = rows[rows["rollouts_ahead"] == 0]
        if now["learning_rate"].nunique() > 1:
            found[f"{world}-rates"] = grid_figure(now, "learning_rate", "mini_batches", "method")
        for ahead, aged in rows.groupby("rollouts_ahead"):
            if aged["mini_batches"].nunique() > 2:
                found[f"{world}-staleness-{ahead}"] = grid_figure(aged, "mini_batches", "learning_rate", "method")
        mine = sapo[sapo["world"] == world].groupby("mini_batches").filter(lambda same: same["tau_neg"].nunique() > 2)
        if len(mine):
            found[f"{world}-figure-5"] = grid_figure(mine, "tau_neg", "mini_batches", "learning_rate")
        for n, same_n in now.groupby("mini_batches") if len(rollouts) else ():
            settings = {f"lr{rate:g}": same for rate, same in same_n.groupby("learning_rate")}
            settings |= {"tuned": best} if len(settings) > 1 and len(best := tuned(same_n)) else {}
            for name, same in settings.items():
                if set(same.get("run", [""])) <= set(rollouts["run"]):
                    found[f"{world}-figure-4-N{n}-{name}"] = curve_figure(same, rollouts)
    return found


def draw(folder: Path, output: Path) -> list[Path]:
    """Every picture of the rows in `folder`, as `<output>/<name>.png`; returns the paths."""
    path, paths = folder / "rollouts.csv", []
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(read_runs(folder), read_table(path) if path.exists() else pd.DataFrame()).items():
        paths.append(output / f"{name}.png")
        figure.savefig(paths[-1], dpi=DPI // 2, facecolor="white", metadata={"Software": None})
    return paths


def tuned_table(runs: pd.DataFrame) -> pd.DataFrame:
    """By world and method, what the runs at the method's own learning rate end with (`tuned`): mean (rate), a column
    for each N at which several rates were tried."""
    rows = []
    groups: Any = runs[runs["rollouts_ahead"] == 0].groupby(["world", "method", "mini_batches"], sort=False)
    for (world, method, n), mine in groups:
        if mine["learning_rate"].nunique() > 1 and len(best := tuned(mine)):
            rows.append([world, method, n, f"{best['pass_at_1_after'].mean():.3f} ({best['learning_rate'].iloc[0]:g})"])
    table = pd.DataFrame(rows, columns=["world", "method", "N", "end"])
    return table.pivot_table("end", ["world", "method"], "N", sort=False, aggfunc="first").sort_index(axis=1)


def markdown(folder: Path) -> str:
    """What all runs come to, as Markdown: largest surviving and own learning rates, then every setting of runs.csv."""
    runs = read_runs(folder)
    trained = runs[~runs["world"].str.startswith("lab")]
    tables = {
        "Largest learning rate, of those tried, that every seed survives": survival_table(setting_table(runs))
        .astype(object)
        .replace(0.0, "none")
        .reset_index(),
        "Each method at its own learning rate: mean end of the seeds that did not choose it": tuned_table(
            runs
        ).reset_index(),
        f"SAPO with another τ where A < 0, against {PAPER_TAU}": tau_table(runs),
        "Every setting of runs.csv": setting_table(trained),
        "Differences of methods": paired_table(trained[~trained["method"].str.contains("=")]),
    }
    warning = "Runs of different numbers of rollouts are among these; tables without that column mix them.\n\n"
    return warning + sections(tables) if differ_in_rollouts(runs) else sections(tables)


def sections(tables: Mapping[str, pd.DataFrame]) -> str:
    """Tables under their headings, as Markdown, without those that have no row."""
    return "\n".join(f"## {heading}\n\n{_table(table)}" for heading, table in tables.items() if len(table))


def _table(table: pd.DataFrame) -> str:
    """One Markdown table; a column that is a number is an N."""
    table = table.rename(columns=lambda name: f"N={name}" if isinstance(name, int) else name.replace("_", " "))
    cells = [[_cell(x) for x in row] for row in table.itertuples(index=False)]
    rows = [list(table.columns), ["---"] * table.shape[1], *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(x: Any) -> str:
    """A share with three digits, a learning rate (up to 0.01 in all of these) as it is."""
    if not isinstance(x, float):
        return str(x)
    return "" if np.isnan(x) else f"{x:.3f}" if x > 0.01 else f"{x:g}"
