"""Intervals and paired comparisons: against plain loops, and what must hold exactly."""
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from test_evaluate import (SPEC, classes, config_for, plain_f1, read_json, reports, rows_of,
                           run_main)

import evaluate
from configs.chexbert import CONDITIONS, LABELS, READINGS
from configs.findings import named_findings
from evaluate import (MEANS, CiderD, compare, file_weights, interval, intervals, mean_scores,
                      measure, resamples, rouge_l, score, score_names, scores_of, study_statistics)

FINDINGS = ["a small left pleural effusion .", "no effusions .", "a nodule .", "rib fracture ."]


def studies(n, seed):
    """Predictions and references of n studies, and what is in them."""
    rng = random.Random(seed)
    predictions, references = reports(n, seed), reports(n, seed + 1000)
    for texts in (predictions, references):
        for name in texts:
            texts[name] += " " + rng.choice(FINDINGS)
    held = {name: [{"finding": found, "side": None, "extent": None}
                   for found in named_findings(text, SPEC)] for name, text in references.items()}
    return predictions, references, SPEC | {"studies": held}


def label(texts):
    """A made labeller: three conditions by words, one of them uncertain."""
    return [classes(Edema="nodule" in text, Fracture=3 * ("fracture" in text),
                    No_Finding="no" in text.split()) for text in texts]


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
    of_texts = [np.array(label([texts[name] for name in chosen])) for texts in both]
    for reading, positive in READINGS.items():
        named = [np.isin(part, positive) for part in of_texts]
        for size, labels in LABELS.items():
            columns = [CONDITIONS.index(name) for name in labels]
            parts[f"clinical.{reading}.{size}"] = [part[:, columns].tolist() for part in named]
    for part, (ours, theirs) in parts.items():
        f1 = [plain_f1(*column)[2] for column in zip(zip(*ours), zip(*theirs))]
        studies = [sum(column) for column in zip(*theirs)]
        weighted = sum(value * n for value, n in zip(f1, studies)) / max(sum(studies), 1)
        example = sum(plain_f1(*rows)[2] for rows in zip(ours, theirs)) / len(ours)
        values = (plain_f1(sum(ours, []), sum(theirs, []))[2], sum(f1) / len(f1), weighted, example)
        scores |= {f"{part}.{mean}_f1": value for mean, value in zip(MEANS, values)}
    return scores


def chosen_of(draws, references):
    return [name for name, times in zip(references, draws) for _ in range(int(times))]


def test_resampled_scores_equal_a_plain_loop():
    """Each score of each resample, from the texts of the studies that are in it."""
    predictions, references, spec = studies(20, 0)
    draws = resamples(20)
    assert draws.shape == (20, 1000) and (draws.sum(axis=0) == 20).all()
    assert len({tuple(column) for column in draws.T}) == len(draws.T)
    found = scores_of(study_statistics(predictions, references, spec, label), draws)
    for r in range(30):
        chosen = chosen_of(draws[:, r], references)
        expected = plain_scores(predictions, references, spec, chosen)
        assert {name: values[r] for name, values in found.items()} == pytest.approx(expected)


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
    rows, train = rows_of(predictions, references), list(references.values())
    metrics = measure(rows, config_for(tmp_path), "test", train, spec, label)
    found = metrics["intervals"]
    assert found == intervals(study_statistics(predictions, references, spec, label))
    assert found.keys() == {*score_names(), "findings", "clinical"} - {"METEOR"}
    for key in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr"):
        low, high = found[key]
        assert low < metrics[key] < high
    evaluate.print_metrics(metrics, "test")
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.strip().startswith("95 % interval from"))
    lows = [f"{found[name][0]:.3f}" if name in found else "-" for name in score_names()]
    assert row.split()[-len(lows):] == lows


def test_compare_takes_the_difference_on_the_same_resamples():
    (ours, references, spec), theirs = studies(20, 4), studies(20, 5)[0]
    a, b = (study_statistics(texts, references, spec, label) for texts in (ours, theirs))
    x, y, draws = scores_of(a), scores_of(b), resamples(20)
    a_drawn, b_drawn = scores_of(a, draws), scores_of(b, draws)
    found = compare([a], [b])
    assert found.keys() == a_drawn.keys()
    for name, row in found.items():
        low, high = interval(a_drawn[name] - b_drawn[name])
        assert row == {"a": x[name], "b": y[name], "difference": x[name] - y[name],
                       "interval": [low, high], "excludes_0": low > 0 or high < 0}


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
    flat = [{"text": np.full_like(file["text"], value)} for value in values]
    for seed in (1, 2):
        drawn = mean_scores(flat, file_weights(4, seed), resamples(30))["ROUGE_L"]
        assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
        assert drawn.std() == pytest.approx(values.std(ddof=1) / 2, rel=0.05)


def test_intervals_hold_the_true_value():
    """In 95 % of 60 sets of studies of a population, within three standard errors."""
    predictions, references, spec = studies(800, 17)
    sides = [study_statistics(texts, references, spec)
             for texts in (predictions, studies(800, 18)[0])]
    a, b = map(scores_of, sides)
    rng, draws, held = np.random.default_rng(1), resamples(100), Counter()
    for _ in range(60):
        drawn = rng.integers(800, size=100)
        ours, theirs = ({part: rows[:, drawn] for part, rows in side.items()} for side in sides)
        ends = {name: (a[name], interval(values))
                for name, values in scores_of(ours, draws).items()}
        ends |= {name + " of both": (a[name] - b[name], row["interval"])
                 for name, row in compare([ours], [theirs]).items()}
        held.update(name for name, (true, (low, high)) in ends.items() if low <= true <= high)
    assert len(held) == len(ends) and min(held.values()) >= 52, held
    assert np.mean(list(held.values())) < 59.4  # too wide ones hold it, too


# The command line ---------------------------------------------------------------------------------

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
    test = [{"id": name, "report": text, "image_path": ["a.png"]}
            for name, text in references.items()]
    (root / "annotation.json").write_text(json.dumps({"test": test}))
    a = write_run(tmp_path / "a", ours, references)
    b = write_run(tmp_path / "b", studies(12, 16)[0], references)
    settings = f"model: {{vision: a, llm: b}}\ndata: {{root: {root}, dataset: iu_xray}}\n"
    (a.parent / "config.yaml").write_text(settings)
    return a, b


def against(monkeypatch, ours, theirs, *more):
    """What the comparison writes."""
    run_main(monkeypatch, "--predictions", *ours, "--against", *theirs, *more)
    name = ours[0].stem.removesuffix("_predictions")
    return read_json(ours[0].with_name(f"{name}_against.json"))


def test_against_prints_and_writes_the_comparison(two_runs, monkeypatch, capsys):
    a, b = two_runs
    written = against(monkeypatch, [a], [b])
    printed = capsys.readouterr().out
    assert "note: of a side of one file" in printed
    assert written["a"] == [str(a)] and written["b"] == [str(b)] and written["n"] == 12
    row, findings = written["scores"]["BLEU_4"], written["scores"]["findings"]["macro_f1"]
    ours, references, spec = studies(12, 15)
    sides = [[study_statistics(texts, references, spec)] for texts in (ours, studies(12, 16)[0])]
    expected = compare(*sides)
    assert row == expected["BLEU_4"] and findings == expected["findings.macro_f1"]
    assert row["a"] == score(ours, references)["BLEU_4"]
    line = next(line for line in printed.splitlines() if line.startswith("BLEU_4"))
    assert line.split()[3] == f"{row['difference']:+.4f}"
    written = against(monkeypatch, [a, b], [b, a])
    assert written["a"] == [str(a), str(b)] and written["scores"]["CIDEr"]["difference"] == 0
    assert "note:" not in capsys.readouterr().out


def test_against_takes_peers_predictions_on_either_side(two_runs, tmp_path, monkeypatch):
    """References come from the other side, or from the config's data if no side has them."""
    a, b = two_runs
    config = ["--config", a.with_name("config.yaml")]
    expected = against(monkeypatch, [a], [b])["scores"]
    peers = [tmp_path / f"{name}.json" for name in "xy"]
    for path, side in zip(peers, (a, b)):
        rows = reversed([json.loads(line) for line in side.read_text().splitlines()])
        path.write_text(json.dumps({row["id"]: [row["prediction"]] for row in rows}))
    assert against(monkeypatch, [a], peers[1:])["scores"] == expected
    assert against(monkeypatch, peers[:1], [b], *config)["scores"] == expected
    bare = against(monkeypatch, peers[:1], [b])["scores"]  # no config: no findings
    assert bare == {name: row for name, row in expected.items() if name != "findings"}
    both = against(monkeypatch, peers[:1], peers[1:], *config)
    assert both["n"] == 12 and both["scores"].keys() == expected.keys()


def test_against_refuses_other_studies(two_runs, tmp_path, monkeypatch):
    a, b = two_runs
    lines = b.read_text().splitlines()
    b.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"b/test.*jsonl and .*a/test.*jsonl: 1 studies, .* '11'"):
        against(monkeypatch, [a], [b])
    other = json.loads(lines[3]) | {"reference": "another ."}
    b.write_text("\n".join([*lines[:3], json.dumps(other), *lines[4:]]))
    with pytest.raises(ValueError, match="1 studies, such as '3', .* another reference"):
        against(monkeypatch, [a], [a, b])
    peer = tmp_path / "x.json"
    peer.write_text('{"nobody": "clear ."}')
    with pytest.raises(ValueError, match="13 studies"):
        against(monkeypatch, [a], [peer])
    with pytest.raises(ValueError, match="--config"):
        against(monkeypatch, [peer], [peer])
    with pytest.raises(FileNotFoundError, match="--config"):
        against(monkeypatch, [peer], [peer], "--set", "data.root=x")
