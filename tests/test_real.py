"""On real studies and a real pretrained Llama; skipped unless these name their folders:

    VDGEN_LLM=folder VDGEN_VISION=folder VDGEN_IU_XRAY=folder python -m pytest -q tests/test_real.py
"""
import json
import os

import pytest
import torch

from configs import Data, load_config
from data import read_studies
from model import embed_reports, load_model
from train import train

FOLDERS = [os.environ.get(name) for name in ("VDGEN_LLM", "VDGEN_VISION", "VDGEN_IU_XRAY")]
pytestmark = pytest.mark.skipif(None in FOLDERS, reason="VDGEN_LLM, VDGEN_VISION, VDGEN_IU_XRAY do not name folders")


def config(tmp_path, *overrides):
    llm, vision, root = FOLDERS
    return load_config("configs/iu_xray_small.yaml", [
        f"model.llm={llm}", f"model.vision={vision}", f"data.root={root}", f"train.output={tmp_path / 'run'}",
        "data.limit=16", "train.batch_size=4", "train.max_steps=2", "generate.min_new_tokens=1", "generate.max_new_tokens=8",
        *overrides])


def test_real_studies_are_read_as_r2gen_splits_them():
    splits = read_studies(Data(root=FOLDERS[2]))
    assert (len(splits["train"]), len(splits["val"])) == (2069, 296)
    assert all(len(study.image_paths) == 2 for study in splits["train"])
    assert all(study.report == study.report.lower() and study.report.endswith(" .") for study in splits["train"])


def test_real_run_trains_and_scores(tmp_path):
    metrics = train(config(tmp_path))
    assert metrics["n"] == 16 and 0 <= metrics["BLEU_1"] <= 1
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()][1:3]
    assert all(2 < line["report"] < 8 and 0.5 < line["did"] < 4 for line in steps)  # a real LLM is far below log 49,152


def test_real_teacher_tells_reports_apart(tmp_path):
    """Two wordings of one finding are nearer to each other than to its negation in another report."""
    model = load_model(config(tmp_path))
    texts = ["the heart is enlarged .", "heart size is enlarged .", "no pneumothorax or pleural effusion is seen ."]
    embeddings = embed_reports(model, texts)
    a, b, c = (embeddings[text].float() for text in texts)
    assert torch.cosine_similarity(a, b, dim=0) > torch.cosine_similarity(a, c, dim=0)
