"""Train VDGen with a hand-written loop (Sec. 3.4, Eq. 8; settings: Sec. 4.1.2 and A13), then score the test split.

    python train.py --config configs/iu_xray.yaml [--resume] [--set section.key=value ...]
    torchrun --nproc_per_node 8 train.py --config configs/mimic_cxr.yaml     # the same batch, losses and files, by 8 GPUs

A run lives in runs/<config name>/: config.yaml, log.jsonl, teacher.pt (A5), last.pt (everything to resume), best.pt.
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
from itertools import chain
from pathlib import Path

import peft
import torch
import torch.distributed
import transformers
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import configs
from configs import Config, load_config, parse_config
from data import (ReportDataset, build_demo_if_missing, collate, end_in_one_line, epoch_batches, read_studies,
                  require_images)
from evaluate import evaluate, score, write_reports
from model import Teacher, VDGen, embed_reports, flop_counts, join_ranks, load_model, ranks, read_checkpoint

# What --resume lets a person change: where and how a run is computed, and what helps after trouble. The rest makes
# another experiment.
FREE_TO_CHANGE = {"data.root", "data.num_workers", "data.cache_images", "train.output", "train.save_every_steps",
                  "train.eval_batch_size", "train.recompute", "train.lr", "train.min_lr", "train.clip_norm",
                  "train.weight_decay"}
FREE_TO_RAISE = {"train.epochs", "train.max_steps"}
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
               "RTX 3090": 71}  # NVIDIA's data sheets: bf16 tensor cores, dense


def cosine_lr(step: int, steps: int, train: configs.Train) -> float:
    """A13: the learning rate of a step (from 0), falling from `train.lr` to `train.min_lr` along half a cosine."""
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


def write_atomically(path: Path, content: dict) -> None:
    """A checkpoint under a temporary name, then renamed: a stop while writing leaves the previous one whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({' '.join(str(error).split())[:200]}); the one before it is whole") from None


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far: of allocated GPU memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def teacher_embeddings(model: VDGen, reports: list[str], path: Path) -> Teacher:
    """A5: y of each training study, in their order.

    What the teacher says of the different reports is read from `path` if it holds just these by this teacher, else
    computed and kept there.
    """
    names, texts = model.config.model, sorted(set(reports))
    key = {"teacher": names.teacher or names.llm, "precision": model.config.train.precision, "texts": texts}
    rank, world = ranks()
    if rank:
        torch.distributed.barrier()  # the first rank computes them
    kept = read_checkpoint(path, "the teacher", ("key", "embeddings")) if path.is_file() else {}
    if kept.get("key") != key:
        embeddings = embed_reports(model, reports)
        kept = {"key": key, "embeddings": torch.stack([embeddings[text] for text in key["texts"]])}
        write_atomically(path, kept)
    if world > 1 and not rank:
        torch.distributed.barrier()
    row = {text: i for i, text in enumerate(texts)}
    return Teacher(kept["embeddings"], torch.tensor([row[report] for report in reports]))


def open_run(config: Config, resume: bool) -> tuple[Path, dict | None]:
    """The run folder, and what its last.pt holds if the run goes on from it."""
    folder = Path(config.train.output)
    last = folder / "last.pt"
    if last.exists() and not resume:
        raise ValueError(f"{last} exists: add --resume to go on with that run, or --set train.output=FOLDER for another")
    checkpoint = None
    if resume and not last.exists():
        print(f"--resume: there is no {last}; starting at step 0")
    elif resume:
        checkpoint = read_checkpoint(last, keys=("model", "config", "optimizer", "step", "best", "random", "validated"))
        parse_config(checkpoint["config"], source=str(last))  # one line for what an older version wrote
        before, now = _flat(checkpoint["config"]), _flat(config.to_dict())
        changed = {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys())
                   if before.get(k) != now.get(k)}
        fixed = [f"{k} was {old}, is {new}" for k, (old, new) in changed.items() if k not in FREE_TO_CHANGE
                 and not (k in FREE_TO_RAISE and (new or math.inf) > (old or math.inf))]
        if fixed:
            raise ValueError(f"--resume: {last} was written with another config: {'; '.join(fixed)}. Use the same, or "
                             f"another train.output")
        checkpoint["changed"] = {k: new for k, (old, new) in changed.items()}
        for k, (old, new) in changed.items():
            print(f"--resume: {k} was {old}, is {new} from step {checkpoint['step'] + 1} on")
    return folder, checkpoint


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def open_log(path: Path, step: int, validated: bool):
    """log.jsonl, locked against a second run, and without what lies behind `step` (and its validation): that is run again."""
    if ranks()[0]:
        return open(os.devnull, "a")
    file = path.open("a+", encoding="utf-8", buffering=1)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
    except OSError:
        raise ValueError(f"{path.parent}: another process is training in this folder; wait for it, or use another "
                         f"train.output") from None
    file.seek(0)
    kept = 0
    while step and (text := file.readline()).endswith("\n"):  # a killed run may have left half a line
        line = json.loads(text)
        if line.get("step", 0) > step or line.get("step") == step and "val" in line and not validated:
            break
        kept += len(text.encode())
    file.truncate(kept)
    return file


def pulls(terms: dict[str, Tensor], weights: configs.Loss, visual_tokens: Tensor) -> dict[str, Tensor]:
    """The gradients of the weighted VSE and DID at X^e (B, S, D), on the way of which only their heads lie."""
    weighted = {"vse": weights.vse_weight, "did": weights.did_weight}
    return {name: torch.autograd.grad(weighted[name] * terms[name], visual_tokens, retain_graph=True)[0]
            for name in terms if name in weighted}


def advice(log_file, config: Config, last: int = 50) -> list[str]:
    """What the last steps of log.jsonl say of terms that do not do their work: one line each, for a person.

    It reads through the open file: opening it again would give its lock away.
    """
    log_file.seek(0)
    lines = [json.loads(line) for line in log_file]
    lines = [line for line in lines if "did" in line][-last:]
    if not lines:
        return []

    def mean(key: str) -> float:
        return sum(line.get(key, 0) for line in lines) / len(lines)
    found, chance = [], math.log(config.train.batch_size)
    if mean("did") > 0.98 * chance:
        found.append(f"DID is {mean('did'):.3f} over the last {len(lines)} steps, and chance is {chance:.3f}: the encoder "
                     f"has learned nothing of the reports (a pretrained one? another train.lr?)")
    if mean("pull_vse") > 10 * mean("pull_did"):
        found.append(f"VSE pulls the encoder {mean('pull_vse') / mean('pull_did'):.0f} times as hard as DID over the last "
                     f"{len(lines)} steps; a higher loss.vse_temperature weakens it (A3)")
    return found


def header(model: VDGen, config: Config) -> dict:
    """The first line of log.jsonl: what ran, with what, on what."""
    def count(module, trained: bool | None = None) -> int:
        return sum(p.numel() for p in module.parameters() if trained is None or p.requires_grad == trained)
    device = model.device
    return {"arguments": config.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU, {torch.get_num_threads()} threads",
            "ranks": ranks()[1],
            "parameters": {"trained": count(model, True), "frozen": count(model, False), "vision": count(model.vision),
                           "lora": count(model.llm, True)}}


def train(config: Config, resume: bool = False) -> dict | None:
    """Run the whole of a config, or the rest of it; returns the metrics of the final evaluation.

    SIGINT and SIGTERM end the step, save, and exit with the usual code (130, 143). Under torchrun each rank takes its part
    of every batch, and losses, weights and files are those of one process.
    """
    settings, weights = config.train, config.loss
    (rank, world), local = ranks(), int(os.environ.get("LOCAL_RANK", 0))
    folder, checkpoint = open_run(config, resume)
    build_demo_if_missing(config.data)
    splits = read_studies(config.data)
    if len(splits["train"]) < settings.batch_size:
        raise ValueError(f"train.batch_size: {len(splits['train'])} training studies do not fill one batch of "
                         f"{settings.batch_size} (A22); lower it, or raise data.limit")
    if settings.batch_size % world:
        raise ValueError(f"train.batch_size: {settings.batch_size} studies cannot be shared by {world} ranks equally")
    require_images(splits, config.data)
    torch.manual_seed(settings.seed)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(config).to(device)
    dataset = ReportDataset(splits["train"], config.data, model.image_size, model.tokenizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    epoch_steps = len(dataset) // settings.batch_size
    steps = min(settings.max_steps or math.inf, settings.epochs * epoch_steps)
    step, best, best_written, validated = 0, -math.inf, None, True
    if checkpoint:
        model.load_trained_state(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = settings.weight_decay  # it may have been changed
        step, best, validated = checkpoint["step"], checkpoint["best"], checkpoint["validated"]
    folder.mkdir(parents=True, exist_ok=True)
    log_file = open_log(folder / "log.jsonl", step, validated)
    if not rank:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    about = header(model, config)
    if not step:
        log_file.write(json.dumps(about) + "\n")
    elif checkpoint["changed"]:
        log_file.write(json.dumps({"step": step, "changed": checkpoint["changed"]}) + "\n")
    teacher = teacher_embeddings(model, [study.report for study in splits["train"]], folder / "teacher.pt") \
        if weights.did_weight else None
    print(f"{folder}: {len(dataset)} training studies, {steps} steps of batch {settings.batch_size}, lr {settings.lr} to "
          f"{settings.min_lr}, on {about['device']}; parameters "
          + ", ".join(f"{name} {value / 1e6:.2f} M" for name, value in about["parameters"].items()))
    if rank:  # each rank drops out by its own random numbers
        torch.manual_seed(settings.seed + rank)
    if checkpoint:
        set_random_state(checkpoint["random"][rank % len(checkpoint["random"])], device)
    parallel = model
    if world > 1:  # all ranks have read the same LLM: it is not sent around again
        model._ddp_params_and_buffers_to_ignore = [
            name for name, value in chain(model.named_parameters(), model.named_buffers()) if not value.requires_grad]
        parallel = DistributedDataParallel(model, [local] if device.type == "cuda" else None)

    def save(name: str) -> None:
        content = {"model": model.trained_state(), "config": config.to_dict(), "step": step, "best": best}
        if name == "last.pt":
            randoms = [random_state(device)] * world
            if world > 1:
                torch.distributed.all_gather_object(randoms, random_state(device))
            content |= {"optimizer": optimizer.state_dict(), "random": randoms, "validated": validated}
        if not rank:
            write_atomically(folder / name, content)

    def validate_and_save() -> None:
        nonlocal best, best_written, validated
        value, written = validate(model, splits, step, log_file)
        validated = True
        if value >= best:  # without a val split every value is 0: the last weights are the best known
            best, best_written = value, written
            save("best.pt")
        save("last.pt")

    stop, stepping = [], False

    def on_signal(number: int, frame) -> None:
        if not stepping:  # all is saved
            sys.exit(128 + number)
        stop.append(number)
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    if not validated:
        validate_and_save()
    flops = flop_counts(model)
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in about["device"]), None)
    bar = tqdm(total=steps, initial=step, desc="train", unit="step", mininterval=1)
    share = settings.batch_size // world
    while step < steps:
        epoch, position = divmod(step, epoch_steps)
        batches = epoch_batches(len(dataset), settings.batch_size, settings.seed, epoch)[position:steps - step + position]
        loader = DataLoader(dataset, batch_sampler=[batch[rank * share:(rank + 1) * share] for batch in batches],
                            num_workers=config.data.num_workers, collate_fn=collate, pin_memory=device.type == "cuda",
                            generator=torch.Generator())
        stepping, started = True, time.perf_counter()
        for batch in loader:
            images = batch["images"].to(device, non_blocking=True)
            report_ids = batch["report_ids"].to(device, non_blocking=True)
            y = teacher(batch["indices"]).to(device) if teacher else None
            with model.autocast():
                terms, visual_tokens, did_top1 = parallel(
                    images, batch["view_counts"], report_ids, batch["report_lengths"], y)
            # Eq. 8. With A1's reading of Eq. 3 the VSE term is negative, and so may the total be (A2).
            loss = (weights.report_weight * terms["report"] + weights.vse_weight * terms.get("vse", 0)
                    + weights.did_weight * terms.get("did", 0))
            visual_tokens.retain_grad()
            pull = pulls(terms, weights, visual_tokens)
            loss.backward()
            pull = {"report": visual_tokens.grad - sum(pull.values())} | pull  # what is left of the total is the report's
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)

            measured = {**terms, "total": loss, "gradient": gradient_norm}
            measured |= {f"pull_{name}": gradient.square().sum() / world for name, gradient in pull.items()}
            measured |= {"did_top1": did_top1} if teacher else {}
            measured["stop"] = torch.full_like(loss, len(stop))
            values = torch.stack(list(measured.values())).detach() / world
            if world > 1:
                torch.distributed.all_reduce(values)  # the means over the ranks; and whether any was told to stop
            values = dict(zip(measured, values.tolist()))  # the one time that a step waits for the device
            stopped = values.pop("stop")
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad:  # nothing has changed yet: no weight, no file
                what = "gradient" if bad[0].startswith(("gradient", "pull")) else f"{bad[0]} loss"
                raise ValueError(f"step {step + 1}: the {what} is {values[bad[0]]}; try a lower train.lr"
                                 + (f" with --resume: {folder / 'last.pt'} holds a step before it"
                                    if (folder / "last.pt").exists() else ""))
            lr = optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # now: no gradient stands beside the activations of the next forward
            step += 1

            values |= {f"pull_{name}": math.sqrt(values[f"pull_{name}"]) for name in pull}
            line = {"step": step, "epoch": epoch + 1, **values, "lr": lr}
            line["gradient_norm"] = line.pop("gradient")
            seconds, started = time.perf_counter() - started, time.perf_counter()
            tokens = sum(batch["report_lengths"])
            flop = flops["image"] * len(images) + flops["report_token"] * tokens
            flop += flops["token"] * (share * (flops["prompt"] - 1) + tokens)
            tflop = world * flop / 1e12  # of the other ranks as of this one
            line |= {"seconds": seconds, "studies_per_second": settings.batch_size / seconds,
                     "report_tokens_per_second": world * tokens / seconds, "tflops_per_second": tflop / seconds,
                     "peak_memory_gb": peak_memory_gb(device)}
            if peak:
                line["share_of_peak"] = tflop / seconds / (world * peak)
            log_file.write(json.dumps(line) + "\n")
            if step == 200 and not rank:
                for text in advice(log_file, config):
                    tqdm.write(f"note: {text}")
            bar.update()
            speed = {"studies/s": f"{line['studies_per_second']:.1f}", "TFLOP/s": f"{line['tflops_per_second']:.2f}"}
            if peak:
                speed["of peak"] = f"{line['share_of_peak']:.0%}"
            bar.set_postfix({name: f"{line[name]:.3f}" for name in terms} | speed, refresh=False)

            last_of_epoch = step % epoch_steps == 0 or step == steps
            validated = not last_of_epoch
            if stopped or last_of_epoch or settings.save_every_steps and step % settings.save_every_steps == 0:
                save("last.pt")
            if stopped:
                print(f"stopped at step {step}; --resume goes on from {folder / 'last.pt'}")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
            if last_of_epoch:
                stepping = False
                validate_and_save()
                started = time.perf_counter()
    bar.close()
    log_file.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)

    split = next((name for name in ("test", "val") if splits[name]), None)
    if split is None:
        return print("the annotation has no val and no test studies: nothing to evaluate")
    if world > 1:
        torch.distributed.barrier()  # the first rank has written best.pt
    model.load_trained_state(read_checkpoint(folder / "best.pt")["model"])
    return evaluate(model.eval(), split, splits, folder, best_written if split == "val" else None)


def validate(model: VDGen, splits: dict, step: int, log_file) -> tuple[float, tuple[dict, dict] | None]:
    """Generate, score and log the val split.

    Returns: (BLEU-4 + CIDEr) / 2, by which best.pt is chosen, and what `write_reports` returned.
    """
    if not splits["val"]:
        return 0.0, None
    started = time.perf_counter()
    reports, _ = written = write_reports(model, splits["val"])
    scores = score(reports, {study.id: study.report for study in splits["val"]}, meteor=False)
    distinct = len(set(reports.values()))
    line = {"step": step, "val": scores | {"distinct": distinct}, "seconds": time.perf_counter() - started}
    log_file.write(json.dumps(line) + "\n")
    print(f"\nstep {step}: val " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
          + f", {distinct} different reports of {len(reports)}, {line['seconds']:.0f} s")
    return (scores["BLEU_4"] + scores["CIDEr"]) / 2, written


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last.pt of the run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    join_ranks()
    train(config, args.resume)


if __name__ == "__main__":
    end_in_one_line(main)
