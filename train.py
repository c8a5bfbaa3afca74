"""Train VDGen with a hand-written loop (Sec. 3.4, Eq. 8; settings: Sec. 4.1.2 and A13), then score.

    python train.py --config configs/iu_xray.yaml [--resume] [--set section.key=value ...]
    torchrun --nproc_per_node 8 train.py --config configs/mimic_cxr.yaml     # one batch, by 8 GPUs

A run lives in runs/<config name>/: config.yaml, log.jsonl, teacher.pt (A5), last.pt (everything to
resume), best.pt. The loop is `train`; what it calls stands above it, in the order of its calls.
"""
import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TextIO

import peft
import torch
import torch.distributed
import transformers
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import configs
from configs import Config, InputError, load_config, parse_config
from configs.files import read_checkpoint, write_whole
from data import (ReportDataset, Study, build_demo_if_missing, digest, end_in_one_line,
                  epoch_batches, loader, read_studies, require_images)
from evaluate import evaluate, read_findings, score, write_reports
from model import Teacher, VDGen, embed_reports, join_ranks, load_model, ranks

# What --resume lets a person change: where and how a run is computed, and what helps after trouble.
# The rest makes another experiment.
FREE_TO_CHANGE = {
    "data.root", "data.num_workers", "train.output", "train.save_every_steps",
    "train.eval_batch_size", "train.recompute",
    "train.lr", "train.min_lr", "train.clip_norm", "train.weight_decay"}
FREE_TO_RAISE = {"train.epochs", "train.max_steps"}


@dataclass
class Run:
    """What a run works with, and where it stands."""
    config: Config
    folder: Path
    splits: dict[str, list[Study]]
    studies: str                 # a digest of those of train: a resumed run must meet the same
    model: VDGen
    parallel: nn.Module          # the model, wrapped where several ranks share a batch
    optimizer: torch.optim.Optimizer
    teacher: Teacher | None
    log: TextIO
    step: int = 0                # completed
    best: float = -math.inf      # the highest validation so far
    written: tuple | None = None  # what the best validation wrote
    epoch_values: list[dict] = field(default_factory=list)  # of this epoch's steps

    @property
    def epoch_steps(self) -> int:
        return len(self.splits["train"]) // self.config.train.batch_size

    @property
    def steps(self) -> int:
        """Of the whole run."""
        settings = self.config.train
        return min(settings.max_steps or math.inf, settings.epochs * self.epoch_steps)


# Opening a run ------------------------------------------------------------------------------------

def open_log(folder: Path) -> TextIO:
    """log.jsonl of a run's folder, locked until the process ends: no second run writes there."""
    import fcntl  # not above: Windows has none, and configs/__init__.py says so in one line
    if ranks()[0]:
        return open(os.devnull, "a+")
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.jsonl").open("a+", encoding="utf-8", buffering=1)
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{folder}: another process is training in this folder; wait for it, or "
                         f"use another train.output") from None
    return log


def read_last(folder: Path, config: Config, resume: bool) -> dict | None:
    """What last.pt holds if the run goes on from it, else None.

    `changed` in it: the settings that --resume has changed, by their dotted names.
    """
    last, best = folder / "last.pt", folder / "best.pt"
    if not resume:
        if last.exists() or best.exists():
            raise InputError(f"{folder} holds a run: add --resume to go on with it, or --set "
                             f"train.output=FOLDER for another")
        return None
    if not last.exists():
        print(f"--resume: there is no {last}; starting at step 0")
        return None
    keys = ("model", "config", "optimizer", "step", "best", "random", "studies")
    checkpoint = read_checkpoint(last, keys=keys)
    before = parse_config(checkpoint["config"], source=str(last)).to_dict()
    checkpoint["changed"] = {}
    for key, old, new in _differences(before, config.to_dict()):
        raised = key in FREE_TO_RAISE and (new or math.inf) > (old or math.inf)
        if key not in FREE_TO_CHANGE and not raised:
            raise InputError(f"--resume: {last} was written with another config: {key} was {old}, "
                             f"is {new}. Use the same, or another train.output")
        checkpoint["changed"][key] = new
        print(f"--resume: {key} was {old}, is {new} from step {checkpoint['step'] + 1} on")
    return checkpoint


def _differences(before: dict, now: dict, prefix: str = "") -> list[tuple]:
    """(dotted name, value before, value now) of what differs in two trees of settings."""
    found = []
    for key, old in before.items():
        new = now[key]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def require_batches(studies: int, config: Config) -> None:
    """InputError where the training studies fill no batch (A22), or the ranks cannot share one."""
    batch_size, world = config.train.batch_size, ranks()[1]
    if not studies:
        raise InputError(f"{config.data.root}/annotation.json: train: no studies to train on")
    if studies < batch_size:
        raise InputError(f"train.batch_size: {studies} training studies do not fill one batch of "
                         f"{batch_size} (A22); lower it, or raise data.limit")
    if batch_size % world:
        raise InputError(f"train.batch_size: {batch_size} studies cannot be shared by {world} "
                         f"ranks equally")


def make_teacher(model: VDGen, reports: list[str], cache: Path | None = None) -> Teacher:
    """A5: y of each training study, in their order.

    Read from `cache` if it holds what just this teacher says of just these reports, else computed
    and written there.
    """
    names, texts = model.config.model, sorted(set(reports))
    precision = model.config.train.precision
    key = {"teacher": names.teacher or names.llm, "precision": precision, "texts": texts}
    rank, world = ranks()
    if rank:
        torch.distributed.barrier()  # the first rank computes them
    read = partial(read_checkpoint, cache, "the teacher", ("key", "embeddings"), mmap=True)
    kept = read() if cache and cache.is_file() else {}
    if kept.get("key") != key:
        embeddings = embed_reports(model, reports)
        kept = {"key": key, "embeddings": torch.stack([embeddings[text] for text in texts])}
        if cache:
            write_whole(cache, kept)
            kept = read()  # mapped: on MIMIC-CXR 2 GB that would else be each rank's own
    if world > 1 and not rank:
        torch.distributed.barrier()
    row = {text: i for i, text in enumerate(texts)}
    return Teacher(kept["embeddings"], torch.tensor([row[report] for report in reports]))


def shared_by_ranks(model: VDGen) -> nn.Module:
    """The model for DDP. All ranks have read the same frozen LLM: it is not sent around again."""
    named = chain(model.named_parameters(), model.named_buffers())
    model._ddp_params_and_buffers_to_ignore = [name for name, p in named if not p.requires_grad]
    device = [model.device] if model.device.type == "cuda" else None
    return DistributedDataParallel(model, device)


def prepare(config: Config, resume: bool) -> Run:
    """All that stands before the first step; --resume brings back what a stopped run had."""
    settings, (rank, world), folder = config.train, ranks(), Path(config.train.output)
    log = open_log(folder)
    checkpoint = read_last(folder, config, resume)
    build_demo_if_missing(config.data)
    splits = read_studies(config.data)
    require_batches(len(splits["train"]), config)
    require_images(splits, config.data)
    read_findings(config.data, [study.id for name in ("val", "test") for study in splits[name]])

    torch.manual_seed(settings.seed)
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
    if settings.init_from:
        model.load_trained_state(read_checkpoint(settings.init_from)["model"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    run = Run(config, folder, splits, digest(splits["train"]), model, model, optimizer, None, log)
    if rank:  # each rank drops out by its own random numbers
        torch.manual_seed(settings.seed + rank)
    if checkpoint:
        restore(run, checkpoint)
    begin_log(run, checkpoint["changed"] if checkpoint else {})
    if config.loss.did_weight:
        reports = [study.report for study in splits["train"]]
        run.teacher = make_teacher(model, reports, folder / "teacher.pt")
    if world > 1:
        run.parallel = shared_by_ranks(model)
    return run


def restore(run: Run, checkpoint: dict) -> None:
    """Weights, optimizer, place and random state of a last.pt."""
    if checkpoint["studies"] != run.studies:
        raise InputError(f"--resume: {run.folder / 'last.pt'} was trained on other studies than "
                         f"{run.config.data.root} holds now; use the same, or another train.output")
    run.model.load_trained_state(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.optimizer.param_groups[0]["weight_decay"] = run.config.train.weight_decay  # the one of now
    run.step, run.best = checkpoint["step"], checkpoint["best"]
    random = checkpoint["random"][ranks()[0] % len(checkpoint["random"])]
    torch.set_rng_state(random["cpu"])
    if run.model.device.type == "cuda" and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], run.model.device)


def header(model: VDGen, config: Config) -> dict:
    """The first line of log.jsonl: what runs, with what, on what."""
    def count(module: nn.Module, trained: bool | None = None) -> int:
        return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))
    on_gpu = model.device.type == "cuda"
    return {"arguments": config.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__},
            "device": torch.cuda.get_device_name(model.device) if on_gpu else
            f"CPU, {torch.get_num_threads()} threads",
            "ranks": ranks()[1], "visual_tokens": model.visual_token_count,
            "parameters": {"trained": count(model, True), "frozen": count(model, False),
                           "vision": count(model.vision), "lora": count(model.llm, True)}}


def begin_log(run: Run, changed: dict) -> None:
    """config.yaml, and log.jsonl without the steps behind last.pt: these run again.

    `changed`: settings that --resume has changed. The console shows what runs, too.
    """
    config, log, first, kept = run.config, run.log, header(run.model, run.config), 0
    if ranks()[0]:
        return
    log.seek(0)
    while run.step and (text := log.readline()).endswith("\n"):  # a kill may leave half a line
        try:
            at = json.loads(text).get("step", 0)
        except (ValueError, AttributeError):
            raise InputError(f"{log.name}: not a line of a log: {text!r:.100}; remove it, or the "
                             f"whole file: last.pt needs none of it") from None
        if at > run.step:
            break
        kept += len(text.encode())
    log.truncate(kept)
    if not kept:
        log.write(json.dumps(first) + "\n")
    if changed:
        log.write(json.dumps({"step": run.step, "changed": changed}) + "\n")
    write_whole(run.folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    sizes = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in first["parameters"].items())
    print(f"{run.folder}: {len(run.splits['train'])} training studies of {first['visual_tokens']} "
          f"visual tokens, {run.steps} steps of batch {config.train.batch_size}, on "
          f"{first['device']}; parameters {sizes}")
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no instruction for bfloat16
    if run.model.device.type == "cpu" and config.train.precision == "bf16" and only_avx2:
        print("note: this CPU computes bfloat16 slowly (AVX2); --set train.precision=fp32 takes a "
              "fraction of the time")


# A step -------------------------------------------------------------------------------------------

def batches(run: Run) -> Iterator[dict]:
    """What is left of the run, batch by batch; of each, this rank's share."""
    dataset = ReportDataset(run.splits["train"], run.config.data, run.model.image_size,
                            run.model.tokenizer)
    while run.step < run.steps:
        yield from rest_of_epoch(run, dataset)


def rest_of_epoch(run: Run, dataset: ReportDataset) -> DataLoader:
    """The batches of the epoch that `run.step` stands in, from there on."""
    settings, (rank, world) = run.config.train, ranks()
    epoch, done = divmod(run.step, run.epoch_steps)
    chosen = epoch_batches(len(dataset), settings.batch_size, settings.seed, epoch)
    chosen = chosen[done:done + run.steps - run.step]
    share = settings.batch_size // world
    own = [batch[rank * share:(rank + 1) * share] for batch in chosen]
    return loader(dataset, own, run.config.data.num_workers, run.model.device)


def on_device(batch: dict, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, report ids and y of a batch; from pinned memory, whose copies are not waited for."""
    device = run.model.device
    y = run.teacher(batch["indices"]) if run.teacher else None
    if y is not None and device.type == "cuda":
        y = y.pin_memory().to(device, non_blocking=True)
    return (batch["images"].to(device, non_blocking=True),
            batch["report_ids"].to(device, non_blocking=True), y)


def to_host(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars as numbers, means over the ranks: the one time that a step waits for the device."""
    rows = torch.stack([value.detach().float() for value in values.values()])
    if ranks()[1] > 1:
        torch.distributed.all_reduce(rows)
        rows /= ranks()[1]
    return dict(zip(values, rows.tolist()))


def require_finite(values: dict[str, float], run: Run) -> None:
    """InputError that names the step and the term, before any weight or file has changed."""
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad:
        raise InputError(f"step {run.step + 1}: {bad} is {values[bad]}; try a lower train.lr, with "
                         f"--resume if there is a {run.folder / 'last.pt'}: it holds a step before")


def cosine_lr(step: int, steps: int, train: configs.Train) -> float:
    """A13: the learning rate of a step (from 0), half a cosine from `lr` down to `min_lr`."""
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


def log_step(run: Run, values: dict[str, float], seconds: float, bar: tqdm) -> None:
    """One line of log.jsonl; and the same numbers, fewer, at the progress bar."""
    line = {"step": run.step, "epoch": (run.step - 1) // run.epoch_steps + 1, **values,
            "seconds": seconds}
    if run.model.device.type == "cuda":
        line |= {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                 "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
    run.log.write(json.dumps(line, allow_nan=False) + "\n")
    run.epoch_values.append(values)
    shown = {name: f"{line[name]:.3f}" for name in ("report", "vse", "did") if name in line}
    bar.update()
    bar.set_postfix(shown, refresh=False)


# Saving and validating ----------------------------------------------------------------------------

def save(run: Run, name: str) -> None:
    """best.pt, or last.pt with all that a resumed run needs besides."""
    content = {"model": run.model.trained_state(), "config": run.config.to_dict(),
               "step": run.step, "best": run.best}
    rank, world = ranks()
    if name == "last.pt":
        random = {"cpu": torch.get_rng_state()}
        if run.model.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(run.model.device)
        randoms = [random] * world
        if world > 1:
            torch.distributed.all_gather_object(randoms, random)
        content |= {"optimizer": run.optimizer.state_dict(), "random": randoms,
                    "studies": run.studies}
    if not rank:
        write_whole(run.folder / name, content)


def validate(run: Run) -> None:
    """Generate and score the val split; best.pt is that of the highest (BLEU-4 + CIDEr) / 2.

    Without a val split every value is 0: the last weights are the best.
    """
    value, written, studies = 0.0, None, run.splits["val"]
    if studies:
        started = time.perf_counter()
        if ranks()[1] > 1:  # BatchNorm remembers each rank's films: all use the first one's (A11)
            for buffer in run.model.vision.buffers():
                torch.distributed.broadcast(buffer, 0)
        reports, _ = written = write_reports(run.model, studies)
        scores = score(reports, {study.id: study.report for study in studies}, meteor=False)
        distinct, seconds = len(set(reports.values())), time.perf_counter() - started
        line = {"step": run.step, "val": scores | {"distinct": distinct}, "seconds": seconds}
        run.log.write(json.dumps(line, allow_nan=False) + "\n")
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"\nstep {run.step}: val {shown}, {distinct} different reports of {len(reports)}, "
              f"{seconds:.0f} s{did_of_epoch(run)}")
        value = (scores["BLEU_4"] + scores["CIDEr"]) / 2
    if value >= run.best:
        run.best, run.written = value, written
        save(run, "best.pt")


def did_of_epoch(run: Run) -> str:
    """The mean DID and did_top1 over the epoch's steps, beside chance: has the encoder learned?"""
    values, run.epoch_values = run.epoch_values, []
    if run.teacher is None or not values:
        return ""
    did, top1 = (sum(line[key] for line in values) / len(values) for key in ("did", "did_top1"))
    B = run.config.train.batch_size
    return (f"; training: DID {did:.3f} (chance {math.log(B):.3f}), did_top1 {top1:.3f} "
            f"(chance {1 / B:.3f})")


def evaluate_best(run: Run) -> dict | None:
    """The last act: best.pt on the test split when there is one, else on val."""
    run.log.close()
    split = next((name for name in ("test", "val") if run.splits[name]), None)
    if split is None:
        return print("the annotation has no val and no test studies: nothing to evaluate")
    if ranks()[1] > 1:
        torch.distributed.barrier()  # the first rank has written best.pt
    best = read_checkpoint(run.folder / "best.pt", keys=("model", "step"))
    run.model.load_trained_state(best["model"])
    run.model.step = best["step"]
    written = run.written if split == "val" else None
    return evaluate(run.model.eval(), split, run.splits, run.folder, written=written)


# The loop -----------------------------------------------------------------------------------------

def train(config: Config, resume: bool = False) -> dict | None:
    """Run the whole of a config, or the rest of it; returns the metrics of the final evaluation.

    Under torchrun each rank takes its part of every batch; losses, weights and files are those of
    one process, but where an encoder has BatchNorm, which sees one part (A11).
    """
    run = prepare(config, resume)
    settings, weights, model, optimizer = config.train, config.loss, run.model, run.optimizer
    parameters = optimizer.param_groups[0]["params"]
    save_every = settings.save_every_steps or run.steps
    with tqdm(total=run.steps, initial=run.step, desc="train", unit="step") as bar:
        started = time.perf_counter()
        for batch in batches(run):
            images, report_ids, y = on_device(batch, run)

            # Sec. 3.2 to 3.4: the terms, in bfloat16 where that is safe (A13)
            with model.autocast():
                terms, did_top1 = run.parallel(
                    images, batch["view_counts"], report_ids, batch["report_lengths"], y)

            # Eq. 8. With A1's reading the VSE term may be negative, and so may the total (A2)
            loss = (weights.report_weight * terms["report"]
                    + weights.vse_weight * terms.get("vse", 0)
                    + weights.did_weight * terms.get("did", 0))

            # Backward, clip (A13)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)

            # Finite, or stop: nothing has changed yet
            values = to_host({**terms, "total": loss, "gradient_norm": norm}
                             | ({} if did_top1 is None else {"did_top1": did_top1}))
            require_finite(values, run)

            # Step
            lr = cosine_lr(run.step, run.steps, settings)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # now: none stands beside the next activations
            run.step += 1

            # Log, validate, save
            log_step(run, values | {"lr": lr}, time.perf_counter() - started, bar)
            ends_epoch = run.step % run.epoch_steps == 0 or run.step == run.steps
            if ends_epoch:
                validate(run)
            if ends_epoch or run.step % save_every == 0:
                save(run, "last.pt")
            started = time.perf_counter()
    return evaluate_best(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last.pt of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override the config")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    join_ranks()
    try:
        train(config, args.resume)
    except KeyboardInterrupt:
        last = Path(config.train.output) / "last.pt"
        where = f"goes on from {last}" if last.exists() else "starts again: there is no last.pt yet"
        raise KeyboardInterrupt(f"stopped; --resume {where}") from None


if __name__ == "__main__":
    end_in_one_line(main)
