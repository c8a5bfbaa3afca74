"""Seen and said: what h knows of the findings of a split, beside what the reports say of them; and
which term of Eq. 8 moves the encoder.

    python tests/probe.py --checkpoint runs/iu_xray_small/best.pt [--split val] [--set ...]
    python tests/probe.py --config configs/iu_xray_small.yaml [--set ...]    # before any training

One logistic regression a finding, from h (the mean visual token of a study) to findings.json, is
fitted on train: "F1 of h" names a finding as often as train does, "F1 at P > 1/2" where h makes it
likelier than not (a weaker penalty is surer of itself, and names more). What the reports say stands
in `<split>_predictions.jsonl` beside the checkpoint.
Between the two stands the LLM: is a sentence that names a finding likelier where the finding is?
Behind the table, means over batches as in training: each term, the norm of its weighted gradient at
X^e, the report loss with another study's visual tokens, and the share of images whose own report is
the nearest of the batch (did_top1).
"""
import argparse
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import InputError, load_config  # noqa: E402
from configs.files import read_predictions  # noqa: E402
from configs.findings import findings_matrices, named_findings, read_findings  # noqa: E402
from data import (ReportDataset, Study, end_in_one_line, epoch_batches, loader,  # noqa: E402
                  read_studies)
from evaluate import best_constant, precision_recall_f1, results_name  # noqa: E402
from model import VDGen, embed_reports, load_checkpoint, load_model  # noqa: E402
from train import make_teacher  # noqa: E402

L2 = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of which cross-validation on train chooses
FOLDS = 3
FEW = 10  # studies: the AUC of fewer is mostly chance
SENTENCES = 3  # of each finding, the commonest of train: what the LLM is asked for


@torch.no_grad()
def visual_batches(model: VDGen, studies: list[Study], desc: str,
                   batches: list[list[int]] | None = None) -> Iterator[tuple[dict, Tensor]]:
    """Batches of `collate` and their X^e (B, S, D): those given by numbers, else all studies."""
    data, size = model.config.data, model.config.train.eval_batch_size
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    batches = batches or [list(part) for part in torch.arange(len(studies)).split(size)]
    read = loader(dataset, batches, data.num_workers, model.device)
    for batch in tqdm(read, desc, len(batches), unit="batch", leave=False):
        with model.autocast():
            visual_tokens = model.encode(batch["images"], batch["view_counts"])
        yield batch, visual_tokens


def encode(model: VDGen, studies: list[Study]) -> Tensor:
    """h of each study, in their order: (N, D) float32 on the CPU."""
    rows = {}
    for batch, visual_tokens in visual_batches(model, studies, "encode"):
        rows |= zip(batch["ids"], model.pool(visual_tokens).cpu())
    return torch.stack([rows[study.id] for study in studies])


# What the LLM makes of X^e ------------------------------------------------------------------------

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

    The prompt of a study passes the LLM once; its cache then serves the K sentences as a batch.
    """
    llm, device, rows = model.causal_lm, model.device, []
    ids = [torch.tensor(sentence, device=device) for sentence in sentences]
    targets = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    study = torch.zeros(len(ids), dtype=torch.long, device=device)
    for prompt in model.embed_prompt(visual_tokens):
        cache = DynamicCache(config=llm.config)
        # By place: the cache's name differs between versions of transformers.
        first = llm(None, None, None, cache, prompt[None], logits_to_keep=1).logits
        cache.reorder_cache(study)  # K copies
        rest = llm(targets.clamp(min=0), None, None, cache).logits[:, :-1]
        logits = torch.cat([first.expand(len(ids), -1, -1), rest], dim=1).float()
        rows.append(-F.cross_entropy(logits.mT, targets, reduction="none").sum(dim=1))
    return torch.stack(rows)


@torch.no_grad()
def ask_llm(model: VDGen, studies: list[Study], sentences: dict[str | None, list[str]]) -> Tensor:
    """(N, L) log of how much likelier a report begins by a sentence that names the finding than by
    one that names none; nan where there is no such sentence. `sentences`: see `common_sentences`.
    """
    groups = [model.tokenizer(group, add_special_tokens=False).input_ids if group else []
              for group in sentences.values()]
    rows, sizes = {}, [len(group) for group in groups]
    for batch, visual_tokens in visual_batches(model, studies, "ask the LLM"):
        with model.autocast():
            said = begin_with(model, visual_tokens, sum(groups, [])).cpu()
        none, *named = (part.logsumexp(dim=1) for part in said.split(sizes, dim=1))
        rows |= zip(batch["ids"], torch.stack(named, dim=1) - none[:, None])
    ratios = torch.stack([rows[study.id] for study in studies])
    return ratios.masked_fill(ratios.isinf(), torch.nan)


def terms_and_gradients(model: VDGen, studies: list[Study],
                        train_reports: list[str], kept: Path | None) -> dict[str, float]:
    """Eq. 8 on batches of train.batch_size (A22), in one order: means over the batches.

    Args: kept: the run's teacher.pt (A5), if there is one.
    Returns: each unweighted term, `did_top1`, `gradient of <term>`: the norm over the batch at X^e,
        weighted as in Eq. 8, and `report of others`: with another study's visual tokens.
    """
    numbers, weights, y = defaultdict(list), model.config.loss, None
    if model.did_head is not None:
        teacher = make_teacher(model, train_reports, kept)
        embeddings = embed_reports(model, [study.report for study in studies])
    batches = epoch_batches(len(studies), model.config.train.batch_size, seed=0, epoch=0)
    for batch, visual_tokens in visual_batches(model, studies, "terms", batches):
        report = batch["report_ids"].to(model.device), batch["report_lengths"]
        if model.did_head is not None:
            y = torch.stack([embeddings[text] for text in batch["reports"]])
            y = teacher.standardise(y).to(model.device)
        visual_tokens.requires_grad_()
        with model.autocast():
            terms, measures = model.losses(visual_tokens, *report, y)
            others = model.report_term(visual_tokens.detach().roll(1, dims=0), *report)
        for name, term in terms.items():
            weighted = getattr(weights, f"{name}_weight") * term
            gradient, = torch.autograd.grad(weighted, visual_tokens, retain_graph=True)
            numbers[f"gradient of {name}"].append(gradient.norm().item())
        found = terms | measures | {"report of others": others}
        for name, value in found.items():
            numbers[name].append(value.item())
    return {name: float(np.mean(values)) for name, values in numbers.items()}


# What a regression makes of h ---------------------------------------------------------------------

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
        values = []
        for fold in range(FOLDS):
            inside, held = folds != fold, true[folds == fold]
            scores = predict(h[inside], true[inside], h[~inside], l2)
            values += [auc(scores[:, i], held[:, i]) for i in range(true.shape[1])]
        return float(np.nanmean(values))
    return max(tqdm(L2, desc="l2", leave=False), key=held_out)


def most_likely(scores: Tensor, share: Tensor) -> Tensor:
    """(N, L) bool: each finding in that share (L,) of the studies in which it scores highest."""
    order = scores.argsort(dim=0, descending=True).argsort(dim=0)
    return order < (share * len(scores)).round()


# The table ----------------------------------------------------------------------------------------

def seen_and_said(model: VDGen, train: list[Study], studies: list[Study], spec: dict,
                  texts: dict[str, str] | None) -> tuple[dict[str, list[float]], np.ndarray]:
    """The columns of the table, a number for each of L findings, and (L,) studies that have it.

    `texts`: {id: report} of the run, if an evaluation has left them.
    """
    reports, names = [study.report for study in train], [study.id for study in studies]
    constant = dict.fromkeys(names, best_constant(reports))
    _, true = findings_matrices(constant, spec)
    _, train_true = findings_matrices(dict.fromkeys((study.id for study in train), ""), spec)
    train_h, h, share = encode(model, train), encode(model, studies), train_true.mean(axis=0)
    targets = torch.from_numpy(train_true).float()
    l2 = choose_l2(train_h, targets)
    scores = predict(train_h, targets, h, l2)
    llm = ask_llm(model, studies, common_sentences(reports, spec))
    print(f"{len(train)} studies for the regression, l2 {l2}")

    def aucs(values: Tensor) -> list[float]:
        return [auc(*columns) for columns in zip(values.T, torch.from_numpy(true).T)]

    def f1(named: np.ndarray) -> list[float]:
        counts = [each.sum(axis=0) for each in (named & true, named, true)]
        return precision_recall_f1(*counts)[2].tolist()
    columns = {"AUC of h": aucs(scores), "AUC of LLM": aucs(llm),
               "F1 of h": f1(most_likely(scores, torch.from_numpy(share)).numpy()),
               "F1 at P > 1/2": f1((scores > 0).numpy())}
    if texts:
        texts = {name: texts[name] for name in names}
        columns["F1 of text"] = f1(findings_matrices(texts, spec)[0])
    columns["of constant"] = f1(findings_matrices(constant, spec)[0])
    columns["of chance"] = share.tolist()  # named at random, as often as in train
    return columns, true.sum(axis=0)


def print_table(names: Iterable[str], columns: dict[str, list[float]], counts: np.ndarray) -> None:
    """A line a finding, then the means over all findings, and over those that chance moves less."""
    def line(title: str, cells: Iterable) -> None:
        print(f"{title:<30}" + "".join(f"{cell:>14}" for cell in cells))
    line("", ["studies", *columns])
    values = np.array(list(columns.values()))
    for name, count, row in zip(names, counts, values.T):
        line(name, [count, *(f"{value:.3f}" for value in row)])
    for title, few in (("macro", 0), (f"macro, {FEW} studies or more", FEW)):
        line(title, ["", *(f"{np.nanmean(row):.3f}" for row in values[:, counts >= few])])


def print_terms(found: dict[str, float], B: int) -> None:
    print(f"means over batches of {B}; gradient: its norm at X^e, of the weighted term")
    beside = {"report": f"with another study's visual tokens {found['report of others']:.3f}",
              "vse": f"equal images {math.log(B - 1):.3f}",
              "did": f"chance {math.log(B):.3f}; did_top1 {found.get('did_top1', 0):.3f}, "
                     f"chance {1 / B:.3f}"}
    for key, gradient in found.items():
        if key.startswith("gradient of "):
            name = key.removeprefix("gradient of ")
            text = f"  ({beside[name]})" if name in beside else ""
            print(f"{name:<8}{found[name]:.3f}  gradient {gradient:.2e}{text}")


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
        model = load_checkpoint(args.checkpoint, args.set)
    else:
        model = load_model(load_config(args.config, args.set)).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    data, B = model.config.data, model.config.train.batch_size
    splits = read_studies(data)
    train, studies = splits["train"], splits[args.split]
    if not train or len(studies) < B:
        raise InputError(f"{data.root}: {len(train)} studies of train, {len(studies)} of "
                         f"{args.split}; expected some, and a batch of {B}")
    texts, kept = None, args.checkpoint and args.checkpoint.with_name("teacher.pt")
    if args.checkpoint:
        name = results_name(args.checkpoint, args.split)
        path = args.checkpoint.with_name(f"{name}_predictions.jsonl")
        if path.is_file():
            texts = {row["id"]: row["prediction"] for row in read_predictions(path)}
    print(f"{args.checkpoint or args.config}, {args.split}: {len(studies)} studies")
    spec = read_findings(data, [study.id for study in (*train, *studies)])
    if spec:
        print_table(spec["phrases"], *seen_and_said(model, train, studies, spec, texts))
    else:
        print(f"no findings.json in {data.root}: no table")
    reports = [study.report for study in train]
    print_terms(terms_and_gradients(model, studies, reports, kept), B)


if __name__ == "__main__":
    end_in_one_line(main)
