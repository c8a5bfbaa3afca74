"""Seen and said: what h knows of the findings of a split, beside what the reports say of them.

    python tests/probe.py --checkpoint runs/iu_xray_small/best.pt [--split val] [--set ...]
    python tests/probe.py --config configs/iu_xray_small.yaml [--set ...]    # before any training

One logistic regression a finding, from h (the mean visual token of a study) to findings.json, is
fitted on train: "F1 of h" names a finding as often as train does, "F1 at P > 1/2" where h makes it
likelier than not (a weaker penalty is surer of itself, and names more). What the reports say stands
in `<split>_predictions.jsonl` beside the checkpoint.
Between the two stands the LLM: is a sentence that names a finding likelier where the finding is?
Behind the table: the report loss with the visual tokens of the study and with another study's; the
DID loss, and the share of images whose own report is the nearest of 16 (did_top1).
"""
import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import load_config, parse_config  # noqa: E402
from configs.findings import named_findings  # noqa: E402
from data import (ReportDataset, Study, collate, end_in_one_line,  # noqa: E402
                  epoch_batches, read_studies)
from evaluate import (best_constant, precision_recall_f1, read_findings,  # noqa: E402
                      read_rows, results_name, score_findings)
from losses import did_loss, own_report_nearest  # noqa: E402
from model import VDGen, embed_reports, load_model, read_checkpoint  # noqa: E402
from train import teacher_embeddings  # noqa: E402

L2 = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of which cross-validation on train chooses
FOLDS = 3
FEW = 10  # studies: the AUC of fewer is mostly chance
SENTENCES = 3  # of each finding, the commonest of train: what the LLM is asked for
BATCH, SHUFFLES = 16, 20  # of DID: Sec. 4.1.2; every study is in as many batches, with other ones


@torch.no_grad()
def visual_batches(model: VDGen, studies: list[Study], desc: str) -> Iterator[tuple[dict, Tensor]]:
    """Batches of `collate`, whose studies stand in an order of its own, and their X^e (B, S, D)."""
    data, train = model.config.data, model.config.train
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    loader = DataLoader(dataset, train.eval_batch_size, collate_fn=collate,
                        num_workers=data.num_workers)
    for batch in tqdm(loader, desc=desc, unit="batch", leave=False):
        with model.autocast():
            visual_tokens = model.encode(batch["images"].to(model.device), batch["view_counts"])
        yield batch, visual_tokens


def encode(model: VDGen, studies: list[Study]) -> Tensor:
    """h of each study, in their order: (N, D) float32 on the CPU."""
    rows = {}
    for batch, visual_tokens in visual_batches(model, studies, "encode"):
        rows |= zip(batch["ids"], visual_tokens.mean(dim=1).cpu())
    return torch.stack([rows[study.id] for study in studies])


def common_sentences(reports: Iterable[str], spec: dict) -> dict[str | None, list[str]]:
    """For each finding the commonest sentences that name it and no other; None: those of none."""
    counts = Counter(f"{sentence.strip()} ." for report in reports
                     for sentence in report.split(" .") if sentence.strip())
    found = {name: [] for name in (None, *spec["phrases"])}
    for sentence, _ in counts.most_common():
        named = list(named_findings(sentence, spec)) or [None]
        if len(named) == 1 and len(found[named[0]]) < SENTENCES:
            found[named[0]].append(sentence)
    return found


def begin_with(model: VDGen, visual_tokens: Tensor, sentences: list[list[int]]) -> Tensor:
    """log p of each of K sentences of token ids at the start of the report: (B, K), in nats.

    All of them stand in one row behind the prompt; a mask shows each the prompt and itself.
    """
    llm, device = model.causal_lm, model.device
    prompt = model.embed_prompt(visual_tokens)
    lengths = torch.tensor([len(ids) for ids in sentences], device=device)
    ids = torch.tensor([i for sentence in sentences for i in sentence], device=device)
    owner = torch.arange(len(sentences), device=device).repeat_interleave(lengths)
    place = torch.cat([torch.arange(n, device=device) for n in lengths.tolist()])
    P, T = prompt.shape[1], prompt.shape[1] + len(ids)
    sees = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    sees[P:, P:] &= owner[:, None] == owner
    mask = torch.zeros(1, 1, T, T, dtype=llm.dtype, device=device).masked_fill(~sees, -torch.inf)
    positions = torch.cat([torch.arange(P, device=device), P + place])[None]
    before = P - 1 + torch.arange(len(ids), device=device)  # the token that predicts each
    before[place == 0] = P - 1
    rows = []
    for row in prompt:  # the logits of one study are K sentences times the vocabulary
        inputs = torch.cat([row, llm.get_input_embeddings()(ids)])[None]
        hidden = llm.model(None, mask, positions, None, inputs).last_hidden_state[0, before]
        logits = llm.get_output_embeddings()(hidden).float()
        log_p = -F.cross_entropy(logits, ids, reduction="none")
        rows.append(log_p.new_zeros(len(sentences)).index_add(0, owner, log_p))
    return torch.stack(rows)


@torch.no_grad()
def ask_llm(model: VDGen, studies: list[Study],
            sentences: dict[str | None, list[str]]) -> tuple[Tensor, float, float]:
    """What the LLM makes of X^e, whatever a beam search then writes.

    Args: sentences: of `common_sentences`, with L findings.
    Returns:
        (N, L) log of how much likelier a report begins by a sentence that names the finding than by
            one that names none; nan where there is no such sentence.
        the report loss (Eq. 2, A10) with each study's own visual tokens, and with those of another
            study of its batch.
    """
    groups = [model.tokenizer(group, add_special_tokens=False).input_ids if group else []
              for group in sentences.values()]
    rows, losses, count = {}, [0.0, 0.0], 0
    for batch, visual_tokens in visual_batches(model, studies, "ask the LLM"):
        report_ids, lengths = batch["report_ids"].to(model.device), batch["report_lengths"]
        others = visual_tokens.roll(len(visual_tokens) // 2, dims=0)
        pair = (visual_tokens, others) if len(lengths) > 1 else ()  # alone it has no other study
        with model.autocast():
            said = begin_with(model, visual_tokens, sum(groups, [])).cpu()
            for i, tokens in enumerate(pair):
                loss = model.report_term(tokens, report_ids, lengths)
                losses[i] += loss.item() * sum(lengths)
        none, *named = (part.logsumexp(dim=1) for part in said.split([*map(len, groups)], dim=1))
        rows |= zip(batch["ids"], torch.stack(named, dim=1) - none[:, None])
        count += sum(lengths) if pair else 0
    ratios = torch.stack([rows[study.id] for study in studies])
    own, others = (loss / count if count else math.nan for loss in losses)
    return ratios.masked_fill(ratios.isinf(), torch.nan), own, others


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
    rightly; a tie counts half. nan without such a pair, and for scores that are nan."""
    if scores.isnan().any():
        return math.nan
    present, absent = scores[true.bool(), None], scores[~true.bool()]
    return ((present > absent).double() + (present == absent).double() / 2).mean().item()


def predict(train_h: Tensor, train_true: Tensor, h: Tensor, l2: float) -> Tensor:
    """Log odds (n, L) at h (n, D), by a regression on train; h standardised over train."""
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


def did_in_batches(image_embed: Tensor, text_embed: Tensor,
                   temperature: float) -> tuple[float, float]:
    """The DID loss and did_top1 of raw embeddings (N, D), means over the batches of all shuffles.

    By chance they are log BATCH and 1 / BATCH. The batches depend on N only.
    """
    losses, nearest = [], []
    for shuffle in range(SHUFFLES):
        for batch in epoch_batches(len(image_embed), BATCH, 0, shuffle):
            losses.append(did_loss(image_embed[batch], text_embed[batch], temperature))
            nearest.append(own_report_nearest(image_embed[batch], text_embed[batch]))
    return torch.stack(losses).mean().item(), torch.cat(nearest).float().mean().item()


@torch.no_grad()
def embed_texts(model: VDGen, train: list[Study], studies: list[Study], kept: Path) -> Tensor:
    """Eq. 5 for the reports of `studies`, (N, D): y standardised over train (A5), then W2."""
    teacher = teacher_embeddings(model, [study.report for study in train], kept, keep=False)
    embeddings = embed_reports(model, [study.report for study in studies])
    y = teacher.standardise(torch.stack([embeddings[study.report] for study in studies]))
    return model.did_head(y.to(model.device)).cpu()


def matrix(studies: list[Study], spec: dict) -> Tensor:
    """(N, L) float32: 1 where a study has a finding."""
    present = [{row["finding"] for row in spec["studies"][study.id]} for study in studies]
    return torch.tensor([[float(name in row) for name in spec["phrases"]] for row in present])


def read_predictions(checkpoint: Path | None, split: str, names: set[str]) -> dict | None:
    """{id: report} that an evaluation has left beside the checkpoint, of just these studies."""
    path = checkpoint and checkpoint.with_name(
        f"{results_name(checkpoint, split)}_predictions.jsonl")
    if not path or not path.is_file():
        return None
    reports = {row["id"]: row["prediction"] for row in read_rows(path)}
    if reports.keys() != names:
        raise ValueError(f"{path}: it is of {len(reports)} studies, not of the {len(names)} of "
                         f"{split}; evaluate them, or leave data.limit and data.root as they were")
    return reports


def print_table(columns: dict[str, dict[str, float]], counts: dict[str, int]) -> None:
    """A line a finding, then the means over all findings, and over those that chance moves less."""
    def line(title: str, studies: str, values) -> None:
        print(f"{title:<30}{studies:>8}" + "".join(
            f"{value:>14}" if isinstance(value, str) else f"{value:>14.3f}" for value in values))

    def mean(column: dict[str, float], least: int) -> float:
        values = [column[name] for name, count in counts.items() if count >= least]
        return float(np.nanmean(values)) if values else np.nan
    line("", "studies", columns)
    for finding, count in counts.items():
        line(finding, str(count), [column[finding] for column in columns.values()])
    for least in (0, FEW):
        line("macro" + (f", {FEW} studies or more" if least else ""), "",
             [mean(column, least) for column in columns.values()])


def compare(model: VDGen, splits: dict[str, list[Study]], split: str,
            checkpoint: Path | None) -> None:
    """Encode, fit and print."""
    config, train, studies = model.config, splits["train"], splits[split]
    if not studies:
        raise ValueError(f"--split {split}: the annotation has no such studies")
    texts_of_run = read_predictions(checkpoint, split, {study.id for study in studies})
    spec = read_findings(config, [study.id for study in (*train, *studies)])
    if spec is None:
        raise ValueError(f"data.root: there is no findings.json in {config.data.root}; "
                         "`python data.py iu_xray` adds it")
    names, train_h, h = list(spec["phrases"]), encode(model, train), encode(model, studies)
    train_true, true = matrix(train, spec), matrix(studies, spec)
    l2, share = choose_l2(train_h, train_true), train_true.mean(dim=0)
    scores = predict(train_h, train_true, h, l2)

    def f1(named: Tensor) -> dict[str, float]:
        each = precision_recall_f1(named.numpy(), true.bool().numpy(), names)["each"]
        return {name: row["f1"] for name, row in each.items()}
    reports = [study.report for study in train]
    llm, own, others = ask_llm(model, studies, common_sentences(reports, spec))
    columns = {"AUC of h": {name: auc(scores[:, i], true[:, i]) for i, name in enumerate(names)},
               "AUC of LLM": {name: auc(llm[:, i], true[:, i]) for i, name in enumerate(names)},
               "F1 of h": f1(most_likely(scores, share)), "F1 at P > 1/2": f1(scores > 0)}
    constant = best_constant(reports)
    for title, texts in (("F1 of text", texts_of_run),
                         ("of constant", {study.id: constant for study in studies})):
        if texts:
            said = score_findings(texts, spec)["each"]
            columns[title] = {name: row["f1"] for name, row in said.items()}
    columns["of chance"] = dict(zip(names, share.tolist()))  # named at random, as often as in train
    print(f"{checkpoint or config.model.vision}, {split}: {len(studies)} studies, regression on "
          f"{len(train)}, l2 {l2}")
    print_table(columns, dict(zip(names, true.sum(dim=0).int().tolist())))
    print(f"report loss: {own:.3f} nats a token, with another study's visual tokens {others:.3f}")
    if checkpoint and model.did_head is not None and len(studies) >= BATCH:
        text_embed = embed_texts(model, train, studies, checkpoint.with_name("teacher.pt"))
        loss, nearest = did_in_batches(h, text_embed, config.loss.did_temperature)
        print(f"DID in batches of {BATCH}: {loss:.3f} (chance {math.log(BATCH):.3f}), did_top1 "
              f"{nearest:.3f} (chance {1 / BATCH:.3f})")


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
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if args.checkpoint:
        model.load_trained_state(checkpoint["model"])
    compare(model, splits, args.split, args.checkpoint)


if __name__ == "__main__":
    end_in_one_line(main)
