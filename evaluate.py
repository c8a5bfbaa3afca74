"""Generate the reports of a split, score them, and write what was found beside the checkpoint (Sec. 4.1.3, Table 1).

    python evaluate.py --checkpoint runs/iu_xray/best.pt [--split test] [--set section.key=value ...]
    python evaluate.py --predictions runs/iu_xray/test_predictions.jsonl         # score again, no model needed
    python evaluate.py --checkpoint runs/iu_xray/best.pt --images frontal.png lateral.png    # write one report

The scores equal pycocoevalcap's on the same strings. References are cleaned when the data is read; nothing here cleans.
"""
import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from nltk.util import ngrams
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import Config, load_config, parse_config
from data import ReportDataset, Study, build_demo_if_missing, collate, read_image, read_studies
from model import VDGen, load_model, read_checkpoint

METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
PAPER = {  # Table 1, the rows of VDGen; both on the test split
    "iu_xray": dict(zip(METRICS, (0.491, 0.325, 0.230, 0.169, 0.195, 0.362, 0.386))),
    "mimic_cxr": dict(zip(METRICS, (0.418, 0.274, 0.190, 0.136, 0.164, 0.301, 0.162))),
}
METEOR_SECONDS = 600  # looping text of a badly trained model can keep the aligner of METEOR busy for ever
NEGATIONS = {"no", "not", "without", "free"}  # a sentence with one of them names no finding


# The scores -----------------------------------------------------------------------------------------------------------

def score(predictions: dict[str, str], references: dict[str, str], meteor: bool = True) -> dict[str, float]:
    """Corpus BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr-D, one reference a study, each equal to pycocoevalcap's.

    Args:
        predictions, references: {study id: text}, scored as they are, words split at blanks.
        meteor: METEOR takes a Java process and some seconds; its key is missing without, or if Java is not there.
    Returns:
        the keys of METRICS; CIDEr from 0 to 10, the others from 0 to 1.
    Raises:
        ValueError: no study, or not the same ids on both sides.
    """
    if not references or predictions.keys() != references.keys():
        raise ValueError(f"score: got {len(predictions)} predictions for {len(references)} references; expected the "
                         "same ids, at least one")
    pairs = [(predictions[name], references[name]) for name in references]
    scores = dict(zip(METRICS, bleu(pairs)))
    if meteor:
        try:
            scores["METEOR"] = meteor_1_5([pairs])[0]
        except RuntimeError:
            pass  # `measure` says why
    scores["ROUGE_L"] = float(np.mean([rouge_l(*pair) for pair in pairs]))
    scores["CIDEr"] = CiderD([reference for _, reference in pairs])([prediction for prediction, _ in pairs])
    return scores


@lru_cache(maxsize=100_000)
def _ngram_counts(text: str) -> tuple[Counter, ...]:
    """Counts of the 1-, 2-, 3- and 4-grams of a text."""
    words = text.split()
    return tuple(Counter(ngrams(words, n)) for n in range(1, 5))


def bleu(pairs: list[tuple[str, str]]) -> list[float]:
    """Corpus BLEU-1..4 (Papineni et al., 2002) of (prediction, reference) pairs, with coco-caption's 1e-15 and 1e-9."""
    correct, guessed, predicted_words, reference_words = [0] * 4, [0] * 4, 0, 0
    for prediction, reference in pairs:
        length = len(prediction.split())
        predicted_words += length
        reference_words += len(reference.split())
        for n, (ours, theirs) in enumerate(zip(_ngram_counts(prediction), _ngram_counts(reference))):
            guessed[n] += max(0, length - n)
            correct[n] += sum(min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
    precisions = np.cumprod([(c + 1e-15) / (g + 1e-9) for c, g in zip(correct, guessed)])
    ratio = (predicted_words + 1e-15) / (reference_words + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(precision ** (1 / (n + 1)) * brevity) for n, precision in enumerate(precisions)]


def rouge_l(prediction: str, reference: str, beta: float = 1.2) -> float:
    """ROUGE-L (Lin, 2004): F of the longest common subsequence, recall weighing beta^2 times as much as precision."""
    ours, theirs = prediction.split(" "), reference.split(" ")
    places: dict[str, int] = {}
    for i, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << i
    row = everywhere = (1 << len(ours)) - 1  # Hyyrö's bit-parallel recurrence: zeros of `row` count the common words
    for word in theirs:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    common = len(ours) - row.bit_count()
    precision, recall = common / len(ours), common / len(theirs)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if common else 0.0


class CiderD:
    """CIDEr-D (Vedantam et al., 2015): clipped tf-idf cosine of 1- to 4-grams with a Gaussian penalty on length, times
    10. The idf comes from the references given here; sigma is 6 bigrams, as in coco-caption."""

    def __init__(self, references: list[str]):
        frequency = Counter(gram for text in references for counts in _ngram_counts(text) for gram in counts)
        self.log_studies = math.log(len(references))
        self.idf = {gram: self.log_studies - math.log(count) for gram, count in frequency.items()}
        self.references = [self._vector(text) for text in references]

    def _vector(self, text: str):
        """For each n: weights and norm; and the number of bigrams."""
        counts = _ngram_counts(text)
        weights = [{gram: count * self.idf.get(gram, self.log_studies) for gram, count in c.items()} for c in counts]
        return weights, [math.sqrt(sum(w * w for w in vector.values())) for vector in weights], counts[1].total()

    def __call__(self, predictions: list[str]) -> float:
        """Mean over the studies, in the order of the references."""
        vector = lru_cache(maxsize=1000)(self._vector)  # a constant report is one vector
        return float(np.mean([self._similarity(vector(text), reference)
                              for text, reference in zip(predictions, self.references, strict=True)]))

    @staticmethod
    def _similarity(ours, theirs, sigma: float = 6.0) -> float:
        total = 0.0
        for our, their, our_norm, their_norm in zip(ours[0], theirs[0], ours[1], theirs[1]):
            dot = sum(min(w, their[gram]) * their[gram] for gram, w in our.items() if gram in their)
            total += dot / (our_norm * their_norm) if our_norm and their_norm else dot
        return 10 * total / 4 * math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * sigma**2))


def meteor_1_5(corpora: list[list[tuple[str, str]]]) -> list[float]:
    """METEOR 1.5 (Denkowski and Lavie, 2014) of each list of (prediction, reference) pairs, by its own Java program.

    One process for all of them: it loads its tables for seconds. It is ended whatever happens, after METEOR_SECONDS at
    the latest. Raises RuntimeError with the reason if Java or the program (in pycocoevalcap) is not there, or it failed.
    """
    package = find_spec("pycocoevalcap")
    jar = Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar" if package else None
    if shutil.which("java") is None or jar is None or not jar.is_file():
        raise RuntimeError("needs Java and `pip install pycocoevalcap`; at least one of them is not there")
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(command, cwd=jar.parent, text=True, encoding="utf-8", bufsize=1,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    watchdog = threading.Timer(METEOR_SECONDS, process.kill)
    watchdog.start()

    def ask(line: str | None = None) -> str:
        if line is not None:
            process.stdin.write(line + "\n")
        answer = process.stdout.readline().strip()
        if not answer:
            raise BrokenPipeError
        return answer
    try:
        scores = []
        for pairs in corpora:
            texts = [[" ".join(text.replace("|||", "").split()) for text in pair] for pair in pairs]
            stats = [ask(f"SCORE ||| {reference} ||| {prediction}") for prediction, reference in texts]
            answers = [ask("EVAL ||| " + " ||| ".join(stats))] + [ask() for _ in pairs]  # each study, then the corpus
            scores.append(float(answers[-1]))
        return scores
    except (BrokenPipeError, ValueError):
        raise RuntimeError(f"its program stopped after {'the limit of' if not watchdog.is_alive() else 'less than'} "
                           f"{METEOR_SECONDS} seconds (looping text can keep it busy for ever)") from None
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def best_constant(train_reports: list[str]) -> str:
    """The one report that, given for every study, scores highest: what a model must beat to have looked at an image.

    Of the 100 most frequent training reports the one with the highest (BLEU-4 + CIDEr) / 2 on at most 1,000 training
    studies (seed 0).
    """
    sample = random.Random(0).sample(train_reports, min(1000, len(train_reports)))
    cider = CiderD(sample)
    candidates = [text for text, _ in sorted(Counter(train_reports).items(), key=lambda item: (-item[1], item[0]))[:100]]

    def value(text: str) -> float:
        return bleu([(text, reference) for reference in sample])[3] + cider([text] * len(sample))
    return max(tqdm(candidates, desc="best constant", leave=False), key=value)


# Findings, for data that comes with findings.json ---------------------------------------------------------------------

def named_findings(text: str, spec: dict) -> dict[str, tuple[str | None, str | None]]:
    """{finding: (side, extent)} of a text, by the phrases of findings.json; a negated sentence names none."""
    named = {}
    for sentence in text.split("."):
        padded = f" {' '.join(sentence.split())} "
        if NEGATIONS & set(sentence.split()):
            continue

        def first(groups: dict[str, list[str]]) -> str | None:
            return next((name for name, phrases in groups.items() if any(f" {p} " in padded for p in phrases)), None)
        for finding, phrases in spec["phrases"].items():
            if any(f" {phrase} " in padded for phrase in phrases):
                named.setdefault(finding, (first(spec["sides"]), first(spec["extents"])))
    return named


def score_findings(predictions: dict[str, str], spec: dict) -> dict:
    """Precision, recall and F1 of findings, present or not: micro, macro (over findings), and for each finding.

    `side` and `extent` are apart: the share named right, of the findings that are there, were named, and have one.
    """
    counts = {finding: Counter() for finding in spec["phrases"]}
    right = {"side": [], "extent": []}
    for name, text in predictions.items():
        named, true = named_findings(text, spec), {f["finding"]: f for f in spec["studies"][name]}
        for finding, count in counts.items():
            count[finding in named, finding in true] += 1
            if finding in named and finding in true:
                for key, value in zip(("side", "extent"), named[finding]):
                    if true[finding][key] is not None:
                        right[key].append(value == true[finding][key])
    each = {finding: _precision_recall_f1(c[True, True], c[True, False], c[False, True]) for finding, c in counts.items()}
    micro = _precision_recall_f1(*(sum(c[key] for c in counts.values())
                                   for key in ((True, True), (True, False), (False, True))))
    found = {f"micro_{key}": micro[key] for key in ("precision", "recall", "f1")}
    found |= {f"macro_{key}": float(np.mean([e[key] for e in each.values()])) for key in ("precision", "recall", "f1")}
    found |= {key: float(np.mean(values)) if values else None for key, values in right.items()}
    return found | {"each": each}


def _precision_recall_f1(both: int, only_named: int, only_true: int) -> dict:
    return {"precision": both / max(both + only_named, 1), "recall": both / max(both + only_true, 1),
            "f1": 2 * both / max(2 * both + only_named + only_true, 1), "studies": both + only_true}


# An evaluation --------------------------------------------------------------------------------------------------------

def write_reports(model: VDGen, studies: list[Study]) -> dict[str, str]:
    """Eq. 7 for every study: {id: report}, with a progress bar."""
    data, train = model.config.data, model.config.train
    dataset = ReportDataset(studies, data.root, model.image_size, model.tokenizer, data.max_report_tokens)
    loader = DataLoader(dataset, train.eval_batch_size, num_workers=data.num_workers, collate_fn=collate,
                        generator=torch.Generator())  # its own: a validation must not change the state of training
    was_training, reports = model.training, {}
    model.eval()
    for batch in tqdm(loader, desc="generate", unit="batch", leave=False):
        reports |= zip(batch["ids"], model.generate(batch["images"].to(model.device), batch["view_counts"]))
    model.train(was_training)
    return reports


def measure(rows: list[dict], config: Config, split: str, train_reports: list[str]) -> dict:
    """All scores of an evaluation, in the layout of `<split>_metrics.json`.

    Args:
        rows: one dict a study with id, prediction, reference and, if known, reference_cut (see `evaluate`).
        train_reports: cleaned; empty if the data is not at hand: there is no constant report then.
    """
    notes: list[str] = []
    predictions = {row["id"]: row["prediction"] for row in rows}
    references = {row["id"]: row["reference"] for row in rows}
    constant = dict.fromkeys(predictions, best_constant(train_reports)) if train_reports else None
    cut = {row["id"]: row["reference_cut"] for row in rows if row.get("reference_cut") is not None}

    scored = []  # every table of scores, and the pairs that it is of

    def table(texts: dict[str, str], against: dict[str, str]) -> dict:
        scores = {"n": len(texts), "distinct": len(set(texts.values())), **score(texts, against, meteor=False)}
        scored.append((scores, [(texts[name], against[name]) for name in against]))
        return scores

    def both(texts: dict[str, str]) -> dict:
        scores = table(texts, references)
        if cut:
            scores["cut_references"] = table(texts, cut)
        return scores
    metrics = both(predictions)
    metrics["mean_words"] = {"predictions": float(np.mean([len(text.split()) for text in predictions.values()])),
                             "references": float(np.mean([len(text.split()) for text in references.values()]))}
    metrics["constant"] = both(constant) if constant else None
    if constant:
        metrics["constant"]["text"] = next(iter(constant.values()))
    try:
        for (scores, _), value in zip(scored, meteor_1_5([pairs for _, pairs in scored])):
            scores["METEOR"] = value
    except RuntimeError as reason:
        notes.append(f"METEOR: {reason}")
    metrics["paper"] = PAPER.get(config.data.dataset)
    if metrics["paper"] and split != "test":
        notes.append(f"paper: its row is of the test split, these scores are of {split}")
    if constant is None:
        notes.append(f"constant: needs the training reports; there is no annotation in {config.data.root}")
    if not cut:
        notes.append("cut_references: need the tokenizer of the LLM; the predictions hold none")
    findings = Path(config.data.root) / "findings.json"
    if findings.is_file():
        spec = json.loads(findings.read_text(encoding="utf-8"))
        metrics["findings"] = score_findings(predictions, spec)
        if constant:
            metrics["constant"]["findings"] = score_findings(constant, spec)
    metrics["notes"] = notes
    return metrics


def print_metrics(metrics: dict, split: str) -> None:
    """The table: model, best constant report and paper side by side, under both protocols (A16)."""
    n, distinct, words = metrics["n"], metrics["distinct"], metrics["mean_words"]
    print(f"\n{split}: {n} studies, {distinct} different reports ({distinct / n:.0%}), "
          f"{words['predictions']:.1f} words a report (references {words['references']:.1f})")
    rows = [("model", metrics), ("best constant report", metrics["constant"]), ("paper, VDGen", metrics["paper"])]
    rows += [(f"{name}, cut references", row["cut_references"])
             for name, row in rows[:2] if row and "cut_references" in row]
    print(f"{'':<38}" + "".join(f"{key:>9}" for key in METRICS))
    for name, row in rows:
        print(f"{name:<38}" + "".join(f"{row[key]:9.3f}" if row and key in row else f"{'-':>9}" for key in METRICS))
    if "findings" in metrics:
        found, constant = metrics["findings"], (metrics["constant"] or {}).get("findings")
        print(f"\n{'findings':<38}{'precision':>9}{'recall':>9}{'F1':>9}{'studies':>9}")
        for name, row in found["each"].items():
            print(f"{name:<38}{row['precision']:9.3f}{row['recall']:9.3f}{row['f1']:9.3f}{row['studies']:9d}")
        for name, part in (("", found), (", best constant report", constant)):
            for mean in ("micro", "macro") if part else ():
                print(f"{mean + name:<38}" + "".join(f"{part[f'{mean}_{key}']:9.3f}" for key in ("precision", "recall", "f1")))
        print("of the findings named rightly: " + ", ".join(
            f"{key} right {'-' if found[key] is None else format(found[key], '.3f')}" for key in ("side", "extent")))
    for note in metrics["notes"]:
        print("note:", note)


def evaluate(model: VDGen, split: str, splits: dict[str, list[Study]], folder: Path,
             reports: dict[str, str] | None = None) -> dict:
    """Generate (unless the model's reports are given) and score one split; write its files into `folder`."""
    if not splits[split]:
        raise ValueError(f"--split {split}: the annotation has no such studies; there are "
                         f"{', '.join(name for name, studies in splits.items() if studies)}")
    reports = reports or write_reports(model, splits[split])
    limit, tokenizer = model.config.data.reference_cut_tokens, model.tokenizer
    rows = []
    for study in splits[split]:
        ids = tokenizer(study.report, add_special_tokens=False).input_ids[:limit]
        rows.append({"id": study.id, "prediction": reports[study.id], "reference": study.report,
                     "reference_cut": tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip(),
                     "image_path": list(study.image_paths)})
    (folder / f"{split}_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_metrics(rows, model.config, split, [study.report for study in splits["train"]], folder)


def write_metrics(rows: list[dict], config: Config, split: str, train_reports: list[str], folder: Path) -> dict:
    metrics = measure(rows, config, split, train_reports)
    (folder / f"{split}_metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print_metrics(metrics, split)
    return metrics


def score_again(path: Path, config_path: Path | None) -> None:
    """Score a predictions file of ours; the config comes from the run that it lies in, or from `--config`."""
    config = load_config(config_path or path.parent / "config.yaml")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        known = all({"id", "prediction", "reference"} <= row.keys() for row in rows) and bool(rows)
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise ValueError(f"{path}: expected one JSON object a line, with id, prediction and reference")
    annotation = Path(config.data.root) / "annotation.json"
    train_reports = [study.report for study in read_studies(config.data)["train"]] if annotation.is_file() else []
    write_metrics(rows, config, path.stem.removesuffix("_predictions"), train_reports, path.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    source.add_argument("--predictions", type=Path, help="<split>_predictions.jsonl of a run")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test if there is one, else val")
    parser.add_argument("--images", nargs="+", type=Path, help="the views of one study: print its report")
    parser.add_argument("--config", type=Path, help="with --predictions: default is config.yaml beside the file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="with --checkpoint: override its config")
    args = parser.parse_args()
    if args.predictions:
        if not args.predictions.is_file():
            raise FileNotFoundError(f"--predictions {args.predictions}: no such file")
        return score_again(args.predictions, args.config)
    checkpoint = read_checkpoint(args.checkpoint)
    config = parse_config(checkpoint["config"], args.set, str(args.checkpoint))
    build_demo_if_missing(config.data)
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.load_trained_state(checkpoint["model"])
    if args.images:
        views = torch.stack([read_image(path, model.image_size) for path in args.images]).to(model.device)
        return print(*model.generate(views, [len(views)]))
    splits = read_studies(config.data)
    evaluate(model, args.split or ("test" if splits["test"] else "val"), splits, args.checkpoint.parent)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
