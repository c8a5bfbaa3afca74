"""Train VDGen with a hand-written loop (Sec. 3.4, Eq. 8; settings: Sec. 4.1.2 and A13), then score the test split.

    python train.py --config configs/iu_xray.yaml [--resume] [--set section.key=value ...]

A run lives in runs/<config name>/: config.yaml, log.jsonl, teacher.pt (A5), last.pt (everything to resume), best.pt.
"""
import argparse
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
import yaml
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import configs
from configs import Config, load_config
from data import ReportDataset, build_demo_if_missing, collate, epoch_batches, read_studies, require_images
from evaluate import evaluate, score, write_reports
from model import VDGen, embed_reports, load_model, read_checkpoint

FREE_TO_CHANGE = {"data.root", "data.num_workers", "train.output", "train.save_every_steps", "train.eval_batch_size"}


def cosine_lr(step: int, steps: int, train: configs.Train) -> float:
    """A13: the learning rate of a step (from 0), falling from `train.lr` to `train.min_lr` along half a cosine."""
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


def write_atomically(path: Path, content: dict) -> None:
    """A checkpoint under a temporary name, then renamed: a stop while writing leaves the previous one whole."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def peak_memory_gb(device: torch.device) -> float:
    """Peak so far: of allocated GPU memory, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def teacher_embeddings(model: VDGen, reports: list[str], path: Path) -> dict[str, Tensor]:
    """A5: y for each report, read from `path` if it holds just these reports by this teacher, else computed and kept."""
    names = model.config.model
    key = {"teacher": names.teacher or names.llm, "precision": model.config.train.precision, "texts": sorted(set(reports))}
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if kept["key"] == key:
            return dict(zip(key["texts"], kept["embeddings"]))
    embeddings = embed_reports(model, reports)
    write_atomically(path, {"key": key, "embeddings": torch.stack([embeddings[text] for text in key["texts"]])})
    return embeddings


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
        checkpoint = read_checkpoint(last)
        before, now = _flat(checkpoint["config"]), _flat(config.to_dict())
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in FREE_TO_CHANGE)
        if changed:
            raise ValueError(f"--resume: {last} was written with another config: " + "; ".join(
                f"{k} was {before.get(k)}, is {now.get(k)}" for k in changed) + ". Use the same, or another train.output")
    return folder, checkpoint


def _flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


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
            "parameters": {"trained": count(model, True), "frozen": count(model, False), "vision": count(model.vision),
                           "lora": count(model.llm, True)}}


def train(config: Config, resume: bool = False) -> dict | None:
    """Run the whole of a config, or the rest of it; returns the metrics of the final evaluation."""
    settings, weights = config.train, config.loss
    folder, checkpoint = open_run(config, resume)
    build_demo_if_missing(config.data)
    splits = read_studies(config.data)
    if len(splits["train"]) < settings.batch_size:
        raise ValueError(f"train.batch_size: {len(splits['train'])} training studies do not fill one batch of "
                         f"{settings.batch_size} (A22); lower it, or raise data.limit")
    require_images(splits, config.data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(config).to(device)
    dataset = ReportDataset(splits["train"], config.data.root, model.image_size, model.tokenizer,
                            config.data.max_report_tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    epoch_steps = len(dataset) // settings.batch_size
    steps = min(settings.max_steps or math.inf, settings.epochs * epoch_steps)
    teacher = teacher_embeddings(model, [study.report for study in splits["train"]], folder / "teacher.pt") \
        if weights.did_weight else None
    log = [header(model, config)]
    step, best, best_reports = 0, -math.inf, None
    if checkpoint:
        model.load_trained_state(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, best = checkpoint["step"], checkpoint["best"]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        log = [line for line in log if line.get("step", 0) <= step]  # steps behind the checkpoint are run again
        set_random_state(checkpoint["random"], device)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    print(f"{folder}: {len(dataset)} training studies, {steps} steps of batch {settings.batch_size}, lr {settings.lr} to "
          f"{settings.min_lr}, on {log[0]['device']}; parameters "
          + ", ".join(f"{name} {value / 1e6:.2f} M" for name, value in log[0]["parameters"].items()))

    bar = tqdm(total=steps, initial=step, desc="train", unit="step", mininterval=1)
    log_file = (folder / "log.jsonl").open("a", buffering=1)
    model.train()
    while step < steps:
        epoch, position = divmod(step, epoch_steps)
        batches = epoch_batches(len(dataset), settings.batch_size, settings.seed, epoch)[position:steps - step + position]
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.data.num_workers, collate_fn=collate,
                            pin_memory=device.type == "cuda", generator=torch.Generator())
        started = time.perf_counter()
        for batch in loader:
            images = batch["images"].to(device, non_blocking=True)
            report_ids = batch["report_ids"].to(device, non_blocking=True)
            report_lengths = batch["report_lengths"].to(device, non_blocking=True)
            y = torch.stack([teacher[text] for text in batch["reports"]]).to(device) if teacher else None
            with model.autocast():
                terms = model(images, batch["view_counts"], report_ids, report_lengths, y)
            # Eq. 8. With A1's reading of Eq. 3 the VSE term is negative, and so may the total be (A2).
            loss = (terms["report"] + weights.vse_weight * terms.get("vse", 0) + weights.did_weight * terms.get("did", 0))
            if not loss.isfinite():
                name = next((name for name, term in terms.items() if not term.isfinite()), "total")
                raise ValueError(f"step {step + 1}: the {name} loss is {terms.get(name, loss).item()}; the weights of "
                                 f"the last save are in {folder / 'last.pt'} if there was one; try a lower train.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            lr = optimizer.param_groups[0]["lr"] = cosine_lr(step, steps, settings)
            optimizer.step()
            step += 1

            line = {"step": step, "epoch": epoch + 1, **{name: term.item() for name, term in terms.items()},
                    "total": loss.item(), "lr": lr, "gradient_norm": gradient_norm.item()}
            seconds, started = time.perf_counter() - started, time.perf_counter()
            line |= {"seconds": seconds, "studies_per_second": len(batch["ids"]) / seconds,
                     "report_tokens_per_second": int(batch["report_lengths"].sum()) / seconds,
                     "peak_memory_gb": peak_memory_gb(device)}
            log_file.write(json.dumps(line) + "\n")
            bar.update()
            bar.set_postfix({name: f"{line[name]:.3f}" for name in terms}
                            | {"studies/s": f"{line['studies_per_second']:.1f}"}, refresh=False)

            last_of_epoch = step % epoch_steps == 0 or step == steps
            if last_of_epoch:
                value, reports = validate(model, splits, step, log_file)
                if value >= best:  # without a val split every value is 0: the last weights are the best known
                    best, best_reports = value, reports
                    write_atomically(folder / "best.pt", {"model": model.trained_state(), "config": config.to_dict(),
                                                          "step": step, "best": best})
            if last_of_epoch or settings.save_every_steps and step % settings.save_every_steps == 0:
                write_atomically(folder / "last.pt", {
                    "model": model.trained_state(), "optimizer": optimizer.state_dict(), "config": config.to_dict(),
                    "step": step, "best": best, "random": random_state(device)})
            started = time.perf_counter() if last_of_epoch else started
    bar.close()
    log_file.close()

    split = next((name for name in ("test", "val") if splits[name]), None)
    if split is None:
        return print("the annotation has no val and no test studies: nothing to evaluate")
    model.load_trained_state(read_checkpoint(folder / "best.pt")["model"])
    return evaluate(model.eval(), split, splits, folder, best_reports if split == "val" else None)


def validate(model: VDGen, splits: dict, step: int, log_file) -> tuple[float, dict[str, str] | None]:
    """Generate and score the val split, log it; returns (BLEU-4 + CIDEr) / 2, by which best.pt is chosen, and the reports."""
    if not splits["val"]:
        return 0.0, None
    started = time.perf_counter()
    reports = write_reports(model, splits["val"])
    scores = score(reports, {study.id: study.report for study in splits["val"]}, meteor=False)
    distinct = len(set(reports.values()))
    line = {"step": step, "val": scores | {"distinct": distinct}, "seconds": time.perf_counter() - started}
    log_file.write(json.dumps(line) + "\n")
    tqdm.write(f"step {step}: val " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
               + f", {distinct} different reports of {len(reports)}, {line['seconds']:.0f} s")
    return (scores["BLEU_4"] + scores["CIDEr"]) / 2, reports


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
    train(load_config(args.config, args.set), args.resume)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
