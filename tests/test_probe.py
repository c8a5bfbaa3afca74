"""The probe of h against plain definitions, on made-up studies."""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import probe
import pytest
import torch

from configs.iu_xray import write_findings
from data import read_image, read_studies
from model import embed_reports
from train import train


def draw(n, D, L, seed=0):
    """Correlated h in odd units, and findings that follow from it by a plane."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator)
    weight = torch.randn(D, L, generator=torch.Generator().manual_seed(9))
    true = (h @ weight > 0.5 * (h @ weight).std(dim=0)).float()
    return 7 + h * torch.logspace(-3, 3, D), true


def test_encode_keeps_the_order_of_the_studies(make_model):
    model = make_model().eval()
    studies = read_studies(model.config.data)["train"][:5]
    size, images = model.image_size, Path(model.config.data.root) / "images"
    for study, h in zip(studies, probe.encode(model, studies), strict=True):
        views = torch.stack([read_image(images / path, size) for path in study.image_paths])
        with torch.no_grad():
            alone = model.encode(views, [len(views)]).mean(dim=1)[0]
        assert torch.allclose(h, alone, atol=1e-5), study.id


def test_auc_equals_a_double_loop_with_ties():
    rng = np.random.default_rng(0)
    scores, true = rng.integers(0, 6, 40).tolist(), rng.integers(0, 2, 40).tolist()
    pairs = [(a > b) + (a == b) / 2 for a, t in zip(scores, true) for b, u in zip(scores, true)
             if t == 1 and u == 0]
    assert probe.auc(torch.tensor(scores), torch.tensor(true)) == pytest.approx(np.mean(pairs))
    assert math.isnan(probe.auc(torch.ones(3), torch.zeros(3)))


def test_common_sentences_name_one_finding_each():
    reports = ["the heart is large . no effusion .", "the heart is large . small effusion .",
               "large heart and effusion . the lungs are clear . no effusion ."]
    spec = {"phrases": {"cardiomegaly": ["heart is large", "large heart"], "effusion": ["effusion"],
                        "hernia": ["hernia"]}, "sides": {}, "extents": {}}
    assert probe.common_sentences(reports, spec) == {
        None: ["no effusion .", "the lungs are clear ."], "cardiomegaly": ["the heart is large ."],
        "effusion": ["small effusion ."], "hernia": []}


def test_sentences_side_by_side_are_as_likely_as_each_alone(make_model):
    model = make_model().eval()
    studies = read_studies(model.config.data)["train"][:3]
    reports = [study.report for study in studies]
    ids = model.tokenizer(reports, add_special_tokens=False).input_ids
    with torch.no_grad():
        for _, tokens in probe.visual_batches(model, studies, ""):
            found = probe.begin_with(model, tokens, ids)
            for i, sentence in enumerate(ids):
                rows = torch.tensor([sentence])
                alone = [-len(sentence) * model.report_term(one[None], rows, [len(sentence)])
                         for one in tokens]
                assert torch.allclose(found[:, i], torch.stack(alone), atol=1e-3)


def test_ask_llm_reads_the_visual_tokens(make_model):
    """An LLM that was taught two studies begins each by its own report, not by the other's."""
    model = make_model("model.lora.dropout=0").eval()
    studies = read_studies(model.config.data)["train"][:2]
    sentences = {None: [studies[0].report], "finding": [studies[1].report], "none": []}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    (batch, tokens), = probe.visual_batches(model, studies, "")
    for _ in range(40):
        model.report_term(tokens, batch["report_ids"], batch["report_lengths"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    ratios = probe.ask_llm(model, studies, sentences)
    assert ratios[0, 0] < 0 < ratios[1, 0]
    assert ratios[:, 1].isnan().all()
    found = probe.terms_and_gradients(model, studies * 2, [study.report for study in studies], None)
    assert found["report"] < found["report of others"]


def test_gradients_are_those_of_the_weighted_terms(make_model):
    """Of a batch of all val studies, with y standardised over train (A5)."""
    model = make_model("loss.vse_weight=0.5", "loss.did_weight=2").eval()
    splits = read_studies(model.config.data)
    reports, val = [study.report for study in splits["train"]], [*splits["val"]]
    found = probe.terms_and_gradients(model, val, reports, None)
    embeddings = embed_reports(model, reports + [study.report for study in val])
    of_train = torch.stack([embeddings[text] for text in reports])
    (batch, tokens), = probe.visual_batches(model, val, "", [[0, 1, 2]])
    y = torch.stack([embeddings[text] for text in batch["reports"]])
    y = (y - of_train.mean(dim=0)) / of_train.std(dim=0, correction=0)
    for name, weight in (("report", 1), ("vse", 0.5), ("did", 2)):
        leaf = tokens.clone().requires_grad_()
        terms, measures = model.losses(leaf, batch["report_ids"], batch["report_lengths"], y)
        (weight * terms[name]).backward()
        assert found[name] == pytest.approx(terms[name].item(), abs=1e-4)
        assert found[f"gradient of {name}"] == pytest.approx(leaf.grad.norm().item(), rel=1e-3)
    assert found["did_top1"] == pytest.approx(measures["did_top1"].item())


def test_fit_is_at_the_minimum_of_the_penalised_cross_entropy():
    """The gradient in float64 by hand is zero; without h the bias is the log odds of a finding."""
    h, true = (part.double() for part in draw(50, 4, 3))
    h = (h - h.mean(dim=0)) / h.std(dim=0)
    weight, bias = probe.fit(h, true, 0.1)
    wrong = torch.sigmoid(h @ weight + bias) - true
    assert (h.T @ wrong / len(h) + 0.1 * weight).abs().max() < 1e-4
    assert wrong.mean(dim=0).abs().max() < 1e-4
    _, bias = probe.fit(torch.zeros_like(h), true, 0.1)
    assert torch.allclose(bias, true.mean(dim=0).logit(), atol=1e-4)


def test_the_probe_finds_what_is_there_in_any_units():
    h, true = draw(600, 8, 3)
    train_h, train_true, h, true = h[:400], true[:400], h[400:], true[400:]
    l2 = probe.choose_l2(train_h, train_true)
    assert l2 == min(probe.L2)  # nothing but signal: the weakest penalty
    scores = probe.predict(train_h, train_true, h, l2)
    assert all(probe.auc(scores[:, i], true[:, i]) > 0.98 for i in range(3))
    odds = probe.predict(train_h, train_true, train_h, l2)  # log odds: their mean P is the share
    assert torch.allclose(odds.sigmoid().mean(dim=0), train_true.mean(dim=0), atol=1e-3)


def test_most_likely_names_a_share_of_the_studies():
    scores = torch.tensor([[0.1, 3.0], [0.4, 1.0], [-2.0, 2.0], [0.3, 0.0]])
    named = probe.most_likely(scores, torch.tensor([0.5, 0.2]))
    assert named.tolist() == [[False, True], [True, False], [False, False], [True, False]]


def test_print_table_means(capsys):
    columns = {"a": [0.5, math.nan, 1.0], "b": [0.1, 0.2, 0.6]}
    probe.print_table(["x", "y", "z"], columns, np.array([9, 12, 10]))
    *_, macro, many = capsys.readouterr().out.splitlines()
    assert macro.split() == ["macro", "0.750", "0.300"]
    assert many.split()[-2:] == ["1.000", "0.400"]


def test_the_probe_of_a_run(make_config, data_root, tmp_path, monkeypatch, capsys):
    """All of it on a tiny run: every finding, its studies, both means, and the terms."""
    root = shutil.copytree(data_root, tmp_path / "data")
    config = make_config(f"data.root={root}")
    splits = read_studies(config.data)
    write_findings(root, splits)
    spec = json.loads((root / "findings.json").read_text())
    held = [{row["finding"] for row in spec["studies"][study.id]} for study in splits["test"]]
    right = torch.tensor([[float(name in row) - 0.5 for name in spec["phrases"]] for row in held])
    train(config)
    monkeypatch.setattr(probe, "choose_l2", lambda h, true: 1.0)
    monkeypatch.setattr(probe, "predict", lambda *_: right)
    monkeypatch.setattr(sys, "argv", [
        "probe.py", "--checkpoint", str(tmp_path / "run/best.pt"), "--split", "test"])
    capsys.readouterr()
    probe.main()
    _, _, titles, *rows, macro, many, _, vse, did, report = capsys.readouterr().out.splitlines()
    assert "F1 of text" in titles and titles.endswith("of chance")
    assert [row[:30].strip() for row in rows] == list(spec["phrases"])
    cells = {row[:30].strip(): row[30:].split() for row in rows}
    assert cells["pneumothorax"][0] == "0"  # studies; then AUC of h and LLM, F1 at P > 1/2
    assert [cells["cardiomegaly"][i] for i in (0, 1, 4)] == ["1", "1.000", "1.000"]
    assert len(macro.split()) == 8 and many.startswith("macro, 10 studies or more")
    assert "another study" in report and "chance 1.099; did_top1" in did and "gradient" in vse
    (root / "findings.json").unlink()
    probe.main()
    assert "no findings.json" in capsys.readouterr().out
