"""Ours against the textbook step, side by side in one process, alternating, median of several.

    python tests/benchmark.py --llm DIR --vision DIR --data DIR [--rounds 5]
        [--only training|generation|input|scores|paper]
    python tests/benchmark.py --only gpu    # the paper's sizes on a GPU: benchmark_gpu.py

The textbook step is what repositories of this family do: every report padded to the limit, logits
and loss over all positions, an attention mask, the prompt tokenised and embedded in each step,
views encoded one by one, the teacher run in every step, decoding by the library's `generate` with
the prompt computed for each beam, images through PIL and the Hugging Face processor. Same weights,
same batch, same autocast.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
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
    """Floating-point operations of a training step, forward and backward, on the meta device.

    Returns:
        those of one "image" (encoder), of one "token" that passes the LLM (in a row of a prompt and
        50 tokens), of one "report_token" (output layer); and "prompt", the tokens of a prompt. Left
        out: padding, `train.recompute`, and the projections of the visual tokens and of B rows.
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
    mean, std = model.image_mean.view(3, 1, 1), model.image_std.view(3, 1, 1)
    pixels = ((images.float() / 255 - mean) / std).unflatten(0, (-1, view_counts[0]))
    tokens = [model.norm(model.vision(views).last_hidden_state.float())
              for views in pixels.unbind(dim=1)]
    return torch.stack(tokens).mean(dim=0)


def textbook_prompt(model: VDGen, visual_tokens: torch.Tensor) -> torch.Tensor:
    """Tokenised and embedded anew: (B, P, D_h) from visual tokens (B, S, D)."""
    B, embed = len(visual_tokens), model.causal_lm.get_input_embeddings()

    def embed_text(text: str) -> torch.Tensor:
        ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return embed(ids).expand(B, -1, -1)
    before, after = map(embed_text, PROMPT)
    bos = embed(torch.full((B, 1), model.bos_id))
    projected = model.visual_projection(visual_tokens).to(before.dtype)
    return torch.cat([bos, before, projected, after], dim=1)


@torch.no_grad()
def textbook_teacher(model: VDGen, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """y (B, D_h) of padded reports: the LLM with its LoRA off. `kept` (B, T) bool: no padding."""
    B = len(ids)
    bos, one = torch.full((B, 1), model.bos_id), torch.ones(B, 1, dtype=torch.bool)
    counted = torch.cat([~one, kept & (ids != model.eos_id)], dim=1)
    mask = torch.cat([one, kept], dim=1)
    was_training = model.training
    model.eval()
    with model.llm.disable_adapter():
        hidden = model.causal_lm.model(
            input_ids=torch.cat([bos, ids], dim=1), attention_mask=mask.long(), use_cache=False)
    model.train(was_training)
    hidden = hidden.last_hidden_state.float()
    return (hidden * counted[..., None]).sum(dim=1) / counted.sum(dim=1, keepdim=True)


def textbook_terms(model: VDGen, images: torch.Tensor, view_counts: list[int], reports: list[str],
                   limit: int) -> dict:
    """The terms of Eq. 8 as the peers compute them: nothing is kept from one step to the next.

    Args:
        images: (sum of view_counts, 3, H, W) uint8, every study with the same number of views.
        reports: B texts.
        limit: tokens of a report, EOS left out.
    """
    llm, loss, B = model.causal_lm, model.config.loss, len(reports)
    visual_tokens = textbook_encode(model, images, view_counts)
    prompt = textbook_prompt(model, visual_tokens)
    rows = [ids + [model.eos_id] if len(ids) <= limit else ids[:limit]
            for ids in model.tokenizer(reports, add_special_tokens=False).input_ids]
    ids = torch.tensor([row + [0] * (limit + 1 - len(row)) for row in rows])  # padded to the limit
    kept = torch.arange(limit + 1) < torch.tensor([len(row) for row in rows])[:, None]
    inputs, P = torch.cat([prompt, llm.get_input_embeddings()(ids)], dim=1), prompt.shape[1]
    mask = torch.cat([torch.ones(B, P, dtype=torch.bool), kept], dim=1)
    labels = torch.cat([torch.full((B, P), -100), ids.masked_fill(~kept, -100)], dim=1)
    logits = llm(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False).logits.float()
    report = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                             ignore_index=-100)
    y = textbook_teacher(model, ids, kept)
    with torch.autocast(model.device.type, enabled=False):
        visual_embed = visual_tokens.mean(dim=1)
        vse = vse_loss(model.vse_head(visual_embed), loss.vse_temperature,
                       loss.vse_self_in_denominator)
        did = did_loss(visual_embed, model.did_head(y), loss.did_temperature)
    return {"report": report, "vse": vse, "did": did}


class Work:
    """One batch and a model, and both steps on it."""

    def __init__(self, options):
        recompute = str(options.peak == "recompute").lower()
        self.config = load_config(options.config, [
            f"model.llm={options.llm}", f"model.vision={options.vision}",
            f"data.root={options.data}", f"train.batch_size={options.batch}",
            f"train.recompute={recompute}"])
        torch.manual_seed(0)
        self.model = load_model(self.config).train()
        self.limit = self.config.data.max_report_tokens
        studies = read_studies(self.config.data)["train"]
        studies = [study for study in studies if len(study.image_paths) == 2][:options.batch]
        dataset = ReportDataset(studies, self.config.data, self.model.image_size,
                                self.model.tokenizer)
        self.batch = collate([dataset[i] for i in range(len(studies))])
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.plain_optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.teacher = embed_reports(self.model, self.batch["reports"])
        self.attention = {part: part.config._attn_implementation
                          for part in (self.model.vision, self.model.causal_lm)}

    def use_attention(self, textbook: bool) -> None:
        for part, name in self.attention.items():
            # sdpa: the library's own choice
            part.set_attn_implementation("sdpa" if textbook else name)

    def terms(self, textbook: bool) -> dict:
        batch, reports = self.batch, self.batch["reports"]
        images, view_counts = batch["images"], batch["view_counts"]
        self.use_attention(textbook)
        with self.model.autocast():
            if textbook:
                return textbook_terms(self.model, images, view_counts, reports, self.limit)
            y = torch.stack([self.teacher[text] for text in reports]).float()
            return self.model(images, view_counts, batch["report_ids"], batch["report_lengths"],
                              y)[0]

    def step(self, textbook: bool) -> dict[str, float]:
        """Seconds of the forward, the backward and the optimizer."""
        optimizer = self.plain_optimizer if textbook else self.optimizer
        times = [time.perf_counter()]
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
        seconds = (after - before for before, after in zip(times, times[1:]))
        return dict(zip(("forward", "backward", "optimizer"), seconds))

    def llm_part(self, textbook: bool) -> None:
        """Forward and backward of a step after the encoder, whose output is kept."""
        B, D = len(self.batch["reports"]), self.model.norm.weight.shape[0]
        with encoder_gives(self.model, torch.randn(B, 49, D, requires_grad=True)):
            sum(self.terms(textbook).values()).backward()


@contextmanager
def encoder_gives(model: VDGen, visual_tokens: torch.Tensor):
    """Both steps take these visual tokens (B, S, D) and encode no image."""
    with (patch.object(model, "encode", lambda *_: visual_tokens),
          patch("__main__.textbook_encode", lambda *_: visual_tokens)):
        yield


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
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 2048**3 / alternating({"matmul": lambda: a @ b}, 3 * rounds)["matmul"]


def benchmark_peaks() -> None:
    """Each in a process of its own."""
    peaks = {}
    for name in ("textbook", "ours", "recompute"):
        done = subprocess.run([sys.executable, *sys.argv, "--peak", name], capture_output=True,
                              text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
        memory, seconds = peaks[name]["GB"], peaks[name]["seconds"]
        print(f"peak memory, {name}: {memory:.2f} GB, "
              f"{memory / peaks['textbook']['GB']:.2f} times the textbook's; "
              f"a step {seconds:.2f} s", flush=True)


def benchmark_training(options) -> None:
    benchmark_peaks()  # first, for two models at once would not fit
    work = Work(options)
    batch, model, flops = work.batch, work.model, {}
    parts = {"textbook": [], "ours": []}
    for name in parts:
        with FlopCounterMode(display=False) as counter:
            work.step(name == "textbook")
        flops[name] = counter.get_total_flops()

    def step(name: str) -> None:
        parts[name].append(work.step(name == "textbook"))

    def vision() -> None:
        with model.autocast():
            model.encode(batch["images"], batch["view_counts"])
    seconds = alternating({name: partial(step, name) for name in parts}, options.rounds)
    vision_seconds = alternating({"vision": vision}, options.rounds)["vision"]
    llm = alternating({name: partial(work.llm_part, name == "textbook") for name in parts},
                      options.rounds)
    rate = matrix_rate(options.rounds)
    for name, values in parts.items():
        split = []
        for part in values[0]:
            split.append(f"{part} {median(value[part] for value in values[1:]):.2f} s")
        print(f"{name}: {seconds[name]:.2f} s a step, "
              f"{options.batch / seconds[name]:.2f} studies/s, "
              f"{flops[name] / 1e9 / options.batch:.0f} GFLOP a study, "
              f"{flops[name] / seconds[name] / rate:.0%} of the matrix rate of "
              f"{rate / 1e9:.0f} GFLOP/s; {', '.join(split)}")
    print(f"vision forward, ours: {vision_seconds:.2f} s")
    print(f"LLM part alone, forward and backward: textbook {llm['textbook']:.2f} s, "
          f"ours {llm['ours']:.2f} s, {llm['textbook'] / llm['ours']:.2f} times")
    print(f"training: {seconds['textbook'] / seconds['ours']:.2f} times the textbook step")


def benchmark_input(options) -> None:
    data = load_config(options.config, [f"data.root={options.data}"]).data
    studies = read_studies(data)["train"][:200]
    paths = [Path(options.data) / "images" / path for study in studies
             for path in study.image_paths]
    processor = AutoImageProcessor.from_pretrained(options.vision, backend="pil")

    def textbook() -> None:
        for path in paths:
            with Image.open(path) as image:
                processor(image.convert("RGB"), return_tensors="pt").pixel_values

    def ours() -> None:
        for path in paths:
            read_image(path, 224)
    seconds = alternating({"textbook": textbook, "ours": ours}, options.rounds)
    rates = {name: len(studies) / value for name, value in seconds.items()}
    print(f"input: textbook {rates['textbook']:.0f} studies/s; ours {rates['ours']:.0f} "
          f"({seconds['textbook'] / seconds['ours']:.1f} times)")


def benchmark_generation(options) -> None:
    """Vision included; the textbook decodes by the library's `generate`.

    Its prompts are computed for each beam.
    """
    from conftest import library_search
    work = Work(options)
    model, settings, lengths = work.model.eval(), work.config.generate, {}
    images, view_counts = work.batch["images"], work.batch["view_counts"]

    def textbook() -> None:
        work.use_attention(textbook=True)
        with torch.no_grad(), model.autocast():
            visual_tokens = textbook_encode(model, images, view_counts)
            ids = library_search(model, model.embed_prompt(visual_tokens), settings)
        lengths["textbook"] = [len(model.decode(row).split()) for row in ids.tolist()]

    def ours() -> None:
        work.use_attention(textbook=False)
        texts = model.generate(images, view_counts)[0]
        lengths["ours"] = [len(text.split()) for text in texts]
    calls = {"textbook": textbook, "ours": ours}
    seconds = alternating(calls, options.rounds)
    with encoder_gives(model, torch.randn(options.batch, 49, model.norm.weight.shape[0])):
        behind = alternating(calls, options.rounds)
    print(f"after the encoder: textbook {behind['textbook']:.1f} s, ours {behind['ours']:.1f} s, "
          f"{behind['textbook'] / behind['ours']:.2f} times")
    words = {name: sum(values) / options.batch for name, values in lengths.items()}
    each = ", ".join(f"{name} {value:.1f} s ({words[name]:.0f} words a report)"
                     for name, value in seconds.items())
    print(f"generation of {options.batch} reports, {settings.num_beams} beams, "
          f"{settings.min_new_tokens} to {settings.max_new_tokens} tokens: {each}, "
          f"{seconds['textbook'] / seconds['ours']:.2f} times")


def kept_gb(model: VDGen, call: Callable[[], torch.Tensor]) -> float:
    """GB that a call keeps for its backward, the model's weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.nbytes
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = call()  # holds what it kept
    del output
    return sum(size for key, size in sizes.items() if key not in weights) / 1e9


def paper_scale(views: int = 32, reports: int = 16, prompt: int = 77,
                report_tokens: int = 60) -> dict[str, float]:
    """A step at the sizes of configs/iu_xray.yaml, counted on the meta device.

    The prompt has 49 visual tokens and, as SmolLM2's tokenizer cuts it, 28 others.

    Returns:
        TFLOP, and GB by part. Kept for the backward, with `train.recompute` and without: of the
        encoder (whose attention is counted as plain products) and of the LLM. The attention of the
        LLM is the fused one.
    """
    from conftest import paper_model
    numbers, length, bf16 = {}, prompt - 1 + report_tokens, torch.bfloat16
    for name in ("kept", "recomputed"):
        model = paper_model(f"train.recompute={str(name == 'recomputed').lower()}")
        llm = model.causal_lm.model
        with torch.device("meta"):
            counts = flop_counts(model)
            model.vision.to(bf16)  # there is no autocast on meta
            pixels = torch.empty(views, 3, 224, 224, dtype=bf16)
            states = torch.empty(reports, length, 4096, dtype=bf16, requires_grad=True)
            mask = torch.empty(1, 1, length, length, dtype=bf16)
            encoder = partial(model.vision, pixels)
            decoder = partial(llm, inputs_embeds=states, attention_mask=mask, use_cache=False)
            for part, call in (("encoder", encoder), ("LLM", decoder)):
                numbers[f"{part}, {name}"] = kept_gb(model, lambda: call().last_hidden_state)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            numbers["frozen weights"] = frozen / 1e9
            numbers["trained weights, gradients, AdamW"] = 16 * trained / 1e9
            # bf16, float32, its softmax, the gradient
            numbers["logits"] = reports * report_tokens * 32000 * (2 + 4 + 4 + 2) / 1e9
    tokens = reports * report_tokens
    flop = counts["token"] * reports * length + counts["report_token"] * tokens
    numbers["TFLOP, encoder"] = counts["image"] * views / 1e12
    numbers["TFLOP, LLM"] = flop / 1e12
    return numbers


def benchmark_paper(options) -> None:
    numbers = paper_scale()
    print("the paper's scale, computed, not measured: batch 16, two views, 60 report tokens")
    for name, value in numbers.items():
        print(f"  {name}: {value:.2f}" + ("" if "TFLOP" in name else " GB"))
    seconds = (numbers["TFLOP, encoder"] + numbers["TFLOP, LLM"]) / 989 / 0.4
    print(f"  a step at 40 % of an H100's 989 TFLOP/s: {seconds:.3f} s; "
          f"15 epochs of 129 steps: {15 * 129 * seconds / 60:.1f} min")


def benchmark_scores(options) -> None:
    from test_evaluate import theirs
    data = load_config(options.config, [f"data.root={options.data}"]).data
    reports, size = [study.report for study in read_studies(data)["train"]], 3858

    def text(i: int) -> str:  # as long as MIMIC-CXR's
        return " ".join(reports[(i + k) % len(reports)] for k in range(1 + i % 2))
    predictions = {str(i): text(i) for i in range(size)}
    references = {str(i): text(size + i) for i in range(size)}
    seconds = alternating({"pycocoevalcap": lambda: theirs(predictions, references),
                           "ours": lambda: score(predictions, references, meteor=False)},
                          options.rounds)
    print(f"scores of 3,858 reports: pycocoevalcap {seconds['pycocoevalcap']:.2f} s, "
          f"ours {seconds['ours']:.2f} s, {seconds['pycocoevalcap'] / seconds['ours']:.1f} times")


def print_peak(options) -> None:
    """What `benchmark_peaks` reads from a process of its own."""
    work = Work(options)
    seconds = [sum(work.step(options.peak == "textbook").values()) for _ in range(3)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"GB": memory, "seconds": min(seconds)}))


PARTS = {"training": benchmark_training, "generation": benchmark_generation,
         "input": benchmark_input, "scores": benchmark_scores, "paper": benchmark_paper}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    config = Path(__file__).parent.parent / "configs/iu_xray_small.yaml"
    parser.add_argument("--config", default=str(config))
    parser.add_argument("--llm", default="data/demo/llama", help="default: %(default)s")
    parser.add_argument("--vision", default="data/demo/swin", help="default: %(default)s")
    parser.add_argument("--data", default="data/demo", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=(*PARTS, "gpu"))
    parser.add_argument("--peak", choices=("textbook", "ours", "recompute"),
                        help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return print_peak(options)
    if options.only == "gpu":  # needs a card, and nothing else
        from benchmark_gpu import benchmark_gpu
        return benchmark_gpu(options)
    for name, part in PARTS.items():
        if options.only in (None, name):
            part(options)


if __name__ == "__main__":
    main()
