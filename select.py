"""
Counterfactual selection of rationales: which words, if any, explain why this query has this target?

The idea. A rationale that merely looks like reasoning teaches a model the form of reasoning. So
every candidate r of a pair (q, t) goes through a controlled experiment. On the pair's set C (the
target, its hard negatives, other targets of the dataset), with s(q, r; c) = e(q, r)·e(c, ∅),

    logp(q, r)   = log softmax_{c in C}( s(q, r; c) / temperature )[t]
    gain         = logp(q, r) − logp(q, ∅)         with minus without: the counterfactual
    gain_placebo = logp(q, r') − logp(q, ∅)        r': the same author about another target
    gain_guess   = −log|C| − logp(q, ∅)            what knowing nothing would gain

    keep r  iff  gain > gain_placebo  and  gain − max(0, gain_guess) > bar
    weight  = softmax of gain over the pair's kept rationales

Why this weight. By Bayes the posterior is p(r | q, t) ∝ π(r | q) p(t | q, r). The candidates are a
sample of what the proposers write: that is π here, so it is accounted for already. What is left is
p(t | q, r), which is exp(gain) times p(t | q, ∅), the same for all rationales of the pair. ∅ has no
weight: embed learns every pair's direct vector and, from the label "was any kept?", whether to
reason.

Why these conditions. The words must help (gain), and help because they are about this pair
(placebo). Where the direct vector is confidently wrong, any words raise the target by flattening
the softmax: so what a uniform guess would gain is subtracted. The bar is at least the margin
(option select_margin, 0.7), just above log 2: a rationale must double the target's probability.

Luck. An evaluator that happens to name the right target now and then does so with placebos as
well. Each stratum (what one author wrote for one dataset) has a bar of its own. Let g be the
gains of its rationales and g' those of their placebos, each less max(0, gain_guess). The bar is the
smallest value, among the margin and those g that exceed it, for which

    1 + #{g' above the bar}  <=  fdr · #{g above the bar}

Counting decoys plus 1 is the knockoff filter's (Barber & Candès, arXiv 1404.5609). Its guarantee
asks for decoys that are exchangeable with what they stand for, which is not shown of placebos. So
fdr (option select_fdr), the share of what is above the bar that may be luck, is a target and no
proven bound. At 0.1, its default, at least ten rationales must lie above the bar; from twenty on
one placebo may lie there, too. Without such a bar the stratum keeps nothing.

Direct first. Since logp <= 0, gain <= −logp(q, ∅). Where the direct embedding already gives the
target at least exp(−margin), about a half, the pair is easy, else hard. An easy one can keep
nothing: none of its rationales is judged, none need be written (`propose.py --hard`), and it
teaches to embed directly. A pair whose target is alone in C is easy, too: its logp is 0. Under the
ablations positive_only and none every pair is judged: they could keep rationales of easy pairs.

Candidate targets. Up to 1024 pairs of one dataset and fold are judged together: a window. Where it
has few targets, as in the pocket world, C is filled with random ones. Where it has many, random
ones are easy: the right target wins with any words or none. So C takes those nearest to the target;
near-copies of it, which may be right as well, come last.

Cross-fitting. The evaluator never trained on the pair that it judges: each of two evaluators learns
on one half of the pairs and judges the other. What an evaluator knows by heart gains nothing.

Ablations (`rule`): positive_only has gains of s(q, r; t)/temperature in place of logp, no guess:
it cannot see that a wrong candidate rose even more. no_placebo drops the placebo and its bar;
none keeps all.

    python train.py --stage select           the experiment, inside a run
    python select.py --run runs/pocket       what other rules would keep of a finished run

Paper: MMEmb-R1 (arXiv 2604.06156), which names the counterfactual; what has no source is ours.
Left out: judges that are no embedders; learnt bars; candidate targets from beyond the window.

The name. The standard library has a module `select`, which subprocess and so torch import, and this
file can stand in its way. Whoever imports it by that name is given the library's: the lines below.
train.py loads this file by its path, as `selection`.
"""

import sys

# Go on at RULES: up to there all is about the name of this file.
if __name__ == "select":
    import os
    from importlib.machinery import BuiltinImporter, PathFinder
    from importlib.util import module_from_spec

    elsewhere = [p for p in sys.path if not os.path.exists(os.path.join(p, "select.py"))]
    spec = BuiltinImporter.find_spec("select") or PathFinder.find_spec("select", elsewhere)
    real = module_from_spec(spec)
    spec.loader.exec_module(real)  # filled before it enters sys.modules
    globals().update(vars(real))  # another thread may have got this module already
    sys.modules["select"] = real
else:
    import argparse
    import collections
    import dataclasses
    import hashlib
    import itertools
    import math
    import operator
    import os

    import numpy as np
    import torch

    from embed import branch_vectors, contrastive_step
    from model import Rows, read_json
    from processor import prompt_key
    from propose import author

# From here on only definitions: the first case lacks the imports of `else`.

RULES = ("full", "positive_only", "no_placebo", "none")
WINDOW = 1024  # pairs of one dataset that are judged together
CANDIDATES = 16  # |C|: chance is 1/16, low enough that a rationale has room to help
MANY = 768  # different targets, of at most 1024, in a window: from here on C is mined (ours)
COPY = 0.95  # cosine of two targets that may be the same one in other words (arXiv 2407.15831)
AUDITED = 0.25  # share of the placebos that are put through the rule, against a second placebo


# --------------------------------------------------------------------------------------------------
# The evaluator: it judges the pairs on which it did not learn


def fold_of(pair_id, folds):
    """The fold in which this pair is judged: a hash, so that it depends on no other pair."""
    digest = hashlib.blake2b(pair_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % folds


def evaluator_step(model, processor, pairs, texts, cfg, fold, rng_of):
    """embed.contrastive_step for the evaluator that will judge `fold`: pairs and metrics as there.
    Leaves gradients.

    It learns the direct path, and the reasoned one on a random candidate rationale of each pair,
    good or bad; posterior_weights lets what helps count for more. With equal weights empty talk
    would teach it to ignore every rationale. With a single fold (an ablation) it also learns on
    what it will judge.
    texts: {pair id: {proposer: text}}. rng_of(pair id): the pair's own generator, which draws its
    rationale, so that the draw does not depend on how pairs are dealt out to processes.
    """
    folds = cfg.select_folds
    # The sampler has left those of `fold` out, but in a broken row's place stands the next one.
    pairs = [p for p in pairs if folds == 1 or fold_of(p["id"], folds) != fold]
    if not pairs:
        why = f"all pairs of a batch are of fold {fold}, which is to be judged"
        raise ValueError(f"select: {why}; mend broken rows, or raise --batch")
    drawn = []  # of each pair: ids of <think> ... <|endoftext|>, or None where nobody wrote
    for p in pairs:
        candidates = list(texts[p["id"]].values())
        if not candidates:
            drawn.append(None)
            continue
        text = candidates[rng_of(p["id"]).integers(len(candidates))]
        drawn.append(processor.rationale(text))
    labels = [-1] * len(pairs)  # unknown: no decision is taught
    cfg = dataclasses.replace(cfg, lm_weight=0.0, matryoshka_dims="")  # the NCEs of full vectors
    return contrastive_step(model, processor, pairs, drawn, labels, cfg, posterior_weights=True)


# --------------------------------------------------------------------------------------------------
# The experiment


def judge(model, processor, pairs, texts, cfg, rng):
    """The experiment, by an evaluator, on one window of pairs -> rows, one per rationale.

    pairs: {"id", "dataset", "query", "target", "negatives", "target_key"} of one dataset and one
    fold, at most WINDOW; equal targets have one key. texts: {pair id: {proposer: text}}.
    Candidate targets and placebos come from the window: its rows depend on nothing else. All is
    drawn in step 1, so which pairs are easy changes no draw.
    The row of a rationale, here of one whose placebo is audited:
        {"id": "A/7", "dataset": "A", "proposer": "base#2", "text": "nw red star",
         "direct": -2.3, "gain": 1.9, "gain_placebo": -0.2, "gain_second": 0.1, "gain_guess": -0.5,
         "similarity_gain": [2.4, -0.1, 0.3], "audited": True}
    "direct" is logp(q, ∅). "similarity_gain" has the gains of text, placebo and second placebo in
    s(q, r; t)/temperature. A gain is None where there is no such text, and where the pair is easy.
    A pair about which nobody wrote has one row with less: id, dataset and "direct", gain None,
    proposer and text empty.
    """
    # 1) e(c, ∅) of every target and negative: t (N, H). Then all draws.
    documents, places = distinct_documents(pairs)
    t = torch.cat(branch_vectors(model, processor, documents, cfg.chunk_tokens))
    many = len({target for target, *_ in places}) >= MANY
    candidates = candidate_sets(places, rng, t if many else None)
    trials = draw_trials(pairs, texts, rng)

    # 2) logp(q, ∅) of every pair, then logp(q, r) of the texts of hard pairs. With the texts
    # logp(q, ∅) is measured again: both sides of a gain then have the same batch shape and
    # rounding. A score is {text: [logp, similarity]}, with "" for ∅.
    cases = [(p["query"], c, []) for p, c in zip(pairs, candidates)]
    scores = log_probs(model, processor, cases, t, cfg)
    hard = [i for i, score in enumerate(scores) if can_keep(score[""][0], cfg)]
    hard_cases = []
    for i in hard:
        words = set()
        for _, text, placebo, second_placebo in trials[i]:
            words |= {text, placebo, second_placebo}
        words.discard(None)
        hard_cases.append((pairs[i]["query"], candidates[i], sorted(words)))
    for i, score in zip(hard, log_probs(model, processor, hard_cases, t, cfg)):
        scores[i] = score

    # 3) with minus without
    rows = []
    for p, c, trials_of_pair, score in zip(pairs, candidates, trials, scores):
        direct, _ = score[""]
        if not trials_of_pair:
            row = {"id": p["id"], "dataset": p["dataset"], "proposer": "", "text": ""}
            rows.append(row | {"direct": direct, "gain": None})
        for proposer, text, placebo, second_placebo in trials_of_pair:
            rationales = (text, placebo, second_placebo)
            gains = [with_minus_without(r, score) for r in rationales]
            row = {
                "id": p["id"],
                "dataset": p["dataset"],
                "proposer": proposer,
                "text": text,
                "direct": direct,
                "gain": gains[0][0],
                "gain_placebo": gains[1][0],
                "gain_second": gains[2][0],
                "gain_guess": -math.log(len(c)) - direct,
                "similarity_gain": [similarity for _, similarity in gains],
                "audited": second_placebo is not None,
            }
            rows.append(row)
    return rows


def with_minus_without(text, score):
    """Gains in (log-probability, similarity), or Nones for a text that was not measured."""
    if text not in score:
        return None, None
    (logp, s), (logp_direct, s_direct) = score[text], score[""]
    return logp - logp_direct, s - s_direct


def can_keep(direct, cfg):
    """Whether any rationale of a pair could pass: its gain is at most −direct."""
    return cfg.select_rule not in ("full", "no_placebo") or direct < -cfg.select_margin


def distinct_documents(pairs):
    """Targets and negatives, each once, and each pair's places among them, its target first.
    Targets a, b with negatives [b, c], [] -> [a, b, c], [[0, 1, 2], [1]]."""
    documents = []
    place_of = {}  # {prompt_key: place in documents}
    places = []
    for p in pairs:
        places_of_pair = []
        for document in (p["target"], *p["negatives"]):
            key = prompt_key(document)
            if key not in place_of:
                place_of[key] = len(documents)
                documents.append(document)
            if place_of[key] not in places_of_pair:
                places_of_pair.append(place_of[key])
        places.append(places_of_pair)
    return documents, places


def candidate_sets(places, rng, t=None):
    """C of every pair: its target, then hard negatives (half of C at most), then other targets.
    These are random or, given the documents' vectors t (N, H), those nearest to its own.

    places: [n] lists, the target first, all different -> [n] lists likewise.
    """
    targets = np.unique([target for target, *_ in places])
    sets = []
    for of_pair in places:
        chosen = of_pair[: 1 + CANDIDATES // 2]
        rest = np.setdiff1d(targets, chosen)
        if t is None:
            rest = rng.permutation(rest)
        else:
            near = (t[rest].float() @ t[of_pair[0]].float()).cpu().numpy()
            near[near > COPY] -= 2.0  # behind all others
            rest = rest[np.argsort(-near)]
        sets.append(chosen + rest[: CANDIDATES - len(chosen)].tolist())
    return sets


def draw_trials(pairs, texts, rng):
    """-> [n] lists of (proposer, text, placebo, second placebo): None where there is none.

    An author's rationales, of all tries, are laid out in a random circle. The next one that is
    about another target is the placebo (words about the same target may well fit), and the next
    such one the second placebo.
    """
    by_author = collections.defaultdict(list)
    for i, p in enumerate(pairs):
        for proposer, text in texts[p["id"]].items():
            by_author[author(proposer)].append((i, proposer, text))
    trials = [[] for _ in pairs]
    for rationales in by_author.values():
        circle = [rationales[i] for i in rng.permutation(len(rationales))]
        for at, (i, proposer, text) in enumerate(circle):
            onwards = circle[at + 1 :] + circle[:at]
            target = pairs[i]["target_key"]
            foreign = (words for j, _, words in onwards if pairs[j]["target_key"] != target)
            placebo, second = next(foreign, None), next(foreign, None)
            if second == placebo or rng.random() >= AUDITED:  # equal ones audit nothing
                second = None
            trials[i].append((proposer, text, placebo, second))
    return trials


def log_probs(model, processor, cases, t, cfg):
    """-> for every case {text: [logp(q, r), s(q, r; t)/temperature]}, where "" stands for ∅.

    cases: (query prompt, places of its candidates in t, the target first, texts). t (N, H): all.
    """
    queries = [query for query, _, _ in cases]
    branches = [[processor.rationale(text) for text in texts] for _, _, texts in cases]
    vectors = branch_vectors(model, processor, queries, cfg.chunk_tokens, branches)
    scores = []
    for (_, c, texts), q in zip(cases, vectors):
        s = q @ t[c].T / cfg.temperature  # (1+K, |C|)
        table = torch.stack((s.log_softmax(-1)[:, 0], s[:, 0]), dim=1)  # (1+K, 2)
        scores.append(dict(zip(["", *texts], table.tolist())))
    return scores


# --------------------------------------------------------------------------------------------------
# The rule


def gains_above_guess(row, rule):
    """(gain, gain_placebo, gain_second), each less max(0, gain_guess); -inf where not measured.

    positive_only sees the similarity's, which has no candidates to guess among.
    """
    gains = (row["gain"], row["gain_placebo"], row["gain_second"])
    guess = max(0.0, row["gain_guess"])
    if rule == "positive_only":
        gains = row["similarity_gain"]
        guess = 0.0
    return [-math.inf if gain is None else gain - guess for gain in gains]


def keeps(gain, gain_placebo, bar, rule):
    """The rule for one rationale. Where there is no placebo, none has to be beaten."""
    if rule == "none":
        return True
    if rule == "no_placebo":
        return gain > bar
    return gain > bar and gain > gain_placebo


def stratum(row):
    return row["dataset"], author(row["proposer"])


def bars(rows, rule, margin, fdr):
    """{stratum: bar}. Rules without placebos have the margin for all."""
    gains, placebos = collections.defaultdict(list), collections.defaultdict(list)
    for row in rows:
        gain, placebo, _ = gains_above_guess(row, rule)
        gains[stratum(row)].append(gain)
        placebos[stratum(row)].append(placebo)
    if rule in ("no_placebo", "none"):
        return dict.fromkeys(gains, margin)
    return {k: stratum_bar(gains[k], placebos[k], margin, fdr) for k in gains}


def stratum_bar(gains, placebos, margin, fdr):
    """The smallest bar, of the margin and the gains above it, with 1 + #{placebos > bar} <=
    fdr · #{gains > bar}; inf without one."""
    gains, placebos = np.sort(gains), np.sort(placebos)
    # Only gains are tried. A value between two of them keeps the same rationales as the lower one,
    # perhaps with fewer placebos above it: the bar may be higher than need be, never lower.
    tried = np.concatenate(([margin], gains[gains > margin]))
    passed = len(gains) - np.searchsorted(gains, tried, "right")
    lucky = len(placebos) - np.searchsorted(placebos, tried, "right")
    enough = tried[1 + lucky <= fdr * passed]
    return float(enough[0]) if len(enough) else math.inf


def posterior(gains):
    """w ∝ exp(gain) over the kept rationales of one pair; sums to 1."""
    w = np.exp(np.array(gains) - max(gains, default=0.0))
    return (w / w.sum()).tolist()


class Judged:
    """The judged rows that have a text: a pair about which nobody wrote has a row without. They are
    read anew each time one goes through them."""

    def __init__(self, *paths):
        self.rows = Rows(*paths)

    def __iter__(self):
        return (row for row in self.rows if row["text"])


def choose(rows, rule, margin, fdr):
    """Judged rows, pair after pair -> yields those that the rule keeps, each with its "weight".

    `rows` is gone through twice. Memory holds the gains of all rows, for the bars, and the texts of
    one pair. Rule none gives a pair's rationales equal weights.
    """
    bar = bars(rows, rule, margin, fdr)
    for _, same_pair in itertools.groupby(rows, key=operator.itemgetter("id")):
        kept, gains = [], []
        for row in same_pair:
            gain, placebo, _ = gains_above_guess(row, rule)
            if keeps(gain, placebo, bar[stratum(row)], rule):
                kept.append(row)
                # What was subtracted for the guess is the pair's constant: softmax ignores it.
                gains.append(0.0 if rule == "none" else gain)
        for row, weight in zip(kept, posterior(gains)):
            yield row | {"weight": weight}


# --------------------------------------------------------------------------------------------------
# The audit


def audit(rows, kept, rule, margin, fdr, helps=None):
    """What share of each author's rationales was kept, and how often a placebo passes for one.

    rows: as of choose; kept: what it keeps of them. This is no independent check of the bar: it was
    set by these placebos, among others. Placebos of easy pairs count as rejected.

    helps(row) -> True, False, or None for a row that nobody can mark. With it, precision is the
    share of the kept and marked rows that help, 0 without any, and recall the share of the pairs
    with a helpful rationale that keep one. Without it both are None.
    """
    bar = bars(rows, rule, margin, fdr)
    accepted = []
    for row in rows:
        if row["audited"]:  # the placebo plays the rationale, the second placebo plays its placebo
            _, placebo, second = gains_above_guess(row, rule)
            accepted.append(keeps(placebo, second, bar[stratum(row)], rule))
    num_written = collections.Counter(author(row["proposer"]) for row in rows)
    num_kept = collections.Counter(author(row["proposer"]) for row in kept)
    precision = recall = None
    if helps:
        helpful = {row["id"] for row in rows if helps(row)}
        caught = {row["id"] for row in kept if helps(row)}
        precision = share(map(helps, kept)) or 0.0
        recall = share(pair_id in caught for pair_id in helpful)
    by_proposer = {}  # {"base": 0.02, "careful": 0.31}
    for name in sorted(num_written):
        by_proposer[name] = round(num_kept[name] / num_written[name], 4)
    return {
        "candidates": num_written.total(),
        "kept": num_kept.total(),
        "precision": precision,
        "recall": recall,
        "placebo_accepted": share(accepted),
        "by_proposer": by_proposer,
    }


def share(marks):
    """Of the marks that are not None the share that is True; None without any."""
    marks = [mark for mark in marks if mark is not None]
    return round(sum(marks) / len(marks), 4) if marks else None


def few_kept(rows, kept):
    """A warning if under 1 % of the hard pairs kept a rationale, else None."""
    hard = {row["id"] for row in rows if row["gain"] is not None}
    keep = {row["id"] for row in kept}
    if len(keep) >= max(1, 0.01 * len(hard)):
        return None
    if not hard:
        return (
            "WARNING: selection kept nothing, for no pair is hard: the direct vectors give every "
            "target more than exp(-select_margin), and nothing teaches the model to reason. Give "
            "harder pairs, with hard negatives (neg_* columns), or a lower --select_margin"
        )
    return (
        f"WARNING: selection kept rationales of {len(keep)} of {len(hard)} hard pairs: trained "
        "on this, the model will hardly ever reason. Try a stronger proposer (propose.py "
        "--write-requests), and see by_proposer in select/audit.json"
    )


def pocket_truth(root):
    """helps(row) for a pocket world, whose makers know the truth; else None.

    A rationale without an error helps a query of two or more steps. It is left unmarked where one
    step is needed: a model may or may not do that at a look. Nothing else helps.
    """
    path = os.path.join(root, "pocket.json")
    if not os.path.exists(path):
        return None
    truth = read_json(path)["train"]

    def helps(row):
        pair = truth[row["id"]]
        if row["text"] != pair["rationale"] or pair["steps"] == 0:
            return False
        return None if pair["steps"] == 1 else True

    return helps


def main():
    """What the rules would keep of a finished run's judged rationales."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    parser.add_argument("--run", required=True, metavar="DIR", help="a run folder of train.py")
    run = parser.parse_args().run
    rows = list(Judged(os.path.join(run, "select", "judged.jsonl")))
    config = read_json(os.path.join(run, "config.json"))
    helps = pocket_truth(config["data"] or os.path.join(run, "data"))
    for rule in RULES:
        # positive_only could keep rationales of easy pairs, too: `full` has not judged those.
        if rule == "positive_only" and any(row["gain"] is None for row in rows):
            continue
        how = rule, config["select_margin"], config["select_fdr"]
        report = audit(rows, list(choose(rows, *how)), *how, helps)
        columns = ("kept", "precision", "recall", "placebo_accepted")
        print(f"{rule:13s}", *(f"{column} {report[column]}" for column in columns), sep="  ")


if __name__ == "__main__":
    try:
        main()
    except (KeyError, TypeError) as error:
        sys.exit(f"select.py: a row or an option is missing or of another kind: {error!r}")
    except (ValueError, OSError) as error:
        sys.exit(f"select.py: {error}")
