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

from configs import Data, Generate, load_config
from conftest import library_search
from data import IU_XRAY_FINDINGS, ReportDataset, collate, named_findings, read_studies
from evaluate import meteor_1_5, precision_recall_f1, score
from model import beam_search, embed_reports, load_chexbert, load_model
from train import train

FOLDERS = [os.environ.get(name) for name in ("VDGEN_LLM", "VDGEN_VISION", "VDGEN_IU_XRAY")]
BERT = os.environ.get("VDGEN_BERT")
needs_data = pytest.mark.skipif(FOLDERS[2] is None, reason="VDGEN_IU_XRAY does not name a folder")
needs_all = pytest.mark.skipif(
    None in FOLDERS, reason="VDGEN_LLM, VDGEN_VISION, VDGEN_IU_XRAY do not name folders"
)


def config(tmp_path, *overrides):
    llm, vision, root = FOLDERS
    return load_config(
        "configs/iu_xray_small.yaml",
        [
            f"model.llm={llm}",
            f"model.vision={vision}",
            f"data.root={root}",
            f"train.output={tmp_path / 'run'}",
            "data.limit=16",
            "train.batch_size=4",
            "train.max_steps=2",
            "generate.min_new_tokens=1",
            "generate.max_new_tokens=8",
            *overrides,
        ],
    )


@needs_data
def test_real_studies_are_read_as_r2gen_splits_them():
    splits = read_studies(Data(root=FOLDERS[2]))
    assert (len(splits["train"]), len(splits["val"])) == (2069, 296)
    assert all(len(study.image_paths) == 2 for study in splits["train"])
    assert all(
        study.report == study.report.lower() and study.report.endswith(" .")
        for study in splits["train"]
    )


@needs_data
def test_iu_xray_phrases_agree_with_a_reading_of_100_reports():
    """100 training reports (`random.Random(12).sample` of the sorted ones), read by eye before the
    phrases' answers were seen; the phrases were written and mended on the other reports."""
    read = json.loads((Path(__file__).parent / "iu_xray_findings_read.json").read_text())
    spec = json.loads(IU_XRAY_FINDINGS.read_text(encoding="utf-8"))
    reports = {study.id: study.report for study in read_studies(Data(root=FOLDERS[2]))["train"]}
    names = list(spec["phrases"])
    true = np.array([[name in findings for name in names] for findings in read.values()])
    texts = [named_findings(reports[study], spec) for study in read]
    named = np.array([[name in findings for name in names] for findings in texts])
    found = precision_recall_f1(named, true, names)
    print(*(f"\n{name}: {row}" for name, row in found["each"].items()))
    assert found["micro_precision"] > 0.98 and found["micro_recall"] > 0.92


@needs_all
def test_real_run_trains_and_scores(tmp_path):
    metrics = train(config(tmp_path))
    assert metrics["n"] == 16 and 0 <= metrics["BLEU_1"] <= 1
    steps = [
        json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ][1:3]
    # a real LLM is far below log 49,152
    assert all(2 < line["report"] < 8 and 0.5 < line["did"] < 4 for line in steps)


@needs_all
@pytest.mark.parametrize("settings", [
    Generate(),
    Generate(num_beams=1, min_new_tokens=5, max_new_tokens=40),
    Generate(num_beams=4, repetition_penalty=1.0, length_penalty=0.5, min_new_tokens=5),
], ids=str)
@torch.no_grad()
def test_beam_search_equals_the_librarys_on_real_weights(tmp_path, settings):
    """In float32: in bfloat16 two reports of nearly one score may change places, as any other
    rounding makes them."""
    model = load_model(config(tmp_path, "train.precision=fp32")).eval()
    studies = read_studies(model.config.data)["val"][:4]
    dataset = ReportDataset(studies, model.config.data, model.image_size, model.tokenizer)
    batch = collate([dataset[i] for i in range(4)])
    prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
    ours = beam_search(model.causal_lm, prompt, settings, model.eos_id)
    assert torch.equal(ours, library_search(model, prompt, settings))


@needs_all
def test_real_teacher_tells_reports_apart(tmp_path):
    """Two wordings of one finding are nearer to each other than to its negation in another
    report."""
    model = load_model(config(tmp_path))
    texts = [
        "the heart is enlarged .",
        "heart size is enlarged .",
        "no pneumothorax or pleural effusion is seen .",
    ]
    embeddings = embed_reports(model, texts)
    a, b, c = (embeddings[text].float() for text in texts)
    assert torch.cosine_similarity(a, b, dim=0) > torch.cosine_similarity(a, c, dim=0)


def paired_four_ways():
    """{way: (predictions, references)} of 300 real reports: shuffled, next of the same split,
    cut short, one for all."""
    studies = read_studies(Data(root=FOLDERS[2]))["train"][:300]
    references = {study.id: study.report for study in studies}
    texts = list(references.values())
    return {
        "shuffled": (dict(zip(references, random.Random(0).sample(texts, len(texts)))), references),
        "next": (dict(zip(references, texts[1:] + texts[:1])), references),
        "cut": (
            {
                name: " ".join(text.split()[: len(text.split()) * 2 // 3])
                for name, text in references.items()
            },
            references,
        ),
        "constant": (dict.fromkeys(references, texts[0]), references),
    }


@needs_data
def test_real_scores_equal_pycocoevalcap():
    for way, (predictions, references) in paired_four_ways().items():
        ours, gold = score(predictions, references, meteor=False), theirs(predictions, references)
        largest = max(abs(ours[name] - value) for name, value in gold.items())
        print(f"{way}: largest difference {largest:.1e}")
        assert largest <= 1e-6


@needs_data
@pytest.mark.java
def test_real_meteor_equals_pycocoevalcap():
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor")
    ways = paired_four_ways()
    ours = meteor_1_5(
        [
            [(predictions[name], references[name]) for name in references]
            for predictions, references in ways.values()
        ]
    )
    wrapper = meteor.Meteor()
    for (way, (predictions, references)), value in zip(ways.items(), ours):
        gold, _ = wrapper.compute_score(
            *({name: [text] for name, text in texts.items()} for texts in (references, predictions))
        )
        print(f"{way}: difference {abs(gold - value):.1e}")
        assert abs(gold - value) <= 1e-6


@needs_data
@pytest.mark.skipif(BERT is None, reason="VDGEN_BERT does not name a folder")
def test_real_vocabulary_and_size_of_chexbert(tmp_path):
    """BERT-base with random weights: the tokens of 300 real and some odd texts, the classes of a
    few, in float64."""
    words = (Path(BERT) / "vocab.txt").read_text(encoding="utf-8").split("\n")[:30522]
    path, state = write_checkpoint(tmp_path, BertConfig(), words)
    chexbert = load_chexbert(path).double()
    odd = [
        "",
        " \n ",
        "effusion " * 600,
        "\u00c9 \u00fc \u80ba 12mm x-ray (xxxx) .5 %",
        "The HEART is normal.\n\nLungs\tclear",
        "a" * 150,
        "don't \u201cquote\u201d \u2014 \u2026 \u00bd \u00b2 \u00b5m",
    ]
    texts = odd + [study.report for study in read_studies(Data(root=FOLDERS[2]))["train"][:300]]
    for text in texts:
        assert chexbert.tokenizer(
            " ".join(text.split()), truncation=True, max_length=512
        ).input_ids == word_pieces(text, words)
    assert chexbert.label(texts[:12]) == [
        plain_forward(state, word_pieces(text, words), BertConfig()) for text in texts[:12]
    ]
