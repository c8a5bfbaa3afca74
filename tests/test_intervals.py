"""Intervals and paired comparisons: against plain loops, and what must hold exactly."""
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from test_evaluate import SPEC, config_for, plain_f1, reports, rows_of

import evaluate
from coverage import coverage, paired_coverage
from evaluate import (METRICS, CiderD, compare, intervals, label_scores, label_statistics, measure,
                      named_findings, resamples, rouge_l, score, score_against, score_clinical,
                      score_findings, scores_of, study_statistics)
from model import CONDITIONS

FINDINGS = ["a small left pleural effusion .", "no effusions .", "a nodule .", "rib fracture ."]


def studies(n, seed):
    """Predictions and references of n studies, and what is in them."""
    rng = random.Random(seed)
    predictions, references = reports(n, seed), reports(n, seed + 1000)
    for texts in (predictions, references):
        for name in texts:
            texts[name] += " " + rng.choice(FINDINGS)
    held = {}
    for name, text in references.items():
        named = named_findings(text, SPEC)
        held[name] = [{"finding": found, "side": None, "extent": None} for found in named]
    return predictions, references, SPEC | {"studies": held}


def label(texts):
    """A made labeller: three conditions by words, one of them uncertain."""
    words = {"Edema": ("nodule", 1), "Fracture": ("fracture", 3), "No Finding": ("no", 1)}
    classes = np.zeros((len(texts), 14), dtype=int)
    for row, text in zip(classes, texts):
        for name, (word, value) in words.items():
            row[CONDITIONS.index(name)] = value * (word in text.split())
    return classes.tolist()


def plain_bleu(pairs):
    correct, guessed, lengths = [0] * 4, [0] * 4, [0, 0]
    for texts in pairs:
        words = [text.split() for text in texts]
        lengths = [total + len(part) for total, part in zip(lengths, words)]
        for n in range(4):
            ours, theirs = (Counter(zip(*(part[i:] for i in range(n + 1)))) for part in words)
            correct[n] += (ours & theirs).total()
            guessed[n] += ours.total()
    brevity = min(1, math.exp(1 - lengths[1] / lengths[0]))
    precisions = [c / g for c, g in zip(correct, guessed)]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]


def plain_scores(predictions, references, spec, chosen):
    """Every score of study ids, one of them more than once perhaps; CIDEr's idf is of all."""
    both = predictions, references
    pairs = [(predictions[name], references[name]) for name in chosen]
    scores = {f"BLEU_{n}": value for n, value in enumerate(plain_bleu(pairs), 1)}
    scores["ROUGE_L"] = sum(rouge_l(*pair) for pair in pairs) / len(pairs)
    cider = CiderD(list(references.values())).each([predictions[name] for name in references])
    cider = dict(zip(references, cider))
    scores["CIDEr"] = sum(cider[name] for name in chosen) / len(chosen)
    named = [[named_findings(texts[name], spec) for name in chosen] for texts in both]
    parts = {"findings": [[[finding in row for finding in spec["phrases"]] for row in rows]
                          for rows in named]}
    classes = [np.array(label([texts[name] for name in chosen])) for texts in both]
    for reading, positive in (("uncertain_negative", (1,)), ("uncertain_positive", (1, 3))):
        named = [np.isin(part, positive) for part in classes]
        parts[f"clinical.{reading}.14"] = [part.tolist() for part in named]
        parts[f"clinical.{reading}.13"] = [part[:, :13].tolist() for part in named]
    for part, (ours, theirs) in parts.items():
        columns = list(zip(zip(*ours), zip(*theirs)))
        scores[f"{part}.micro_f1"] = plain_f1(sum(ours, []), sum(theirs, []))[2]
        scores[f"{part}.macro_f1"] = sum(plain_f1(*column)[2] for column in columns) / len(columns)
    return scores


def test_resampled_scores_equal_a_plain_loop():
    """Each score of each resample, from the texts of the studies that are in it."""
    predictions, references, spec = studies(20, 0)
    draws = resamples(20)
    assert draws.shape == (20, 1000) and (draws.sum(axis=0) == 20).all()
    assert len({tuple(column) for column in draws.T}) == 1000
    found = scores_of(study_statistics(predictions, references, spec, label), draws)
    for r in range(30):
        chosen = [name for name, times in zip(references, draws[:, r]) for _ in range(int(times))]
        expected = plain_scores(predictions, references, spec, chosen)
        for name, value in expected.items():
            assert found[name][r] == pytest.approx(value, abs=1e-9), name
    assert len(expected) == 6 + 2 + 2 * 2 * 2 and len(found) == 6 + 2 + 2 * 3 * 2


def test_scores_of_all_studies_are_those_of_an_evaluation():
    predictions, references, spec = studies(40, 1)
    found = scores_of(study_statistics(predictions, references, spec, label))
    for name, value in score(predictions, references, meteor=False).items():
        assert found[name] == value
    assert found["findings.macro_f1"] == score_findings(predictions, spec)["macro_f1"] > 0
    clinical = score_clinical(label(predictions.values()), label(references.values()))
    for size, part in clinical["uncertain_positive"].items():
        assert found[f"clinical.uncertain_positive.{size}.micro_f1"] == part["micro_f1"]


def test_label_scores_count_nothing_as_zero():
    """0 / 0 is 0, as in `precision_recall_f1`: one label named rightly, one never there."""
    named = np.array([[True, False], [False, False]])
    sums = label_statistics(named, named).sum(axis=1)
    assert label_scores(sums) == {"micro_f1": 1, "macro_f1": 0.5}
    assert label_scores(np.zeros(4)) == {"micro_f1": 0, "macro_f1": 0}


def test_intervals_leave_out_24_resamples_on_either_side():
    predictions, references, spec = studies(30, 2)
    statistics = study_statistics(predictions, references, spec)
    found, drawn = intervals(statistics), scores_of(statistics, resamples(30))
    for low, high, values in ((*found["BLEU_4"], drawn["BLEU_4"]),
                              (*found["findings"]["micro_f1"], drawn["findings.micro_f1"])):
        assert [low, high] == [sorted(values)[24], sorted(values)[975]]
    assert found == intervals(statistics)


def test_measure_holds_the_intervals_and_prints_them(tmp_path, capsys):
    predictions, references, spec = studies(60, 3)
    (tmp_path / "findings.json").write_text(json.dumps(spec))
    rows, train = rows_of(predictions, references), list(references.values())
    metrics = measure(rows, config_for(tmp_path), "test", train, label)
    found = metrics["intervals"]
    assert found == intervals(study_statistics(predictions, references, spec, label))
    assert found.keys() == {*METRICS, "findings", "clinical"} - {"METEOR"}
    assert found["clinical"]["uncertain_negative"]["14"].keys() == {"micro_f1", "macro_f1"}
    for key in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr"):
        low, high = found[key]
        assert low < metrics[key] < high
    text = dict.fromkeys(predictions, metrics["constant"]["text"])
    constant = metrics["constant"]["intervals"]
    assert constant["CIDEr"] == intervals(study_statistics(text, references))["CIDEr"]
    evaluate.print_metrics(metrics, "test")
    lines = capsys.readouterr().out.splitlines()
    for word, i in (("95 % interval from", 0), ("to", 1)):
        row = next(line for line in lines if line.strip().startswith(word)).split()
        assert row[-3:] == ["-", f"{found['ROUGE_L'][i]:.3f}", f"{found['CIDEr'][i]:.3f}"]
    brackets = [line.split("95 %: ")[1] for line in lines if "95 %: " in line]
    both = found, constant
    expected = [row["findings"][key] for row in both for key in ("micro_f1", "macro_f1")]
    expected += [row["clinical"]["uncertain_negative"]["14"]["macro_f1"] for row in both]
    assert brackets == ["{:.3f} to {:.3f}".format(*ends) for ends in expected]


def test_compare_equals_a_plain_loop(monkeypatch):
    """The difference on the same resample of both sides, study by study; 60 resamples only."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 60)
    monkeypatch.setattr(evaluate, "TAIL", 2)
    ours, references, spec = studies(20, 4)
    theirs = studies(20, 5)[0]
    sides = [[study_statistics(texts, references, spec, label)] for texts in (ours, theirs)]
    found = compare(*sides)
    differences = []
    for column in resamples(20).T:
        chosen = [name for name, times in zip(references, column) for _ in range(int(times))]
        a, b = (plain_scores(texts, references, spec, chosen) for texts in (ours, theirs))
        differences.append({name: a[name] - b[name] for name in a})
    a, b = (plain_scores(texts, references, spec, list(references)) for texts in (ours, theirs))
    for name in differences[0]:
        values = sorted(difference[name] for difference in differences)
        row, expected = found[name], [a[name], b[name], a[name] - b[name]]
        assert [row["a"], row["b"], row["difference"]] == pytest.approx(expected, abs=1e-9)
        assert row["interval"] == pytest.approx([values[1], values[58]], abs=1e-9)
        assert row["excludes_0"] == (row["interval"][0] > 0 or row["interval"][1] < 0)


def test_compare_with_itself_is_zero_and_swapped_is_negative():
    """To the last bit, with one file a side and with several."""
    references, spec = studies(30, 6)[1:]
    files = [study_statistics(studies(30, seed)[0], references, spec) for seed in (6, 7, 8, 9, 10)]
    for side in (files[:1], files[:3]):
        for row in compare(side, side).values():
            assert row["difference"] == 0 and row["interval"] == [0, 0] and not row["excludes_0"]
    for ours, theirs in ((files[:1], files[1:2]), (files[:3], files[3:]), (files[:1], files[1:])):
        there, back = compare(ours, theirs), compare(theirs, ours)
        for name, row in there.items():
            assert back[name]["difference"] == -row["difference"] and back[name]["a"] == row["b"]
            assert back[name]["interval"] == [-end for end in reversed(row["interval"])]


def test_compare_tells_a_better_model():
    references = reports(60, 11)
    worse = dict.fromkeys(references, "lungs are clear .")
    better = worse | {name: references[name] for name in list(references)[:30]}
    rows = compare(*([study_statistics(texts, references)] for texts in (better, worse)))
    assert all(row["excludes_0"] and row["interval"][0] > 0 for row in rows.values())
    rows = compare(*([study_statistics(texts, references)] for texts in (worse, better)))
    assert all(row["excludes_0"] and row["interval"][1] < 0 for row in rows.values())


def test_several_files_a_side_are_resampled_too():
    """Equal files change nothing. Of unlike ones, each the same for all studies, what is left is
    the spread of the seeds: its variance is that of a mean of n independent ones."""
    references, other = reports(30, 12), [study_statistics(reports(30, 13), reports(30, 12))]
    file = study_statistics(reports(30, 14), references)
    one, three = compare([file], other), compare([file] * 3, other)
    for name, row in one.items():
        assert three[name]["difference"] == pytest.approx(row["difference"], abs=1e-12)
        assert three[name]["interval"] == pytest.approx(row["interval"], abs=1e-12)
    values = np.array([0.1, 0.2, 0.4, 0.3])
    flat = [{"text": np.vstack([file["text"][:10], np.full((2, 30), value)])} for value in values]
    _, drawn = evaluate._mean_over_files(flat, resamples(30))
    assert drawn["ROUGE_L"].mean() == pytest.approx(values.mean(), abs=0.01)
    assert drawn["ROUGE_L"].std() == pytest.approx(values.std(ddof=1) / 2, rel=0.05)


def write_run(folder, predictions, references):
    folder.mkdir(exist_ok=True)
    path = folder / "test_predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(predictions, references)))
    return path


@pytest.fixture
def two_runs(tmp_path):
    """Two runs and a dataset with findings.json, which the first run's config names."""
    ours, references, spec = studies(12, 15)
    root = tmp_path / "data"
    root.mkdir()
    (root / "findings.json").write_text(json.dumps(spec))
    splits = {"train": {"t": "clear ."}, "test": references}
    for split, texts in splits.items():
        splits[split] = [{"id": name, "report": text, "image_path": ["a.png"]}
                         for name, text in texts.items()]
    (root / "annotation.json").write_text(json.dumps(splits))
    a = write_run(tmp_path / "a", ours, references)
    b = write_run(tmp_path / "b", studies(12, 16)[0], references)
    settings = f"model: {{vision: a, llm: b}}\ndata: {{root: {root}, dataset: iu_xray}}\n"
    (a.parent / "config.yaml").write_text(settings)
    return a, b


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_against_prints_and_writes_the_comparison(two_runs, tmp_path, monkeypatch, capsys):
    a, b = two_runs
    run_main(monkeypatch, "--predictions", a, "--against", b)
    printed = capsys.readouterr().out
    assert "note: of a side of one file" in printed
    written = json.loads((tmp_path / "a/test_against.json").read_text())
    assert written["a"] == [str(a)] and written["b"] == [str(b)] and written["n"] == 12
    row, findings = written["scores"]["BLEU_4"], written["scores"]["findings"]["macro_f1"]
    ours, references, spec = studies(12, 15)
    sides = [[study_statistics(texts, references, spec)] for texts in (ours, studies(12, 16)[0])]
    expected = compare(*sides)
    assert row == expected["BLEU_4"] and findings == expected["findings.macro_f1"]
    line = next(line for line in printed.splitlines() if line.startswith("BLEU_4"))
    low, high = row["interval"]
    verdict = "yes" if row["excludes_0"] else "no"
    assert line.split()[1:] == [f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}",
                                f"[{low:+.4f},", f"{high:+.4f}]", verdict]
    run_main(monkeypatch, "--predictions", a, b, "--against", b, a)
    written = json.loads((tmp_path / "a/test_against.json").read_text())
    assert written["a"] == [str(a), str(b)] and written["scores"]["CIDEr"]["difference"] == 0
    assert "note:" not in capsys.readouterr().out


def test_against_takes_peers_predictions_on_either_side(two_runs, tmp_path):
    """References come from the other side, or from the config's data if no side has them."""
    a, b = two_runs
    score_against([a], [b])
    expected = json.loads((tmp_path / "a/test_against.json").read_text())["scores"]
    rows = [list(map(json.loads, path.read_text().splitlines())) for path in (a, b)]
    peers = [tmp_path / f"{name}.json" for name in "xy"]
    for path, side in zip(peers, rows):
        path.write_text(json.dumps({row["id"]: [row["prediction"]] for row in reversed(side)}))
    score_against([a], [peers[1]])
    assert json.loads((tmp_path / "a/test_against.json").read_text())["scores"] == expected
    score_against([peers[0]], [b], a.parent / "config.yaml")
    assert json.loads((tmp_path / "x_against.json").read_text())["scores"] == expected
    score_against([peers[0]], [b])  # no config: no findings
    bare = json.loads((tmp_path / "x_against.json").read_text())["scores"]
    assert bare == {name: row for name, row in expected.items() if name != "findings"}
    score_against([peers[0]], [peers[1]], a.parent / "config.yaml")
    both = json.loads((tmp_path / "x_against.json").read_text())
    assert both["n"] == 12 and both["scores"].keys() == expected.keys()


def test_against_refuses_other_studies_in_one_line(two_runs, tmp_path, monkeypatch, capsys):
    a, b = two_runs
    lines = b.read_text().splitlines()
    b.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"b/test.*jsonl and .*a/test.*jsonl: 1 studies, .* '11'"):
        score_against([a], [b])
    other = json.loads(lines[3]) | {"reference": "another ."}
    b.write_text("\n".join([*lines[:3], json.dumps(other), *lines[4:]]))
    with pytest.raises(ValueError, match="1 studies, such as '3', .* have another reference"):
        score_against([a], [a, b])
    peer = tmp_path / "x.json"
    peer.write_text('{"nobody": "clear ."}')
    with pytest.raises(ValueError, match="13 studies, such as '0'"):
        score_against([a], [peer])
    with pytest.raises(ValueError, match="13 studies"):
        score_against([peer], [peer], a.parent / "config.yaml")
    with pytest.raises(ValueError, match="no file holds references; name the data with --config"):
        score_against([peer], [peer])
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        score_against([a], [tmp_path / "none.jsonl"])
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--predictions", a, b)
    assert "several files only with --against" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no config to change; name one with --config"):
        score_against([peer], [peer], overrides=["data.root=x"])


def test_intervals_hold_the_true_value():
    """The quick form of `coverage.py`, on made reports: 95 % within three standard errors."""
    predictions, references, spec = studies(800, 17)
    of_scores = coverage(predictions, references, spec, sets=100, studies=100)
    of_differences = paired_coverage(predictions, studies(800, 18)[0], references, spec,
                                     sets=100, studies=100)
    for found in (of_scores, of_differences):
        for name, row in found.items():
            assert row["held"] >= 0.885, (name, row)
            assert row["mean"] == pytest.approx(row["true"], abs=row["half"] / 3), name
        assert np.mean([row["held"] for row in found.values()]) < 0.99  # too wide ones hold it, too
