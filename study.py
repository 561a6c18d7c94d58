"""
Does every part of the method earn its place? Variants by seeds, paired differences, one page.

The idea. An ablation is a run folder forked from another one at the first stage that differs, so
that variants of one seed share the world, the base model and the proposals. Scores are compared
seed by seed with those of the full method: what a seed does to both drops out.

The maths. Over n seeds a figure is its mean +- t(0.975, n - 1) * s / sqrt(n), s the sample standard
deviation; a comparison is the same of the n differences, which is the paired t-test.

How to run:
    python study.py --out runs/study                               every variant, hours on two cores
    python study.py --out runs/small --seeds 1 --variants full never --scale 0.05       a trial: at
                    this scale selection keeps nothing, so that many variants are alike
    python study.py --out runs/study --only_summarise              the page, from what is there
What is there is not done again. Writes run folders OUT/seedN/VARIANT, OUT/study.md, OUT/study.png,
and OUT/runs.jsonl, the figures of every run.

A *report* is a run's report.json. What is read of it:
    modes       {"adaptive", "never", ...: {"overall", "reason_rate", "tokens_per_query",
                "datasets": {"PocketWalk": 0.97, ...}}}, the *scores* of one way to use the weights
    adaptivity  {"PocketWalk": {"auc", "reason_rate": {"0": 0.2, ...}, ...}}, by steps, see eval.py
    selection   {"precision", "recall", "placebo_accepted", ...}, see select.py
    curve       [{"tokens_per_query", "overall", ...}], adaptive at 41 thresholds

Left out: corrections for the number of variants, and tests without assumptions (with five
seeds, the default, a sign test never goes below 0.06).
"""

import argparse
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

import eval as evaluation
import pocket
import train
from embed import Embedder
from model import Rows, read_json, write_json, write_rows
from report import table

# Options of train.py. A query reasons if p_reason exceeds the threshold: 1 is never exceeded, -1
# always. Without rollouts the RL stage goes on with the contrastive loss alone.
NEVER = {"embed_proposers": "none", "decision_weight": 0.0, "rl_rollouts": 0, "threshold": 1.0}
THINK = {"rl_decision_weight": 0.0, "latency_penalty": 0.0, "threshold": -1.0}
# Every text that was written is kept, so every label says "reason": half a weight is enough.
WRITTEN = {"select_rule": "none", "decision_weight": 0.5}
# Trained to think always, on all that the best proposer wrote. Selection has to find out who that
# is; here it is told.
ALWAYS = THINK | WRITTEN | {"embed_proposers": "careful"}
# name: (first stage that is done again, options that differ). All are forks of full.
VARIANTS = {
    "full": ("base", {}),
    "never": ("embed", NEVER),  # contrastive without a rationale, as VLM2Vec
    "always": ("select", ALWAYS),  # a rationale on every query, as UME-R1
    # Its labels differ, so they must not teach a decision. In `always` all of them say "reason".
    "always_selected": ("embed", THINK | {"decision_weight": 0.0}),
    "no_selection": ("select", WRITTEN),  # all that was written is learnt
    "positive_only": ("select", {"select_rule": "positive_only"}),  # similarity alone
    "no_placebo": ("select", {"select_rule": "no_placebo"}),
    "no_crossfit": ("select", {"select_folds": 1}),  # the judge has trained on the pair
    "supervised": ("rl", {"rl_steps": 0}),  # the decision as selection labelled it
    "no_penalty": ("rl", {"latency_penalty": 0.0}),
    "dear_penalty": ("rl", {"latency_penalty": 1.2}),  # twice the default
    "one_loss": ("rl", {"rl_one_loss": True}),  # decision and words in one mean
}
# Options that all runs of a variant have in common, but for the seed.
COMPARED = [f.name for f in fields(train.Config) if f.metadata["group"] != "machine"]
COMPARED.remove("seed")
LONGER = pocket.LONGEST + 1  # steps of the longest queries of a test that training never saw
# name: (figure, mode A, mode B): how far of the way from A to B adaptive goes. Never's are 0.
RATIOS = {
    "of the way from random to oracle": ("overall", "random", "oracle"),
    "tokens / the oracle's": ("tokens_per_query", "never", "oracle"),
    "tokens / those of per task": ("tokens_per_query", "never", "per_task"),
    "tokens / those of always": ("tokens_per_query", "never", "always"),
    "reason rate / that of per task": ("reason_rate", "never", "per_task"),
}

# --------------------------------------------------------------------------------------------------
# Running


def fork(parent, folder, first, same_judge):
    """A run folder whose data and stages before `first` are links to its parent's. same_judge: its
    select stage finds the parent's judgements, so that another rule needs no new evaluators."""
    if (folder / "stages.json").exists():  # it is written last
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = train.STAGES[: train.STAGES.index(first)]  # first = "embed": base, propose, select
    for name in ("data", *kept):  # a relative link: the study's folder can be moved
        (folder / name).symlink_to(os.path.relpath(parent / name, folder))
    if same_judge:  # an unfinished stage works in STAGE.part: select takes what it finds there
        shutil.copytree(parent / "select", folder / "select.part")  # judged0.jsonl ...
    shutil.copy(parent / "config.json", folder)  # what the links were made with
    done = read_json(parent / "stages.json")  # {"base": {"seconds": 900.0, ...}}
    write_json(folder / "stages.json", {stage: done[stage] for stage in kept})


def run_variant(cfg, name, seed, out):
    """One variant under one seed, unless its report is there. cfg: train.Config of the full method;
    out: the study's folder. ValueError if a run of it is there that had other options."""
    first, changes = VARIANTS[name]  # "rl", {"rl_steps": 0}
    folder = out / f"seed{seed}" / name
    wanted = vars(cfg) | changes
    for path in out.glob(f"seed[0-9]*/{name}/report.json"):  # of any seed: the page has them all
        # An older one lacks options: it was made with their defaults.
        before = vars(train.Config()) | read_json(path.with_name("config.json"))
        for option in COMPARED:
            if before[option] != wanted[option]:
                change = f"a run of --{option} {before[option]}, not {wanted[option]}"
                raise ValueError(f"{path.parent}: {change}; use another --out")
    if not (folder / "report.json").exists():
        if name != "full":
            run_variant(cfg, "full", seed, out)  # what is forked has to be there
            # These rules read the same judgements as full; positive_only those of easy pairs, too.
            same_judge = changes.get("select_rule") in ("none", "no_placebo")
            fork(folder.with_name("full"), folder, first, same_judge)
        print(f"study: seed {seed}, {name}", flush=True)
        train.run_stages(replace(cfg, seed=seed, out=str(folder), resume="auto", **changes))
    if name == "full" and not (folder / "longer" / "summary.json").exists():
        longer_chains(cfg, seed, folder)


def longer_chains(cfg, seed, folder):
    """The full method on chains one longer than in training -> FOLDER/longer/summary.json."""
    world = folder / "longer_data"
    queries = max(4, round(4 * cfg.world_test * cfg.scale))  # a tenth of them is that long
    # Another world than the run's. Nobody trains on its training pairs.
    pocket.write_world(world, 1000 + seed, 4, queries, longest=LONGER, names=pocket.MIXED)
    truth = read_json(world / "pocket.json")["test"]  # {"PocketWalk/0": 3}: steps
    embedder = Embedder.from_pretrained(folder / "rl")  # the model that the run ends with
    options = {"max_new_tokens": 64, "batch_size": 64}  # they take more words, too
    evaluation.evaluate(embedder, world, folder / "longer", options=options, truth=truth)


# --------------------------------------------------------------------------------------------------
# Statistics


def interval(values):
    """Mean and half the 95 % interval; half is None for a single value. [1, 2, 3] -> 2, 2.48"""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    t = stats.t.ppf(0.975, len(values) - 1)  # 2.78 for five seeds
    return mean, float(t * stats.sem(values))  # sem: s / sqrt(n)


def show(values, digits=3):
    """Of several seeds: "0.963 ± 0.007"; of one: "0.963"; "" where one has no value."""
    if None in values:
        return ""
    mean, half = interval(values)
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def collect(out):
    """{"full": {"seed1": report}} of the reports that are there."""
    reports = {}
    for name in VARIANTS:
        paths = sorted(out.glob(f"seed[0-9]*/{name}/report.json"))
        if paths:
            reports[name] = {path.parts[-3]: read_json(path) for path in paths}
    if "full" not in reports:
        raise ValueError(f"{out}: no finished run of the full method in seed*/full")
    return reports


def measured(reports):
    """{label: {seed: scores}}, the scores of one mode in its report: each variant, which is used as
    it was trained, and the full method's own weights in other modes ("full, never").

    Each variant is read in its mode "adaptive": its own threshold makes it reason never or always.
    """
    rows = {}
    for name, by_seed in reports.items():
        rows[name] = {seed: report["modes"]["adaptive"] for seed, report in by_seed.items()}
    for mode in ("never", "always", "per_task", "random", "oracle"):
        by_seed = reports["full"].items()
        rows[f"full, {mode}"] = {seed: report["modes"][mode] for seed, report in by_seed}
    return rows


# --------------------------------------------------------------------------------------------------
# The page and the figure. rows: of measured().


def results_table(rows):
    """Each variant beside the full method:

    | never | 10 | 0.826 ± 0.009 | 0.00 ± 0.00 | 0.0 ± 0.0 | 0.137 ± 0.010 |
    """
    lines = []
    full = rows["full"]  # {seed: scores}
    for label, by_seed in rows.items():
        cells = [label, len(by_seed)]
        for key, digits in ("overall", 3), ("reason_rate", 2), ("tokens_per_query", 1):
            cells.append(show([scores[key] for scores in by_seed.values()], digits))
        lead = []  # of the seeds that both have
        for seed, scores in by_seed.items():
            if seed in full:
                lead.append(full[seed]["overall"] - scores["overall"])
        cells.append("" if label == "full" or not lead else show(lead))
        lines.append(cells)
    names = ["variant", "seeds", "overall", "reason rate", "tokens / query", "full − it"]
    return table(names, lines)


def families_table(rows, variants):
    """The mean score of each family over seeds. A column is a variant: | Walk | 0.96 | 0.65 |"""
    lines = []
    any_seed, *_ = rows["full"].values()
    for family in any_seed["datasets"]:
        cells = [family.removeprefix("Pocket")]
        for name in variants:
            values = [scores["datasets"][family] for scores in rows[name].values()]
            cells.append(f"{np.mean(values):.2f}")
        lines.append(cells)
    return table(["family", *variants], lines)


def steps_table(adaptivities):
    """A line for each family and number of steps: how often adaptive reasons, and the scores of
    never and always. adaptivities: each seed's "adaptivity", see eval.py.

    | Sum | 0 | 0.13 ± 0.11 | 0.99 ± 0.01 | 1.00 ± 0.01 | 1.000 (0.98 to 1.00) |
    """
    lines = []
    for name in adaptivities[0]:
        seeds = [adaptivity[name] for adaptivity in adaptivities]
        # None: this seed has no queries of both kinds.
        aucs = [seed["auc"] for seed in seeds if seed["auc"] is not None]
        auc = f"{np.median(aucs):.3f} ({min(aucs):.2f} to {max(aucs):.2f})" if aucs else ""
        counts = {count for seed in seeds for count in seed["reason_rate"]}  # "0", "1" ... steps
        for count in sorted(counts, key=int):
            cells = [name.removeprefix("Pocket"), count]
            for key in ("reason_rate", "never", "always"):
                values = [seed[key][count] for seed in seeds if count in seed[key]]
                cells.append(show(values, 2))
            lines.append([*cells, auc])
            auc = ""  # stands in the family's first line alone
    return table(["family", "steps", "reason rate", "never", "always", "AUC"], lines)


def decision_table(reports):
    """How good are adaptive's decisions, and how cheap? Its figures beside other modes', means over
    the seeds that have the ratio. random: a coin at its rate; oracle: each query's best."""
    lines = []
    for name, (key, start, end) in RATIOS.items():
        values = []  # of each seed
        for report in reports:
            modes = report["modes"]
            zero = modes[start][key]
            whole_way = modes[end][key] - zero
            if whole_way:  # a ratio needs something to divide by
                values.append((modes["adaptive"][key] - zero) / whole_way)
        if values:
            lines.append([name, show(values, 2)])
    return table(["adaptive", "ratio"], lines)


def calibration_table(out):
    """Does p_reason foretell what thinking brings? A line for each bin of p_reason: the number of
    queries of all seeds, the mean p_reason, the mean score of always minus that of never."""
    edges = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    # A row is a query: {"p_reason": 0.9, "never": its score 0.0, "always": 1.0, ...}
    rows = list(Rows(*out.glob("seed[0-9]*/full/eval/*/*_queries.jsonl")))
    p_reason = np.array([row["p_reason"] for row in rows])  # (queries,)
    gain = np.array([row["always"] - row["never"] for row in rows])
    bins = np.digitize(p_reason, edges[1:-1])  # (queries,): edges[i] <= p_reason < edges[i + 1]
    lines = []
    for i in np.unique(bins):
        here = bins == i
        means = [f"{p_reason[here].mean():.3f}", f"{gain[here].mean():+.3f}"]
        lines.append([f"{edges[i]:.1f} to {edges[i + 1]:.1f}", here.sum(), *means])
    return table(["p_reason", "queries", "mean p_reason", "mean gain"], lines)


def selection_table(reports):
    """Selection against the truth, where it is not full's: the share of kept rationales that help;
    of the pairs with a helpful one, the share that kept one; how often a placebo passes."""
    names = ["variant", "precision", "recall", "placebo_accepted"]
    lines = []
    for name, by_seed in reports.items():
        if VARIANTS[name][0] not in ("base", "select"):
            continue  # its selection is full's
        cells = [name]
        for key in names[1:]:
            cells.append(show([report["selection"][key] for report in by_seed.values()]))
        lines.append(cells)
    return table(names, lines)


def summarise(out):
    """study.md, study.png and runs.jsonl of the runs that are there."""
    reports = collect(out)
    runs = []
    for name, by_seed in reports.items():
        for report in by_seed.values():
            keys = ("seed", "modes", "selection", "adaptivity", "curve")
            runs.append({"variant": name} | {key: report[key] for key in keys})
    write_rows(out / "runs.jsonl", runs)
    rows = measured(reports)
    full = reports["full"].values()
    longer = ""  # a section of the page, of what longer_chains() left
    paths = sorted(out.glob("seed[0-9]*/full/longer/summary.json"))
    if paths:
        longer = f"Chains of up to {LONGER} steps, new queries. In training none is that long:\n\n"
        longer += steps_table([read_json(path)["adaptivity"] for path in paths]) + "\n"
    page = f"""\
# Does every part earn its place?

Written by study.py. Mean ± half the 95 % interval over seeds. `full, MODE` are the full
method's own weights, used otherwise; the other rows were trained for what they do.
Intervals are not corrected for the number of rows. `full − it` is of the seeds that a row has.

{results_table(rows)}
## By family

{families_table(rows, reports)}
## By the number of steps a query needs

Full method. All queries of a family have the same form. AUC: the chance that a query of
two or more steps has a higher p_reason than one of none: median over seeds (lowest to
highest).

{steps_table([report["adaptivity"] for report in full])}
{longer}## How good are the decisions, and how cheap?

Adaptive of the full method, beside its own other modes.

{decision_table(full)}
## Does p_reason foretell the gain?

Queries of all seeds. Gain: the score after thinking minus the score without.

{calibration_table(out)}
## Selection against the truth

{selection_table(reports)}
"""
    (out / "study.md").write_text(page, encoding="utf-8")
    draw(rows, full, out / "study.png")


def draw(rows, full, path):
    """Quality against tokens. Coloured: trained for what it does, with its interval. Grey: the full
    method's own weights, used otherwise; the line is its dial, the threshold."""
    shown = {  # label of measured(): (marker, colour, legend)
        "never": ("s", "#0072B2", "never (trained for it)"),
        "always": ("D", "#D55E00", "always (trained for it)"),
        "always_selected": ("d", "#B65A92", "always (on selected rationales)"),
        "supervised": ("v", "#8C6D00", "adaptive without stage rl"),
        "full": ("o", "#009E73", "adaptive"),
        "full, per_task": ("^", "0.45", "per task"),
        "full, random": ("X", "0.45", "random"),
        "full, oracle": ("*", "0.45", "oracle"),
    }
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")  # inches
    axes = figure.add_subplot()
    # The dial of each seed: tokens and score at every threshold.
    dials = []  # (seeds, thresholds, 2)
    for report in full:
        dials.append([(point["tokens_per_query"], point["overall"]) for point in report["curve"]])
    x, y = np.mean(dials, axis=0).T  # mean over seeds at the same threshold
    axes.plot(x, y, color="#009E73", alpha=0.5, lw=1.5, zorder=1)
    for name, (marker, colour, label) in shown.items():
        if name not in rows:  # a variant that was not run
            continue
        seeds = rows[name].values()
        x = np.mean([scores["tokens_per_query"] for scores in seeds])
        y, half = interval([scores["overall"] for scores in seeds])
        # Grey points are the green one's runs: their intervals would say the same again.
        bar = None if name.startswith("full,") else half
        axes.errorbar(x, y, bar, fmt=marker, color=colour, ms=9, capsize=3, label=label)
    axes.set(xlabel="generated tokens per query", ylabel="mean score of twelve families")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="1 to 5")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--scale", type=float, default=1.0, help="see train.py")
    parser.add_argument("--only_summarise", action="store_true", help="tables of what is there")
    args = parser.parse_args()
    try:
        # The other options are the defaults.
        cfg = train.parse([f"--scale={args.scale}", f"--seed={min(args.seeds)}"])
        names = [] if args.only_summarise else args.variants
        for name in names:  # a variant on all seeds before the next one
            for seed in args.seeds:
                run_variant(cfg, name, seed, args.out)
        summarise(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: {error}")
    print(f"written: {args.out}/study.md")


if __name__ == "__main__":
    main()
