"""
Counterfactual selection of rationales: which words, if any, explain why this query belongs to this target?

The idea. A rationale that merely looks like reasoning teaches a model the form of reasoning. So every candidate r of a pair (q, t) is
put through a controlled experiment on one fixed candidate set C (the target and hard and random negatives):
    m(q, r)      = log softmax_{c in C}( e(q, r)·e(c, ∅) / temperature )[t]       a margin: the positive AGAINST the others
    Δ(r)         = m(q, r) − m(q, ∅)                                             with minus without      [the paper's counterfactual]
    Δ_placebo(r) = m(q, r') − m(q, ∅)      r' = what the same worker wrote about another pair of the task with another target   [ours]
    Δ_guess      = −log|C| − m(q, ∅)       what knowing nothing would gain over a direct embedding that is sure of a wrong target  [ours]
    keep r  iff  Δ(r) > Δ_placebo(r)  and  Δ(r) − max(0, Δ_guess) > t            words about this pair helped, neither form nor doubt
    t            one per shelf (what one worker wrote for one dataset): the smallest of margin and the shelf's own Δs above it at which luck
                 explains at most a share `fdr` of what passes, (1 + placebos above t) <= fdr · (rationales above t); without one the
                 shelf keeps nothing. A worker or dataset without placebos has nothing that measures its luck, and is taken at the margin [ours]
    weight       w = softmax(Δ / T) over the kept ones: their posterior under a uniform prior (∅ is left to the decision)
A margin of log 2 asks a rationale to double the target's probability; so where the direct embedding already gives it a half,
nothing can be kept: easy pairs select themselves out. Pairs with none kept teach the decision token "do not reason".
The shelf's threshold counts as the knockoff filter does (Barber & Candès 2015, the "+1" version), but every placebo, not only those that
beat their rationale: an evaluator that is easily impressed names the right one of ten
answers once in ten times whatever it reads, so single rationales pass by luck; placebos show how many (with and without it:
results/selection.txt).
The evaluator never trained on the pair that it judges: two warm-up embedders are cross-fitted on the two halves of the pairs [ours]. What an
evaluator has seen a dozen times it knows by heart, and then little can be kept; seen three times, half the pairs lost cost a little recall (results/crossfit.txt).

`rule` offers the ablations: full | positive_only (Δ of the positive's cosine alone, in units of the temperature: "false-helpful" for
15.7 % of cases in the SURE paper) | no_placebo | none (keep everything).

How to run (inside a run it is the stages propose and select of train.py):
    python select.py --write-requests requests.jsonl --data ROOT --model-name NAME [--k 4]     OpenAI batch format, pictures as data URLs
    vllm run-batch -i requests.jsonl -o responses.jsonl --model NAME --runner generate         or any hosted model, on as many machines as you have
    python select.py --read-responses responses.jsonl --worker NAME --out rationales.jsonl
    python select.py --audit runs/pocket                                                       a pocket run's judgements under other rules

About the name: the standard library has a module `select` too, and subprocess, hence torch, import it. Where that is a shared library,
this file hides it. So when it is *imported* as `select` the lines below hand the real module over; nothing here is imported by that
name. train.py loads this file by its path. The `def`s that then still run are harmless: the importer already holds the real module.

Left out: rationales for targets inside --write-requests (see --sides), judges other than an embedder, learned thresholds.
Source: the design notes (not in this folder), sections 3, 4 and 8; the counterfactual is MMEmb-R1's (arXiv 2604.06156, abstract), the
formula is ours.
"""

import sys

if __name__ == "select":
    def _hand_over():
        import os
        from importlib.machinery import BuiltinImporter, PathFinder
        from importlib.util import module_from_spec

        here = os.path.realpath(os.path.dirname(os.path.abspath(__file__)))
        mine = lambda p: os.path.realpath(p) == here or os.path.exists(os.path.join(p, "pocket.py"))   # a fork's would ask ours, for ever
        elsewhere = [p for p in sys.path if not mine(p or os.getcwd())]
        spec = BuiltinImporter.find_spec("select") or PathFinder.find_spec("select", elsewhere)
        if spec is None or spec.loader is None:
            raise ImportError(f"there is no standard library 'select' besides {__file__}")
        real = module_from_spec(spec)
        spec.loader.exec_module(real)            # run it first, publish it second: other threads must not see it half made
        globals().update({k: v for k, v in vars(real).items() if not k.startswith("__")})
        sys.modules["select"] = real

    _hand_over()
else:
    import argparse
    import base64
    import collections
    import io
    import json
    import math
    import os

    import numpy as np
    import torch
    from tqdm import tqdm

    import data as loader
    from embed import collate, pool
    from model import read_json

# Below: constants and functions only, none with a name that the real `select` has; nothing that imports or computes (see above).

MANY = 4096                                                      # of more than these, draw a few instead of shuffling all for every pair: n, not n²
RULES = ("full", "positive_only", "no_placebo", "none")
PROMPTS = (  # several ways to ask, so that one model is several workers
    "Think step by step about what the {side} shows or asks for, look up whatever is needed, and end with what should be found.",
    "List the facts in the {side} that matter for finding its match, one after the other, then draw the conclusion.",
    "Describe the {side} briefly and precisely, then say in a few words what its match must look like.",
    "Work out the answer to the {side}. Show every intermediate result. End with the answer alone.")


# ---------------------------------------------------------------------------------------------------------------------
# The experiment


def choose_placebos(pairs, rationales, rng):
    """For every pair and worker a rationale by the same worker about another pair of the same dataset with another target.

    pairs [{"id", "dataset", "answer" (a key that equal targets share)}]; rationales {id: {worker: text}} -> {id: {worker: text or None}}.
    None where 50 draws find none. Another pair with the same target would be no placebo: its words may well fit.
    """
    shelves = {}
    for p in pairs:
        for worker, text in rationales.get(p["id"], {}).items():
            shelves.setdefault((p["dataset"], worker), []).append((p["answer"], text))

    def one(p, worker):
        shelf = shelves[p["dataset"], worker]
        at = rng.permutation(len(shelf))[:50] if len(shelf) <= MANY else rng.integers(len(shelf), size=50)
        return next((shelf[i][1] for i in at if shelf[i][0] != p["answer"]), None)

    return {p["id"]: {worker: one(p, worker) for worker in rationales.get(p["id"], {})} for p in pairs}


def candidate_sets(pairs, rng, size=16):
    """One fixed candidate set per pair: its target first, its own hard negatives, then random targets of its dataset; all different.

    pairs [{"dataset", "target" (index into a list of targets), "answer", "negatives" [indices]}] -> int array (n, size), short rows
    padded with -1. `size` 16: chance is 1/16, low enough that a rationale has room to help.
    """
    pools, out = {}, np.full((len(pairs), size), -1)
    for p in pairs:
        pools.setdefault(p["dataset"], {}).setdefault(p["answer"], p["target"])
    pools = {dataset: list(targets.items()) for dataset, targets in pools.items()}
    for i, p in enumerate(pairs):
        pick = list(dict.fromkeys([p["target"], *p["negatives"][: size // 2]]))     # a negative may be another pair's target, or come twice
        some = pools[p["dataset"]]
        if len(some) > MANY:
            some = [some[j] for j in dict.fromkeys(rng.integers(len(some), size=8 * size).tolist())]
        others = [t for a, t in some if a != p["answer"] and t not in pick]
        pick += [others[j] for j in rng.permutation(len(others))[: size - len(pick)]]
        out[i, : len(pick)] = pick
    return out


def margins(model, reader, prompts, branches, targets, candidates, temperature=0.02, batch_size=32, title=None):
    """m(q, ∅) and m(q, r) for every branch of every query, and what the positive alone says.

    prompts [n] of Reader.read, branches [n] lists of rationale branches, targets (N, H) unit vectors, candidates (n, c) indices with
    the target in column 0 and -1 for none -> list of n float arrays (2, 1 + number of branches), the direct embedding first: the margins,
    and s(q, r; t)/temperature, the positive without the others.
    """
    out = [None] * len(prompts)
    order = np.argsort([len(p["ids"]) + sum(map(len, b)) for p, b in zip(prompts, branches)], kind="stable")
    with torch.no_grad():
        # the longest first: what they free is large enough for the next; the other way round memory grows to twice as much
        for at in tqdm(range(0, len(order), batch_size)[::-1], desc=title, disable=None if title else True):
            rows = order[at : at + batch_size].tolist()
            batch = collate([prompts[i] for i in rows], reader, [branches[i] for i in rows], model.device)
            q = pool(model(batch), batch["ends"])                                             # (B, 1+G, H)
            c = torch.from_numpy(candidates[rows]).to(q.device)                               # (B, c)
            t = targets[c.clamp(min=0)]                                                       # (B, c, H)
            s = torch.einsum("bgh,bch->bgc", q, t) / temperature
            m = s.masked_fill((c < 0)[:, None], float("-inf")).log_softmax(-1)[..., 0]        # (B, 1+G): embed.margin_score, some candidates absent
            for i, both in zip(rows, torch.stack((m, s[..., 0]), 1).cpu().numpy()):
                out[i] = both[:, : 1 + len(branches[i])].astype(np.float64)
    return out


def keep_rule(delta, delta_placebo, rule="full", threshold=0.7, delta_guess=0.0):
    """The rule of the docstring, elementwise -> bool. A missing placebo (nan) cannot refuse anything."""
    delta, placebo = np.asarray(delta, float), np.asarray(delta_placebo, float)
    if rule == "none":
        return np.ones(delta.shape, bool)
    beats = ~(delta <= placebo) if rule in ("full", "positive_only") else True
    return (delta - np.maximum(0.0, delta_guess) > threshold) & beats


def seen_by(rule, results):
    """Judged rows as the rule sees them: positive_only has other Δs, and no guess."""
    if rule != "positive_only":
        return results
    return [dict(r, delta_guess=0.0, **dict(zip(("delta", "delta_placebo", "delta_second"), r["positive"]))) for r in results]


def column(rows, key):
    """A number of every row -> float array, nan for None."""
    return np.array([np.nan if r[key] is None else r[key] for r in rows], float)


def dataset_of(row):
    return row["id"].rsplit("/", 1)[0]


def thresholds(results, rule="full", margin=0.7, fdr=0.1):
    """t of every shelf: {(dataset, worker): t}; inf for a shelf that keeps nothing. Rules without placebos have the margin for all."""
    shelves, out = {}, {}
    for r in results:
        shelves.setdefault((dataset_of(r), r["worker"]), []).append(r)
    for shelf, rows in shelves.items():
        guess = np.maximum(0.0, column(rows, "delta_guess"))
        own, false = np.sort(column(rows, "delta") - guess), np.sort(column(rows, "delta_placebo") - guess)
        false = false[~np.isnan(false)]
        t = np.concatenate(([margin], own[own > margin]))        # only these are tried; a placebo's Δ between two of them is not
        passed, lucky = len(own) - np.searchsorted(own, t, "right"), len(false) - np.searchsorted(false, t, "right")
        good = t[1 + lucky <= fdr * passed] if rule in ("full", "positive_only") else t
        out[shelf] = float(good[0]) if len(good) else math.inf
    return out


def posterior(delta, temperature=1.0):
    """w ∝ softmax(Δ / T) over the kept rationales of one pair; sums to 1."""
    z = np.asarray(delta, float) / temperature
    w = np.exp(z - z.max())
    return w / w.sum()


def kept_mask(results, level, rule="full", delta="delta", placebo="delta_placebo"):
    """Which of these rows the rule keeps, given thresholds' `level` -> bool array."""
    at = np.array([level[dataset_of(r), r["worker"]] for r in results])
    return keep_rule(column(results, delta), column(results, placebo), rule, at, column(results, "delta_guess"))


def choose(results, level, rule="full", temperature=1.0):
    """results [{"id", "worker", "text", "delta", "delta_placebo", "delta_guess"}] -> the kept ones, with "weight" (1 per pair in all)."""
    by_pair = {}
    for r, keep in zip(results, kept_mask(results, level, rule)):
        if keep:
            by_pair.setdefault(r["id"], []).append(r)
    return [dict(r, weight=float(w)) for rows in by_pair.values() for r, w in zip(rows, posterior([r["delta"] for r in rows], temperature))]


def audit(results, kept, level, rule="full", needs_steps=None):
    """The report: kept share per worker and per dataset, placebo acceptance, and against the truth precision and recall.

    needs_steps: datasets whose careful rationales truly help (pocket world), or None where nobody knows. Rows with "delta_second" are
    those whose placebo was offered as the pair's own, against a second placebo.
    """
    offered = [r for r in results if r.get("delta_second") is not None]
    placebo_kept = kept_mask(offered, level, rule, "delta_placebo", "delta_second") if offered else None

    def share(key):
        of, among = (collections.Counter(map(key, rows)) for rows in (kept, results))
        return {k: round(of[k] / n, 4) for k, n in sorted(among.items())}

    out = {"candidates": len(results), "kept": len(kept), "precision": None, "recall": None,
           "placebo_accepted": round(float(placebo_kept.mean()), 4) if offered else None,
           "by_worker": share(lambda r: r["worker"]), "by_dataset": share(dataset_of)}
    if needs_steps is not None:
        slips = {(r["id"], r["text"]) for r in results if r["worker"] == "sloppy"}           # careful may err too: pocket.misread
        helps = lambda r: r["worker"].split("-")[0] == "careful" and dataset_of(r) in needs_steps and (r["id"], r["text"]) not in slips
        truly = {r["id"] for r in results if helps(r)}
        found = {r["id"] for r in kept if helps(r)}
        out["precision"] = round(sum(map(helps, kept)) / len(kept), 4) if kept else 0.0
        out["recall"] = round(len(found) / len(truly), 4) if truly else None
        sloppy = [r for r in results if r["worker"] == "sloppy" and dataset_of(r) in needs_steps]
        ids = {(r["id"], r["worker"]) for r in kept}
        out["sloppy_kept"] = round(sum((r["id"], r["worker"]) in ids for r in sloppy) / len(sloppy), 4) if sloppy else None
    return out


def compare_rules(run):
    """A finished pocket run's judged rationales under other rules -> table rows [(rule, audit)]."""
    results = read_rationales(os.path.join(run, "select", "judged.jsonl"))
    c, truth, out = read_json(os.path.join(run, "config.json")), read_json(os.path.join(run, "data", "pocket.json"))["steps"], []
    rules = {"full": ("full", c["select_fdr"]), "full, one margin for all shelves": ("full", 1e9),
             "positive_only": ("positive_only", c["select_fdr"]), "no_placebo": ("no_placebo", 1.0), "none": ("none", 1.0)}
    for name, (rule, luck) in rules.items():
        seen = seen_by(rule, results)
        level = thresholds(seen, rule, c["select_margin"], luck)
        out.append((name, audit(seen, choose(seen, level, rule), level, rule, truth)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Files: rationales, and the OpenAI batch format


def read_rationales(path, numbers=()):
    """rationales.jsonl -> rows. One object a line with id, side (query | target), worker, text, and the `numbers` asked for (selected.jsonl
    has "weight"); ValueError names file and line."""
    rows = []
    with open(path, "rb") as f:                                  # as bytes, so that what is not text has a line number too
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as e:
                raise ValueError(f"{path} line {n}: not JSON ({e})") from None
            for key, kind in (*((k, str) for k in ("id", "worker", "text")), *((k, (int, float)) for k in numbers)):
                if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                    raise ValueError(f"{path} line {n}: {key!r} is missing or not a {'string' if kind is str else 'number'}")
            if row.setdefault("side", "query") not in ("query", "target"):
                raise ValueError(f"{path} line {n}: side is {row['side']!r}, expected query or target")
            rows.append(row)
    return rows


def write_rows(path, rows):
    """JSON lines, complete or not at all."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    os.replace(path + ".part", path)


def to_data_url(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def request(pair, k, model_name, side="query", max_tokens=256):
    """One chat request of the OpenAI batch format for worker prompt k. The worker sees this side of the pair alone, never the other."""
    item, what = pair[side], "query" if side == "query" else "document"
    content = [{"type": "image_url", "image_url": {"url": to_data_url(loader.load_picture(ref))}} for ref in loader.refs(item)]
    content.append({"type": "text", "text": item.get("text", "") + "\n\n" + PROMPTS[k % len(PROMPTS)].format(side=what)})
    body = {"model": model_name, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "temperature": 0.7 if k >= len(PROMPTS) else 0.0}     # each prompt once greedily, then sampled
    return {"custom_id": f"{pair['id']}|{side}|{k}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def read_responses(path, worker):
    """A batch's answers -> (rationale rows, failures [(custom_id, why)]). Thinking models' <think> markers are taken off."""
    rows, failed, seen = [], [], set()
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                answer = json.loads(line)
                pair, side, k = answer["custom_id"].rsplit("|", 2)
                choices = ((answer.get("response") or {}).get("body") or {}).get("choices") or []
                text = ((choices[0].get("message") or {}).get("content") or "") if choices else ""
                text = text.replace("<think>", "").replace("</think>", " ").strip()
                if answer["custom_id"] in seen:
                    raise ValueError(f"a second answer to {answer['custom_id']}")
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise ValueError(f"{path} line {n}: not a batch response ({type(e).__name__}: {e})") from None
            seen.add(answer["custom_id"])
            if text:
                rows.append({"id": pair, "side": side, "worker": f"{worker}-{k}", "text": text})
            else:
                failed.append((answer["custom_id"], str(answer.get("error") or "no text in the response")))
    return rows, failed


def main():
    ap = argparse.ArgumentParser(description="Rationales from models that run elsewhere: write requests, read responses.")
    ap.add_argument("--write-requests", metavar="FILE", help="write chat requests for every training pair of --data")
    ap.add_argument("--read-responses", metavar="FILE", help="turn a batch's responses into rationales")
    ap.add_argument("--audit", metavar="RUN", help="a pocket run: what other rules would have kept, against the truth")
    ap.add_argument("--data", metavar="ROOT", help="training data, see data.py")
    ap.add_argument("--model-name", default="Qwen/Qwen3-VL-8B-Instruct", help="model field of the requests")
    ap.add_argument("--k", type=int, default=4, help="requests per pair: four prompts greedy, further ones sampled")
    ap.add_argument("--sides", choices=("query", "target", "both"), default="query")
    ap.add_argument("--limit", type=int, help="at most this many pairs per dataset")
    ap.add_argument("--worker", default="model", help="name that the rationales carry")
    ap.add_argument("--out", default="rationales.jsonl")
    a = ap.parse_args()
    if sum(map(bool, (a.write_requests, a.read_responses, a.audit))) != 1:
        ap.error("one of --write-requests, --read-responses and --audit")
    try:
        if a.audit:
            for rule, found in compare_rules(a.audit):
                print(f"{rule:34s}" + "  ".join(f"{k} {found[k]}" for k in ("kept", "precision", "recall", "placebo_accepted", "sloppy_kept")))
            return 0
        if a.read_responses:
            rows, failed = read_responses(a.read_responses, a.worker)
            write_rows(a.out, rows)
            for custom_id, why in failed:
                print(f"no rationale for {custom_id}: {why}", file=sys.stderr)
            print(f"rationales: {len(rows)}\nfailed: {len(failed)}\nwritten: {a.out}")
            return 0
        if not a.data or a.k < 1 or a.limit is not None and a.limit < 1:
            ap.error("--write-requests needs --data, a --k of at least 1, and no --limit or one of at least 1")
        train = loader.train_sets(a.data)
        n = 0
        with open(a.write_requests, "w", encoding="utf-8") as f:
            for s, size in enumerate(train.sizes):
                for row in tqdm(range(min(size, a.limit or size)), desc=train.names[s], disable=None):
                    pair = train.pair(s, row)
                    for side in ("query", "target") if a.sides == "both" else (a.sides,):
                        for k in range(a.k):
                            f.write(json.dumps(request(pair, k, a.model_name, side), ensure_ascii=False) + "\n")
                            n += 1
        print(f"requests: {n}\nwritten: {a.write_requests}")
        return 0
    except (ValueError, OSError) as e:
        print(f"select.py: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
