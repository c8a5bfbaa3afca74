"""Ours against the textbook step, side by side in one process, alternating, median of several.

    python tests/benchmark.py --llm DIR --vision DIR --data DIR [--only training|input|scores] [--rounds 5]

The textbook step is what repositories of this family do: every report padded to the limit, logits and loss over all
positions, an attention mask, the prompt tokenised and embedded in each step, views encoded one by one, the teacher run in
every step, images through PIL and the Hugging Face processor. Same weights, same batch, same autocast.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import PROMPT, load_config  # noqa: E402
from data import ReportDataset, collate, read_image, read_studies  # noqa: E402
from evaluate import score  # noqa: E402
from losses import did_loss, vse_loss  # noqa: E402
from model import VDGen, embed_reports, load_model  # noqa: E402


def textbook_encode(model: VDGen, images: torch.Tensor, view_counts: list[int]) -> torch.Tensor:
    """The views one by one: first those of all studies, then the second ones."""
    if len(set(view_counts)) > 1:
        raise ValueError("the textbook step wants the same number of views in every study")
    pixels = ((images.float() / 255 - model.image_mean.view(3, 1, 1)) / model.image_std.view(3, 1, 1)).unflatten(0, (-1, view_counts[0]))
    return torch.stack([model.norm(model.vision(views).last_hidden_state.float()) for views in pixels.unbind(dim=1)]).mean(dim=0)


def textbook_terms(model: VDGen, images: torch.Tensor, view_counts: list[int], reports: list[str], limit: int) -> dict:
    """The terms of Eq. 8 as the peers compute them: nothing is kept from one step to the next.

    Args: images (sum of view_counts, 3, H, W) uint8, every study with the same number of views; reports, B texts.
    """
    tokenizer, llm, config, B = model.tokenizer, model.causal_lm, model.config, len(reports)
    embed, visual_tokens = llm.get_input_embeddings(), textbook_encode(model, images, view_counts)
    before, after = (embed(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).expand(B, -1, -1) for text in PROMPT)
    bos = embed(torch.full((B, 1), model.bos_id))
    rows = [ids + [model.eos_id] if len(ids) <= limit else ids[:limit] for ids in tokenizer(reports, add_special_tokens=False).input_ids]
    ids = torch.tensor([row + [0] * (limit + 1 - len(row)) for row in rows])  # padded to the limit
    kept = torch.arange(limit + 1) < torch.tensor([len(row) for row in rows])[:, None]
    prompt = torch.cat([bos, before, model.visual_projection(visual_tokens).to(before.dtype), after], dim=1)
    inputs, P = torch.cat([prompt, embed(ids)], dim=1), prompt.shape[1]
    mask = torch.cat([torch.ones(B, P, dtype=torch.bool), kept], dim=1)
    labels = torch.cat([torch.full((B, P), -100), ids.masked_fill(~kept, -100)], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).logits.float()
    terms = {"report": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)}
    with torch.no_grad():  # the teacher, with its LoRA off, on the padded reports
        teacher_ids = torch.cat([torch.full((B, 1), model.bos_id), ids], dim=1)
        teacher_kept = torch.cat([torch.zeros(B, 1, dtype=torch.bool), kept & (ids != model.eos_id)], dim=1)
        mask = torch.cat([torch.ones(B, 1, dtype=torch.bool), kept], dim=1)
        was_training = model.training
        model.eval()
        with model.llm.disable_adapter():
            hidden = llm.model(input_ids=teacher_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
        model.train(was_training)
        y = (hidden * teacher_kept[..., None]).sum(dim=1) / teacher_kept.sum(dim=1, keepdim=True)
    with torch.autocast(model.device.type, enabled=False):
        visual_embed = visual_tokens.mean(dim=1)
        terms["vse"] = vse_loss(model.vse_head(visual_embed), config.loss.temperature, config.loss.vse_self_in_denominator)
        terms["did"] = did_loss(visual_embed, model.did_head(y), config.loss.temperature)
    return terms


class Work:
    """One batch and a model, and both steps on it."""

    def __init__(self, options):
        self.config = load_config(options.config, [f"model.llm={options.llm}", f"model.vision={options.vision}", f"data.root={options.data}",
                                                   f"train.batch_size={options.batch}"])
        torch.manual_seed(0)
        self.model = load_model(self.config).train()
        self.limit = self.config.data.max_report_tokens
        studies = [s for s in read_studies(self.config.data)["train"] if len(s.image_paths) == 2][:options.batch]
        dataset = ReportDataset(studies, self.config.data, self.model.image_size, self.model.tokenizer)
        self.batch = collate([dataset[i] for i in range(len(studies))])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.plain_optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.teacher = embed_reports(self.model, self.batch["reports"])

        self.attention = self.model.causal_lm.config._attn_implementation

    def terms(self, textbook: bool) -> dict:
        batch = self.batch
        for part in (self.model.vision, self.model.causal_lm):
            part.set_attn_implementation("sdpa" if textbook else self.attention)  # sdpa: the library's own choice
        with self.model.autocast():
            if textbook:
                return textbook_terms(self.model, batch["images"], batch["view_counts"], batch["reports"], self.limit)
            y = torch.stack([self.teacher[text] for text in batch["reports"]])
            return self.model(batch["images"], batch["view_counts"], batch["report_ids"], batch["report_lengths"], y)

    def step(self, textbook: bool) -> dict[str, float]:
        """Seconds of the forward, the backward and the optimizer."""
        optimizer, times = self.plain_optimizer if textbook else self.optimizer, [time.perf_counter()]
        loss = sum(self.terms(textbook).values())
        times.append(time.perf_counter())
        if textbook:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()
        if not textbook:
            optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return dict(zip(("forward", "backward", "optimizer"), (b - a for a, b in zip(times, times[1:]))))


    def llm_part(self, textbook: bool) -> None:
        """Forward and backward of a step behind the encoder, whose output is kept."""
        visual_tokens = torch.randn(len(self.batch["reports"]), 49, self.model.norm.weight.shape[0], requires_grad=True)
        with patch.object(self.model, "encode", lambda *_: visual_tokens), patch("__main__.textbook_encode", lambda *_: visual_tokens):
            sum(self.terms(textbook).values()).backward()


def alternating(calls: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each call, all of them in turn in every round; the first round warms up."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in seconds.items()}


def matrix_rate(rounds: int) -> float:
    """FLOP/s of bf16 matrix products as large as those of the step."""
    a, b = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / alternating({"matmul": lambda: a @ b}, 3 * rounds)["matmul"]


def benchmark_training(options) -> None:
    peaks = {name: json.loads(subprocess.run([sys.executable, *sys.argv, "--peak", name], capture_output=True, text=True, check=True).stdout.splitlines()[-1])
             for name in ("textbook", "ours")}  # first: two of them at once would not fit
    print(f"peak memory: textbook {peaks['textbook']:.2f} GB, ours {peaks['ours']:.2f} GB, {peaks['ours'] / peaks['textbook']:.2f} times")
    work = Work(options)
    flops = {}
    for name in ("textbook", "ours"):
        with FlopCounterMode(display=False) as counter:
            work.step(name == "textbook")
        flops[name] = counter.get_total_flops()
    parts = {"textbook": [], "ours": []}
    seconds = alternating({name: lambda name=name: parts[name].append(work.step(name == "textbook")) for name in parts}, options.rounds)
    batch, model = work.batch, work.model

    def vision() -> None:
        with model.autocast():
            model.encode(batch["images"], batch["view_counts"])
    seconds["vision forward, ours"] = alternating({"vision": vision}, options.rounds)["vision"]
    llm = alternating({name: lambda name=name: work.llm_part(name == "textbook") for name in parts}, options.rounds)
    rate = matrix_rate(options.rounds)
    for name, values in parts.items():
        split = ", ".join(f"{part} {median(v[part] for v in values[1:]):.2f} s" for part in values[0])
        print(f"{name}: {seconds[name]:.2f} s a step, {options.batch / seconds[name]:.2f} studies/s, {flops[name] / 1e9 / options.batch:.0f} GFLOP a study, "
              f"{flops[name] / seconds[name] / rate:.0%} of the matrix rate of {rate / 1e9:.0f} GFLOP/s; {split}")
    print(f"vision forward, ours: {seconds['vision forward, ours']:.2f} s")
    print(f"LLM part alone, forward and backward: textbook {llm['textbook']:.2f} s, ours {llm['ours']:.2f} s, {llm['textbook'] / llm['ours']:.2f} times")
    print(f"training: {seconds['textbook'] / seconds['ours']:.2f} times the textbook step")


def benchmark_input(options) -> None:
    studies = read_studies(load_config(options.config, [f"data.root={options.data}"]).data)["train"][:200]
    paths = [Path(options.data) / "images" / path for study in studies for path in study.image_paths]
    processor = AutoImageProcessor.from_pretrained(options.vision, backend="pil")

    def textbook() -> None:
        for path in paths:
            with Image.open(path) as image:
                processor(image.convert("RGB"), return_tensors="pt").pixel_values

    def ours(cache: Path | None) -> None:
        for i, path in enumerate(paths):
            read_image(path, 224, cache and cache / f"{i}.npy")
    with tempfile.TemporaryDirectory() as folder:
        seconds = alternating({"textbook": textbook, "first epoch": lambda: ours(None), "later epochs": lambda: ours(Path(folder))}, options.rounds)
    print(f"input: textbook {len(studies) / seconds['textbook']:.0f} studies/s; ours in the first epoch {len(studies) / seconds['first epoch']:.0f} "
          f"({seconds['textbook'] / seconds['first epoch']:.1f} times), later {len(studies) / seconds['later epochs']:.0f} "
          f"({seconds['textbook'] / seconds['later epochs']:.1f} times)")


def benchmark_scores(options) -> None:
    from test_evaluate import theirs
    reports = [study.report for study in read_studies(load_config(options.config, [f"data.root={options.data}"]).data)["train"]]
    texts = [" ".join(reports[(i + k) % len(reports)] for k in range(1 + i % 2)) for i in range(2 * 3858)]  # as long as MIMIC-CXR's
    predictions, references = ({str(i): text for i, text in enumerate(half)} for half in (texts[:3858], texts[3858:]))
    seconds = alternating({"pycocoevalcap": lambda: theirs(predictions, references), "ours": lambda: score(predictions, references, meteor=False)}, options.rounds)
    print(f"scores of 3,858 reports: pycocoevalcap {seconds['pycocoevalcap']:.2f} s, ours {seconds['ours']:.2f} s, {seconds['pycocoevalcap'] / seconds['ours']:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent.parent / "configs/iu_xray_small.yaml"))
    for name, default in (("llm", "data/demo/llama"), ("vision", "data/demo/swin"), ("data", "data/demo")):
        parser.add_argument(f"--{name}", default=default, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("training", "input", "scores"))
    parser.add_argument("--peak", choices=("textbook", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        work = Work(options)
        for _ in range(2):
            work.step(options.peak == "textbook")
        return print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))
    for name, part in (("training", benchmark_training), ("input", benchmark_input), ("scores", benchmark_scores)):
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
