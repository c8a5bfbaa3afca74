"""Ours against the textbook step, side by side in one process, alternating, median of several.

    python tests/benchmark.py --llm DIR --vision DIR --data DIR [--only training|generation|input|scores|paper] [--rounds 5]
    python tests/benchmark.py --only gpu     # the paper's sizes on the card of this machine: benchmark_gpu.py

The textbook step is what repositories of this family do: every report padded to the limit, logits and loss over all
positions, an attention mask, the prompt tokenised and embedded in each step, views encoded one by one, the teacher run in
every step, decoding by the library's `generate` with the prompt computed for each beam, images through PIL and the Hugging
Face processor. Same weights, same batch, same autocast.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from PIL import Image
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import PROMPT, load_config  # noqa: E402
from data import ReportDataset, collate, read_image, read_studies  # noqa: E402
from evaluate import score  # noqa: E402
from losses import did_loss, vse_loss  # noqa: E402
from model import VDGen, embed_reports, load_model  # noqa: E402


def flop_counts(model: VDGen) -> dict[str, float]:
    """Floating-point operations of a training step, forward and backward, counted on the meta device.

    Returns:
        those of one "image" (encoder), of one "token" that passes the LLM (in a row of a prompt and 50 tokens), of one
        "report_token" (output layer); and "prompt", the tokens of a prompt. Left out: padding, `train.recompute`, and the
        projections of the visual tokens and of B rows.
    """
    def count(module: nn.Module, *inputs: Tensor, **options) -> tuple[int, Tensor]:
        state = {name: value.detach().to("meta").requires_grad_(value.requires_grad)
                 for name, value in chain(module.named_parameters(), module.named_buffers())}
        with FlopCounterMode(display=False) as counter:
            output = functional_call(module, state, inputs, options)
            output = output if isinstance(output, Tensor) else output.last_hidden_state
            output.sum().backward()
        return counter.get_total_flops(), output
    was_training, llm = model.training, model.causal_lm
    model.eval()
    pixels = torch.empty(1, 3, model.image_size, model.image_size, device="meta")
    image, hidden = count(model.vision, pixels)
    S = hidden.flatten(2).shape[2] if hidden.dim() == 4 else hidden.shape[1]
    prompt = len(model.before_ids) + S + len(model.after_ids)
    T, options = prompt + 50, dict(dtype=llm.dtype, device="meta")
    states = torch.empty(1, T, llm.config.hidden_size, requires_grad=True, **options)
    mask = torch.empty(1, 1, T, T, **options)
    token = count(llm.model, inputs_embeds=states, attention_mask=mask, use_cache=False)[0] / T
    report_token = count(llm.get_output_embeddings(), states)[0] / T
    model.train(was_training)
    return {"image": image, "token": token, "report_token": report_token, "prompt": prompt}


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
        terms["vse"] = vse_loss(model.vse_head(visual_embed), config.loss.vse_temperature, config.loss.vse_self_in_denominator)
        terms["did"] = did_loss(visual_embed, model.did_head(y), config.loss.did_temperature)
    return terms


class Work:
    """One batch and a model, and both steps on it."""

    def __init__(self, options):
        self.config = load_config(options.config, [f"model.llm={options.llm}", f"model.vision={options.vision}", f"data.root={options.data}",
                                                   f"train.batch_size={options.batch}", f"train.recompute={str(options.peak == 'recompute').lower()}"])
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

        self.attention = {part: part.config._attn_implementation for part in (self.model.vision, self.model.causal_lm)}

    def use_attention(self, textbook: bool) -> None:
        for part, name in self.attention.items():
            part.set_attn_implementation("sdpa" if textbook else name)  # sdpa: the library's own choice

    def terms(self, textbook: bool) -> dict:
        batch = self.batch
        self.use_attention(textbook)
        with self.model.autocast():
            if textbook:
                return textbook_terms(self.model, batch["images"], batch["view_counts"], batch["reports"], self.limit)
            y = torch.stack([self.teacher[text] for text in batch["reports"]]).float()
            return self.model(batch["images"], batch["view_counts"], batch["report_ids"], batch["report_lengths"], y)[0]

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
    peaks = {}
    for name in ("textbook", "ours", "recompute"):  # each in a process of its own; first, for two at once would not fit
        lines = subprocess.run([sys.executable, *sys.argv, "--peak", name], capture_output=True, text=True, check=True).stdout.splitlines()
        peaks[name] = json.loads(lines[-1])
        print(f"peak memory, {name}: {peaks[name]['GB']:.2f} GB, {peaks[name]['GB'] / peaks['textbook']['GB']:.2f} times the textbook's; "
              f"a step {peaks[name]['seconds']:.2f} s", flush=True)
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


def benchmark_generation(options) -> None:
    """Vision included; the textbook decodes by the library's `generate`, its prompts computed for each beam."""
    from conftest import library_search
    work = Work(options)
    model, settings, lengths = work.model.eval(), work.config.generate, {}

    def textbook() -> None:
        work.use_attention(textbook=True)
        with torch.no_grad(), model.autocast():
            visual_tokens = textbook_encode(model, work.batch["images"], work.batch["view_counts"])
            ids = library_search(model, model.embed_prompt(visual_tokens), settings)
        lengths["textbook"] = [len(model.decode(row).split()) for row in ids.tolist()]

    def ours() -> None:
        work.use_attention(textbook=False)
        lengths["ours"] = [len(text.split()) for text in model.generate(work.batch["images"], work.batch["view_counts"])[0]]
    seconds = alternating({"textbook": textbook, "ours": ours}, options.rounds)
    visual_tokens = torch.randn(options.batch, 49, model.norm.weight.shape[0])
    with patch.object(model, "encode", lambda *_: visual_tokens), patch("__main__.textbook_encode", lambda *_: visual_tokens):
        behind = alternating({"textbook": textbook, "ours": ours}, options.rounds)
    print(f"behind the encoder: textbook {behind['textbook']:.1f} s, ours {behind['ours']:.1f} s, {behind['textbook'] / behind['ours']:.2f} times")
    print(f"generation of {options.batch} reports, {settings.num_beams} beams, {settings.min_new_tokens} to {settings.max_new_tokens} tokens: "
          + ", ".join(f"{name} {value:.1f} s ({sum(lengths[name]) / options.batch:.0f} words a report)" for name, value in seconds.items())
          + f", {seconds['textbook'] / seconds['ours']:.2f} times")


def paper_scale(views: int = 32, reports: int = 16, prompt: int = 77, report_tokens: int = 60) -> dict[str, float]:
    """A step at the sizes of configs/iu_xray.yaml, counted on the meta device: TFLOP, and GB by part.

    The prompt has 49 visual tokens and, as SmolLM2's tokenizer cuts it, 28 others.

    Kept for the backward, with `train.recompute` and without: of the encoder (whose attention is counted as plain products) and of
    the LLM. The attention of the LLM is the fused one.
    """
    from conftest import paper_model
    numbers = {}
    for recompute in (False, True):
        model = paper_model(f"train.recompute={str(recompute).lower()}")
        with torch.device("meta"):
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            counts = flop_counts(model)
            model.vision.to(torch.bfloat16)  # there is no autocast on meta
            weights = {p.untyped_storage()._cdata for p in model.parameters()}

            def kept(call) -> float:
                sizes = {}
                with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.untyped_storage()._cdata: t.nbytes}) or t, lambda t: t):
                    output = call()  # holds what it kept
                del output
                return sum(size for key, size in sizes.items() if key not in weights) / 1e9
            length = prompt - 1 + report_tokens
            states = torch.empty(reports, length, 4096, dtype=torch.bfloat16, requires_grad=True)
            mask = torch.empty(1, 1, length, length, dtype=torch.bfloat16)
            name = "recomputed" if recompute else "kept"
            pixels = torch.empty(views, 3, 224, 224, dtype=torch.bfloat16)
            numbers[f"encoder, {name}"] = kept(lambda: model.vision(pixels).last_hidden_state)
            numbers[f"LLM, {name}"] = kept(lambda: model.causal_lm.model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state)
            numbers["frozen weights"] = sum(p.nbytes for p in model.parameters() if not p.requires_grad) / 1e9
            numbers["trained weights, gradients, AdamW"] = 16 * trained / 1e9
            numbers["logits"] = reports * report_tokens * 32000 * (2 + 4 + 4 + 2) / 1e9  # bf16, float32, its softmax, the gradient
    tokens = reports * report_tokens
    numbers["TFLOP, encoder"] = counts["image"] * views / 1e12
    numbers["TFLOP, LLM"] = (counts["token"] * reports * length + counts["report_token"] * tokens) / 1e12
    return numbers


def benchmark_paper(options) -> None:
    numbers = paper_scale()
    print("the paper's scale, computed, not measured: batch 16, two views, 60 report tokens")
    for name, value in numbers.items():
        print(f"  {name}: {value:.2f}" + ("" if "TFLOP" in name else " GB"))
    flop = numbers["TFLOP, encoder"] + numbers["TFLOP, LLM"]
    print(f"  a step at 40 % of an H100's 989 TFLOP/s: {flop / 989 / 0.4:.3f} s; 15 epochs of 129 steps: {15 * 129 * flop / 989 / 0.4 / 60:.1f} min")


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
    parser.add_argument("--only", choices=("training", "generation", "input", "scores", "paper", "gpu"))
    parser.add_argument("--peak", choices=("textbook", "ours", "recompute"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        work = Work(options)
        seconds = [sum(work.step(options.peak == "textbook").values()) for _ in range(3)]
        return print(json.dumps({"GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "seconds": min(seconds)}))
    if options.only == "gpu":  # needs a card, and nothing else
        from benchmark_gpu import benchmark_gpu
        return benchmark_gpu(options)
    for name, part in (("training", benchmark_training), ("generation", benchmark_generation), ("input", benchmark_input),
                       ("scores", benchmark_scores), ("paper", benchmark_paper)):
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
