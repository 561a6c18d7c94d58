"""
Does every part of the method earn its place? Variants by seeds, paired differences, one page.

The idea. An ablation is a run folder forked from another one at the first stage that differs, so
that variants of one seed share the world, the base model and the proposals. Scores are compared
seed by seed with those of the full method: what a seed does to both drops out.

The maths. Over n seeds a figure is its mean +- t(0.975, n - 1) * s / sqrt(n), s the sample standard
deviation; a comparison is the same of the n differences, with the p of the paired two-sided t-test.
Nothing is corrected for the number of variants.

How to run:
    python study.py --out runs/study --seeds 5                     every variant, hours on two cores
    python study.py --out runs/study --seeds 1 --variants full,never --scale 0.05
What is there is not done again. Writes run folders OUT/seedN/VARIANT, OUT/study.json, OUT/study.md.

Left out: corrections for multiple comparisons, tests without assumptions (five seeds cannot carry
them: a sign test never goes below 0.06), an "always" that learns from selected rationales.
"""

import argparse
import glob
import json
import math
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
from scipy import stats

import train
from model import read_json, write_json

ALWAYS = {
    "select_rule": "none",
    "embed_proposers": "careful",  # the best proposer, which selection has to find by itself
    "decision_weight": 0.0,
    "rl_when": 0.0,
    "latency_penalty": 0.0,
    "threshold": -1.0,
}
NEVER = {"embed_proposers": "none", "decision_weight": 0.0, "rl_rollouts": 0, "threshold": 1.0}
# name: (forked from, first stage that is done again, options that differ)
VARIANTS = {
    "full": (None, "base", {}),
    "never": ("full", "embed", NEVER),  # contrastive without a rationale, as VLM2Vec
    "always": ("full", "select", ALWAYS),  # a rationale on every query, as UME-R1
    "no_selection": ("full", "select", {"select_rule": "none"}),
    "positive_only": ("full", "select", {"select_rule": "positive_only"}),
    "no_placebo": ("full", "select", {"select_rule": "no_placebo"}),
    "no_crossfit": ("full", "select", {"select_folds": 1}),
    "supervised": ("full", "rl", {"rl_steps": 0}),  # the decision as selection labelled it
    "no_penalty": ("full", "rl", {"latency_penalty": 0.0}),
    "dear_penalty": ("full", "rl", {"latency_penalty": 3.0}),
    "one_loss": ("full", "rl", {"rl_one_loss": True}),
}

# --------------------------------------------------------------------------------------------------
# Running


def fork(parent, folder, first, same_judge):
    """A run folder whose data and stages before `first` are links to its parent's. same_judge: its
    select stage finds the parent's judgements, so that another rule needs no new evaluators."""
    if os.path.exists(os.path.join(folder, "stages.json")):
        return
    kept = train.STAGES[: train.STAGES.index(first)]
    os.makedirs(folder, exist_ok=True)
    for name in ("data", *kept):
        source = os.path.relpath(os.path.join(parent, name), folder)
        os.symlink(source, os.path.join(folder, name))
    if first == "select" and same_judge:
        os.makedirs(os.path.join(folder, "select.part"))
        for path in glob.glob(os.path.join(parent, "select", "judged*.jsonl")):
            shutil.copy(path, os.path.join(folder, "select.part"))
    done = read_json(os.path.join(parent, "stages.json"))
    write_json(os.path.join(folder, "stages.json"), {stage: done[stage] for stage in kept})


def run_variant(cfg, name, seed, out):
    """One variant under one seed, unless its report is there."""
    parent, first, changes = VARIANTS[name]
    folder = os.path.join(out, f"seed{seed}", name)
    if os.path.exists(os.path.join(folder, "report.json")):
        return
    if parent:
        run_variant(cfg, parent, seed, out)
        # Other folds make other evaluators; positive_only wants the easy pairs judged, too.
        again = "select_folds" in changes or changes.get("select_rule") == "positive_only"
        fork(os.path.join(out, f"seed{seed}", parent), folder, first, not again)
    print(f"study: seed {seed}, {name}", flush=True)
    train.run_stages(replace(cfg, seed=seed, out=folder, resume="auto", **changes))


# --------------------------------------------------------------------------------------------------
# Statistics


def interval(values):
    """Mean and half the 95 % interval; half is None for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    t = stats.t.ppf(0.975, len(values) - 1)
    return mean, float(t * np.std(values, ddof=1) / math.sqrt(len(values)))


def paired(a, b):
    """Figures of two variants under the same seeds -> {"diff" (a - b), "half", "p", "n"}."""
    diff, half = interval(np.subtract(a, b))
    varies = len(a) > 1 and np.ptp(np.subtract(a, b)) > 1e-12
    p = float(stats.ttest_rel(a, b).pvalue) if varies else None
    return {"diff": diff, "half": half, "p": p, "n": len(a)}


def collect(out):
    """{variant: {seed: report}} of the reports that are there."""
    reports = {}
    for path in sorted(glob.glob(os.path.join(out, "seed*", "*", "report.json"))):
        folder, name = os.path.split(os.path.dirname(path))
        seed = int(os.path.basename(folder).removeprefix("seed"))
        reports.setdefault(name, {})[seed] = read_json(path)
    if "full" not in reports:
        raise ValueError(f"{out}: no finished run of the full method in seed*/full")
    return reports


def summarise(out):
    """study.json and study.md of the runs that are there."""
    reports = collect(out)
    # A variant is used as it was trained; the full method's weights also in its other modes.
    rows = {name: (by_seed, "adaptive") for name, by_seed in reports.items()}
    for mode in ("never", "always", "per_task", "random", "oracle"):
        rows[f"full, {mode}"] = (reports["full"], mode)
    study = {}
    for label, (by_seed, mode) in rows.items():
        modes = {seed: r["modes"][mode] for seed, r in by_seed.items()}
        shared = sorted(set(modes) & set(reports["full"]))
        full = [reports["full"][seed]["modes"]["adaptive"]["overall"] for seed in shared]
        study[label] = {
            "seeds": sorted(modes),
            "overall": interval([m["overall"] for m in modes.values()]),
            "reason_rate": interval([m["reason_rate"] for m in modes.values()]),
            "tokens_per_query": interval([m["tokens_per_query"] for m in modes.values()]),
            "datasets": {
                name: interval([m["datasets"][name] for m in modes.values()])
                for name in next(iter(modes.values()))["datasets"]
            },
            "full_minus": paired(full, [modes[seed]["overall"] for seed in shared]),
        }
    write_json(os.path.join(out, "study.json"), study)
    with open(os.path.join(out, "study.md"), "w", encoding="utf-8") as f:
        f.write(page(study))


def show(value, digits=3):
    """(mean, half) -> "0.966 ± 0.009"."""
    mean, half = value
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def page(study):
    """Markdown: every variant beside the full method, then every family."""
    lines = [
        "# Does every part earn its place?",
        "",
        "Mean ± half the 95 % interval over seeds. `full, MODE` are the full method's own weights,",
        "used otherwise; the other rows were trained for what they do. p is not corrected.",
        "",
        "| variant | seeds | overall | reason rate | tokens / query | full − it | p |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for label, row in study.items():
        difference, p = "", ""
        if label != "full":
            difference = show((row["full_minus"]["diff"], row["full_minus"]["half"]))
            p = "" if row["full_minus"]["p"] is None else f"{row['full_minus']['p']:.3f}"
        cells = [
            label,
            str(len(row["seeds"])),
            show(row["overall"]),
            show(row["reason_rate"], 2),
            show(row["tokens_per_query"], 1),
            difference,
            p,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    variants = [label for label in study if not label.startswith("full,")]
    lines += ["", f"| family | {' | '.join(variants)} |", "| --- |" + " --: |" * len(variants)]
    for family in study["full"]["datasets"]:
        scores = [f"{study[label]['datasets'][family][0]:.2f}" for label in variants]
        lines.append(f"| {family} | {' | '.join(scores)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder of the study")
    parser.add_argument("--seeds", type=int, default=5, help="1 ... so many")
    parser.add_argument("--variants", help="only these, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="see train.py")
    parser.add_argument("--only_summarise", action="store_true", help="tables of what is there")
    args = parser.parse_args()
    names = args.variants.split(",") if args.variants else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            parser.error(f"--variants {name}: there are {', '.join(VARIANTS)}")
    try:
        cfg = train.parse([f"--scale={args.scale}"])
        for seed in range(1, 0 if args.only_summarise else args.seeds + 1):
            for name in names:
                run_variant(cfg, name, seed, args.out)
        summarise(args.out)
    except (train.UsageError, ValueError, OSError) as e:
        sys.exit(f"study.py: {e}")
    print(json.dumps({"written": os.path.join(args.out, "study.md")}))


if __name__ == "__main__":
    main()
