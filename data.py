"""
MMEB, whole: the training sources of VLM2Vec-V2 and the 78 test sets of MMEB-V2, as two tables of rows over a handful of parsers.

The idea. A benchmark is not code, it is a table: where the rows lie, which columns they have, what is said before the picture. So every
dataset here is one row of TRAIN or EVAL below, every kind of file one parser of a few lines, and the model only ever sees items:

    item = {"text": str, "image": ref | [ref, ...], "video": {"frames": [ref, ...], "fps": float}, "instruction": str}   (absent keys omitted)
    ref  = an absolute path, or a Picture(table, row, column) inside a parquet file; load_picture(ref) decodes either

Strings are VLM2Vec's to the byte with its visual placeholder taken out (our chat template puts pictures first, so nothing is lost) and all
other white space kept: it is worth 1.7 points on VisDial. prompts="qwen" instead moves the instruction to item["instruction"].

The sampler's maths. A global batch of B pairs is B/b sub-batches of b pairs; each draws a dataset d with p(d) = w_d / Σw and takes the next b
rows of d's own shuffled walk. In-batch negatives of one sub-batch so share a source, which makes them hard. Every draw is a function of
(seed, step), every shuffle of (seed, dataset, epoch): workers and ranks cannot change the stream, and its state is {"step", "taken"}.

How to run:
    python data.py --check ROOT [--train | --eval] [--names A,B] [--on_bad skip]     what is found, missing, short or broken
    python data.py --check ROOT --fetch [--names A,B]                                the same after `hf download` of what is missing
    python data.py --bench [--rows 1000000]                                          the scale figures, on generated tables
ROOT mirrors hub ids: ROOT/<hub id>/... as `hf download ID --repo-type dataset --local-dir ROOT/ID` leaves it (then unpack the archives).
Your own data needs no code: put pairs in MMEB's columns (qry, qry_image_path, pos_text, pos_image_path, optional neg_text, neg_image_path)
into ROOT/train.jsonl and ROOT/test.jsonl (or .parquet), pictures beside them; or write ROOT/datasets.json (see "the row").

Left out: decoding videos (the published frame folders are read), audio, the agent and text-only tasks of MMEB-V3, the English-only copies of
ViDoRe-V2 that the leaderboard does not count. Sources: VLM2Vec @ 6e1e1d4 and the dataset cards; where the reference is wrong we say so.
"""

import argparse
import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import io
import json
import os
import re
import struct
import sys
import tempfile
import time
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

IMG = "<|image_1|>"                       # Phi-3.5-V's token, hard-coded in MMEB's text; we strip it, also where no picture follows (WebQA)
SMALL = 4 << 20                           # bytes of a parquet file that is simply read; larger ones are memory-mapped through CACHE
CACHE = os.environ.get("NANOMMEMB_CACHE", os.path.expanduser("~/.cache/nanommemb"))   # never inside the user's data
FRAMES, FPS = 8, 2.0                      # VLM2Vec looks at 8 frames of a video (Qwen3-VL-Embedding at 64); 2 per second is what Qwen assumes
warnings.simplefilter("error", Image.DecompressionBombWarning)      # Pillow's limit stays on (89 Mpx) and is an error, not a warning


class BadData(ValueError):
    """Something in the data is not what it should be. The message always names dataset, row or file."""


# ---------------------------------------------------------------------------------------------------------------------
# The row. Both tables, and ROOT/datasets.json = {"train": [rows], "eval": [rows]} which takes their place where it exists, have these keys.
# A row may be short: only name is needed, the rest is filled in by complete().
#
#   name      str          unique; the key of every score and id
#   parser    str          train: mmeb, video_caption, video_retrieval, video_qa, page_qa, page      eval: see EVAL_PARSERS below
#   hub       str          hub id = folder under ROOT ("" = ROOT itself)
#   table     [glob]       where in ROOT the rows lie; the first glob that matches wins; {hub} {repo} {name} {split} {config} {part} are filled in
#                          (repo = the hub id's last part; part = queries, corpus or qrels)
#   split     str          "original" / "test" ...        config  str | [str]     hub config(s); several are read one after the other
#   media     [folder]     where in ROOT pictures and frame folders are looked for, in this order, file by file
#   frames    int          frames per video               fps     float           what the item says about them
#   fetch     [[hub, glob, shell command that unpacks it]]   what `hf download` must bring besides the hub
#   train only:  rows int (published), cap int (first N are used), weight float
#   eval only:   modality image | video | visdoc, scope local | global, queries int (published), family str, ood bool, inst str and tgt str
#                (the parser's prompts), tail str (what ends a query), columns [id, caption] of video_ret, labels (a key of LABELS, or a list),
#                first int (first N rows are used), language str (filter), original {...} (keys that page_labels="original" replaces)

DEFAULTS = {
    "train": dict(parser="mmeb", hub="", table=None, split=None, config="", media=None, frames=FRAMES, fps=FPS, fetch=[],
                  rows=None, cap=None, weight=1.0),
    "eval": dict(parser="pairs", hub="", table=None, split="test", config="", media=None, frames=None, fps=FPS, fetch=[],
                 modality="image", scope=None, queries=None, family="own", ood=True, inst="", tgt="", tail="\n", columns=None, labels=None,
                 first=None, language=None, original=None),
}
# how the hub lays tables out: one folder per config, everything in data/, the config in the file name, or plain json
TABLES = ["{hub}/" + t for t in (
    "{config}/{split}-*.parquet", "data/{config}/{split}-*.parquet", "data/{split}-*.parquet", "{config}/{split}*.parquet",
    "{config}-{split}*.parquet", "{config}/{split}*.json*", "json/{config}.json*", "{split}*.json*", "{config}.json*", "*_{config}.json*")]

MMEB_TRAIN = [  # name (underscores; the test sets have hyphens), rows of one split, cap and weight of VLM2Vec's train_alltasks.yaml
    ("ImageNet_1K",     100000, 100000, 1.0),
    ("N24News",          48988,  50000, 1.0),
    ("HatefulMemes",      8500,  10000, 0.5),
    ("VOC2007",           7844,  10000, 0.5),
    ("SUN397",           19850,  20000, 0.5),
    ("OK-VQA",            9009,  10000, 0.5),
    ("A-OKVQA",          17056,  20000, 0.5),
    ("DocVQA",            None,  40000, 1.0),      # None: only known to about 1 % (39.5k, 24.0k, 28.3k, 70k, 123k, 100k, 100k, 100k, 113k,
    ("InfographicsVQA",   None,  25000, 0.5),      # 15.9k, 17.2k, 100k), so "short" is not claimed for them
    ("ChartQA",           None,  28000, 0.5),
    ("Visual7W",          None,  70000, 1.0),
    ("VisDial",           None, 130000, 1.0),
    ("CIRR",             26116,  30000, 0.5),
    ("VisualNews_t2i",    None, 100000, 1.0),
    ("VisualNews_i2t",    None, 100000, 1.0),
    ("MSCOCO_t2i",        None, 100000, 1.0),
    ("MSCOCO_i2t",        None, 120000, 1.0),
    ("NIGHTS",            None,  20000, 0.5),
    ("WebQA",             None,  20000, 0.5),
    ("MSCOCO",            None, 100000, 1.0),
]
SHARE = "ShareGPTVideo/train_video_and_instruction"
SHARE_MEDIA = [f"{SHARE}/train_300k", f"{SHARE}/video_frames/train_300k", SHARE]
TRAIN = [dict(name=name, parser="mmeb", hub="TIGER-Lab/MMEB-train", table=["{hub}/{name}/{split}-*.parquet"], rows=rows, cap=cap, weight=weight,
              # paths start with images/<subset>/Train/: the folder that CONTAINS images/ is wanted; VLM2Vec's own yaml says .../image
              media=["TIGER-Lab/MMEB-train", "TIGER-Lab/MMEB-train/image", "TIGER-Lab/MMEB-train/images"],
              fetch=[["TIGER-Lab/MMEB-train", f"images_zip/{name}.zip", f"unzip -qn images_zip/{name}.zip -d images"]]) for name, rows, cap, weight in MMEB_TRAIN] + [
    dict(name="colpali_train_set", parser="page_qa", hub="vidore/colpali_train_set", table=["{hub}/data/train-*.parquet"], rows=118195, weight=10.0),
    dict(name="visrag-indomain", parser="page", hub="openbmb/VisRAG-Ret-Train-In-domain-data", table=["{hub}/data/train-*.parquet", "{hub}/train-*.parquet"],
         rows=122752, weight=12.0),
] + [dict(name=name, parser=parser, hub=SHARE, table=["{hub}/video_instruction/train/sft/" + f"{file}.jsonl", "{hub}/" + f"{file}.jsonl"], rows=rows, cap=rows,
          weight=5.0, media=SHARE_MEDIA) for name, parser, file, rows in [
    ("video_caption_300k",       "video_caption",   "video_caption_300k",       300000),
    ("video_caption_300k-video", "video_retrieval", "video_caption_300k",       300000),
    ("video_qa_240k",            "video_qa",        "video_240k_caption_15k",   240000),
]]

IMAGE_SETS = [  # name, parser, family, out of domain; 1000 queries each, local candidates, hit@1, the positive is candidate 0
    ("ImageNet-1K", "image_cls", "I-CLS", False),      ("N24News", "image_cls", "I-CLS", False),
    ("HatefulMemes", "image_cls", "I-CLS", False),     ("VOC2007", "image_cls", "I-CLS", False),
    ("SUN397", "image_cls", "I-CLS", False),           ("Place365", "image_cls", "I-CLS", True),
    ("ImageNet-A", "image_cls", "I-CLS", True),        ("ImageNet-R", "image_cls", "I-CLS", True),
    ("ObjectNet", "image_cls", "I-CLS", True),         ("Country211", "image_cls", "I-CLS", True),
    ("OK-VQA", "image_qa", "I-QA", False),             ("A-OKVQA", "image_qa", "I-QA", False),
    ("DocVQA", "image_qa", "I-QA", False),             ("InfographicsVQA", "image_qa", "I-QA", False),
    ("ChartQA", "image_qa", "I-QA", False),            ("Visual7W", "image_qa", "I-QA", False),
    ("ScienceQA", "image_qa", "I-QA", True),           ("VizWiz", "image_qa", "I-QA", True),
    ("GQA", "image_qa", "I-QA", True),                 ("TextVQA", "image_qa", "I-QA", True),
    ("VisDial", "image_t2i", "I-RET", False),          ("CIRR", "image_i2i_vg", "I-RET", False),
    ("VisualNews_t2i", "image_t2i", "I-RET", False),   ("VisualNews_i2t", "image_i2t", "I-RET", False),
    ("MSCOCO_t2i", "image_t2i", "I-RET", False),       ("MSCOCO_i2t", "image_i2t", "I-RET", False),
    ("NIGHTS", "image_i2i_vg", "I-RET", False),        ("WebQA", "image_t2i", "I-RET", False),
    ("FashionIQ", "image_i2i_vg", "I-RET", True),      ("Wiki-SS-NQ", "image_t2i", "I-RET", True),
    ("OVEN", "image_i2i_vg", "I-RET", True),           ("EDIS", "image_t2i", "I-RET", True),
    ("MSCOCO", "image_i2i_vg", "I-VG", False),         ("RefCOCO", "image_i2i_vg", "I-VG", True),
    ("RefCOCO-Matching", "image_i2i_vg", "I-VG", True), ("Visual7W-Pointing", "image_i2i_vg", "I-VG", True),
]

V2, TASKS = "TIGER-Lab/MMEB-V2", "TIGER-Lab/MMEB-V2/video-tasks"
QA = ("Given a video and a question, select the most accurate answer from the provided candidates. "
      "Return only the exact text of your chosen answer. Question: ")
VIDEO = "Understand the content of the provided video."
MOMENT = "Find the clip that corresponds to the described scene in the given video:"
MVBENCH = ("episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action object_existence "
           "object_interaction object_shuffle moving_direction action_localization scene_transition action_count moving_count moving_attribute "
           "state_change fine_grained_pose character_order egocentric_navigation counterfactual_inference").split()
VIDEO_SETS = [  # name, parser, family, scope, queries, hub (VLM2Vec/..), frame folders, prompt, anything else
    ("K700", "video_cls", "V-CLS", "global", 1000, "Kinetics-700", ["K700"], "Recognize the category of the video content.", {"labels": "K700"}),
    ("SmthSmthV2", "video_cls", "V-CLS", "local", 1000, "SmthSmthV2", ["SSv2"],
     "What actions or object interactions are being performed by the person in the video?", {"first": 1000}),
    ("HMDB51", "video_cls", "V-CLS", "global", 1000, "HMDB51", ["HMDB51"],
     "What actions or objects interactions are the person in the video doing?", {"labels": "HMDB51"}),
    ("UCF101", "video_cls", "V-CLS", "global", 1000, "UCF101", ["UCF101"],
     "What activities or sports are being performed by the person in the video?", {"labels": "UCF101"}),
    ("Breakfast", "video_cls", "V-CLS", "global", 433, "Breakfast", ["Breakfast"],
     "Recognize the breakfast type that the person is cooking in the video. ", {"labels": "Breakfast"}),          # the trailing space is theirs
    ("MVBench", "mvbench", "V-QA", "local", 4000, "MVBench", ["MVBench"], QA, {"config": MVBENCH, "split": "train"}),
    ("Video-MME", "videomme", "V-QA", "local", 2700, "Video-MME", ["Video-MME"], QA, {}),
    ("NExTQA", "nextqa", "V-QA", "local", 8564, "NExTQA", ["NExTQA"], QA, {"config": "MC"}),
    ("EgoSchema", "egoschema", "V-QA", "local", 500, "EgoSchema", ["egoschema", "EgoSchema"], QA, {"config": "Subset"}),
    ("ActivityNetQA", "activitynetqa", "V-QA", "local", 1000, "ActivityNetQA", ["ActivityNetQA"], QA, {}),
    ("DiDeMo", "video_ret", "V-RET", "global", 1004, "DiDeMo", ["DiDeMo"],
     "Find a video that includes the following described scenes:", {"columns": ["video", "caption"]}),
    ("MSR-VTT", "video_ret", "V-RET", "global", 1000, "MSR-VTT", ["MSR-VTT"],
     "Find a video that contains the following visual content:", {"columns": ["video_id", "caption"], "config": "test_1k"}),
    ("MSVD", "video_ret", "V-RET", "global", 670, "MSVD", ["MSVD"],
     "Find the video snippet that corresponds to the given summary:", {"columns": ["video_id", "caption"]}),
    ("VATEX", "video_ret", "V-RET", "global", 4478, "VATEX", ["VATEX"],
     "Select a video that fits the description provided:", {"columns": ["videoID", "enCap"]}),
    ("YouCook2", "video_ret", "V-RET", "global", 3179, "lmms-lab/YouCook2", ["YouCook2"],
     "Find a video that demonstrates the following action while making a recipe:", {"columns": ["id", "sentence"], "split": "val"}),
    ("QVHighlight", "moment", "V-MRET", "local", 1083, "QVHighlight", ["QVHighlight"], MOMENT, {}),
    ("Charades-STA", "moment", "V-MRET", "local", 727, "Charades-STA", ["Charades-STA", "Charades_STA"], MOMENT, {}),
    ("MomentSeeker", "momentseeker", "V-MRET", "local", 1602, "MomentSeeker", ["MomentSeeker"], "",
     {"tgt": "Understand the content of the provided video clip."}),
]


def frame_folders(family, names):
    """Where the same archive ends up: VLM2Vec's yaml, Qwen's yaml (= the archives as packed), and two third parties'."""
    kind, base = {"V-CLS": "video_cls", "V-QA": "video_qa", "V-RET": "video_ret", "V-MRET": "video_mret"}[family], f"{TASKS}/frames"
    deep = [f"{base}/{kind}/data/ziyan/video_retrieval/{n}/frames" for n in names] + [f"{base}/data/ziyan/video_retrieval/{n}/frames" for n in names]
    flat = [f"{base}/{folder}/{n}" for n in names for folder in (kind, f"{kind}/{kind}", ".")]
    return (deep if kind == "video_ret" else []) + flat


PAGE, PAGES = "Find a document image that matches the given query:", "Understand the content of the provided document image."
PAGE_SETS = [  # name, family, hub id, queries, out of domain, anything else; global, graded, ndcg_linear@5
    ("ViDoRe_arxivqa", "ViDoRe-V1", "vidore/arxivqa_test_subsampled_beir", 500, False, {}),
    ("ViDoRe_docvqa", "ViDoRe-V1", "vidore/docvqa_test_subsampled_beir", 451, False, {}),
    ("ViDoRe_infovqa", "ViDoRe-V1", "vidore/infovqa_test_subsampled_beir", 494, False, {}),
    ("ViDoRe_tabfquad", "ViDoRe-V1", "vidore/tabfquad_test_subsampled_beir", 280, True, {}),
    ("ViDoRe_tatdqa", "ViDoRe-V1", "vidore/tatdqa_test_beir", 1646, False, {}),
    ("ViDoRe_shiftproject", "ViDoRe-V1", "vidore/shiftproject_test_beir", 100, True, {}),
    ("ViDoRe_syntheticDocQA_artificial_intelligence", "ViDoRe-V1", "vidore/syntheticDocQA_artificial_intelligence_test_beir", 100, True, {}),
    ("ViDoRe_syntheticDocQA_energy", "ViDoRe-V1", "vidore/syntheticDocQA_energy_test_beir", 100, True, {}),
    ("ViDoRe_syntheticDocQA_government_reports", "ViDoRe-V1", "vidore/syntheticDocQA_government_reports_test_beir", 100, True, {}),
    ("ViDoRe_syntheticDocQA_healthcare_industry", "ViDoRe-V1", "vidore/syntheticDocQA_healthcare_industry_test_beir", 100, True, {}),
    ("ViDoRe_esg_reports_human_labeled_v2", "ViDoRe-V2", "vidore/esg_reports_human_labeled_v2", 52, True, {}),
    ("ViDoRe_biomedical_lectures_v2_multilingual", "ViDoRe-V2", "vidore/biomedical_lectures_v2", 640, True, {}),
    ("ViDoRe_economics_reports_v2_multilingual", "ViDoRe-V2", "vidore/economics_reports_v2", 232, True, {}),
    ("ViDoRe_esg_reports_v2_multilingual", "ViDoRe-V2", "vidore/esg_reports_v2", 228, True, {}),
    ("VisRAG_ArxivQA", "VisRAG", "openbmb/VisRAG-Ret-Test-ArxivQA", 816, False, {"split": "train"}),
    ("VisRAG_ChartQA", "VisRAG", "openbmb/VisRAG-Ret-Test-ChartQA", 63, False, {"split": "train"}),
    ("VisRAG_MP-DocVQA", "VisRAG", "openbmb/VisRAG-Ret-Test-MP-DocVQA", 591, False, {"split": "train"}),
    ("VisRAG_SlideVQA", "VisRAG", "openbmb/VisRAG-Ret-Test-SlideVQA", 556, False, {"split": "train"}),
    ("VisRAG_InfoVQA", "VisRAG", "openbmb/VisRAG-Ret-Test-InfoVQA", 718, False, {"split": "train"}),
    ("VisRAG_PlotQA", "VisRAG", "openbmb/VisRAG-Ret-Test-PlotQA", 863, False, {"split": "train"}),
    # the page sets had wrong labels until November 2025: the -fixed data is the default, page_labels="original" reads the old ones
    ("ViDoSeek-page", "VisDoc-OOD", "VLM2Vec/ViDoSeek-page-fixed", 1142, True, {"original": {"hub": "VLM2Vec/ViDoSeek-page"}}),
    ("ViDoSeek-doc", "VisDoc-OOD", "VLM2Vec/ViDoSeek", 1142, True, {}),
    ("MMLongBench-page", "VisDoc-OOD", "VLM2Vec/MMLongBench-page-fixed", 838, True, {"original": {"hub": "VLM2Vec/MMLongBench"}}),
    ("MMLongBench-doc", "VisDoc-OOD", "VLM2Vec/MMLongBench-doc", 838, True, {}),
]
BEIR = [place + t for place in ("{hub}/", f"{V2}/visdoc-tasks/data/" + "{repo}/", f"{V2}/visdoc-tasks/data/" + "{hub}/") for t in (
    "{part}/{split}-*.parquet", "data/{part}/{split}-*.parquet", "{part}/{split}*.parquet", "{part}-{split}*.parquet", "{part}/{split}*.json*",
    "{part}*.parquet", "{part}.json*")]

EVAL = [dict(name=name, modality="image", parser=parser, family=family, ood=ood, scope="local", queries=1000, hub="ziyjiang/MMEB_Test_Instruct",
             table=["{hub}/{name}/test-*.parquet"], tail="\n\n" if name == "VisDial" else "\n",           # "to be consistent with v1", says VLM2Vec
             media=[f"{V2}/image-tasks", f"{V2}/image-tasks/MMEB", "TIGER-Lab/MMEB-eval/images", "TIGER-Lab/MMEB-eval"],
             fetch=[[V2, "image-tasks/*", "cd image-tasks && tar -xzf mmeb_v1.tar.gz && mv MMEB/* ."]]) for name, parser, family, ood in IMAGE_SETS]
EVAL += [dict({"tgt": VIDEO}, name=name, modality="video", parser=parser, family=family, ood=True, scope=scope, queries=queries,
              hub=hub if "/" in hub else f"VLM2Vec/{hub}", inst=inst, media=frame_folders(family, folders), table=TABLES + [  # and the offline copies
                  f"{TASKS}/data/{mirror}.jsonl" for mirror in dict.fromkeys([*(f.lower().replace("-", "_") for f in folders), name.lower()])],
              fetch=[[V2, f"video-tasks/frames/{(kind := 'video_' + family[2:].lower())}*", f"cd video-tasks/frames && " + (
                  f"cat {kind}.tar.gz-0? | tar -xz" if family == "V-QA" else f"tar -xzf {kind}.tar.gz" if family == "V-MRET" else
                  f"mkdir -p {kind} && tar -xzf {kind}.tar.gz -C {kind}")]], **more)
         for name, parser, family, scope, queries, hub, folders, inst, more in VIDEO_SETS]
EVAL += [dict(name=name, modality="visdoc", parser="beir", family=family, ood=ood, scope="global", queries=queries, hub=hub, table=BEIR,
              inst=PAGE, tgt=PAGES, media=[f"{V2}/visdoc-tasks/images/{name}", f"{V2}/visdoc-tasks/{name}"] +
              [f"{V2}/visdoc-tasks/{d}{name.removeprefix('ViDoRe_')}" for d in ("images/", "")] * (family == "ViDoRe-V2"),
              **more) for name, family, hub, queries, ood, more in PAGE_SETS]


def complete(row, kind):
    """A short row -> a whole one. An unknown key is an error: a typing mistake must not become a default."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not re.fullmatch(r"[^/\\\0]+", row["name"]) or row["name"] in (".", ".."):
        raise BadData(f"datasets.json: a row of {kind!r} needs a name that can name a file, got {str(row)[:80]}")
    if unknown := sorted(set(row) - set(DEFAULTS[kind]) - {"name"}):
        raise BadData(f"{row['name']}: unknown key {unknown[0]!r} in its row; known: {', '.join(DEFAULTS[kind])}")
    row = {**DEFAULTS[kind], **row}
    if row["parser"] not in (known := TRAIN_PARSERS if kind == "train" else EVAL_PARSERS):
        raise BadData(f"{row['name']}: unknown parser {row['parser']!r}; known: {', '.join(known)}")
    if kind == "eval" and row["modality"] not in ("image", "video", "visdoc"):
        raise BadData(f"{row['name']}: modality is {row['modality']!r}, not image, video or visdoc")
    row["table"] = row["table"] or (BEIR if row["parser"] == "beir" else TABLES)
    row["table"] = [row["table"]] if isinstance(row["table"], str) else row["table"]
    row["media"] = [row["media"]] if isinstance(row["media"], str) else row["media"] or [row["hub"]]
    if kind == "eval":
        row["scope"] = row["scope"] or ("global" if row["parser"] in ("pairs", "beir", "video_ret") else "local")
    return row


def tables(root, kind):
    """The rows that hold for this root: its datasets.json, else train.jsonl / test.jsonl beside the pictures, else the published tables."""
    listing, file = os.path.join(root, "datasets.json"), "train" if kind == "train" else "test"
    if not os.path.isdir(root):
        raise BadData(f"{root}: no such folder")
    if os.path.exists(listing):
        try:
            with open(listing, encoding="utf-8") as f:
                found = json.load(f)
        except (OSError, ValueError) as e:
            raise BadData(f"{listing}: not readable as JSON ({e})") from None
        if not isinstance(found, dict) or set(found) - {"train", "eval"} or not all(isinstance(rows, list) for rows in found.values()):
            raise BadData(f"{listing}: wants {{\"train\": [rows], \"eval\": [rows]}}")
        rows = found.get(kind, [])
    elif own := [name for name in ("train", "test") for end in ("jsonl", "parquet") if os.path.exists(os.path.join(root, f"{name}.{end}"))]:
        rows = [dict(name="own", table=[f"{file}.jsonl", f"{file}.parquet"])] if file in own else []
    else:
        rows = TRAIN if kind == "train" else EVAL
    rows = [complete(row, kind) for row in rows]
    names = collections.Counter(row["name"] for row in rows)
    if twice := [name for name, n in names.items() if n > 1]:
        raise BadData(f"{listing}: {kind} dataset {twice[0]!r} is listed twice")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Files. Nothing outside ROOT is ever opened, and whatever cannot be read is a BadData that says which file and why.

@functools.lru_cache(maxsize=1 << 16)
def _real(folder):
    return os.path.realpath(folder)


class Root:
    """A folder that cannot be left: not by '..', not by an absolute path, not through a symbolic link.

    (So a hub cache, whose snapshots link to blobs elsewhere, is no root; `hf download --local-dir` writes real files.)"""

    def __init__(self, path):
        self.path, self.last = os.path.realpath(path), {}         # last: folders -> the one that held the previous file

    def inside(self, relative, where):
        """ROOT-relative path -> absolute path; BadData if it is empty, absolute or leads out."""
        if not isinstance(relative, str) or not relative or "\0" in relative:
            raise BadData(f"{where}: {relative!r} is not a path")
        if os.path.isabs(relative) or ".." in re.split(r"[/\\]", relative):
            raise BadData(f"{where}: path {relative!r} leaves the root")
        path = os.path.normpath(os.path.join(self.path, relative))
        real = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
        if os.path.islink(real):
            real = os.path.realpath(real)
        if real != self.path and not real.startswith(os.path.join(self.path, "")):
            raise BadData(f"{where}: path {relative!r} leaves the root (a symbolic link to {real})")
        return path

    def find(self, folders, relative, where, what):
        """The first of the candidate folders that holds `relative`; the one that held the last file is asked first."""
        if not isinstance(relative, str) or not relative or os.path.isabs(relative) or ".." in re.split(r"[/\\]", relative):
            self.inside(relative, where)                          # says what is wrong with it
        key = tuple(folders)
        first = self.last.get(key, 0)
        for i in (first, *(j for j in range(len(key)) if j != first)):
            path = self.inside(os.path.join(key[i], relative), where)
            if os.path.isdir(path) if what == "clip folder" else os.path.isfile(path):
                self.last[key] = i
                return path
        raise BadData(f"{where}: {what} {relative!r} is missing (looked in {', '.join(f or '.' for f in key[:3])}{', ...' * (len(key) > 3)})")

    def glob(self, patterns, where, **names):
        """The files of the first pattern that matches any, sorted (shards in order); AppleDouble and other dot files never match '*'."""
        names = {k: glob.escape(str(v)) for k, v in names.items()}
        for pattern in patterns:
            pattern = os.path.normpath("./" + pattern.format(**names))
            if ".." in pattern.split(os.sep):
                raise BadData(f"{where}: table {pattern!r} leaves the root")
            if files := sorted(f for f in glob.glob(pattern, root_dir=self.path) if f.endswith((".parquet", ".jsonl", ".json"))
                               and os.path.isfile(os.path.join(self.path, f))):
                return [self.inside(f, where) for f in files]
        return []


def damage(path):
    """Why a file cannot be what it should be, from its first bytes: one line, or None."""
    with open(path, "rb") as f:
        head = f.read(64)
    if not head:
        return "is empty (zero bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file: run `git lfs pull` or download it again"
    return "is not a parquet file" if path.endswith(".parquet") and head[:4] != b"PAR1" else None


@functools.lru_cache(maxsize=None)
def _parquet(path, size, changed):
    """One parquet file as an Arrow table that costs no memory: large ones are unpacked once into CACHE and mapped from there.

    Parquet is compressed by the row group: a random row costs a thousand. HF `datasets` unpacks to Arrow for the same reason.
    """
    if why := damage(path):
        raise BadData(f"{path} {why}")
    try:
        file = pq.ParquetFile(path, memory_map=True)
        if size <= SMALL:
            return file.read()
        flat = os.path.join(CACHE, hashlib.sha256(f"{path}|{size}|{changed}".encode()).hexdigest()[:24] + ".arrow")
        if not os.path.exists(flat):
            os.makedirs(CACHE, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:           # so that no half-written file ever has the final name
                part = os.path.join(folder, "part")
                with pa.OSFile(part, "wb") as sink, pa.ipc.new_file(sink, file.schema_arrow) as out:
                    for batch in file.iter_batches(batch_size=1024 if file.metadata.num_rows * 1024 < size else 65536):
                        out.write_batch(batch)                    # small batches where rows are pictures, large where they are text
                os.replace(part, flat)
        return pa.ipc.open_file(pa.memory_map(flat)).read_all()
    except (pa.ArrowException, OSError) as e:
        raise BadData(f"{path} cannot be read: {str(e).splitlines()[0]}") from None


def parquet(path):
    stat = os.stat(path)
    return _parquet(path, stat.st_size, stat.st_mtime_ns)


class Lines:
    """A JSONL file (or a JSON list) as rows: only the byte offsets of the lines are held, so a million rows are 8 MB."""

    def __init__(self, path):
        if why := damage(path):
            raise BadData(f"{path} {why}")
        self.path, self.listed, ends, at = path, None, [], 0
        with open(path, "rb") as f:
            if f.read(1) == b"[":
                f.seek(0)
                self.listed = self.parse(f.read(), 0)
            f.seek(0)
            while block := f.read(1 << 24):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + at)
                at += len(block)
        ends = np.append(np.concatenate(ends), at)
        starts = np.insert(ends[:-1] + 1, 0, 0)
        keep = ends - starts > 1                                  # blank lines are no rows
        self.spans = np.stack([starts[keep], ends[keep]], 1)
        self.file = open(path, "rb")

    def __len__(self):
        return len(self.spans) if self.listed is None else len(self.listed)

    def parse(self, text, i):
        try:
            return json.loads(text.decode("utf-8-sig"))
        except ValueError as e:
            raise BadData(f"{self.path} row {i}: not JSON ({e})") from None

    def __getitem__(self, i):
        start, end = self.spans[i] if self.listed is None else (0, 0)
        row = self.parse(os.pread(self.file.fileno(), int(end - start), int(start)), i) if self.listed is None else self.listed[i]
        if not isinstance(row, dict):
            raise BadData(f"{self.path} row {i}: a JSON object is wanted, this is {type(row).__name__}")
        return row


class Table:
    """Rows of all shards of one dataset by number: table[i] -> {column: value}. Pictures stay where they are, as Picture references."""

    def __init__(self, files, required, optional, where):
        self.parts, self.columns, self.required = [], [*required, *optional], required
        for path in files:
            part = parquet(path) if path.endswith(".parquet") else Lines(path)
            have = part.column_names if path.endswith(".parquet") else list(part[0]) if len(part) else required
            if lost := [c for c in required if c not in have]:
                raise BadData(f"{where}: {path} has no column {', '.join(lost)} (it has {', '.join(have)})")
            self.parts.append((path, part, [c for c in self.columns if c in have]))
        self.ends = np.cumsum([len(part) for _, part, _ in self.parts]).tolist()

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        path, part, have = self.parts[k := bisect.bisect_right(self.ends, i)]
        i -= self.ends[k - 1] if k else 0
        if isinstance(part, Lines):
            row = part[i]
            return {c: row.get(c) for c in self.columns}
        row = dict.fromkeys(self.columns)
        for c in have:
            value = part.column(c)[i]
            row[c] = (Picture(path, i, c) if value.is_valid else None) if c in ("image",) else value.as_py()
        return row

    def empty(self, columns):
        """Which rows have nothing in any of these columns: a bool per row. Parquet text is judged by its offsets alone, unread."""
        out = []
        for path, part, have in self.parts:
            mask = np.ones(len(part), bool)
            if isinstance(part, Lines):
                mask[:] = [not any(row.get(c) for c in columns) for row in map(part.__getitem__, range(len(part)))]
            for c in () if isinstance(part, Lines) else set(columns) & set(have):
                column = part.column(c)
                if pa.types.is_dictionary(column.type):
                    column = column.cast(column.type.value_type)
                textual = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                if c != "image" and not textual and not pa.types.is_nested(column.type) and not pa.types.is_null(column.type):
                    raise BadData(f"{path}: column {c} holds {column.type}, not text")
                filled = pc.greater(pc.binary_length(column), 0) if textual else column.is_valid()
                mask &= ~np.asarray(pc.fill_null(filled, False))
            out.append(mask)
        return np.concatenate(out) if out else np.zeros(0, bool)


def listed(value):
    """None, a value or a list -> a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def text_of(row, column, where, empty=True):
    """A text cell. Training treats null as empty; a test set's required cell must not be null."""
    value = row[column]
    if isinstance(value, str):
        return value
    if value is None and empty:
        return ""
    raise BadData(f"{where}: column {column} is {'null' if value is None else type(value).__name__}, text is wanted")


def list_of(row, column, where):
    """A list of texts; a null in it is bad, as is an empty list."""
    value = row[column]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) for v in value):
        raise BadData(f"{where}: column {column} is {'null' if value is None else 'not a list of texts' if value else 'an empty list'}")
    return list(value)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture inside a parquet file, read when wanted."""
    table: str
    row: int
    column: str

    def read(self):
        value = parquet(self.table).column(self.column)[self.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes) or not value:
            raise BadData(f"{self}: no picture bytes there")
        return value

    def __str__(self):
        return f"{self.table} row {self.row} column {self.column}"


# what Pillow's decoders throw at bytes that are not what they say (found by feeding them mutilated files)
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, RuntimeError, struct.error)


def open_picture(ref):
    """ref -> (PIL picture with only its header read, name for messages)."""
    if isinstance(ref, Image.Image):
        return ref, "picture"
    if isinstance(ref, dict):
        ref = ref.get("bytes") or ref.get("path")
    name = f"{len(ref)} bytes" if isinstance(ref, bytes) else str(ref)
    try:
        im = Image.open(io.BytesIO(ref.read() if isinstance(ref, Picture) else ref) if isinstance(ref, (bytes, Picture)) else ref)
    except FileNotFoundError:
        raise BadData(f"{name}: no such picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadData(f"{name}: too many pixels ({e})") from None
    except UNREADABLE as e:
        if isinstance(e, BadData):
            raise
        why = damage(ref) if isinstance(ref, str) and os.path.isfile(ref) else None
        raise BadData(f"{name}: {why or f'not a picture ({e})'}") from None
    if im.width * im.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):       # by the header, before a byte is decoded
        im.close()
        raise BadData(f"{name}: {im.width}x{im.height} is too many pixels (limit {Image.MAX_IMAGE_PIXELS})")
    return im, name


def load_picture(ref):
    """path | bytes | {"bytes", "path"} | Picture | PIL -> RGB picture.

    As the reference (Image.open(...).convert("RGB")) the EXIF orientation is NOT applied. Unlike it, alpha is laid on white (convert drops it,
    which turns transparent black letters into a black page) and 16-bit grey is scaled (convert clips it to white).
    """
    im, name = open_picture(ref)
    try:
        im.load()
        if im.mode == "RGB" and "transparency" not in im.info:
            return im
        if im.mode.startswith("I;16") or im.mode == "I":
            return Image.fromarray((np.clip(np.asarray(im, np.int64), 0, 65535) // 257).astype(np.uint8)).convert("RGB")
        if im.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in im.info:
            im = im.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", im.size, "white"), im).convert("RGB")
        return im.convert("RGB")
    except (*UNREADABLE, Image.DecompressionBombError) as e:
        raise BadData(f"{name}: broken picture ({e})") from None


def check_picture(ref):
    """Decodes as cheaply as finds every fault: a JPEG at an eighth of its size (all its entropy-coded bytes are still read)."""
    im, name = open_picture(ref)
    try:
        im.draft("RGB", (1, 1))
        im.load()
    except (*UNREADABLE, Image.DecompressionBombError) as e:
        raise BadData(f"{name}: broken picture ({e})") from None
    finally:
        im.close()


def fault(ref):
    """What is wrong with a picture, or None."""
    try:
        check_picture(ref)
    except BadData as e:
        return str(e)


def refs(item):
    """Every picture reference of an item."""
    return listed(item.get("image")) + (list(item["video"]["frames"]) if "video" in item else [])


def decoded(item):
    """The item with its references replaced by pictures; a new dict, the old one is untouched."""
    item = dict(item)
    if "image" in item:
        item["image"] = [load_picture(r) for r in item["image"]] if isinstance(item["image"], list) else load_picture(item["image"])
    if "video" in item:
        item["video"] = {**item["video"], "frames": [load_picture(r) for r in item["video"]["frames"]]}
    return item


def natural(name):
    """frame_2 before frame_10: digits compare as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)]


def frames_of(folder, n, where):
    """Frames of a clip: all in natural order, or n of them at np.linspace(0, last, n) where there are at least n (VLM2Vec's rule).

    Fewer than n are taken as they are; upstream pads with the last frame since June 2026, which costs Qwen3 2.3 points on HMDB51.
    """
    names = sorted((f for f in os.listdir(folder) if f.lower().endswith((".jpg", ".jpeg", ".png")) and f[0] != "."), key=natural)
    if not names:
        raise BadData(f"{where}: clip folder {folder} has no frames")
    if n and n <= len(names):
        names = [names[i] for i in np.linspace(0, len(names) - 1, n, dtype=int)]
    return [os.path.join(folder, name) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Training: one parser per kind of source, row -> (query, target, hard negatives)

def item(text="", image=None, video=None, instruction=None):
    """Only what is there; a side with nothing at all (OK-VQA has blank answers) is {"text": ""}."""
    out = {k: v for k, v in (("text", text), ("image", image), ("video", video), ("instruction", instruction)) if v not in (None, "")}
    return out or {"text": ""}


class Media:
    """Finds what a row refers to: pictures and clips, in the row's candidate folders."""

    def __init__(self, spec, root, frames=None):
        self.spec, self.root, self.frames, self.name = spec, root, frames or spec["frames"] or FRAMES, spec["name"]

    def picture(self, ref, where):
        return ref if ref is None or isinstance(ref, Picture) else self.root.find(self.spec["media"], ref, where, "picture") if ref else None

    def clip(self, video, where, n=0):
        """Video name -> {"frames", "fps"}; n = None takes every frame there is."""
        folder = self.root.find(self.spec["media"], video, where, "clip folder")
        return {"frames": frames_of(folder, self.frames if n == 0 else n, where), "fps": self.spec["fps"]}


def mmeb_pair(m, row, where):
    """MMEB's own columns. Hard negatives (text, picture or both; one, or lists of them) are kept: VLM2Vec reads them and throws them away."""
    side = lambda text, path: item(text.replace(IMG, ""), m.picture(path, where))
    texts, paths = listed(row["neg_text"]), listed(row["neg_image_path"])
    texts, paths = texts + [""] * (len(paths) - len(texts)), paths + [""] * (len(texts) - len(paths))
    return (side(text_of(row, "qry", where), row["qry_image_path"]), side(text_of(row, "pos_text", where), row["pos_image_path"]),
            [side(text_of({"neg_text": t}, "neg_text", where), p) for t, p in zip(texts, paths) if t or p])


def said(row, where):
    """LLaVA-Hound's conversation -> (what the human asked, what the model said)."""
    turns = row["conversations"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns[:2]):
        raise BadData(f"{where}: conversations is not a list of two turns with a value")
    return turns[0]["value"].replace("<video>", ""), turns[1]["value"]


def video_caption_pair(m, row, where):
    asked, caption = said(row, where)
    return item(asked, video=m.clip(row["video"], where)), item(caption), []


def video_retrieval_pair(m, row, where):
    return (item("Find a video that contains the following visual content: " + said(row, where)[1]),
            item("Understand the content of the provided video: ", video=m.clip(row["video"], where)), [])


def video_qa_pair(m, row, where):
    asked, answer = said(row, where)
    return item("Answer a question based on the content of a video. " + asked, video=m.clip(row["video"], where)), item(answer), []


def page_qa_pair(m, row, where):
    """colpali_train_set is used as question answering: page and question -> answer. Its own long prompts are left out, as VLM2Vec does."""
    return item(" " + text_of(row, "query", where), m.picture(row["image"], where)), item(text_of(row, "answer", where)), []


VISRAG = {  # VLM2Vec's prompts for VisRAG's training pages, by source: of the query, of the page
    "NeurIPS Papers": ("This query is about a research paper from NeurIPS, a leading AI/ML conference. The document contains technical discussions, methodologies, and findings. Identify relevant papers and sections that address the query: ", "A research paper from NeurIPS on AI and ML topics."),
    "Textbooks": ("This query is related to a college-level textbook, which provides structured explanations, definitions, and examples. Find the most relevant concepts or explanations that address the query: ", "A textbook page with structured educational content and explanations."),
    "ICML Papers": ("This query is about a research paper from ICML, a leading AI/ML conference. The document contains theoretical insights, experiments, and applications. Identify relevant papers and sections that best answer the query: ", "A research paper from ICML, covering machine learning topics."),
    "Manuallib": ("This query pertains to a product manual, which contains detailed technical specifications, usage instructions, and troubleshooting steps. Find the most relevant section that answers the query: ", "A product manual page with technical specifications and instructions."),
    "ArxivQA": ("This query is related to retrieving a relevant figure from an ArXiv research paper. The retrieved figure should contain scientific plots, mathematical visualizations, or experimental results that best address the query: ", "A figure from a research paper, including plots or experimental results."),
    "ChartQA": ("This query is related to retrieving a relevant chart that visually represents numerical or categorical data. The retrieved chart should contain bar graphs, line charts, or other visual elements necessary to analyze trends, compare values, or extract insights related to the query: ", "A statistical chart comparing values or analyzing trends."),
    "MP-DocVQA": ("This query is related to retrieving a relevant page from a multi-page document, such as reports, invoices, or research papers. The retrieved document should contain text, tables, or structured information necessary to answer the query: ", "A page from a multi-page document with text or tables."),
    "InfoVQA": ("This query is related to retrieving an infographic that visually presents statistical or factual information using charts, icons, and structured layouts. The retrieved image should contain the necessary visual elements to provide the best context for answering the query: ", "An infographic with structured data, charts, and annotations."),
    "PlotQA": ("This query relates to retrieving a relevant plot or chart that visually represents numerical data. The retrieved figure should contain the necessary information to analyze trends, compare values, or extract key insights related to the query: ", "A numerical data visualization, such as bar charts or line graphs."),
    "SlideVQA": ("This query is related to retrieving a relevant presentation slide that visually presents structured information. The retrieved slide should contain the necessary text, charts, or graphics to provide the best answer to the query: ", "A presentation slide with text, bullet points, and diagrams."),
}


def page_pair(m, row, where):
    """Text -> page. The odd spaces are VLM2Vec's: f"{prompt} {query} {token}" with an empty token, then with an empty query."""
    before, after = VISRAG.get(row["source"], ("", ""))
    query = text_of(row, "query", where)
    return item(f"{before} {query} " if before else f"{query} "), item(f"{after}  " if after else " ", m.picture(row["image"], where)), []


TRAIN_PARSERS = {  # name: (row -> pair, columns that must be there, columns that may be, columns of each side: all empty = the row is dropped)
    "mmeb":            (mmeb_pair, ["qry", "qry_image_path", "pos_text", "pos_image_path"], ["neg_text", "neg_image_path"],
                        [["qry", "qry_image_path"], ["pos_text", "pos_image_path"]]),
    "video_caption":   (video_caption_pair, ["video", "conversations"], ["id"], [["video"], ["conversations"]]),
    "video_retrieval": (video_retrieval_pair, ["video", "conversations"], ["id"], [["video"], ["conversations"]]),
    "video_qa":        (video_qa_pair, ["video", "conversations"], ["id"], [["video"], ["conversations"]]),
    "page_qa":         (page_qa_pair, ["query", "image", "answer"], [], [["query", "image"], ["answer"]]),
    "page":            (page_pair, ["query", "image"], ["source"], [["query"], ["image"]]),
}


@dataclasses.dataclass
class TrainData:
    """Sources by number, usable rows by number; pairs are built when asked for."""
    names: list
    sizes: list                                      # usable rows
    weights: list
    dropped: dict                                    # name -> rows with an empty side
    missing: list                                    # datasets of the table that this root does not have
    on_bad: str
    sources: list                                    # (Media, Table, usable row numbers or None)
    bad: dict = dataclasses.field(default_factory=dict)          # id -> why it was skipped

    def id(self, source, row):
        keep = self.sources[source][2]
        return f"{self.names[source]}/{row if keep is None else keep[row]}"

    def pair(self, source, row):
        """-> {"id": "Name/row in its table", "dataset", "query": item, "target": item, "negatives": [items]}, pictures as references."""
        if not 0 <= row < self.sizes[source]:
            raise IndexError(f"{self.names[source]} has {self.sizes[source]} usable rows, row {row} was asked for")
        media, table, keep = self.sources[source]
        where = self.id(source, row)
        query, target, negatives = TRAIN_PARSERS[media.spec["parser"]][0](media, table[row if keep is None else int(keep[row])], where)
        return {"id": where, "dataset": media.name, "query": query, "target": target, "negatives": negatives}


def wanted(rows, names):
    """The rows of these names, in this order; an unknown name is an error."""
    by_name = {row["name"]: row for row in rows}
    if lost := [name for name in names or [] if name not in by_name]:
        raise BadData(f"no dataset {lost[0]!r} in the table; there are {', '.join(by_name)}")
    return rows if names is None else [by_name[name] for name in names]


def open_source(spec, root, split):
    """One row of TRAIN -> (Media, Table, usable row numbers or None, how many were dropped), or None where the root has no table of it."""
    files = root.glob(spec["table"], spec["name"], hub=spec["hub"], repo=os.path.basename(spec["hub"]), name=spec["name"],
                      split=spec["split"] or split, config=spec["config"], part="")
    if not files:
        return None
    _, required, optional, sides = TRAIN_PARSERS[spec["parser"]]
    table = Table(files, required, optional, spec["name"])
    empty = np.zeros(len(table), bool)
    for side in sides:
        empty |= table.empty(side)
    empty = empty[:spec["cap"]]                      # the first `cap` rows, as the reference takes them, and then the empty ones out of these
    keep = None if not empty.any() and len(empty) == len(table) else np.flatnonzero(~empty).astype(np.int32)
    if empty.all():
        raise BadData(f"{spec['name']}: no usable row in {files[0]} ({len(empty)} rows, all with an empty side)")
    return Media(spec, root), table, keep, int(empty.sum())


def train_sets(root, names=None, split="original", on_bad="stop", caps=None, weights=None):
    """Training data of a root. names=None takes what is there and lists the rest in .missing; a name asked for must be there.

    caps and weights ({name: number}) replace the table's. on_bad="skip" leaves out what is broken, counted and named in .bad.
    """
    rows, base = wanted(tables(root, "train"), names), Root(root)
    data = TrainData([], [], [], {}, [], on_bad, [])
    for spec in rows:
        spec = {**spec, "cap": (caps or {}).get(spec["name"], spec["cap"]), "weight": (weights or {}).get(spec["name"], spec["weight"])}
        try:
            source = open_source(spec, base, split)
        except BadData as e:
            if on_bad == "stop":
                raise
            data.bad[spec["name"]] = str(e)
            continue
        if source is None:
            if names is not None:
                raise BadData(f"{spec['name']}: no table in {root} (looked for {spec['table'][0]})")
            data.missing.append(spec["name"])
            continue
        *source, data.dropped[spec["name"]] = source
        data.names.append(spec["name"])
        data.sizes.append(len(source[1]) if source[2] is None else len(source[2]))
        data.weights.append(float(spec["weight"]))
        data.sources.append(source)
    if not data.names:
        raise BadData(f"{root}: none of the {len(rows)} training datasets can be used" + "".join(f"; {why}" for why in list(data.bad.values())[:1]))
    return data


class Sampler:
    """Endless global batches of (source, row): an iterator whose whole state is a step and a count per source.

    A rank takes its contiguous slice of the global batch, so joining the ranks gives the stream of one. A walk that ends inside a sub-batch
    goes on with the next epoch's order; a source smaller than a sub-batch repeats rows in it (the loss masks equal targets).
    """

    def __init__(self, sizes, weights, batch, sub_batch, seed=0, rank=0, world=1):
        weights = np.asarray(weights, np.float64)
        if len(sizes) != len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(f"the sampler wants a weight >= 0 per source and one above 0, got {weights.tolist()} for {len(sizes)} sources")
        if any(size < 1 for size, w in zip(sizes, weights) if w > 0):
            raise ValueError(f"a source with a weight has no rows: sizes {list(sizes)}")
        if sub_batch < 1 or batch % sub_batch or batch % world or not 0 <= rank < world:
            raise ValueError(f"batch {batch} must be a multiple of sub_batch {sub_batch} and of world {world}; rank {rank} must be below world")
        self.sizes, self.p, self.batch, self.sub, self.seed, self.rank, self.world = list(sizes), weights / weights.sum(), batch, sub_batch, seed, rank, world
        self.step, self.taken, self.orders = 0, [0] * len(self.sizes), {}

    def order(self, source, epoch):
        """The shuffled walk over a source in one epoch; only the current one of each source is held (4 bytes a row)."""
        if self.orders.get(source, (None,))[0] != epoch:
            self.orders[source] = (epoch, np.random.default_rng([1, self.seed, source, epoch]).permutation(self.sizes[source]).astype(np.int32))
        return self.orders[source][1]

    def __iter__(self):
        return self

    def __next__(self):
        out = []
        for source in np.random.default_rng([0, self.seed, self.step]).choice(len(self.p), self.batch // self.sub, p=self.p).tolist():
            need = self.sub
            while need:
                epoch, at = divmod(self.taken[source], self.sizes[source])
                rows = self.order(source, epoch)[at:at + need].tolist()
                out += [(source, row) for row in rows]
                need -= len(rows)
                self.taken[source] += len(rows)
        self.step += 1
        share = self.batch // self.world
        return out[self.rank * share:(self.rank + 1) * share]

    def copy(self):
        other = Sampler(self.sizes, self.p, self.batch, self.sub, self.seed, self.rank, self.world)
        other.load(self.state())
        return other

    def state(self):
        return {"seed": self.seed, "step": self.step, "taken": list(self.taken), "sizes": list(self.sizes), "batch": [self.batch, self.sub]}

    def load(self, state):
        """Goes on where state() was taken; the world size may differ, the data and the batch may not."""
        if lost := [k for k, v in self.state().items() if k not in ("step", "taken") and state.get(k) != v]:
            raise ValueError(f"this sampler state is of another run: {lost[0]} was {state.get(lost[0])}, is {self.state()[lost[0]]}")
        self.step, self.taken = int(state["step"]), [int(n) for n in state["taken"]]


def fetch_pair(data, source, row, load):
    """One pair, pictures decoded. A bad one stops the run, or (on_bad="skip") is counted and the next row of its table takes its place."""
    for k in range(data.sizes[source]):
        at = (row + k) % data.sizes[source]
        try:
            pair = data.pair(source, at)
            if load:
                pair = {**pair, "query": decoded(pair["query"]), "target": decoded(pair["target"]), "negatives": [decoded(n) for n in pair["negatives"]]}
            return pair
        except BadData as e:
            name = data.id(source, at)
            why = str(e) if str(e).startswith(name) else f"{name}: {e}"
            if data.on_bad == "stop":
                raise BadData(why) from None
            data.bad[name] = why
    raise BadData(f"{data.names[source]}: not one usable row")


def batches(data, sampler, workers=0, steps=None, load=True):
    """Batches of pairs, in the sampler's order whatever the number of workers. sampler.state() is always that of the batch last handed out.

    Workers are threads: Pillow decodes outside the interpreter lock, and threads need neither pickling nor a second copy of the tables.
    """
    if not workers:
        while steps is None or steps > 0:
            yield [fetch_pair(data, source, row, load) for source, row in next(sampler)]
            steps = None if steps is None else steps - 1
        return
    ahead, queue, asked = sampler.copy(), collections.deque(), 0
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        while steps is None or steps > 0:
            while len(queue) < 3 and (steps is None or len(queue) < steps):           # at most three batches of pictures are in memory
                queue.append([pool.submit(fetch_pair, data, source, row, load) for source, row in next(ahead)])
            batch = [future.result() for future in queue.popleft()]
            next(sampler)
            yield batch
            steps = None if steps is None else steps - 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: one parser per kind of test set, row -> a query, its candidates, its positives

class Missing(BadData):
    """The root has no table of this dataset: not broken, just not there."""


@dataclasses.dataclass
class EvalSet:
    name: str
    modality: str
    metric: str                                      # hit@1, or ndcg_linear@5 for visdoc
    row: dict                                        # the row of EVAL it came from
    protocol: str                                    # what a score of it must be quoted with
    queries: list                                    # items
    query_ids: list
    candidates: list                                 # items, one per dedup key
    cand_ids: list                                   # the dedup keys
    local: list                                      # per query an array of candidate indices (repeats kept), or None: every candidate, for all
    positives: list                                  # per query candidate indices
    grades: list                                     # per query the positives' grades, or None
    rows: int = 0                                    # rows of the query table
    dropped: int = 0                                 # queries left out because something of theirs is broken
    bad: list = dataclasses.field(default_factory=list)          # every complaint, in words


class Builder(Media):
    """Collects an EvalSet row by row; with on_bad="skip" a broken candidate or query is noted and left out, else BadData goes up."""

    def __init__(self, spec, root, on_bad, frames, prompts):
        super().__init__(spec, root, frames)
        self.on_bad, self.prompts, self.index, self.bad, self.looked, self.seen = on_bad, prompts, {}, [], {}, {}
        self.opened = False                          # a part that is missing after another one was read is a fault
        self.queries, self.query_ids, self.candidates, self.cand_ids, self.local, self.positives, self.grades = [], [], [], [], [], [], []

    def complain(self, e):
        if self.on_bad == "stop":
            raise e
        self.bad.append(str(e))

    def say(self, full, inst, content, image=None, video=None):
        """VLM2Vec's one string, or Qwen's instruction (system turn) and content apart. Qwen's targets have no instruction."""
        return item(full, image, video) if self.prompts == "vlm2vec" else item(content, image, video, inst.strip().removesuffix("Question:").strip())

    def look(self, made):
        if self.on_bad == "skip":                    # a run that must not stop later looks at every picture now, once
            for ref in refs(made):
                if ref not in self.looked:
                    self.looked[ref] = fault(ref)
                if self.looked[ref]:
                    raise BadData(self.looked[ref])
        return made

    def cand(self, key, where, make):
        """Index of the candidate with this dedup key, made when first met (a later one with the same key is the same one); None if broken."""
        if key not in self.index:
            try:
                made = self.look(make())
            except BadData as e:
                self.complain(BadData(str(e) if str(e).startswith(self.name) else f"{where}: {e}"))
                self.index[key] = None
                return None
            self.index[key] = len(self.candidates)
            self.candidates.append(made)
            self.cand_ids.append(key)
        return self.index[key]

    def query(self, where, made, cands, positives, grades=None, qid=None):
        if any(p is None for p in positives) or not positives:
            raise BadData(f"{where}: its positive is broken or there is none")
        try:
            self.look(made)
        except BadData as e:
            raise BadData(f"{where}: {e}") from None
        self.queries.append(made)
        self.query_ids.append(qid or where)
        self.local.append(np.array([c for c in cands if c is not None], np.int64))
        self.positives.append(list(dict.fromkeys(positives)))
        self.grades.append(grades)


squeeze = lambda text: text.replace(" \n", "\n")


def image_query(b, row, where, strip):
    """T + " " + instruction [+ " " + text], " \\n" -> "\\n", + tail; then T goes. image_qa and image_i2i_vg strip the instruction first."""
    inst, text = text_of(row, "qry_inst", where, empty=False).replace(IMG, ""), text_of(row, "qry_text", where)
    lead = "\n" + inst.strip() if strip else inst
    full = squeeze(" " + lead + (" " + text if text else "")) + b.spec["tail"]
    return b.say(full, inst, text, image=b.root.find(b.spec["media"], text_of(row, "qry_img_path", where, empty=False), where, "picture"))


def image_targets(b, row, where, blank_tail):
    """Picture candidates: [(path, caption, string, content)]. Captions count where the first one is not blank (WebQA, EDIS, OVEN, ...)."""
    inst, paths = text_of(row, "tgt_inst", where, empty=False).replace(IMG, ""), list_of(row, "tgt_img_path", where)
    captions = list_of(row, "tgt_text", where) if row["tgt_text"] else [""] * len(paths)
    if len(captions) != len(paths):
        raise BadData(f"{where}: {len(captions)} tgt_text for {len(paths)} tgt_img_path")
    if captions[0].strip():
        return [(p, c, squeeze(f" {inst} {c}") + "\n", c.strip()) for p, c in zip(paths, captions)]
    return [(p, c, squeeze(f" {inst}") + blank_tail, "") for p, c in zip(paths, captions)]


def image_text(b, row, where, strip=False):
    """image_cls, image_i2t (and image_qa with strip): picture query, raw text candidates without any instruction; key = the text."""
    cands = [b.cand(text, where, lambda: b.say(text, "", text)) for text in list_of(row, "tgt_text", where)]
    b.query(where, image_query(b, row, where, strip), cands, cands[:1])


def image_qa(b, row, where):
    image_text(b, row, where, strip=True)


def image_t2i(b, row, where):
    """Text query without a picture (a stray token, as in WebQA, goes); key = the path alone, so one path with another caption collapses."""
    inst, text = text_of(row, "qry_inst", where, empty=False).replace(IMG, ""), text_of(row, "qry_text", where)
    cands = [b.cand(path, where, lambda: b.say(full, "", content, image=b.picture(path, where)))
             for path, _, full, content in image_targets(b, row, where, "\n")]
    b.query(where, b.say(f"{inst} {text}{b.spec['tail']}", inst, text), cands, cands[:1])


def image_i2i_vg(b, row, where):
    """Picture query, picture candidates; key = path:caption (several objects of one picture are targets in RefCOCO-Matching)."""
    cands = [b.cand(path + ":" + caption.strip('"'), where, lambda: b.say(full, "", content, image=b.picture(path, where)))
             for path, caption, full, content in image_targets(b, row, where, "")]
    b.query(where, image_query(b, row, where, True), cands, cands[:1])


def id_of(row, column, where):
    """An id as text: hubs store them as int or str, and qrels not always as the corpus does."""
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise BadData(f"{where}: column {column} is {value!r}, an id is wanted")
    return str(value)


def video_cls(b, row, where):
    """Global over the label list (not only the labels that occur: 1000 clips do not show all 700), or local over neg_text (SmthSmthV2)."""
    label = text_of(row, "pos_text", where, empty=False)
    texts = list_of(row, "neg_text", where) if b.spec["scope"] == "local" else [label]
    if label not in texts:
        raise BadData(f"{where}: the label {label!r} is not among its {len(texts)} options")
    cands = [b.cand(text, where, lambda: b.say(text, "", text)) for text in texts]
    query = b.say(" " + b.spec["inst"], b.spec["inst"], "", video=b.clip(id_of(row, "video_id", where), where))
    b.query(where, query, cands, [b.index[label]])


def video_choice(b, where, video, question, names, texts, answer):
    """Multiple choice: key = the option as listed, text = what is embedded."""
    if not 0 <= answer < len(names):
        raise BadData(f"{where}: the answer is not among its {len(names)} options")
    cands = [b.cand(name, where, lambda: b.say(text, "", text)) for name, text in zip(names, texts)]
    b.query(where, b.say(f" {b.spec['inst']} {question}", b.spec["inst"], question, video=b.clip(video, where)), cands, [cands[answer]])


def bare(option):
    """'C. Berries.' -> 'Berries'. (Upstream takes the last letter of an option that has no '. '; we take the option.)"""
    return (option[option.find(". "):] if ". " in option else option).strip(". ")


def lettered(question, options):
    return (f"{question}\nOptions:\n" + "".join(f"({chr(65 + i)}) {option}\n" for i, option in enumerate(options))).rstrip()


def number(value, where):
    if isinstance(value, bool) or not re.fullmatch(r"-?\d+", str(value)):
        raise BadData(f"{where}: the answer is {value!r}, a number is wanted")
    return int(value)


def videomme(b, row, where):
    options, answer = list_of(row, "options", where), text_of(row, "answer", where, empty=False).strip()
    video_choice(b, where, id_of(row, "videoID", where), text_of(row, "question", where, empty=False) + "\n" + "\n".join(options), options,
                 list(map(bare, options)), "ABCDEFGH".find(answer) if len(answer) == 1 else -1)


def egoschema(b, row, where):
    options = list_of(row, "option", where)
    video_choice(b, where, id_of(row, "video_idx", where), text_of(row, "question", where, empty=False) + " ".join(options), options,
                 list(map(bare, options)), number(row["answer"], where))


def nextqa(b, row, where):
    options = [text_of(row, f"a{i}", where, empty=False) for i in range(5)]
    video_choice(b, where, id_of(row, "video", where), lettered(text_of(row, "question", where, empty=False), options), options, options,
                 number(row["answer"], where))


def mvbench(b, row, where):
    options, answer = list_of(row, "candidates", where), text_of(row, "answer", where, empty=False)
    names = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]
    video_choice(b, where, f"{row['config']}/{id_of(row, 'video', where)}", lettered(text_of(row, "question", where, empty=False), options),
                 names, names, options.index(answer) if answer in options else -1)


def activitynetqa(b, row, where):
    options, answer = ["yes", "no"], row["answer"]
    video_choice(b, where, "v_" + id_of(row, "video_name", where), text_of(row, "question", where, empty=False) + "? (A) yes; (B) no.", options,
                 options, options.index(answer) if answer in options else -1)


def stem(path):
    """Video name without folders and without a video ending."""
    return re.sub(r"\.(mp4|avi|mkv|webm|mov)$", "", os.path.basename(path), flags=re.I)


def video_ret(b, row, where):
    """Caption -> video among all videos; key = the video's id. Where a video has several captions the first is the query."""
    (id_column, column), inst = b.spec["columns"] or ["video_id", "caption"], b.spec["inst"]
    video = stem(id_of(row, id_column, where))
    caption = list_of(row, column, where)[0] if isinstance(row[column], list) else text_of(row, column, where, empty=False)
    target = b.cand(video, where, lambda: b.say(" " + b.spec["tgt"], "", "", video=b.clip(video, where)))
    b.query(where, b.say(f"{inst} {caption}", inst, caption), [target], [target])


def moment(b, row, where):
    """Clips of one video: every folder beside query/ is a candidate, positive* the right one; key = the clip's folder (ours under ROOT)."""
    video, inst = stem(id_of(row, "video_path", where)), b.spec["inst"]
    folder = b.root.find(b.spec["media"], video, where, "clip folder")
    clips = sorted((c for c in os.listdir(folder) if c != "query" and c[0] != "." and os.path.isdir(os.path.join(folder, c))), key=natural)
    cands = {c: b.cand(os.path.relpath(os.path.join(folder, c), b.root.path), where,
                       lambda: b.say(" " + b.spec["tgt"], "", "", video=b.clip(f"{video}/{c}", where))) for c in clips}
    text = text_of(row, "query", where, empty=False)
    b.query(where, b.say(f" {inst} {text}", inst, text, video=b.clip(f"{video}/query", where)), cands.values(),
            [i for c, i in cands.items() if c.startswith("positive")])


SEEK = {".mp4": " Find the clip that corresponds to the given sentence and video segment:",
        ".jpg": " Select the video clip that aligns with the given text and image:", "": "Find the clip that corresponds to the given text:"}


def momentseeker(b, row, where):
    """Several positives; the query is text, text and picture, or text and clip; all frames there are (8) are taken."""
    text, given = text_of(row, "query", where), text_of(row, "input_frames", where)
    kind = next(ending for ending in SEEK if given.endswith(ending))
    flat = lambda path: "video_frames/" + path.replace("/", "_").split(".mp4")[0]
    image = b.picture(f"query_{given}", where) if kind == ".jpg" else None
    video = b.clip(flat(given), where, None) if kind == ".mp4" else None
    clips = [(text_of(c or {"output_path": None}, "output_path", where, empty=False), good) for column, good in
             (("positive_frames", True), ("negative_frames", False)) for c in listed(row[column])]
    cands = [(b.cand(flat(path), where, lambda: b.say(" " + b.spec["tgt"], "", "", video=b.clip(flat(path), where, None))), good)
             for path, good in clips]
    b.query(where, b.say(SEEK[kind] + (f" {text}" if text else ""), SEEK[kind], text, image, video), [c for c, _ in cands],
            [c for c, good in cands if good])


def pairs(b, row, where):
    """A user's own test set in the columns of MMEB-train: all targets are candidates; rows with one query are one query with several positives."""
    query, target, _ = mmeb_pair(b, {"neg_text": None, "neg_image_path": None, **row}, where)
    if query == {"text": ""} or target == {"text": ""}:
        raise BadData(f"{where}: a side is empty")
    key, name = (json.dumps([row[text] or "", row[path] or ""], ensure_ascii=False) for text, path in TRAIN_PARSERS["mmeb"][3])
    found = b.cand(name, where, lambda: target)
    if key in b.seen and found is not None:
        b.positives[b.seen[key]] = list(dict.fromkeys(b.positives[b.seen[key]] + [found]))
        return
    b.query(where, query, [found], [found])
    b.seen[key] = len(b.queries) - 1


def short_name(page):
    """VisRAG's page ids are longer than a file name may be: VLM2Vec cuts them and adds a hash."""
    base, ending = os.path.splitext(page)
    return f"{base[:50]}_{hashlib.md5(page.encode()).hexdigest()[:8]}{ending}"


def beir(b, read, limit):
    """queries + corpus + qrels -> text query, every page a candidate, graded positives. Ids are compared as text, whatever their type."""
    name, spec, relevant = b.name, b.spec, collections.defaultdict(dict)
    pages, corpus = set(), read("corpus", ["corpus-id"], ["image"])
    for i in range(len(corpus)):
        where = f"{name}/corpus row {i}"
        try:
            row = corpus[i]
            page = id_of(row, "corpus-id", where)
            if page in pages:
                raise BadData(f"{where}: corpus-id {page!r} occurs twice")
            pages.add(page)
            file = short_name(page) if page.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) else f"{page}.png"
            b.cand(page, where, lambda: b.say(" " + spec["tgt"], "", "", image=row["image"] or b.picture(file, where)))
        except BadData as e:
            b.complain(e)
    qrels = read("qrels", ["query-id", "corpus-id", "score"], [])
    for i in range(len(qrels)):
        where = f"{name}/qrels row {i}"
        try:
            row = qrels[i]
            page, score = id_of(row, "corpus-id", where), row["score"]
            if page not in pages:
                raise BadData(f"{where}: corpus-id {page!r} names no document of the corpus")
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not np.isfinite(score):
                raise BadData(f"{where}: score is {score!r}")
            if score > 0:                                # a duplicate keeps the higher grade
                of = relevant[id_of(row, "query-id", where)]
                of[page] = max(of.get(page, 0), score)
        except BadData as e:
            b.complain(e)
    table, seen, dropped = read("queries", ["query-id", "query"], ["language"]), set(), 0
    for i in range(len(table)):
        where = f"{name}/queries row {i}"
        try:
            row = table[i]
            if spec["language"] and row["language"] != spec["language"]:
                continue
            qid, text = id_of(row, "query-id", where), text_of(row, "query", where, empty=False)
            if qid in seen:
                raise BadData(f"{where}: query-id {qid!r} occurs twice")
            seen.add(qid)
            right = {b.index[page]: score for page, score in relevant[qid].items() if b.index.get(page) is not None}
            b.query(where, b.say(f"{spec['inst']} {text}", spec["inst"], text), [], list(right), list(right.values()), qid)
        except BadData as e:
            b.complain(e)
            dropped += 1
        if limit and len(b.queries) == limit:
            break
    return len(table), dropped


IMAGE_COLUMNS = ["qry_inst", "qry_text", "qry_img_path", "tgt_text"]
EVAL_PARSERS = {  # name: (row -> query and candidates, columns that must be there, columns that may be)
    "image_cls":     (image_text, IMAGE_COLUMNS, []),
    "image_i2t":     (image_text, IMAGE_COLUMNS, []),
    "image_qa":      (image_qa, IMAGE_COLUMNS, []),
    "image_t2i":     (image_t2i, ["qry_inst", "qry_text", "tgt_inst", "tgt_img_path"], ["tgt_text"]),
    "image_i2i_vg":  (image_i2i_vg, IMAGE_COLUMNS[:3] + ["tgt_inst", "tgt_img_path"], ["tgt_text"]),
    "video_cls":     (video_cls, ["video_id", "pos_text"], ["neg_text"]),
    "videomme":      (videomme, ["videoID", "question", "options", "answer"], []),
    "egoschema":     (egoschema, ["video_idx", "question", "option", "answer"], []),
    "nextqa":        (nextqa, ["video", "question", "answer", "a0", "a1", "a2", "a3", "a4"], []),
    "mvbench":       (mvbench, ["video", "question", "candidates", "answer"], []),
    "activitynetqa": (activitynetqa, ["video_name", "question", "answer"], []),
    "video_ret":     (video_ret, [], []),                         # its columns are the row's
    "moment":        (moment, ["query", "video_path"], []),
    "momentseeker":  (momentseeker, ["query", "positive_frames", "negative_frames", "input_frames"], []),
    "pairs":         (pairs, TRAIN_PARSERS["mmeb"][1], []),
    "beir":          (beir, [], []),                              # reads its three tables itself
}


def load_eval(root, row, on_bad="stop", limit=None, page_labels="fixed", frames=None, prompts="vlm2vec"):
    """A row of EVAL (or the name of one) -> EvalSet. limit = so many queries (a global set of pages or labels stays whole).

    frames: 8 as VLM2Vec (default), 64 as Qwen3-VL-Embedding. prompts: "vlm2vec" or "qwen". page_labels: "fixed" or "original", named in .protocol.
    """
    if prompts not in ("vlm2vec", "qwen") or page_labels not in ("fixed", "original") or on_bad not in ("stop", "skip"):
        raise ValueError(f"prompts {prompts!r}, page_labels {page_labels!r} or on_bad {on_bad!r} is not known")
    spec = wanted(tables(root, "eval"), [row])[0] if isinstance(row, str) else complete(row, "eval")
    if spec["original"] and page_labels == "original":
        spec = {**spec, **spec["original"]}
    b = Builder(spec, Root(root), on_bad, frames, prompts)
    function, required, optional = EVAL_PARSERS[spec["parser"]]

    def read(part, required, optional, config=""):
        files = b.root.glob(spec["table"], spec["name"], hub=spec["hub"], repo=os.path.basename(spec["hub"]), name=spec["name"],
                            split=spec["split"], config=config, part=part)
        if not files:
            raise (BadData if b.opened else Missing)(f"{spec['name']}: no {part or config} table in {root} (looked for "
                          + spec["table"][0].format(hub=spec["hub"], repo="", name=spec["name"], split=spec["split"], config=config, part=part) + ")")
        b.opened = True
        return Table(files, required, optional, spec["name"])

    if spec["parser"] == "beir":
        rows, dropped = beir(b, read, limit)
    else:
        if isinstance(spec["labels"], str):
            spec["labels"] = LABELS[spec["labels"]]
        for label in spec["labels"] or []:
            b.cand(label, spec["name"], lambda: b.say(label, "", label))
        rows, dropped = 0, 0
        for config in listed(spec["config"]) or [""]:
            table = read("", (spec["columns"] or ["video_id", "caption"]) if spec["parser"] == "video_ret" else required, optional, config)
            for i in range(min(len(table), spec["first"] or sys.maxsize)):
                if limit and len(b.queries) == limit:
                    break
                try:
                    function(b, {**table[i], "config": config}, f"{spec['name']}/{rows + i}")
                except BadData as e:
                    b.complain(e)
                    dropped += 1
            rows += min(len(table), spec["first"] or sys.maxsize)
    if not b.queries:
        raise BadData(f"{spec['name']}: not one usable query in {rows} rows" + (f"; first: {b.bad[0]}" if b.bad else ""))
    graded, local = spec["parser"] == "beir", spec["scope"] == "local"
    protocol = f"{frames or spec['frames'] or FRAMES} frames, " * (spec["modality"] == "video") + f"{prompts} prompts" + (
        f", page labels: {page_labels}" if spec["original"] else "")
    return EvalSet(spec["name"], spec["modality"], "ndcg_linear@5" if spec["modality"] == "visdoc" else "hit@1", spec, protocol, b.queries,
                   b.query_ids, b.candidates, b.cand_ids, b.local if local else None, b.positives, b.grades if graded else None, rows, dropped, b.bad)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py --check ROOT

def check_one(spec, kind, root, page_labels="fixed"):
    """One dataset looked at whole, every picture decoded -> {"status", "rows", "want", "usable", "bad": [words]}."""
    bad, usable, rows = [], 0, 0
    try:
        if kind == "train":
            source = open_source(spec, Root(root), "original")
            if source is None:
                return dict(status="missing", rows=0, want=spec["rows"], usable=0, bad=[])
            media, table, keep, dropped = source
            rows, data = len(table), TrainData([spec["name"]], [len(table) if keep is None else len(keep)], [1.0], {}, [], "stop", [(media, table, keep)])
            looked = {}
            for row in range(data.sizes[0]):
                try:
                    pair = data.pair(0, row)
                    for ref in [r for side in (pair["query"], pair["target"], *pair["negatives"]) for r in refs(side)]:
                        if ref not in looked:
                            looked[ref] = fault(ref)
                        if looked[ref]:
                            raise BadData(f"{pair['id']}: {looked[ref]}")
                    usable += 1
                except BadData as e:
                    bad.append(str(e))
        else:
            found = load_eval(root, spec, on_bad="skip", page_labels=page_labels)
            rows, usable, bad = found.rows, len(found.queries), found.bad
    except Missing:
        return dict(status="missing", rows=0, want=spec["queries"], usable=0, bad=[])
    except BadData as e:
        bad.append(str(e))
    want = spec["rows" if kind == "train" else "queries"]
    status = "broken" if bad else "short" if want and rows < want else "found"
    return dict(status=status, rows=rows, want=want, usable=usable, bad=bad)


def downloads(spec, root):
    """[(hub, globs, unpack command)] that bring one dataset."""
    if not spec["hub"]:
        return []
    mine = [f"{spec['name']}/*"] if "{hub}/{name}/" in spec["table"][0] else []
    return [(spec["hub"], mine, "")] + [(hub, [pattern], unpack) for hub, pattern, unpack in spec["fetch"]]


def check(root, kinds=("train", "eval"), names=None, on_bad="stop", fetch=False, workers=2, page_labels="fixed"):
    """Prints a line per dataset and what is wrong with it. Exit code: 1 = something is broken (with on_bad="skip": so that nothing of a
    dataset is usable), 2 = no dataset at all is there, 0 = else; what is merely missing or short is no error."""
    todo = [(spec, kind) for kind in kinds for spec in tables(root, kind) if names is None or spec["name"] in names]
    if lost := set(names or []) - {spec["name"] for spec, _ in todo}:
        raise BadData(f"no dataset {sorted(lost)[0]!r} in the table")
    count = collections.Counter()
    look = lambda job: check_one(*job, root, page_labels)
    if fetch:
        for spec, kind in todo:
            if look((spec, kind))["status"] in ("missing", "short"):
                hub_fetch(spec, root)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for (spec, kind), r in zip(todo, tqdm(pool.map(look, todo), total=len(todo), desc="checking", disable=None)):
            status = "missing" if r["status"] == "broken" and not r["usable"] and all(" is missing (looked in " in line for line in r["bad"]) else r["status"]
            count[status] += 1
            count["fatal"] += status == "broken" and (on_bad == "stop" or not r["usable"])
            tqdm.write(f"{status:8s} {kind:5s} {spec['name']:48s} {r['rows']:>8,} of {r['want'] or '?':>8} rows, {r['usable']:,} usable")
            for line in r["bad"][:20]:
                tqdm.write(f"         {line}")
            if len(r["bad"]) > 20:
                tqdm.write(f"         ... and {len(r['bad']) - 20} more like these")
            for hub, patterns, unpack in downloads(spec, root) if status in ("missing", "short") else []:
                tqdm.write(f"         hf download {hub} --repo-type dataset --local-dir {os.path.join(root, hub)}"
                           + "".join(f" --include '{p}'" for p in patterns) + (f" && (cd {os.path.join(root, hub)} && {unpack})" if unpack else ""))
    print(", ".join(f"{status}: {count[status]}" for status in ("found", "short", "missing", "broken")))
    return 1 if count["fatal"] else 2 if count["missing"] == len(todo) else 0


def hub_fetch(spec, root):
    """Only when asked for by --fetch: brings a dataset's files; archives are unpacked by the printed command, not by us."""
    from huggingface_hub import snapshot_download
    for hub, patterns, _ in downloads(spec, root):
        snapshot_download(hub, repo_type="dataset", local_dir=os.path.join(root, hub), allow_patterns=patterns or None)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py --bench: the scale figures, on tables and pictures made for it

def resident():
    """Resident memory of this process in MB (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))


def bench_root(root, rows, pictures):
    """`rows` training rows in 20 subsets that share `pictures` photographs-like JPEGs of 640x480."""
    rng, base = np.random.default_rng(0), os.path.join(root, "TIGER-Lab", "MMEB-train")
    os.makedirs(os.path.join(base, "images/bench/Train"))
    for i in range(pictures):                                     # smooth noise compresses like a photograph
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        small.resize((640, 480), Image.BICUBIC).save(os.path.join(base, f"images/bench/Train/{i}.jpg"), quality=90)
    for name, *_ in MMEB_TRAIN:
        os.makedirs(os.path.join(base, name))
        n = rows // len(MMEB_TRAIN)
        path = [f"images/bench/Train/{i}.jpg" for i in rng.integers(0, pictures, n)]
        pq.write_table(pa.table({"qry": [f"{IMG}\nRepresent the given image with the following question: what is number {i}?\n" for i in range(n)],
                                 "qry_image_path": path, "pos_text": [f"answer {i}" for i in range(n)], "pos_image_path": [""] * n,
                                 "neg_text": [f"answer {i + 1}" for i in range(n)], "neg_image_path": [""] * n}),
                       os.path.join(base, name, "original-00000-of-00001.parquet"))


def pillow_alone(path):
    with Image.open(path) as im:
        return im.convert("RGB").size


def bench(rows=1_000_000, steps=10_000, pictures=512):
    from multiprocessing import Pool
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as root:
        bench_root(root, rows, pictures)
        start = time.perf_counter()
        data = train_sets(root, caps={name: None for name, *_ in MMEB_TRAIN})
        sampler = Sampler(data.sizes, data.weights, 64, 16)
        next(batches(data, sampler, steps=1))
        print(f"rows: {sum(data.sizes):,}\nfirst_batch_s: {time.perf_counter() - start:.2f}")
        before, start = resident(), time.perf_counter()
        for _ in tqdm(batches(data, sampler, steps=steps, load=False), total=steps, disable=None):
            pass
        print(f"resident_growth_mb: {resident() - before:.0f}\nreference_pairs_per_s: {steps * 64 / (time.perf_counter() - start):.0f}")
        files = sorted(glob.glob(os.path.join(root, "TIGER-Lab/MMEB-train/images/bench/Train/*")))
        ours, theirs = [], []
        with Pool(cores) as pool:
            for _ in range(5):                                    # in turn: the machine may be busy with something else
                start = time.perf_counter()
                pool.map(pillow_alone, files, chunksize=8)
                theirs.append(len(files) / (time.perf_counter() - start))
                start, n = time.perf_counter(), len(files) // 64
                for _ in batches(data, sampler, workers=cores, steps=n):
                    pass
                ours.append(n * 64 / (time.perf_counter() - start))
        print(f"pillow_alone_per_s: {np.median(theirs):.0f}\nloader_per_s: {np.median(ours):.0f}\nloader_share: {np.median(ours) / np.median(theirs):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="ROOT", help="look at every dataset of a root")
    parser.add_argument("--train", action="store_true", help="only the training sets")
    parser.add_argument("--eval", action="store_true", help="only the test sets")
    parser.add_argument("--names", help="only these datasets, with commas")
    parser.add_argument("--on_bad", choices=["stop", "skip"], default="stop", help="skip: broken rows are no error while the dataset is usable")
    parser.add_argument("--page_labels", choices=["fixed", "original"], default="fixed", help="ViDoSeek-page and MMLongBench-page")
    parser.add_argument("--fetch", action="store_true", help="download what is missing from the hub (needs a network)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--bench", action="store_true", help="measure the loader on generated tables")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the bench")
    args = parser.parse_args()
    if args.bench:
        return bench(args.rows)
    if not args.check:
        parser.error("--check ROOT or --bench is wanted")
    kinds = [kind for kind, only in (("train", args.train), ("eval", args.eval)) if only] or ["train", "eval"]
    return check(args.check, kinds, args.names.split(",") if args.names else None, args.on_bad, args.fetch, args.workers, args.page_labels)


# ---------------------------------------------------------------------------------------------------------------------
# Class names of the video test sets whose candidates are the whole list, also the classes that no test clip shows. Nothing to read here.

LABELS = {
    "K700": """
        abseiling acting_in_play adjusting_glasses air_drumming alligator_wrestling answering_questions applauding applying_cream archaeological_excavation archery arguing arm_wrestling
        arranging_flowers arresting assembling_bicycle assembling_computer attending_conference auctioning baby_waking_up backflip_(human) baking_cookies bandaging barbequing bartending
        base_jumping bathing_dog battle_rope_training beatboxing bee_keeping being_excited being_in_zero_gravity belly_dancing bench_pressing bending_back bending_metal biking_through_snow
        blasting_sand blending_fruit blowdrying_hair blowing_bubble_gum blowing_glass blowing_leaves blowing_nose blowing_out_candles bobsledding bodysurfing bookbinding bottling
        bouncing_ball_(not_juggling) bouncing_on_bouncy_castle bouncing_on_trampoline bowling braiding_hair breading_or_breadcrumbing breakdancing breaking_boards breaking_glass breathing_fire
        brush_painting brushing_floor brushing_hair brushing_teeth building_cabinet building_lego building_sandcastle building_shed bulldozing bungee_jumping burping busking calculating
        calligraphy canoeing_or_kayaking capoeira capsizing card_stacking card_throwing carrying_baby carrying_weight cartwheeling carving_ice carving_marble carving_pumpkin
        carving_wood_with_a_knife casting_fishing_line catching_fish catching_or_throwing_baseball catching_or_throwing_frisbee catching_or_throwing_softball celebrating changing_gear_in_car
        changing_oil changing_wheel_(not_on_bike) chasing checking_tires checking_watch cheerleading chewing_gum chiseling_stone chiseling_wood chopping_meat chopping_wood clam_digging clapping
        clay_pottery_making clean_and_jerk cleaning_gutters cleaning_pool cleaning_shoes cleaning_toilet cleaning_windows climbing_a_rope climbing_ladder climbing_tree closing_door coloring_in
        combing_hair contact_juggling contorting cooking_chicken cooking_egg cooking_on_campfire cooking_sausages_(not_on_barbeque) cooking_scallops cosplaying coughing counting_money
        country_line_dancing cracking_back cracking_knuckles cracking_neck crawling_baby crocheting crossing_eyes crossing_river crying cumbia curling_(sport) curling_eyelashes curling_hair
        cutting_apple cutting_cake cutting_nails cutting_orange cutting_pineapple cutting_watermelon dancing_ballet dancing_charleston dancing_gangnam_style dancing_macarena deadlifting
        dealing_cards decorating_the_christmas_tree decoupage delivering_mail digging dining directing_traffic disc_golfing diving_cliff docking_boat dodgeball doing_aerobics doing_jigsaw_puzzle
        doing_laundry doing_nails doing_sudoku drawing dribbling_basketball drinking_shots driving_car driving_tractor drooling drop_kicking drumming_fingers dumpster_diving dunking_basketball
        dyeing_eyebrows dyeing_hair eating_burger eating_cake eating_carrots eating_chips eating_doughnuts eating_hotdog eating_ice_cream eating_nachos eating_spaghetti eating_watermelon
        egg_hunting embroidering entering_church exercising_arm exercising_with_an_exercise_ball extinguishing_fire faceplanting falling_off_bike falling_off_chair feeding_birds feeding_fish
        feeding_goats fencing_(sport) fidgeting filling_cake filling_eyebrows finger_snapping fixing_bicycle fixing_hair flint_knapping flipping_bottle flipping_pancake fly_tying flying_kite
        folding_clothes folding_napkins folding_paper front_raises frying_vegetables gargling geocaching getting_a_haircut getting_a_piercing getting_a_tattoo giving_or_receiving_award
        gold_panning golf_chipping golf_driving golf_putting gospel_singing_in_church grinding_meat grooming_cat grooming_dog grooming_horse gymnastics_tumbling hammer_throw hand_washing_clothes
        head_stand headbanging headbutting helmet_diving herding_cattle high_fiving high_jump high_kick historical_reenactment hitting_baseball hockey_stop holding_snake home_roasting_coffee
        hopscotch hoverboarding huddling hugging_(not_baby) hugging_baby hula_hooping hurdling hurling_(sport) ice_climbing ice_fishing ice_skating ice_swimming inflating_balloons
        installing_carpet ironing ironing_hair javelin_throw jaywalking jetskiing jogging juggling_balls juggling_fire juggling_soccer_ball jumping_bicycle jumping_into_pool jumping_jacks
        jumping_sofa jumpstyle_dancing karaoke kicking_field_goal kicking_soccer_ball kissing kitesurfing knitting krumping land_sailing laughing lawn_mower_racing laying_bricks laying_concrete
        laying_decking laying_stone laying_tiles leatherworking letting_go_of_balloon licking lifting_hat lighting_candle lighting_fire listening_with_headphones lock_picking long_jump
        longboarding looking_at_phone looking_in_mirror luge lunge making_a_cake making_a_sandwich making_balloon_shapes making_bubbles making_cheese making_horseshoes making_jewelry
        making_latte_art making_paper_aeroplanes making_pizza making_slime making_snowman making_sushi making_tea making_the_bed marching marriage_proposal massaging_back massaging_feet
        massaging_legs massaging_neck massaging_person's_head metal_detecting milking_cow milking_goat mixing_colours moon_walking mopping_floor mosh_pit_dancing motorcycling
        mountain_climber_(exercise) moving_baby moving_child moving_furniture mowing_lawn mushroom_foraging needle_felting news_anchoring opening_bottle_(not_wine) opening_coconuts opening_door
        opening_present opening_refrigerator opening_wine_bottle packing paragliding parasailing parkour passing_American_football_(in_game) passing_American_football_(not_in_game)
        passing_soccer_ball peeling_apples peeling_banana peeling_potatoes person_collecting_garbage petting_animal_(not_cat) petting_cat petting_horse photobombing photocopying picking_apples
        picking_blueberries pillow_fight pinching pirouetting planing_wood planting_trees plastering playing_accordion playing_american_football playing_badminton playing_bagpipes
        playing_basketball playing_bass_guitar playing_beer_pong playing_billiards playing_blackjack playing_cards playing_cello playing_checkers playing_chess playing_clarinet playing_controller
        playing_cricket playing_cymbals playing_darts playing_didgeridoo playing_dominoes playing_drums playing_field_hockey playing_flute playing_gong playing_guitar playing_hand_clapping_games
        playing_harmonica playing_harp playing_ice_hockey playing_keyboard playing_kickball playing_laser_tag playing_lute playing_mahjong playing_maracas playing_marbles playing_monopoly
        playing_netball playing_nose_flute playing_oboe playing_ocarina playing_organ playing_paintball playing_pan_pipes playing_piano playing_piccolo playing_pinball playing_ping_pong
        playing_poker playing_polo playing_recorder playing_road_hockey playing_rounders playing_rubiks_cube playing_saxophone playing_scrabble playing_shuffleboard playing_slot_machine
        playing_squash_or_racquetball playing_tennis playing_trombone playing_trumpet playing_ukulele playing_violin playing_volleyball playing_with_trains playing_xylophone poaching_eggs
        poking_bellybutton pole_vault polishing_furniture polishing_metal popping_balloons pouring_beer pouring_milk pouring_wine preparing_salad presenting_weather_forecast
        pretending_to_be_a_statue pull_ups pulling_espresso_shot pulling_rope_(game) pumping_fist pumping_gas punching_bag punching_person_(boxing) push_up pushing_car pushing_cart
        pushing_wheelbarrow pushing_wheelchair putting_in_contact_lenses putting_on_eyeliner putting_on_foundation putting_on_lipstick putting_on_mascara putting_on_sari putting_on_shoes
        putting_wallpaper_on_wall raising_eyebrows reading_book reading_newspaper recording_music repairing_puncture riding_a_bike riding_camel riding_elephant riding_mechanical_bull riding_mule
        riding_or_walking_with_horse riding_scooter riding_snow_blower riding_unicycle ripping_paper roasting_marshmallows roasting_pig robot_dancing rock_climbing rock_scissors_paper
        roller_skating rolling_eyes rolling_pastry rope_pushdown running_on_treadmill sailing salsa_dancing saluting sanding_floor sanding_wood sausage_making sawing_wood scrambling_eggs
        scrapbooking scrubbing_face scuba_diving seasoning_food separating_eggs setting_table sewing shaking_hands shaking_head shaping_bread_dough sharpening_knives sharpening_pencil shaving_head
        shaving_legs shearing_sheep shining_flashlight shining_shoes shoot_dance shooting_basketball shooting_goal_(soccer) shooting_off_fireworks shopping shot_put shouting shoveling_snow
        shredding_paper shucking_oysters shuffling_cards shuffling_feet side_kick sieving sign_language_interpreting silent_disco singing sipping_cup situp skateboarding ski_ballet ski_jumping
        skiing_crosscountry skiing_mono skiing_slalom skipping_rope skipping_stone skydiving slacklining slapping sled_dog_racing sleeping slicing_onion smashing smelling_feet smoking
        smoking_hookah smoking_pipe snatch_weight_lifting sneezing snorkeling snowboarding snowkiting snowmobiling somersaulting spelunking spinning_plates spinning_poi splashing_water
        spray_painting spraying springboard_diving square_dancing squat squeezing_orange stacking_cups stacking_dice standing_on_hands staring steer_roping steering_car sticking_tongue_out
        stomping_grapes stretching_arm stretching_leg sucking_lolly surfing_crowd surfing_water surveying sweeping_floor swimming_backstroke swimming_breast_stroke swimming_butterfly_stroke
        swimming_front_crawl swimming_with_dolphins swimming_with_sharks swing_dancing swinging_baseball_bat swinging_on_something sword_fighting sword_swallowing tackling tagging_graffiti tai_chi
        taking_photo talking_on_cell_phone tango_dancing tap_dancing tapping_guitar tapping_pen tasting_beer tasting_food tasting_wine testifying texting threading_needle throwing_axe
        throwing_ball_(not_baseball_or_American_football) throwing_discus throwing_knife throwing_snowballs throwing_tantrum throwing_water_balloon tickling tie_dying tightrope_walking tiptoeing
        tobogganing tossing_coin tossing_salad training_dog trapezing treating_wood trimming_or_shaving_beard trimming_shrubs trimming_trees triple_jump twiddling_fingers tying_bow_tie
        tying_knot_(not_on_a_tie) tying_necktie tying_shoe_laces unboxing uncorking_champagne unloading_truck using_a_microscope using_a_paint_roller using_a_power_drill using_a_sledge_hammer
        using_a_wrench using_atm using_bagging_machine using_circular_saw using_inhaler using_megaphone using_puppets using_remote_controller_(not_gaming) using_segway vacuuming_car
        vacuuming_floor visiting_the_zoo wading_through_mud wading_through_water waiting_in_line waking_up walking_on_stilts walking_the_dog walking_through_snow walking_with_crutches
        washing_dishes washing_feet washing_hair washing_hands watching_tv water_skiing water_sliding watering_plants waving_hand waxing_armpits waxing_back waxing_chest waxing_eyebrows
        waxing_legs weaving_basket weaving_fabric welding whistling windsurfing winking wood_burning_(art) wrapping_present wrestling writing yarn_spinning yawning yoga zumba""".split(),
    "UCF101": """
        ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats
        Bowling BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving Drumming Fencing FieldHockeyPenalty
        FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing
        JavelinThrow JugglingBalls JumpingJack JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol
        PlayingFlute PlayingGuitar PlayingPiano PlayingSitar PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing SalsaSpin
        ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus
        TrampolineJumping Typing UnevenBars VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo""".split(),
    "HMDB51": """
        brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing flic_flac golf handstand hit hug jump kick kick_ball kiss laugh pick pour
        pullup punch push pushup ride_bike ride_horse run shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke somersault stand swing_baseball sword sword_exercise talk throw turn walk
        wave""".split(),
    "Breakfast": """
        cereal coffee friedegg juice milk pancake salad sandwich scrambledegg tea""".split(),
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadData as e:
        sys.exit(f"data.py: {e}")
