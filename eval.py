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
