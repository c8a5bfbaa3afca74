"""The embedded demo: drawn radiographs and their reports, as ordinary files.

    python data.py demo                   # train.py does it by itself
    python -m configs.demo runs/demo      # draw demo_cases.png, the picture of the README

Its Swin and its Llama lie in demo_models/. Nothing behind data.py knows that it is a demo.
"""
import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configs.findings import named_findings

DEMO_SEED, PIXELS = 7, 96
DEMO_SPLITS = {"train": 2400, "val": 100, "test": 300}
DEMO_REPORTS = json.loads((Path(__file__).parent / "demo_reports.json").read_text(encoding="utf-8"))
DEMO_FINDINGS = DEMO_REPORTS["findings"]
EXTENTS = DEMO_REPORTS["extents"]["size"]  # small, moderate, large


def choose(options: list[str], rng: np.random.Generator, skew: float = 3.0) -> str:
    """One wording; each is `skew` times as likely as the next."""
    weights = skew ** -np.arange(len(options))
    return options[rng.choice(len(options), p=weights / weights.sum())]


def draw_findings(rng: np.random.Generator) -> list[dict]:
    """At most three findings, each present independently of the others."""
    present = [name for name, spec in DEMO_FINDINGS.items() if rng.random() < spec["frequency"]]
    findings = []
    for name in present[-3:]:
        spec = DEMO_FINDINGS[name]
        side = str(rng.choice(["left", "right"])) if spec["sided"] else None
        extent = str(rng.choice(EXTENTS)) if spec["extents"] else None
        findings.append({"finding": name, "side": side, "extent": extent})
    return findings


def write_report(findings: list[dict], rng: np.random.Generator) -> str:
    """Sentences by region: what is present, else the normal statement.

    Two neighbouring regions change places at times.
    """
    present = {f["finding"] for f in findings}
    absent = [name for name in ("effusion", "pneumothorax") if name not in present]
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
        elif normal and not sentences:
            often_left_out = region == "bone" and findings
            if not often_left_out or rng.random() >= .6:
                sentences = [choose(normal, rng, 1.6)]
        regions.append(sentences)
    if rng.random() < .25:
        swap = rng.integers(3)
        regions[swap], regions[swap + 1] = regions[swap + 1], regions[swap]
    return " ".join(s.capitalize() + "." for sentences in regions for s in sentences)


def soft(distance: np.ndarray, edge: float = .015) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, over an edge of the given width."""
    return np.clip(.5 - distance / edge, 0, 1)


def length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """As np.hypot, which is slow."""
    return np.sqrt(x * x + y * y)


class Lung(NamedTuple):
    """One lung of a frontal view, or both of a lateral one; the masks are (96, 96), in 0..1."""
    cx: float             # its middle
    width: float          # from there to its edge
    side: int             # -1 left in the picture, 1 right, 0 in a lateral view
    cavity: np.ndarray    # where it is, down to below the diaphragm
    air: np.ndarray       # the cavity above the diaphragm


class Film:
    """One view while it is drawn; the order of its random draws is part of the demo.

    `light` (96, 96) grows from 0, black, to 1, white. Lengths are in widths of the film: x grows to
    the right of the picture, which is the patient's left, and y downwards.
    """

    def __init__(self, findings: list[dict], lateral: bool, body: np.ndarray,
                 rng: np.random.Generator):
        self.lateral, self.body, self.rng = lateral, body, rng
        self.sides = {f["finding"]: f["side"] for f in findings}
        self.extents = {f["finding"]: f["extent"] for f in findings}
        y, x = (np.mgrid[:PIXELS, :PIXELS].astype(np.float32) + .5) / PIXELS
        scale = .96 + .09 * body[0]
        x = (x - .5 + .03 * (rng.random() - .5)) / scale + .5
        y = (y - .5 + .03 * (rng.random() - .5)) / scale + .5
        x = x + .06 * (rng.random() - .5) * (y - .5)  # a slight rotation
        self.x, self.y = x, y
        self.floor, self.top = .73 + .05 * (body[3] - .5), .13 + .03 * body[4]  # of the lungs
        self.skin = self.ellipse(.5, .68, .40 if lateral else .50, .66, .04)
        self.light = .58 * self.skin

    def ellipse(self, cx, cy, rx, ry, edge=.02) -> np.ndarray:
        distance = length((self.x - cx) / rx, (self.y - cy) / ry) - 1
        return soft(distance * min(rx, ry), edge)

    def stroke(self, x0, y0, x1, y1, half, edge=.015) -> np.ndarray:
        """The line from (x0, y0) to (x1, y1), `half` wide to each side."""
        from_x, from_y, dx, dy = self.x - x0, self.y - y0, x1 - x0, y1 - y0
        t = np.clip((from_x * dx + from_y * dy) / (dx ** 2 + dy ** 2), 0, 1)
        return soft(length(from_x - t * dx, from_y - t * dy) - half, edge)

    def has(self, name: str, side: int | None = None) -> bool:
        """Whether there is such a finding and, in a frontal view, whether it is on that side."""
        anywhere = side is None or self.lateral
        return name in self.sides and (anywhere or side == self.sign(name))

    def sign(self, name: str) -> int:
        return 1 if self.sides[name] == "left" else -1

    def by_extent(self, name: str, values: tuple[float, float, float]) -> float:
        """One of three values: of a small, a moderate or a large finding."""
        return values[EXTENTS.index(self.extents[name])]

    def spot(self, name: str, i: int) -> tuple[float, float]:
        """A lesion's centre: kept clear of heart, hilum and diaphragm."""
        v = .26 + .38 * self.body[i + 1]
        if self.lateral:
            return .36 + .30 * self.body[i + 2], v
        return .5 + self.sign(name) * (.16 + .09 * self.body[i]), v

    def draw_lung(self, cx: float, width: float, side: int) -> Lung:
        """Air over the diaphragm's dome."""
        dome = self.floor - (.05 - .012 * side) * (1 - ((self.x - cx) / width) ** 2)
        cavity = self.ellipse(cx, .5, width, .5 - self.top, .02)
        air = cavity * soft(self.y - dome, .02)
        self.light += air * (.20 + .05 * self.body[5] + .08 * self.y - self.light)
        return Lung(cx, width, side, cavity, air)

    def draw_ribs_and_vessels(self, lung: Lung) -> None:
        """Seven of each; vessels leave the hilum in any direction."""
        lift, strength = (.25, .05) if self.lateral else (0, .055)
        if self.lateral:
            rise = .35 - .55 * (self.x - .5)
        else:
            off = np.abs(self.x - .5)
            rise = .30 * off + .5 * np.maximum(off - .25, 0)
        cage = self.ellipse(lung.cx, .5, lung.width + .03, .43, .03)
        hilum = lung.cx - lung.side * .09
        for k in range(7):
            rib = soft(np.abs(self.y - .13 - .085 * k - rise + lift) - .010, .02)
            self.light += strength * rib * cage
            angle, reach = self.rng.random() * 6.3, .05 + .13 * self.rng.random()
            end = hilum + reach * math.cos(angle) * .7, .47 + reach * math.sin(angle)
            self.light += .05 * lung.air * self.stroke(hilum, .47, *end, .004)

    def draw_effusion(self, lung: Lung) -> None:
        outer = (self.x - lung.cx) / lung.width * (1 if self.lateral else lung.side)
        meniscus = .35 + .65 * np.clip(outer + .3, 0, 1.3) ** 2
        level = self.floor + .015 - self.by_extent("effusion", (.12, .20, .31)) * meniscus
        self.light += lung.cavity * soft(level - self.y, .03) * (.62 - self.light) * .9

    def draw_pneumothorax(self, lung: Lung) -> None:
        """Black around a smaller lung, and that lung's edge; in the upper part only."""
        _, _, side, _, air = lung
        shrink = self.by_extent("pneumothorax", (.18, .26, .36)) * (.6 if self.lateral else 1)
        across = self.x - lung.cx + side * lung.width * shrink * .7
        across = across / (lung.width * (1 - shrink * .6))
        along = (self.y - .5 - .38 * shrink) / ((.5 - self.top) * (1 - shrink))
        d, upper = length(across, along) - 1, soft(self.y - .62)
        self.light += air * soft(-d * .15, .01) * upper * (.04 - self.light) * .95
        self.light += .35 * air * soft(np.abs(d) * .15 - .005, .01) * upper

    def draw_edema(self, lung: Lung) -> None:
        across, along = (self.x - lung.cx + lung.side * .06) / .13, (self.y - .48) / .16
        haze = np.exp(-across ** 2 - along ** 2)
        grain = 1 + .2 * self.rng.standard_normal(self.x.shape, np.float32)
        self.light += self.by_extent("edema", (.28, .38, .52)) * lung.air * haze * grain

    def draw_atelectasis(self, lung: Lung) -> None:
        """One or two plates over the diaphragm."""
        ax, tilt = lung.cx + (.10 if self.lateral else .01 * lung.side), .05 * (self.body[8] - .5)
        for k in range(1 + (self.body[6] > .5)):
            ay = self.floor - .10 - .05 * k - .03 * self.body[7]
            plate = self.stroke(ax - .07, ay, ax + .07, ay + tilt, .012)
            self.light += .34 * lung.cavity * plate

    def draw_fracture(self, side: int) -> None:
        fx, fy = .5 + side * .29, .237 + .085 * int(1 + 4 * self.body[9])
        rib = self.stroke(fx - .05, fy - .05 * side, fx + .05, fy + .01 * side, .022, .02)
        self.light += .70 * rib
        self.light -= .70 * self.stroke(fx - .02, fy + .05, fx + .02, fy - .05, .008)

    def draw_findings_of(self, lung: Lung) -> None:
        if self.has("effusion", lung.side):
            self.draw_effusion(lung)
        if self.has("pneumothorax", lung.side):
            self.draw_pneumothorax(lung)
        if self.has("edema"):
            self.draw_edema(lung)
        if self.has("atelectasis", lung.side):
            self.draw_atelectasis(lung)
        if self.has("rib fracture", lung.side) and not self.lateral:
            self.draw_fracture(lung.side)

    def draw_bones(self) -> None:
        """The spine; the sternum in a lateral view, mediastinum and clavicles in a frontal one."""
        x, y, vertebrae = self.x, self.y, np.sin(self.y * 75)
        bent = x - .02 * (self.body[2] - .5) * np.cos((y - .45) * 7)
        if self.lateral:
            spine = soft(np.abs(bent - .80 + .25 * (y - .5) ** 2) - .04, .03)
            self.light += .16 * spine * (1 + .3 * vertebrae)
            self.light += .15 * soft(np.abs(x - .15) - .012, .02) * soft(y - .6)
            return
        self.light += .13 * soft(np.abs(bent - .5) - .035, .02) * (1 + .25 * vertebrae)
        mediastinum = soft(np.abs(bent - .5 - .01) - .06, .03)
        self.light = np.maximum(self.light, .55 * mediastinum)
        for side in (-1, 1):
            self.light += .10 * self.stroke(.5 + side * .05, .20, .5 + side * .36, .13, .012)

    def draw_heart(self) -> None:
        size = .120 + .025 * self.body[1]
        if self.has("cardiomegaly"):
            size += self.by_extent("cardiomegaly", (.045, .080, .125))
        if self.lateral:
            shadow = self.ellipse(.36, .60, .02 + size * .95, .135, .03)
        else:
            shadow = self.ellipse(.5 + .30 * size, .62, size, .125 + .1 * size, .03)
        self.light = np.maximum(self.light, (.60 + .06 * self.body[10]) * shadow)

    def draw_lesions(self) -> None:
        if self.has("opacity"):
            cx, cy = self.spot("opacity", 11)
            r = self.by_extent("opacity", (.060, .085, .12))
            along = (self.y - cy) / r / (.8 + .4 * self.body[14])
            haze = np.exp(-length((self.x - cx) / r, along) ** 2.5)
            grain = 1 + .25 * self.rng.standard_normal(self.x.shape, np.float32)
            self.light += .45 * haze * grain
        if self.has("nodule"):
            r = self.by_extent("nodule", (.042, .055, .072))
            self.light += .60 * self.ellipse(*self.spot("nodule", 15), r, r, .015)
        if self.has("granuloma"):
            self.light += self.ellipse(*self.spot("granuloma", 18), .026, .026, .012)

    def draw_pacemaker(self) -> None:
        """A box and the lead to the heart's tip."""
        px = .26
        if not self.lateral:
            px = .5 + self.sign("pacemaker") * (.24 + .05 * self.body[21])
        box = soft(np.maximum(np.abs(self.x - px) - .05, np.abs(self.y - .22) - .04))
        upper = self.stroke(px, .22, .5, .38, .006)
        lower = self.stroke(.5, .38, .40 if self.lateral else .53, .64, .006)
        for strength, metal in ((.98, box), (.85, upper), (.85, lower)):
            self.light = np.maximum(self.light, strength * metal)

    def expose(self) -> np.ndarray:
        """8 bits: dark beside the body, coarse and fine grain, a random gain and gamma."""
        light, rng = .05 + (self.light - .05) * self.skin, self.rng
        coarse = torch.from_numpy(rng.standard_normal((1, 1, 6, 6), dtype=np.float32))
        coarse = F.interpolate(coarse, light.shape, mode="bicubic")[0, 0].numpy()
        light += .02 * coarse + .015 * rng.standard_normal(light.shape, np.float32)
        gain, gamma = .9 + .2 * rng.random(), .9 + .2 * rng.random()
        light = gain * np.clip(light, 0, 1.2) ** gamma
        return (255 * np.clip(light, 0, 1)).astype(np.uint8)


def draw_film(findings: list[dict], lateral: bool, body: np.ndarray,
              rng: np.random.Generator) -> np.ndarray:
    """One 8-bit view (96, 96). `body` (24,) in 0..1 is the person, shared by both views."""
    film = Film(findings, lateral, body, rng)
    frontal = [(.31, .150, -1), (.69, .150, 1)]
    for cx, width, side in [(.48, .285, 0)] if lateral else frontal:
        lung = film.draw_lung(cx, width, side)
        film.draw_ribs_and_vessels(lung)
        film.draw_findings_of(lung)
    film.draw_bones()
    film.draw_heart()
    film.draw_lesions()
    if film.has("pacemaker"):
        film.draw_pacemaker()
    return film.expose()


class Study(NamedTuple):
    """A study before its films are drawn."""
    findings: list[dict]
    body: list[float]           # 24 numbers in 0..1: the person
    view_count: int
    report: str
    rng: np.random.Generator    # of its films


def describe_study(split: str, i: int) -> Study:
    """Study i of a split; no other depends on the same random numbers."""
    rng = np.random.default_rng([DEMO_SEED, list(DEMO_SPLITS).index(split), i])
    findings, body = draw_findings(rng), rng.random(24).tolist()
    return Study(findings, body, 1 if rng.random() < .1 else 2, write_report(findings, rng), rng)


def draw_study(root: Path, split: str, i: int) -> tuple[dict, list[dict]]:
    """Draw the views of study i of a split; returns its entry in annotation.json, its findings."""
    study, name = describe_study(split, i), f"{split}_{i:04d}"
    views = [f"{name}/{v}.png" for v in range(study.view_count)]
    (root / "images" / name).mkdir(parents=True, exist_ok=True)
    for v, path in enumerate(views):
        film = draw_film(study.findings, v == 1, study.body, study.rng)
        Image.fromarray(film).save(root / "images" / path)
    return {"id": name, "report": study.report, "image_path": views}, study.findings


def findings_spec() -> dict:
    """findings.json without its studies: the words that name a finding, a side, an extent."""
    sizes_and_grades = zip(*DEMO_REPORTS["extents"].values())
    return {"phrases": {name: spec["phrases"] for name, spec in DEMO_FINDINGS.items()},
            "sides": {side: [side] for side in ("left", "right")},
            "extents": {size: sorted({size, grade}) for size, grade in sizes_and_grades}}


def build_demo(root: Path, studies: dict[str, int] = DEMO_SPLITS) -> None:
    """Draw a data root in R2Gen's format, with findings.json. Same arguments, same bytes."""
    annotation, truth = {}, {}
    for split, count in studies.items():
        annotation[split] = []
        for i in tqdm(range(count), f"drawing {split}", mininterval=1):
            entry, findings = draw_study(root, split, i)
            annotation[split].append(entry)
            truth[entry["id"]] = findings
    (root / "findings.json").write_text(json.dumps(findings_spec() | {"studies": truth}))
    (root / "annotation.json").write_text(json.dumps(annotation))


# The picture of the README ------------------------------------------------------------------------

FILM, MARGIN, COLUMN, LINE = 288, 20, 460, 30  # pixels; a film at three times its size
PLAIN, AGREES, DIFFERS, TITLE = "#1f2328", "#0b5fa5", "#c2410c", "#59636e"
LEGEND = (("Blue: a finding, side or extent that both texts name.", AGREES),
          ("Orange: a finding that the other text does not name, with its side and extent; or a "
           "side or extent that differs.", DIFFERS))


def coloured(text: str, other: str, spec: dict) -> list[tuple[str, str]]:
    """(word, colour) of a cleaned text beside another.

    What a phrase of `spec` (findings.json) reads as a finding, its side or its extent is AGREES if
    the other text says so too, else DIFFERS.
    """
    theirs, words = named_findings(other, spec), []
    for sentence in text.removesuffix(" .").split(" . "):
        colours = {}
        for finding, details in named_findings(sentence, spec).items():
            said = [("phrases", finding, finding in theirs)]
            their_details = theirs.get(finding, (None, None))
            for key, ours, own in zip(("sides", "extents"), details, their_details):
                said += [(key, ours, ours == own)] if ours else []
            colours |= {word: AGREES if agrees else DIFFERS
                        for key, name, agrees in said for word in spec[key][name]}
        row = sentence.split()
        words += [(word + "." * (i == len(row)), colours.get(word, PLAIN))
                  for i, word in enumerate(row, 1)]
    return words


def write_words(draw: ImageDraw.ImageDraw, words: list[tuple[str, str]], x: int, y: int,
                font: ImageFont.FreeTypeFont) -> None:
    """Words in their colours, wrapped to COLUMN; what differs is underlined, too."""
    left, space = x, draw.textlength(" ", font)
    for word, colour in words:
        width = draw.textlength(word, font)
        if left + width > x + COLUMN:
            left, y = x, y + LINE
        draw.text((left, y), word, colour, font)
        if colour == DIFFERS:
            end = left + draw.textlength(word.removesuffix("."), font)
            draw.line([left, y + LINE - 3, end, y + LINE - 3], colour, 2)
        left += width + space


def draw_cases(run: Path, root: Path, target: Path) -> None:
    """The picture of the README: a legend, and three test studies with two findings.

    The first study whose report names both findings, one, and none; with two views if there is any.

    Args:
        run: holds test_predictions.jsonl, as training leaves it.
        root: of the demo's data.
        target: a PNG. Each row says how many of the studies with two findings are like it.
    """
    spec = json.loads((root / "findings.json").read_text(encoding="utf-8"))
    lines = (run / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    groups: dict[int, list[dict]] = {2: [], 1: [], 0: []}
    for row in map(json.loads, lines):
        there = named_findings(row["reference"], spec).keys()
        if len(there) == 2:
            groups[len(there & named_findings(row["prediction"], spec).keys())].append(row)
    total = sum(map(len, groups.values()))
    height = FILM + 2 * MARGIN + LINE
    size = (5 * MARGIN + 2 * FILM + 2 * COLUMN, 3 * height + 2 * MARGIN + len(LEGEND) * LINE)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    y = MARGIN
    for line, colour in LEGEND:
        draw.text((MARGIN, y), line, colour, font)
        y += LINE
    y += MARGIN
    for named, rows in groups.items():
        two_views = (row for row in rows if len(row["image_path"]) == 2)
        row = next(two_views, rows[0] if rows else None)
        title = ("Neither", "One", "Both")[named] + " of two findings named: "
        title += f"{len(rows)} of {total} studies" + (f"; here {row['id']}" if row else "")
        draw.text((MARGIN, y), title, TITLE, font)
        y += LINE + 6
        if row is None:
            continue
        for v, path in enumerate(row["image_path"]):
            film = Image.open(root / "images" / path).resize((FILM, FILM), Image.Resampling.NEAREST)
            canvas.paste(film, (MARGIN + v * (FILM + 4), y))
        x = 2 * MARGIN + 2 * FILM + 8
        for heading, key, other in (("Reference", "reference", "prediction"),
                                    ("Report", "prediction", "reference")):
            draw.text((x, y), heading, TITLE, font)
            write_words(draw, coloured(row[key], row[other], spec), x, y + LINE + 6, font)
            x += COLUMN + MARGIN + 8
        y += FILM + 2 * MARGIN - 6
    drawn = canvas.crop((0, 0, canvas.width, y))
    small = drawn.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
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
