"""
The ruler: MMEB-V2's 26 numbers per dataset, honest about ties, and every mode of reasoning beside its cost.

The idea. A test set is queries, candidates and the right ones among them. Every distinct item is embedded once, candidates are ranked by the dot
product of unit vectors, and a query is measured under two modes, never and always reasoning. All other modes follow without another run, since
rationales are greedy: adaptive(tau) takes a query's always-result if p_reason > tau and else its never-result; random tosses a coin with
adaptive's rate; oracle takes the better of the two with hindsight (direct on ties). Adaptive must beat never AND always; how far it lies from
random towards oracle is what the decision has learnt.

The maths. Rank of a positive p, pessimistic: 1 + #{wrong candidates with s >= s_p} + #{positives before it}; optimistic: the same with s > s_p.
A collapsed model so scores 0, not 100 % (upstream's argsort returns index 0, which is the answer in the 36 image sets). L = positives, k = 1, 5, 10:
    hit 1 if any rank <= k      precision |hits|/k      recall |hits|/|L| (1 if L is empty)      f1 their harmonic mean
    map Σ_hits precision@rank / min(|L|, k)             mrr 1/first rank <= k                     ndcg Σ_hits g/log2(rank+1) / the same of the ideal
with g = grade (linear) or 2^grade − 1 (exponential), grade 1 where there is none. Averages: a dataset = mean over its queries, a modality and
the overall = plain mean over datasets (not over modalities). The coin's expectation is exact: mean of many tosses = (1−rate)·never + rate·always.
Scores are float64 products rounded to 2^-25, the resolution of float32 below 1: equal vectors tie exactly, however the corpus is cut into chunks.

How to run:
    python eval.py --model runs/pocket/rl --data runs/pocket/data --out runs/pocket_eval --modes never,always,adaptive --max_new_tokens 48
    python eval.py --model Qwen/Qwen3-VL-Embedding-2B --data MMEB_V2_ROOT --out DIR --reason never --prompts qwen --frames 64 [--tasks CIRR,MSVD]
    python eval.py --bench [--out FILE.json]                          ranking 1,000 queries over 100,000 and 1,000,000 candidates
Writes DIR/<modality>/<dataset>_{score.json, pred.jsonl, queries.jsonl}, DIR/leaderboard.json, DIR/summary.json; vectors in DIR/cache, by content: a
run goes on where it stopped, and a changed model never meets old vectors. pictures() draws a finished run of train.py and writes its report.md.

Left out: ranking on a GPU (1,000 x 1,000,000 takes seconds without one), significance tests, more than the first 100 of a ranking in pred.jsonl.
Not followed: the reference pairs labels and grades wrongly where ids are strings and grades are mixed (a perfect ranking gets 0.855 there), and
counts a right answer that a ranking lists twice two times (its map and ndcg then exceed 1; here the repetition is left out).
"""

import argparse
import collections
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import resource            # peak memory, for the bench
import sys
import tempfile
import textwrap
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from data import BadData, Missing, Picture

KS = (1, 5, 10)
METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
KEYS = [f"{m}@{k}" for m in METRICS for k in KS]                  # the 24; num_pred and num_data make 26
MODALITIES = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}
RENAMED = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}     # as the leaderboard wants them
GRID = 2.0 ** 25


# ---------------------------------------------------------------------------------------------------------------------
# Metrics of one query

def score_ranks(ranks, grades=None):
    """Ranks of all positives (1 = first; inf = not ranked), their grades -> the 24 numbers in the order of KEYS."""
    ranks, grades = np.asarray(ranks, np.float64), np.ones(len(ranks)) if grades is None else np.asarray(grades, np.float64)
    order = np.argsort(ranks, kind="stable")
    ranks, grades, out = ranks[order], grades[order], []
    gains = {"ndcg_linear": grades, "ndcg_exponential": 2.0 ** grades - 1}
    for k in KS:
        n = int((ranks <= k).sum())                               # hits; they are the first n, in order
        hit, precision, recall = float(n > 0), n / k, n / len(ranks) if len(ranks) else 1.0
        row = {"hit": hit, "precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall) if n else 0.0,
               "map": (np.arange(1, n + 1) / ranks[:n]).sum() / min(len(ranks), k) if n else 0.0, "mrr": 1 / ranks[0] if n else 0.0}
        for name, gain in gains.items():
            best = np.sort(gain)[::-1][:k]
            ideal = (best / np.log2(np.arange(len(best)) + 2)).sum()
            row[name] = (gain[:n] / np.log2(ranks[:n] + 1)).sum() / ideal if ideal > 0 else 0.0
        out.append(row)
    return np.array([out[KS.index(k)][m] for m in METRICS for k in KS])


# ---------------------------------------------------------------------------------------------------------------------
# Ranking

Ranked = collections.namedtuple("Ranked", "worst best top")      # per query: its positives' ranks, pessimistic and optimistic; the first candidates


def finite(vectors, what, first=0):
    """NaN sorts anywhere: it is refused, and named."""
    if bad := np.flatnonzero(~np.isfinite(vectors).all(1)).tolist():
        raise ValueError(f"{what} {first + bad[0]} has a vector with NaN or inf ({len(bad)} such): not ranked")


def merge_top(top, scores, at, k):
    """Running (score, index) lists (n, <=k) and a chunk (n, c) whose columns start at `at` -> the k best of both."""
    if top[0].shape[1] < k:
        keep = min(k, scores.shape[1])
        new = np.argpartition(-scores, keep - 1, 1)[:, :keep]
        fresh = np.take_along_axis(scores, new, 1)
    else:                                            # few of a later chunk get in: look only at those above the k-th best so far
        rows, cols = np.nonzero(scores > top[0][:, -1:])
        width = np.bincount(rows, minlength=len(scores))
        new = np.zeros((len(scores), width.max(initial=0)), np.int64)
        new[rows, np.arange(len(rows)) - np.repeat(np.cumsum(width) - width, width)] = cols
        fresh = np.where(np.arange(new.shape[1]) < width[:, None], np.take_along_axis(scores, new, 1), -np.inf)
    score, index = np.concatenate([top[0], fresh], 1), np.concatenate([top[1], new + at], 1)
    order = np.lexsort((index, -score), axis=1)[:, :k]
    return np.take_along_axis(score, order, 1), np.take_along_axis(index, order, 1)


def assemble(own, right, grades, above, level, wrong, k):
    """A query's positives (candidate numbers), their scores and grades, how many wrong ones lie above / level with each, the best wrong ones
    -> (pessimistic ranks, optimistic ranks, the first k candidate numbers in the pessimistic order)."""
    grade = np.ones(len(own)) if grades is None else np.asarray(grades, np.float64)
    place, worst, best = np.arange(len(own)), np.empty(len(own), np.int64), np.empty(len(own), np.int64)
    pessimist, optimist = np.lexsort((place, grade, -right)), np.lexsort((place, -grade, -right))
    worst[pessimist] = 1 + (above + level)[pessimist] + place
    best[optimist] = 1 + above[optimist] + place
    slots, wrong = dict(zip((worst - 1).tolist(), own)), iter(wrong)         # positives at their ranks, the wrong ones fill what is left
    top = (slots[i] if i in slots else next(wrong, None) for i in range(k))
    return worst, best, [c for c in top if c is not None]


def rank(queries, candidates, positives, grades=None, local=None, topk=100, budget=1 << 23):
    """(n, d), (m, d) unit vectors and per query the indices of its positives -> Ranked. ValueError for NaN and for a query without positives.

    local: per query the candidate indices it is ranked among (a wrong one that is listed twice takes two places, as upstream), else all. At most
    `budget` scores exist at a time, so memory does not grow with the corpus and time is linear in it; candidates may be a memory-mapped array.
    """
    finite(queries, "query")
    if missing := [i for i, p in enumerate(positives) if not len(p)]:
        raise ValueError(f"query {missing[0]} has no positive")
    n, q, grades, out = len(queries), np.asarray(queries, np.float64), grades or [None] * len(queries), Ranked([], [], [])
    if local is not None:                            # every query has a small corpus of its own: its positives, then the wrong ones
        for at in range(0, len(candidates), 1 << 14):
            finite(candidates[at:at + (1 << 14)], "candidate", at)
        for i, (p, members) in enumerate(zip(positives, local)):
            own = [*p, *np.asarray(members)[~np.isin(members, p)].tolist()]
            one = rank(queries[i:i + 1], candidates[own], [np.arange(len(p))], [grades[i]], None, topk, budget)
            out.worst.extend(one.worst)
            out.best.extend(one.best)
            out.top.append([own[j] for j in one.top[0]])
        return out
    right = [np.rint(np.einsum("pd,d->p", np.asarray(candidates[np.asarray(p)], np.float64), v) * GRID) for p, v in zip(positives, q)]
    above, level = ([np.zeros(len(p), np.int64) for p in positives] for _ in range(2))
    flat = np.array([(c, i) for i, p in enumerate(positives) for c in p])                   # (candidate, query) of every positive, by candidate
    flat = flat[np.argsort(flat[:, 0], kind="stable")]
    chunk, top = max(1, min(len(candidates), budget // n)), (np.empty((n, 0)), np.empty((n, 0), np.int64))
    for at in range(0, len(candidates), chunk):
        block = np.asarray(candidates[at:at + chunk], np.float64)
        finite(block, "candidate", at)
        scores = q @ block.T
        np.rint(np.multiply(scores, GRID, out=scores), out=scores)
        lo, hi = np.searchsorted(flat[:, 0], (at, at + len(block)))
        scores[flat[lo:hi, 1], flat[lo:hi, 0] - at] = -np.inf                # positives are placed by assemble()
        for i, r in enumerate(right):
            above[i] += (scores[i] > r[:, None]).sum(1)
            level[i] += (scores[i] == r[:, None]).sum(1)
        top = merge_top(top, scores, at, min(topk, len(candidates)))
    for i, (score, index) in enumerate(zip(*top)):
        ranks = assemble(list(positives[i]), right[i], grades[i], above[i], level[i], index[score > -np.inf].tolist(), topk)
        for every, one in zip(out, ranks):
            every.append(one)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Vectors, each distinct item once, kept by content

def print_of(item):
    """A text that two items share exactly if the model would see the same: strings, and for pictures file, size and time of change."""
    def ref(r):
        if isinstance(r, Image.Image):
            return [r.mode, r.size, hashlib.sha256(r.tobytes()).hexdigest()]
        if isinstance(r, bytes):
            return hashlib.sha256(r).hexdigest()
        path = r.table if isinstance(r, Picture) else r
        stat = os.stat(path)
        return [path, stat.st_size, stat.st_mtime_ns] + ([r.row, r.column] if isinstance(r, Picture) else [])
    seen = {k: item[k] for k in ("text", "instruction") if k in item}
    return json.dumps([seen, isinstance(item.get("image"), list), [ref(r) for r in data.refs(item)], item.get("video", {}).get("fps")])


def identity(embedder):
    """What makes vectors comparable: the weights (its own .fingerprint, else a hash of every parameter) and every limit it reads with."""
    weights = getattr(embedder, "fingerprint", None)
    if weights is None:
        import torch
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(embedder.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        weights = digest.hexdigest()
    settings = {**vars(embedder), **vars(getattr(embedder, "reader", argparse.Namespace()))}
    return {"weights": weights, "settings": {k: v for k, v in settings.items() if isinstance(v, (int, float, str)) and k != "fingerprint"}}


class Cache:
    """DIR/cache/<hash>.npy and .json: vectors and infos of a list of items under one model, its limits and one reason mode."""

    def __init__(self, embedder, folder, batch_size, options):
        self.embedder, self.folder, self.batch_size, self.options, self.who = embedder, folder, batch_size, options, identity(embedder)
        os.makedirs(folder, exist_ok=True)

    def embed(self, items, name, reason, what, **options):
        """-> (vectors (n, d) float32, infos, ms per item). An item that cannot be read is named by name(its number)."""
        options, prints = {**self.options, **options}, [print_of(item) for item in items]
        first = {}
        for i, p in enumerate(prints):
            first.setdefault(p, i)
        distinct = [items[i] for i in first.values()]
        key = hashlib.sha256(json.dumps([self.who, reason, options, list(first)], sort_keys=True).encode()).hexdigest()[:24]
        path = os.path.join(self.folder, key)
        if not (os.path.exists(path + ".npy") and os.path.exists(path + ".json")):
            start = time.perf_counter()
            try:
                vectors, infos = self.embedder.encode(distinct, reason=reason, batch_size=self.batch_size, return_info=True, **options)
            except ValueError as e:                               # the Embedder's says which item
                raise BadData(f"{what}{f' {name(list(first.values())[e.index])}' if hasattr(e, 'index') else ''}: {e}") from e
            ms = 1000 * (time.perf_counter() - start) / len(distinct)
            vectors = np.asarray(vectors, np.float32)
            finite(vectors, f"{what}: item")
            np.save(path + ".part.npy", vectors)                  # a half-written file never has the final name
            os.replace(path + ".part.npy", path + ".npy")
            write(path + ".json", [{"ms": ms, "infos": infos}])      # one line: compact
        try:
            vectors = np.load(path + ".npy", mmap_mode="r")
            with open(path + ".json") as f:
                kept = json.load(f)
        except (ValueError, EOFError) as e:
            raise BadData(f"{path}.npy or .json is damaged ({e}): delete both") from None
        if len(vectors) != len(first) or len(kept["infos"]) != len(first):
            raise BadData(f"{path}.npy does not hold the {len(first)} vectors it should: delete it")
        at = dict(zip(first, range(len(first))))
        order = np.array([at[p] for p in prints])
        return vectors if len(order) == len(first) else vectors[order], [kept["infos"][i] for i in order], kept["ms"]


# ---------------------------------------------------------------------------------------------------------------------
# Modes

def mode_table(per_dataset, tau=0.5, taus=np.linspace(0, 1, 41)):
    """per_dataset[name] = {"modality", "never", "always", "p_reason", "tokens": arrays over queries, "ms_never", "ms_always": numbers}
    -> ({mode: {overall, image, video, visdoc, reason_rate, tokens_per_query, ms_per_query, datasets}}, [{tau, overall, ...}]).

    Scores: mean over datasets of the mean over queries. Costs: mean over all queries. A modality without a dataset is None.
    """
    names, d = list(per_dataset), {k: {f: np.asarray(v) if f != "modality" else v for f, v in row.items()} for k, row in per_dataset.items()}
    total = sum(len(d[name]["never"]) for name in names)

    def entry(share):
        """share[name]: per query the probability that it reasons (0 or 1, or the coin's)."""
        scores = {n: float(np.mean((1 - share[n]) * d[n]["never"] + share[n] * d[n]["always"])) for n in names}
        of = {m: [scores[n] for n in names if d[n]["modality"] == m] for m in MODALITIES}
        return {"overall": float(np.mean(list(scores.values()))), **{m: float(np.mean(v)) if v else None for m, v in of.items()},
                "reason_rate": float(sum(share[n].sum() for n in names) / total),
                "tokens_per_query": float(sum((share[n] * d[n]["tokens"]).sum() for n in names) / total),
                "ms_per_query": float(sum(((1 - share[n]) * d[n]["ms_never"] + share[n] * d[n]["ms_always"]).sum() for n in names) / total),
                "datasets": scores}

    fill = lambda x: {n: np.full(len(d[n]["never"]), float(x)) for n in names}
    at = lambda t: {n: (d[n]["p_reason"] > t).astype(np.float64) for n in names}
    modes = {"never": entry(fill(0)), "always": entry(fill(1)), "adaptive": entry(at(tau))}
    modes["random"] = entry(fill(modes["adaptive"]["reason_rate"]))
    modes["oracle"] = entry({n: (d[n]["always"] > d[n]["never"]).astype(np.float64) for n in names})
    shown = ("overall", "reason_rate", "tokens_per_query", "ms_per_query")
    curve = [{"tau": round(float(t), 6), **{k: v for k, v in entry(at(t)).items() if k in shown}} for t in taus]
    return modes, curve


def aggregate(metrics, rows=None):
    """{modality: {dataset: {26 keys} or "FILE_N/A"}} -> means over datasets, chosen by name; what is missing is named, never averaged away."""
    rows, out, every = rows or data.EVAL, {}, []
    families, missing = collections.defaultdict(list), []
    for modality, key in MODALITIES.items():
        here, of = [], metrics.get(modality) or {}
        for row in (r for r in rows if r.get("modality", "image") == modality):
            got = of.get(row["name"], of.get(RENAMED.get(row["name"]))) if isinstance(of, dict) else None
            if not isinstance(got, dict):
                missing.append(row["name"])
                continue
            if not np.isfinite(got[key]):
                raise ValueError(f"{row['name']}: {key} is {got[key]}")
            here.append(got[key])
            families[row.get("family", "own")].append(got[key])
        out[modality] = float(np.mean(here)) if here else None
        every += here
    return {"overall": float(np.mean(every)) if every else None, **out, "families": {k: float(np.mean(v)) for k, v in families.items()},
            "datasets": len(every), "missing": missing, "overall_missing_as_zero": sum(every) / len(rows) if rows else None}


# ---------------------------------------------------------------------------------------------------------------------
# The run

def measure(es, cache, modes, tau, targets="never"):
    """One EvalSet -> {mode: {"scores" (n, 24), "best" (n,), "top", "infos", "ms"}} for the modes that are embedded: never, always, adaptive."""
    met = lambda i: f"{es.cand_ids[i]} (first met at {es.cand_where[i]})"
    targets, _, _ = cache.embed(es.candidates, met, targets, f"{es.name} candidate")
    out = {}
    for mode in ("never", "always", "adaptive"):
        if mode not in modes or (mode == "adaptive" and {"never", "always"} <= set(modes)):
            continue
        how = {"reason": "auto", "tau": tau} if mode == "adaptive" else {"reason": mode}
        vectors, infos, ms = cache.embed(es.queries, es.query_ids.__getitem__, what=f"{es.name} query", **how)
        ranked, grades = rank(vectors, targets, es.positives, es.grades, es.local), es.grades or [None] * len(es.queries)
        out[mode] = {"scores": np.stack([score_ranks(r, g) for r, g in zip(ranked.worst, grades)]), "top": ranked.top, "infos": infos, "ms": ms,
                     "best": np.array([score_ranks(r, g)[KEYS.index(es.metric)] for r, g in zip(ranked.best, grades)])}
    if {"never", "always"} <= set(out) and "adaptive" in modes:
        never, always = out["never"], out["always"]
        yes = np.array([info["p_reason"] > tau for info in never["infos"]])
        out["adaptive"] = {"scores": np.where(yes[:, None], always["scores"], never["scores"]), "best": np.where(yes, always["best"], never["best"]),
                           "ms": (1 - yes.mean()) * never["ms"] + yes.mean() * always["ms"],
                           **{k: [(a if y else b) for y, a, b in zip(yes, always[k], never[k])] for k in ("top", "infos")}}
    return out


def write(path, value):
    """JSON, or one JSON a line for a list; complete or not at all."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        if isinstance(value, list):
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        else:
            json.dump(value, f, indent=4)
    os.replace(path + ".part", path)


def write_dataset(es, found, primary, out):
    """The dataset's three files; its 26 numbers are those of the primary mode."""
    folder, best, at = os.path.join(out, es.modality), found[primary], KEYS.index(es.metric)
    os.makedirs(folder, exist_ok=True)
    score = {**dict(zip(KEYS, best["scores"].mean(0).tolist())), "num_pred": len(es.queries), "num_data": len(es.queries)}
    name = lambda indices: [es.cand_ids[i] for i in indices]
    write(os.path.join(folder, f"{es.name}_pred.jsonl"), [
        {"prediction": name(top), "label": name(p), "rel_scores": es.grades[i] if es.grades else None}
        for i, (top, p) in enumerate(zip(best["top"], es.positives))])
    thought = found.get("always") or best
    write(os.path.join(folder, f"{es.name}_queries.jsonl"), [
        {"id": qid, "p_reason": best["infos"][i]["p_reason"], "reasoned": best["infos"][i]["reasoned"], "rationale": thought["infos"][i]["rationale"],
         "new_tokens": thought["infos"][i]["new_tokens"], "label": name(es.positives[i]),
         **{mode: float(m["scores"][i, at]) for mode, m in found.items()}, "top3": {mode: name(m["top"][i][:3]) for mode, m in found.items()}}
        for i, qid in enumerate(es.query_ids)])
    write(os.path.join(folder, f"{es.name}_score.json"), score)
    return score


def evaluate(embedder, root, out, tasks=None, modes=("never", "always", "adaptive"), tau=0.5, on_bad="stop", limit=None, page_labels="fixed",
             frames=None, prompts="vlm2vec", batch_size=16, metadata=None, options=None, targets="never"):
    """Every dataset of a root (or the tasks named) -> summary; also written, with the files named in the module's docstring.

    The score files hold adaptive where it is among the modes, else the first one. options go to encode() (dim, max_new_tokens, ...).
    targets: "always" lets the candidates reason too (offline: their tokens are not counted).
    """
    if not modes or set(modes) - {"never", "always", "adaptive"}:
        raise ValueError(f"modes are never, always, adaptive; got {modes}")
    every = data.tables(root, "eval")
    if not every:
        raise BadData(f"{root}: has no test set (test.jsonl, or \"eval\" rows in datasets.json)")
    rows, primary = data.wanted(every, tasks), "adaptive" if "adaptive" in modes else modes[0]
    cache = Cache(embedder, os.path.join(out, "cache"), batch_size, dict(options or {}))
    metrics, datasets, per, missing, broken = {m: {} for m in MODALITIES}, {}, {}, [], {}
    for row in tqdm(rows, desc="datasets", disable=None):
        try:
            es = data.load_eval(root, row, on_bad, limit, page_labels, frames, prompts)
            found = measure(es, cache, modes, tau, targets)
        except Missing:
            missing.append(row["name"])
            continue
        except BadData as e:
            if on_bad == "stop":
                raise
            broken[row["name"]] = str(e)
            continue
        score, at = write_dataset(es, found, primary, out), KEYS.index(es.metric)
        metrics[es.modality][es.name] = score
        mean = lambda key: float(np.mean([info[key] for info in found[primary]["infos"]]))
        datasets[es.name] = {"modality": es.modality, "metric": es.metric, "protocol": es.protocol, "queries": len(es.queries),
                             "candidates": len(es.candidates), "dropped": es.dropped, "bad": es.bad, "want": row["queries"],
                             "score": score[es.metric], "optimistic": float(found[primary]["best"].mean()), "reason_rate": mean("reasoned"),
                             "tokens_per_query": mean("new_tokens"), "ms_per_query": found[primary]["ms"],
                             "modes": {mode: float(m["scores"][:, at].mean()) for mode, m in found.items()}}
        if {"never", "always"} <= set(found):
            never, always = found["never"], found["always"]
            per[es.name] = {"modality": es.modality, "never": never["scores"][:, at], "always": always["scores"][:, at],
                            "p_reason": [i["p_reason"] for i in never["infos"]], "tokens": [i["new_tokens"] for i in always["infos"]],
                            "ms_never": never["ms"], "ms_always": always["ms"]}
    if not datasets:
        raise BadData(f"{root}: none of the {len(rows)} datasets could be evaluated; missing: {', '.join(missing[:5])} ... broken: {broken}")
    summary = {**aggregate(metrics, rows), "mode": primary, "tau": tau, "missing": missing, "broken": broken, "datasets": datasets}
    if per:
        summary["modes"], summary["curve"] = mode_table(per, tau)
    summary["setting"] = json.dumps([cache.who, primary, tau, limit, page_labels, frames, prompts, targets, cache.options], sort_keys=True)
    before = scored_before(out, summary["setting"])
    for row in every:                                            # by a call with other --tasks: the leaderboard's file has them, too
        path = os.path.join(out, row["modality"], f"{row['name']}_score.json")
        if row["name"] in before and row not in rows and os.path.exists(path):
            metrics[row["modality"]][row["name"]] = need(path, dict.items)
    summary["scored"] = sorted(name for of in metrics.values() for name in of)
    write(os.path.join(out, "summary.json"), summary)
    write(os.path.join(out, "leaderboard.json"), leaderboard(metrics, every, page_labels, metadata))
    return summary


def scored_before(out, setting):
    """Names of the datasets that are scored in this folder, if the same model under the same options has scored them."""
    path = os.path.join(out, "summary.json")
    old = need(path, dict.items) if os.path.exists(path) else {}
    return old["scored"] if old.get("setting") == setting else []


def leaderboard(metrics, rows, page_labels="fixed", metadata=None):
    """The file as the leaderboard takes it: a dataset that was not run is the string its own script writes there."""
    meta = dict.fromkeys(("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens", "model_release_date"))
    meta.update(data_source="Self-Reported", url=None, report_generated_date=datetime.datetime.now().isoformat())
    if unknown := sorted(set(metadata or {}) - set(meta)):
        raise ValueError(f"unknown metadata key {unknown[0]!r}; the leaderboard knows {', '.join(meta)}")
    table = {m: {RENAMED.get(r["name"], r["name"]) if page_labels == "fixed" else r["name"]:
                 of.get(r["name"], "FILE_N/A" if of else "DIR_N/A") for r in rows if r["modality"] == m} for m, of in metrics.items()}
    return {"metadata": {**meta, **(metadata or {})}, "metrics": table}


def bench(out, sizes=(100_000, 1_000_000), n=1000, d=256):
    """Time and memory of ranking n queries over corpora of these sizes, which lie in memory-mapped files."""
    rng, figures, took = np.random.default_rng(0), {}, []
    unit = lambda *shape: (x := rng.standard_normal(shape, np.float32)) / np.linalg.norm(x, axis=1, keepdims=True)
    queries, peak = unit(n, d), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        for m in sizes:
            corpus = np.lib.format.open_memmap(path := os.path.join(folder, f"{m}.npy"), "w+", np.float32, (m, d))
            for at in range(0, m, 50_000):
                corpus[at:at + 50_000] = unit(min(50_000, m - at), d)
            corpus.flush()
            del corpus                                            # a mapped page counts as resident, too
            before, start, cpu = data.resident(), time.perf_counter(), time.process_time()
            rank(queries, np.load(path, mmap_mode="r"), [[i] for i in range(n)])
            took.append(np.array([time.perf_counter() - start, time.process_time() - cpu]))
            figures |= {f"rank_{n}x{m}x{d}_s": round(took[-1][0], 1), f"rank_{n}x{m}x{d}_cpu_s": round(took[-1][1], 1),
                        f"before_{m}_mb": round(before), f"peak_{m}_mb": round(peak()), f"of_which_mapped_{m}_mb": round(m * d * 4 / 2**20)}
    figures |= {"corpus_ratio": sizes[-1] / sizes[0]} | dict(zip(("time_ratio", "cpu_time_ratio"), (took[-1] / took[0]).round(1).tolist()))
    data.record(figures, out)


def into_readme(path, mark, text):
    """Replace what stands between <!-- mark --> and <!-- /mark -->: the README's tables are written by the program that measured."""
    with open(path, encoding="utf-8") as f:
        before, opened, rest = f.read().partition(f"<!-- {mark} -->")
    _, closed, after = rest.partition(f"<!-- /{mark} -->")
    if not (opened and closed):
        raise ValueError(f"{path}: no <!-- {mark} --> … <!-- /{mark} -->")
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{before}{opened}\n{text}\n{closed}{after}")


def seeds_tables(found):
    """over_seeds' file -> markdown: the modes, the families that need steps, what was selected."""
    median, spread, sets = found["median"], found["spread"], found["datasets"]
    rows = ["| mode | overall | reason rate | tokens per query |", "| --- | --- | --- | --- |"]
    rows += [f"| {mode} | {m['overall']:.3f} ± {spread[mode]['overall']:.3f} | {m['reason_rate']:.2f} | {m['tokens_per_query']:.1f} |"
             for mode, m in median.items()]
    rows += ["", "| family that needs steps | never | always | adaptive |", "| --- | --- | --- | --- |"]
    rows += [f"| {n} | " + " | ".join(f"{sets[n][mode]:.2f}" for mode in ("never", "always", "adaptive")) + " |" for n in found["steps"]]
    never, always, adaptive, random, oracle = (median[m]["overall"] for m in ("never", "always", "adaptive", "random", "oracle"))
    tokens = {m: median[m]["tokens_per_query"] for m in median}
    picked = {k: float(np.median([p[k] for p in found["selection"]])) for k in ("precision", "recall", "placebo_accepted", "sloppy_kept")}
    runs = found["runs"]
    seeds, seconds = ", ".join(str(r["seed"]) for r in runs), ", ".join(f"{sum(r['seconds'].values()):.0f}" for r in runs)
    way = (adaptive - random) / (oracle - random)
    rows += ["", f"Medians over {len(runs)} seed{'s' * (len(runs) > 1)} ({seeds}), ± their standard deviation. "
             f"Adaptive − never {adaptive - never:+.3f}, adaptive − always {adaptive - always:+.3f}; "
             f"from the coin to hindsight {way:.0%} of the way; tokens {tokens['adaptive'] / tokens['always']:.0%} of always', "
             f"{tokens['adaptive'] / tokens['oracle']:.2f} times the oracle's. "
             f"Selection against the truth: precision {picked['precision']:.3f}, recall {picked['recall']:.3f}, "
             f"placebos accepted {picked['placebo_accepted']:.3f}, sloppy rationales kept {picked['sloppy_kept']:.3f}. Seconds per run: {seconds}."]
    return "\n".join(rows)


def over_seeds(folders, out, readme=None):
    """Several runs' report.json -> one file: per mode the median, mean and spread (sample standard deviation) of every number.

    Every number of the README's table stands in such a file; reports of different presets are refused. readme: see into_readme, mark "pocket".
    """
    read = lambda *path: json.loads(pathlib.Path(*path).read_text(encoding="utf-8"))
    reports, truth = [read(folder, "report.json") for folder in folders], os.path.join(folders[-1], "data", "pocket.json")
    steps = read(truth)["steps"] if os.path.exists(truth) else []
    if len({r["preset"] for r in reports}) > 1:
        raise ValueError(f"runs of different presets: {', '.join(sorted({r['preset'] for r in reports}))}")
    keys = ("overall", "image", "video", "visdoc", "reason_rate", "tokens_per_query", "ms_per_query")
    of = lambda f, mode, key: float(f([r["modes"][mode][key] for r in reports]))
    spread = lambda x: np.std(x, ddof=1) if len(x) > 1 else 0.0
    table = lambda f: {mode: {k: of(f, mode, k) for k in keys if reports[0]["modes"][mode][k] is not None} for mode in reports[0]["modes"]}
    datasets = {n: {mode: float(np.median([r["modes"][mode]["datasets"][n] for r in reports])) for mode in reports[0]["modes"]}
                for n in reports[0]["modes"]["never"]["datasets"]}
    picked = [{k: v for k, v in r["selection"].items() if not isinstance(v, dict)} for r in reports]
    found = {"runs": [{"seed": r["seed"], "seconds": r["seconds"]} for r in reports], "median": table(np.median), "mean": table(np.mean),
             "spread": table(spread), "steps": steps, "datasets": datasets, "selection": picked}
    write(out, found)
    print(f"written: {out}")
    if readme and not steps:
        raise ValueError(f"{truth} is missing: which families need steps is not known, and {readme} stays as it is")
    if readme:
        into_readme(readme, "pocket", seeds_tables(found))


def positive(text):
    if (n := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return n


def number(text):
    if not np.isfinite(x := float(text)):
        raise argparse.ArgumentTypeError(f"{text}: a number is wanted")
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id")
    parser.add_argument("--data", help="the root (python data.py --check ROOT says what is in it)")
    parser.add_argument("--out", help="where the results go (--runs, --bench: one JSON file)")
    parser.add_argument("--tasks", help="only these datasets, with commas")
    parser.add_argument("--reason", choices=["auto", "never", "always"], default="auto", help="how queries are embedded; targets are always direct")
    parser.add_argument("--modes", help="instead of --reason: never,always,adaptive (with never and always also random, oracle and the tau curve)")
    parser.add_argument("--tau", type=number, default=0.5, help="reason when p_reason > tau")
    parser.add_argument("--max_new_tokens", type=positive, default=128, help="of a rationale (128; a pocket run's own evaluation has 48)")
    parser.add_argument("--prompts", choices=["vlm2vec", "qwen"], default="vlm2vec")
    parser.add_argument("--frames", type=positive, help="frames per video, default 8 (Qwen3-VL-Embedding: 64)")
    parser.add_argument("--page_labels", choices=["fixed", "original"], default="fixed")
    parser.add_argument("--on_bad", choices=["stop", "skip"], default="stop")
    parser.add_argument("--limit", type=positive, help="so many queries per dataset, for a quick look")
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--dim", type=positive, help="Matryoshka: slice, then renormalise")
    parser.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="model_name, model_size, url, ... of leaderboard.json")
    parser.add_argument("--bench", action="store_true", help="measure the ranking")
    parser.add_argument("--runs", nargs="+", metavar="DIR", help="instead: put the reports of these run folders together in --out FILE")
    parser.add_argument("--readme", metavar="FILE", help="with --runs: also put the tables between FILE's <!-- pocket --> marks")
    args = parser.parse_args()
    if args.tasks == "" or not all("=" in m for m in args.metadata):
        parser.error("--tasks names no dataset" if args.tasks == "" else "--metadata: KEY=VALUE is wanted")
    if args.bench:
        return bench(args.out)
    if args.runs:
        return over_seeds(args.runs, args.out or parser.error("--runs wants --out FILE"), args.readme)
    if not (args.model and args.data and args.out):
        parser.error("--model, --data and --out are wanted")
    from embed import Embedder
    modes = tuple(args.modes.split(",")) if args.modes else ({"auto": "adaptive"}.get(args.reason, args.reason),)
    tasks = args.tasks.split(",") if args.tasks else None
    data.wanted(data.tables(args.data, "eval"), tasks)            # a wrong name or root is known before the model is loaded
    embedder = Embedder.from_pretrained(args.model)
    result = evaluate(embedder, args.data, args.out, tasks, modes, args.tau, args.on_bad, args.limit, args.page_labels, args.frames, args.prompts,
                      args.batch_size, {"model_name": os.path.basename(os.path.normpath(args.model)), **dict(m.split("=", 1) for m in args.metadata)},
                      {"max_new_tokens": args.max_new_tokens, **({"dim": args.dim} if args.dim else {})})
    for name, d in result["datasets"].items():
        print(f"{name}: {100 * d['score']:.2f} ({d['metric']}, optimistic {100 * d['optimistic']:.2f}, {d['queries']} queries, "
              f"{d['dropped']} dropped, {len(d['bad'])} complaints; {d['protocol']}; "
              f"reason rate {d['reason_rate']:.2f}, {d['tokens_per_query']:.1f} tokens, {d['ms_per_query']:.0f} ms a query)")
    for key in ("image", "video", "visdoc", "overall"):
        print(f"{key}: {100 * result[key]:.2f}" if result[key] is not None else f"{key}: none")
    print(f"mode: {result['mode']}\ndatasets: {len(result['datasets'])}\nmissing: {', '.join(result['missing']) or 'none'}\n"
          f"broken: {', '.join(result['broken']) or 'none'}")
    for mode, m in result.get("modes", {}).items():
        print(f"{mode}: {100 * m['overall']:.2f} at {m['tokens_per_query']:.1f} tokens, {m['ms_per_query']:.1f} ms a query, "
              f"reason rate {m['reason_rate']:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and the report: what a finished run of train.py looks like, drawn from the files that it left

COLOURS = {"never": "#0072B2", "always": "#D55E00", "adaptive": "#009E73", "random": "#707070", "oracle": "#000000"}      # told apart by all eyes
MARKERS = dict(zip(COLOURS, "sDoX*"))
STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "figure.dpi": 150, "axes.titlesize": 11, "axes.titleweight": "bold", "text.parse_math": False,
         "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9}
PANELS = {                                           # title: stages of metrics.jsonl, then field:colour
    "base: loss": "base loss:adaptive", "base: next-token accuracy": "base accuracy:adaptive text_accuracy:random",
    "base: accuracy, held-out skills": "base_skills mean:adaptive weakest:always", "select: loss of the evaluators": "select0,select1 loss:adaptive",
    "embed: losses": "embed nce_direct:never nce_reason:always lm:random", "embed: decision as selected": "embed decision_right:adaptive",
    "rl: reward": "rl reward_direct:never reward_reason:always reward:adaptive", "rl: tokens of a rationale": "rl tokens:always",
    "rl: when it reasons": "rl p_reason:adaptive reason_rate:random decision_right:oracle"}


def need(path, touch, lines=False):
    """A JSON file of the run (lines: one object a line), out of which touch(object) can take what is needed; else one ValueError that names it."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f] if lines else [json.load(f)]
        return rows if list(map(touch, rows)) and lines else rows[0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: missing or damaged, and the report needs it ({type(e).__name__}: {e})") from None


def noise_of(records):
    """{dataset: records of its queries} -> standard errors of adaptive minus never and adaptive minus always, paired query by query; as the overall
    is the plain mean over D datasets, its variance is Σ var_d / n_d over D²."""
    gaps = [np.array([[r["adaptive"] - r[other] for other in ("never", "always")] for r in rows]) for rows in records.values()]
    return np.sqrt(sum((gap.var(0, ddof=1) / len(gap) for gap in gaps if len(gap) > 1), np.zeros(2))) / len(gaps)


def verdict(modes, noise=(0, 0)):
    """What the numbers say, in sentences, whichever way they fall; the first is a title. Within two standard errors nothing is won or lost."""
    (never, always, a, coin, best), tokens = [[modes[k][field] for k in COLOURS] for field in ("overall", "tokens_per_query")]
    gaps, least = (a - never, a - always), [max(1e-9, 2 * float(error)) for error in noise]
    how = ["beats" if gap > sure else "loses to" if -gap > sure else "is level with" if sure > 1e-9 else "equals" for gap, sure in zip(gaps, least)]
    told = [f"{gap:+.3f}" + f" ± {sure:.3f}" * (sure > 1e-9) for gap, sure in zip(gaps, least)]
    spent = f", {tokens[2] / tokens[1]:.0%} of the {tokens[1]:.1f} that always takes" if tokens[1] else ""
    share = f"covers {(a - coin) / (best - coin):.0%} of the way from the coin to hindsight" if best > coin + 1e-9 else "had nothing to win"
    return [f"Adaptive reasoning {how[0]} never and {how[1] + ' ' if how[0] != how[1] else ''}always",
            f"Quality: adaptive {a:.3f}; never {never:.3f}, so {told[0]}; always {always:.3f}, so {told[1]}"
            + " (two standard errors over the queries)" * any(noise),
            f"Cost: {tokens[2]:.1f} generated tokens per query{spent}; it reasons about {modes['adaptive']['reason_rate']:.0%} of the queries",
            f"Decision: a coin tossed at the same rate gives {coin:.3f}, hindsight {best:.3f}; adaptive {share}"]


def label_points(ax, labels, points):
    """Write each (x, y, text, colour) near its place, where it hides no label, stays inside and covers few of the points (n, 2)."""
    ax.figure.draw_without_rendering()
    frame, at, taken = ax.get_window_extent(), ax.transData.transform, []
    ways = [(far, way) for far in (26, 50, 80, 120, 170) for way in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))]
    for x, y, text, colour in labels:
        note = ax.annotate(text, (x, y), (0, 0), textcoords="offset pixels", color=colour, ha="center", va="center", linespacing=1.2,
                           arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 7})
        half = super(type(note), note).get_window_extent().size / 2 + 5                            # of the text without its line to the point
        middles = np.array([at((x, y)) + (half + far) * way for far, way in ways])
        outside, path = ((middles - half < frame.min) | (middles + half > frame.max)).any(1), np.linspace(at((x, y)), middles, 20)
        hidden = sum((abs(middles - m) < half + h).all(1) + (abs(path - m) < h).all(2).any(0) for m, h in taken)
        covered = (abs(at(points) - middles[:, None]) < half).all(2).sum(1) + [far / 4 for far, _ in ways]
        taken.append((middles[np.argmin(covered + 1000 * (hidden + outside))], half))
        note.set_position(taken[-1][0] - at((x, y)))


def draw_tradeoff(figure, report, datasets, title):
    """Quality against generated tokens: the modes, the curve over tau, the coin's line; beside it the modalities."""
    modes, fig, same = report["modes"], figure(11, 5.2), {}
    ax, side = fig.subplots(1, 2, width_ratios=(3, 2))
    for mode in ("random", "oracle", "always", "never", "adaptive"):                               # those at one place share a label
        same.setdefault((round(modes[mode]["tokens_per_query"], 1), round(modes[mode]["overall"], 3)), []).append(mode)
    coin = np.linspace(*([modes[mode]["tokens_per_query"], modes[mode]["overall"]] for mode in ("never", "always")), 300)
    curve = [(c["tokens_per_query"], c["overall"]) for c in report["curve"]]
    ax.plot(*coin.T, "--", color=COLOURS["random"], lw=1.2)
    ax.plot(*zip(*curve), ".-", color=COLOURS["adaptive"], lw=1.2, ms=5, alpha=0.6)
    labels = [(*place, f"{' = '.join(who)}\n{place[1]:.3f}, {place[0]:.1f} tokens", COLOURS[who[-1]]) for place, who in same.items()]
    for place, who in same.items():
        ax.plot(*place, MARKERS[who[-1]], color=COLOURS[who[-1]], ms=15 if who[-1] == "oracle" else 9, mec="white")
    x, y = np.array([*same, *curve]).T
    right, room = x.max() or 1, max(0.2 * np.ptp(y), 0.01)
    ax.set(xlim=(-0.04 * right, 1.2 * right), ylim=(y.min() - room, y.max() + room), xlabel="generated tokens per query", ylabel="mean quality",
           title=f"{title}\n({len(datasets)} datasets, {sum(d['queries'] for d in datasets.values())} test queries; "
                 "one model, forced for never and always)")
    labels += [(*coin[220], "a coin at other rates", COLOURS["random"]),
               (0.25 * right, np.interp(0.25 * right, *np.array(curve[::-1]).T), "adaptive at other τ", COLOURS["adaptive"])]
    label_points(ax, labels, np.concatenate([list(same), coin, *(np.linspace(a, b, 40) for a, b in zip(curve, curve[1:]))]))
    kinds, count = [m for m in MODALITIES if modes["never"][m] is not None], collections.Counter(d["modality"] for d in datasets.values())
    for i, mode in enumerate(("never", "always", "adaptive", "oracle")):
        bars = side.barh(np.arange(len(kinds)) + 0.2 * (i - 1.5), [modes[mode][m] for m in kinds], 0.18, color=COLOURS[mode])
        side.bar_label(bars, [f"{mode} {modes[mode][m]:.2f}" for m in kinds], padding=3, color=COLOURS[mode], fontsize=9)
    side.set_yticks(range(len(kinds)), [f"{m}\ndatasets: {count[m]}\n{MODALITIES[m].replace('_linear', '')}" for m in kinds])
    side.set(xlim=(0, 1.35), ylim=(len(kinds) - 0.5, -0.5), xlabel="quality", title="By modality", xticks=np.arange(0, 1.1, 0.25))
    return fig


def draw_families(figure, report, datasets):
    """Every dataset under never, always and adaptive, sorted by what reasoning gains there; beside it how often the model chose to reason."""
    never, always, adaptive = scores = [report["modes"][mode]["datasets"] for mode in ("never", "always", "adaptive")]
    names = sorted(datasets, key=lambda name: (never[name] - always[name], -datasets[name]["reason_rate"], name))
    places, rates, fig = np.arange(len(names)), [datasets[n]["reason_rate"] for n in names], figure(11, 1.7 + 0.34 * len(names))
    ax, side = fig.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    ax.hlines(places, [never[n] for n in names], [always[n] for n in names], color="#c8c8c8", lw=4)
    for mode, score, shift in zip(COLOURS, scores, (-0.22, 0.22, 0)):                              # apart, so that none hides another
        ax.plot([score[n] for n in names], places + shift, MARKERS[mode], color=COLOURS[mode], ms=6, label=mode)
    ax.set_yticks(places, [f"{n} ({datasets[n]['modality']})" for n in names])
    ax.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.4, -0.6), xlabel="quality", title="Quality per dataset; those that gain most by reasoning on top")
    ax.grid(axis="y", color="#eeeeee", zorder=0)
    fig.legend(loc="outside lower center", ncols=3, fontsize=10)
    side.bar_label(side.barh(places, rates, 0.6, color=COLOURS["adaptive"], alpha=0.4), [f"{rate:.0%}" for rate in rates], padding=3, fontsize=9)
    side.set(xlim=(0, 1.25), xlabel="share of its queries", xticks=(0, 0.5, 1), xticklabels=("0%", "50%", "100%"), title="How often it reasons")
    return fig


def draw_training(figure, log):
    """What the stages logged: faint as it came, one batch each; bold the mean of the last five where there are many."""
    fig, rows = figure(11, 8.5), collections.defaultdict(list)
    for row in log:
        stage, values = row["stage"].replace(" ", "_"), [v for k, v in row.items() if k not in ("stage", "step")]
        row = {**row, "mean": float(np.mean(values)), "weakest": min(values)} if stage == "base_skills" else row
        rows[stage] = [r for r in rows[stage] if r["step"] < row["step"]] + [row]                  # a stage that began again replaces its rows
    for ax, (title, (stages, *fields)) in zip(fig.subplots(3, 3).flat, ((title, what.split()) for title, what in PANELS.items())):
        for stage, (field, mode) in ((stage, f.split(":")) for stage in stages.split(",") for f in fields):
            x, y = np.array([(r["step"], r[field]) for r in rows[stage] if field in r], np.float64).reshape(-1, 2).T
            bold, style = [y[max(0, i - 4):i + 1].mean() for i in range(len(y))] if len(y) > 15 else y, "--" if stage == "select1" else "-"
            name = (stage if "," in stages else field).replace("_", " ") + ": not logged" * (not len(y))
            ax.plot(x, y, style, color=COLOURS[mode], alpha=0.25, lw=1)
            ax.plot(x, bold, style, marker="" if len(y) > 15 else ".", color=COLOURS[mode], label=name)
        ax.set(title=title, xlabel="step", **({"ylim": (-0.03, 1.03)} if any(w in title for w in ("accuracy", "decision", "when")) else {}))
        ax.legend()
    return fig


def choose(records, modality, n=10):
    """{dataset: records}, {dataset: modality} -> [(dataset, index)] of the gallery, by rule: wrong and right, direct and reasoned in turn, each
    time the first query of the dataset shown least so far (then of the modality shown least). Sorted: right ones first, reasoned ones first."""
    pool, picked, shown = collections.defaultdict(list), [], collections.Counter()
    for name, i, r in ((name, i, r) for name, rows in records.items() for i, r in enumerate(rows)):
        pool[r["top3"]["adaptive"][0] not in r["label"], not r["reasoned"]].append((name, i))
    while len(picked) < n and any(pool.values()):
        for want in [k for k in sorted(pool, reverse=True) if pool[k]][:n - len(picked)]:
            name, i = min(pool[want], key=lambda x: (shown[x[0]], shown[modality[x[0]]]))
            pool[want].remove((name, i))
            picked.append((want, name, i))
            shown.update((name, modality[name]))
    return [(name, i) for _, name, i in sorted(picked, key=lambda x: x[0])]


def thumbnail(shots, side):
    """A picture, or four to eight frames of a video, on a white square; small ones grow by whole pixels."""
    first, out = data.load_picture(shots[0]), Image.new("RGB", (side, side), "white")
    n = min(len(shots), 8 if first.width > 1.5 * first.height else 4)
    cell = side // np.array([min(n, 2), (n + 1) // 2]) - 2
    for k, i in enumerate(np.linspace(0, len(shots) - 1, n).astype(int)):
        shot = data.load_picture(shots[i])
        scale = (cell / shot.size).min()
        shot = shot.resize([max(1, int(v * (int(scale) or scale))) for v in shot.size], 0 if scale >= 1 else Image.Resampling.LANCZOS)
        out.paste(shot, ((cell + 4) * (k % 2, k // 2) + (cell - shot.size) // 2).tolist())
    return out


def draw_gallery(picked, records, sets, tau, side=200, gap=24, middle=640, step=27):
    """A row per picked query: its picture, its text with decision and rationale, the first three results; right ones framed and ticked."""
    import matplotlib
    grey, green, fonts = COLOURS["random"], COLOURS["adaptive"], os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans{}.ttf")
    plain, bold, slanted, big = (ImageFont.truetype(fonts.format(kind), size, layout_engine=ImageFont.Layout.BASIC)
                                 for kind, size in (("", 20), ("-Bold", 20), ("-Oblique", 20), ("-Bold", 26)))

    def wrapped(text, width, most, font=plain, ink="black"):
        ways = (textwrap.wrap(text[:2000].strip(), n, max_lines=most, placeholder=" …") for n in range(width // 5, 1, -1))
        return [(line, font, ink) for line in next(lines for lines in ways if all(font.getlength(line) <= width for line in lines))]

    def story(r, es, text):
        choice, says = f"p(reason) = {r['p_reason']:.2f} {'>' if r['reasoned'] else '≤'} τ = {tau:g}", f"“{r['rationale'] or '(nothing)'}”"
        right = ", ".join(f"{mode} {'✓' if top[0] in r['label'] else '✗'}" for mode, top in r["top3"].items())
        answer = [(f"answers directly: {choice}", bold, COLOURS["never"]), *wrapped(f"if forced to reason: {says}", middle, 5, slanted, grey)]
        if r["reasoned"]:
            answer = [(f"reasons: {choice}, {r['new_tokens']} tokens", bold, COLOURS["always"]), *wrapped(says, middle, 5, slanted)]
        return [(f"{es.name} ({es.modality})", bold, "black"), *wrapped(text, middle, 5), *answer, (f"first result right? {right}", plain, grey)]

    stories = [story(records[name][i], sets[name], sets[name].queries[i].get("text", "")) for name, i in picked]
    heights, y = [max(side, step * len(lines)) + 2 * gap for lines in stories], 150
    columns = [gap, 2 * gap + side, *(3 * gap + side + middle + k * (side + 16) for k in range(3))]
    sheet = Image.new("RGB", (columns[-1] + side + gap, y + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    put = lambda x, y, lines: [pen.text((x, y + step * k), text, ink, font) for k, (text, font, ink) in enumerate(lines)]
    put(gap, 20, [("Test queries as the trained model answers them", big, "black")])
    put(gap, 62, [("Chosen by a rule, not by hand: first queries that it gets right, then failures (more of them than their share).", plain, grey)])
    for x, title in zip(columns, ("query", "its text, the decision, the rationale", "first result", "second", "third")):
        put(x, 112, [(title, bold, "black")])
    for (name, i), lines, height in zip(picked, stories, heights):
        es, label, top3 = sets[name], records[name][i]["label"], records[name][i]["top3"]["adaptive"]
        results = [es.candidates[es.cand_ids.index(key)] if key in es.cand_ids else {"text": str(key)} for key in top3]
        pen.line((gap, y, sheet.width - gap, y), "#c8c8c8", 2)
        put(columns[1], y + gap - 3, lines)
        for x, item, right in zip((columns[0], *columns[2:]), (es.queries[i], *results), (None, *(key in label for key in top3))):
            if shots := data.refs(item):
                sheet.paste(thumbnail(shots, side), (x, y + gap))
            else:
                put(x + 10, y + gap + 8, [("text only", plain, grey)] if right is None else wrapped(item.get("text", ""), side - 20, 6))
            pen.rectangle((x - 5, y + gap - 5, x + side + 4, y + gap + side + 4), None, green if right else "#c8c8c8", 5 if right else 1)
            pen.text((x + side - 26, y + gap + side - 34), "✓" * bool(right), green, big, stroke_width=5, stroke_fill="white")
        y += height
    return sheet


def table(head, rows):
    """Markdown; the first column is text, the others are numbers."""
    show = lambda x: "–" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x)
    return "\n".join(f"| {' | '.join(map(show, row))} |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def report_text(report, summary, says, made):
    """report.md: the sentences, the tables, the pictures, and what made them."""
    modes, choice, stages = report["modes"], report["selection"], {**report["seconds"], "all": sum(report["seconds"].values())}
    lacking = "".join(f"; {key} datasets: {', '.join(summary[key])}" for key in ("missing", "broken") if summary[key])
    numbers = lambda m: [*(m[k] for k in ("overall", *MODALITIES, "reason_rate")), f"{m['tokens_per_query']:.1f}", f"{m['ms_per_query']:.1f}"]
    return "\n\n".join([
        f"# {says[0]} (one run, {sum(d['queries'] for d in summary['datasets'].values())} test queries)", *(f"{sentence}." for sentence in says[1:]),
        "Never and always are this same model, forced: how a model would do that was trained for one of them alone is not measured here.",
        "![quality against tokens](tradeoff.png)",
        f"Preset {report['preset']}, seed {report['seed']}; reason when p(reason) > {summary['tau']:g}{lacking}. {', '.join(made)}.", "## Modes",
        table(["mode", "overall", *MODALITIES, "reason rate", "tokens / query", "ms / query"], [[mode, *numbers(m)] for mode, m in modes.items()]),
        "random: a coin tossed at adaptive's rate. oracle: with hindsight the better of never and always for each query.",
        "## Datasets", "![per dataset](families.png)", table(["dataset", "modality", "metric", "queries", *modes, "reason rate"], [
            [name, *(d[k] for k in ("modality", "metric", "queries")), *(m["datasets"][name] for m in modes.values()), d["reason_rate"]]
            for name, d in summary["datasets"].items()]),
        "## Selection of rationales", table(["", "all"], [[k.replace("_", " "), v] for k, v in choice.items() if not isinstance(v, dict)]),
        *(table([k.removeprefix("by_"), "share kept"], of.items()) for k, of in choice.items() if isinstance(of, dict)),
        "## Training", "![training curves](training.png)", "Names as in metrics.jsonl: nce is InfoNCE, lm the cross-entropy of rationale tokens.",
        table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in stages.items()]), "## Test queries", "![test queries](gallery.png)"]) + "\n"


def pictures(out, root, on_bad="stop"):
    """tradeoff.png, families.png, training.png, gallery.png and report.md of a finished run folder, whose test sets lie under root."""
    import matplotlib.style
    import torch
    from matplotlib.figure import Figure                          # no pyplot: no window, no state, and saving is Agg's
    figure, path = lambda *size: Figure(size, layout="constrained"), lambda *parts: os.path.join(out, *parts)
    fields = ("overall", *MODALITIES, "reason_rate", "tokens_per_query", "ms_per_query", "datasets")
    report = need(path("report.json"), lambda r: [r["preset"], r["seed"], r["seconds"], r["selection"].items(), r["curve"][0]["tokens_per_query"],
                                                  [r["modes"][mode][k] for mode in COLOURS for k in fields]])
    summary = need(path("eval", "summary.json"), lambda s: [s["tau"], s["missing"], s["broken"], [
        (d["modality"], d["reason_rate"], report["modes"][mode]["datasets"][name]) for name, d in s["datasets"].items() for mode in COLOURS]])
    log = need(path("metrics.jsonl"), lambda row: (row["stage"], row["step"]), True)
    config = need(path("config.json"), lambda c: (c["device"], c["scale"], c["rl_price"]))
    of = {name: d["modality"] for name, d in summary["datasets"].items()}
    records = {name: need(path("eval", of[name], f"{name}_queries.jsonl"), lambda r: (r["top3"]["adaptive"][0], *(
        r[k] for k in ("id", "p_reason", "reasoned", "rationale", "new_tokens", "label", "never", "always", "adaptive"))), True) for name in of}
    picked, says = choose(records, of), verdict(report["modes"], noise_of(records))
    sets = {name: data.load_eval(root, name, on_bad) for name in dict(picked)}
    if bad := [name for name, i in picked if records[name][i]["id"] not in sets[name].query_ids[i:i + 1]]:
        raise ValueError(f"{path('eval', of[bad[0]], bad[0] + '_queries.jsonl')}: its queries are not those of {bad[0]} in {root}")
    with matplotlib.style.context(["default", STYLE]):
        draw_tradeoff(figure, report, summary["datasets"], says[0]).savefig(path("tradeoff.png"))
        draw_families(figure, report, summary["datasets"]).savefig(path("families.png"))
        draw_training(figure, log).savefig(path("training.png"))
    draw_gallery(picked, records, sets, summary["tau"]).save(path("gallery.png"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and config["device"] != "cpu" else f"CPU with {os.cpu_count()} cores"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "pillow", "matplotlib")]
    made = [f"Price {config['rl_price']:g}", f"Scale {config['scale']:g}", device, f"Python {sys.version.split()[0]}", *versions]
    with open(path("report.md"), "w", encoding="utf-8") as f:
        f.write(report_text(report, summary, says, made))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadData, ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
