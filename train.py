"""Train VDGen with a hand-written loop (Sec. 3.4, Eq. 8; settings: Sec. 4.1.2 and A13), then score.

    python train.py --config configs/iu_xray.yaml [--resume] [--set section.key=value ...]
    torchrun --nproc_per_node 8 train.py --config configs/mimic_cxr.yaml     # one batch, by 8 GPUs

A run lives in runs/<config name>/: config.yaml, log.jsonl, teacher.pt (A5), last.pt (everything to
resume), best.pt. The loop is `train`; what it calls stands above it, in the order of its calls.
"""
import argparse
import fcntl
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
from configs import Config, load_config, parse_config
from configs.report import write_whole
from data import (ReportDataset, Study, build_demo_if_missing, digest, end_in_one_line,
                  epoch_batches, loader, read_studies, require_images)
from evaluate import evaluate, read_findings, score, write_reports
from model import (Teacher, VDGen, embed_reports, join_ranks, load_model, ranks, read_checkpoint)

# What --resume lets a person change: where and how a run is computed, and what helps after trouble.
# The rest makes another experiment.
FREE_TO_CHANGE = {
    "data.root", "data.num_workers", "train.output", "train.save_every_steps",
    "train.eval_batch_size", "train.recompute",
    "train.lr", "train.min_lr", "train.clip_norm", "train.weight_decay"}
FREE_TO_RAISE = {"train.epochs", "train.max_steps"}
ADVICE_STEP, ADVICE_LAST = 200, 50  # when the terms are looked at, and how many steps then count


def cosine_lr(step: int, steps: int, train: configs.Train) -> float:
    """A13: the learning rate of a step (from 0), half a cosine from `lr` down to `min_lr`."""
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


def write_atomically(path: Path, content: dict) -> None:
    """A checkpoint under another name, then renamed: a stop meanwhile leaves the old one whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"cannot write {path} ({reason}); the one before it is whole") from None


def write_line(log: TextIO, line: dict) -> None:
    """One JSON object of log.jsonl; a number that is not finite would be no JSON."""
    text = json.dumps(line, allow_nan=False) + "\n"
    try:
        log.write(text)
    except OSError as error:  # a full disk
        raise OSError(f"cannot write {log.name} ({error.strerror}); make room, and go on with "
                      f"--resume") from None


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Peaks so far: of the process; on a GPU, of its memory that was allocated and was reserved."""
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
                "peak_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# Opening a run ------------------------------------------------------------------------------------

def open_run(config: Config, resume: bool) -> tuple[Path, dict | None]:
    """The run folder, and what its last.pt holds if the run goes on from it.

    `changed` in it: the settings that --resume has changed, by their dotted names.
    """
    folder = Path(config.train.output)
    last = folder / "last.pt"
    if not last.exists() and (folder / "best.pt").exists():
        raise ValueError(f"{folder / 'best.pt'} exists and no last.pt to go on from; --set "
                         f"train.output=FOLDER names another folder")
    if last.exists() and not resume:
        raise ValueError(f"{last} exists: add --resume to go on with that run, or "
                         f"--set train.output=FOLDER for another")
    if not resume:
        return folder, None
    if not last.exists():
        print(f"--resume: there is no {last}; starting at step 0")
        return folder, None
    keys = ("model", "config", "optimizer", "step", "best", "random", "validated")
    checkpoint = read_checkpoint(last, keys=keys)
    if checkpoint["best"] > -math.inf and not (folder / "best.pt").exists():
        raise ValueError(f"--resume: {last} says that best.pt was written, and {folder} has none; "
                         f"put it back, or --set train.output=FOLDER for another run")
    before = parse_config(checkpoint["config"], source=str(last)).to_dict()
    checkpoint["changed"] = {}
    for key, old, new in _differences(before, config.to_dict()):
        raised = key in FREE_TO_RAISE and (new or math.inf) > (old or math.inf)
        if key not in FREE_TO_CHANGE and not raised:
            raise ValueError(f"--resume: {last} was written with another config: {key} was {old}, "
                             f"is {new}. Use the same, or another train.output")
        checkpoint["changed"][key] = new
        print(f"--resume: {key} was {old}, is {new} from step {checkpoint['step'] + 1} on")
    return folder, checkpoint


def _differences(before: dict, now: dict, prefix: str = "") -> list[tuple]:
    """(dotted name, value before, value now) of what differs in two trees of settings."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found


def written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def open_log(path: Path, step: int, validated: bool, last: int | None) -> TextIO:
    """log.jsonl, locked against a second run, without what comes after `step`: that runs again.

    `last`: when last.pt was written, as it was found before the lock.
    """
    if ranks()[0]:
        return open(os.devnull, "a")
    file = path.open("a+", encoding="utf-8", buffering=1)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{path.parent}: another process is training in this folder; wait for it, "
                         f"or use another train.output") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be locked ({error.strerror}); put train.output on a file "
                      f"system with locks") from None
    if written_at(path.with_name("last.pt")) != last:
        raise ValueError(f"{path.parent}: another process has trained in this folder meanwhile; "
                         f"start again with --resume, or use another train.output")
    file.seek(0)
    kept = 0
    while step and (text := file.readline()).endswith("\n"):  # a killed run may leave half a line
        try:
            line = json.loads(text)
            at = line.get("step", 0)
        except (ValueError, AttributeError):
            raise ValueError(f"{path}: not a line of a log: {text!r:.100}; remove it, or the file: "
                             f"last.pt needs none of it") from None
        if at > step or at == step and "val" in line and not validated:
            break
        kept += len(text.encode())
    file.truncate(kept)
    return file


def header(model: VDGen, config: Config) -> dict:
    """The first line of log.jsonl: what ran, with what, on what."""
    def count(module: nn.Module, trained: bool | None = None) -> int:
        return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))
    on_gpu = model.device.type == "cuda"
    return {"arguments": config.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__},
            "device": torch.cuda.get_device_name(model.device) if on_gpu else
            f"CPU, {torch.get_num_threads()} threads",
            "ranks": ranks()[1],
            "parameters": {"trained": count(model, True), "frozen": count(model, False),
                           "vision": count(model.vision), "lora": count(model.llm, True)}}


def teacher_embeddings(model: VDGen, reports: list[str], path: Path, keep: bool = True) -> Teacher:
    """A5: y of each training study, in their order.

    What the teacher says of the different reports is read from `path` if it holds just these by
    this teacher, else computed and, if `keep`, written there.
    """
    names, texts = model.config.model, sorted(set(reports))
    precision = model.config.train.precision
    key = {"teacher": names.teacher or names.llm, "precision": precision, "texts": texts}
    rank, world = ranks()
    if rank:
        torch.distributed.barrier()  # the first rank computes them
    read = partial(read_checkpoint, path, "the teacher", ("key", "embeddings"), mmap=True)
    try:
        kept = read()
    except (FileNotFoundError, ValueError):  # none yet, or a copy that was cut
        kept = {}
    if kept.get("key") != key:
        embeddings = embed_reports(model, reports)
        kept = {"key": key, "embeddings": torch.stack([embeddings[text] for text in texts])}
        if keep:
            write_atomically(path, kept)
            kept = read()  # mapped: on MIMIC-CXR 2 GB that would else be each rank's own
    if world > 1 and not rank:
        torch.distributed.barrier()
    row = {text: i for i, text in enumerate(texts)}
    return Teacher(kept["embeddings"], torch.tensor([row[report] for report in reports]))


@dataclass
class Run:
    """What a run works with, and where it stands."""
    config: Config
    folder: Path
    splits: dict[str, list[Study]]
    dataset: ReportDataset
    model: VDGen
    parallel: nn.Module          # the model, wrapped where several ranks share a batch
    parameters: list[Tensor]     # those that train
    optimizer: torch.optim.Optimizer
    epoch_steps: int
    steps: int                   # of the whole run
    studies: str                 # a digest of those of train: a resumed run must meet the same
    teacher: Teacher | None = None
    log: TextIO | None = None
    step: int = 0                # completed
    best: float = -math.inf      # the highest validation so far
    validated: bool = True       # False between the last step of an epoch and its validation
    written: tuple | None = None  # what the best validation wrote


def require_batches(studies: int, batch_size: int, world: int) -> None:
    """ValueError where the training studies fill no batch (A22), or the ranks cannot share one."""
    if studies < batch_size:
        raise ValueError(f"train.batch_size: {studies} training studies do not fill one batch of "
                         f"{batch_size} (A22); lower it, or raise data.limit")
    if batch_size % world:
        raise ValueError(f"train.batch_size: {batch_size} studies cannot be shared by {world} "
                         f"ranks equally")


def restore(run: Run, checkpoint: dict) -> None:
    """Weights, optimizer and place of a last.pt; the random state follows when all is ready."""
    if checkpoint.get("studies", run.studies) != run.studies:  # an older version kept none
        raise ValueError(f"--resume: {run.folder / 'last.pt'} was trained on other studies than "
                         f"{run.config.data.root} holds now; use the same, or another train.output")
    run.model.load_trained_state(checkpoint["model"])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.optimizer.param_groups[0]["weight_decay"] = run.config.train.weight_decay  # the one of now
    run.step, run.best, run.validated = (checkpoint[key] for key in ("step", "best", "validated"))


def announce(run: Run, about: dict) -> None:
    """One line of what the run is; one more where its precision makes it slow."""
    settings = run.config.train
    sizes = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in about["parameters"].items())
    print(f"{run.folder}: {len(run.dataset)} training studies, {run.steps} steps of batch "
          f"{settings.batch_size}, lr {settings.lr} to {settings.min_lr}, on {about['device']}; "
          f"parameters {sizes}")
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no instruction for bfloat16
    if run.model.device.type == "cpu" and settings.precision == "bf16" and only_avx2:
        print("note: this CPU computes bfloat16 slowly (AVX2); --set train.precision=fp32 takes a "
              "fraction of the time")


def shared_by_ranks(model: VDGen) -> nn.Module:
    """The model for DDP. All ranks have read the same frozen LLM: it is not sent around again."""
    named = chain(model.named_parameters(), model.named_buffers())
    model._ddp_params_and_buffers_to_ignore = [name for name, p in named if not p.requires_grad]
    device = [model.device] if model.device.type == "cuda" else None
    return DistributedDataParallel(model, device)


def prepare(config: Config, resume: bool) -> Run:
    """All that stands before the first step; --resume brings back what a stopped run had."""
    settings, (rank, world) = config.train, ranks()
    last = written_at(Path(config.train.output) / "last.pt")
    folder, checkpoint = open_run(config, resume)
    build_demo_if_missing(config.data)
    splits = read_studies(config.data)
    require_batches(len(splits["train"]), settings.batch_size, world)
    require_images(splits, config.data)
    read_findings(config, [study.id for name in ("val", "test") for study in splits[name]])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(settings.seed)
    model = load_model(config).to(device)
    dataset = ReportDataset(splits["train"], config.data, model.image_size, model.tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    epoch_steps = len(dataset) // settings.batch_size
    steps = min(settings.max_steps or math.inf, settings.epochs * epoch_steps)
    run = Run(config, folder, splits, dataset, model, model, parameters, optimizer, epoch_steps,
              steps, digest(splits["train"]))
    if checkpoint:
        restore(run, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    run.log = open_log(folder / "log.jsonl", run.step, run.validated, last)
    if not rank:
        write_whole(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    about = header(model, config)
    if not run.log.tell():  # it is new, or was not copied with last.pt
        write_line(run.log, about)
    elif checkpoint["changed"]:
        write_line(run.log, {"step": run.step, "changed": checkpoint["changed"]})
    announce(run, about)
    if config.loss.did_weight:
        reports = [study.report for study in splits["train"]]
        run.teacher = teacher_embeddings(model, reports, folder / "teacher.pt")
    if rank:  # each rank drops out by its own random numbers
        torch.manual_seed(settings.seed + rank)
    if checkpoint:
        set_random_state(checkpoint["random"][rank % len(checkpoint["random"])], device)
    if world > 1:
        run.parallel = shared_by_ranks(model)
    model.train()
    return run


# A step -------------------------------------------------------------------------------------------

def batches(run: Run) -> Iterator[dict]:
    """What is left of the run, batch by batch; of each, this rank's share."""
    while run.step < run.steps:
        yield from rest_of_epoch(run)


def rest_of_epoch(run: Run) -> DataLoader:
    """The batches of the epoch that `run.step` stands in, from there on."""
    settings, (rank, world) = run.config.train, ranks()
    epoch, done = divmod(run.step, run.epoch_steps)
    chosen = epoch_batches(len(run.dataset), settings.batch_size, settings.seed, epoch)
    chosen = chosen[done:done + run.steps - run.step]
    share = settings.batch_size // world
    own = [batch[rank * share:(rank + 1) * share] for batch in chosen]
    return loader(run.dataset, own, run.config.data.num_workers, run.model.device)


def on_device(batch: dict, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, report ids and y of a batch; from pinned memory, whose copies are not waited for."""
    device = run.model.device
    y = run.teacher(batch["indices"]) if run.teacher else None
    if y is not None and device.type == "cuda":
        y = y.pin_memory().to(device, non_blocking=True)
    return (batch["images"].to(device, non_blocking=True),
            batch["report_ids"].to(device, non_blocking=True), y)


def pulls_of_heads(terms: dict[str, Tensor], weights: configs.Loss,
                   visual_tokens: Tensor) -> dict[str, Tensor]:
    """The gradients of the weighted VSE and DID at X^e (B, S, D): only their heads lie between."""
    weighted = {"vse": weights.vse_weight, "did": weights.did_weight}
    return {name: torch.autograd.grad(weight * terms[name], visual_tokens, retain_graph=True)[0]
            for name, weight in weighted.items() if name in terms}


def read_back(values: dict[str, Tensor], pulls: dict[str, Tensor],
              stop_signal: int) -> tuple[dict[str, float], int]:
    """The numbers of a step, means over the ranks: the one time that a step waits for the device.

    Args:
        values: scalars.
        pulls: gradients at this rank's part of X^e; the norm over the whole batch is wanted.
        stop_signal: the one that this rank got, or 0.
    Returns:
        values and `pull_*`; the signal that any rank got, or 0.
    """
    world = ranks()[1]
    # A rank's gradient at X^e is `world` times the batch's, since DDP takes the mean: its square is
    # divided by `world` twice, here and below.
    squares = {f"pull_{name}": gradient.square().sum() / world for name, gradient in pulls.items()}
    names, rows = zip(*(values | squares).items())
    stop = torch.full_like(rows[0], float(stop_signal))
    numbers = torch.stack([*rows, stop]).detach() / world
    if world > 1:
        torch.distributed.all_reduce(numbers)
    *numbers, stop = numbers.tolist()
    found = dict(zip(names, numbers))
    found |= {name: math.sqrt(found[name]) for name in squares}
    return found, stop_signal or (signal.SIGTERM if stop else 0)


def require_finite(values: dict[str, float], run: Run) -> None:
    """ValueError that names the step and the term, before any weight or file has changed."""
    bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
    if bad is None:
        return
    what = "gradient" if bad.startswith(("gradient", "pull")) else f"{bad} loss"
    last = run.folder / "last.pt"
    hint = f" with --resume: {last} holds a step before it" if last.exists() else ""
    raise ValueError(f"step {run.step + 1}: the {what} is {values[bad]}; try a lower train.lr"
                     + hint)


def advice(log: TextIO, config: Config) -> list[str]:
    """What the last steps of log.jsonl say of terms that do not do their work: one line each.

    It reads through the open file: opening it again would give its lock away.
    """
    log.seek(0)
    lines = [json.loads(line) for line in log]
    lines = [line for line in lines if "did" in line][-ADVICE_LAST:]
    if not lines:
        return []

    def mean(key: str) -> float:
        return sum(line.get(key, 0) for line in lines) / len(lines)
    found, chance, n = [], math.log(config.train.batch_size), len(lines)
    if mean("did") > 0.98 * chance:
        found.append(f"DID is {mean('did'):.3f} over the last {n} steps, chance is {chance:.3f}: "
                     f"the encoder has learned nothing of the reports (is it pretrained?)")
    ratio = mean("pull_vse") / max(mean("pull_did"), 1e-12)
    if ratio > 10:
        found.append(f"VSE pulls the encoder {ratio:.0f} times as hard as DID over the last {n} "
                     f"steps; a higher loss.vse_temperature weakens it (A3)")
    return found


def log_step(run: Run, values: dict[str, float], batch: dict, seconds: float, bar: tqdm) -> None:
    """One line of log.jsonl; and the same numbers, fewer, at the progress bar."""
    world, tokens = ranks()[1], sum(batch["report_lengths"])
    epoch = (run.step - 1) // run.epoch_steps + 1
    line = {"step": run.step, "epoch": epoch, **values, "seconds": seconds,
            "studies_per_second": run.config.train.batch_size / seconds,
            "report_tokens_per_second": world * tokens / seconds,
            **peak_memory_gb(run.model.device)}
    write_line(run.log, line)
    if run.step == ADVICE_STEP and not ranks()[0]:
        for text in advice(run.log, run.config):
            tqdm.write(f"note: {text}")
    terms = {name: f"{line[name]:.3f}" for name in ("report", "vse", "did") if name in line}
    bar.update()
    bar.set_postfix(terms | {"studies/s": f"{line['studies_per_second']:.1f}"}, refresh=False)


def save(run: Run, name: str) -> None:
    """best.pt, or last.pt with all that a resumed run needs besides."""
    content = {"model": run.model.trained_state(), "config": run.config.to_dict(),
               "step": run.step, "best": run.best}
    rank, world = ranks()
    if name == "last.pt":
        randoms = [random_state(run.model.device)] * world
        if world > 1:
            torch.distributed.all_gather_object(randoms, random_state(run.model.device))
        content |= {"optimizer": run.optimizer.state_dict(), "random": randoms,
                    "validated": run.validated, "studies": run.studies}
    if not rank:
        write_atomically(run.folder / name, content)


def validate(run: Run) -> tuple[float, tuple[dict, dict] | None]:
    """Generate, score and log the val split.

    Returns: (BLEU-4 + CIDEr) / 2, by which best.pt is chosen, and what `write_reports` returned.
    """
    studies = run.splits["val"]
    if not studies:
        return 0.0, None
    started = time.perf_counter()
    if ranks()[1] > 1:  # BatchNorm remembers each rank's films: all write by the first one's (A11)
        for buffer in run.model.vision.buffers():
            torch.distributed.broadcast(buffer, 0)
    reports, _ = written = write_reports(run.model, studies)
    scores = score(reports, {study.id: study.report for study in studies}, meteor=False)
    distinct, seconds = len(set(reports.values())), time.perf_counter() - started
    val = scores | {"distinct": distinct}
    write_line(run.log, {"step": run.step, "val": val, "seconds": seconds})
    shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print(f"\nstep {run.step}: val {shown}, {distinct} different reports of {len(reports)}, "
          f"{seconds:.0f} s")
    return (scores["BLEU_4"] + scores["CIDEr"]) / 2, written


def validate_and_save(run: Run) -> None:
    value, written = validate(run)
    run.validated = True
    if value >= run.best:  # without a val split every value is 0: the last weights are the best
        run.best, run.written = value, written
        save(run, "best.pt")
    save(run, "last.pt")


class StopSignals:
    """SIGINT and SIGTERM end the step under way; outside one all is saved: they end the process."""

    def __enter__(self) -> "StopSignals":
        self.number, self.stepping = 0, False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def receive(self, number: int, frame) -> None:
        if not self.stepping:
            sys.exit(128 + number)
        self.number = number

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def signal_of_any_rank(run: Run, stop_signal: int) -> int:
    """The signal that came to this rank after `read_back`, SIGTERM for another rank's, or 0."""
    if ranks()[1] == 1:
        return stop_signal
    stop = torch.tensor(float(stop_signal), device=run.model.device)
    torch.distributed.all_reduce(stop)
    return stop_signal or (signal.SIGTERM if stop else 0)


def save_stop_validate(run: Run, stop_signal: int, signals: StopSignals) -> None:
    """Save after every so many steps, end where a signal asks for it, validate after an epoch."""
    last_of_epoch = run.step % run.epoch_steps == 0 or run.step == run.steps
    run.validated = not last_of_epoch
    every = run.config.train.save_every_steps or run.steps
    if stop_signal or last_of_epoch or run.step % every == 0:
        save(run, "last.pt")
    if last_of_epoch:
        signals.stepping = False  # all is saved: from here on a signal ends the process
        stop_signal = stop_signal or signal_of_any_rank(run, signals.number)
    if stop_signal:
        print(f"stopped at step {run.step}; --resume goes on from {run.folder / 'last.pt'}")
        sys.exit(128 + stop_signal)
    if last_of_epoch:
        validate_and_save(run)


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
    written = run.written if split == "val" else None
    return evaluate(run.model.eval(), split, run.splits, run.folder, best["step"], written)


def train(config: Config, resume: bool = False) -> dict | None:
    """Run the whole of a config, or the rest of it; returns the metrics of the final evaluation.

    SIGINT and SIGTERM end the step, save, and exit with the usual code (130, 143). Under torchrun
    each rank takes its part of every batch; losses, weights and files are those of one process, but
    where an encoder has BatchNorm, which sees one part (A11).
    """
    run = prepare(config, resume)
    settings, weights, model, optimizer = config.train, config.loss, run.model, run.optimizer
    bar = tqdm(total=run.steps, initial=run.step, desc="train", unit="step")
    with StopSignals() as signals, bar:
        if not run.validated:
            validate_and_save(run)
        started = time.perf_counter()
        for batch in batches(run):
            signals.stepping = True
            images, report_ids, y = on_device(batch, run)

            # Sec. 3.2 to 3.4: the terms, in bfloat16 where that is safe (A13)
            with model.autocast():
                terms, visual_tokens, did_top1 = run.parallel(
                    images, batch["view_counts"], report_ids, batch["report_lengths"], y)

            # Eq. 8. With A1's reading the VSE term may be negative, and so may the total (A2)
            loss = (weights.report_weight * terms["report"]
                    + weights.vse_weight * terms.get("vse", 0)
                    + weights.did_weight * terms.get("did", 0))

            # Backward. What pulls at X^e: VSE, DID, and, as the rest of the total, the report.
            pulls = pulls_of_heads(terms, weights, visual_tokens)
            visual_tokens.retain_grad()
            loss.backward()
            pulls["report"] = visual_tokens.grad - sum(pulls.values())

            # Clip (A13)
            norm = torch.nn.utils.clip_grad_norm_(run.parameters, settings.clip_norm)

            # Finite, or stop: nothing has changed yet
            values = {**terms, "total": loss, "gradient_norm": norm}
            if did_top1 is not None:
                values["did_top1"] = did_top1
            values, stop_signal = read_back(values, pulls, signals.number)
            require_finite(values, run)

            # Step
            lr = cosine_lr(run.step, run.steps, settings)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # now: none stands beside the next activations
            run.step += 1

            # Log
            seconds = max(time.perf_counter() - started, 1e-9)  # a clock may stand still
            log_step(run, values | {"lr": lr}, batch, seconds, bar)

            # Save, stop, validate: where it is time
            save_stop_validate(run, stop_signal, signals)
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
    train(config, args.resume)


if __name__ == "__main__":
    end_in_one_line(main)
