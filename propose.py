"""
Rationales: who writes them, and the files in which they travel.

The idea. A rationale is what may be said about a query before it is embedded. A proposer writes
candidates r ~ π(r | q), and selection (select.py) finds out which of them explain the pair. So
variety counts, and errors are allowed. None may see the target: words that nobody could write
at test time would teach nothing.

    the model itself   propose(): a checkpoint of ours continues the query with <think>; any other
                       is asked in words (PROMPTS) and ends its answer as it was taught to
    any server         files of requests and responses in the OpenAI batch format
    a file             train.py --rationales FILE

A file of rationales has one object a line:

    {"id": "OK-VQA/17", "side": "query", "proposer": "base", "text": "A red bus", "key": "0b7..."}

"id" is the pair's: its dataset (of a user's train.jsonl "own") and its row there, from 0. "key" is
a hash of the pair's content, because a row number alone would fit another table, too; a row without
a key is taken on trust. "proposer" is an author and the number of a try: "base", "base#2" and
"base#3" are three texts by the author "base" about one pair.

    python propose.py --write-requests requests.jsonl --data ROOT --model-name NAME --k 4
    split -l 20000 requests.jsonl                    shards, for as many servers
    vllm run-batch -i xaa -o xaa.responses --model NAME --runner generate
    python propose.py --read-responses *.responses --requests requests.jsonl --proposer NAME

--image-urls file writes paths in place of image files of at most --max-pixels: half a kilobyte for
a request. Larger ones, and those inside tables, are still PNG. The server must allow it (vllm:
--allowed-local-media-path, with ROOT's real path). Responses may come in any order; what is
missing, doubled, foreign, broken or cut off is counted and named, and the rest is used.

Left out: rationales about targets, tools, retries (send the requests of the failures again).
Sources: OpenAI's batch API and vLLM's documentation of run-batch. The prompts are ours.
"""

import argparse
import base64
import collections
import io
import json
import math
import os
import sys
from array import array
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import data
from model import Rows, generate, numbered_lines, write_rows
from processor import collate

TEMPERATURE = 0.7  # several answers of one proposer have to differ; the number is ours
# The columns that are kept of a file of rationales. Others may hold NaN, which write_rows refuses.
COLUMNS = ("id", "side", "proposer", "text", "key", "truncated")
# What reading a line of JSON raises where it holds something else than was expected.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
# How a query is put to a model that follows instructions. --write-requests asks in as many of
# these ways as --prompts says, each an author of its own: NAME-0, NAME-1 ... train.py asks in the
# first alone: then all tries share one prefill.
PROMPTS = (
    "Think step by step about what the query shows or asks for, look up whatever is needed, and "
    "end with what should be found.",
    "List the facts in the query that matter for finding its match, one after the other, then "
    "draw the conclusion.",
    "Describe the query briefly and precisely, then say what its match must look like.",
    "Work out the answer to the query. Show every intermediate result. End with the answer alone.",
)

BRIEFLY = "Use at most 60 words."  # so that it ends before --max_new_tokens


# --------------------------------------------------------------------------------------------------
# The model itself


def question(item, prompt_number=0):
    """The query's item with one of PROMPTS behind its text. Without an instruction of its own it
    has no system turn: Qwen's default one asks for an embedding."""
    text = f"{item.get('text', '')}\n\n{PROMPTS[prompt_number]} {BRIEFLY}".strip()
    return {"instruction": "", **item, "text": text}


def propose(model, processor, pairs, cfg, generator, ask=False):
    """Sample cfg.num_candidates rationales for every pair's query -> rows of a rationales file.

    pairs: {"id", "query", "key"}; a query is what the Processor makes of an item. ask: the queries
    were made of `question(item)`, and <|im_end|> ends an answer. A "truncated" row ran out of
    cfg.max_new_tokens; it stays, for selection judges it. An empty rationale is left out: it says
    no more than the direct embedding.
    """
    pairs = sorted(pairs, key=lambda p: len(p["query"]["ids"]))  # neighbours need little padding
    longest = len(pairs[-1]["query"]["ids"])
    # cfg.chunk_tokens fit in a pass with gradients, and 4 times as many without. At most 64 prompts
    # go together, because each holds the key-value caches of its answers, too.
    together = max(1, min(64, 4 * cfg.chunk_tokens // longest))
    sampling = processor.generation  # <think>\n is forced, </think> ends; special ids are banned
    if ask:
        # No <think> is forced: a checkpoint that was never taught to close it may ramble. A model
        # that thinks by itself may write both markers.
        allowed = {processor.im_end_id, processor.think_id, processor.think_end_id}
        suppress_tokens = [i for i in processor.suppress_tokens if i not in allowed]
        sampling = {"stop_ids": (processor.im_end_id,), "suppress_tokens": suppress_tokens}
    sampling = sampling | {"temperature": TEMPERATURE, "generator": generator}
    rows = []
    for start in range(0, len(pairs), together):
        part = pairs[start : start + together]
        batch = collate([p["query"] for p in part], processor, device=model.device)
        # One prefill per query: all its rationales continue it.
        rollouts = generate(model, batch, cfg.max_new_tokens, cfg.num_candidates, **sampling)
        # tokens [n][num_candidates] lists of ids
        for p, answers, truncated in zip(part, rollouts.tokens, rollouts.truncated.tolist()):
            for k, ids in enumerate(answers):
                if ask:
                    text = without_markers(processor.tokenizer.decode(ids))
                else:
                    text = processor.rationale_text(ids)
                if not text:
                    continue
                row = {
                    "id": p["id"],
                    "side": "query",
                    "proposer": nth("base", k),
                    "text": text,
                    "truncated": truncated[k],
                    "key": p["key"],
                }
                rows.append(row)
    return rows


def without_markers(text):
    """Thoughts and answer as one text."""
    for marker in ("<think>", "</think>", "<|im_end|>"):
        text = text.replace(marker, "")
    return text.strip()


def nth(proposer, k):
    """The name of an author's k-th text about one pair, counted from 0."""
    return f"{proposer}#{k + 1}" if k else proposer


def author(proposer):
    """Who wrote it: "careful#2" is the second try of "careful" about the same pair."""
    return proposer.split("#")[0]


# --------------------------------------------------------------------------------------------------
# Files of rationales (for the method alone, go on with select.py)


class Rationales:
    """A file of rationales by pair. The texts stay on the disk; in memory is where they stand.

    numbers: as of read_rationale. only: authors whose rows count; empty: all.
    """

    def __init__(self, path, numbers=(), only=()):
        self.path = path
        self.numbers = numbers
        self.offsets = {}  # {"OK-VQA/17": the bytes at which its rows begin}
        self.authors = collections.Counter()  # {author: number of rows}
        self.cut = 0  # rows that were cut off ("truncated")
        self.left_out = 0  # rows about a target, or without a word
        end = 0
        for place, line in numbered_lines([path]):  # a line is bytes, its line break included
            start = end
            end += len(line)
            if not line.strip():
                continue
            row = read_rationale(place, line, numbers)
            if row["side"] == "target" or not row["text"].strip():
                self.left_out += 1
            elif not only or author(row["proposer"]) in only:
                self.offsets.setdefault(row["id"], array("q")).append(start)
                self.authors[author(row["proposer"])] += 1
                self.cut += bool(row.get("truncated"))  # only our own propose() says so

    def of(self, pair):
        """The rows about a pair, in the file's order, each with the pair's key and under a name of
        its own: a second "base" becomes "base#2". ValueError where a row has another key: it was
        written when this id was another pair's."""
        rows = {}
        with open(self.path, "rb") as file:
            for offset in self.offsets.get(pair["id"], ()):
                file.seek(offset)
                row = read_rationale(self.path, file.readline(), self.numbers)
                if row.get("key", pair["key"]) != pair["key"]:
                    about = f"{pair['id']}: a rationale of {self.path!r} is about another pair"
                    raise ValueError(f"{about}: has the training table changed since?")
                row["key"] = pair["key"]
                name = row["proposer"]
                k = 1
                while row["proposer"] in rows:
                    row["proposer"] = nth(name, k)
                    k += 1
                rows[row["proposer"]] = row
        return list(rows.values())

    def texts(self, pairs):
        """{pair id: {proposer: text}} of some pairs."""
        texts = {}
        for p in pairs:
            texts[p["id"]] = {row["proposer"]: row["text"] for row in self.of(p)}
        return texts


def read_rationale(place, line, numbers=()):
    """One line of a rationales file -> its row. ValueError names the place of a broken one.

    numbers: more columns, which have to be finite numbers. Older files say "worker" for "proposer".
    """
    try:
        row = {key: value for key, value in json.loads(line).items() if value is not None}
        row = {"side": "query", "proposer": row.get("worker")} | row
        # A target's words are left out later; an unknown side must not pass for a query's.
        if row["side"] not in ("query", "target"):
            raise ValueError(f"'side': expected query or target, got {data.short(row['side'])}")
        for key in ("id", "proposer", "text"):
            if not data.is_text(row.get(key)):
                raise ValueError(f"{key!r}: expected text, got {data.short(row.get(key))}")
        for key in numbers:
            if not math.isfinite(row[key]):
                raise ValueError(f"{key!r}: expected a finite number, got {row[key]}")
    except BROKEN as e:
        raise ValueError(f"{place}: {type(e).__name__}: {e}") from None
    return {key: row[key] for key in (*COLUMNS, *numbers) if key in row}


# --------------------------------------------------------------------------------------------------
# Any server: requests


def requests(options):
    """Yields the chat requests of every training pair, or of the hard ones, one per prompt.

    One request asks for all options.k answers, so its images travel and are encoded once. The
    custom id, say "OK-VQA/17|1f0c...|0", holds pair, key and number of the prompt; responses repeat
    it. The pairs that train.py keeps for rl are asked about in vain: --rl_holdout is not known
    here.
    """
    temperature = TEMPERATURE if options.k > 1 else 0.0  # a single answer is greedy
    train = data.train_sets(options.data)
    if train.missing:
        tqdm.write(f"missing: {', '.join(train.missing)}")
    hard = hard_pairs(options.hard) if options.hard else None
    asked = 0
    for source, size in enumerate(train.sizes):
        rows = range(min(size, options.limit or size))
        for row in tqdm(rows, desc=train.names[source], disable=None):
            if hard is not None and train.id(source, row) not in hard:
                continue
            try:
                pair = train.pair(source, row)
                key = data.pair_key(pair)
                images = [image_url(ref, options) for ref in data.refs(pair["query"])]
            # Training will not use this row either. The last is Pillow's, of an image too large.
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                tqdm.write(f"skipped: {data.BadData(train.id(source, row), error)}")
                continue
            content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
            asked += 1
            for prompt_number in range(options.prompts):
                text = {"type": "text", "text": question(pair["query"], prompt_number)["text"]}
                yield {
                    "custom_id": f"{pair['id']}|{key}|{prompt_number}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": options.model_name,
                        "messages": [{"role": "user", "content": [*content, text]}],
                        "n": options.k,
                        "max_tokens": options.max_tokens,
                        "temperature": temperature,
                    },
                }
    if not asked:
        raise ValueError(f"{options.data}: no pair to ask about")


def hard_pairs(path):
    """Ids of the pairs in a run's select/judged.jsonl to whose target the direct embedding gives
    less than a half: under select's defaults no other pair can keep a rationale."""
    hard = set()
    for place, line in numbered_lines([path]):
        row = read_rationale(place, line, ("direct",))
        if row["direct"] < -math.log(2):
            hard.add(row["id"])
    return hard


def image_url(ref, options):
    """An image of at most options.max_pixels as a URL: the path of its file where --image-urls asks
    for it and the file is small enough, else a PNG, which loses nothing.

    Servers shrink what is larger, each by rules of its own, and a page as PNG takes 9 MB.
    """
    if options.image_urls == "file" and isinstance(ref, str):
        with Image.open(ref) as image:  # reads the header alone
            if image.width * image.height <= options.max_pixels:
                return Path(ref).as_uri()
    image = data.load_image(ref)
    shrink = min(1.0, math.sqrt(options.max_pixels / (image.width * image.height)))
    image = image.resize([max(1, int(shrink * side)) for side in image.size])
    png = io.BytesIO()
    image.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


# --------------------------------------------------------------------------------------------------
# Any server: responses


def read_responses(options, asked):
    """Files of responses -> (rows, failures [(custom id or place, why)]).

    asked: {custom id: how many answers} of all requests; empty: not known. Failures are a request
    without a response, a response to no request, a second one, an error, an answer that is missing,
    has no text or was cut off, without its conclusion (--accept-cut takes those). Where no answer
    of a response is usable, a later response to the same request takes its place: a retry.
    """
    rows, failed = [], []
    answered = set()  # custom ids with a usable answer
    unusable = {}  # {custom id: [why]}, of requests without any
    for place, line in numbered_lines(options.read_responses):
        try:
            response = json.loads(line)
            custom_id = response["custom_id"]
            pair, key, prompt_number = custom_id.rsplit("|", 2)
            answers = answers_of(response, options.accept_cut)
        except BROKEN as e:
            failed.append((place, f"not a response as we asked for ({type(e).__name__}: {e})"))
            continue
        # Of other data an id may be in use here, too: such words must not pass for ours.
        if asked and custom_id not in asked:
            failed.append((custom_id, "not one of the --requests"))
            continue
        if custom_id in answered:
            failed.append((custom_id, "a second response"))
            continue
        if all(why for _, why in answers):
            unusable.setdefault(custom_id, []).extend(why for _, why in answers)
            continue
        answered.add(custom_id)
        unusable.pop(custom_id, None)
        failed += [(custom_id, "no answer")] * (asked.get(custom_id, 0) - len(answers))
        for k, (text, why) in enumerate(answers):
            if why:
                failed.append((custom_id, why))
                continue
            proposer = nth(f"{options.proposer}-{prompt_number}", k)
            row = {"id": pair, "side": "query", "proposer": proposer, "text": text, "key": key}
            rows.append(row)
    for custom_id, reasons in unusable.items():
        failed += [(custom_id, why) for why in reasons]
    heard = answered | set(unusable)
    failed += [(custom_id, "no response") for custom_id in asked if custom_id not in heard]
    return rows, failed


def answers_of(response, accept_cut):
    """[(text, why it cannot be used, or "")] of the choices of one response:

    {"custom_id": "OK-VQA/17|1f0c...|0", "response": {"status_code": 200, "body": {"choices": [
        {"message": {"content": "A red bus, so ..."}, "finish_reason": "stop"}]}}, "error": null}
    """
    reply = response.get("response") or {}
    body = reply.get("body") or {}
    # The error stands beside the response where the request never reached the model, and in its
    # body where the model's server refused it.
    error = response.get("error") or body.get("error")
    if error or not body.get("choices"):
        return [("", str(error or f"no choices, status {reply.get('status_code')}")[:200])]
    return [answer_of(choice, accept_cut) for choice in body["choices"]]


def answer_of(choice, accept_cut):
    """(text, why it cannot be used, or "") of one choice. Thoughts that the server keeps in a field
    of their own belong to the text."""
    finish = choice.get("finish_reason")
    if finish not in (None, "stop") and not accept_cut:
        return "", f"cut off: finish_reason {finish}"
    message = choice.get("message") or {}
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    for part in (thoughts, content):
        if not data.is_text(part):
            return "", f"expected text, got {data.short(part)}"
    text = without_markers(f"{thoughts}\n{content}")
    return text, "" if text else "no text"


# --------------------------------------------------------------------------------------------------
# The command line


def main():
    """Options in; files of requests or of rationales, and what went wrong with them, out."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    act = parser.add_mutually_exclusive_group(required=True)
    act.add_argument("--write-requests", metavar="FILE", help="ask about all pairs of --data")
    act.add_argument("--read-responses", metavar="FILE", nargs="+", help="responses -> rationales")
    add = parser.add_argument_group("with --write-requests").add_argument
    add("--data", metavar="ROOT", help="training data, see data.py")
    add("--model-name", default="Qwen/Qwen3-VL-8B-Instruct", help="whom the requests ask")
    add("--k", type=data.count, default=4, help="answers to a request; a single one is greedy")
    add("--prompts", type=int, choices=(1, 2, 3, 4), default=1, help="ways to ask, a request each")
    add("--limit", type=data.count, help="at most so many pairs per dataset")
    add("--hard", metavar="JUDGED", help="only hard pairs, as a run's select/judged.jsonl has them")
    add("--max-tokens", type=data.count, default=128, help="of an answer (128)")
    add("--max-pixels", type=data.count, default=501760, help="of an image; larger ones shrink")
    add("--image-urls", choices=("data", "file"), default="data", help="images, or their paths")
    add = parser.add_argument_group("with --read-responses").add_argument
    add("--requests", metavar="FILE", nargs="+", default=[], help="names what is missing, foreign")
    add("--accept-cut", action="store_true", help="use answers that were cut off, too")
    add("--proposer", default="model", help="its name: rows have NAME-0, NAME-1 ... by prompt")
    add("--out", metavar="FILE", default="rationales.jsonl", help="the rationales")
    options = parser.parse_args()
    if not options.proposer or set(options.proposer) & set(",#"):
        parser.error("--proposer: expected a name without , and #")
    if options.write_requests and not options.data:
        parser.error("--write-requests needs --data")
    written = options.write_requests or options.out
    read = [*(options.read_responses or []), *options.requests, options.hard]
    if os.path.realpath(written) in [os.path.realpath(path) for path in read if path]:
        parser.error(f"{written}: would take the place of what is read")

    if options.write_requests:
        write_rows(options.write_requests, requests(options))
        print(f"written: {options.write_requests}")
        return
    asked = {}  # {custom id: answers that are wanted}; empty without --requests
    # What stands in the files may be no request, or one of somebody else's.
    try:
        for request in Rows(*options.requests):
            asked[request["custom_id"]] = int(request["body"]["n"])
    except (KeyError, TypeError) as error:
        names = " ".join(options.requests)
        raise ValueError(f"--requests {names}: these are no requests ({error!r})") from None
    rows, failed = read_responses(options, asked)
    for custom_id, why in failed:
        line = " ".join(f"no rationale for {custom_id}: {why}".split())  # a server's words
        print(line, file=sys.stderr)
    print(f"rationales: {len(rows)}\nfailed: {len(failed)}")
    if not rows:
        raise ValueError(f"no rationale to write to {options.out}")
    write_rows(options.out, rows)
    print(f"written: {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"propose.py: {error}")
