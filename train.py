"""Train VDGen with a hand-written loop (Sec. 3.4, Eq. 8; settings: Sec. 4.1.2 and A13), then score.

    python train.py --config configs/iu_xray.yaml [--resume] [--set section.key=value ...]
    torchrun --nproc_per_node 8 train.py --config configs/mimic_cxr.yaml     # one batch, by 8 GPUs

A run lives in runs/<config name>/: config.yaml, log.jsonl, teacher.pt (A5), last.pt (everything to
resume), best.pt. `train` reads from top to bottom; the few functions that it calls stand above it.
"""
import argparse
import json
import math
import os
import platform
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import peft
import torch
import torch.distributed
import transformers
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configs import Config, InputError, load_config, parse_config
from configs.files import read_checkpoint, write_whole
from configs.findings import read_findings
from data import (ReportDataset, Study, batches_from, build_demo_if_missing, digest,
                  end_in_one_line, loader, read_studies, require_images)
from evaluate import evaluate, score, write_reports
from model import (Teacher, VDGen, embed_reports, join_ranks, leave_ranks, load_model,
                   mean_over_ranks, ranks, require_folders)

# What --resume lets a person change: where and how a run is computed, what helps after trouble, how
# long it lasts, and where the models lie. Anything else makes another experiment.
FREE_TO_CHANGE = {
    "data.root", "data.num_workers", "train.output", "train.save_every_steps",
    "train.eval_batch_size", "train.recompute", "train.lr", "train.min_lr", "train.clip_norm",
    "train.weight_decay", "train.epochs", "train.max_steps",
    "model.vision", "model.llm", "model.teacher"}


def lock(folder: Path) -> TextIO:
    """Make the folder of a run, and lock it for as long as the returned file is open."""
    import fcntl  # not above: Windows has none, and configs/__init__.py says so in one line
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OSError(f"train.output: cannot write into {folder} ({error.strerror})") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"train.output: another process is training in {folder}; wait for it, or "
                         f"use another folder") from None
    except OSError as error:
        print(f"note: {folder}: this file system has no locks ({error.strerror}); start no second "
              f"run there")
    return file


def read_last(path: Path, config: Config) -> tuple[dict, dict]:
    """What a last.pt holds, and which settings have changed since: {"train.lr": the new one}.

    Raises InputError where one has changed that is not in FREE_TO_CHANGE.
    """
    keys = ("model", "optimizer", "config", "step", "studies")
    checkpoint = read_checkpoint(path, keys=keys)
    before = flattened(parse_config(checkpoint["config"], source=str(path)).to_dict())
    now, changed = flattened(config.to_dict()), {}
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if old != new and key not in FREE_TO_CHANGE:
            raise InputError(f"--resume: {path} was written with another config: {key} was {old}, "
                             f"is {new}. Use the same, or another train.output")
        if old != new:
            changed[key] = new
            print(f"--resume: {key} was {old}, is {new} from step {checkpoint['step'] + 1} on")
    return checkpoint, changed


def flattened(tree: dict, prefix: str = "") -> dict:
    """{"train.lr": 1e-4, ...} of a tree of settings."""
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        found |= flattened(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


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


def open_log(folder: Path, model: VDGen, config: Config, step: int, steps: int, studies: int,
             changed: dict) -> TextIO:
    """log.jsonl up to the line of a completed step: what stands behind it happens again.

    Prints what runs, too, and writes config.yaml. `changed`: the settings that --resume changed.
    """
    first, path, kept = header(model, config), folder / "log.jsonl", 0
    if ranks()[0]:
        return open(os.devnull, "w")
    log = path.open("a+", encoding="utf-8", buffering=1)
    log.seek(0)
    while step and (text := log.readline()).endswith("\n"):  # a kill may leave half a line
        try:
            line = dict(json.loads(text))
        except (ValueError, TypeError):
            raise InputError(f"{path}: not a line of a log: {text!r:.100}; remove it, or the whole "
                             f"file: last.pt needs none of it") from None
        at = line.get("step", 0)
        if at > step or at == step and "val" in line:
            break
        kept += len(text.encode())
    log.truncate(kept)
    if not kept:
        log.write(json.dumps(first) + "\n")
    if changed:
        log.write(json.dumps({"step": step, "changed": changed}) + "\n")
    write_whole(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    sizes = ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in first["parameters"].items())
    print(f"{folder}: {studies} training studies of {first['visual_tokens']} visual tokens, "
          f"{steps} steps of batch {config.train.batch_size}, on {first['device']}; parameters "
          f"{sizes}")
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no instruction for bfloat16
    if model.device.type == "cpu" and config.train.precision == "bf16" and only_avx2:
        print("note: this CPU computes bfloat16 slowly (AVX2); --set train.precision=fp32 takes a "
              "fraction of the time")
    return log


def validate(model: VDGen, studies: list[Study], step: int, best: float, folder: Path, log: TextIO,
             epoch: list[dict]) -> float:
    """Generate and score the val split; best.pt is that of the highest (BLEU-4 + CIDEr) / 2.

    Without a val split every value is 0: the last weights are the best. Returns the highest value.
    `epoch`: what the steps since the last validation logged; DID is shown beside chance.
    """
    value = 0.0
    if studies:
        started = time.perf_counter()
        if ranks()[1] > 1:  # BatchNorm remembers each rank's films: all use the first one's (A11)
            for buffer in model.vision.buffers():
                torch.distributed.broadcast(buffer, 0)
        reports, _ = write_reports(model, studies)
        scores = score(reports, {study.id: study.report for study in studies}, meteor=False)
        distinct, seconds = len(set(reports.values())), time.perf_counter() - started
        line = {"step": step, "val": scores | {"distinct": distinct}, "seconds": seconds}
        log.write(json.dumps(line, allow_nan=False) + "\n")
        shown = ", ".join(f"{name} {number:.3f}" for name, number in scores.items())
        shown += f", {distinct} different reports of {len(reports)}, {seconds:.0f} s"
        if epoch and "did" in epoch[0]:
            B = model.config.train.batch_size
            did, top1 = (np.mean([line[key] for line in epoch]) for key in ("did", "did_top1"))
            shown += (f"; training: DID {did:.3f} (chance {math.log(B):.3f}), did_top1 {top1:.3f} "
                      f"(chance {1 / B:.3f})")
        tqdm.write(f"step {step}: val {shown}")
        value = (scores["BLEU_4"] + scores["CIDEr"]) / 2
    if value >= best and not ranks()[0]:
        write_whole(folder / "best.pt", {"model": model.trained_state(), "step": step,
                                         "config": model.config.to_dict(), "best": value})
    return max(value, best)


def train(config: Config, resume: bool = False) -> dict | None:
    """Run the whole of a config, or the rest of it; returns the metrics of the final evaluation.

    Under torchrun each rank takes its part of every batch. Without dropout and stochastic depth,
    which are each rank's own, losses, weights and files are those of one process; BatchNorm sees
    one part (A11).
    """
    settings, weights, (rank, world) = config.train, config.loss, ranks()
    folder, checkpoint, changed = Path(settings.output), None, {}
    last_path, best_path = folder / "last.pt", folder / "best.pt"

    # The folder, ours until the results are written
    locked = None if rank else lock(folder)
    if not resume and (last_path.exists() or best_path.exists()):
        raise InputError(f"{folder} holds a run: add --resume to go on with it, or --set "
                         f"train.output=FOLDER for another")
    if resume and last_path.exists():
        checkpoint, changed = read_last(last_path, config)
    elif resume:
        print(f"--resume: there is no {last_path}; starting at step 0")

    # The data, and all that can be wrong with it
    require_folders(config.model)
    build_demo_if_missing(config.data)
    splits = read_studies(config.data)
    B, N = settings.batch_size, len(splits["train"])
    if N < B:
        raise InputError(f"train.batch_size: the {N} training studies of {config.data.root} do not "
                         f"fill one batch of {B} (A22); lower it, or raise data.limit")
    if B % world:
        raise InputError(f"train.batch_size: {B} studies cannot be shared by {world} ranks equally")
    if not rank:
        require_images(splits, config.data)
    read_findings(config.data, [study.id for name in ("val", "test") for study in splits[name]])
    epoch_steps, studies = N // B, digest(splits["train"])
    steps = min(settings.max_steps or math.inf, settings.epochs * epoch_steps)
    if checkpoint and checkpoint["studies"] != studies:
        raise InputError(f"--resume: {last_path} was trained on other studies than "
                         f"{config.data.root} holds now; use the same, or another train.output")

    # A finished run says where its results stand
    scored = next((name for name in ("test", "val") if splits[name]), None)
    results, best = folder / f"{scored}_metrics.json", {"best": -math.inf, "step": 0}
    if checkpoint and best_path.exists():
        best = read_checkpoint(best_path, keys=("best", "step"), mmap=True)
    if checkpoint and checkpoint["step"] >= steps and results.is_file():
        metrics = json.loads(results.read_text(encoding="utf-8"))
        if metrics["made_of"].get("step") == best["step"]:
            print(f"{folder}: all {steps} steps are done; the results stand in {results}")
            return metrics

    # Model and optimizer
    torch.manual_seed(settings.seed)
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
    device, parameters = model.device, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay,
                                  fused=True)

    # Where the run stands: last.pt, else init_from, else the start
    step, best = 0, best["best"]
    if checkpoint:
        model.load_trained_state(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = settings.weight_decay
        step = checkpoint["step"]
    elif settings.init_from:
        model.load_what_fits(read_checkpoint(settings.init_from)["model"])
    checkpoint = None  # its tensors are copied: free the memory

    # The log, up to there; and what a person sees
    log = open_log(folder, model, config, step, steps, N, changed)

    # The teacher (A5), and the model as several ranks share it: all have read the same weights
    teacher = None
    if weights.did_weight:
        reports = [study.report for study in splits["train"]]
        teacher = make_teacher(model, reports, folder / "teacher.pt")
    parallel = model if world == 1 else DistributedDataParallel(
        model, [device] if device.type == "cuda" else None, init_sync=False,
        broadcast_buffers=False)

    # The batches that are left; of each, this rank's share
    dataset = ReportDataset(splits["train"], config.data, model.image_size, model.tokenizer)
    chosen = islice(batches_from(step, N, B, settings.seed), max(0, steps - step))
    share = B // world
    own = (batch[rank * share:(rank + 1) * share] for batch in chosen)
    batches = loader(dataset, own, config.data.num_workers, device)

    save_every, epoch = settings.save_every_steps or steps, []
    with tqdm(total=steps, initial=step, desc="train", unit="step") as bar:
        if step and (step % epoch_steps == 0 or step >= steps):  # stopped before its validation
            best = validate(model, splits["val"], step, best, folder, log, epoch)
        started = time.perf_counter()
        for batch in batches:
            # All random numbers of a step come from here: --resume needs no others
            numbers = np.random.SeedSequence([settings.seed, step, rank])
            torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0]))

            # A batch on the device; y of its reports (A5)
            images = batch["images"].to(device, non_blocking=True)
            report_ids = batch["report_ids"].to(device, non_blocking=True)
            y = teacher(batch["indices"]) if teacher else None
            if teacher and device.type == "cuda":
                y = y.pin_memory().to(device, non_blocking=True)

            # Sec. 3.2 to 3.4: the terms, in bfloat16 where that is safe (A13)
            with model.autocast():
                terms, measures = parallel(
                    images, batch["view_counts"], report_ids, batch["report_lengths"], y)

            # Eq. 8. With A1's reading the VSE term may be negative, and so may the total (A2)
            loss = (weights.report_weight * terms["report"]
                    + weights.vse_weight * terms.get("vse", 0)
                    + weights.did_weight * terms.get("did", 0))

            # Backward, clip (A13)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)

            # Finite, or stop: nothing has changed yet. Here alone a step waits for the device
            values = {**terms, "total": loss, "gradient_norm": norm, **measures}
            rows = torch.stack([value.detach().float() for value in values.values()])
            values = dict(zip(values, mean_over_ranks(rows).tolist()))
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:
                raise InputError(f"step {step + 1}: {bad[0]} is {values[bad[0]]}; try a lower "
                                 f"train.lr, with --resume if there is a {last_path}: it holds a "
                                 f"step before")

            # Step, at the learning rate of half a cosine from lr down to min_lr (A13)
            height = (1 + math.cos(math.pi * step / steps)) / 2
            lr = settings.min_lr + (settings.lr - settings.min_lr) * height
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # now: none stands beside the next activations
            step += 1

            # Log
            line = {"step": step, "epoch": (step - 1) // epoch_steps + 1, **values, "lr": lr,
                    "seconds": time.perf_counter() - started}
            if device.type == "cuda":
                line |= {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
                         "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
            log.write(json.dumps(line, allow_nan=False) + "\n")
            bar.update()
            bar.set_postfix({name: f"{values[name]:.3f}" for name in terms}, refresh=False)

            # last.pt; then validate, and best.pt: a fault there costs the validation alone
            ends_epoch = step % epoch_steps == 0 or step == steps
            if not rank and (ends_epoch or step % save_every == 0):
                write_whole(last_path, {
                    "model": model.trained_state(), "optimizer": optimizer.state_dict(),
                    "config": config.to_dict(), "step": step, "studies": studies})
            epoch.append(line)
            if ends_epoch:
                best = validate(model, splits["val"], step, best, folder, log, epoch)
                epoch = []
            started = time.perf_counter()

    # best.pt on the test split when there is one, else on val
    if scored is None:
        return print("the annotation has no val and no test studies: nothing to evaluate")
    if world > 1:
        torch.distributed.barrier()  # the first rank has written best.pt
    checkpoint = read_checkpoint(best_path, keys=("model", "step"))
    model.load_trained_state(checkpoint["model"])
    model.step = checkpoint["step"]
    metrics = evaluate(model.eval(), scored, splits, folder, replace=True)
    if locked:
        locked.close()
    return metrics


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
    leave_ranks()


if __name__ == "__main__":
    end_in_one_line(main)
