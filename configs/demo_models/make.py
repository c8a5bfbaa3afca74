"""Pretrain the demo's Swin and Llama, as the paper's come pretrained from a hub.

    python configs/demo_models/make.py swin      # 11 minutes on one core
    python configs/demo_models/make.py llama     # 16 minutes

The Swin reads drawn shapes: no film, finding or report. The Llama reads the 2,400 reports of the
training split, which configs/demo.py writes anew: no film, and no report of val or test. Both draw
from seed 7 and take one thread.
"""
import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SwinConfig,
                          SwinModel, ViTImageProcessor)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from configs import PROMPT  # noqa: E402
from configs.demo import DEMO_SPLITS, PIXELS, describe_study, findings_spec  # noqa: E402
from configs.findings import named_findings  # noqa: E402
from data import clean_iu_xray  # noqa: E402

SEED, GRID = 7, 6  # X^e has 6 x 6 tokens
LEARNING_RATE, WEIGHT_DECAY = 2e-3, .05
BATCH = 32


def pretrain(what: str, parameters: list, steps: int, loss_of: Callable[[int], Tensor],
             beta2: float) -> None:
    """AdamW under a one-cycle schedule; `loss_of(step)` draws its batch."""
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (.9, beta2),
                                  weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps,
                                                   pct_start=.1)
    for step in (bar := tqdm(range(steps), f"pretraining the {what}", mininterval=10)):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


# The Swin -----------------------------------------------------------------------------------------

KINDS, SIZES, SIGNS = 6, (.022, .045, .09), 2  # sizes: radii, in widths of the picture
TRAITS = KINDS + len(SIZES) + SIGNS


def swin_config() -> SwinConfig:
    """S = 36, D = 128; 0.5 M parameters."""
    return SwinConfig(
        image_size=PIXELS, patch_size=4, embed_dim=32, depths=[1, 1, 2], num_heads=[1, 2, 4],
        window_size=6, use_absolute_embeddings=True, drop_path_rate=0.0, initializer_range=.06)


def shapes_of_all_kinds(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Six masks (6, *u.shape) in 0..1 around the origin of u and v."""
    rho = torch.hypot(u, v)
    disc, ring = rho - radius, (rho - radius).abs() - .008
    box = torch.maximum(u.abs(), v.abs()) - radius
    bar = torch.maximum(u.abs() - 2 * radius, v.abs() - .010)
    sharp = (.5 - torch.stack([disc, ring, box, bar]) / .015).clamp(0, 1)
    blob = (-(rho / radius) ** 2).exp()
    grating = blob * (.5 + .5 * (u * 120).sin())
    return torch.cat([sharp, torch.stack([blob, grating])])


class Canvas:
    """`count` pictures while they are drawn; x and y run from 0 to 1."""

    def __init__(self, count: int, generator: torch.Generator):
        self.count, self.generator = count, generator
        self.grid = (torch.arange(PIXELS) + .5) / PIXELS

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(self.count, *shape, generator=self.generator)

    def turned(self, n: int) -> tuple[Tensor, Tensor]:
        """(count, n, 96, 96) coordinates around n random centres, turned by random angles."""
        x = self.grid - self.uniform(0, 1, n, 1, 1)
        y = self.grid[:, None] - self.uniform(0, 1, n, 1, 1)
        angle = self.uniform(0, 6.3, n, 1, 1)
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def clutter(self) -> Tensor:
        """(count, 1, 96, 96): large ellipses, bands and noise."""
        image = self.uniform(.1, .6, 1, 1, 1).expand(-1, -1, PIXELS, PIXELS).clone()
        u, v = self.turned(4)
        wide, high = self.uniform(.15, .5, 4, 1, 1), self.uniform(.1, .4, 4, 1, 1)
        big = ((u / wide) ** 2 + (v / high) ** 2 - 1).mul(-4).sigmoid()
        image += (big * self.uniform(-.2, .2, 4, 1, 1)).sum(1, keepdim=True)
        strength, frequency = self.uniform(0, .05, 4, 1, 1), self.uniform(10, 90, 4, 1, 1)
        bands = strength * (u * frequency).sin().clamp(min=0)
        image += bands[:, :2].sum(1, keepdim=True)
        for cells in (4, 12, 48):
            noise = torch.randn(self.count, 1, cells, cells, generator=self.generator)
            noise = noise * self.uniform(0, .06, 1, 1, 1)
            image += F.interpolate(noise, (PIXELS, PIXELS), mode="bilinear")
        return image


def draw_shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five shapes on clutter, each dark or bright, and what lies in each cell.

    Returns:
        images (count, 1, 96, 96) in 0..1, and (count, 13, 6, 6): which of the 6 kinds, 3 sizes and
        2 signs a cell holds, 0 or 1, then the light that shapes add to it and its share of them.
    """
    canvas = Canvas(count, generator)
    image = canvas.clutter()
    kind, size, sign = (torch.randint(n, (count, 5, 1, 1), generator=generator)
                        for n in (KINDS, len(SIZES), SIGNS))
    u, v = canvas.turned(5)
    radius = torch.tensor(SIZES)[size] * canvas.uniform(.75, 1.25, 5, 1, 1)
    alpha = shapes_of_all_kinds(u, v, radius).gather(0, kind.expand_as(u)[None])[0]
    light = alpha * canvas.uniform(.10, .60, 5, 1, 1) * (2 * sign - 1)
    image += light.sum(1, keepdim=True)
    image += .025 * torch.randn(image.shape, generator=generator)

    traits = [F.one_hot(t[..., 0, 0], n)
              for t, n in ((kind, KINDS), (size, len(SIZES)), (sign, SIGNS))]
    traits = torch.cat(traits, -1).float()
    cell = PIXELS // GRID
    cells = (F.max_pool2d(alpha, cell) > .5).float()
    held = (cells[:, :, None] * traits[..., None, None]).amax(1)
    amounts = [10 * F.avg_pool2d(light.sum(1), cell), 3 * F.avg_pool2d(alpha.amax(1), cell)]
    return image.clamp(0, 1), torch.cat([held, torch.stack(amounts, 1)], 1)


def make_swin(folder: Path, steps: int) -> None:
    """Each token names what lies in its cell; either half of the picture has its own outputs."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    swin = SwinModel(swin_config(), add_pooling_layer=False)
    D = swin.config.hidden_size
    head = nn.Linear(D, 2 * TRAITS + 2)
    pool = [draw_shapes(64, generator) for _ in tqdm(range(max(1, steps // 18)), "drawing shapes")]
    images, labels = (torch.cat(parts) for parts in zip(*pool))
    first_half = (torch.arange(GRID) < GRID // 2).float()

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        flips = [d for d in (2, 3) if torch.rand((), generator=generator) < .5]
        pixels = images[rows].flip(flips).expand(-1, 3, -1, -1)
        held, amounts = labels[rows].flip(flips).split([TRAITS, 2], dim=1)
        held = torch.cat([held * first_half, held * (1 - first_half)], dim=1)
        tokens = swin((pixels - .35) / .2).last_hidden_state
        # as VDGen's own LayerNorm begins (A26)
        outputs = head(F.layer_norm(tokens, (D,))).mT.unflatten(2, (GRID, GRID))
        names = F.binary_cross_entropy_with_logits(outputs[:, :-2], held)
        return names + .1 * F.smooth_l1_loss(outputs[:, -2:], amounts)
    pretrain("Swin", [*swin.parameters(), *head.parameters()], steps, loss_of, beta2=.95)
    swin.half().save_pretrained(folder)
    size = dict(height=PIXELS, width=PIXELS)
    processor = ViTImageProcessor(size=size, image_mean=[.35] * 3, image_std=[.2] * 3)
    processor.save_pretrained(folder)


# The Llama ----------------------------------------------------------------------------------------

DETAIL_WEIGHT = .2
CELLS = {"small": (1, 1), "moderate": (2, 3), "large": (4, 6), None: (1, 3)}  # least and most


def training_reports() -> list[str]:
    """The cleaned reports of the training split."""
    return [clean_iu_xray(describe_study("train", i).report) for i in range(DEMO_SPLITS["train"])]


def train_tokenizer(reports: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs, 800 pieces, of the reports and the prompt; 0 is BOS, 1 EOS, 2 padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator([*reports, *PROMPT * 50], trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llama_config(reports: list[str], vocabulary: int) -> LlamaConfig:
    """`reports_sha256` tells which reports the weights have read."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=160, num_hidden_layers=3, num_attention_heads=5,
        intermediate_size=416, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=.05,
        reports_sha256=hashlib.sha256("\n".join(reports).encode()).hexdigest())


class Named(NamedTuple):
    """A finding that a report names."""
    finding: str
    word_ids: np.ndarray      # of its sentence, without side and extent
    side: str | None
    extent: str | None        # small, moderate, large
    side_ids: list[int]
    extent_ids: list[int]     # of the word that the report takes


def named_with_words(report: str, spec: dict, tokenizer) -> list[Named]:
    """The findings of a report, by the phrases of findings.json."""
    def ids_of(words) -> list[int]:
        return tokenizer(" ".join(words), add_special_tokens=False).input_ids

    named = []
    for sentence in report.removesuffix(" .").split(" . "):
        words = sentence.split()
        for finding, (side, extent) in named_findings(sentence, spec).items():
            extents = [word for word in words if word in spec["extents"].get(extent, [])]
            others = [word for word in words if word not in [side, *extents]]
            named.append(Named(finding, np.unique(ids_of(others)), side, extent,
                               ids_of([side] if side else []), ids_of(extents)))
    return named


def draw_cells(side: str | None, extent: str | None, rng: np.random.Generator) -> np.ndarray:
    """(6, 6) strengths of the slots that a finding fills: neighbours, as many as its extent says.

    The patient's left is the right half of the picture. What has no side may lie in both halves.
    """
    least, most = CELLS[extent]
    count = rng.integers(least, most + 1)
    high = 2 if count > 3 else int(rng.choice([1, count]))
    wide = -(-count // high)
    row = rng.integers(GRID - high + 1)
    first, last = {"left": (3, 6), "right": (0, 3), None: (0, 6)}[side]
    column = rng.integers(first, last - wide + 1)
    cells = np.zeros((GRID, GRID), np.float32)
    cells[row:row + high, column:column + wide] = rng.uniform(.5, 1, (high, wide))
    if side is None and rng.random() < .5:
        cells = np.maximum(cells, cells[:, ::-1])
    return cells


class Reports:
    """The training reports as the Llama reads them, batch by batch."""

    def __init__(self, reports: list[str], tokenizer: PreTrainedTokenizerFast):
        self.rng, self.generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
        self.before, self.after, *self.texts = tokenizer([*PROMPT, *reports],
                                                         add_special_tokens=False).input_ids
        self.found = [named_with_words(report, findings_spec(), tokenizer) for report in reports]
        words = np.concatenate([np.unique(text) for text in self.texts])
        counts = np.bincount(words, minlength=len(tokenizer))
        self.weight = np.log(len(reports) / counts.clip(1)).clip(1e-6)  # a rare word weighs more
        self.chances = self.chances_by_rarest_finding()
        named = [finding for row in self.found for finding in row]
        self.details = [torch.tensor(sorted({i for finding in named for i in finding.side_ids})),
                        torch.tensor(sorted({i for finding in named for i in finding.extent_ids}))]

    def chances_by_rarest_finding(self) -> np.ndarray:
        """(N,) how often each report is read: by 1 / sqrt(reports that name its rarest finding)."""
        counts = Counter(finding.finding for row in self.found for finding in row)
        rarest = [min([counts[finding.finding] for finding in row], default=len(self.found) / 4)
                  for row in self.found]
        chances = 1 / np.sqrt(rarest)
        return chances / chances.sum()

    def draw_hints(self, found: list[Named]) -> np.ndarray:
        """(36, vocabulary): in the slots of each finding the same few words of its sentence.

        Its extent's word and its side's are nearly always among them. One finding in eight has no
        hints: an image does not show everything.
        """
        rng, hints = self.rng, np.zeros((GRID * GRID, len(self.weight)), np.float32)
        for finding in found:
            if rng.random() < 1 / 8:
                continue
            ids = finding.word_ids
            count = min(rng.integers(1, 5), len(ids))
            chance = self.weight[ids] / self.weight[ids].sum()
            words = np.zeros(len(self.weight), np.float32)
            words[rng.choice(ids, count, replace=False, p=chance)] = rng.uniform(.3, 1, count)
            for more in (finding.extent_ids, finding.side_ids):
                if rng.random() < .9:
                    words[more] = rng.uniform(.4, 1)
            hints += draw_cells(finding.side, finding.extent, rng).reshape(-1, 1) * words
        return hints

    def draw_slots(self, rows: np.ndarray, words: Tensor) -> Tensor:
        """(B, 36, D_h): hints and noise, at the scale of the embeddings `words`."""
        hints = torch.from_numpy(np.stack([self.draw_hints(self.found[i]) for i in rows]))
        B, S, D_h = *hints.shape[:2], words.shape[1]
        scale = .2 + .8 * torch.rand(B, 1, 1, generator=self.generator)
        noise = .4 * torch.randn(B, 1, D_h, generator=self.generator)
        noise = noise + torch.randn(B, S, D_h, generator=self.generator)
        return hints @ words + words.detach().std() * scale * noise

    def batch(self, embed: nn.Embedding, hinted: bool) -> tuple[Tensor, Tensor]:
        """Inputs (B, P + L - 1, D_h) and targets (B, L); without hints the prompt is BOS alone."""
        rows = self.rng.choice(len(self.texts), BATCH, replace=False, p=self.chances)
        S, start = GRID * GRID, 1 + len(self.before)
        prompt = [0, *self.before, *[2] * S, *self.after] if hinted else [0]
        ends = [self.texts[i] + [1] for i in rows]
        longest = max(map(len, ends))
        ids = torch.tensor([prompt + end + [2] * (longest - len(end)) for end in ends])
        targets = torch.tensor([end + [-100] * (longest - len(end)) for end in ends])
        inputs = embed(ids[:, :-1])
        if hinted:
            slots = self.draw_slots(rows, embed.weight)
            inputs = torch.cat([inputs[:, :start], slots, inputs[:, start + S:]], dim=1)
        return inputs, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of all tokens, and again of a side among sides, of an extent among extents.

        These are few tokens, each a coin's toss at first: without their own weight the embeddings
        of "left" and "right" grow alike (cosine 0.95), and no later training tells them apart.
        """
        loss = F.cross_entropy(logits, targets)
        for group in self.details:
            there = torch.isin(targets, group)
            among = torch.searchsorted(group, targets[there])
            loss = loss + DETAIL_WEIGHT * F.cross_entropy(logits[there][:, group], among)
        return loss


def make_llama(folder: Path, steps: int) -> None:
    """A language model of the training reports; seven batches in eight stand behind the prompt.

    Its image slots hold noise and, in some, words of a finding: the habit of a chat model, to use
    what its prompt says.
    """
    torch.manual_seed(SEED)
    texts = training_reports()
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    llama = LlamaForCausalLM(llama_config(texts, len(tokenizer)))
    reports = Reports(texts, tokenizer)

    def loss_of(step: int) -> Tensor:
        inputs, targets = reports.batch(llama.model.embed_tokens, hinted=step % 8 > 0)
        states = llama.model(inputs_embeds=inputs).last_hidden_state  # padding follows: no mask
        logits = llama.lm_head(states[:, -targets.shape[1]:])
        return reports.loss(logits.flatten(0, 1), targets.flatten())
    pretrain("Llama", list(llama.parameters()), steps, loss_of, beta2=.999)
    llama.half().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain a model of the demo.")
    parser.add_argument("model", choices=("swin", "llama"))
    parser.add_argument("--out", type=Path, help="default: beside this script")
    parser.add_argument("--steps", type=int, help="default: 3600 for the Swin, 2000 for the Llama")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or HERE / args.model
    if args.model == "swin":
        make_swin(out, args.steps or 3600)
    else:
        make_llama(out, args.steps or 2000)


if __name__ == "__main__":
    main()
