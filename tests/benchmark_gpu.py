"""A GPU at the paper's sizes: `python tests/benchmark.py --only gpu`. Nothing is downloaded.

Weights are random, two films and the words of the reports too: what is measured does not depend on
them. Steps are those of train.py, with its loader, log and checkpoints; seconds are the log's.
"""
import gc
import json
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from benchmark import flop_counts
from conftest import REPORTS, REPOSITORY, paper_model
from PIL import Image

import train as training
from configs import Config, load_config
from model import VDGen, read_checkpoint

PEAK_TFLOPS = {  # NVIDIA's data sheets: bf16 tensor cores, dense
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362}
STEPS, WARM = 12, 4            # of a run; the first ones choose kernels and fill the memory pool
RESUMED_STEPS, STOP = 4, 2
STUDIES = 96


def write_data(root: Path) -> None:
    """Studies of two views each, with reports of 2 to 8 sentences."""
    random = np.random.default_rng(0)
    (root / "images").mkdir()
    for name in ("frontal.png", "lateral.png"):
        pixels = random.integers(0, 256, (256, 256), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
    studies = [{"id": f"CXR{i}_IM-0001", "image_path": ["frontal.png", "lateral.png"],
                "report": " ".join(random.choice(REPORTS, random.integers(2, 9)))}
               for i in range(STUDIES)]
    (root / "annotation.json").write_text(json.dumps({"train": studies}))


def random_model(config: Config) -> VDGen:
    torch.manual_seed(config.train.seed)
    return paper_model(config=config, device="cuda")


def clear() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def memory() -> str:
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return f"peak {allocated / 1e9:.1f} GB allocated, {reserved / 1e9:.1f} GB reserved"


@contextmanager
def attention_by(cudnn: bool):
    """Whether PyTorch may take cuDNN's attention. A card that cannot, says so in a line."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        yield
    except RuntimeError as error:
        if not cudnn:
            raise
        print(f"cuDNN's attention: {str(error).splitlines()[0]}", flush=True)
    torch.backends.cuda.enable_cudnn_sdp(False)


class Stop(Exception):
    pass


def run(root: Path, name: str, steps: int, stop: int | None = None, resume=False) -> list[dict]:
    """The logged steps of a run of train.py; `stop`: die before that step (from 0)."""
    clear()
    config = load_config(REPOSITORY / "configs/iu_xray.yaml", [
        f"data.root={root}", f"train.output={root / name}", f"train.max_steps={steps}",
        f"train.save_every_steps={STOP}", "data.num_workers=4"])

    def rate(step: int, *rest) -> float:
        if step == stop:
            raise Stop
        return real(step, *rest)
    real = training.cosine_lr
    with patch("train.load_model", random_model), patch("train.cosine_lr", rate), suppress(Stop):
        training.train(config, resume)
    lines = map(json.loads, (root / name / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "report" in line]


def same_weights(root: Path, one: str, other: str) -> str:
    """Whether two last.pt hold the same weights and optimizer, to the bit."""
    a, b = (read_checkpoint(root / name / "last.pt") for name in (one, other))
    leaves = [torch.utils._pytree.tree_leaves([c["model"], c["optimizer"]]) for c in (a, b)]
    pairs = [*zip(*leaves)]
    differ = sum(not torch.equal(x, y) for x, y in pairs if torch.is_tensor(x))
    return "equal to the bit" if not differ else f"{differ} of {len(pairs)} tensors differ"


def benchmark_resume(root: Path) -> None:
    """A resumed run beside an undisturbed one, and beside that a second undisturbed one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in ("whole", "again"):
        run(root, name, RESUMED_STEPS)
    run(root, "resumed", RESUMED_STEPS, stop=STOP)
    run(root, "resumed", RESUMED_STEPS, resume=True)
    torch.use_deterministic_algorithms(False)
    print(f"two undisturbed runs of {RESUMED_STEPS} steps: {same_weights(root, 'whole', 'again')}; "
          f"one resumed at step {STOP}: {same_weights(root, 'whole', 'resumed')}", flush=True)


def benchmark_steps(root: Path, attention: str, peak: float | None) -> None:
    lines = run(root, attention, STEPS)
    seconds = median(line["seconds"] for line in lines[WARM:])
    tokens = median(line["seconds"] * line["report_tokens_per_second"] for line in lines[WARM:])
    used = memory()
    with torch.device("meta"):
        counts = flop_counts(paper_model())
    flop = 32 * counts["image"] + tokens * counts["report_token"]
    flop += counts["token"] * (16 * (counts["prompt"] - 1) + tokens)
    share = f", {flop / 1e12 / seconds / peak:.0%} of {peak} TFLOP/s" if peak else ""
    print(f"training, {attention}: {seconds:.3f} s a step (the first {lines[0]['seconds']:.1f} s), "
          f"{16 / seconds:.1f} studies/s, {flop / 1e12 / seconds:.0f} TFLOP/s{share}; {used}",
          flush=True)


def benchmark_decoding(model: VDGen, attention: str, batch: int, rounds: int) -> None:
    images = torch.zeros(2 * batch, 3, 224, 224, dtype=torch.uint8, device="cuda")
    new, seconds = model.config.generate.max_new_tokens, []
    clear()
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(images, [2] * batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    usual = median(seconds[1:])
    print(f"decoding {batch} studies, {attention}: {usual:.2f} s "
          f"(the first time {seconds[0]:.2f} s), {batch * new / usual:.0f} report tokens/s, "
          f"{1e3 * usual / new:.1f} ms a step; {memory()}", flush=True)


def benchmark_gpu(options) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: --only gpu: torch sees no CUDA device here")
    card = torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in card), None)
    print(f"{card}, torch {torch.__version__}, bf16, the sizes of configs/iu_xray.yaml")
    backends = {"flash and efficient": False, "cuDNN": True}  # the first is what train.py takes
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root)
        for attention, cudnn in backends.items():
            with attention_by(cudnn):
                benchmark_steps(root, attention, peak)
        benchmark_resume(root)
    config = load_config(REPOSITORY / "configs/iu_xray.yaml")
    whole = replace(config.generate, min_new_tokens=config.generate.max_new_tokens)  # none ends
    model = random_model(replace(config, generate=whole)).eval()
    for attention, cudnn in backends.items():
        with attention_by(cudnn):
            for batch in (16, 64):
                benchmark_decoding(model, attention, batch, options.rounds)
