"""
A model that sees, from nothing: the base of the pocket world, in place of a published checkpoint.

The idea. A tiny Qwen3-VL reads documents and learns to go on with them: an image and what it shows,
a question and its answer, or a question, a <think> block that looks things up one by one, and the
answer. So it can see and look up before anybody asks it to reason about a pair: what steps of
reasoning are made of is here, when to take them is not.

The maths. Next-token cross-entropy on the texts that have a skill (see below), and a summary loss:
the state at <|endoftext|>, which is pooled later, is asked for all words of the answer at once. It
would else know only how the answer begins.

How to run: it is the first stage of train.py (see pretrain_base there):
    python train.py --stage base

Left out: any text or image from outside the pocket world. A run with --model skips this file.
"""

import json
from dataclasses import replace

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import scale
from model import CONFIGS, Qwen3VL
from pocket import (
    CELLS,
    DIGITS,
    FAMILIES,
    ITEMS,
    LONGEST,
    MOVES,
    PARROT,
    PLACES,
    SHARP,
    THINGS,
    VOCABULARY,
    WORDS,
    Bank,
    describe,
    draw_digits,
    draw_things,
    few_things,
    makes,
    name,
    number,
    onwards,
    pick,
    put,
    sample,
)
from processor import Processor, Tokenizer, collate

# --------------------------------------------------------------------------------------------------
# Pretraining documents: "describe what you see", and the look-ups that steps are made of.
# A document is (item, parts, summary):
#     item     {"image": ...} and perhaps a "text": the user's turn, see processor.py
#     parts    [(text, skill)], which follow it: the model learns the texts that have a skill (its
#              name); the others, whose skill is None, only ask
#     summary  "red star": the words that <|endoftext|> sums up, or "" for no summary
# Skills: describe, page, crop and change say what is seen or would be; clip does so for a clip or
# for one of its places; at, follow and move look one thing up in an image; account does so in a
# text; table adds two digits; answer answers, at once or after a <think> block; repeat repeats a
# phrase; form ends a <think> block, and a document.


def says(item, text, skill):
    """A document that says one thing, and whose summary that is."""
    return item, [(text, skill)], text


def thinks(steps, answer, skill):
    """A <think> block of these parts, and what follows from it -> the parts of

    <think> \\n steps \\n </think> \\n\\n <|endoftext|> answer
    """
    form = [(text, "form") for text in ("\n", "</think>", "\n\n")]  # how a block ends is learnt
    after = [("<|endoftext|>", None), (answer, skill)]
    return [("<think>", None), ("\n", None), *steps, *form, *after]


def answers(item, facts, rng):
    """facts [(question, cue, statement, answer, skill)]. The user asks the last one. In half of the
    documents the answer comes first, and the other look-ups follow as practice. In the rest a
    <think> block looks up all facts, and the answer follows it.

    ("what is right of nw ?", "nw red star . right", "n blue moon", "blue moon", "move")
    """
    question, _, _, answer, _ = facts[-1]
    steps = []
    for _, cue, statement, _, skill in facts:  # the cue asks, the statement is learnt
        steps += [(f" . {cue}", None), (f" {statement}", skill)]
    if rng.random() < 0.5:
        steps[0] = (facts[0][1], None)  # no stop before the first one
        parts = thinks(steps, answer, "answer")
    else:
        parts = [(answer, "answer"), *steps[:-2]]  # without the last fact: it is the answer
    return item | {"text": question}, parts, answer


def base_document(bank, rng, described):
    """About something seen. described: the share of scenes (images of nine cells) that are
    described, not asked about.

    of a hundred  5  an image and "put a red star at nw"  ->  what it then shows
                 55  an image: described, or asked about
                 26  a clip: the same
                 11  a page                               ->  "tea ink ten four"
                  3  a single thing                       ->  "red star"
    """
    kind = rng.random()
    if kind < 0.05:  # what the image shows after a change
        scene = few_things(rng)
        cell = rng.integers(9)
        thing = draw_things(1, rng)[0]
        item = {"image": bank.grid(scene, rng), "text": f"put a {name(thing)} at {CELLS[cell]}"}
        return says(item, describe(put(scene, cell, thing)), "change")
    if kind < 0.60:
        return scene_document(bank, rng, described)
    if kind < 0.86:
        return clip_document(bank, rng)
    if kind < 0.97:  # a page
        words = sample(WORDS, 2, rng)
        words = words if rng.random() < 0.5 else words[:1]
        marks = draw_digits(2, rng)
        text = " ".join([*words, number(*marks)])
        item = {"image": bank.page(words, marks, rng)}
        return says(item, text, "page")
    thing = pick([*THINGS, *range(10)], rng)
    item = {"image": bank.tile(thing, rng)}
    return says(item, name(thing), "crop")


def scene_document(bank, rng, described):
    """Nine things, or things, digits and blanks: described, or asked about.

    an image                         ->  "nw red star n three ne blue moon ..."
    an image and "what is at ne ?"   ->  "blue moon . nw red star . right n three ..."
                                     or  <think> nw red star ... ne blue moon </think> blue moon
    """
    scene = draw_things(9, rng)
    if rng.random() < 0.4:
        scene = [mixed_kind(rng, 0.4, 0.4) for _ in range(9)]  # 0.2 for a blank
    asked = rng.random() > described
    if asked and rng.random() < 0.6:  # few things are easier to find than nine
        kept = rng.permutation(9)[: rng.integers(1, 6)]  # cells
        scene = [kind if cell in kept else None for cell, kind in enumerate(scene)]
    item = {"image": bank.grid(scene, rng)}
    facts = scene_facts(scene, rng) if asked else []
    if facts:
        return answers(item, facts, rng)
    return says(item, describe(scene) or "blank", "describe")


def mixed_kind(rng, things, digits):
    """A thing, a digit or a blank. things, digits: their chances."""
    draw = rng.random()
    if draw < things:
        return pick(THINGS, rng)
    return pick(range(10), rng) if draw < things + digits else None


def scene_facts(scene, rng):
    """Up to eight look-ups, as answers() wants them:

    at      what is at a cell               nw -> "red star"
    follow  where the thing's colour leads  nw red star . -> "right n blue moon" (pocket.RULE)
    move    what is next to it              nw red star . down -> "w green bar"

    To the user's question, follow is the same as at: the thing is the answer.
    """
    cells = [cell for cell, kind in enumerate(scene) if kind is not None]
    facts = []
    if not cells:
        return facts
    for cell in rng.choice(cells, 8).tolist():  # a cell may come twice
        label, thing = CELLS[cell], name(scene[cell])
        draw = rng.random()  # at 30 %, follow 35 % (of a digit: move), move 35 % if possible
        question = f"what is at {label} ?" if rng.random() < 0.6 else f"the thing at {label}"
        if draw < 0.3:
            facts.append((question, label, thing, thing, "at"))
            continue
        move = pick(MOVES, rng)
        there = MOVES[move][cell]
        if draw < 0.65 and isinstance(scene[cell], tuple):  # digits send nobody
            leads, there = onwards(cell, scene[cell])
            if there is not None:
                leads += f" {CELLS[there]} {name(scene[there])}"
            facts.append((question, f"{label} {thing} .", leads, thing, "follow"))
        elif there is not None and scene[there] is not None:
            question = f"what is {move} of {label} ?"
            answer = name(scene[there])
            statement = f"{CELLS[there]} {answer}"
            facts.append((question, f"{label} {thing} . {move}", statement, answer, "move"))
    return facts


def clip_document(bank, rng):
    """Two or three states: described, or asked about.

    a clip                               ->  "first left three first right red bar ..."
    a clip and "what is second left ?"   ->  as in scene_document
    """
    kinds = [mixed_kind(rng, 0.25, 0.6) for _ in PLACES]  # 0.15 for a blank
    if rng.random() < 0.3:
        kinds = kinds[:4]  # two states
    item = {"video": bank.clip(kinds, rng)}
    things = describe(kinds, PLACES)
    if not things or rng.random() < 0.5:
        return says(item, things or "blank", "clip")
    facts = []
    for i in rng.permutation(len(kinds)).tolist():
        thing = name(kinds[i])
        facts.append((f"what is {PLACES[i]} ?", PLACES[i], thing, thing, "clip"))
    return answers(item, facts, rng)


def text_document(rng):
    """Without an image: look things up in an account, add, or repeat. Only a repeated phrase has a
    summary.

    "rent three , food five"  ->  " . food" " five" " . rent" " three" ...
    "add"                     ->  " . three five" " makes eight" ...
    """
    kind = rng.random()
    parts = []
    if kind < 0.3:  # an account
        lines = rng.integers(1, len(ITEMS) + 1)
        digits = draw_digits(lines, rng)
        for i in rng.integers(0, lines, 6).tolist():
            parts += [(f" . {ITEMS[i]}", None), (f" {DIGITS[digits[i]]}", "account")]
        return {"text": describe(digits, ITEMS, between=" , ")}, parts, ""
    if kind < 0.45:  # additions
        for a, b in draw_digits((12, 2), rng):
            parts += [(f" . {DIGITS[a]} {DIGITS[b]}", None), (f" {makes(a + b)}", "table")]
        return {"text": "add"}, parts, ""
    return repeat_document(rng)


def repeat_document(rng):
    """A phrase is repeated, and summed up.

    "red star"        ->  "red star"
    "repeat the end"  ->  <think> three . five makes eight . red star </think> red star
    """
    things, digits = draw_things(3, rng), draw_digits(8, rng)  # not all are used
    caption = describe(few_things(rng), between=" , ")  # "n red star , e blue moon , s green bar"
    cell = pick(CELLS, rng)
    words = rng.permutation(WORDS)[: rng.integers(3)]  # none, one or two
    page = " ".join([*words, number(*digits[1:3])])  # "tea ink forty four"
    colour, _ = things[0]
    phrases = [name(things[0]), DIGITS[digits[0]], caption, colour, cell, page]
    phrase = pick(phrases, rng)
    if rng.random() < 0.5:
        return says({"text": phrase}, phrase, "repeat")
    # What may stand before the end: a thing, five numbers, or an addition, mostly a wrong one.
    names = [DIGITS[digit] for digit in digits[3:]]
    addition = f"{names[0]} . {names[1]} {makes(rng.integers(19))}"
    steps = [name(things[1]), " . ".join(names), addition]
    before = (f"{pick(steps, rng)} . {phrase}", None)  # it is not learnt: it only stands there
    return {"text": "repeat the end"}, thinks([before], phrase, "repeat"), phrase


def vocabulary_texts():
    """Every sentence form of the world, so that the tokenizer meets every word.

    -> ["nw", "n", ..., " nw", ..., "what is at nw ?", "nw red star . stay", ...]
    """
    rng = np.random.default_rng([0, 7])
    bank = Bank(rng, copies=1)
    spaced = [f" {word}" for word in VOCABULARY]  # " red" inside a text is another token than "red"
    texts = [*VOCABULARY, *spaced, *PARROT, "describe", "blank"]
    for family in FAMILIES:
        texts += [family.asks, family.wants]
        for _ in range(8):
            pair = family.make(bank, rng, LONGEST)
            fields = vars(pair).values()  # caption, text, answer ...
            texts += [field for field in fields if isinstance(field, str)]
            texts.append(pair.explain(SHARP))
    for _ in range(50):
        for item, parts, _ in (base_document(bank, rng, 0.35), text_document(rng)):
            texts.append(item.get("text", ""))
            texts.append("".join(text for text, _ in parts))
    return texts


# --------------------------------------------------------------------------------------------------
# The tokenizer and the model that start from nothing

# Qwen's split of text into words, and its added tokens in their published order.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think>"
).split()


def train_tokenizer(texts):
    """A byte-level BPE with Qwen's pattern and added tokens, merged until every word of the texts
    is one token -> its tokenizer.json as a dict:

    {"model": {"vocab": {"Ġred": 291, ...}, "merges": ...}, "added_tokens": ..., ...}
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # one spelling of accents, as for Qwen
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    # The size is never reached: merging stops when nothing is left to merge.
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10**6, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*texts, "\n\n"], trainer)  # \n\n follows </think>
    for token in SPECIALS:  # Qwen's from <|fim_prefix|> on are not special; here all with bars are
        added = tokenizers.AddedToken(token, special="|" in token, normalized=False)
        tokenizer.add_tokens([added])
    return json.loads(tokenizer.to_str())


PIXELS = (1024, 65536)  # of an image: at least, at most; a visual token covers 32 x 32 of them


def new_model(seed, device="cpu", config=CONFIGS["pocket"]):
    """A Qwen3-VL of random weights in these shapes, and the Processor of its items."""
    tokenizer = Tokenizer(train_tokenizer(vocabulary_texts()))
    config = replace(config, vocab=config.vocab or tokenizer.size, **tokenizer.markers)
    torch.manual_seed(seed)  # of the weights
    model = Qwen3VL(config).init_weights().to(device)
    return model, Processor(tokenizer, config, *PIXELS, *PIXELS, max_frames=8)  # images, frames


# --------------------------------------------------------------------------------------------------
# The base stage's update: next-token prediction on documents, and a summary at <|endoftext|>

DOCUMENTS = 32  # of an update, about something seen; half as many of text alone come with them
TEXT_WEIGHT = 0.3  # of the text documents' loss
SUMMARY_WEIGHT = 0.5  # of "<|endoftext|> sums up the answer"

# What steps of reasoning are made of. The other skills come on the way.
STEP_SKILLS = ("at", "move", "follow", "clip", "table", "account")
SKILL_WANTED = 0.93  # held-out token accuracy of each of them
DESCRIBE_STEPS = 240  # first updates, in which scenes are described, and none is asked about


def read_document(processor, item, parts, summary):
    """A document is a row of tokens: its prompt, the direct <|endoftext|> and a branch.

        prompt <|endoftext|> <think> nw red star </think> <|endoftext|> red star <|im_end|>

    -> prompt  of the Processor
       branch  the ids that follow the direct <|endoftext|>
       length  of the row
       skills  [("at", places in the row of one text that is learnt)]
       learn   all these places
       ends    places of <|endoftext|>, or [] without a summary
       words   [ids of the words that these sum up]
    """
    prompt = processor({"text": "describe"} | item)  # an item's own text takes its place
    encode, special = processor.tokenizer.encode, processor.tokenizer.special
    row = prompt["ids"].tolist()
    skills = []
    for text, skill in [("<|endoftext|>", None), *parts, ("<|im_end|>", "form")]:
        begin = len(row)  # where this text's tokens begin
        row += [special[text]] if text in special else encode(text)
        if skill:
            skills.append((skill, range(begin, len(row))))
    inside = encode(" " + summary)  # inside a text its first token is another one
    ends = [place for place, token in enumerate(row) if token == processor.eos_id]
    return {
        "prompt": prompt,
        "branch": row[len(prompt["ids"]) + 1 :],
        "length": len(row),
        "skills": skills,
        "learn": [place for _, places in skills for place in places],
        "ends": ends if summary else [],
        "words": list({*encode(summary), *inside[:1]}),
    }


def read_batch(model, processor, documents):
    """-> ids (B, S); the model's states (B, S, H); before (B, S), the place of the token that comes
    before each one: the branch continues the prompt, not the direct <|endoftext|> between them.

    row:     prompt prompt <|endoftext|> <think> nw
    before:  0      0      1             1       3
    """
    prompts = [document["prompt"] for document in documents]
    branches = [[document["branch"]] for document in documents]  # one a prompt
    batch = collate(prompts, processor, branches, model.device)
    ids, branch = batch["ids"], batch["branch"]  # branch: 0 prompt, 1 <|endoftext|>, 2 the rest
    skipped = F.pad(branch[:, :-1] == 1, (1, 0))  # True right after the direct <|endoftext|>
    place = torch.arange(ids.shape[1], device=ids.device)  # (S,)
    before = place - 1 - skipped.long()
    return ids, model(batch), before.clamp(min=0)


def places_of(documents, key, ids):
    """Rows (n,) and columns (n,) in ids (B, S) of the documents' places. key: "learn" or "ends"."""
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for i, document in enumerate(documents):
        chosen[i, document[key]] = True
    return chosen.nonzero(as_tuple=True)


def document_losses(model, processor, documents):
    """Read documents [n] -> (3, n): sums over each document's tokens of the next-token loss, over
    its <|endoftext|>s of the summary loss, and the number of tokens that were right."""
    ids, h, before = read_batch(model, processor, documents)
    zeros = h.new_zeros(len(documents))
    row, column = places_of(documents, "learn", ids)
    logits = model.logits(h[row, before[row, column]])  # (tokens, vocab)
    wanted = ids[row, column]  # (tokens,)
    losses = F.cross_entropy(logits, wanted, reduction="none")  # (tokens,)
    hits = logits.argmax(-1) == wanted  # (tokens,)
    loss = zeros.index_add(0, row, losses)  # (n,): sums over each document's tokens
    right = zeros.index_add(0, row, hits.float())
    # What the summary's softmax should be: each id counts alike, and the first word has two.
    share = h.new_zeros(len(documents), model.c.vocab)  # (n, vocab)
    for i, document in enumerate(documents):
        share[i, document["words"]] = 1 / len(document["words"])
    row, column = places_of(documents, "ends", ids)
    logits = model.logits(h[row, column])  # (ends, vocab)
    losses = F.cross_entropy(logits, share[row], reduction="none")  # (ends,)
    summary = zeros.index_add(0, row, losses)
    return torch.stack([loss, summary, right])


def pretrain_step(model, processor, bank, rng, described, chunk_tokens):
    """Gradients of one update, left in the parameters -> metrics: {"loss": 0.9, ...}. described:
    see base_document.

    Documents about something seen and documents of text alone are two kinds: the loss is a mean
    over the tokens of each, and over the summaries of each.

        L = token + TEXT_WEIGHT * text_token + SUMMARY_WEIGHT * (summary + text_summary)
    """
    drawn = [base_document(bank, rng, described) for _ in range(DOCUMENTS)]
    drawn += [text_document(rng) for _ in range(DOCUMENTS // 2)]  # [(item, parts, summary)]
    documents = [read_document(processor, *document) for document in drawn]
    # 1) how much a token and a summary of each document weigh
    kind = torch.arange(len(drawn)) // DOCUMENTS  # (48,): 0 seen, 1 text
    sizes = [(len(document["learn"]), len(document["ends"])) for document in documents]
    counts = torch.zeros(2, 2)  # tokens and summaries, of each kind
    counts.index_add_(1, kind, torch.tensor(sizes).T.float()).clamp_(min=1)
    factors = torch.tensor([[1.0, TEXT_WEIGHT], [SUMMARY_WEIGHT, SUMMARY_WEIGHT]])
    weight = (factors / counts)[:, kind].to(model.device)  # (2, 48)
    # 2) gradients, chunk by chunk
    sums = torch.zeros(3, len(drawn))  # what document_losses says of each
    lengths = [document["length"] for document in documents]  # in tokens
    for rows in scale.chunks_of(lengths, chunk_tokens):  # rows: indices of documents
        part = document_losses(model, processor, [documents[i] for i in rows])  # (3, n)
        loss = (part[:2] * weight[:, rows]).sum()
        (loss / scale.world_size()).backward()  # gradients of all processes are added up
        sums[:, rows] = part.detach().cpu()
    # 3) means over tokens, over summaries, over tokens
    means = torch.zeros(3, 2).index_add(1, kind, sums) / counts[[0, 1, 0]]  # (3, 2)
    (loss, text_loss), (summary, text_summary), (accuracy, text_accuracy) = means.tolist()
    return {
        "loss": loss + TEXT_WEIGHT * text_loss + SUMMARY_WEIGHT * (summary + text_summary),
        "summary": summary,
        "text_summary": text_summary,
        "accuracy": accuracy,
        "text_accuracy": text_accuracy,
    }


@torch.no_grad()
def measure_skills(model, processor, bank, rng):
    """Held-out token accuracy of each skill: {"account": 0.98, "answer": 0.99, "at": 0.97, ...}."""
    drawn = [base_document(bank, rng, 1.0) for _ in range(48)]  # scenes described
    drawn += [base_document(bank, rng, 0.0) for _ in range(48)]  # asked about
    drawn += [text_document(rng) for _ in range(48)]
    scores = {}  # {skill: [accuracy of one text]}
    for start in range(0, len(drawn), 32):
        chunk = drawn[start : start + 32]
        documents = [read_document(processor, *document) for document in chunk]
        ids, h, before = read_batch(model, processor, documents)
        guesses = model.logits(h).argmax(-1)  # (B, S): the token that each place foretells
        right = guesses.gather(1, before) == ids
        for document, hits in zip(documents, right.float()):
            for skill, places in document["skills"][:-1]:  # all but <|im_end|>
                accuracy = hits[list(places)].mean()
                scores.setdefault(skill, []).append(accuracy.item())
    return {skill: np.mean(values) for skill, values in sorted(scores.items())}
