"""
Evaluation: MMEB-V2's 26 numbers per dataset, and every mode of reasoning with what it costs.

The idea. A test set is queries, candidates and the right ones among them. Candidates are ranked by
the dot product of unit vectors, and each query is measured twice: never reasoning and always
reasoning. The other modes follow without another run, because rationales are greedy:
    adaptive   the always-result of a query with p_reason > threshold, else its never-result
    per_task   all or none of a dataset's queries reason, whichever scores higher on the test itself
               (direct on ties): the best that a policy can do that sees only the task's name
    random     a coin per query, with adaptive's rate
    oracle     the better of the two results, with hindsight (direct on ties)
Adaptive must beat never AND always; what it has above per_task comes from the query's content.

The maths. The rank of a positive p is pessimistic: 1 + #{wrong candidates with s >= s_p}
+ #{positives before it}. A collapsed model so scores 0, not 100 % (the reference's argsort returns
index 0, which is the answer in 36 image sets). With L positives and k = 1, 5, 10:
    hit         1 if any rank <= k
    precision   |hits|/k
    recall      |hits|/|L|, 1 if L is empty
    f1          harmonic mean of precision and recall
    map         sum over hits of precision@rank, over min(|L|, k)
    mrr         1/first rank <= k
    ndcg        sum over hits of g/log2(rank + 1), over the same of the ideal order
where g = grade (linear) or 2^grade - 1 (exponential), grade 1 where there is none. A dataset is the
mean over its queries; a modality and the overall are plain means over datasets. The coin's
expectation is exact: (1 - rate) never + rate always. Scores are float64 products rounded to 2^-25,
the resolution of float32 below 1: equal vectors tie, however the corpus is cut into chunks.

How to run:
    python eval.py --model runs/pocket/rl --data runs/pocket/data --out DIR --threshold 0.5
    python eval.py --model Qwen/Qwen3-VL-Embedding-2B --data MMEB_V2_ROOT --out DIR \\
        --reason never --prompts qwen --frames 64 --tasks CIRR,MSVD
Writes DIR/<modality>/<dataset>_{score.json, pred.jsonl, queries.jsonl}, DIR/leaderboard.json and
DIR/summary.json. Vectors lie in DIR/cache by content: a broken run goes on where it stopped.

The numbers and the leaderboard's file are those of MMEB-V2 (VLM2Vec-V2, arXiv 2507.04590).
Left out: ranking on a GPU, significance, all but 100 candidates in pred.jsonl, the leaderboard's
metadata. Not followed: the reference pairs labels and grades wrongly where grades are mixed.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import sys
import time

import numpy as np

import data
from embed import Embedder, ItemError
from model import read_json, write_json

KS = (1, 5, 10)
METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
KEYS = [f"{metric}@{k}" for metric in METRICS for k in KS]  # num_pred and num_data make 26
MODALITIES = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}
MODES = ("never", "always", "adaptive")  # the measured ones; mode_table() derives the others
# The leaderboard names two page sets so since their labels were corrected in November 2025.
FIXED = ("ViDoSeek-page", "MMLongBench-page")
ABOUT = "model_name model_backbone model_size embedding_dimension max_length_tokens"
ABOUT += " model_release_date data_source url report_generated_date"  # of leaderboard.json
GRID = 2.0**25
TOP = 100  # candidates of a query that are kept
BUDGET = 1 << 22  # scores that exist at a time
LAST = 2**32 - 1  # above every candidate number


# --------------------------------------------------------------------------------------------------
# Metrics and ranks


def score_ranks(ranks, grades=None):
    """Ranks of a query's positives (1 = first, inf = not ranked), their grades -> (24,) as in KEYS.

    Three positives, at the ranks 2, 4 and inf: precision@5 = 2/5, recall@5 = 2/3,
    map@5 = (1/2 + 2/4)/3, ndcg@5 = (1/log 3 + 1/log 5)/(1/log 2 + 1/log 3 + 1/log 4).
    """
    grades = np.ones(len(ranks)) if grades is None else np.asarray(grades)
    place = np.arange(1, KS[-1] + 1)
    discount = 1 / np.log2(place + 1)
    at = np.reshape(ranks, (-1, 1)) == place  # (p, 10): which positive stands at which place
    found = at.any(0)
    precisions = found.cumsum() / place
    gains = {"ndcg_linear": grades, "ndcg_exponential": 2.0**grades - 1}
    score = {}
    for k in KS:
        hits = found[:k].sum()
        precision = hits / k
        recall = hits / len(ranks) if len(ranks) else 1.0
        score[f"hit@{k}"] = hits > 0
        score[f"precision@{k}"] = precision
        score[f"recall@{k}"] = recall
        score[f"f1@{k}"] = 2 * precision * recall / (precision + recall) if hits else 0.0
        score[f"map@{k}"] = (found * precisions)[:k].sum() / max(1, min(len(ranks), k))
        score[f"mrr@{k}"] = (found / place)[:k].max()
        for name, gain in gains.items():
            best = np.sort(gain)[::-1][:k]
            ideal = best @ discount[: len(best)]
            reached = (gain @ at * discount)[:k].sum()
            score[f"{name}@{k}"] = reached / ideal if ideal > 0 else 0.0
    return np.array([score[key] for key in KEYS], float)


def grid_scores(queries, candidates):
    """(n, d), (m, d) -> (n, m) int64: dot products in units of 2^-25. ValueError for NaN."""
    product = np.asarray(queries, np.float64) @ np.asarray(candidates, np.float64).T
    if not np.isfinite(product).all():  # NaN would sort anywhere
        raise ValueError("a vector with NaN or infinity is not ranked")
    return np.rint(product * GRID).astype(np.int64)


def blocks(queries, candidates, local):
    """What is scored at a time: pairs (numbers of queries, numbers of candidates).

    A query and its small corpus, or all queries and a chunk of their one corpus: memory does not
    grow with the corpus, which may be a memory-mapped array.
    """
    if local is not None:
        for i, corpus in enumerate(local):
            yield [i], np.asarray(corpus)
        return
    size = max(1, BUDGET // len(queries))
    for first in range(0, len(candidates), size):
        yield range(len(queries)), np.arange(first, min(first + size, len(candidates)))


def rank(queries, candidates, positives, grades=None, local=None):
    """(n, d), (m, d) unit vectors, per query its positives' numbers -> (ranks, top), per query.

    ranks: of its positives, 1 = first. top: numbers of the first TOP candidates.
    local: per query the candidates it is ranked among, else all; a wrong one that is listed twice
    takes two places, as in the reference.
    """
    # Of each query: the scores of its positives, how many wrong candidates are ahead of each of
    # them, and the best wrong candidates so far.
    score = [grid_scores(queries[i : i + 1], candidates[p])[0] for i, p in enumerate(positives)]
    ahead = [np.zeros(len(p), np.int64) for p in positives]
    best = [np.empty(0, np.int64) for _ in positives]
    for rows, numbers in blocks(queries, candidates, local):
        scores = grid_scores(queries[rows], candidates[numbers])  # (rows, numbers)
        # Score and number in one integer: sorting it puts higher scores first and, among equal
        # scores, earlier candidates. So the result does not depend on where a chunk ends.
        keys = (scores << 32) | (LAST - numbers)
        for i, row, key in zip(rows, scores, keys):
            wrong = ~np.isin(numbers, positives[i])
            ahead[i] += (row[wrong] >= score[i][:, None]).sum(1)
            best[i] = np.sort(np.concatenate([best[i], key[wrong]]))[-TOP:]
    ranks, top = [], []
    for i, right in enumerate(positives):
        place = np.arange(len(right))
        grade = grades[i] if grades else place
        order = np.lexsort((place, grade, -score[i]))  # of equal scores the lower grade first
        ranks.append(np.empty(len(right), np.int64))
        ranks[i][order] = 1 + ahead[i][order] + place
        first = (LAST - (best[i][::-1] & LAST)).tolist()
        for position, number in sorted(zip(ranks[i], right)):  # the wrong ones stand between
            first.insert(position - 1, number)
        top.append(first[:TOP])
    return ranks, top


class VectorCache:
    """FOLDER/<hash>.npy (n, d) float32 and FOLDER/<hash>.json, infos and time, of lists of items.

    options: of Embedder.encode, the same for all lists. Vectors are told apart by the model's
    weights and settings: its name would not do, as training writes new weights over old ones.
    """

    def __init__(self, embedder, folder, options):
        self.embedder = embedder
        self.folder = folder
        self.options = options
        weights = hashlib.sha256()
        for name, value in embedder.model.state_dict().items():
            weights.update(f"{name} {value.dtype}".encode())
            weights.update(value.float().cpu().numpy().tobytes())
        settings = vars(embedder.processor).items()
        simple = [pair for pair in settings if isinstance(pair[1], (int, float, str))]
        self.model = f"{weights.hexdigest()} {simple}"
        os.makedirs(folder, exist_ok=True)

    def embed(self, items, names, **how):
        """n items -> (vectors (n, d), infos, ms per item). BadData names an item that is broken.

        names: what an error calls each item. how: reason and threshold of Embedder.encode.
        infos: per item {"reasoned", "p_reason", "rationale", "new_tokens"}.
        """
        options = {**self.options, **how}
        # The file's name is a hash of everything that the vectors depend on.
        files = [getattr(ref, "table", ref) for item in items for ref in data.refs(item)]
        stats = [os.stat(path) for path in files if os.path.exists(path)]
        changed = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        key = repr([self.model, options, items, changed])
        path = os.path.join(self.folder, hashlib.sha256(key.encode()).hexdigest())
        if not os.path.exists(path + ".json"):  # written last: with it the vectors are there
            start = time.perf_counter()
            try:
                vectors, infos = self.embedder.encode(items, return_info=True, **options)
            except ItemError as error:
                raise data.BadData(f"{names[error.index]}: {error.why}") from error
            ms = 1000 * (time.perf_counter() - start) / len(items)
            np.save(path + ".npy", vectors)
            write_json(path + ".json", [infos, ms])
        infos, ms = read_json(path + ".json")
        return np.load(path + ".npy", mmap_mode="r"), infos, ms


def measure(es, cache, modes, threshold):
    """A data.EvalSet under the modes asked for -> {mode: rows}. Targets are embedded directly.

    A row per query: {"scores" (24,) as in KEYS, "top": ids of the first candidates, "ms",
    "reasoned", "p_reason", "rationale", "new_tokens"}.
    """
    seen = zip(es.cand_ids, es.cand_where)
    names = [f"{es.name} candidate {key} (first met at {row})" for key, row in seen]
    targets, _, _ = cache.embed(es.candidates, names, reason="never")
    names = [f"{es.name} query {key}" for key in es.query_ids]
    grades = es.grades or [None] * len(names)
    results = {}
    for mode in modes:
        if mode == "adaptive" and {"never", "always"} <= set(results):
            pairs = zip(results["never"], results["always"])
            results[mode] = [a if n["p_reason"] > threshold else n for n, a in pairs]
            continue
        how = {"reason": mode}
        if mode == "adaptive":
            how = {"reason": "auto", "threshold": threshold}
        vectors, infos, ms = cache.embed(es.queries, names, **how)
        ranks, top = rank(vectors, targets, es.positives, es.grades, es.local)
        for i, info in enumerate(infos):
            info["scores"] = score_ranks(ranks[i], grades[i])
            info["top"] = [es.cand_ids[c] for c in top[i]]
            info["ms"] = ms
        results[mode] = infos
    return results


def write_lines(path, rows):
    """One JSON object a line. ASCII, so half an emoji stops nothing."""
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)


def write_dataset(es, results, primary, out):
    """The dataset's three files -> (its 26 numbers, rows of queries.jsonl).

    results: of measure(); primary: the mode that counts. pred.jsonl and score.json are those of
    MMEB-V2. queries.jsonl is ours: per query the decision, the rationale, and per mode the score,
    the first three candidates and ms, which is all that report.py and mode_table() need.
    """
    # A rationale is of interest where adaptive did not ask for it, too.
    thoughts = results.get("always", results[primary])
    predictions, records = [], []
    for i, query in enumerate(es.query_ids):
        row = results[primary][i]
        label = [es.cand_ids[c] for c in es.positives[i]]
        grades = es.grades[i] if es.grades else None
        predictions.append({"prediction": row["top"], "label": label, "rel_scores": grades})
        record = {"id": query, "label": label, "top3": {}}
        record |= {key: row[key] for key in ("p_reason", "reasoned")}
        record |= {key: thoughts[i][key] for key in ("rationale", "new_tokens")}
        for mode, rows in results.items():
            record[mode] = rows[i]["scores"][KEYS.index(es.metric)]
            record[f"ms_{mode}"] = rows[i]["ms"]
            record["top3"][mode] = rows[i]["top"][:3]
        records.append(record)
    means = np.mean([row["scores"] for row in results[primary]], axis=0)
    score = dict(zip(KEYS, means.tolist()))
    score["num_pred"] = score["num_data"] = len(records)
    start = os.path.join(out, es.modality, es.name)
    os.makedirs(os.path.dirname(start), exist_ok=True)
    write_lines(start + "_pred.jsonl", predictions)
    write_lines(start + "_queries.jsonl", records)
    write_json(start + "_score.json", score)
    return score, records


# --------------------------------------------------------------------------------------------------
# Modes and their cost


def plain_means(scores, modality):
    """{dataset: score}, {dataset: modality} -> means; None for a modality without a dataset."""
    groups = {"overall": list(scores.values())}
    for kind in MODALITIES:
        groups[kind] = [score for name, score in scores.items() if modality[name] == kind]
    return {kind: float(np.mean(group)) if group else None for kind, group in groups.items()}


def summarise(table, modality, share):
    """One mode. share: the probability that a query reasons, (n,) or one number for all.

    It is 0 or 1 but for the coin, whose expectation is exact so. Scores are means over datasets of
    means over queries, costs are means over all queries.
    """
    score = (1 - share) * table["never"] + share * table["always"]
    ms = (1 - share) * table["ms_never"] + share * table["ms_always"]
    datasets = {name: float(score[table["dataset"] == name].mean()) for name in modality}
    return {
        **plain_means(datasets, modality),
        "reason_rate": float(np.mean(share)),
        "tokens_per_query": float(np.mean(share * table["new_tokens"])),
        "ms_per_query": float(ms.mean()),
        "datasets": datasets,
    }


def mode_table(records, modality, threshold=0.5):
    """Records of never and always -> (modes, curve), as report.json has them.

    records, modality: {dataset: rows of its queries.jsonl}, {dataset: "image", "video" or "visdoc"}
    modes: {mode: what summarise() returns}. curve: adaptive at 41 thresholds.
    """
    rows = [{**row, "dataset": name} for name in records for row in records[name]]
    columns = ("dataset", "never", "always", "p_reason", "new_tokens", "ms_never", "ms_always")
    table = {key: np.array([row[key] for row in rows]) for key in columns}  # (n,) each
    oracle = table["always"] > table["never"]  # not >=: equal scores cost no tokens
    per_task = np.zeros(len(rows), bool)
    for name in records:
        here = table["dataset"] == name
        per_task[here] = table["always"][here].mean() > table["never"][here].mean()
    adaptive = table["p_reason"] > threshold
    shares = {"never": 0.0, "always": 1.0, "adaptive": adaptive, "per_task": per_task}
    shares |= {"random": adaptive.mean(), "oracle": oracle}
    modes = {mode: summarise(table, modality, share) for mode, share in shares.items()}
    curve = []
    for limit in np.linspace(0, 1, 41).round(6).tolist():
        point = summarise(table, modality, table["p_reason"] > limit)
        shown = {key: point[key] for key in ("overall", "tokens_per_query", "reason_rate")}
        curve.append({"threshold": limit, **shown})
    return modes, curve


def adaptivity(records, truth):
    """Does the decision follow the content within a dataset? -> {dataset: {auc, ...}}.

    records: {dataset: rows of its queries.jsonl}; truth: {"dataset/query id": steps it needs}.
    auc: the chance that a query of 2 or more steps has a higher p_reason than one of 0 (ties count
    half), None where a dataset lacks either kind. reason_rate, never, always: {steps: mean}.
    A dataset without any known steps is left out.
    """
    out = {}
    for name, rows in records.items():
        # Ids that come from the data need not name their dataset.
        ids = [f"{name}/" + str(row["id"]).removeprefix(f"{name}/") for row in rows]
        steps = np.array([truth.get(key, -1) for key in ids])  # (n,)
        if steps.max() < 0:
            continue
        p_reason = np.array([row["p_reason"] for row in rows])
        gap = np.subtract.outer(p_reason[steps >= 2], p_reason[steps == 0])  # each against each
        auc = float(np.mean((gap > 0) + 0.5 * (gap == 0))) if gap.size else None
        out[name] = {"auc": auc, "reason_rate": {}, "never": {}, "always": {}}
        for key, column in zip(("reason_rate", "never", "always"), ("reasoned", *MODES)):
            values = np.array([row[column] for row in rows])
            for count in np.unique(steps[steps >= 0]):
                out[name][key][str(count)] = float(values[steps == count].mean())
    return out


def aggregate(metrics, rows):
    """{dataset: 26 numbers}, rows of the table -> means, and the names of what is missing."""
    modality = {row["name"]: row["modality"] for row in rows}
    missing = [name for name in modality if name not in metrics]
    there = [name for name in modality if name in metrics]
    scores = {name: metrics[name][MODALITIES[modality[name]]] for name in there}
    return {**plain_means(scores, modality), "missing": missing}


def leaderboard(metrics, rows):
    """The leaderboard's file; a string stands for a dataset that was not run, as in its script."""
    metadata = dict.fromkeys(ABOUT.split()) | {"data_source": "Self-Reported"}
    metadata["report_generated_date"] = datetime.datetime.now().isoformat()
    table = {modality: {} for modality in MODALITIES}
    ran = {row["modality"] for row in rows if row["name"] in metrics}
    for row in rows:
        absent = "FILE_N/A" if row["modality"] in ran else "DIR_N/A"
        name = row["name"] + "-fixed" * (row["name"] in FIXED)
        table[row["modality"]][name] = metrics.get(row["name"], absent)
    return {"metadata": metadata, "metrics": table}


def evaluate(
    embedder, root, out, tasks=None, modes=MODES, threshold=0.5, options=None, truth=None, **reading
):
    """Every dataset of a root (or the tasks named) -> the summary, written with the other files.

    The score files hold adaptive where it is among the modes, else the first mode. A dataset that
    the root does not have is named in "missing"; anything broken in the others stops the run.
    With never and always the summary has modes, curve and adaptivity (which wants the truth).
    options: more of Embedder.encode (batch_size, dim, max_new_tokens).
    reading: more of data.load_eval (limit, frames, prompts).
    """
    if not math.isfinite(threshold):
        raise ValueError(f"threshold {threshold}: a finite number is wanted")
    rows = data.tables(root, "eval")
    asked = data.wanted(rows, tasks)
    primary = "adaptive" if "adaptive" in modes else modes[0]
    cache = VectorCache(embedder, os.path.join(out, "cache"), options or {})
    metrics, datasets, records = {}, {}, {}
    for row in asked:
        try:
            es = data.load_eval(root, row, **reading)
        except data.Missing:
            continue  # aggregate() names it
        results = measure(es, cache, modes, threshold)
        metrics[es.name], records[es.name] = write_dataset(es, results, primary, out)
        about = {key: getattr(es, key) for key in ("modality", "protocol", "metric")}
        about |= {"queries": len(es.queries), "score": metrics[es.name][es.metric]}
        about["reason_rate"] = np.mean([row["reasoned"] for row in results[primary]])
        about["tokens_per_query"] = np.mean([row["new_tokens"] for row in results[primary]])
        datasets[es.name] = about
        print(es.name, json.dumps(about), flush=True)
    if not datasets:
        raise data.BadData(f"{root}: none of its {len(asked)} test sets is there")
    summary = {**aggregate(metrics, asked), "datasets": datasets}
    summary |= {"mode": primary, "threshold": threshold, "reading": reading}
    if {"never", "always"} <= set(modes):
        modality = {name: row["modality"] for name, row in datasets.items()}
        summary["modes"], summary["curve"] = mode_table(records, modality, threshold)
        summary["adaptivity"] = adaptivity(records, truth or {})
    # Calls with other tasks, but the same model and options, fill one leaderboard.
    path = os.path.join(out, "summary.json")
    earlier = read_json(path) if os.path.exists(path) else {}
    summary["setting"] = json.dumps([cache.model, primary, threshold, options, reading])
    if earlier.get("setting") == summary["setting"]:
        metrics = {**earlier["metrics"], **metrics}
    summary["metrics"] = metrics
    write_json(os.path.join(out, "leaderboard.json"), leaderboard(metrics, rows))
    write_json(path, summary)
    return summary


def positive(text):
    """A type for argparse, which puts the option's name before the message."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def main(argv=None):
    """Options in, files and the numbers that matter out."""
    # Without the usage text a wrong option ends in one line.
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint folder or hub id")
    add("--revision", help="of a model on the hub")
    add("--data", required=True, help="the root; python data.py --check ROOT says what is in it")
    add("--out", required=True, help="folder for the results")
    add("--tasks", help="only these datasets, with commas")
    add("--reason", choices=["auto", "never", "always", "all"], default="auto", help="all: compare")
    add("--threshold", type=float, default=0.5, help="reason when p_reason is above it (0.5)")
    add("--max_new_tokens", type=positive, default=128, help="of a rationale (128)")
    add("--batch_size", type=positive, default=16, help="items embedded together (16)")
    add("--dim", type=positive, help="only the first numbers of each vector (Matryoshka)")
    add("--prompts", choices=["vlm2vec", "qwen"], default="vlm2vec", help="whose wording")
    add("--frames", type=positive, help="per video (8; Qwen3-VL-Embedding takes 64)")
    add("--limit", type=positive, help="so many queries a dataset, for a quick look")
    args = parser.parse_args(argv)
    modes = {"auto": ["adaptive"], "all": MODES}.get(args.reason, [args.reason])
    tasks = None if args.tasks is None else args.tasks.split(",")
    options = {key: vars(args)[key] for key in ("batch_size", "max_new_tokens", "dim")}
    reading = {key: vars(args)[key] for key in ("limit", "frames", "prompts")}
    data.wanted(data.tables(args.data, "eval"), tasks)  # wrong names end here, before the model
    embedder = Embedder.from_pretrained(args.model, revision=args.revision)
    where = (embedder, args.data, args.out, tasks)
    summary = evaluate(*where, modes, args.threshold, options, **reading)
    for key in (*MODALITIES, "overall", "missing"):
        print(f"{key}: {summary[key]}")
    for mode, row in summary.get("modes", {}).items():
        print(f"{mode}: {row['overall']:.4f} at {row['tokens_per_query']:.1f} tokens a query")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
