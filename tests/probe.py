"""Seen and said: what h knows of the findings of a split, beside what the reports say of them.

    python tests/probe.py --checkpoint runs/iu_xray_small/best.pt [--split val] [--set ...]
    python tests/probe.py --config configs/iu_xray_small.yaml [--set ...]    # before any training

One logistic regression a finding, from h (the mean visual token of a study) to findings.json, is
fitted on train. What the reports say stands in `<split>_predictions.jsonl` beside the checkpoint.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import load_config, parse_config  # noqa: E402
from data import ReportDataset, Study, collate, end_in_one_line, read_studies  # noqa: E402
from evaluate import (best_constant, precision_recall_f1, read_findings,  # noqa: E402
                      score_findings)
from model import VDGen, load_model, read_checkpoint  # noqa: E402

L2 = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of which cross-validation on train chooses
FOLDS = 3


@torch.no_grad()
def encode(model: VDGen, studies: list[Study]) -> Tensor:
    """h of each study: (N, D) float32 on the CPU."""
    data, train = model.config.data, model.config.train
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    loader = DataLoader(dataset, train.eval_batch_size, collate_fn=collate,
                        num_workers=data.num_workers)
    rows = []
    for batch in tqdm(loader, desc="encode", unit="batch", leave=False):
        with model.autocast():
            tokens = model.encode(batch["images"].to(model.device), batch["view_counts"])
        rows.append(tokens.mean(dim=1).cpu())
    return torch.cat(rows)


def fit(h: Tensor, true: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Logistic regression of L findings at once: weights (D, L) and biases (L,).

    Args: h (N, D) and true (N, L), of one floating type. At the minimum of the mean over the
    studies of each finding's cross-entropy, plus l2 / 2 times its squared weights (no bias).
    """
    weight = torch.zeros(h.shape[1], true.shape[1], dtype=h.dtype, requires_grad=True)
    bias = torch.zeros(true.shape[1], dtype=h.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-5,
                                  line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(h @ weight + bias, true, reduction="none")
        loss = entropy.mean(dim=0).sum() + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return weight.detach(), bias.detach()


def auc(scores: Tensor, true: Tensor) -> float:
    """The share of pairs, one study with the finding and one without, that the scores (N,) order
    rightly; a tie counts half. nan without such a pair."""
    present, absent = scores[true.bool(), None], scores[~true.bool()]
    return ((present > absent).double() + (present == absent).double() / 2).mean().item()


def predict(train_h: Tensor, train_true: Tensor, h: Tensor, l2: float) -> Tensor:
    """Scores (n, L) of h (n, D), by a regression on train; h standardised over train."""
    mean, deviation = train_h.mean(dim=0), train_h.std(dim=0).clamp(min=1e-6)
    weight, bias = fit((train_h - mean) / deviation, train_true, l2)
    return (h - mean) / deviation @ weight + bias


def choose_l2(h: Tensor, true: Tensor) -> float:
    """Of L2 the one with the highest mean AUC over FOLDS folds of train (seed 0)."""
    folds = torch.randperm(len(h), generator=torch.Generator().manual_seed(0)) % FOLDS

    def held_out(l2: float) -> float:
        scores = torch.zeros_like(true)
        for fold in range(FOLDS):
            inside = folds != fold
            scores[~inside] = predict(h[inside], true[inside], h[~inside], l2)
        values = [auc(scores[folds == fold, i], true[folds == fold, i])
                  for fold in range(FOLDS) for i in range(true.shape[1])]
        return float(np.nanmean(values))
    return max(tqdm(L2, desc="l2", leave=False), key=held_out)


def most_likely(scores: Tensor, share: Tensor) -> Tensor:
    """(N, L) bool: each finding in that share (L,) of the studies in which it scores highest."""
    order = scores.argsort(dim=0, descending=True).argsort(dim=0)
    return order < (share * len(scores)).round()


def matrix(studies: list[Study], spec: dict) -> Tensor:
    """(N, L) float32: 1 where a study has a finding."""
    present = [{row["finding"] for row in spec["studies"][study.id]} for study in studies]
    return torch.tensor([[float(name in row) for name in spec["phrases"]] for row in present])


def read_predictions(checkpoint: Path | None, split: str) -> dict[str, str] | None:
    """{id: report} that an evaluation has left beside the checkpoint."""
    path = checkpoint and checkpoint.with_name(f"{split}_predictions.jsonl")
    if not path or not path.is_file():
        return None
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["prediction"] for row in rows}


def print_table(columns: dict[str, dict[str, float]], counts: dict[str, int]) -> None:
    """A line a finding, then the means of the columns over the findings (nan left out)."""
    def line(title: str, studies: str, values) -> None:
        print(f"{title:<30}{studies:>8}" + "".join(
            f"{value:>14}" if isinstance(value, str) else f"{value:>14.3f}" for value in values))
    line("", "studies", columns)
    for finding, count in counts.items():
        line(finding, str(count), [column[finding] for column in columns.values()])
    line("macro", "", [float(np.nanmean([*column.values()])) for column in columns.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    source.add_argument("--config", type=Path, help="a file of configs/: the pretrained encoder")
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override the config")
    args = parser.parse_args()
    if args.checkpoint:
        checkpoint = read_checkpoint(args.checkpoint)
        config = parse_config(checkpoint["config"], args.set, str(args.checkpoint))
    else:
        config = load_config(args.config, args.set)
    splits = read_studies(config.data)
    train, studies = splits["train"], splits[args.split]
    spec = read_findings(config, [study.id for study in train + studies])
    if spec is None:
        raise ValueError(f"data.root: there is no findings.json in {config.data.root}; "
                         "`python data.py iu_xray` adds it")
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if args.checkpoint:
        model.load_trained_state(checkpoint["model"])
    train_h, h = encode(model, train), encode(model, studies)

    names, train_true, true = list(spec["phrases"]), matrix(train, spec), matrix(studies, spec)
    l2, share = choose_l2(train_h, train_true), train_true.mean(dim=0)
    scores = predict(train_h, train_true, h, l2)
    named = most_likely(scores, share)
    known = precision_recall_f1(named.numpy(), true.bool().numpy(), names)["each"]
    columns = {"AUC of h": {name: auc(scores[:, i], true[:, i]) for i, name in enumerate(names)},
               "F1 of h": {name: row["f1"] for name, row in known.items()}}
    best = best_constant([study.report for study in train])
    constant = {study.id: best for study in studies}
    for title, texts in (("F1 of text", read_predictions(args.checkpoint, args.split)),
                         ("F1 of constant", constant)):
        if texts:
            said = score_findings(texts, spec)["each"]
            columns[title] = {name: row["f1"] for name, row in said.items()}
    columns["F1 of chance"] = dict(zip(names, share.tolist()))
    print(f"{args.checkpoint or args.config}, {args.split}: {len(studies)} studies, h fitted on "
          f"{len(train)} with l2 {l2}")
    print_table(columns, {name: row["studies"] for name, row in known.items()})


if __name__ == "__main__":
    end_in_one_line(main)
