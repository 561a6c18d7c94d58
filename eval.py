"""
Evaluation: MMEB-V2's 24 metrics per dataset, and every mode of reasoning with what it costs.

The idea. Candidates are ranked by the dot product of unit vectors. With --reason all, as in
train.py, each query is measured twice: never reasoning and always reasoning. The other modes follow
without another run, because rationales are greedy:
    adaptive   the always-result of a query with p_reason > threshold, else its never-result
    per_task   all or none of a dataset's queries reason, whichever scores higher on the test itself
               (direct on ties): the best that a policy can do that sees only the task's name
    random     a coin per query, with adaptive's rate: (1 - rate) never + rate always, exactly
    oracle     the better of the two results, with hindsight (direct on ties)
Adaptive should score like always and per_task at fewer tokens. What it saves, or scores above
per_task, comes from the query's content.

The maths. The rank of a positive p is pessimistic: 1 + #{wrong candidates with s >= s_p}
+ #{positives before it}. So a collapsed model has a hit@1 of 0, not 100 % (the reference's argsort
returns index 0, which is the answer in 36 image sets). Scores are float64 products rounded to
2^-25, the largest error of float32 below 1: equal vectors tie, however the corpus is cut into
chunks.
With s the score, L the set of positives, k = 1, 5, 10, and hits the positives of rank <= k:
    hit         1 if any rank <= k
    precision   |hits|/k
    recall      |hits|/|L|
    f1          harmonic mean of precision and recall
    map         sum over hits of precision@rank, over min(|L|, k)
    mrr         1/first rank <= k
    ndcg        sum over hits of g/log2(rank + 1), over the same of the ideal order
where g = grade (linear) or 2^grade - 1 (exponential), grade 1 where there is none. A dataset is the
mean over its queries; a modality and the overall are plain means over datasets.

How to run:
    python eval.py --model runs/pocket/rl --data runs/pocket/data --out DIR --reason all
    python eval.py --model Qwen/Qwen3-VL-Embedding-2B --data MMEB_V2_ROOT --out DIR \\
        --reason never --prompts qwen --frames 64 --tasks CIRR,MSVD
    torchrun --nproc_per_node=8 eval.py ...     deals each dataset's items out to 8 processes
Writes DIR/<modality>/<dataset>_{score.json, pred.jsonl, queries.jsonl}, DIR/summary.json of this
call, and DIR/leaderboard.json of all score files in DIR: --tasks can finish what broke off.

Metrics and files are those of MMEB-V2 (VLM2Vec-V2, arXiv 2507.04590), but for two things: ties are
ranked as above, and where grades are mixed the reference pairs labels and grades wrongly. Left out:
ranking on a GPU, significance, all but 100 candidates in pred.jsonl, most metadata of the
leaderboard.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import argparse
import json
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

import data
import scale
from embed import Embedder, ItemError
from model import read_json, write_json, write_rows

KS = (1, 5, 10)
PLACES = np.arange(1, KS[-1] + 1)  # of a ranking, as far as the metrics look
DISCOUNT = 1 / np.log2(PLACES + 1)
METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
KEYS = [f"{metric}@{k}" for metric in METRICS for k in KS]  # "hit@1", "hit@5" ...
MODALITIES = ("image", "video", "visdoc")
MODES = ("never", "always", "adaptive")  # of --reason all; mode_table() adds the others
GRID = 2.0**25
TOP = 100  # candidates of a query that are kept
BUDGET = 1 << 22  # scores that exist at a time
LAST = 2**32 - 1  # above every candidate number


# --------------------------------------------------------------------------------------------------
# Metrics and ranks


def ndcg(gain, at, k):
    """gain (p,) of a query's positives, at (p, 10) as in score_ranks -> what the ranking gains over
    what the best order would gain, both discounted by place."""
    best = np.sort(gain)[::-1][:k]
    ideal = best @ DISCOUNT[: len(best)]
    if not ideal:  # 2^grade - 1 of a tiny grade is 0
        return 0.0
    reached = (gain @ at) * DISCOUNT  # (10,)
    return reached[:k].sum() / ideal


def score_ranks(ranks, grades=None):
    """Ranks of a query's positives (1 = first, inf = not ranked), their grades -> (24,) as in KEYS.

    Three positives, at the ranks 2, 4 and inf: precision@5 = 2/5, recall@5 = 2/3,
    map@5 = (1/2 + 2/4)/3, ndcg@5 = (1/log 3 + 1/log 5)/(1/log 2 + 1/log 3 + 1/log 4).
    """
    linear = np.ones(len(ranks)) if grades is None else np.asarray(grades)
    exponential = 2.0**linear - 1
    at = np.reshape(ranks, (-1, 1)) == PLACES  # (p, 10): which positive stands at which place
    found = at.any(0)  # (10,)
    precisions = found.cumsum() / PLACES
    columns = []
    for k in KS:
        hits = found[:k].sum()
        precision = hits / k
        recall = hits / len(ranks)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        average = (found * precisions)[:k].sum() / min(len(ranks), k)  # so many hits are possible
        reciprocal = (found / PLACES)[:k].max()
        gains = [ndcg(linear, at, k), ndcg(exponential, at, k)]
        # In the order of METRICS.
        columns.append([hits > 0, *gains, precision, recall, f1, average, reciprocal])
    return np.array(columns, float).T.flatten()  # from (3, 8), metric by metric


def grid_scores(queries, candidates):
    """(n, d), (m, d) -> (n, m) int64: dot products in units of 2^-25. ValueError for NaN."""
    product = np.asarray(queries, np.float64) @ np.asarray(candidates, np.float64).T
    if not np.isfinite(product).all():  # NaN would sort anywhere
        raise ValueError("a vector with NaN or infinity is not ranked")
    return np.rint(product * GRID).astype(np.int64)


def rank_candidates(queries, candidates, positives, grades=None, local=None):
    """(n, d), (m, d) unit vectors, per query its positives' numbers -> (ranks, top), per query.

    ranks: of its positives, 1 = first. top: numbers of the first TOP candidates.
    local: per query the candidates it is ranked among, else all; a wrong one that is listed twice
    takes two places, as in the reference.
    """
    # 1) Of each query: its positives' scores, how many wrong candidates are ahead of each of them,
    # and the best wrong ones so far.
    scores = []
    ahead = []
    best = []
    for i, right in enumerate(positives):
        scores.append(grid_scores(queries[i : i + 1], candidates[right])[0])
        ahead.append(np.zeros(len(right), np.int64))
        best.append(np.empty(0, np.int64))

    # 2) Meet all candidates, a block at a time: all queries and a chunk of their one corpus, or a
    # query and its small corpus. Memory does not grow with the corpus, which may be a memory map.
    if local is None:
        everyone = range(len(queries))
        numbers = np.arange(len(candidates))
        chunk = max(1, BUDGET // len(queries))
        blocks = [(everyone, numbers[i : i + chunk]) for i in range(0, len(numbers), chunk)]
    else:
        blocks = [([i], np.asarray(corpus)) for i, corpus in enumerate(local)]
    for rows, numbers in blocks:
        block = grid_scores(queries[rows], candidates[numbers])  # (rows, numbers)
        # Score and number in one integer: it sorts by score and, among equal scores, puts earlier
        # candidates first. So the result does not depend on where a block ends.
        keys = (block << 32) | (LAST - numbers)
        for i, row, key in zip(rows, block, keys):
            wrong = ~np.isin(numbers, positives[i])
            in_front = row[wrong] >= scores[i][:, None]  # (positives, wrong ones)
            ahead[i] += in_front.sum(1)
            met = np.concatenate([best[i], key[wrong]])
            best[i] = np.sort(met)[-TOP:]

    # 3) Put the positives among them. A positive's rank counts the positives before it, too: those
    # of higher scores, of equal scores those of lower grades, of equal grades as they come.
    ranks = []
    top = []
    for i, right in enumerate(positives):
        grade = grades[i] if grades else np.zeros(len(right))
        order = np.lexsort((grade, -scores[i]))
        places = np.empty_like(ahead[i])
        places[order] = 1 + ahead[i][order] + np.arange(len(right))
        wrong = LAST - (best[i] & LAST)  # their numbers, the best one last
        merged = wrong[::-1].tolist()
        for place, number in sorted(zip(places, right)):
            merged.insert(place - 1, number)  # a place beyond the list appends; it is cut below
        ranks.append(places)
        top.append(merged[:TOP])
    return ranks, top


# --------------------------------------------------------------------------------------------------
# A dataset is measured


def column(rows, key):
    """One field of all rows (n,)."""
    return np.array([row[key] for row in rows])


def embed_share(embedder, items, title, names, **how):
    """n items -> (vectors (n, d), infos). title, names: what BadData calls a broken item.

    Each process embeds a part of them: of five items by two processes the first has two.
    how: of Embedder.encode. infos: what it returns of each item, and "ms", the part's mean.
    """
    n = len(items)
    world = scale.world_size()
    part = slice(n * scale.rank() // world, n * (scale.rank() + 1) // world)
    start = time.perf_counter()
    broken = []
    try:
        vectors, infos = embedder.encode(items[part], return_info=True, **how)
    except ItemError as error:
        broken.append(f"{title} {names[part][error.index]}: {error.why}")
    ms = 1000 * (time.perf_counter() - start)
    broken = scale.gather_objects(broken)
    if broken:  # on any process: all of them end in one line
        raise data.BadData(broken[0])
    for info in infos:
        info["ms"] = ms / len(infos)
    vectors = np.concatenate(scale.gather_objects([vectors]))
    return vectors, scale.gather_objects(infos)


def measure(embedder, es, modes, threshold, options):
    """A data.EvalSet under the modes asked for -> {mode: rows}. Targets are embedded directly.

    A row per query: {"scores" (24,) as in KEYS, "top": ids of the first candidates, "ms",
    "reasoned", "p_reason", "rationale", "new_tokens"}. options: more of Embedder.encode.
    """
    title = f"{es.name} candidate first met at"
    targets, _ = embed_share(
        embedder, es.candidates, title, es.cand_where, reason="never", **options
    )
    results = {}
    for mode in modes:
        if mode == "adaptive" and "always" in results:  # of MODES: nothing is left to compute
            results[mode] = []
            for never, always in zip(results["never"], results["always"]):
                results[mode].append(always if never["p_reason"] > threshold else never)
            continue
        reason = "auto" if mode == "adaptive" else mode
        how = {"reason": reason, "threshold": threshold, **options}
        vectors, rows = embed_share(embedder, es.queries, f"{es.name} query", es.query_ids, **how)
        ranks, top = rank_candidates(vectors, targets, es.positives, es.grades, es.local)
        for i, row in enumerate(rows):
            grades = es.grades[i] if es.grades else None
            row["scores"] = score_ranks(ranks[i], grades)
            row["top"] = [es.cand_ids[c] for c in top[i]]
        results[mode] = rows
    return results


def write_dataset(es, results, out):
    """The dataset's three files -> (what summary.json says of it, its records).

    results: of measure(); the last mode is the one that counts. pred.jsonl and score.json are those
    of MMEB-V2. queries.jsonl, the records, is ours: what report.py and mode_table() need.
    """
    primary = [*results.values()][-1]
    # Also where adaptive did not reason: a reader sees the rationale, summarise() wants its tokens.
    thoughts = results.get("always", primary)
    number = KEYS.index(es.metric)

    # 1) Query by query.
    predictions = []
    records = []
    for i, row in enumerate(primary):
        label = [es.cand_ids[c] for c in es.positives[i]]
        grades = es.grades[i] if es.grades else None
        predictions.append({"prediction": row["top"], "label": label, "rel_scores": grades})
        record = {
            "id": es.query_ids[i],
            "label": label,
            "top3": {},
            "p_reason": row["p_reason"],
            "reasoned": row["reasoned"],
            "rationale": thoughts[i]["rationale"],
            "new_tokens": thoughts[i]["new_tokens"],
        }
        for mode, rows in results.items():
            record[mode] = rows[i]["scores"][number]
            record[f"ms_{mode}"] = rows[i]["ms"]
            record["top3"][mode] = rows[i]["top"][:3]
        records.append(record)

    # 2) All together.
    means = column(primary, "scores").mean(0)  # (24,)
    score = dict(zip(KEYS, means.tolist()))
    score["num_pred"] = score["num_data"] = len(records)
    about = {
        "modality": es.modality,
        "protocol": es.protocol,
        "metric": es.metric,
        "queries": len(records),
        "score": score[es.metric],
        "reason_rate": column(primary, "reasoned").mean(),
        "tokens_per_query": column(primary, "new_tokens").mean(),
    }

    # 3) The files, and a line for the reader.
    if scale.is_main():
        folder = Path(out, es.modality)
        folder.mkdir(exist_ok=True, parents=True)
        write_rows(folder / f"{es.name}_pred.jsonl", predictions)
        write_rows(folder / f"{es.name}_queries.jsonl", records)
        write_json(folder / f"{es.name}_score.json", score)
        print(es.name, json.dumps(about), flush=True)
    return about, records


# --------------------------------------------------------------------------------------------------
# Modes and their cost


def plain_means(scores, modality):
    """{dataset: score}, {dataset: modality} -> means; None for a modality without a dataset."""
    means = {"overall": np.mean(list(scores.values()))}
    for kind in MODALITIES:
        group = [score for name, score in scores.items() if modality[name] == kind]
        means[kind] = np.mean(group) if group else None
    return means


def summarise(table, modality, share):
    """One mode. share: the probability that a query reasons, (n,) or one number for all. It is 0 or
    1, but for the coin the rate. Costs are means over all queries."""
    score = (1 - share) * table["never"] + share * table["always"]
    ms = (1 - share) * table["ms_never"] + share * table["ms_always"]
    datasets = {name: score[table["dataset"] == name].mean() for name in modality}
    return {
        **plain_means(datasets, modality),
        "reason_rate": np.mean(share),
        "tokens_per_query": np.mean(share * table["new_tokens"]),
        "ms_per_query": ms.mean(),
        "datasets": datasets,
    }


def mode_table(records, modality, threshold):
    """{dataset: its records}, {dataset: "image", "video" or "visdoc"} -> (modes, curve).

    modes: {mode: what summarise() returns}. curve: adaptive at 41 thresholds.
    """
    # 1) All queries of all datasets in one table.
    rows = []
    for name, queries in records.items():
        for query in queries:
            rows.append({**query, "dataset": name})
    fields = ("dataset", "never", "always", "p_reason", "new_tokens", "ms_never", "ms_always")
    table = {key: column(rows, key) for key in fields}  # columns (n,)

    # 2) A mode is who reasons.
    per_task = np.zeros(len(rows), bool)
    for name in records:
        here = table["dataset"] == name
        gain = table["always"][here] - table["never"][here]
        per_task[here] = gain.mean() > 1e-9  # above what rounding makes of a tie
    adaptive = table["p_reason"] > threshold
    shares = {
        "never": 0.0,
        "always": 1.0,
        "adaptive": adaptive,
        "per_task": per_task,
        "random": adaptive.mean(),
        "oracle": table["always"] > table["never"],  # not >=: equal scores cost no tokens
    }
    modes = {mode: summarise(table, modality, share) for mode, share in shares.items()}

    # 3) The dial: adaptive again, at other thresholds.
    curve = []
    for limit in np.linspace(0, 1, 41).round(6).tolist():
        row = summarise(table, modality, table["p_reason"] > limit)
        point = {key: row[key] for key in ("overall", "tokens_per_query", "reason_rate")}
        curve.append({"threshold": limit, **point})
    return modes, curve


def adaptivity(records, truth):
    """Does the decision follow the content within a dataset? -> {dataset: {auc, ...}}.

    truth: {"dataset/query id": steps it needs}. A dataset without any known steps is left out.
    auc: the chance that a query of 2 or more steps has a higher p_reason than one of 0 (ties count
    half), None where a dataset lacks either kind. reason_rate, never, always: {steps: mean}.
    """
    out = {}
    for name, rows in records.items():
        # An id is NAME/row, or the data's own without NAME.
        ids = [str(row["id"]).removeprefix(f"{name}/") for row in rows]
        steps = np.array([truth.get(f"{name}/{key}", -1) for key in ids])  # (n,)
        known = np.unique(steps[steps >= 0])
        if not len(known):
            continue
        p_reason = column(rows, "p_reason")
        many = p_reason[steps >= 2]
        none = p_reason[steps == 0]
        gap = np.subtract.outer(many, none)  # each against each
        auc = np.mean((gap > 0) + 0.5 * (gap == 0)) if gap.size else None
        out[name] = {"auc": auc}
        fields = {"reason_rate": "reasoned", "never": "never", "always": "always"}
        for title, field in fields.items():
            values = column(rows, field)
            out[name][title] = {str(n): values[steps == n].mean() for n in known}
    return out


# --------------------------------------------------------------------------------------------------
# All datasets


# Their labels were corrected in November 2025: the leaderboard calls them "-fixed".
RELABELLED = ("ViDoSeek-page", "MMLongBench-page")
LEADERBOARD_FIELDS = (  # of its "metadata"
    "model_name model_backbone model_size embedding_dimension max_length_tokens "
    "model_release_date data_source url report_generated_date"
).split()


def leaderboard(out, specs):
    """The leaderboard's file, of the score files that are there. A string stands for a dataset that
    was not run, as in the reference's script."""
    metadata = dict.fromkeys(LEADERBOARD_FIELDS)
    metadata["data_source"] = "Self-Reported"
    metadata["report_generated_date"] = datetime.now().isoformat()
    table = {modality: {} for modality in MODALITIES}
    for spec in specs:
        name = spec["name"]
        modality = spec["modality"]
        path = Path(out, modality, f"{name}_score.json")
        title = f"{name}-fixed" if name in RELABELLED else name
        absent = "FILE_N/A" if path.parent.exists() else "DIR_N/A"
        table[modality][title] = read_json(path) if path.exists() else absent
    return {"metadata": metadata, "metrics": table}


def evaluate(
    embedder, root, out, tasks=None, modes=MODES, threshold=0.5, options=None, truth=None, **reading
):
    """Every dataset of a root (or the tasks named) -> the summary, written with the other files.

    modes: MODES, or a list of one of them. The score files hold the last one; of MODES the summary
    also has modes, curve and adaptivity (which wants the truth). A dataset that the root does not
    have is named in "missing"; anything broken in the others stops the run.
    options: of Embedder.encode (batch_size, dim, max_new_tokens). reading: of data.load_eval
    (limit, frames, prompts). Several processes share the items; all return the same summary.
    """
    specs = data.tables(root, "eval")
    asked = data.wanted(specs, tasks)

    # 1) One by one.
    datasets = {}
    records = {}
    missing = []
    for spec in asked:
        try:
            es = data.load_eval(root, spec, **reading)
        except data.Missing:
            missing.append(spec["name"])
            continue
        results = measure(embedder, es, modes, threshold, options or {})
        datasets[es.name], records[es.name] = write_dataset(es, results, out)
    if not datasets:
        raise data.BadData(f"{root}: none of its {len(asked)} test sets is there")

    # 2) What they say together.
    modality = {name: about["modality"] for name, about in datasets.items()}
    scores = {name: about["score"] for name, about in datasets.items()}
    summary = {
        **plain_means(scores, modality),
        "missing": missing,
        "datasets": datasets,
        "mode": modes[-1],
        "threshold": threshold,
        "reading": reading,
    }
    if {"never", "always"} <= set(modes):
        summary["modes"], summary["curve"] = mode_table(records, modality, threshold)
        summary["adaptivity"] = adaptivity(records, truth or {})
    if scale.is_main():
        write_json(Path(out, "leaderboard.json"), leaderboard(out, specs))
        write_json(Path(out, "summary.json"), summary)
    return summary


# --------------------------------------------------------------------------------------------------
# Command line

REASON = {"auto": ["adaptive"], "never": ["never"], "always": ["always"], "all": MODES}


def main(argv=None):
    """Options in, files and the numbers that matter out."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint folder or hub id")
    add("--revision", help="of a model on the hub")
    add("--data", required=True, help="the root; python data.py --check ROOT says what is in it")
    add("--out", required=True, help="folder for the results")
    add("--tasks", help="only these datasets, with commas")
    add("--reason", choices=[*REASON], default="auto", help="all: compare")
    add("--threshold", type=float, default=0.5, help="reason when p_reason is above it (0.5)")
    add("--max_new_tokens", type=data.count, default=128, help="of a rationale (128; pocket 48)")
    add("--batch_size", type=data.count, default=16, help="items embedded together (16)")
    add("--dim", type=data.count, help="only the first numbers of each vector (Matryoshka)")
    add("--prompts", choices=["vlm2vec", "qwen"], default="vlm2vec", help="whose wording")
    add("--frames", type=data.count, help="per video (8; Qwen3-VL-Embedding takes 64)")
    add("--limit", type=data.count, help="so many queries a dataset, for a quick look")
    args = parser.parse_args(argv)
    if not np.isfinite(args.threshold):  # no JSON has such a number
        raise ValueError(f"--threshold {args.threshold}: expected a finite number")
    tasks = None if args.tasks is None else args.tasks.split(",")
    data.wanted(data.tables(args.data, "eval"), tasks)  # before a model is opened

    device = scale.join_processes()
    Path(args.out).mkdir(exist_ok=True, parents=True)  # a path that is a file is noticed now
    embedder = Embedder.from_pretrained(args.model, device, revision=args.revision)
    if not embedder.processor.trained_here:
        args.threshold = 1.0
        print("this checkpoint never learnt to decide: adaptive answers directly")
    options = {
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "dim": args.dim,
    }
    reading = {"limit": args.limit, "frames": args.frames, "prompts": args.prompts}
    modes = REASON[args.reason]
    summary = evaluate(
        embedder, args.data, args.out, tasks, modes, args.threshold, options, **reading
    )
    if not scale.is_main():
        return
    for key in (*MODALITIES, "overall", "missing"):
        print(f"{key}: {summary[key]}")
    for mode, row in summary.get("modes", {}).items():
        print(f"{mode}: {row['overall']:.4f} at {row['tokens_per_query']:.1f} tokens a query")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"eval.py: {error}")
    if "RANK" in os.environ:  # see the end of train.py
        sys.stdout.flush()
        os._exit(0)
