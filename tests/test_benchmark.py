"""The textbook step of the benchmark computes what ours computes; only how differs."""
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmark import flop_counts, textbook_terms
from conftest import REPOSITORY
from test_model import make_batch
from torch.utils.flop_counter import FlopCounterMode

from data import ReportDataset, collate, read_studies
from model import embed_reports


def test_textbook_step_equals_ours(make_model):
    """All three terms and the gradient, in float32, without dropout; reports of several lengths, one of them cut."""
    model = make_model("model.lora.dropout=0").eval()
    studies = [study for study in read_studies(model.config.data)["train"] if len(study.image_paths) == 2]
    dataset = ReportDataset(studies, replace(model.config.data, max_report_tokens=(limit := 12)), model.image_size, model.tokenizer)
    lengths = [len(item["report_ids"]) for item in dataset]
    assert len(set(lengths)) > 1 and max(lengths) == limit
    batch = collate([dataset[i] for i in range(len(studies))])
    y = torch.stack([embed_reports(model, batch["reports"])[text] for text in batch["reports"]])
    ours = model(batch["images"], batch["view_counts"], batch["report_ids"], batch["report_lengths"], y)[0]
    theirs = textbook_terms(model, batch["images"], batch["view_counts"], batch["reports"], limit)
    for name in ("report", "vse"):  # the teacher of the textbook would read the cut report
        assert theirs[name].item() == pytest.approx(ours[name].item(), abs=1e-5), name
    gradients = []
    for terms in (ours, theirs):
        model.zero_grad()
        (terms["report"] + terms["vse"]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_textbook_teacher_equals_ours(make_model):
    model = make_model("model.lora.dropout=0").eval()
    studies = [study for study in read_studies(model.config.data)["train"] if len(study.image_paths) == 2]
    dataset = ReportDataset(studies, model.config.data, model.image_size, model.tokenizer)
    batch = collate([dataset[i] for i in range(len(studies))])
    y = torch.stack([embed_reports(model, batch["reports"])[text] for text in batch["reports"]])
    ours = model(batch["images"], batch["view_counts"], batch["report_ids"], batch["report_lengths"], y)[0]["did"]
    assert textbook_terms(model, batch["images"], batch["view_counts"], batch["reports"], 100)["did"].item() == pytest.approx(ours.item(), abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes")
def test_gpu_benchmark_without_a_gpu_is_one_line():
    done = subprocess.run([sys.executable, "tests/benchmark.py", "--only", "gpu"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --only gpu: torch sees no CUDA device here\n"


def test_flop_counts_are_those_of_a_step(make_model):
    """Reports of 51 tokens, so that rows are as long as those counted; what has B rows is left out of the count."""
    model = make_model("loss.vse_weight=0", "loss.did_weight=0").eval()
    batch = make_batch(model) | dict(report_ids=torch.randint(4, 20, (4, 51)), report_lengths=[51] * 4)
    counts = flop_counts(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch)[0]["report"].backward()
    tokens = sum(batch["report_lengths"])
    assert counts["prompt"] == model.embed_prompt(torch.zeros(1, 16, 32)).shape[1]
    predicted = counts["image"] * 7 + counts["token"] * (4 * (counts["prompt"] - 1) + tokens) + counts["report_token"] * tokens
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert {p.device.type for p in model.parameters()} == {"cpu"} and not model.training
