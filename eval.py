"""
The ruler: MMEB-V2's 26 numbers per dataset, honest about ties, and every mode of reasoning beside its cost.

The idea. A test set is queries, candidates and the right ones among them. Every distinct item is embedded once, candidates are ranked by the dot
product of unit vectors, and a query is measured under two modes, never and always reasoning. All other modes follow without another run, since
rationales are greedy: adaptive(tau) takes a query's always-result if p_reason > tau and else its never-result; random tosses a coin with
adaptive's rate; oracle takes the better of the two with hindsight (direct on ties). Adaptive must beat never AND always; how far it lies from
random towards oracle is what the decision has learnt.

The maths. Rank of a positive p, pessimistic: 1 + #{wrong candidates with s >= s_p} + #{positives before it}; optimistic: the same with s > s_p.
A collapsed model so scores 0 and not 100 % (upstream's argsort returns index 0, which is the answer in the 36 image sets). L = positives, k = 1, 5, 10:
    hit 1 if any rank <= k      precision |hits|/k      recall |hits|/|L| (1 if L is empty)      f1 their harmonic mean
    map Σ_hits precision@rank / min(|L|, k)             mrr 1/first rank <= k                     ndcg Σ_hits g/log2(rank+1) / the same of the ideal
with g = grade (linear) or 2^grade − 1 (exponential), grade 1 where there is none. Averages: a dataset = mean over its queries, a modality and
the overall = plain mean over datasets (not over modalities). The expectation of the coin is exact: mean of many tosses = (1−rate)·never + rate·always.
Scores are float64 products rounded to 2^-25, the resolution of float32 below 1: equal vectors tie exactly, however the corpus is cut into chunks.

How to run:
    python eval.py --model runs/pocket/rl --data runs/pocket/data --out runs/pocket/eval --modes never,always,adaptive
    python eval.py --model Qwen/Qwen3-VL-Embedding-2B --data MMEB_V2_ROOT --out DIR --reason never --prompts qwen --frames 64 [--tasks CIRR,MSVD]
    python eval.py --bench                                            ranking 1,000 queries over 100,000 and 1,000,000 candidates
Writes DIR/<modality>/<dataset>_{score.json, pred.jsonl, queries.jsonl}, DIR/leaderboard.json, DIR/summary.json; vectors in DIR/cache, by content: a
run goes on where it stopped, and a changed model never meets old vectors.

Left out: ranking on a GPU (1,000 x 1,000,000 takes seconds without one), significance tests, more than the first 100 of a ranking in pred.jsonl.
Not followed: the reference pairs labels and grades wrongly where ids are strings and grades are mixed (a perfect ranking gets 0.855 there).
"""

import argparse
import collections
import dataclasses
import datetime
import hashlib
import json
import os
import sys
import tempfile
import time

import numpy as np
from PIL import Image
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


def score_ranking(ranked, labels, grades=None):
    """A ranked list of ids and the right ones -> {key: value}. A repeated id takes a place but counts once; a repeated label has its higher grade."""
    labels = list(labels) if isinstance(labels, (list, tuple, set, np.ndarray)) else [labels]
    if grades is not None and len(grades) != len(labels):
        raise ValueError(f"{len(labels)} labels but {len(grades)} grades")
    grade = {}
    for label, g in zip(labels, [1.0] * len(labels) if grades is None else grades):          # paired before de-duplication
        grade[label] = max(g, grade.get(label, g))
    place = {}
    for i, name in enumerate(ranked):
        place.setdefault(name, i + 1)
    return dict(zip(KEYS, score_ranks([place.get(label, np.inf) for label in grade], list(grade.values())).tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# Ranking

@dataclasses.dataclass
class Ranked:
    worst: list                                      # per query the pessimistic ranks of its positives, in their order
    best: list                                       # the optimistic ones
    top: list                                        # per query the first candidate indices, in the pessimistic order


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


def assemble(right, grades, above, equal, wrong, k):
    """Scores and grades of the positives, how many wrong ones lie above / level, the best wrong ones -> (worst, best, top) of one query."""
    right = np.asarray(right)
    grade = np.ones(len(right)) if grades is None else np.asarray(grades, np.float64)
    place, worst, best = np.arange(len(right)), np.empty(len(right), np.int64), np.empty(len(right), np.int64)
    pessimist, optimist = np.lexsort((place, grade, -right)), np.lexsort((place, -grade, -right))
    worst[pessimist] = 1 + (above + equal)[pessimist] + place
    best[optimist] = 1 + above[optimist] + place
    slots = {int(rank) - 1: int(i) for i, rank in enumerate(worst)}          # positives at their ranks, the wrong ones fill what is left
    wrong, top = iter(wrong), []
    while len(top) < k:
        i = slots.get(len(top))
        step = ("right", i) if i is not None else ("wrong", next(wrong, None))
        if step[1] is None:
            break
        top.append(step)
    return worst, best, top


def rank(queries, candidates, positives, grades=None, local=None, topk=100, budget=1 << 23):
    """(n, d), (m, d) unit vectors and per query the indices of its positives -> Ranked.

    local: per query the candidate indices it is ranked among (repeats take places, as upstream), else all. At most `budget` scores exist at a
    time, so memory does not grow with the corpus and time is linear in it; candidates may be a memory-mapped array.
    """
    finite(queries, "query")
    if missing := [i for i, p in enumerate(positives) if not len(p)]:
        raise ValueError(f"query {missing[0]} has no positive")
    n, q = len(queries), np.asarray(queries, np.float64)
    grades = grades or [None] * n
    right = [np.rint(np.einsum("pd,d->p", np.asarray(candidates[np.asarray(p)], np.float64), q[i]) * GRID) for i, p in enumerate(positives)]
    for i, r in enumerate(right):
        if not np.isfinite(r).all():
            raise ValueError(f"a positive of query {i} has a vector with NaN or inf: not ranked")
    above, level = [np.zeros(len(p), np.int64) for p in positives], [np.zeros(len(p), np.int64) for p in positives]

    def count(i, scores):
        above[i] += (scores > right[i][:, None]).sum(1)
        level[i] += (scores == right[i][:, None]).sum(1)

    wrong = []
    if local is not None:
        for i, members in enumerate(local):
            members = np.asarray(members)[~np.isin(members, positives[i])]
            vectors = np.asarray(candidates[members], np.float64)
            if len(bad := members[~np.isfinite(vectors).all(1)]):
                raise ValueError(f"candidate {bad[0]} has a vector with NaN or inf: not ranked")
            scores = np.rint(vectors @ q[i] * GRID)
            count(i, scores)
            wrong.append(members[np.lexsort((members, -scores))[:topk]].tolist())
    else:
        chunk = max(1, min(len(candidates), budget // max(n, 1)))
        top = np.empty((n, 0)), np.empty((n, 0), np.int64)
        flat = np.array([(c, i) for i, p in enumerate(positives) for c in p]).reshape(-1, 2)
        flat = flat[np.argsort(flat[:, 0], kind="stable")]
        for at in range(0, len(candidates), chunk):
            block = np.asarray(candidates[at:at + chunk], np.float64)
            finite(block, "candidate", at)
            scores = q @ block.T
            np.rint(np.multiply(scores, GRID, out=scores), out=scores)
            lo, hi = np.searchsorted(flat[:, 0], (at, at + len(block)))
            scores[flat[lo:hi, 1], flat[lo:hi, 0] - at] = -np.inf            # positives are placed by assemble()
            for i in range(n):
                count(i, scores[i])
            top = merge_top(top, scores, at, min(topk, len(candidates)))
        wrong = [index[score > -np.inf].tolist() for score, index in zip(*top)]
    out = Ranked([], [], [])
    for i, p in enumerate(positives):
        worst, best, steps = assemble(right[i], grades[i], above[i], level[i], wrong[i], topk)
        out.worst.append(worst)
        out.best.append(best)
        out.top.append([p[j] if kind == "right" else j for kind, j in steps])
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

    def embed(self, items, ids, reason, what, **options):
        """-> (vectors (n, d) float32, infos, ms per item). An item that cannot be read is named by dataset and id."""
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
                raise BadData(f"{what}{f' {ids[list(first.values())[e.index]]}' if hasattr(e, 'index') else ''}: {e}") from e
            ms = 1000 * (time.perf_counter() - start) / len(distinct)
            vectors = np.asarray(vectors, np.float32)
            finite(vectors, f"{what}: item")
            for ending, write in ((".npy", lambda f: np.save(f, vectors)), (".json", lambda f: f.write(json.dumps({"ms": ms, "infos": infos}).encode()))):
                with open(path + ending + ".part", "wb") as f:    # a half-written file never has the final name
                    write(f)
                os.replace(path + ending + ".part", path + ending)
        vectors = np.load(path + ".npy", mmap_mode="r")
        with open(path + ".json") as f:
            kept = json.load(f)
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
    curve = [{"tau": round(float(t), 6), **{k: v for k, v in entry(at(t)).items() if k in ("overall", "reason_rate", "tokens_per_query", "ms_per_query")}}
             for t in taus]
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

def measure(es, cache, modes, tau):
    """One EvalSet -> {mode: {"scores" (n, 24), "best" (n,), "top", "infos", "ms"}} for the modes that are embedded: never, always, adaptive."""
    targets, _, _ = cache.embed(es.candidates, es.cand_ids, "never", f"{es.name} candidate")
    out = {}
    for mode in ("never", "always", "adaptive"):
        if mode not in modes or (mode == "adaptive" and {"never", "always"} <= set(modes)):
            continue
        how = {"reason": "auto", "tau": tau} if mode == "adaptive" else {"reason": mode}
        vectors, infos, ms = cache.embed(es.queries, es.query_ids, what=f"{es.name} query", **how)
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
             frames=None, prompts="vlm2vec", batch_size=16, metadata=None, options=None):
    """Every dataset of a root (or the tasks named) -> summary; also written, with the files named in the module's docstring.

    The score files hold adaptive where it is among the modes, else the first one. options go to encode() (dim, max_new_tokens, ...).
    """
    if not modes or set(modes) - {"never", "always", "adaptive"}:
        raise ValueError(f"modes are never, always, adaptive; got {modes}")
    every = data.tables(root, "eval")
    rows, primary = data.wanted(every, tasks), "adaptive" if "adaptive" in modes else modes[0]
    cache = Cache(embedder, os.path.join(out, "cache"), batch_size, dict(options or {}))
    metrics, datasets, per, missing, broken = {m: {} for m in MODALITIES}, {}, {}, [], {}
    for row in tqdm(rows, desc="datasets", disable=None):
        try:
            es = data.load_eval(root, row, on_bad, limit, page_labels, frames, prompts)
            found = measure(es, cache, modes, tau)
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
        infos = found[primary]["infos"]
        datasets[es.name] = {"modality": es.modality, "metric": es.metric, "protocol": es.protocol, "queries": len(es.queries),
                             "candidates": len(es.candidates), "dropped": es.dropped, "bad": es.bad, "want": row["queries"], "score": score[es.metric],
                             "optimistic": float(found[primary]["best"].mean()), "reason_rate": float(np.mean([i["reasoned"] for i in infos])),
                             "tokens_per_query": float(np.mean([i["new_tokens"] for i in infos])), "ms_per_query": found[primary]["ms"],
                             "modes": {mode: float(m["scores"][:, at].mean()) for mode, m in found.items()}}
        if {"never", "always"} <= set(found):
            per[es.name] = {"modality": es.modality, "never": found["never"]["scores"][:, at], "always": found["always"]["scores"][:, at],
                            "p_reason": [i["p_reason"] for i in found["never"]["infos"]], "tokens": [i["new_tokens"] for i in found["always"]["infos"]],
                            "ms_never": found["never"]["ms"], "ms_always": found["always"]["ms"]}
    if not datasets:
        raise BadData(f"{root}: none of the {len(rows)} datasets asked for could be evaluated; missing: {', '.join(missing[:5])} ... broken: {broken}")
    summary = {**aggregate(metrics, rows), "mode": primary, "tau": tau, "missing": missing, "broken": broken, "datasets": datasets}
    if per:
        summary["modes"], summary["curve"] = mode_table(per, tau)
    write(os.path.join(out, "summary.json"), summary)
    write(os.path.join(out, "leaderboard.json"), leaderboard(metrics, every, page_labels, metadata))
    return {**summary, "per_dataset": per}


def leaderboard(metrics, rows, page_labels="fixed", metadata=None):
    """The file as the leaderboard takes it: a dataset that was not run is the string its own script writes there."""
    meta = dict.fromkeys(("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens", "model_release_date"))
    meta.update(data_source="Self-Reported", url=None, report_generated_date=datetime.datetime.now().isoformat())
    if unknown := sorted(set(metadata or {}) - set(meta)):
        raise ValueError(f"unknown metadata key {unknown[0]!r}; the leaderboard knows {', '.join(meta)}")
    table = {m: {RENAMED.get(r["name"], r["name"]) if page_labels == "fixed" else r["name"]:
                 of.get(r["name"], "FILE_N/A" if of else "DIR_N/A") for r in rows if r["modality"] == m} for m, of in metrics.items()}
    return {"metadata": {**meta, **(metadata or {})}, "metrics": table}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and the report: what a finished run of train.py looks like, drawn from the files that it left

COLOURS = {"never": "#0072B2", "always": "#D55E00", "adaptive": "#009E73", "random": "#707070", "oracle": "#000000"}     # Okabe and Ito's: safe for all eyes
MARKERS = {"never": "s", "always": "D", "adaptive": "o", "random": "X", "oracle": "*"}
STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "figure.dpi": 150,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False}


def need(path, keys=(), lines=False):
    """A JSON file of the run (lines: one object a line) that has these keys, else one ValueError with its name."""
    try:
        with open(path, encoding="utf-8") as f:
            value = [json.loads(line) for line in f] if lines else json.load(f)
    except OSError as e:
        raise ValueError(f"{path}: the report needs it ({e.strerror})") from None
    except ValueError as e:
        raise ValueError(f"{path}: damaged ({e})") from None
    for row in value if lines else [value]:
        if lost := [k for k in keys if not isinstance(row, dict) or k not in row]:
            raise ValueError(f"{path}: damaged (no {lost[0]!r} in it)")
    return value


def save(picture, path):
    """A figure of matplotlib's, or a picture of Pillow's, as a PNG; complete or not at all."""
    picture.savefig(path + ".part", format="png") if hasattr(picture, "savefig") else picture.save(path + ".part", "PNG")
    os.replace(path + ".part", path)


def verdict(modes):
    """What the numbers say, in sentences, whichever way they fall. The first is short enough for a title."""
    score, tokens = {k: m["overall"] for k, m in modes.items()}, {k: m["tokens_per_query"] for k, m in modes.items()}
    a, beaten = score["adaptive"], [k for k in ("never", "always") if score["adaptive"] > score[k]]
    word = {2: "beats both never and always", 1: f"beats {''.join(beaten)} only", 0: "beats neither never nor always"}[len(beaten)]
    gap = score["oracle"] - score["random"]
    return [f"Adaptive reasoning {word}",
            f"Quality: {a:.3f} against {score['never']:.3f} for never ({a - score['never']:+.3f}) and {score['always']:.3f} for always ({a - score['always']:+.3f})",
            f"Cost: {tokens['adaptive']:.1f} generated tokens per query" + (f", {tokens['adaptive'] / tokens['always']:.0%} of the {tokens['always']:.1f} that "
            "always takes" if tokens["always"] else "") + f"; it reasons about {modes['adaptive']['reason_rate']:.0%} of the queries",
            f"Decision: a coin tossed at the same rate gives {score['random']:.3f} and hindsight {score['oracle']:.3f}; adaptive covers "
            f"{(a - score['random']) / gap:.0%} of the distance between them" if gap > 1e-9 else
            f"Decision: hindsight gives {score['oracle']:.3f}, no more than a coin tossed at the same rate, so there was nothing to decide"]


def label_points(ax, labels, lines):
    """Write each (x, y, text, colour) near its point, where it covers no other label, no point and none of the lines [(x, y), ...] if that can be."""
    ax.figure.draw_without_rendering()
    frame, at, taken = ax.get_window_extent(), ax.transData.transform, []
    dense = [np.stack([np.interp(np.linspace(0, len(p) - 1, 400), range(len(p)), column) for column in zip(*p)], 1) for p in lines]
    marks = at(np.concatenate([[label[:2] for label in labels], *dense]))
    for x, y, text, colour in labels:
        note = ax.annotate(text, (x, y), (0, 0), textcoords="offset pixels", color=colour, ha="center", va="center", linespacing=1.2,
                           arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 7})
        half = super(type(note), note).get_window_extent().size / 2                    # of the text alone, without the line to the point

        def cost(shift):
            lo, hi = at((x, y)) + shift - half - 5, at((x, y)) + shift + half + 5
            outside = (lo < frame.min).any() or (hi > frame.max).any()
            return 1000 * outside + 100 * sum((lo < b).all() and (hi > a).all() for a, b in taken) + ((marks > lo) & (marks < hi)).all(1).sum()

        ways = [(1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)]
        best = min((np.array(way) * (half + far) for far in (16, 40, 70, 110, 160, 220) for way in ways), key=cost)       # the first of the least, so the nearest
        note.set_position(best)
        taken.append((at((x, y)) + best - half, at((x, y)) + best + half))


def draw_tradeoff(report, summary):
    """Quality against generated tokens: the modes, the curve over tau, the coin's line; beside it the modalities."""
    from matplotlib.figure import Figure
    modes, fig = report["modes"], Figure((11, 5.2), layout="constrained")
    ax, side = fig.subplots(1, 2, width_ratios=(3, 2))
    at = {mode: (m["tokens_per_query"], m["overall"]) for mode, m in modes.items()}
    coin, curve = [at["never"], at["always"]], [(c["tokens_per_query"], c["overall"]) for c in report["curve"]]
    ax.plot(*zip(*coin), "--", color=COLOURS["random"], lw=1.2)
    ax.plot(*zip(*curve), ".-", color=COLOURS["adaptive"], lw=1.2, ms=4, alpha=0.6)
    for mode, point in at.items():
        ax.plot(*point, MARKERS[mode], color=COLOURS[mode], ms=15 if mode == "oracle" else 9, mec="white", zorder=3 + (mode == "adaptive"))
    y = [p[1] for p in [*at.values(), *curve]]
    low, high, right = min(y), max(y), max(p[0] for p in [*at.values(), *curve]) or 1
    room = max(0.18 * (high - low), 0.01)
    ax.set(xlim=(-0.04 * right, 1.08 * right), ylim=(low - room, high + room), xlabel="generated tokens per query", ylabel="quality (mean over datasets)")
    ax.set_title(f"{verdict(modes)[0]}:\nquality against cost, {len(summary['datasets'])} datasets, {sum(d['queries'] for d in summary['datasets'].values())} test queries")
    middle = curve[int(np.argmin([abs(x - 0.6 * right) for x, _ in curve]))]
    label_points(ax, [(*at[mode], f"{mode}\n{at[mode][1]:.3f}, {at[mode][0]:.1f} tokens", COLOURS[mode]) for mode in ("adaptive", "never", "always", "oracle", "random")]
                 + [(0.75 * at["always"][0], 0.25 * at["never"][1] + 0.75 * at["always"][1], "a coin at other rates", COLOURS["random"]),
                    (*middle, "adaptive at other τ", COLOURS["adaptive"])], [coin, curve])
    kinds = [m for m in MODALITIES if modes["never"].get(m) is not None]
    for i, mode in enumerate(("never", "always", "adaptive", "oracle")):
        values, places = [modes[mode][m] for m in kinds], [k + 0.2 * (i - 1.5) for k in range(len(kinds))]
        side.barh(places, values, 0.18, color=COLOURS[mode])
        for value, place in zip(values, places):
            side.text(value + 0.01, place, f"{mode} {value:.2f}", color=COLOURS[mode], va="center", fontsize=9)
    count = collections.Counter(d["modality"] for d in summary["datasets"].values())
    side.set_yticks(range(len(kinds)), [f"{m}\n{count[m]} dataset{'s' * (count[m] != 1)}\n{MODALITIES[m].replace('_linear', '')}" for m in kinds])
    side.set(xlim=(0, 1.3), xlabel="quality", title="By modality")
    side.set_xticks(np.arange(0, 1.1, 0.25))
    side.invert_yaxis()
    return fig


def draw_families(report, summary):
    """Every dataset under never, always and adaptive, sorted by what reasoning gains there; beside it how often the model chose to reason."""
    from matplotlib.figure import Figure
    modes = {mode: report["modes"][mode]["datasets"] for mode in ("never", "always", "adaptive")}
    gain = {name: modes["always"][name] - modes["never"][name] for name in modes["never"]}
    names = sorted(gain, key=lambda name: (-gain[name], name))
    fig = Figure((11, 1.7 + 0.34 * len(names)), layout="constrained")
    ax, side = fig.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for i, name in enumerate(names):
        ax.plot([modes["never"][name], modes["always"][name]], [i, i], color="#c8c8c8", lw=4, solid_capstyle="round", zorder=1)
    for mode, shift, size in (("never", -0.2, 7), ("always", 0.2, 6), ("adaptive", 0, 7)):         # apart, so that equal scores do not hide each other
        ax.plot([modes[mode][n] for n in names], np.arange(len(names)) + shift, MARKERS[mode], color=COLOURS[mode], ms=size, label=mode)
    ax.set_yticks(range(len(names)), [f"{n} ({summary['datasets'][n]['modality']})" for n in names])
    ax.set(xlim=(-0.03, 1.03), ylim=(len(names) - 0.4, -0.6), xlabel="quality")
    ax.grid(axis="y", color="#eeeeee")
    ax.set_axisbelow(True)
    ax.set_title("Quality per dataset; at the top those that gain most by reasoning", pad=26)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handletextpad=0.2)
    rates = [summary["datasets"][n]["reason_rate"] for n in names]
    side.barh(range(len(names)), rates, 0.6, color=COLOURS["adaptive"], alpha=0.35)
    for i, rate in enumerate(rates):
        side.text(rate + 0.02, i, f"{rate:.0%}", va="center", fontsize=9)
    side.set(xlim=(0, 1.22), xlabel="share of its queries")
    side.set_xticks([0, 0.5, 1], ["0%", "50%", "100%"])
    side.set_title("How often it reasons", pad=26)
    side.tick_params(axis="y", length=0)
    return fig


def draw_training(log):
    """What the stages logged: faint as it came (one batch each), bold its running mean."""
    from matplotlib.figure import Figure
    rows = collections.defaultdict(list)
    for row in log:
        rows[row["stage"]] = [r for r in rows[row["stage"]] if r["step"] < row["step"]] + [row]          # a stage that began again replaces what it had
    skills = [{"step": r["step"], "mean": float(np.mean(v)), "weakest": min(v)}
              for r in rows["base skills"] for v in [[x for k, x in r.items() if k not in ("stage", "step")]]]
    worst = min((k for k in rows["base skills"][-1] if k not in ("stage", "step")), key=rows["base skills"][-1].get) if skills else ""
    nce, blue, red, green, grey = {"nce_direct": "InfoNCE, direct", "nce_reason": "InfoNCE, reasoned"}, *(COLOURS[k] for k in ("never", "always", "adaptive", "random"))
    panels = [("base: loss", [(rows["base"], "loss", "loss", green)]),
              ("base: accuracy", [(rows["base"], "accuracy", "next token", green), (skills, "mean", "held-out skills, mean", grey), (skills, "weakest", f"weakest in the end: {worst}", "#CC79A7")]),
              ("select: the two evaluators' warm-up", [(rows[f"select{k}"], key, f"{text}, fold {k}", c) for k in (0, 1) for (key, text), c in zip(nce.items(), (blue, red))]),
              ("embed: losses", [(rows["embed"], k, t, c) for (k, t), c in zip([*nce.items(), ("lm", "rationale tokens")], (blue, red, grey))]),
              ("embed: decision agrees with selection", [(rows["embed"], "decision_right", "share right", green)]),
              ("rl: reward", [(rows["rl"], k, t, c) for k, t, c in (("reward_reason", "reasoned", red), ("reward_direct", "direct", blue), ("reward", "by policy", green))]),
              ("rl: when it reasons", [(rows["rl"], k, t, c) for k, t, c in (("p_reason", "mean p(reason)", green), ("reason_rate", "share with p > ½", grey), ("decision_right", "decision right", "#CC79A7"))]),
              ("rl: tokens of a rationale", [(rows["rl"], "tokens", "tokens", red)]),
              ("rl: losses beside", [(rows["rl"], k, t, c) for (k, t), c in zip(nce.items(), (blue, red))])]
    fig = Figure((11, 8.5), layout="constrained")
    for ax, (title, curves) in zip(fig.subplots(3, 3).flat, panels):
        for i, (points, key, label, colour) in enumerate(curves):
            x, y = [r["step"] for r in points if key in r], np.array([r[key] for r in points if key in r], np.float64)
            smooth = [y[max(0, j - 4):j + 1].mean() for j in range(len(y))] if len(y) > 15 else y
            ax.plot(x, y, color=colour, alpha=0.25, lw=1)
            ax.plot(x, smooth, "--" if label.endswith("fold 1") else "-", marker="." if len(y) <= 15 else "", color=colour, label=label if len(y) else f"{label}: not logged")
        ax.set_title(title)
        ax.set_xlabel("step")
        if len(curves) > 1:
            ax.legend()
    return fig


def choose(records, modality, n=10):
    """{dataset: records}, {dataset: modality} -> [(dataset, index)] for the gallery, by a rule and not by hand.

    Reasoned and direct, right and wrong in turn, wrong ones first served as they are rare; each time the first such query of the dataset
    that was shown least, modalities taking turns. Then sorted: right before wrong, reasoned before direct.
    """
    of = collections.defaultdict(list)
    for name in records:
        of[modality[name]].append(name)
    turn = sorted(records, key=lambda name: ((of[modality[name]].index(name) + 0.5) / len(of[modality[name]]), list(MODALITIES).index(modality[name])))
    kind = lambda r: (r["top3"]["adaptive"][0] not in r["label"], not r["reasoned"])
    left, shown, out, kinds = {name: list(range(len(records[name]))) for name in turn}, collections.Counter(), [], [(True, False), (True, True), (False, False), (False, True)]
    while len(out) < n:
        before = len(out)
        for want in kinds:
            found = next(((name, i) for name in sorted(turn, key=lambda x: shown[x]) for i in left[name] if kind(records[name][i]) == want), None)
            if found and len(out) < n:
                out.append(found)
                shown[found[0]] += 1
                left[found[0]].remove(found[1])
        if len(out) == before:
            break
    return sorted(out, key=lambda x: kind(records[x[0]][x[1]]))


def thumbnail(item, side=196):
    """An item's picture, or four frames of its video, in a square of Pillow's; None for text alone. Small ones grow by whole pixels."""
    every = data.refs(item)
    if not every:
        return None
    shots = [every[i] for i in np.linspace(0, len(every) - 1, min(4, len(every))).astype(int)]
    out, cell = Image.new("RGB", (side, side), "white"), side if len(shots) == 1 else side // 2 - 2
    for i, ref in enumerate(shots):
        shot = data.load_picture(ref)
        scale = min(cell / shot.width, cell / shot.height)
        size = [max(1, round(x * (int(scale) if scale >= 1 else scale))) for x in shot.size]
        out.paste(shot.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS), ((i % 2) * (cell + 4), (i // 2) * (cell + 4)))
    return out


def wrapped(text, font, width, most):
    """Text -> at most so many lines of at most so many pixels; what does not fit ends in an ellipsis."""
    lines, line = [], ""
    for word in text[:4000].split():
        while word:                                                                    # a word longer than a line is cut
            fits = next(k for k in range(len(word), 0, -1) if k == 1 or font.getlength(word[:k]) <= width)
            both, piece, word = f"{line} {word[:fits]}".strip(), word[:fits], word[fits:]
            if font.getlength(both) > width and line:
                lines, both = [*lines, line], piece
            line = both
    lines = [*lines, line] if line else lines
    if len(lines) > most:
        lines = lines[:most]
        while font.getlength(lines[-1] + " …") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += " …"
    return lines


def draw_gallery(picked, records, sets, tau):
    """A row per picked query: its picture, its text with decision and rationale, the top three results; right ones in a thick frame with a tick."""
    import matplotlib
    from PIL import ImageDraw, ImageFont
    face = lambda kind, size: ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{kind}.ttf"), size, layout_engine=ImageFont.Layout.BASIC)
    plain, bold, slanted, big, grey = face("", 20), face("-Bold", 20), face("-Oblique", 20), face("-Bold", 26), COLOURS["random"]
    side, gap, middle, step = 196, 24, 640, 27
    columns = [gap, 2 * gap + side] + [3 * gap + side + middle + k * (side + 16) for k in range(3)]
    width, blocks = columns[-1] + side + gap, []
    for name, i in picked:
        r, es = records[name][i], sets[name]
        right, used = {mode: top[0] in r["label"] for mode, top in r["top3"].items()}, "always" if r["reasoned"] else "never"
        lines = [(f"{name} ({es.modality})", bold, "black")]
        lines += [(t, plain, "black") for t in wrapped(es.queries[i].get("text", ""), plain, middle, 5)]
        lines += [(f"{'reasons' if r['reasoned'] else 'answers directly'}: p(reason) = {r['p_reason']:.2f} {'>' if r['reasoned'] else '≤'} τ = {tau:g}"
                   + (f", {r['new_tokens']} tokens" if r["reasoned"] else ""), bold, COLOURS[used])]
        says = f"“{r['rationale']}”" if r["reasoned"] else f"if forced to reason: “{r['rationale']}”"
        lines += [(t, slanted, "black" if r["reasoned"] else grey) for t in wrapped(says, slanted, middle, 5)]
        lines += [("first result: " + ", ".join(f"{mode} {'✓' if right[mode] else '✗'}" for mode in ("never", "always") if mode in right), plain, grey)]
        blocks.append((r, es, es.queries[i], lines))
    heights = [max(side, step * len(lines)) + 2 * gap for *_, lines in blocks]
    sheet = Image.new("RGB", (width, 150 + sum(heights)), "white")
    pen, y = ImageDraw.Draw(sheet), 150
    pen.text((gap, 20), "Test queries as the trained model answers them", "black", big)
    pen.text((gap, 60), f"Chosen by rule, not by hand: first those it gets right, then failures (shown more often than they occur); {len({n for n, _ in picked})} datasets.", grey, plain)
    for x, title in zip(columns, ("query", "its text, the decision, the rationale", "1st result", "2nd", "3rd")):
        pen.text((x, 108), title, "black", bold)
    for (r, es, query, lines), height in zip(blocks, heights):
        pen.line((gap, y, width - gap, y), "#c8c8c8", 2)
        y += gap
        results = [es.candidates[es.cand_ids.index(name)] if name in es.cand_ids else {"text": str(name)} for name in r["top3"]["adaptive"]]
        for x, item, mark in zip((columns[0], *columns[2:]), (query, *results), (None, *(name in r["label"] for name in r["top3"]["adaptive"]))):
            picture = thumbnail(item, side)
            said = ["text only"] if mark is None else wrapped(item.get("text", ""), plain, side - 20, 7)
            if picture:
                sheet.paste(picture, (x, y))
            else:
                pen.multiline_text((x + 10, y + 8), "\n".join(said), grey if mark is None else "black", plain, spacing=4)
            pen.rectangle((x - 5, y - 5, x + side + 4, y + side + 4), outline=COLOURS["adaptive"] if mark else "#c8c8c8", width=5 if mark else 1)
            if mark:
                pen.rectangle((x + side - 34, y + side - 34, x + side + 4, y + side + 4), fill=COLOURS["adaptive"])
                pen.text((x + side - 25, y + side - 28), "✓", "white", bold)
        for k, (text, font, colour) in enumerate(lines):
            pen.text((columns[1], y + step * k - 3), text, colour, font)
        y += height - gap
    return sheet


def table(head, rows):
    """A Markdown table; numbers to the right, None as a dash."""
    show = lambda x: "–" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x)
    return "\n".join(f"| {' | '.join(map(show, row))} |" for row in (head, ["---"] + ["---:"] * (len(head) - 1), *rows))


def report_text(report, summary, config):
    """report.md: the sentences, the tables, the pictures, and what made them."""
    import importlib.metadata
    import platform
    import torch
    modes, selection, seconds, per = report["modes"], report["selection"], report["seconds"], summary["datasets"]
    versions = [f"Python {platform.python_version()}"] + [f"{p} {importlib.metadata.version(p)}" for p in ("torch", "numpy", "pillow", "matplotlib")]
    cuda = (config.get("device") or "cuda").startswith("cuda") and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    names, (first, *rest) = ("never", "always", "adaptive"), verdict(modes)
    picked = table(["", "kept"], [[f"by {k}", float(v)] for k, v in selection["by_worker"].items()]) if selection.get("by_worker") else ""
    truth = [[k.replace("_", " "), selection[k]] for k in ("candidates", "kept", "precision", "recall", "placebo_accepted", "sloppy_kept") if k in selection]
    lost = [f"Not in the root: {', '.join(summary['missing'])}." if summary["missing"] else "", f"Broken: {', '.join(summary['broken'])}." if summary["broken"] else ""]
    return "\n\n".join(filter(None, [
        f"# {first}", *(f"{s}." for s in rest), f"Preset {report['preset']}, seed {report['seed']}, scale {config.get('scale', 1)}; reason when p(reason) > {summary['tau']:g}. {' '.join(filter(None, lost))}",
        "![quality against tokens](tradeoff.png)", "## Modes",
        table(["", "overall", *MODALITIES, "reason rate", "tokens / query", "ms / query"],
              [[k, m["overall"], *(m[x] for x in MODALITIES), m["reason_rate"], f"{m['tokens_per_query']:.1f}", f"{m['ms_per_query']:.1f}"] for k, m in modes.items()]),
        "random: a coin tossed at adaptive's rate. oracle: the better of never and always for each query, with hindsight.",
        "## Datasets", "![datasets](families.png)",
        table(["", "modality", "metric", "queries", *modes, "reason rate"],
              [[n, d["modality"], d["metric"], d["queries"], *(m["datasets"][n] for m in modes.values()), d["reason_rate"]] for n, d in per.items()]),
        "## Selection of rationales", table(["", ""], truth), picked,
        "## Training", "![training](training.png)", table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in [*seconds.items(), ("all", sum(seconds.values()))]]),
        "## Queries", "![queries](gallery.png)", f"Report written on {device} with {', '.join(versions)}."])) + "\n"


def pictures(out, root):
    """tradeoff.png, families.png, training.png, gallery.png and report.md of a finished run folder, whose test sets are under root.

    A file that is missing or damaged is a ValueError that names it; what was finished before it stays.
    """
    import matplotlib.style
    fields = ("overall", *MODALITIES, "reason_rate", "tokens_per_query", "ms_per_query", "datasets")
    report = need(os.path.join(out, "report.json"), ("preset", "seed", "seconds", "modes", "selection", "curve"))
    summary = need(os.path.join(out, "eval", "summary.json"), ("datasets", "tau", "missing", "broken"))
    if lost := [m for m in COLOURS if set(fields) - set(report["modes"].get(m, ()))]:
        raise ValueError(f"{out}/report.json: damaged (mode {lost[0]!r} is not whole)")
    if lost := set(report["modes"]["never"]["datasets"]) ^ set(summary["datasets"]):
        raise ValueError(f"{out}/report.json and eval/summary.json are of two runs: {min(lost)} is in one of them only")
    log, config = need(os.path.join(out, "metrics.jsonl"), ("stage", "step"), True), need(os.path.join(out, "config.json"))
    of = {name: d["modality"] for name, d in summary["datasets"].items()}
    records = {name: need(os.path.join(out, "eval", kind, f"{name}_queries.jsonl"), ("id", "p_reason", "reasoned", "rationale", "new_tokens", "label", "top3"), True)
               for name, kind in of.items()}
    picked = choose(records, of)
    sets = {name: data.load_eval(root, name) for name in sorted({name for name, _ in picked})}
    for name, i in picked:
        if i >= len(sets[name].queries) or sets[name].query_ids[i] != records[name][i]["id"]:
            raise ValueError(f"{out}/eval/{of[name]}/{name}_queries.jsonl: query {records[name][i]['id']} is not the one at that place in {root}")
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in (("tradeoff", draw_tradeoff(report, summary)), ("families", draw_families(report, summary)), ("training", draw_training(log))):
            save(figure, os.path.join(out, f"{name}.png"))
    save(draw_gallery(picked, records, sets, summary["tau"]), os.path.join(out, "gallery.png"))
    with open(os.path.join(out, "report.md.part"), "w", encoding="utf-8") as f:
        f.write(report_text(report, summary, config))
    os.replace(os.path.join(out, "report.md.part"), os.path.join(out, "report.md"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def bench(sizes=(100_000, 1_000_000), n=1000, d=256):
    """Time and memory of ranking n queries over corpora of these sizes, from a memory-mapped file."""
    rng, times = np.random.default_rng(0), []
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    queries = unit(rng.standard_normal((n, d), np.float32))
    with tempfile.TemporaryDirectory() as folder:
        for m in sizes:
            corpus = np.lib.format.open_memmap(os.path.join(folder, f"{m}.npy"), "w+", np.float32, (m, d))
            for at in range(0, m, 50_000):
                corpus[at:at + 50_000] = unit(rng.standard_normal((min(50_000, m - at), d), np.float32))
            corpus.flush()
            corpus = np.load(os.path.join(folder, f"{m}.npy"), mmap_mode="r")
            start = time.perf_counter()
            rank(queries, corpus, [[i] for i in range(n)])
            times.append(time.perf_counter() - start)
            print(f"rank_{n}x{m}_s: {times[-1]:.1f}\nresident_mb: {data.resident():.0f} (of which the mapped corpus {m * d * 4 / 2**20:.0f} at most)")
    print(f"time_ratio: {times[-1] / times[0]:.1f} for {sizes[-1] / sizes[0]:.0f}x the corpus")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or hub id")
    parser.add_argument("--data", help="the root (python data.py --check ROOT says what is in it)")
    parser.add_argument("--out", help="where the results go")
    parser.add_argument("--tasks", help="only these datasets, with commas")
    parser.add_argument("--reason", choices=["auto", "never", "always"], default="auto", help="how queries are embedded; targets are always direct")
    parser.add_argument("--modes", help="instead of --reason: never,always,adaptive (with never and always also random, oracle and the tau curve)")
    parser.add_argument("--tau", type=float, default=0.5, help="reason when p_reason > tau")
    parser.add_argument("--prompts", choices=["vlm2vec", "qwen"], default="vlm2vec")
    parser.add_argument("--frames", type=int, help="frames per video, default 8 (Qwen3-VL-Embedding: 64)")
    parser.add_argument("--page_labels", choices=["fixed", "original"], default="fixed")
    parser.add_argument("--on_bad", choices=["stop", "skip"], default="stop")
    parser.add_argument("--limit", type=int, help="so many queries per dataset, for a quick look")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dim", type=int, help="Matryoshka: slice, then renormalise")
    parser.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="model_name, model_size, url, ... of leaderboard.json")
    parser.add_argument("--bench", action="store_true", help="measure the ranking")
    args = parser.parse_args()
    if args.bench:
        return bench()
    if not (args.model and args.data and args.out):
        parser.error("--model, --data and --out are wanted")
    from embed import Embedder
    modes = tuple(args.modes.split(",")) if args.modes else ({"auto": "adaptive"}.get(args.reason, args.reason),)
    tasks = args.tasks.split(",") if args.tasks else None
    data.wanted(data.tables(args.data, "eval"), tasks)            # a wrong name or root is known before the model is loaded
    embedder = Embedder.from_pretrained(args.model)
    result = evaluate(embedder, args.data, args.out, tasks, modes, args.tau, args.on_bad, args.limit, args.page_labels, args.frames, args.prompts,
                      args.batch_size, {"model_name": os.path.basename(os.path.normpath(args.model)), **dict(m.split("=", 1) for m in args.metadata)},
                      {"dim": args.dim} if args.dim else None)
    for name, d in result["datasets"].items():
        print(f"{name}: {100 * d['score']:.2f} ({d['metric']}, optimistic {100 * d['optimistic']:.2f}, {d['queries']} queries, {d['dropped']} dropped; "
              f"{d['protocol']}; reason rate {d['reason_rate']:.2f}, {d['tokens_per_query']:.1f} tokens, {d['ms_per_query']:.0f} ms a query)")
    for key in ("image", "video", "visdoc", "overall"):
        print(f"{key}: {100 * result[key]:.2f}" if result[key] is not None else f"{key}: none")
    print(f"mode: {result['mode']}\ndatasets: {len(result['datasets'])}\nmissing: {', '.join(result['missing']) or 'none'}\n"
          f"broken: {', '.join(result['broken']) or 'none'}")
    for mode, m in result.get("modes", {}).items():
        print(f"{mode}: {100 * m['overall']:.2f} at {m['tokens_per_query']:.1f} tokens, {m['ms_per_query']:.1f} ms a query, reason rate {m['reason_rate']:.2f}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadData, ValueError) as e:
        sys.exit(f"eval.py: {e}")
