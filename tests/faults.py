"""Trouble in a tiny training run, at random moments: what --resume makes of it.

    python tests/faults.py [--runs 210] [--seed 0] [--only NUMBER]

Each run meets the next of FAULTS, at a moment that its number and the seed fix, and is resumed.
Then it equals an undisturbed run bit for bit (weights, optimizer, random state, logged steps, what
it wrote of the test split), or it ends in one line "error: ...". All else is broken. A moment is a
line of this repository, or of torch.save, drawn at random, and which time it runs. The libraries
are imported once: a run is a fork of this process.
"""
import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from conftest import TIMING, tiny_config, write_backbones, write_data  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from configs import Config  # noqa: E402
from configs.files import read_checkpoint  # noqa: E402

WATCHED = {module.__file__ for module in (train, evaluate, data, model, torch.serialization)}
CHECKPOINTS = ("last.pt", "best.pt", "teacher.pt")
SECONDS = 600  # a run takes about one; longer, and it hangs
VARIANTS = (("train.precision=fp32", "train.save_every_steps=1"),
            ("train.precision=bf16", "train.save_every_steps=3"))
Place = tuple[str, int]  # of a line: file and number


# One process --------------------------------------------------------------------------------------

@dataclass
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it; its output."""
    code: int
    errors: str

    @property
    def last_line(self) -> str:
        text = self.errors.replace("\x1b[A", "\n")  # a progress bar goes up a line when it leaves
        return (text.strip().splitlines() or [""])[-1]

    @property
    def as_promised(self) -> bool:
        """To the end, stopped, or refused in one line."""
        refused = self.code == 1 and self.last_line.startswith("error: ")
        noisy = "Traceback" in self.errors or "Exception ignored" in self.errors
        return (refused or self.code in (0, 130) or self.code < 0) and not noisy


def fork(config: Config, output: Path, hurt: Callable[[], None] | None = None) -> int:
    """Start `train.py --resume` in a fork, after `hurt()`; its stdout and stderr go to a file."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(SECONDS)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout, sys.stderr = (open(file, "w", buffering=1, closefd=False) for _ in range(2))
        torch.set_num_threads(1)
        if hurt:
            hurt()
        data.end_in_one_line(lambda: train.train(config, resume=True))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.settrace(None)
        os._exit(code)


def wait(pid: int, output: Path) -> Ended:
    status = os.waitpid(pid, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"))


def watch_lines(seen: Callable[[Place], None]) -> None:
    """Call `seen` before each line of WATCHED that this process runs from now on."""
    def line(frame, event, argument):
        if event == "line":
            seen((frame.f_code.co_filename, frame.f_lineno))
        return line
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in WATCHED else None)


def at_moment(place: Place, times: int, act: Callable[[], None]) -> None:
    """Call `act` once: when the line `place` is about to run for the `times`-th time."""
    left = times

    def seen(here: Place) -> None:
        nonlocal left
        left -= here == place
        if here == place and left == 0:
            act()
    watch_lines(seen)


# One run ------------------------------------------------------------------------------------------

@dataclass
class Case:
    """A run that meets a fault, and the undisturbed one, `whole`, that it is compared with."""
    random: random.Random
    config: Config
    whole: Path
    lines: dict[Place, int]  # how often each line of an undisturbed run is run
    output: Path             # stdout and stderr

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output)

    def run(self, hurt: Callable[[], None] | None = None) -> Ended:
        return wait(fork(self.config, self.output, hurt), self.output)

    def until_moment(self, number: int) -> int:
        """Start a run that sends itself a signal at a random moment."""
        place = self.random.choice(sorted(self.lines))
        times = self.random.randint(1, self.lines[place])
        return fork(self.config, self.output, lambda: at_moment(
            place, times, lambda: os.kill(os.getpid(), number)))

    def signalled(self, number: int) -> Ended:
        return wait(self.until_moment(number), self.output)


def undisturbed(config: Config, output: Path) -> Case:
    """Run it here, and count its lines."""
    counts = Counter()
    watch_lines(lambda place: counts.update([place]))
    train.train(config)
    sys.settrace(None)
    return Case(random.Random(0), config, Path(config.train.output), dict(counts), output)


def wrong_file(folder: Path) -> str | None:
    """What is wrong with the files of a run, if anything."""
    for path in sorted(folder.iterdir() if folder.exists() else ()):
        try:
            if path.suffix == ".pt":
                read_checkpoint(path, keys=())
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":  # a kill may leave half a line at the end of the log
                [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        except ValueError as error:
            return f"{path.name}: {str(error)[:200]}"
    return None


def steps_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def difference(folder: Path, whole: Path) -> str | None:
    """Where a finished run is not the undisturbed one, to the bit."""
    for name in CHECKPOINTS:
        ours, theirs = (read_checkpoint(at / name, keys=()) for at in (folder, whole))
        ours["config"] = theirs["config"] = None
        ours, shape = torch.utils._pytree.tree_flatten(ours)
        theirs, other = torch.utils._pytree.tree_flatten(theirs)
        same = shape == other and all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs))
        if not same:
            return name
    if steps_of(folder) != steps_of(whole):
        return "log.jsonl"
    for name in ("test_predictions.jsonl", "test_metrics.json"):
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            return name
    return None


def judge(case: Case, hurt: list[Ended]) -> tuple[str, str]:
    """What became of a run: "resumed", "one line" or "broken", and why."""
    wrong = wrong_file(case.folder)
    last = case.run()
    for ended in (*hurt, last):
        if not ended.as_promised:
            return "broken", f"exit {ended.code}: {ended.errors[-800:]}"
    wrong = wrong or wrong_file(case.folder)
    if not wrong and last.code:
        return "one line", last.last_line
    wrong = wrong or difference(case.folder, case.whole)
    return ("broken", f"{wrong}: it differs or is hurt") if wrong else ("resumed", "")


# The faults: each hurts a run and returns how its processes ended ---------------------------------

def kill(case: Case) -> list[Ended]:
    """A stop is a stop: two signals of three kinds."""
    numbers = case.random.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), k=2)
    return [case.signalled(number) for number in numbers]


def full_disk(case: Case) -> list[Ended]:
    """No file can grow beyond a random size; a checkpoint is then cut while it is written."""
    most = max(path.stat().st_size for path in case.whole.iterdir())
    limit = case.random.randint(20_000, most)  # more than the log and stderr take
    return [case.run(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))]


def truncated_image(case: Case) -> list[Ended]:
    """An image of any split is cut somewhere, and mended before the run is resumed."""
    path = case.random.choice(sorted((Path(case.config.data.root) / "images").rglob("*.png")))
    content = path.read_bytes()
    path.write_bytes(content[:case.random.randrange(len(content))])
    ended = case.run()
    path.write_bytes(content)
    if ended.code and path.name not in ended.last_line:
        ended.errors += "\nTraceback: the error does not name the image"
    return [ended]


def half_written(case: Case) -> list[Ended]:
    """Killed, and a half of every checkpoint lies there under its temporary name."""
    ended = case.signalled(signal.SIGKILL)
    case.folder.mkdir(exist_ok=True)
    for name in CHECKPOINTS:
        content = (case.whole / name).read_bytes()
        (case.folder / (name + ".tmp")).write_bytes(content[:case.random.randrange(len(content))])
    return [ended]


def two_processes(case: Case) -> list[Ended]:
    """A second run begins, and ends, while the first one stands still at a moment."""
    first, output = case.until_moment(signal.SIGSTOP), case.output.with_name("second.txt")
    status = os.waitpid(first, os.WUNTRACED)[1]
    if not os.WIFSTOPPED(status):
        return [Ended(os.waitstatus_to_exitcode(status), case.output.read_text())]
    second = wait(fork(case.config, output), output)
    os.kill(first, signal.SIGCONT)
    return [second, wait(first, case.output)]


def worker_dies(case: Case) -> list[Ended]:
    """The process that reads the images is killed at a random study."""
    case.config = replace(case.config, data=replace(case.config.data, num_workers=1))
    item, left = data.ReportDataset.__getitem__, case.random.randint(1, 9)

    def dying(dataset, index: int) -> dict:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(dataset, index)
    return [case.run(lambda: setattr(data.ReportDataset, "__getitem__", dying))]


def gradient(case: Case) -> list[Ended]:
    """At one step, the gradient of a term, or the term itself, is not finite."""
    name = case.random.choice(("did_loss", "vse_loss", "report_loss"))
    factor = case.random.choice((float("inf"), float("-inf"), float("nan")))
    step, of_term = case.random.randint(1, 8), case.random.random() < 0.3
    term, count = getattr(model, name), 0

    def poisoned(*arguments) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = term(*arguments)
        if count == step and of_term:
            return loss * factor
        if count == step:
            loss.register_hook(lambda gradient: gradient * factor)
        return loss
    ended = case.run(lambda: setattr(model, name, poisoned))
    if f"step {step}: " not in ended.last_line:
        ended.errors += f"\nTraceback: the error does not name step {step}"
    last = case.folder / "last.pt"
    if last.exists() and read_checkpoint(last)["step"] >= step:
        ended.errors += "\nTraceback: last.pt holds the step that was refused"
    return [ended]


FAULTS = {"SIGKILL, SIGTERM or SIGINT, twice": kill, "full disk": full_disk,
          "truncated image": truncated_image, "half-written *.pt.tmp": half_written,
          "two processes in one folder": two_processes, "data worker that dies": worker_dies,
          "gradient or loss not finite": gradient}


# The campaign -------------------------------------------------------------------------------------

def campaign(root: Path, seed: int, numbers: list[int]) -> Counter:
    """Run it in `root`; returns how many runs there were of each (fault, ending)."""
    write_backbones(root)
    (root / "data").mkdir()
    write_data(root / "data")
    cases, found, names = [], Counter(), list(FAULTS)
    for number, overrides in enumerate(VARIANTS):
        config = tiny_config(root, root / "data", root / f"whole{number}", "train.epochs=2",
                             "train.lr=0.01", *overrides)
        cases.append(undisturbed(config, root / "output.txt"))
    for number in tqdm(numbers, desc="faults", unit="run"):
        name, folder = names[number % len(names)], root / "run"
        case = cases[number // len(names) % len(cases)]
        config = replace(case.config, train=replace(case.config.train, output=str(folder)))
        case = replace(case, random=random.Random(f"{seed} {number}"), config=config)
        hurt = FAULTS[name](case)
        ending, why = judge(case, hurt)
        found[name, ending] += 1
        for ended in hurt:
            killed = ended.code < 0 or ended.code == 130
            found[name, "killed" if killed else "line" if ended.code else "went on"] += 1
        if ending != "resumed":
            print(f"run {number}, {name}: {ending}: {why}", flush=True)
        shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=210)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the run of this number alone")
    args = parser.parse_args()
    numbers = list(range(args.runs)) if args.only is None else [args.only]
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PATH": ""}  # no Java: METEOR is not tested
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        found = campaign(Path(root), args.seed, numbers)
    columns = ("killed", "line", "went on", "resumed", "one line", "broken")
    print(f"seed {args.seed}, {len(numbers)} runs, {time.monotonic() - started:.0f} s\n")
    print("| fault | killed | ended in one line | went on | resumed to the bit "
          "| refused in one line | broken |\n|---|" + "---:|" * len(columns))
    for name in FAULTS:
        print(f"| {name} | " + " | ".join(str(found[name, column]) for column in columns) + " |")
    return int(any(found[name, "broken"] for name in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
