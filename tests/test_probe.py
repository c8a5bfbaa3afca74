"""The probe of h against plain definitions, on made-up studies."""
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import probe
import pytest
import torch

from data import IU_XRAY_FINDINGS, named_findings, read_image, read_studies
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
    assert math.isnan(probe.auc(torch.full((2,), torch.nan), torch.tensor([0, 1])))


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
    model = make_model().train()
    studies = read_studies(model.config.data)["train"][:2]
    sentences = {None: [studies[0].report], "finding": [studies[1].report], "none": []}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(100):
        for batch, tokens in probe.visual_batches(model, studies, ""):
            with torch.enable_grad():
                model.report_term(tokens, batch["report_ids"], batch["report_lengths"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    ratios, own, others = probe.ask_llm(model.eval(), studies, sentences)
    assert ratios[0, 0] < 0 < ratios[1, 0] and own < others
    assert ratios[:, 1].isnan().all()
    with torch.no_grad():
        terms = [model.report_term(tokens, batch["report_ids"], batch["report_lengths"])
                 for batch, tokens in probe.visual_batches(model, studies, "")]
    assert own == pytest.approx(float(terms[0]), abs=1e-3)
    alone = [*studies, read_studies(model.config.data)["train"][2]]  # a batch of two, one of one
    assert probe.ask_llm(model, alone, sentences)[1:] == (own, others)


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
    noise = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)).round()
    assert all(abs(probe.auc(scores[:, i], noise[:, i]) - 0.5) < 0.12 for i in range(3))


def test_most_likely_names_a_share_of_the_studies():
    scores = torch.tensor([[0.1, 3.0], [0.4, 1.0], [-2.0, 2.0], [0.3, 0.0]])
    named = probe.most_likely(scores, torch.tensor([0.5, 0.2]))
    assert named.tolist() == [[False, True], [True, False], [False, False], [True, False]]


def test_did_in_batches_in_closed_form():
    """Equal embeddings: log 16. Orthonormal pairs: log(1 + 15 exp(-1/t)), each nearest its own."""
    one = torch.ones(40, 64)
    assert probe.did_in_batches(one, one, 0.5)[0] == pytest.approx(math.log(16), abs=1e-5)
    pairs = torch.eye(40, 64)
    loss, nearest = probe.did_in_batches(3 * pairs, pairs, 0.5)
    assert loss == pytest.approx(math.log(1 + 15 * math.exp(-2)), abs=1e-5) and nearest == 1
    assert probe.did_in_batches(pairs, -pairs, 0.5)[1] == 0


def test_print_table_means(capsys):
    columns = {"a": {"x": 0.5, "y": math.nan, "z": 1.0}, "b": {"x": 0.1, "y": 0.2, "z": 0.6}}
    probe.print_table(columns, {"x": 9, "y": 12, "z": 10})
    *_, macro, many = capsys.readouterr().out.splitlines()
    assert macro.split() == ["macro", "0.750", "0.300"]
    assert many.split()[-2:] == ["1.000", "0.400"]


def test_texts_are_standardised_over_train(make_model, tmp_path):
    """y has mean 0 over train, so W2 y + b2 has mean b2; and an own deviation of 1 before W2."""
    model = make_model().eval()
    with torch.no_grad():
        model.did_head.weight.copy_(torch.eye(*model.did_head.weight.shape))
    train_studies = read_studies(model.config.data)["train"]
    embed = probe.embed_texts(model, train_studies, train_studies, tmp_path / "teacher.pt")
    assert torch.allclose(embed.mean(dim=0), model.did_head.bias, atol=1e-5)
    assert torch.allclose(embed.std(dim=0, correction=0)[:8], torch.ones(8), atol=1e-4)


def test_the_probe_of_a_run(make_config, data_root, tmp_path, monkeypatch, capsys):
    """All of it on a tiny run: every finding, its studies, both means, and DID."""
    root = shutil.copytree(data_root, tmp_path / "data")
    config = make_config(f"data.root={root}")
    spec = json.loads(IU_XRAY_FINDINGS.read_text())
    spec["studies"] = {study.id: [{"finding": name, "side": None, "extent": None}
                                  for name in named_findings(study.report, spec)]
                       for studies in read_studies(config.data).values() for study in studies}
    (root / "findings.json").write_text(json.dumps(spec))
    train(replace(config, train=replace(config.train, output=str(tmp_path / "run"))))
    before = (tmp_path / "run/teacher.pt").read_bytes()
    monkeypatch.setattr(probe, "BATCH", 3)
    arguments = ["probe.py", "--checkpoint", str(tmp_path / "run/best.pt"), "--split", "test"]
    monkeypatch.setattr(sys, "argv", arguments)
    capsys.readouterr()
    probe.main()
    header, titles, *rows, macro, _, llm, did = capsys.readouterr().out.splitlines()
    assert "test: 5 studies, regression on 12" in header and titles.endswith("of chance")
    assert [row[:30].strip() for row in rows] == list(spec["phrases"])
    counts = {row[:30].strip(): int(row[30:38]) for row in rows}
    assert counts["cardiomegaly"] == 1 and counts["pneumothorax"] == 0
    assert len(macro.split()) == 8 and "(chance 1.099), did_top1" in did
    assert "with another study's visual tokens" in llm
    assert (tmp_path / "run/teacher.pt").read_bytes() == before
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", "data.limit=4"])
    with pytest.raises(ValueError, match="it is of 5 studies, not of the 4 of test"):
        probe.main()
    (tmp_path / "run/test_predictions.jsonl").rename(tmp_path / "run/old.jsonl")
    probe.main()
    assert "F1 of text" not in capsys.readouterr().out
    assert (tmp_path / "run/teacher.pt").read_bytes() == before  # of more studies: not replaced
    (tmp_path / "run/old.jsonl").rename(tmp_path / "run/test_predictions.jsonl")
    monkeypatch.setattr(sys, "argv", arguments)

    true = probe.matrix(read_studies(config.data)["test"], spec)  # a regression that is right
    monkeypatch.setattr(probe, "choose_l2", lambda h, true: 1.0)
    monkeypatch.setattr(probe, "predict", lambda *_: true - 0.5)
    probe.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if "cardiomegaly" in line)
    assert row.split()[2] == row.split()[5] == "1.000"  # AUC, F1 at P > 1/2

    (root / "findings.json").unlink()
    with pytest.raises(ValueError, match="no findings.json in .*data.py iu_xray. adds it"):
        probe.main()
