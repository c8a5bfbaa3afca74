"""Trouble in a tiny training run, at random moments: what --resume makes of it. Not run by pytest.

    python tests/faults.py [--runs 200] [--seed 0] [--only NUMBER]

Each run meets the next of FAULTS, at a moment that its number and the seed fix, and is resumed.
Then it equals an undisturbed run bit for bit (weights, optimizer, random state, logged steps, what
it wrote of the test split), or it has ended in one line "error: ..." with all files whole. All else
is broken.

A moment is a line of this repository, or of torch.save, drawn at random, and which time it runs.
The libraries are imported once: a run is a fork of this process.
"""
import argparse
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
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
import tqdm.std  # noqa: E402
from conftest import TIMING, tiny_config, write_backbones, write_data  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from configs import Config  # noqa: E402

WATCHED = {module.__file__ for module in (train, evaluate, data, model, torch.serialization)}
CHECKPOINTS = ("last.pt", "best.pt", "teacher.pt")
SECONDS = 600  # a run takes about one; longer, and it hangs
VARIANTS = (("train.precision=fp32", "train.save_every_steps=1"),
            ("train.precision=bf16", "train.save_every_steps=3"))
Place = tuple[str, int]  # of a line: file and number


# One process ------------------------------------------------------------------------------------

@dataclass
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it; its stderr."""
    code: int
    errors: str

    @property
    def one_line(self) -> bool:
        text = self.errors.replace("\x1b[A", "\n")  # a progress bar goes up a line when it leaves
        lines = text.strip().splitlines() or [""]
        return self.code == 1 and lines[-1].startswith("error: ") and not self.noisy

    @property
    def noisy(self) -> bool:
        return "Traceback" in self.errors or "Exception ignored" in self.errors


def fork(config: Config, output: Path, hurt: Callable[[], None] | None = None) -> int:
    """Start `train.py --resume` in a fork, after `hurt()`; its stdout and stderr go to a file."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(SECONDS)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
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
        gc.collect()  # as at the end of a program: files that are still open are closed
        sys.stdout.flush(), sys.stderr.flush()
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
        if here == place:
            left -= 1
            if left == 0:
                act()
    watch_lines(seen)


# One run ----------------------------------------------------------------------------------------

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

    def moment(self) -> tuple[Place, int]:
        place = self.random.choice(sorted(self.lines))
        return place, self.random.randint(1, self.lines[place])

    def run(self, hurt: Callable[[], None] | None = None) -> Ended:
        return wait(fork(self.config, self.output, hurt), self.output)

    def signalled(self, number: int) -> Ended:
        moment = self.moment()
        return self.run(lambda: at_moment(*moment, lambda: os.kill(os.getpid(), number)))


def finite(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def whole_files(folder: Path, killed: bool) -> str | None:
    """What is wrong with the files of a run, if anything. A killed one was writing a file."""
    for path in sorted(folder.iterdir() if folder.exists() else ()):
        try:
            if path.suffix == ".pt":
                model.read_checkpoint(path, keys=())
            elif path.suffix in (".json", ".jsonl") and not killed:
                text = path.read_text()
                if path.name == "log.jsonl":  # what reads it passes over half a line at its end
                    text = text[:text.rfind("\n") + 1]
                for line in text.splitlines() if path.suffix == ".jsonl" else [text]:
                    json.loads(line, parse_constant=finite)
        except ValueError as error:
            return f"{path.name}: {str(error)[:200]}"
    return None


def steps_of(folder: Path) -> list[dict]:
    lines = [json.loads(line, parse_constant=finite)
             for line in (folder / "log.jsonl").read_text().splitlines()][1:]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def difference(folder: Path, whole: Path) -> str | None:
    """Where a finished run is not the undisturbed one, to the bit."""
    for name in CHECKPOINTS:
        ours, theirs = (model.read_checkpoint(at / name, keys=()) for at in (folder, whole))
        (ours, shape), (theirs, other) = (torch.utils._pytree.tree_flatten(
            {key: value for key, value in content.items() if key != "config"})
            for content in (ours, theirs))
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
    for ended in hurt:
        if ended.noisy or not (ended.code in (0, 143) or ended.code < 0 or ended.one_line):
            return "broken", f"exit {ended.code}: {ended.errors[-800:]}"
    killed = any(ended.code < 0 for ended in hurt)
    if wrong := whole_files(case.folder, killed):
        return "broken", f"before --resume, {wrong}"
    last = case.run()
    if last.one_line:
        wrong = whole_files(case.folder, killed=False)
        return ("broken", wrong) if wrong else ("one line", last.errors.splitlines()[-1])
    if last.code:
        return "broken", f"--resume, exit {last.code}: {last.errors[-800:]}"
    wrong = whole_files(case.folder, killed=False) or difference(case.folder, case.whole)
    return ("broken", f"after --resume, {wrong} differs") if wrong else ("resumed", "")


# The faults: each hurts a run and returns how its processes ended ---------------------------------

def kill(case: Case) -> list[Ended]:
    return [case.signalled(signal.SIGKILL) for _ in range(case.random.randint(1, 2))]


def sigterm(case: Case) -> list[Ended]:
    return [case.signalled(signal.SIGTERM) for _ in range(case.random.randint(1, 2))]


def full_disk(case: Case) -> list[Ended]:
    """A disk of a random size; without the right to mount one, an OSError where a line writes."""
    def full() -> None:
        raise OSError(28, "No space left on device")
    if os.geteuid():
        writing = [place for place in case.lines if place[0] == train.__file__
                   and "torch.save" in Path(place[0]).read_text().splitlines()[place[1] - 1]]
        place = case.random.choice(sorted(writing))
        times = case.random.randint(1, case.lines[place])
        return [case.run(lambda: at_moment(place, times, full))]
    most = sum(path.stat().st_size for path in case.whole.iterdir()) // 1024 + 16
    case.folder.mkdir()
    size = f"size={case.random.randint(4, most)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", case.folder], check=True)
    ended = case.run()
    subprocess.run(["mount", "-o", "remount,size=64m", case.folder], check=True)
    return [ended]


def truncated_image(case: Case) -> list[Ended]:
    """An image of any split is cut somewhere, and mended before the run is resumed."""
    path = case.random.choice(sorted((Path(case.config.data.root) / "images").rglob("*.png")))
    content = path.read_bytes()
    path.write_bytes(content[:case.random.randrange(len(content))])
    ended = case.run()
    path.write_bytes(content)
    if ended.code and path.name not in ended.errors.splitlines()[-1]:
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
    moment, output = case.moment(), case.output.with_name("second.txt")
    first = fork(case.config, case.output, lambda: at_moment(
        *moment, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    stopped = os.WIFSTOPPED(status := os.waitpid(first, os.WUNTRACED)[1])
    if not stopped:
        return [Ended(os.waitstatus_to_exitcode(status), case.output.read_text())]
    second = wait(fork(case.config, output), output)
    os.kill(first, signal.SIGCONT)
    return [second, wait(first, case.output)]


def clock(case: Case) -> list[Ended]:
    """Each third reading jumps by up to a year, or the clock stands still from then on."""
    rng, still = random.Random(case.random.random()), case.random.random() < 0.3
    now, moved = time.time, 0.0

    def jumping() -> float:
        nonlocal moved
        if rng.random() < 0.33:
            moved += rng.choice((-1, 1)) * 10 ** rng.uniform(-3, 7.5)
        return 1e9 if still else now() + moved

    def hurt() -> None:
        time.time = time.perf_counter = tqdm.std.time = jumping
    return [case.run(hurt)]


def worker_dies(case: Case) -> list[Ended]:
    """The process that reads the images is killed at a random study."""
    case.config = replace(case.config, data=replace(case.config.data, num_workers=1))
    main, item = os.getpid(), data.ReportDataset.__getitem__
    left = case.random.randint(1, 9)  # of an epoch: each has a worker of its own
    number = case.random.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT))

    def dying(dataset, index: int) -> dict:
        nonlocal left
        left -= 1
        if left == 0:
            signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
            os.kill(os.getpid(), number)
        return item(dataset, index)

    def hurt() -> None:
        assert os.getpid() != main
        data.ReportDataset.__getitem__ = dying
    return [case.run(hurt)]


class Poison(torch.autograd.Function):
    """The loss as it is; its gradient times a number that is not finite."""

    @staticmethod
    def forward(context, loss, factor):
        context.factor = factor
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


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
        if count != step:
            return loss
        return loss * factor if of_term else Poison.apply(loss, factor)
    ended = case.run(lambda: setattr(model, name, poisoned))
    if f"step {step}: the " not in ended.errors.splitlines()[-1]:
        ended.errors += f"\nTraceback: the error does not name step {step}"
    last = case.folder / "last.pt"
    if last.exists() and model.read_checkpoint(last)["step"] >= step:
        ended.errors += "\nTraceback: last.pt holds the step that was refused"
    return [ended]


FAULTS = {"SIGKILL, once or twice": kill, "SIGTERM, once or twice": sigterm, "full disk": full_disk,
          "truncated image": truncated_image, "half-written *.pt.tmp": half_written,
          "two processes in one folder": two_processes, "clock that jumps or stands": clock,
          "data worker that dies": worker_dies, "gradient or loss not finite": gradient}


# The campaign -----------------------------------------------------------------------------------

def in_fork(make: Callable[[], None]) -> None:
    """This process computes nothing itself: what torch and tokenizers start would not be forked."""
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    make()
    sys.stdout.flush()
    os._exit(0)


def undisturbed(root: Path, number: int, overrides: tuple[str, ...]) -> Case:
    """The run that those of a variant must equal, and a count of its lines."""
    config = tiny_config(root, root / "data", root / f"whole{number}", "train.epochs=2",
                         "train.lr=0.01", *overrides)
    case = Case(random.Random(), config, root / f"whole{number}", {}, root / "output.txt")
    counts, file = Counter(), root / "lines.json"
    write = train.evaluate_best  # the last act of a run

    def counted(run) -> dict | None:
        metrics = write(run)
        sys.settrace(None)
        file.write_text(json.dumps([[*place, times] for place, times in counts.items()]))
        return metrics

    def count() -> None:
        train.evaluate_best = counted
        watch_lines(lambda place: counts.update([place]))
    ended = case.run(count)
    assert ended.code == 0, ended.errors
    case.lines = {(name, line): times for name, line, times in json.loads(file.read_text())}
    return case


def campaign(root: Path, seed: int, numbers: list[int]) -> Counter:
    """Run it in `root`; returns how many runs there were of each (fault, ending)."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PATH": os.environ["PATH"] + ":/sbin"}
    evaluate.shutil.which = lambda name: None  # no Java: METEOR is not what is tested
    in_fork(lambda: (write_backbones(root), (root / "data").mkdir(), write_data(root / "data")))
    cases = [undisturbed(root, i, overrides) for i, overrides in enumerate(VARIANTS)]
    found, names = Counter(), list(FAULTS)
    for number in tqdm.std.tqdm(numbers, desc="faults", unit="run"):
        name, folder = names[number % len(names)], root / "run"
        case = cases[number // len(names) % len(cases)]
        config = replace(case.config, train=replace(case.config.train, output=str(folder)))
        case = replace(case, random=random.Random(f"{seed} {number}"), config=config)
        hurt = FAULTS[name](case)
        ending, why = judge(case, hurt)
        found[name, ending] += 1
        for ended in hurt:
            how = {0: "went on", 143: "saved"}.get(ended.code, "line")
            how = "killed" if ended.code < 0 else how
            found[name, how] += 1
        if ending != "resumed":
            print(f"run {number}, {name}: {ending}: {why}", flush=True)
        if os.path.ismount(folder):
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the run of this number alone")
    args = parser.parse_args()
    numbers = list(range(args.runs)) if args.only is None else [args.only]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        found = campaign(Path(root), args.seed, numbers)
    columns = ("killed", "saved", "line", "went on", "resumed", "one line", "broken")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"seed {args.seed}, {len(numbers)} runs, {time.monotonic() - started:.0f} s, "
          f"{used.ru_utime + used.ru_stime:.0f} s of one core\n")
    print("| fault | killed | saved and exited | ended in one line | went on "
          "| resumed to the bit | refused in one line | broken |\n|---|" + "---:|" * len(columns))
    for name in FAULTS:
        print(f"| {name} | " + " | ".join(str(found[name, column]) for column in columns) + " |")
    totals = [str(sum(found[name, column] for name in FAULTS)) for column in columns]
    print("| all | " + " | ".join(totals) + " |")
    return int(totals[-1] != "0")


if __name__ == "__main__":
    sys.exit(main())
