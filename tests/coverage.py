"""How often the 95 % intervals of evaluate.py hold the true value: a simulation.

    python tests/coverage.py --data data/iu_xray [--sets 300] [--studies 590]

The population is every report of train and val, each the reference of one study. Its prediction is
the report, of 50 others drawn at random (seed 0), that shares most of its words: near enough to
score as a model does, and often wrong. Sets of studies are drawn from it with replacement; each
gives one interval a score, and one of its difference to a second model, whose report is of 20
others. F1 needs findings.json in the data. Last, seeds are made up for both models: each moves all
ROUGE-L values of a file by one number, as widely spread as chance in the studies makes the
difference.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import Data  # noqa: E402
from data import read_studies  # noqa: E402
from evaluate import CiderD, compare, interval, resamples, scores_of, study_statistics  # noqa: E402

OWN_IDF = "CIDEr, idf of the set"


def retrieved(references: dict[str, str], candidates: int = 50) -> dict[str, str]:
    """{id: the report, of a few other studies drawn at random, that shares most of its words}."""
    rng, found = random.Random(0), {}
    words = {name: set(text.split()) for name, text in references.items()}

    def likeness(name: str, other: str) -> float:
        return len(words[name] & words[other]) / len(words[name] | words[other])
    for name in references:
        others = rng.sample(sorted(references.keys() - {name}), candidates)
        found[name] = references[max(others, key=lambda other: likeness(name, other))]
    return found


def coverage(predictions: dict[str, str], references: dict[str, str], spec: dict | None,
             sets: int, studies: int) -> dict[str, dict[str, float]]:
    """{score: its true value, mean over the sets, half an interval, share of sets that hold it}.

    CIDEr of a set is computed twice: with the idf of the population, so that it is a mean of values
    that are the same in every set; and, as an evaluation does, with the idf of the set (OWN_IDF).
    The latter depends on the number of references: its true value is its mean over the sets.
    """
    population, names = study_statistics(predictions, references, spec), list(references)
    draws, points, ends = resamples(studies), [], []
    for drawn in drawn_sets(len(names), sets, studies):
        statistics = {part: rows[:, drawn] for part, rows in population.items()}
        chosen = [names[i] for i in drawn]
        own = CiderD([references[name] for name in chosen])
        cider = np.array(own.each([predictions[name] for name in chosen]))
        points.append(scores_of(statistics) | {OWN_IDF: cider.mean()})
        resampled = scores_of(statistics, draws) | {OWN_IDF: cider @ draws / studies}
        ends.append({name: interval(values) for name, values in resampled.items()})
    true = {OWN_IDF: np.mean([point[OWN_IDF] for point in points])} | scores_of(population)
    return held(true, points, ends)


def paired_coverage(ours: dict[str, str], theirs: dict[str, str], references: dict[str, str],
                    spec: dict | None, sets: int, studies: int) -> dict[str, dict[str, float]]:
    """The same of the differences of two predictions; CIDEr's idf is that of the population."""
    population = [study_statistics(texts, references, spec) for texts in (ours, theirs)]
    a, b = map(scores_of, population)
    found = []
    for drawn in drawn_sets(len(references), sets, studies):
        sides = [[{part: rows[:, drawn] for part, rows in side.items()}] for side in population]
        found.append(compare(*sides))
    points, ends = ([{name: row[key] for name, row in scores.items()} for scores in found]
                    for key in ("difference", "interval"))
    return held({name: a[name] - b[name] for name in a}, points, ends)


def seeds_coverage(ours: dict[str, str], theirs: dict[str, str], references: dict[str, str],
                   spread: float, files: int, sets: int, studies: int) -> dict[str, float]:
    """The same of ROUGE-L's difference with some files a side, whose seeds deviate by `spread`."""
    population = [study_statistics(texts, references)["text"] for texts in (ours, theirs)]
    rng, found = np.random.default_rng(2), []
    for drawn in drawn_sets(len(references), sets, studies):
        sides = []
        for rows in population:
            seeds = np.zeros((files, 12, 1))
            seeds[:, 10, 0] = rng.normal(0, spread, files)
            sides.append([{"text": rows[:, drawn] + seed} for seed in seeds])
        found.append({"ROUGE_L": compare(*sides)["ROUGE_L"]})
    points, ends = ([{"ROUGE_L": row["ROUGE_L"][key]} for row in found]
                    for key in ("difference", "interval"))
    true = {"ROUGE_L": (population[0][10] - population[1][10]).mean()}
    return held(true, points, ends)["ROUGE_L"]


def drawn_sets(population: int, sets: int, studies: int):
    """(N,) places of the studies of each set, drawn with replacement (seed 1)."""
    rng = np.random.default_rng(1)
    return (rng.integers(population, size=studies) for _ in range(sets))


def held(true: dict, points: list[dict], ends: list[dict]) -> dict[str, dict[str, float]]:
    """A row of the table for each score, see `coverage`."""
    rows = {}
    for name, value in true.items():
        low, high = np.array([found[name] for found in ends]).T
        row = {"true": value, "mean": np.mean([point[name] for point in points]),
               "half": (high - low).mean() / 2, "held": np.mean((low <= value) & (value <= high))}
        rows[name] = {key: float(number) for key, number in row.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/iu_xray", help="default: %(default)s")
    parser.add_argument("--sets", type=int, default=300)
    parser.add_argument("--studies", type=int, default=590)
    options = parser.parse_args()
    splits = read_studies(Data(root=options.data))
    references = {study.id: study.report for study in splits["train"] + splits["val"]}
    path = Path(options.data) / "findings.json"
    spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    ours, theirs = retrieved(references), retrieved(references, 20)
    size = {"sets": options.sets, "studies": options.studies}
    print(f"{len(references)} studies; {options.sets} sets of {options.studies}")
    scores = coverage(ours, references, spec, **size)
    differences = paired_coverage(ours, theirs, references, spec, **size)
    spread = differences["ROUGE_L"]["half"] / 1.96
    seeds = {}
    for files in (1, 2, 3, 5):
        found = seeds_coverage(ours, theirs, references, spread, files, **size)
        seeds[f"ROUGE_L, {files} a side"] = found
    for title, found in (("a score", scores), ("a difference", differences), ("of seeds", seeds)):
        print(f"{title:<24}{'true':>10}{'mean of sets':>14}{'half width':>12}{'held':>8}")
        for name, row in found.items():
            print(f"{name:<24}{row['true']:>10.4f}{row['mean']:>14.4f}{row['half']:>12.4f}"
                  f"{row['held']:>8.1%}")


if __name__ == "__main__":
    main()
