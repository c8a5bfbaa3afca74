"""The embedded demo: drawn radiographs and reports, and two small pretrained models, all as ordinary files (demo.yaml).

    python -m configs.demo runs/demo      # draw demo_cases.png, the picture of the README

Nothing behind data.py knows that it is a demo.
"""
import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from configs import PROMPT

DEMO_SEED, PIXELS, TOKENS = 7, 96, 36
DEMO_SPLITS = {"train": 2400, "val": 100, "test": 300}
DEMO_REPORTS = json.loads((Path(__file__).parent / "demo_reports.json").read_text(encoding="utf-8"))
DEMO_FINDINGS, EXTENTS = DEMO_REPORTS["findings"], DEMO_REPORTS["extents"]["size"]  # small, moderate, large


def choose(options: list[str], rng: np.random.Generator, skew: float = 3.0) -> str:
    """One wording; each is `skew` times as likely as the next."""
    weights = skew ** -np.arange(len(options))
    return options[rng.choice(len(options), p=weights / weights.sum())]


def draw_findings(rng: np.random.Generator) -> list[dict]:
    """At most three findings, each present independently of the others."""
    present = [name for name, spec in DEMO_FINDINGS.items() if rng.random() < spec["frequency"]]
    return [{"finding": name, "side": str(rng.choice(["left", "right"])) if DEMO_FINDINGS[name]["sided"] else None,
             "extent": str(rng.choice(EXTENTS)) if DEMO_FINDINGS[name]["extents"] else None} for name in present[-3:]]


def write_report(findings: list[dict], rng: np.random.Generator) -> str:
    """Sentences by region: what is present, else the normal statement; two neighbours change places at times."""
    absent = [name for name in ("effusion", "pneumothorax") if name not in {f["finding"] for f in findings}]
    regions = []
    for region in ("heart", "lung", "pleura", "bone", "device"):
        sentences = []
        for f in findings:
            spec = DEMO_FINDINGS[f["finding"]]
            if spec["region"] == region:
                words = DEMO_REPORTS["extents"].get(spec["extents"])
                extent = words and words[EXTENTS.index(f["extent"])]
                sentences.append(choose(spec["wordings"], rng).format(s=f["side"], e=extent))
        normal = DEMO_REPORTS["normal"].get(region)
        if region == "pleura" and absent:
            named = " or ".join(absent).replace("effusion", "pleural effusion")
            sentences.append(choose(DEMO_REPORTS["absent"], rng, 1.6).format(named))
        elif normal and not sentences and not (region == "bone" and findings and rng.random() < .6):
            sentences = [choose(normal, rng, 1.6)]
        regions.append(sentences)
    if rng.random() < .25:
        swap = rng.integers(3)
        regions[swap], regions[swap + 1] = regions[swap + 1], regions[swap]
    return " ".join(s.capitalize() + "." for sentences in regions for s in sentences)


def soft(distance: np.ndarray, edge: float = .015) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, over an edge of the given width."""
    return np.clip(.5 - distance / edge, 0, 1)


def draw_film(findings: list[dict], lateral: bool, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One 8-bit view. ``body`` (24,) in 0..1 is the person, shared by both views. The patient's left is right."""
    has = {f["finding"]: (f, EXTENTS.index(f["extent"]) if f["extent"] else 1) for f in findings}
    y, x = (np.mgrid[:PIXELS, :PIXELS].astype(np.float32) + .5) / PIXELS
    scale = .96 + .09 * body[0]
    x, y = (x - .5 + .03 * (rng.random() - .5)) / scale + .5, (y - .5 + .03 * (rng.random() - .5)) / scale + .5
    x = x + .06 * (rng.random() - .5) * (y - .5)                                           # a slight rotation

    def ellipse(cx, cy, rx, ry, edge=.02):
        return soft((np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry), edge)

    def stroke(x0, y0, x1, y1, half, edge=.015):
        t = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        return soft(np.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)) - half, edge)

    def sign(name):
        return 1 if has[name][0]["side"] == "left" else -1

    def spot(name, i):                       # a lesion's centre: kept clear of heart, hilum and diaphragm
        v = .26 + .38 * body[i + 1]
        return (.36 + .30 * body[i + 2], v) if lateral else (.5 + sign(name) * (.16 + .09 * body[i]), v)

    heart = .120 + .025 * body[1] + ((.045, .075, .105)[has["cardiomegaly"][1]] if "cardiomegaly" in has else 0)
    bend = .02 * (body[2] - .5)
    floor, top = .73 + .05 * (body[3] - .5), .13 + .03 * body[4]
    skin = ellipse(.5, .68, .40 if lateral else .50, .66, .04)
    film = .58 * skin
    sides = [(.48, .285, 0)] if lateral else [(.31, .150, -1), (.69, .150, 1)]
    for cx, width, side in sides:                                                          # lungs and pleura
        dome = floor - (.05 - .012 * side) * (1 - ((x - cx) / width) ** 2)
        cavity = ellipse(cx, .5, width, .5 - top, .02)
        lung = cavity * soft(y - dome, .02)
        film += lung * (.20 + .05 * body[5] + .08 * y - film)
        for k in range(7):                                                                 # ribs, vessels
            rise = (.35 - .55 * (x - .5)) if lateral else .30 * np.abs(x - .5) + .5 * np.maximum(np.abs(x - .5) - .25, 0)
            rib = soft(np.abs(y - .13 - .085 * k - rise + (.25 if lateral else 0)) - .010, .02)
            film += (.05 if lateral else .055) * rib * ellipse(cx, .5, width + .03, .43, .03)
            a, r, hx = rng.random() * 6.3, .05 + .13 * rng.random(), cx - side * .09
            film += .05 * lung * stroke(hx, .47, hx + r * np.cos(a) * .7, .47 + r * np.sin(a), .004)
        if "effusion" in has and (lateral or side == sign("effusion")):
            outer = (x - cx) / width * (1 if lateral else side)                            # the fluid's meniscus
            level = floor + .015 - (.06, .14, .25)[has["effusion"][1]] * (.35 + .65 * np.clip(outer + .3, 0, 1.3) ** 2)
            film += cavity * soft(level - y, .03) * (.62 - film) * .9
        if "pneumothorax" in has and (lateral or side == sign("pneumothorax")):
            shrink = (.10, .16, .24)[has["pneumothorax"][1]] * (.6 if lateral else 1)
            d = np.hypot((x - cx + side * width * shrink * .7) / (width * (1 - shrink * .6)),
                         (y - .5 - .38 * shrink) / ((.5 - top) * (1 - shrink))) - 1
            film += lung * soft(-d * .15, .01) * soft(y - .62) * (.10 - film) * .85
            film += .22 * lung * soft(np.abs(d) * .15 - .005, .01) * soft(y - .62)
        if "edema" in has:
            haze = np.exp(-((x - cx + side * .06) / .13) ** 2 - ((y - .48) / .16) ** 2)
            film += (.14, .22, .32)[has["edema"][1]] * lung * haze * (1 + .2 * rng.standard_normal(x.shape))
        if "atelectasis" in has and (lateral or side == sign("atelectasis")):
            for k in range(1 + (body[6] > .5)):
                ay, ax = floor - .10 - .05 * k - .03 * body[7], cx + (.10 if lateral else .01 * side)
                film += .34 * cavity * stroke(ax - .07, ay, ax + .07, ay + .05 * (body[8] - .5), .012)
        if "rib fracture" in has and side == sign("rib fracture"):                         # seen from the front
            fx, fy = .5 + side * .29, .237 + .085 * int(1 + 4 * body[9])
            film += .50 * stroke(fx - .025, fy - .025 * side, fx + .025, fy + .005 * side, .012, .02)
            film -= .35 * stroke(fx - .012, fy + .03, fx + .012, fy - .03, .004)
    mx = x - bend * np.cos((y - .45) * 7)
    if lateral:
        film += .16 * soft(np.abs(mx - .80 + .25 * (y - .5) ** 2) - .04, .03) * (1 + .3 * np.sin(y * 75))
        film += .15 * soft(np.abs(x - .15) - .012, .02) * soft(y - .6)
        shadow = ellipse(.36, .60, .02 + heart * .95, .135, .03)
    else:
        film += .13 * soft(np.abs(mx - .5) - .035, .02) * (1 + .25 * np.sin(y * 75))
        film = np.maximum(film, .55 * soft(np.abs(mx - .5 - .01) - .06, .03))
        for side in (-1, 1):
            film += .10 * stroke(.5 + side * .05, .20, .5 + side * .36, .13, .012)
        shadow = ellipse(.5 + .30 * heart, .62, heart, .125 + .1 * heart, .03)
    film = np.maximum(film, (.60 + .06 * body[10]) * shadow)
    if "opacity" in has:
        (cx, cy), r = spot("opacity", 11), (.04, .065, .095)[has["opacity"][1]]
        haze = np.exp(-(np.hypot((x - cx) / r, (y - cy) / r / (.8 + .4 * body[14]))) ** 2.5)
        film += .36 * haze * (1 + .25 * rng.standard_normal(x.shape))
    if "nodule" in has:
        (cx, cy), r = spot("nodule", 15), (.026, .036, .050)[has["nodule"][1]]
        film += .42 * ellipse(cx, cy, r, r, .015)
    if "granuloma" in has:
        cx, cy = spot("granuloma", 18)
        film += .80 * ellipse(cx, cy, .018, .018, .012)
    if "pacemaker" in has:
        px = .26 if lateral else .5 + sign("pacemaker") * (.24 + .05 * body[21])
        film = np.maximum(film, .98 * soft(np.maximum(np.abs(x - px) - .04, np.abs(y - .22) - .03)))
        film = np.maximum(film, .85 * stroke(px, .22, .5, .38, .006))
        film = np.maximum(film, .85 * stroke(.5, .38, .40 if lateral else .53, .64, .006))
    film = .05 + (film - .05) * skin
    coarse = torch.from_numpy(rng.standard_normal((1, 1, 6, 6), dtype=np.float32))
    film += .02 * F.interpolate(coarse, x.shape, mode="bicubic")[0, 0].numpy() + .015 * rng.standard_normal(x.shape)
    film = (.9 + .2 * rng.random()) * np.clip(film, 0, 1.2) ** (.9 + .2 * rng.random())
    return (255 * np.clip(film, 0, 1)).astype(np.uint8)


def draw_studies(root: Path, studies: dict[str, int]) -> tuple[dict, dict]:
    """Images, annotation.json and findings.json; returns the last two."""
    annotation, truth = {}, {}
    for number, (split, count) in enumerate(studies.items()):
        annotation[split] = []
        for i in tqdm(range(count), f"drawing {split}", mininterval=1):
            rng = np.random.default_rng([DEMO_SEED, number, i])
            name, findings, body = f"{split}_{i:04d}", draw_findings(rng), rng.random(24)
            views = [f"{name}/{v}.png" for v in range(1 if rng.random() < .1 else 2)]
            (root / "images" / name).mkdir(parents=True, exist_ok=True)
            for v, path in enumerate(views):
                Image.fromarray(draw_film(findings, v == 1, body, rng)).save(root / "images" / path)
            annotation[split].append({"id": name, "report": write_report(findings, rng), "image_path": views})
            truth[name] = findings
    return annotation, truth


def draw_shapes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Generic shapes on clutter, (count, 1, 96, 96), and which kinds, sizes and signs each cell holds, (count, 11, 6, 6)."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def local(n):                                            # turned coordinates around n random centres
        x, y = grid - uniform(0, 1, count, n, 1, 1), grid[:, None] - uniform(0, 1, count, n, 1, 1)
        angle = uniform(0, 6.3, count, n, 1, 1)
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    grid = (torch.arange(PIXELS) + .5) / PIXELS

    image = uniform(.1, .6, count, 1, 1, 1).expand(-1, -1, PIXELS, PIXELS).clone()
    u, v = local(4)                                          # clutter: large ellipses, bands and noise, unlabelled
    big = ((u / uniform(.15, .5, count, 4, 1, 1)) ** 2 + (v / uniform(.1, .4, count, 4, 1, 1)) ** 2 - 1).mul(-4).sigmoid()
    image += (big * uniform(-.2, .2, count, 4, 1, 1)).sum(1, keepdim=True)
    bands = uniform(0, .05, count, 4, 1, 1) * (u * uniform(10, 90, count, 4, 1, 1)).sin().clamp(min=0)
    image += bands[:, :2].sum(1, keepdim=True)
    for cells in (4, 12, 48):
        noise = torch.randn(count, 1, cells, cells, generator=generator) * uniform(0, .06, count, 1, 1, 1)
        image += F.interpolate(noise, (PIXELS, PIXELS), mode="bilinear")
    kind, size, sign = (torch.randint(k, (count, 5, 1, 1), generator=generator) for k in (6, 3, 2))
    u, v = local(5)
    radius = torch.tensor([.022, .045, .09])[size] * uniform(.75, 1.25, count, 5, 1, 1)
    rho = torch.hypot(u, v)
    distance = torch.stack([rho - radius, (rho - radius).abs() - .008, torch.maximum(u.abs(), v.abs()) - radius,
                            torch.maximum(u.abs() - 2 * radius, v.abs() - .010)])     # disc, ring, box, bar
    alpha = torch.cat([(.5 - distance / .015).clamp(0, 1), torch.stack([                # blob, grating
        (-(rho / radius) ** 2).exp(), (-(rho / radius) ** 2).exp() * (.5 + .5 * (u * 120).sin())])])
    alpha = alpha.gather(0, kind.expand_as(u)[None])[0]
    image += (alpha * uniform(.10, .60, count, 5, 1, 1) * (2 * sign - 1)).sum(1, keepdim=True)
    image += .025 * torch.randn(image.shape, generator=generator)
    traits = torch.cat([F.one_hot(t[..., 0, 0], n) for t, n in ((kind, 6), (size, 3), (sign, 2))], -1).float()
    cells = (F.max_pool2d(alpha, PIXELS // 6) > .5).float()
    return image.clamp(0, 1), (cells[:, :, None] * traits[..., None, None]).amax(1)


def pretrain(what: str, parameters: list, steps: int, loss_of, beta2: float) -> None:
    """AdamW under a one-cycle schedule; `loss_of(step)` draws its batch."""
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(.9, beta2), weight_decay=.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=.1)
    for step in (bar := tqdm(range(steps), f"pretraining the {what}")):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def pretrain_swin(folder: Path, steps: int, batch: int = 32) -> None:
    """The stand-in for ImageNet: name the generic shapes in each cell. No film, finding or report is used."""
    from transformers import SwinConfig, SwinModel, ViTImageProcessor
    torch.manual_seed(DEMO_SEED)
    generator = torch.Generator().manual_seed(DEMO_SEED)
    swin = SwinModel(SwinConfig(
        image_size=PIXELS, patch_size=4, embed_dim=48, depths=[1, 1, 2], num_heads=[2, 4, 6], window_size=6,
        use_absolute_embeddings=True, drop_path_rate=0.0, initializer_range=.06, attn_implementation="eager"),
        add_pooling_layer=False)  # eager: on a CPU the fused attention's gradient in bfloat16 is slow
    head = torch.nn.Linear(swin.config.hidden_size, 11)
    pool = [draw_shapes(64, generator) for _ in tqdm(range(max(1, steps // 19)), "drawing shapes")]
    images, labels = (torch.cat(parts) for parts in zip(*pool))

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        flips = [d for d in (2, 3) if torch.rand((), generator=generator) < .5]  # shapes have no left and right
        x, target = images[rows].flip(flips).expand(-1, 3, -1, -1), labels[rows].flip(flips).flatten(2).mT
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(swin((x - .35) / .2).last_hidden_state)
        return F.binary_cross_entropy_with_logits(logits.float(), target)
    pretrain("Swin", [*swin.parameters(), *head.parameters()], steps, loss_of, beta2=.95)
    swin.save_pretrained(folder)
    ViTImageProcessor(size=dict(height=PIXELS, width=PIXELS), image_mean=[.35] * 3, image_std=[.2] * 3).save_pretrained(folder)


def pretrain_llama(folder: Path, reports: list[str], steps: int, batch: int = 32) -> None:
    """A language model of the training reports, seven batches in eight behind a prompt whose image slots hold a noisy sum
    of some of the report's own words: the habit of a chat model, to use what its prompt says. No image is used."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(DEMO_SEED)
    rng, generator = np.random.default_rng(DEMO_SEED), torch.Generator().manual_seed(DEMO_SEED)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    bpe.train_from_iterator([*reports, *PROMPT * 50], trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        attn_implementation="eager"))
    before, after = (tokenizer(t, add_special_tokens=False).input_ids for t in PROMPT)
    texts = [tokenizer(r, add_special_tokens=False).input_ids for r in reports]
    seen = np.bincount(np.concatenate([np.unique(t) for t in texts]), minlength=len(tokenizer))
    weight = np.log(len(texts) / seen.clip(1)).clip(1e-6)      # words that tell reports apart are hinted at more often
    embed, start = llama.model.embed_tokens, 1 + len(before)

    def loss_of(step: int) -> Tensor:
        rows = rng.choice(len(texts), batch, replace=False)
        prompt = [0, *before, *[2] * TOKENS, *after] if step % 8 else [0]
        ends, longest = [texts[i] + [1] for i in rows], 1 + max(len(texts[i]) for i in rows)
        ids = torch.tensor([prompt + end + [2] * (longest - len(end)) for end in ends])
        targets = torch.tensor([end + [-100] * (longest - len(end)) for end in ends])
        inputs = embed(ids[:, :-1])
        if step % 8:
            hints = torch.zeros(batch, 1, len(tokenizer))
            for b, i in enumerate(rows):
                words = np.unique(texts[i])
                count, chance = min(rng.integers(0, 9), len(words)), weight[words] / weight[words].sum()
                words = rng.choice(words, count, replace=False, p=chance)
                hints[b, 0, words] = torch.rand(len(words), generator=generator)
            noise = (torch.randn(batch, n, 192, generator=generator) * sd for n, sd in ((1, .3), (TOKENS, 1.0)))
            slots = hints @ embed.weight + embed.weight.detach().std() * sum(noise)
            inputs = torch.cat([inputs[:, :start], slots, inputs[:, start + TOKENS:]], 1)
        with torch.autocast("cpu", torch.bfloat16):
            states = llama.model(inputs_embeds=inputs).last_hidden_state  # padding follows: no mask needed
            logits = llama.lm_head(states[:, len(prompt) - 1:])
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    pretrain("Llama", list(llama.parameters()), steps, loss_of, beta2=.999)
    llama.save_pretrained(folder)


def build_demo(root: Path, clean: Callable[[str], str], studies: dict[str, int] = DEMO_SPLITS, swin_steps: int = 900,
               llama_steps: int = 500) -> None:
    """Write the demo: a data root in R2Gen's format, and the folders swin and llama in it. Same arguments, same bytes.
    `clean` is the report cleaning of the dataset: the Llama reads what training reads.

    Built under another name and renamed at the end, so that a stopped build leaves nothing that looks whole.
    """
    building = root.with_name(root.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    with torch.random.fork_rng():
        annotation, truth = draw_studies(building, studies)
        pretrain_swin(building / "swin", swin_steps)
        pretrain_llama(building / "llama", [clean(s["report"]) for s in annotation["train"]], llama_steps)
    (building / "findings.json").write_text(json.dumps({
        "phrases": {name: spec["phrases"] for name, spec in DEMO_FINDINGS.items()},
        "sides": {"left": ["left"], "right": ["right"]},
        "extents": {size: sorted({size, grade}) for size, grade in zip(*DEMO_REPORTS["extents"].values())},
        "studies": truth}))
    (building / "annotation.json").write_text(json.dumps(annotation))
    building.rename(root)


# The picture of the README ------------------------------------------------------------------------

FILM, MARGIN, COLUMN, LINE = 288, 20, 460, 30  # pixels; a film at three times its size
PLAIN, AGREES, DIFFERS = "#1f2328", "#0b5fa5", "#c2410c"


def coloured(text: str, other: str, spec: dict) -> list[tuple[str, str]]:
    """(word, colour) of a cleaned text beside another: what a phrase of `spec` (findings.json) reads
    as a finding, its side or its extent is AGREES if the other text says so too, else DIFFERS."""
    from data import named_findings  # data.py imports this module
    theirs, words = named_findings(other, spec), []
    for sentence in text.removesuffix(" .").split(" . "):
        colours = {}
        for finding, details in named_findings(sentence, spec).items():
            said = [("phrases", finding, finding in theirs)]
            for key, ours, own in zip(("sides", "extents"), details, theirs.get(finding, (None,) * 2)):
                said += [(key, ours, ours == own)] if ours else []
            colours |= {word: AGREES if agrees else DIFFERS
                        for key, name, agrees in said for word in spec[key][name]}
        row = sentence.split()
        words += [(word + "." * (i == len(row)), colours.get(word, PLAIN))
                  for i, word in enumerate(row, 1)]
    return words


def write_words(draw: ImageDraw.ImageDraw, words: list[tuple[str, str]], x: int, y: int,
                font: ImageFont.FreeTypeFont) -> None:
    """Words in their colours, wrapped to COLUMN; a line under what differs, for who sees no colour."""
    left, space = x, draw.textlength(" ", font)
    for word, colour in words:
        width = draw.textlength(word, font)
        if left + width > x + COLUMN:
            left, y = x, y + LINE
        draw.text((left, y), word, colour, font)
        if colour == DIFFERS:
            draw.line([left, y + LINE - 3, left + width, y + LINE - 3], colour, 2)
        left += width + space


def draw_cases(run: Path, root: Path, target: Path) -> None:
    """Test studies with two views and two findings: the first whose report names both, one, none.

    Args:
        run: holds test_predictions.jsonl, as training leaves it.
        root: of the demo's data.
        target: a PNG. Each row tells how many of the studies with two findings are like it.
    """
    from data import named_findings
    spec = json.loads((root / "findings.json").read_text(encoding="utf-8"))
    lines = (run / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    groups: dict[int, list[dict]] = {2: [], 1: [], 0: []}
    for row in map(json.loads, lines):
        there = named_findings(row["reference"], spec).keys()
        if len(there) == 2:
            groups[len(there & named_findings(row["prediction"], spec).keys())].append(row)
    total = sum(map(len, groups.values()))
    height = FILM + 2 * MARGIN + LINE
    size = (5 * MARGIN + 2 * FILM + 2 * COLUMN, 3 * height + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    for i, (named, rows) in enumerate(groups.items()):
        row = next((row for row in rows if len(row["image_path"]) == 2), None)
        y = i * height + MARGIN
        title = f"{('Neither', 'One', 'Both')[named]} of two findings named: {len(rows)} of {total} studies"
        draw.text((MARGIN, y), title + (f", such as {row['id']}" if row else ""), "#59636e", font)
        if row is None:
            continue
        y += LINE + 6
        for v, path in enumerate(row["image_path"]):
            film = Image.open(root / "images" / path).resize((FILM, FILM), Image.Resampling.NEAREST)
            canvas.paste(film, (MARGIN + v * (FILM + 4), y))
        x = 2 * MARGIN + 2 * FILM + 8
        for heading, key, other in (("Reference", "reference", "prediction"),
                                    ("Report", "prediction", "reference")):
            draw.text((x, y), heading, "#59636e", font)
            write_words(draw, coloured(row[key], row[other], spec), x, y + LINE + 6, font)
            x += COLUMN + MARGIN + 8
    small = canvas.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw three cases of a run of the demo.")
    parser.add_argument("run", type=Path, help="the folder of the run, such as runs/demo")
    parser.add_argument("--data", type=Path, default="data/demo", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("demo_cases.png"),
                        help="default: %(default)s")
    args = parser.parse_args()
    draw_cases(args.run, args.data, args.out)


if __name__ == "__main__":
    main()
