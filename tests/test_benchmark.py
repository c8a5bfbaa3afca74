"""The textbook step of the benchmark computes what ours computes; only how differs."""
import sys
from dataclasses import replace

import benchmark
import pytest
import torch
import yaml
from benchmark import textbook_terms

from data import ReportDataset, loader, read_studies
from model import embed_reports


def both_terms(model, limit):
    """The terms of both steps on the studies with two views, and the batch's report lengths."""
    data = replace(model.config.data, max_report_tokens=limit)
    studies = [study for study in read_studies(data)["train"] if len(study.image_paths) == 2]
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    batch = next(loader(dataset, [list(range(len(studies)))], 0, model.device))
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
    """Terms and gradient, in float32, without dropout; reports of several lengths, one cut."""
    model = make_model("model.lora.dropout=0").eval()
    ours, theirs, lengths = both_terms(model, limit=12)
    assert len(set(lengths)) > 1 and max(lengths) == 12
    for name in ("report", "vse"):  # the teacher of the textbook would read the cut report
        assert theirs[name].item() == pytest.approx(ours[name].item(), abs=1e-5), name
    expected = gradients(model, ours["report"] + ours["vse"])
    got = gradients(model, theirs["report"] + theirs["vse"])
    assert len(got) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, got))
    ours, theirs, _ = both_terms(model, limit=100)  # whole reports
    assert theirs["did"].item() == pytest.approx(ours["did"].item(), abs=1e-5)


def test_benchmark_prints_each_part(make_config, tmp_path, monkeypatch, capsys):
    """Of a tiny model; the memory's processes are left out."""
    monkeypatch.delitem(benchmark.PARTS, "memory")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(make_config().to_dict()))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--batch", "4", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    titles = [line.split(":")[0] for line in lines if "TFLOP" not in line]
    assert titles == ["training, textbook", "training, ours", "training, textbook, LLM part",
                      "training, ours, LLM part",
                      "decoding 4 studies, 2 beams, 1 to 6 tokens, growing cache",
                      "input, textbook", "input, ours"]
