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


def both_terms(model, limit):
    """The terms of both steps on the studies with two views, and the batch's report lengths."""
    data = replace(model.config.data, max_report_tokens=limit)
    studies = [study for study in read_studies(data)["train"] if len(study.image_paths) == 2]
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    batch = collate([dataset[i] for i in range(len(studies))])
    images, view_counts, reports = batch["images"], batch["view_counts"], batch["reports"]
    embeddings = embed_reports(model, reports)
    y = torch.stack([embeddings[text] for text in reports])
    lengths = batch["report_lengths"]
    ours = model(images, view_counts, batch["report_ids"], lengths, y)[0]
    return ours, textbook_terms(model, images, view_counts, reports, limit), lengths


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_textbook_step_equals_ours(make_model):
    """Terms and gradient, in float32, without dropout.

    The reports are of several lengths, one of them cut.
    """
    model = make_model("model.lora.dropout=0").eval()
    ours, theirs, lengths = both_terms(model, limit=12)
    assert len(set(lengths)) > 1 and max(lengths) == 12
    for name in ("report", "vse"):  # the teacher of the textbook would read the cut report
        assert theirs[name].item() == pytest.approx(ours[name].item(), abs=1e-5), name
    expected = gradients(model, ours["report"] + ours["vse"])
    got = gradients(model, theirs["report"] + theirs["vse"])
    assert len(got) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, got))


def test_textbook_teacher_equals_ours(make_model):
    model = make_model("model.lora.dropout=0").eval()
    ours, theirs, _ = both_terms(model, limit=100)
    assert theirs["did"].item() == pytest.approx(ours["did"].item(), abs=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run for minutes")
def test_gpu_benchmark_without_a_gpu_is_one_line():
    done = subprocess.run([sys.executable, "tests/benchmark.py", "--only", "gpu"], cwd=REPOSITORY,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --only gpu: torch sees no CUDA device here\n"


def test_flop_counts_are_those_of_a_step(make_model):
    """Reports of 51 tokens, so that rows are as long as those counted.

    What has B rows is left out of the count.
    """
    model = make_model("loss.vse_weight=0", "loss.did_weight=0").eval()
    batch = make_batch(model)
    batch |= dict(report_ids=torch.randint(4, 20, (4, 51)), report_lengths=[51] * 4)
    counts = flop_counts(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch)[0]["report"].backward()
    tokens = sum(batch["report_lengths"])
    assert counts["prompt"] == model.embed_prompt(torch.zeros(1, 16, 32)).shape[1]
    passing = 4 * (counts["prompt"] - 1) + tokens
    predicted = counts["image"] * 7 + counts["token"] * passing + counts["report_token"] * tokens
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert {p.device.type for p in model.parameters()} == {"cpu"} and not model.training
