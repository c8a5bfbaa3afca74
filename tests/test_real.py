"""On real studies, a real pretrained Llama and the real vocabulary of BERT; skipped unless these
name their folders:

    VDGEN_LLM=folder VDGEN_VISION=folder VDGEN_IU_XRAY=folder VDGEN_BERT=folder \
        python -m pytest -q tests/test_real.py

VDGEN_BERT holds the vocab.txt of bert-base-uncased.
"""
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_chexbert import plain_forward, word_pieces, write_checkpoint
from test_evaluate import theirs
from transformers import BertConfig

from configs import Data, load_config
from configs.findings import named_findings
from configs.iu_xray import IU_XRAY_FINDINGS
from data import read_studies
from evaluate import precision_recall_f1, score
from configs.chexbert import load_chexbert
from model import embed_reports, load_model
from train import train

LLM, VISION, IU_XRAY, BERT = (
    os.environ.get(f"VDGEN_{name}") for name in ("LLM", "VISION", "IU_XRAY", "BERT"))
needs_data = pytest.mark.skipif(not IU_XRAY, reason="VDGEN_IU_XRAY does not name a folder")
needs_all = pytest.mark.skipif(not (LLM and VISION and IU_XRAY),
                               reason="VDGEN_LLM, VDGEN_VISION, VDGEN_IU_XRAY do not name folders")


@pytest.fixture
def config(tmp_path):
    return load_config("configs/iu_xray_small.yaml", [
        f"model.llm={LLM}", f"model.vision={VISION}", f"data.root={IU_XRAY}", "data.limit=16",
        f"train.output={tmp_path / 'run'}", "train.batch_size=4", "train.max_steps=2",
        "generate.min_new_tokens=1", "generate.max_new_tokens=8"])


def train_reports():
    return {study.id: study.report for study in read_studies(Data(root=IU_XRAY))["train"]}


@needs_data
def test_real_studies_are_read_as_r2gen_splits_them():
    splits = read_studies(Data(root=IU_XRAY))
    assert (len(splits["train"]), len(splits["val"])) == (2069, 296)
    assert all(len(study.image_paths) == 2 for study in splits["train"])
    assert all(report == report.lower() and report.endswith(" .")
               for report in train_reports().values())


@needs_data
def test_iu_xray_phrases_agree_with_a_reading_of_100_reports():
    """100 training reports (`random.Random(12).sample` of the sorted ones), read by eye before the
    phrases' answers were seen; the phrases were written and mended on the other reports."""
    read = json.loads((Path(__file__).parent / "iu_xray_findings_read.json").read_text())
    spec, reports = json.loads(IU_XRAY_FINDINGS.read_text(encoding="utf-8")), train_reports()
    names = list(spec["phrases"])
    true = np.array([[name in findings for name in names] for findings in read.values()])
    texts = [named_findings(reports[study], spec) for study in read]
    named = np.array([[name in findings for name in names] for findings in texts])
    precision, recall, _ = precision_recall_f1((named & true).sum(), named.sum(), true.sum())
    assert precision > 0.98 and recall > 0.92


@needs_all
def test_real_run_trains_and_scores(config, tmp_path):
    metrics = train(config)
    assert metrics["n"] == 16 and 0 <= metrics["BLEU_1"] <= 1
    _, *steps = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()[:3])
    # a real LLM is far below log 49,152
    assert all(2 < line["report"] < 8 and 0.5 < line["did"] < 4 for line in steps)


@needs_all
def test_real_teacher_tells_reports_apart(config):
    """Two wordings of one finding are nearer to each other than to its negation elsewhere."""
    texts = ["the heart is enlarged .", "heart size is enlarged .",
             "no pneumothorax or pleural effusion is seen ."]
    embeddings = embed_reports(load_model(config), texts)
    a, b, c = (embeddings[text].float() for text in texts)
    assert torch.cosine_similarity(a, b, dim=0) > torch.cosine_similarity(a, c, dim=0)


@needs_data
@pytest.mark.parametrize("way", ["shuffled", "next", "cut", "constant"])
def test_real_scores_equal_pycocoevalcap(way):
    """300 real reports, each paired with another report of the same split."""
    references = dict(list(train_reports().items())[:300])
    texts = list(references.values())
    predictions = {"shuffled": random.Random(0).sample(texts, len(texts)),
                   "next": texts[1:] + texts[:1], "constant": texts[:1] * len(texts),
                   "cut": [text[:len(text) * 2 // 3] for text in texts]}[way]
    predictions = dict(zip(references, predictions))
    ours, gold = score(predictions, references, meteor=False), theirs(predictions, references)
    assert all(abs(ours[name] - value) <= 1e-6 for name, value in gold.items())


@needs_data
@pytest.mark.skipif(not BERT, reason="VDGEN_BERT does not name a folder")
def test_real_vocabulary_and_size_of_chexbert(tmp_path):
    """BERT-base with random weights: the tokens of 300 real and some odd texts, the classes of a
    few, in float64."""
    words = (Path(BERT) / "vocab.txt").read_text(encoding="utf-8").split("\n")[:30522]
    path, state = write_checkpoint(tmp_path, BertConfig(), words)
    chexbert = load_chexbert(path).double()
    odd = ["", " \n ", "effusion " * 600, "\u00c9 \u00fc \u80ba 12mm x-ray (xxxx) .5 %",
           "The HEART is normal.\n\nLungs\tclear", "a" * 150,
           "don't \u201cquote\u201d \u2014 \u2026 \u00bd \u00b2 \u00b5m"]
    texts = odd + list(train_reports().values())[:300]
    for text in texts:
        ids = chexbert.tokenizer(" ".join(text.split()), truncation=True, max_length=512).input_ids
        assert ids == word_pieces(text, words)
    expected = [plain_forward(state, word_pieces(text, words), BertConfig()) for text in texts[:12]]
    assert chexbert.label(texts[:12]) == expected
