"""
What a finished study says: does thinking when needed pay, does every part of the method earn its place, and are the rationales read at all?

train.py --stage study runs the variants (its table VARIANTS) and leaves one run folder per seed and variant; this file, apart because nothing
here trains, does the statistics, the tables and the picture, and puts the trained model itself to the counterfactual test.

The maths. Over n seeds a figure is its mean ± t(0.975, n − 1)·s/√n. A variant is compared with the full method seed by seed, since both share data,
base and proposals: paired t of the n differences, two-sided, not corrected for the number of variants. Student's t is summed in closed form.
    m(q, r) = log softmax_c( e(q, r)·e(c) / temperature )[the target] over the query's own test candidates;   gain = m(q, its own rationale) − m(q, ∅)
    false-helpful (SURE): the rationale raises the cosine to the target and yet lowers m, because it raises the others more

How to run:
    python study.py runs/pocket/study [--readme README.md]        tables anew; also between <!-- study --> and <!-- /study --> of that file

Left out: corrections for multiple comparisons, tests that assume nothing of the differences (five seeds cannot carry them: sign test p >= 0.06).
"""

import argparse
import glob
import json
import math
import os
import sys

import numpy as np
import torch

import data
import eval as evaluation
from eval import table
from embed import collate, pool
from model import read_json

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def t_inside(t, df):
    """P(|T| <= t) of Student's t with df degrees of freedom (an integer), t >= 0: the finite sums in θ = atan(t/√df)."""
    angle = math.atan(t / math.sqrt(df))
    c, odd = math.cos(angle), df % 2
    term, total = (c if odd else 1.0), 0.0
    for k in range(1, (df - odd) // 2 + 1):
        total += term
        term *= c * c * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_quantile(df, inside=0.95):
    """The t with P(|T| <= t) = inside, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < inside else (low, middle)
    return high


def interval(values):
    """-> mean and half the 95 % interval (None for fewer than two values); values that are None are left out."""
    x = [v for v in values if v is not None]
    if not x:
        return None, None
    return float(np.mean(x)), float(t_quantile(len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None


def paired(a, b):
    """Figures of two variants under the same seeds -> {"diff" (a − b), "half", "t", "p", "n"}; t and p: None where they do not vary."""
    d = np.asarray(a, float) - np.asarray(b, float)
    diff, half = interval(d.tolist())
    spread = np.std(d, ddof=1) / math.sqrt(len(d)) if len(d) > 1 else 0.0
    t = float(diff / spread) if spread > 1e-12 else None
    return dict(diff=diff, half=half, t=t, p=None if t is None else 1 - t_inside(abs(t), len(d) - 1), n=len(d))


# ---------------------------------------------------------------------------------------------------------------------
# The trained model under its own rationale, and under others

WORDS = ("direct", "own", "empty", "shuffled", "other")          # columns: what is written between <think> and </think>; direct: no <think> at all


@torch.no_grad()
def vectors_after(embedder, queries, texts, batch_size):
    """Unit vectors (n, 1 + k, H) of queries: direct, and after each of the k rationales in texts[i]."""
    reader, out = embedder.reader, []
    for at in range(0, len(queries), batch_size):
        prompts = [reader.read(q) for q in queries[at : at + batch_size]]
        batch = collate(prompts, reader, [[reader.rationale(t) for t in row] for row in texts[at : at + batch_size]], embedder.model.device)
        out.append(pool(embedder.model(batch), batch["ends"]).cpu().numpy())
    return np.concatenate(out)


def probe(es, embedder, rng, temperature, max_new, batch_size):
    """One test set -> {"p" (n,), "gain" (n,), "rises" (n,), "score", "to_direct", "to_own" (n, 5)}: the columns are WORDS."""
    targets = embedder.encode(es.candidates, reason="never", batch_size=batch_size)
    _, infos = embedder.encode(es.queries, reason="always", batch_size=batch_size, max_new_tokens=max_new, return_info=True)
    own, texts = [info["rationale"] for info in infos], []
    for i, text in enumerate(own):                               # another query's: one with another answer, where there is one
        order = [j for j in rng.permutation(len(own)).tolist() if j != i] or [i]
        other = min(order, key=lambda j: set(es.positives[j]) == set(es.positives[i]))
        texts.append([text, "", " ".join(rng.permutation(text.split()).tolist()), own[other]])
    v = vectors_after(embedder, es.queries, texts, batch_size)                                # (n, 5, H)
    score, grades, metric = [], es.grades or [None] * len(own), evaluation.KEYS.index(es.metric)
    for k in range(len(WORDS)):
        ranked = evaluation.rank(v[:, k], targets, es.positives, es.grades, es.local)
        score.append([evaluation.score_ranks(r, g)[metric] for r, g in zip(ranked.worst, grades)])
    m, positive = [], []
    for i, right in enumerate(es.positives):
        among = np.unique(es.local[i]) if es.local is not None else np.arange(len(targets))
        rows = [right[0], *among[~np.isin(among, right)]]
        s = targets[rows] @ v[i].T                                                            # (c, 5); below: embed.margin_score of each column
        m.append(torch.from_numpy(s / temperature).log_softmax(0)[0].numpy()), positive.append(s[0])
    m, positive = np.array(m), np.array(positive)
    return dict(p=np.array([info["p_reason"] for info in infos]), gain=m[:, 1] - m[:, 0], rises=positive[:, 1] > positive[:, 0],
                score=np.array(score).T, to_direct=np.einsum("nkh,nh->nk", v, v[:, 0]), to_own=np.einsum("nkh,nh->nk", v, v[:, 1]))


def analyse(embedder, root, rng, tau=0.5, temperature=0.02, max_new=48, batch_size=64):
    """-> {"families": {name: figures}, "calibration": [{"p", "n", "gain", "pays"} per tenth of p_reason]}."""
    found = {}
    for row in data.tables(root, "eval"):
        es = data.load_eval(root, row)
        found[es.name] = probe(es, embedder, rng, temperature, max_new, batch_size)
    families = {}
    for name, f in found.items():
        score, direct, own = (dict(zip(WORDS, f[k].mean(0).tolist())) for k in ("score", "to_direct", "to_own"))
        families[name] = {"reason_rate": float((f["p"] > tau).mean()), "gain": float(f["gain"].mean()),
                          "false_helpful": float((f["rises"] & (f["gain"] < 0)).mean()), **{f"score {w}": x for w, x in score.items()},
                          **{f"{w} ~ direct": x for w, x in direct.items()}, **{f"{w} ~ own": x for w, x in own.items()}}
    p, gain = (np.concatenate([f[k] for f in found.values()]) for k in ("p", "gain"))
    tenth, bins = np.minimum((p * 10).astype(int), 9), []
    for b in range(10):
        mine = tenth == b
        mean = lambda x: float(x[mine].mean()) if mine.any() else None
        bins.append(dict(p=mean(p), n=int(mine.sum()), gain=mean(gain), pays=mean(gain > 0)))
    return dict(families=families, calibration=bins)


# ---------------------------------------------------------------------------------------------------------------------
# From run folders to figures

FIGURES = ("overall", "steps", "one_look", "reason_rate", "tokens", "ms", "precision", "recall", "seconds")


read = lambda *path: read_json(os.path.join(*path))


def figures(modes, mode, steps, **more):
    """One mode of a report -> what the tables show of it; steps: the datasets that need steps."""
    m = modes[mode]
    mean = lambda yes: float(np.mean(x)) if (x := [score for name, score in m["datasets"].items() if (name in steps) == yes]) else None
    return dict(dict.fromkeys(FIGURES), overall=m["overall"], steps=mean(True), one_look=mean(False), reason_rate=m["reason_rate"],
                tokens=m["tokens_per_query"], ms=m["ms_per_query"], datasets=m["datasets"], **more)


def decided(run, think):
    """A report's mode for another decision: think(dataset, row of eval/*/*_queries.jsonl) -> bool. Nothing is embedded anew, for a row holds the
    query's scores and tokens when it was forced either way."""
    scores, tokens, thinks = {}, [], []
    for path in sorted(glob.glob(os.path.join(run, "eval", "*", "*_queries.jsonl"))):
        name = os.path.basename(path).removesuffix("_queries.jsonl")
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        yes = [bool(think(name, row)) for row in rows]
        scores[name] = float(np.mean([row["always" if y else "never"] for y, row in zip(yes, rows)]))
        tokens += [y * row["new_tokens"] for y, row in zip(yes, rows)]
        thinks += yes
    return dict(overall=float(np.mean(list(scores.values()))), reason_rate=float(np.mean(thinks)), tokens_per_query=float(np.mean(tokens)),
                ms_per_query=None, datasets=scores)


METHODS = {"full": "always", "erring": "always_erring", "erring_tries": "always_erring_tries"}              # and who always thinks, by the same workers
AIMS = {"always": 0.6, "oracle": 1.15, "decision": 0.8}          # a method's tokens: at most so many times those of; its way from a coin to hindsight


def dial(reports, seed, tau):
    """{seed: report} -> the least tau, from the run's own on, at which the OTHER seeds' runs keep the aim beside the oracle, so that no run chooses by
    its own test; None for one seed alone."""
    others = [r for s, r in reports.items() if s != seed]
    most = AIMS["oracle"] * sum(r["modes"]["oracle"]["tokens_per_query"] for r in others)
    for points in zip(*(r["curve"] for r in others)):            # one tau, a point of each curve
        if points[0]["tau"] >= tau and sum(p["tokens_per_query"] for p in points) <= most:
            return points[0]["tau"]


def thinned(modes, tokens):
    """A report's mode for a model that thinks always, made to cost no more than so many tokens per query: a coin decides where it thinks."""
    never, always, share = modes["never"], modes["always"], min(1.0, tokens / modes["always"]["tokens_per_query"])
    mix = lambda a, b: (1 - share) * a + share * b
    return dict({k: mix(never[k], always[k]) for k in ("overall", "tokens_per_query", "ms_per_query")}, reason_rate=share,
                datasets={n: mix(x, always["datasets"][n]) for n, x in never["datasets"].items()})


def collect(folder):
    """The study's folder -> ({variant: {seed: figures}}, the datasets that need steps, {variant: [datasets left out]}). A colon in a name: measured
    elsewhere than on the ordinary test sets; a comma: the same weights, used otherwise."""
    rows, steps, left_out, dear, runs = {}, [], {}, {}, {name: {} for name in METHODS}
    for report in sorted(glob.glob(os.path.join(folder, "seed*", "*", "report.json"))):
        run = os.path.dirname(report)
        name, report, config, steps = os.path.basename(run), read(report), read(run, "config.json"), read(run, "data", "pocket.json")["steps"]
        put = lambda label, modes, mode, **more: rows.setdefault(label, {}).update({config["seed"]: figures(modes, mode, steps, **more)})
        choice = {k: report["selection"][k] for k in ("precision", "recall") if not config["embed_workers"]}
        reasons = {n: d["reason_rate"] for n, d in read(run, "eval", "summary.json")["datasets"].items()}
        coin, best = (report["modes"][mode] for mode in ("random", "oracle"))
        own = dict(coin=coin["overall"], best=best["overall"], best_tokens=best["tokens_per_query"])
        put(name, report["modes"], "adaptive", seconds=sum(report["seconds"].values()), reasons=reasons, own=own, **choice)
        if name == "full":
            for label, mode in (("full, never", "never"), ("full, always", "always"), ("random", "random"), ("oracle", "oracle")):
                put(label, report["modes"], mode)
            put("full, told", {"": decided(run, lambda dataset, _: dataset in steps)}, "")     # unlike the oracle it foresees no luck
        if name in METHODS:
            runs[name][config["seed"]] = run, report, config["tau"]
        places = {os.path.basename(os.path.dirname(p)): read(p)["modes"] for p in glob.glob(os.path.join(run, "*", "summary.json"))}
        for where, modes in places.items():                      # where the documents reason, those that do not belong beside them
            where = where if where != "eval" else "direct_documents" if "reasoned_documents" in places else None
            for mode in ("never", "always", "adaptive") if where else ():
                put(f"{where}: {name}, {mode}", modes, mode)
        if name == "always":
            dear[config["seed"]] = report["modes"]
        if config["leave_out"]:
            left_out[name] = config["leave_out"].split(",")
    if "full" not in rows:
        raise ValueError(f"{folder}: no finished run of the full method in seed*/full")
    also = lambda label, seed, mode, **more: rows.setdefault(label, {}).update({seed: figures({"": mode}, "", steps, **more)})
    for name, seed, (run, _, tau) in [(name, *x) for name, of in runs.items() for x in of.items()]:
        if (at := dial({s: r for s, (_, r, _) in runs[name].items()}, seed, tau)) is not None:
            also(f"{name}, dial", seed, decided(run, lambda _, row: row["p_reason"] > at), tau=at)
    for seed in sorted(set(dear) & set(rows["full"])):
        also("always_thinned", seed, thinned(dear[seed], rows["full"][seed]["tokens"]))
    return rows, steps, left_out


def gather(folder):
    """-> study.json's content: per variant its figures by seed, their intervals, and the paired test against the full method; "beside": more such
    pairs, a minus b."""
    rows, steps, left_out = collect(folder)
    out = {}

    def minus(a, b):
        same = sorted(set(rows.get(a, ())) & set(rows.get(b, ())))
        return paired(*([rows[n][s]["overall"] for s in same] for n in (a, b))) if same else None

    for name, of in rows.items():
        spread = {k: interval([r[k] for r in of.values()]) for k in FIGURES}
        out[name] = dict(seeds=of, mean={k: v[0] for k, v in spread.items()}, half={k: v[1] for k, v in spread.items()},
                         datasets={n: interval([r["datasets"][n] for r in of.values()]) for n in next(iter(of.values()))["datasets"]},
                         full_minus=minus("full", name))
    asked = [("full", "always_thinned"), *((a, b) for m, always in METHODS.items() for a, b in ((m, "never"), (m, always), (f"{m}, dial", always)))]
    asked += [("erring", f"erring_{part}") for part in ("supervised", "one_loss", "unsure")]               # which parts matter where labels are few
    beside = [dict(test, a=a, b=b) for a, b in asked if (test := minus(a, b))]
    return dict(seeds=sorted(rows["full"]), beside=beside, steps=steps, left_out=left_out, variants=dict(sorted(out.items(), key=lambda x: x[0] != "full")))


# ---------------------------------------------------------------------------------------------------------------------
# From figures to words

show = lambda x, half=None, digits=3, sign="": "–" if x is None else f"{x:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def plain(found):
    """The variants on the ordinary test sets: those without a colon."""
    return {name: v for name, v in found["variants"].items() if ":" not in name}


def main_table(found):
    """The table of the README: every variant beside the full method."""
    rows = []
    for name, v in plain(found).items():
        mean, half, test = v["mean"], v["half"], v["full_minus"]
        by = [show(test["diff"], test["half"], sign="+"), show(test["p"]), test["n"]] if test else ["–"] * 3
        rows.append([name.replace("_", " "), show(mean["overall"], half["overall"]), show(mean["steps"]), show(mean["one_look"]),
                     show(mean["reason_rate"], digits=2), show(mean["tokens"], half["tokens"], 1), show(mean["ms"], digits=1),
                     *([""] * 3 if name == "full" else by), show(mean["precision"], digits=2), show(mean["recall"], digits=2)])
    return table(["variant", "overall", "need steps", "one look", "reason rate", "tokens / query", "ms / query", "full − it", "p", "n",
                  "precision", "recall"], rows)


def spending(v, name, used):
    """What the method `name`, used in one way (its row `used`), spends and how well it decides, beside its aims: on the mean and seed by seed -> a sentence."""
    of, always = v[used]["seeds"], v[METHODS[name]]["seeds"] if METHODS[name] in v else {}
    own, said = {s: v[name]["seeds"][s]["own"] for s in of}, []

    def held(pairs, aim, least, what):
        """pairs: a numerator and a denominator for each seed."""
        pairs, ok = [x for x in pairs if x[1] > 0], lambda x: x >= aim if least else x <= aim
        if pairs:
            x, each = sum(a for a, _ in pairs) / sum(b for _, b in pairs), sum(ok(a / b) for a, b in pairs)
            said.append(f"{what(x)} (aim: at {'least' if least else 'most'} {aim}; {'met' if ok(x) else 'missed'}, in {each} of {len(pairs)} seeds)")

    if not any(r["tokens"] for r in of.values()):
        return f"{used.capitalize()}: no tokens, it never reasoned."
    held([(of[s]["tokens"], always[s]["tokens"]) for s in of if s in always], AIMS["always"], False, lambda x: f"{x:.3f} times the tokens of always")
    held([(of[s]["tokens"], own[s]["best_tokens"]) for s in of], AIMS["oracle"], False, lambda x: f"{x:.3f} times the oracle's")
    held([(of[s]["overall"] - own[s]["coin"], own[s]["best"] - own[s]["coin"]) for s in of], AIMS["decision"], True,
         lambda x: f"{x:.0%} of the way from a coin to hindsight")
    return f"{used.capitalize()}: " + (", ".join(said) or "nothing to compare it with") + "."


def verdict(found):
    """The study's question answered in sentences, whichever way the numbers fall."""
    v, out = plain(found), []
    sign = lambda d: 0 if d["half"] is None or abs(d["diff"]) <= d["half"] else math.copysign(1, d["diff"])
    for d in found["beside"]:
        sure = {1: ", the interval above zero", -1: ", the interval below zero", 0: ", within noise" if d["half"] is not None else ""}[sign(d)]
        out.append(f"{d['a'].capitalize()} minus {d['b']}: {show(d['diff'], d['half'], sign='+')} over {d['n']} seed{'s' * (d['n'] > 1)}{sure}.")
    for name in METHODS:
        out += [spending(v, name, used) for used in (name, f"{name}, dial") if used in v]
    if v["oracle"]["mean"]["tokens"]:
        ratio = v["full, told"]["mean"]["tokens"] / v["oracle"]["mean"]["tokens"]
        out.append(f"Told which families need steps, and foreseeing no luck, full would spend {ratio:.3f} times the oracle's tokens.")
    taus = [r["tau"] for name in METHODS for r in v.get(f"{name}, dial", {"seeds": {}})["seeds"].values()]
    if taus:
        out.append(f"Dial: tau from {min(taus):g} to {max(taus):g}, what the other seeds need to spend {AIMS['oracle']} times their oracles' tokens.")
    apart = lambda n: n in ("full", "oracle", "random") or "," in n or "erring" in n                       # no ablations of the full method
    rivals = {n: sign(x["full_minus"]) for n, x in v.items() if not apart(n) and x["full_minus"]}
    better, worse = (", ".join(n for n, s in rivals.items() if s == w) or "none" for w in (-1, 1))
    return [line.replace("_", " ") for line in [*out, f"Ablations of full, beyond noise better: {better}; worse: {worse}."]]


def family_table(found):
    full, v = found["variants"]["full"], plain(found)
    rows = [[d + (" (steps)" if d in found["steps"] else ""), *(show(*x["datasets"][d], digits=2) for x in v.values()),
             show(float(np.mean([r["reasons"][d] for r in full["seeds"].values()])), digits=2)] for d in full["datasets"]]
    return table(["family", *(n.replace("_", " ") for n in v), "full reasons"], rows)


def elsewhere_table(found):
    """Other worlds, and the four combinations of sides: rows of the names with a colon."""
    rows = [[*name.replace("_", " ").split(": "), *(show(v["mean"][k], v["half"][k]) for k in ("overall", "steps", "one_look")),
             show(v["mean"]["reason_rate"], digits=2), show(v["mean"]["tokens"], digits=1)]
            for name, v in sorted(found["variants"].items()) if ":" in name]
    return table(["where", "variant, mode", "overall", "need steps", "one look", "reason rate", "tokens / query"], rows)


def left_out_table(found):
    mean = lambda n, d, key: show(*interval([r[key][d] for r in found["variants"][n]["seeds"].values()]))
    return table(["variant", "family", "score", "reason rate", "full", "full reasons"], [
        [name.replace("_", " "), d, mean(name, d, "datasets"), mean(name, d, "reasons"), mean("full", d, "datasets"), mean("full", d, "reasons")]
        for name, of in found["left_out"].items() for d in of])


SHOWN = ("reason_rate", "gain", "false_helpful", *(f"score {w}" for w in WORDS), "own ~ direct", "empty ~ direct", "shuffled ~ own", "other ~ own")


def analysis_tables(parts):
    """analysis.json of each seed -> means over seeds: per family, and the calibration (weighted by the number of queries)."""
    names = list(parts[0]["families"])
    x = np.array([[[p["families"][n][k] for k in SHOWN] for n in names] for p in parts]).mean(0)                       # (families, columns)
    rows = [[n, *(show(v, digits=2) for v in row)] for n, row in zip([*names, "mean"], [*x, x.mean(0)])]
    bins = []
    for b in range(10):
        mine = [p["calibration"][b] for p in parts if p["calibration"][b]["n"]]
        mean = lambda k: float(np.average([x[k] for x in mine], weights=[x["n"] for x in mine])) if mine else None
        bins.append([f"{b / 10:.1f} … {(b + 1) / 10:.1f}", sum(x["n"] for x in mine), *(show(mean(k), digits=2) for k in ("p", "gain", "pays"))])
    return (table(["family", *(k.replace("_", " ") for k in SHOWN)], rows),
            table(["p_reason", "queries", "mean p", "mean gain", "share with gain > 0"], bins))


def draw(found, path):
    """Every variant's quality and tokens with their intervals, the best on top."""
    import matplotlib.style
    from matplotlib.figure import Figure
    rows = sorted(plain(found).items(), key=lambda x: x[1]["mean"]["overall"])
    with matplotlib.style.context(["default", evaluation.STYLE]):
        fig = Figure((9, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for ax, key, what in zip(axes, ("overall", "tokens"), ("mean quality", "generated tokens per query")):
            for y, (name, v) in enumerate(rows):
                plays = "adaptive" if name in METHODS else "always" if name.startswith("always") else name.removeprefix("full, ")
                colour = evaluation.COLOURS.get(plays, "#8a5a9e")
                mark = "s" if "," in name or name in ("random", "oracle") else "o"
                ax.errorbar(v["mean"][key], y, xerr=v["half"][key], fmt=mark, color=colour, ms=9 if name == "full" else 6, capsize=3, lw=1)
            ax.axvline(found["variants"]["full"]["mean"][key], color=evaluation.COLOURS["adaptive"], lw=0.8, ls=":")
            ax.grid(axis="y", lw=0.3)
            ax.set(xlabel=what, yticks=range(len(rows)), yticklabels=[name.replace("_", " ") for name, _ in rows])
        fig.suptitle(f"Mean and 95 % interval over {len(found['seeds'])} seeds; squares: the same weights, used otherwise")
        fig.savefig(path)


def summarise(folder):
    """study.json, analysis.json, study.md and study.png of the runs that are finished; prints the verdict -> study.json's content."""
    found = gather(folder)
    says, paths = verdict(found), sorted(glob.glob(os.path.join(folder, "seed*", "full", "analysis.json")))
    evaluation.write(os.path.join(folder, "study.json"), found)
    draw(found, os.path.join(folder, "study.png"))
    parts = ["# Does thinking when needed pay?", "\n".join(f"* {s}" for s in says), f"Seeds {', '.join(map(str, found['seeds']))}. ± is half the 95 % t-interval over seeds; "
             "p is of the paired t-test against full over n seeds, two-sided, uncorrected. Overall: mean over families. "
             "random: a coin at full's reason rate. oracle: with hindsight the better of never and always. "
             "always thinned: the always model, a coin thinning its thoughts out to full's tokens. "
             "'full, never', 'full, always': the full method's weights, forced; 'full, told': forced to "
             "reason on the families that need steps and on no other; dial: at the tau that the other seeds need to spend "
             f"{AIMS['oracle']} times the oracle's tokens. erring: the best worker errs, one statement in ten, and writes sloppy's text then; "
             "tries: it and the base model write four rationales for each pair. unsure: a pair that fails directly and of which nothing was kept does not train the decision.",
             "![quality and tokens](study.png)", main_table(found), "## Families", family_table(found)]
    if any(":" in name for name in found["variants"]):
        parts += ["## Other worlds, and who reasons", "hard: longer paths and sums than in training. night: light on dark, never drawn in training. "
                  "direct_documents, reasoned_documents: the variant both sides, whose targets learnt to reason offline.", elsewhere_table(found)]
    if found["left_out"]:
        parts += ["## A family that was never trained on", left_out_table(found)]
    if paths:
        each = {os.path.basename(os.path.dirname(os.path.dirname(p))): read(p) for p in paths}
        evaluation.write(os.path.join(folder, "analysis.json"), each)
        families, calibration = analysis_tables(list(each.values()))
        parts += ["## What the counterfactual says of the trained model", "Score: the family's metric, the query embedded directly or after "
                  "its own, an empty, a shuffled or another query's rationale. a ~ b: cosine of two such vectors. gain: m(q, own) − m(q, ∅).",
                  families, calibration]
    with open(os.path.join(folder, "study.md"), "w", encoding="utf-8") as f:
        f.write("\n\n".join(parts) + "\n")
    print("\n".join([*says, f"written: {os.path.join(folder, 'study.md')}"]))
    return found


def main():
    ap = argparse.ArgumentParser(description="Tables and picture of a study that train.py --stage study has run.")
    ap.add_argument("folder", help="the folder that holds seed1/, seed2/, ...")
    ap.add_argument("--readme", metavar="FILE", help="also put the main table between its <!-- study --> marks")
    a = ap.parse_args()
    try:
        found = summarise(a.folder)
        if a.readme:
            evaluation.into_readme(a.readme, "study", "\n\n".join([main_table(found), "\n".join(f"* {s}" for s in verdict(found))]))
    except (ValueError, OSError) as e:
        sys.exit(f"study.py: {e}")


if __name__ == "__main__":
    main()
