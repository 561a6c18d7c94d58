"""
The report of a run: what a person looks at.

write_report(run, data_root) reads what the stages left in a run folder and writes into it
    report.md      what the numbers say, in sentences and one table
    tradeoff.png   quality against generated tokens: six modes and the curve over the threshold
    report.html    the same as a page to play with: a slider for the threshold, the queries as cards
                   on which the reader may guess first whether thinking pays, the training curves

The page is one file of less than 3 MB and asks nothing of any server: report_template.html (HTML,
CSS and JavaScript, no framework) with one JSON object in it. The slider recomputes everything from
the per-query records of eval.py, by the formulas of eval.mode_table(): a dataset is the mean over
its queries, the score is the mean over datasets, tokens and rate are means over all queries.

The verdict. Adaptive is compared with never and with always, query by query: the overall is a mean
over D datasets of means over n_d queries, so the variance of the difference of two overalls is
Σ_d var_d / n_d, over D². Within two standard errors nothing is won or lost. This is the error of
the test set alone; what another seed would give is study.py's matter.

How to run: train.py does it at the end of stage eval; again, by hand:
    python report.py runs/pocket                  with the run's data/
    python report.py runs/mine MMEB_ROOT

What a run does not have (a stage, steps, images) is left out and said in words. Left out, too: most
queries of a large test set, as BYTES bound the page.
"""

import base64
import io
import json
import math
import os
import sys

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no window, no state

import data
from eval import MODALITIES
from model import read_json

# Colours that all eyes tell apart (after Okabe and Ito), and a marker for each mode.
STYLE = {
    "never": ("#0072B2", "s"),
    "always": ("#D55E00", "D"),
    "adaptive": ("#009E73", "o"),
    "per_task": ("#B65A92", "^"),
    "random": ("#707070", "X"),
    "oracle": ("#333333", "*"),
}
# Training curves: the stage, and the fields of metrics.jsonl that share a panel.
PANELS = [
    ("base", ["loss"]),
    ("base", ["accuracy", "text_accuracy"]),
    ("select0", ["loss"]),
    ("select1", ["loss"]),
    ("embed", ["nce_direct", "nce_reason"]),
    ("embed", ["decision_right"]),
    ("rl", ["reward_direct", "reward_reason", "reward"]),
    ("rl", ["tokens"]),
    ("rl", ["reason_rate", "p_reason"]),
]
NEEDED = ("preset", "seed", "modes", "curve")  # of report.json
COLUMNS = ("never", "always", "p_reason", "new_tokens")  # of a record, for the slider
BYTES = 2_800_000  # of the JSON in the page; the template takes some 30 kB more
SIDE = 144  # pixels of a thumbnail
LONGEST = 600  # characters of a text
TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html")


def check(path, rows, keys):
    """The rows, if each is an object with these keys; else ValueError names file and row."""
    for number, row in enumerate(rows):
        for key in keys:
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{path}: object {number} has no {key!r}")
    return rows


def read_lines(path, keys):
    """The objects of a JSON-lines file; a kill may have left half a line at its end."""
    with open(path, encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON lines ({error})") from None
    return check(path, rows, keys)


def read_run(run):
    """A run folder -> (report.json, eval/summary.json, {dataset: rows of its queries.jsonl}).

    A row is a query: p_reason, the rationale, and per mode its score and first three candidates.
    """
    path = os.path.join(run, "report.json")
    [report] = check(path, [read_json(path)], NEEDED)
    path = os.path.join(run, "eval", "summary.json")
    [summary] = check(path, [read_json(path)], ("datasets", "threshold"))
    records = {}
    for name, row in summary["datasets"].items():
        path = os.path.join(run, "eval", row["modality"], f"{name}_queries.jsonl")
        records[name] = read_lines(path, ("id", "label", "top3", "rationale", *COLUMNS))
        if len(records[name]) != row["queries"]:
            raise ValueError(f"{path}: has {len(records[name])} of {row['queries']} queries")
    return report, summary, records


def training_curves(log):
    """Rows of metrics.jsonl -> [{"title", "series": [{"name", "points": [[step, value], ...]}]}].

    A panel without a point is left out, and so is a value that is not finite.
    """
    stages = {}
    for row in log:
        # A stage that began again replaces its rows.
        earlier = stages.get(row["stage"], [])
        stages[row["stage"]] = [r for r in earlier if r["step"] < row["step"]] + [row]
    curves = []
    for stage, fields in PANELS:
        series = []
        for field in fields:
            rows = [r for r in stages.get(stage, []) if math.isfinite(r.get(field, math.nan))]
            if rows:
                points = [[r["step"], r[field]] for r in rows]
                series.append({"name": field.replace("_", " "), "points": points})
        if series:
            title = ", ".join(line["name"] for line in series)
            curves.append({"title": f"{stage}: {title}", "series": series})
    return curves


def standard_error(records, mode):
    """Of adaptive minus `mode`, see the docstring above."""
    variance = 0.0
    for rows in records.values():
        gaps = [row["adaptive"] - row[mode] for row in rows]
        if len(gaps) > 1:  # one query has no spread
            variance += np.var(gaps, ddof=1) / len(gaps)
    return math.sqrt(variance) / len(records)


def difference(modes, records, mode):
    """Adaptive against `mode` -> (what it does to it, the numbers)."""
    score = modes[mode]["overall"]
    gap = modes["adaptive"]["overall"] - score
    sure = 2 * standard_error(records, mode)
    word = "beats" if gap > 0 else "loses to"
    if abs(gap) <= max(sure, 1e-9):
        word = "is level with"
    return word, f"{mode} {score:.3f} ({gap:+.3f} ± {sure:.3f})"


def verdict(modes, records):
    """-> (title, sentences), whichever way the numbers fall."""
    score = {mode: row["overall"] for mode, row in modes.items()}
    tokens = {mode: row["tokens_per_query"] for mode, row in modes.items()}
    never, against_never = difference(modes, records, "never")
    always, against_always = difference(modes, records, "always")
    title = f"One model, used three ways: adaptive {never} never and {always} always"
    if never == always:
        title = f"One model, used three ways: adaptive {never} never and always"
    # From a coin, which knows nothing, to hindsight, which knows the result.
    way = score["oracle"] - score["random"]
    gained = score["adaptive"] - score["random"]
    nothing = "there was nothing to decide"
    reached = f"adaptive went {gained / way:.0%} of that way" if way > 1e-9 else nothing
    return title, [
        f"Quality: adaptive {score['adaptive']:.3f}, {against_never}, {against_always}. "
        "± is two standard errors over the queries.",
        f"Cost: {tokens['adaptive']:.1f} generated tokens a query, where always takes "
        f"{tokens['always']:.1f}. {modes['adaptive']['reason_rate']:.0%} of the queries reason.",
        f"Decision: from a coin of the same rate ({score['random']:.3f}) to hindsight "
        f"({score['oracle']:.3f}), {reached}. Who decides by the task's name alone gets "
        f"{score['per_task']:.3f} at best.",
        "Never and always are this same model, forced: one trained for them is not measured here.",
    ]


def what_is_missing(report, curves):
    """-> sentences about what this run does not have, in place of empty figures and zeros."""
    notes = {
        "adaptivity": "How many steps the queries need is not known for this data.",
        "selection": "This run selected no rationales.",
    }
    sentences = [note for key, note in notes.items() if not report.get(key)]
    logged = {curve["title"].partition(":")[0] for curve in curves}
    for stage in ("base", "embed", "rl"):
        if stage not in logged:
            sentences.append(f"Stage {stage} left no training log.")
    return sentences


def markdown(report, title, sentences):
    """report.md: the sentences, the figure, and a table of what each mode gets."""
    modes = report["modes"]
    lines = ["| | " + " | ".join(modes) + " |", "|---" + "|---:" * len(modes) + "|"]

    def add(name, values):
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        lines.append("| " + " | ".join([name, *cells]) + " |")

    for field in ("overall", *MODALITIES, "reason_rate", "tokens_per_query", "ms_per_query"):
        add(field, [row[field] for row in modes.values()])
    for name in modes["never"]["datasets"]:
        add(name, [row["datasets"][name] for row in modes.values()])
    parts = [f"# {title}", *sentences, "![quality against generated tokens](tradeoff.png)"]
    parts += ["\n".join(lines), f"Preset {report['preset']}, seed {report['seed']}"]
    return "\n\n".join(parts) + "\n"


def draw_tradeoff(modes, curve, title, path):
    """The figure: x is generated tokens per query, y the mean quality over the datasets.

    A straight line from never to always is what a coin gets at its rates; the curve is what the
    decision gets at its thresholds. The legend holds the numbers, so that no label hides another.
    """
    figure = Figure((9, 4.6), layout="constrained", dpi=150)
    axes = figure.subplots()

    def draw(rows, form, colour, label):
        x = [row["tokens_per_query"] for row in rows]
        y = [row["overall"] for row in rows]
        axes.plot(x, y, form, color=colour, ms=10, mec="white", label=label)

    coin = [modes["never"], modes["always"]]
    draw(coin, "--", STYLE["random"][0], "a coin at other rates")
    draw(curve, "-", STYLE["adaptive"][0], "adaptive at other thresholds")
    for mode, row in modes.items():
        label = f"{mode}: {row['overall']:.3f} at {row['tokens_per_query']:.1f} tokens"
        colour, marker = STYLE[mode]
        draw([row], marker, colour, label)
    axes.set(xlabel="generated tokens per query", ylabel="mean quality over the datasets")
    axes.set_title(title, loc="left", fontsize=12)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path)


def thumbnail(ref):
    """An image reference -> a data: URI, which is the image itself and needs no file beside it.

    At most SIDE pixels a side; as WebP, which keeps drawings and photographs small.
    """
    image = data.load_image(ref)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


class Page:
    """Cards and their images, as long as there is room for them.

    A card: {"dataset", "row", "id", "text", "images", "rationale", "never", "always"}. row is its
    place in the page's per-query records; never and always are the first three candidates,
    {"text", "images", "right"}. images are numbers, so one that occurs twice is stored once.
    """

    def __init__(self, room):
        self.room = room  # bytes left
        self.cards = []
        self.images = {}  # image reference -> data: URI; items refer to them by their order

    def show(self, item):
        """An item -> {"text", "images": numbers}; of a video four frames."""
        refs = data.listed(item.get("image"))
        if "video" in item:
            frames = item["video"]["frames"]
            chosen = np.linspace(0, len(frames) - 1, min(4, len(frames))).astype(int)
            refs += [frames[i] for i in chosen]
        for ref in refs:
            if ref not in self.images:
                self.images[ref] = thumbnail(ref)
                self.room -= len(self.images[ref]) + 4
        order = list(self.images)
        text = f"{item.get('instruction', '')} {item.get('text', '')}".strip()
        return {"text": text[:LONGEST], "images": [order.index(ref) for ref in refs]}

    def fill(self, records, root, reading):
        """The first query of each dataset, then the second ...: chosen by a rule, not by hand.

        So what is seen of a dataset is a fair sample of it, failures included. reading: how the
        evaluation read the data, so that queries and candidates are the same. ValueError if they
        are not: the run belongs to other data.
        """
        sets = {name: data.load_eval(root, name, **reading) for name in records}
        for name, rows in records.items():
            if [row["id"] for row in rows] != sets[name].query_ids:
                raise ValueError(f"{root}: its {name} has other queries than the run's eval folder")
        for i in range(max(len(rows) for rows in records.values())):
            for name, rows in records.items():
                if i < len(rows) and self.room > 0:
                    self.add(sets[name], i, rows[i])

    def add(self, es, i, record):
        """Query i of a data.EvalSet; record is its row of queries.jsonl."""
        card = {"dataset": es.name, "row": i, "id": str(record["id"]), **self.show(es.queries[i])}
        card["rationale"] = record["rationale"] or ""
        for mode in ("never", "always"):
            card[mode] = []
            for key in record["top3"][mode]:
                candidate = self.show(es.candidates[es.index[key]])
                card[mode].append({**candidate, "right": key in record["label"]})
        self.cards.append(card)
        self.room -= len(json.dumps(card)) + 2


def write_report(run, data_root):
    """report.md, tradeoff.png and report.html of a run folder whose test sets lie in data_root.

    ValueError, one line, for a file that is missing or damaged.
    """
    report, summary, records = read_run(run)
    log = os.path.join(run, "metrics.jsonl")
    curves = training_curves(read_lines(log, ("stage", "step")) if os.path.exists(log) else [])
    title, sentences = verdict(report["modes"], records)
    sentences += what_is_missing(report, curves)
    payload = {key: report[key] for key in NEEDED}
    payload |= {key: report.get(key, {}) for key in ("seconds", "adaptivity", "selection")}
    payload |= {"title": title, "threshold": summary["threshold"], "training": curves}
    payload["datasets"] = {}
    for name, rows in records.items():
        payload["datasets"][name] = {key: [row[key] for row in rows] for key in COLUMNS}
    page = Page(BYTES - len(json.dumps(payload)))
    if page.room > 0:
        page.fill(records, data_root, summary.get("reading", {}))
    else:
        payload["datasets"] = {}  # the page then has no slider
        sentences.append("There are too many queries for the page: report.md has the numbers.")
    sentences.append(f"{len(page.cards)} of the test queries are shown as cards in report.html.")
    payload |= {"sentences": sentences, "cards": page.cards}
    payload["images"] = list(page.images.values())
    draw_tradeoff(report["modes"], report["curve"], title, os.path.join(run, "tradeoff.png"))
    with open(os.path.join(run, "report.md"), "w", encoding="utf-8") as file:
        file.write(markdown(report, title, sentences))
    with open(TEMPLATE, encoding="utf-8") as file:
        template = file.read()
    # < is written as an escape: no text of the run can end the script element that it is in.
    text = json.dumps(payload, allow_nan=False).replace("<", "\\u003c")
    with open(os.path.join(run, "report.html"), "w", encoding="utf-8") as file:
        file.write(template.replace("__DATA__", text))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("report.py: python report.py RUN [DATA_ROOT]")
    try:
        write_report(sys.argv[1], (sys.argv[2:] or [os.path.join(sys.argv[1], "data")])[0])
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
