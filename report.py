"""
The report of a run: what a person looks at.

write_report(run, data_root) reads what the stages left in a run folder and writes into it
    report.md      what the numbers say, in sentences and one table
    report.html    the same as a page to play with: a slider for the threshold, the queries as cards
                   on which the reader may guess first whether thinking pays, the training curves

The page is one file of less than 3 MB and asks nothing of any server: report_template.html (HTML,
CSS and JavaScript, no framework) with one JSON object in it. The slider recomputes everything from
the per-query records of eval.py, by the formulas of eval.summarise(): a dataset is the mean over
its queries, the score is the mean over datasets, tokens and rate are means over all queries.

A record is what eval.py wrote about one query, a row of eval/image/PocketWalk_queries.jsonl:
    {"id": "PocketWalk/2", "label": ["purple triangle"], "rationale": "nw green star . down ...",
     "p_reason": 0.935, "new_tokens": 27, "never": 1.0, "always": 1.0, "adaptive": 1.0,
     "top3": {"never": ["purple triangle", "purple star", "purple ring"], "always": ...}, ...}
never, always and adaptive are its scores in these modes, label the keys of the right candidates;
rationale and new_tokens are those of always.

The verdict. Adaptive is compared with never and with always, query by query: the overall is a mean
over D datasets of means over n_d queries, so the variance of the difference of two overalls is
Σ_d var_d / n_d, over D². Within two standard errors nothing is won or lost. This is the error of
the test set alone; what another seed would give is study.py's matter.

How to run: train.py does it at the end of stage eval; again, by hand:
    python report.py runs/pocket                  both files anew, from what the run left
    python report.py runs/mine MMEB_ROOT          if its test sets lie there now

What a run does not have (a test set, a stage, steps) is left out and said in words. Of a
large test set most cards are left out, because BYTES bounds the page.
"""

import argparse
import base64
import io
import json
import math
import sys
from pathlib import Path

import numpy as np

import data
from eval import MODALITIES
from model import Rows, read_json

# Training curves. A panel: the stage, then the fields of its rows in metrics.jsonl that are drawn
# together, because they have one unit.
PANELS = [
    "base loss",
    "base accuracy text_accuracy",
    "select0 loss",  # the two evaluators
    "select1 loss",
    "embed nce_direct nce_reason",
    "embed decision_right",
    "rl reward_direct reward_reason reward",
    "rl tokens",
    "rl reason_rate p_reason",
]
COLUMNS = ("never", "always", "p_reason", "new_tokens")  # of a record, for the slider
BYTES = 2_800_000  # of the JSON in the page; the template takes some 25 kB more
SIDE = 144  # pixels of a thumbnail
CHARACTERS = 600  # of a text
HINDSIGHT = ("random", "oracle", "per_task")  # modes that an older report may lack
FEW = 10  # queries of a dataset; of fewer no variance is estimated


# --------------------------------------------------------------------------------------------------
# What a run left


def training_curves(log):
    """Rows of metrics.jsonl -> the panels that have a finite value.

    [{"stage": "embed", "step": 10, "nce_direct": 0.1}, ...]
    -> [{"title": "embed: nce direct", "series": [{"name": "nce direct", "points": [[10, 0.1]]}]}]
    """
    curves = []
    for panel in PANELS:
        stage, *fields = panel.split()
        series = []
        for field in fields:
            points = []
            for row in log:
                value = row.get(field, math.nan)
                if row["stage"] == stage and math.isfinite(value):
                    points.append([row["step"], value])
            if points:
                series.append({"name": field.replace("_", " "), "points": points})
        if series:
            title = ", ".join(line["name"] for line in series)
            curves.append({"title": f"{stage}: {title}", "series": series})
    return curves


# --------------------------------------------------------------------------------------------------
# What the numbers say


def difference(modes, records, mode):
    """Adaptive against `mode`: "The verdict" in the docstring above.

    modes {"never": {"overall": 0.827, ...}, "adaptive": ..., ...}; records {dataset: its records}
    -> what adaptive does to it, and the numbers: ("beats", "never 0.827 (+0.130 ± 0.016)")
    """
    variance = 0.0  # Σ_d var_d / n_d
    for rows in records.values():
        gaps = [row["adaptive"] - row[mode] for row in rows]
        # A few may show none by chance. 1 is the largest variance of numbers in -1 ... 1.
        spread = np.var(gaps, ddof=1) if len(gaps) >= FEW else 1.0
        variance += spread / len(gaps)
    sure = 2 * math.sqrt(variance) / len(records)  # two standard errors
    score = modes[mode]["overall"]
    gap = modes["adaptive"]["overall"] - score
    word = "beats" if gap > 0 else "loses to"
    if abs(gap) <= max(sure, 1e-9):  # equal scores without spread are level, too
        word = "is level with"
    return word, f"{mode} {score:.3f} ({gap:+.3f} ± {sure:.3f})"


def verdict(modes, records):
    """-> (title, sentences), whichever way the numbers fall. modes, records: as in difference()."""
    score = {mode: row["overall"] for mode, row in modes.items()}
    tokens = {mode: row["tokens_per_query"] for mode, row in modes.items()}
    never, against_never = difference(modes, records, "never")
    always, against_always = difference(modes, records, "always")
    title = f"One model, used three ways: adaptive {never} never and {always} always"
    error = "two standard errors over the queries"
    if min(map(len, records.values())) < FEW:
        error += f" at most (a dataset has fewer than {FEW})"
    sentences = [
        f"Quality: adaptive {score['adaptive']:.3f}, {against_never}, {against_always}. "
        f"± is {error}.",
        f"Cost: {tokens['adaptive']:.1f} generated tokens a query, where always takes "
        f"{tokens['always']:.1f}. {modes['adaptive']['reason_rate']:.1%} of the queries reason.",
    ]
    # From a coin, which knows nothing, to hindsight, which knows the result: seed 1 of the study
    # goes from 0.851 to 0.963, adaptive's 0.957 is 94 % of that way.
    absent = [mode for mode in HINDSIGHT if mode not in modes]
    if absent:
        sentences.append(f"This report is older than the modes {', '.join(absent)}.")
    else:
        way = score["oracle"] - score["random"]
        gained = score["adaptive"] - score["random"]
        reached = "there was nothing to decide"
        if way > 1e-9:
            reached = f"adaptive went {gained / way:.0%} of that way"
        sentences.append(
            f"Decision: from a coin of the same rate ({score['random']:.3f}) to hindsight "
            f"({score['oracle']:.3f}), {reached}. Who decides by the task's name alone gets "
            f"{score['per_task']:.3f} at best."
        )
    sentences.append(
        "Never and always are this same model, forced: it was not trained for one mode alone."
    )
    return title, sentences


def what_is_missing(report, log, test_sets):
    """-> sentences about what this run does not have, in place of empty figures and zeros.
    test_sets: names of those that the data lacks."""
    sentences = []
    if test_sets:
        sentences.append(f"In no mean, as the data lacks them: {', '.join(test_sets)}.")
    if "warning" in report.get("selection", {}):
        sentences.append(report["selection"]["warning"])
    if not report.get("adaptivity"):
        sentences.append("How many steps the queries need is not known for this data.")
    absent = [key for key in ("seconds", "selection", "curve") if not report.get(key)]
    if absent:
        sentences.append(f"This report has no {', '.join(absent)}.")
    logged = {row["stage"] for row in log}  # {"base", "select0", "embed", ...}
    for stage in ("base", "select0", "embed", "rl"):  # select0: the first evaluator of select
        if stage not in logged:
            sentences.append(f"Stage {stage} left no training log.")
    return sentences


def markdown(report, title, sentences):
    """report.md: the sentences, and a table of what each mode gets: "| overall | 0.827 | ..."."""
    modes = report["modes"]
    names = ["overall", *MODALITIES, "reason_rate", "tokens_per_query", "ms_per_query"]
    columns = []  # of each mode
    for scores in modes.values():
        values = [scores[name] for name in names] + list(scores["datasets"].values())
        # None: no dataset of that modality.
        columns.append(["–" if value is None else f"{value:.3f}" for value in values])
    names += modes["never"]["datasets"]
    text = table(["", *modes], zip(names, *columns))
    made_by = [f"Preset {report['preset']}", f"seed {report['seed']}"]
    made_by += [report[key] for key in ("model", "data") if report.get(key)]  # a user's own
    return "\n\n".join([f"# {title}", *sentences, f"{text}\n{', '.join(made_by)}\n"])


def table(columns, rows):
    """Markdown. The first column is words, the others are numbers, aligned to the right.

    ["mode", "n"], [["full", 5]] -> "| mode | n |\\n| --- | --: |\\n| full | 5 |\\n"
    """
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    lines = []
    for cells in (columns, rule, *rows):
        text = " | ".join(map(str, cells))
        lines.append(f"| {text} |\n")
    return "".join(lines)


# --------------------------------------------------------------------------------------------------
# The page


def show(item, images):
    """An item -> {"text": "what is it ?", "images": [0, 3]}; of a video at most four frames.

    images {reference: data: URI} grows by the new ones; 0 and 3 are places in it.
    """
    refs = data.listed(item.get("image"))
    if "video" in item:
        frames = item["video"]["frames"]
        chosen = np.linspace(0, len(frames) - 1, min(4, len(frames))).astype(int)
        refs += [frames[i] for i in chosen]
    for ref in refs:
        if ref not in images:
            image = data.load_image(ref)
            image.thumbnail((SIDE, SIDE))  # in place, larger ones alone
            buffer = io.BytesIO()
            image.save(buffer, "webp", quality=90)  # keeps drawings and photographs small
            encoded = base64.b64encode(buffer.getvalue()).decode()
            images[ref] = f"data:image/webp;base64,{encoded}"
    order = list(images)
    text = f"{item.get('instruction', '')} {item.get('text', '')}".strip()
    return {"text": text[:CHARACTERS], "images": [order.index(ref) for ref in refs]}


def make_card(es, i, record, images):
    """Query i of a data.EvalSet; record is its row of queries.jsonl. images: as in show().

    -> {"dataset", "row", "id", "rationale", "text", "images", "never", "always"}. row is its place
    in the page's per-query records; never and always are the first three candidates.
    """
    card = {"dataset": es.name, "row": i, "id": str(record["id"]), "rationale": record["rationale"]}
    card |= show(es.queries[i], images)
    for mode in ("never", "always"):
        card[mode] = []
        for key in record["top3"][mode]:
            candidate = show(es.candidates[es.index[key]], images)
            candidate["right"] = key in record["label"]
            card[mode].append(candidate)
    return card


def make_cards(records, root, reading, room):
    """-> (cards, {reference: data: URI} of their images), as long as there is room (bytes).

    The first query of each dataset, then the second ...: chosen by a rule, not by hand, failures
    included. reading: the options of load_eval in the evaluation, so that queries and candidates
    are the same. ValueError if they are not: the run belongs to other data.
    """
    sets = {}
    for name, rows in records.items():
        es = sets[name] = data.load_eval(root, name, **reading)
        labels = [[es.cand_ids[c] for c in right] for right in es.positives]
        found = list(zip(es.query_ids, labels))  # [("PocketWalk/2", ["purple triangle"]), ...]
        if found != [(row["id"], row["label"]) for row in rows]:
            raise ValueError(f"{root}: its {name} has other queries than the run's eval folder")
    cards = []
    images = {}  # shared by all cards
    for i in range(max(len(rows) for rows in records.values())):
        for name, rows in records.items():
            if i < len(rows):
                more = dict(images)
                card = make_card(sets[name], i, rows[i], more)
                new = [*more.values()][len(images) :]  # images that no earlier card has
                room -= len(page_json([card, new]))
                if room < 0:
                    return cards, images
                cards.append(card)
                images = more
    return cards, images


def page_json(value):
    """JSON as it stands in the page. < is written as an escape: no text of the run can end the
    script element that it is in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def six_digits(value):
    """0.671393096446991 -> 0.671393, 1.0 -> 1. So the page has room for MMEB-V2's 83,530
    queries, which with all their digits would not fit."""
    return json.loads(f"{value:.6g}")


def write_report(run, data_root):
    """report.md and report.html of a run folder whose test sets lie in data_root."""
    run = Path(run)

    # 1) What the stages left
    report = read_json(run / "report.json")
    summary = read_json(run / "eval" / "summary.json")
    if summary.get("modes") != report["modes"]:
        remedy = "train.py --stage eval makes both again"
        raise ValueError(f"{run}: report.json and eval/ are of different evaluations; {remedy}")
    records = {}  # {dataset: its records}
    for name, about in summary["datasets"].items():
        records[name] = list(Rows(run / "eval" / about["modality"] / f"{name}_queries.jsonl"))
    path = run / "metrics.jsonl"
    log = list(Rows(path, may_be_cut=True)) if path.exists() else []

    # 2) The page's JSON. Cards take what room the rest leaves.
    title, sentences = verdict(report["modes"], records)
    sentences += what_is_missing(report, log, summary.get("missing"))
    payload = {"seconds": {}, "adaptivity": {}, "curve": []} | report  # an older one may lack these
    payload["title"] = title
    payload["threshold"] = summary["threshold"]
    payload["training"] = training_curves(log)
    payload["datasets"] = {}  # {name: {column: a number per query}}
    for name, rows in records.items():
        payload["datasets"][name] = {key: [six_digits(row[key]) for row in rows] for key in COLUMNS}
    room = BYTES - len(page_json(payload))
    if room <= 0:
        payload["datasets"] = {}  # the page then has neither slider nor cards
        sentences.append("There are too many queries for the page: report.md has the numbers.")
    cards, images = make_cards(records, data_root, summary.get("reading", {}), room)
    shown = ", without images: they have none" if cards and not images else ""
    sentences.append(f"{len(cards)} of the test queries are shown as cards in report.html{shown}.")
    payload["sentences"] = sentences
    payload["cards"] = cards
    payload["images"] = list(images.values())

    # 3) Both files
    text = markdown(report, title, sentences)
    (run / "report.md").write_text(text, encoding="utf-8")
    template = Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")
    page = template.replace("__DATA__", page_json(payload))
    (run / "report.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    parser.add_argument("run", help="a run folder of train.py")
    parser.add_argument("data", nargs="?", help="the root of its test sets (that of the run)")
    args = parser.parse_args()
    try:
        root = args.data or read_json(Path(args.run, "config.json"))["data"]
        write_report(args.run, root or Path(args.run, "data"))
    except KeyError as error:
        why = "an older layout, or a bug; train.py --stage eval measures it again"
        sys.exit(f"report.py: {args.run}: its evaluation lacks {error}: {why}")
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
