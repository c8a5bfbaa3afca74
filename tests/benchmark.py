"""Seconds and memory of a training step, of decoding and of reading images, on a CPU or a GPU.

    python tests/benchmark.py [--config configs/iu_xray_small.yaml] [--only training] [--set ...]
    python tests/benchmark.py --paper [--batch 64]    # on a GPU: the paper's sizes, random weights

Training and reading stand beside the textbook way, that of repositories of this family: every
report padded to the limit, logits and loss over all positions, an attention mask, the prompt
tokenised and embedded in each step, views encoded one by one, the teacher run in every step, images
through PIL and the Hugging Face processor. Same weights, batch, attention and autocast. Decoding is
the library's; on a GPU it runs with a growing and with a static cache, which is compiled.
All calls of a part run in turn; shown is the median of the rounds after the first one.
"""
import argparse
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import PROMPT, InputError, load_config  # noqa: E402
from conftest import REPORTS, REPOSITORY, paper_model  # noqa: E402
from data import (ReportDataset, end_in_one_line, loader, read_image,  # noqa: E402
                  read_studies)
from losses import did_loss, vse_loss  # noqa: E402
from model import VDGen, embed_reports, load_model  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# The textbook step --------------------------------------------------------------------------------

def textbook_encode(model: VDGen, images: Tensor, view_counts: list[int]) -> Tensor:
    """X^e (B, S, D), the views one by one: first those of all studies, then the second ones."""
    if len(set(view_counts)) > 1:
        raise InputError("the textbook step wants the same number of views in every study")
    pixels = (images.to(model.device).float() / 255 - model.image_mean) / model.image_std
    tokens = []
    for views in pixels.unflatten(0, (-1, view_counts[0])).unbind(dim=1):
        hidden = model.vision(views).last_hidden_state
        hidden = hidden.flatten(2).mT if hidden.dim() == 4 else hidden
        tokens.append(model.norm(hidden.float()))
    return torch.stack(tokens).mean(dim=0)


def textbook_prompt(model: VDGen, visual_tokens: Tensor) -> Tensor:
    """Tokenised and embedded anew: (B, P, D_h) from visual tokens (B, S, D)."""
    B, embed = len(visual_tokens), model.causal_lm.get_input_embeddings()

    def embed_ids(ids: list[int]) -> Tensor:
        return embed(torch.tensor([ids], device=model.device)).expand(B, -1, -1)
    before, after = model.tokenizer(list(PROMPT), add_special_tokens=False).input_ids
    before = embed_ids(model.bos_ids + before)
    projected = model.visual_projection(visual_tokens).to(before.dtype)
    return torch.cat([before, projected, embed_ids(after)], dim=1)


@torch.no_grad()
def textbook_teacher(model: VDGen, ids: Tensor, kept: Tensor) -> Tensor:
    """y (B, D_h) of padded reports: the LLM with its LoRA off. `kept` (B, T) bool: no padding."""
    one = torch.ones_like(kept[:, :1])
    bos = torch.full_like(ids[:, :1], model.tokenizer.bos_token_id)
    counted = torch.cat([~one, kept & (ids != model.eos_id)], dim=1)
    mask = torch.cat([one, kept], dim=1)
    was_training = model.training
    model.eval()
    with model.llm.disable_adapter():
        hidden = model.causal_lm.base_model(
            input_ids=torch.cat([bos, ids], dim=1), attention_mask=mask.long(), use_cache=False)
    model.train(was_training)
    hidden = hidden.last_hidden_state.float()
    return (hidden * counted[..., None]).sum(dim=1) / counted.sum(dim=1, keepdim=True)


def textbook_terms(model: VDGen, images: Tensor, view_counts: list[int], reports: list[str],
                   limit: int) -> dict[str, Tensor]:
    """The terms of Eq. 8 as the peers compute them: nothing is kept from one step to the next.

    Args:
        images: (sum of view_counts, 3, H, W) uint8, every study with the same number of views.
        reports: B texts.
        limit: tokens of a report, EOS left out.
    """
    llm, loss, device = model.causal_lm, model.config.loss, model.device
    visual_tokens = textbook_encode(model, images, view_counts)
    prompt = textbook_prompt(model, visual_tokens)
    rows = [ids + [model.eos_id] if len(ids) <= limit else ids[:limit]
            for ids in model.tokenizer(reports, add_special_tokens=False).input_ids]
    ids = torch.tensor([row + [0] * (limit + 1 - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    kept = torch.arange(limit + 1, device=device) < lengths[:, None]
    inputs = torch.cat([prompt, llm.get_input_embeddings()(ids)], dim=1)
    mask = torch.cat([kept.new_ones(prompt.shape[:2]), kept], dim=1)
    labels = torch.cat([ids.new_full(prompt.shape[:2], -100), ids.masked_fill(~kept, -100)], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).logits.float()
    report = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    y = textbook_teacher(model, ids, kept)
    with torch.autocast(device.type, enabled=False):
        h = visual_tokens.mean(dim=1)
        z = model.vse_head(h)
        vse = vse_loss(z, loss.vse_temperature, loss.vse_self_in_denominator)
        did = did_loss(h, model.did_head(y), loss.did_temperature)
    return {"report": report, "vse": vse, "did": did}


# Both steps on one batch --------------------------------------------------------------------------

class Work:
    """A model, a batch of studies with two views each, and both steps on it."""

    def __init__(self, options, *overrides: str):
        torch.manual_seed(0)
        config = load_config(options.config, [*options.set, *overrides])
        if options.paper:
            self.model = paper_model(config=config, device=DEVICE.type)
            items = made_up_studies(self.model, options.batch)
        else:
            self.model = load_model(config).to(DEVICE).train()
            studies = read_studies(config.data)["train"]
            studies = [study for study in studies if len(study.image_paths) == 2][:options.batch]
            items = ReportDataset(studies, config.data, self.model.image_size, self.model.tokenizer)
        self.batch = next(loader(items, [list(range(len(items)))], 0, DEVICE))
        self.images, self.view_counts = self.batch["images"].to(DEVICE), self.batch["view_counts"]
        self.limit = config.data.max_report_tokens
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        embeddings = embed_reports(self.model, self.batch["reports"])
        y = torch.stack([embeddings[text] for text in self.batch["reports"]])
        self.y = y.float().to(DEVICE)  # not standardised, as the textbook's

    def terms(self, textbook: bool) -> dict[str, Tensor]:
        batch, ids = self.batch, self.batch["report_ids"].to(DEVICE)
        with self.model.autocast():
            if textbook:
                return textbook_terms(self.model, self.images, self.view_counts, batch["reports"],
                                      self.limit)
            return self.model(self.images, self.view_counts, ids, batch["report_lengths"],
                              self.y)[0]

    def step(self, textbook: bool) -> None:
        sum(self.terms(textbook).values()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def llm_part(self, textbook: bool) -> None:
        """Forward and backward of a step behind the encoder, from random visual tokens."""
        B, D = len(self.view_counts), self.model.norm.weight.shape[0]
        visual_tokens = torch.randn(B, 49, D, device=DEVICE, requires_grad=True)
        with (patch.object(self.model, "encode", lambda *_: visual_tokens),
              patch(f"{__name__}.textbook_encode", lambda *_: visual_tokens)):
            sum(self.terms(textbook).values()).backward()
        self.optimizer.zero_grad(set_to_none=True)


def made_up_studies(model: VDGen, number: int) -> list[dict]:
    """Items of `ReportDataset`: noise for images, reports of 2 to 8 sentences."""
    draw, items = random.Random(0), []
    for i in range(number):
        report = " ".join(draw.choices(REPORTS, k=draw.randint(2, 8)))
        ids = model.tokenizer(report, add_special_tokens=False).input_ids
        images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
        items.append({"index": i, "id": str(i), "report": report, "images": images,
                      "report_ids": ids[:model.config.data.max_report_tokens]})
    return items


# Measuring ----------------------------------------------------------------------------------------

def alternating(calls: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of each call, all of them in turn in every round: (the first, median of the rest)."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: (first, median(rest)) for name, (first, *rest) in seconds.items()}


def peak_memory() -> str:
    """Of a GPU so far, or of this process."""
    if DEVICE.type == "cpu":
        return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"peak {allocated / 1e9:.1f} GB allocated, {reserved / 1e9:.1f} GB reserved"


def benchmark_training(options) -> None:
    work, teraflops = Work(options), {}
    kinds = {"textbook": True, "ours": False}
    for name, textbook in kinds.items():
        with FlopCounterMode(display=False) as counter:
            work.step(textbook)
        teraflops[name] = counter.get_total_flops() / 1e12
    calls = {name: partial(work.step, textbook) for name, textbook in kinds.items()}
    calls |= {f"{name}, LLM part": partial(work.llm_part, textbook)
              for name, textbook in kinds.items()}
    B = len(work.view_counts)
    for name, (_, seconds) in alternating(calls, options.rounds).items():
        print(f"training, {name}: {seconds:.3f} s a step, {B / seconds:.2f} studies/s", flush=True)
        if name in teraflops:
            print(f"  {teraflops[name]:.2f} TFLOP, {teraflops[name] / seconds:.2f} TFLOP/s")


def peak_of_steps(options, textbook: bool, recompute: bool) -> str:
    work = Work(options, f"train.recompute={str(recompute).lower()}")
    for _ in range(2):  # the first one makes the optimizer's state
        work.step(textbook)
    return peak_memory()


def benchmark_memory(options) -> None:
    """Each kind of step in a process of its own, whose peak it is."""
    kinds = {"textbook": (True, False), "ours": (False, False), "ours, recomputed": (False, True)}
    spawn = multiprocessing.get_context("spawn")
    for name, kind in kinds.items():
        with ProcessPoolExecutor(1, spawn) as process:
            peak = process.submit(peak_of_steps, options, *kind).result()
        print(f"memory of training, {name}: {peak}", flush=True)


def benchmark_decoding(options) -> None:
    work = Work(options)
    model, settings = work.model.eval(), work.model.config.generate
    caches = {"growing cache": {}}
    if DEVICE.type == "cuda":
        caches["static cache"] = {"cache_implementation": "static"}
    generate, words = model.causal_lm.generate, {}

    def decode(name: str) -> None:
        with patch.object(model.causal_lm, "generate", partial(generate, **caches[name])):
            reports, _ = model.generate(work.images, work.view_counts)
        words[name] = sum(len(report.split()) for report in reports) / len(reports)
    for name in caches:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, seconds = alternating({name: partial(decode, name)}, options.rounds)[name]
        print(f"decoding {len(work.view_counts)} studies, {settings.num_beams} beams, "
              f"{settings.min_new_tokens} to {settings.max_new_tokens} tokens, {name}: "
              f"{seconds:.2f} s (the first time {first:.2f} s), {words[name]:.1f} words a report; "
              f"{peak_memory()}", flush=True)


def benchmark_input(options) -> None:
    config = load_config(options.config, options.set)
    studies, images = read_studies(config.data)["train"][:200], f"{config.data.root}/images"
    paths = [f"{images}/{path}" for study in studies for path in study.image_paths]
    processor = AutoImageProcessor.from_pretrained(config.model.vision, backend="pil")

    def textbook() -> None:
        for path in paths:
            with Image.open(path) as image:
                processor(image.convert("RGB"), return_tensors="pt").pixel_values

    def ours() -> None:
        for path in paths:
            read_image(path, 224)
    calls = {"textbook": textbook, "ours": ours}
    for name, (_, seconds) in alternating(calls, options.rounds).items():
        print(f"input, {name}: {len(studies) / seconds:.0f} studies/s", flush=True)


PARTS = {"memory": benchmark_memory, "training": benchmark_training,
         "decoding": benchmark_decoding, "input": benchmark_input}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="default: configs/demo.yaml; with --paper iu_xray.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override the config")
    parser.add_argument("--paper", action="store_true", help="Sec. 4.1.2, with random weights")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    if options.paper and DEVICE.type == "cpu":
        raise InputError("--paper: torch sees no CUDA device here")
    if options.paper:  # no report ends before its last token; no image is read
        options.set.append("generate.min_new_tokens=100")
        del PARTS["input"]
    name = "iu_xray" if options.paper else "demo"
    options.config = options.config or REPOSITORY / f"configs/{name}.yaml"
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    end_in_one_line(main)
