"""Tiny backbones and a tiny dataset, made here: every test runs on a CPU, offline."""
import json
import os
import signal
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, SwinConfig, SwinModel)

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from configs import load_config, parse_config  # noqa: E402
from model import VDGen, load_model  # noqa: E402

REPORTS = [
    "The heart is enlarged. No pleural effusion.",
    "Lungs are clear.",
    "There is a small left pleural effusion. The heart size is normal. No pneumothorax.",
    "No acute disease.",
    "A large opacity in the right upper lobe. The heart is normal.",
    "Degenerative changes of the spine. Lungs are clear. No pneumothorax or pleural effusion.",
]


# What two equal runs log differently; the last only on a GPU.
TIMING = ("seconds", "studies_per_second", "report_tokens_per_second", "peak_memory_gb",
          "peak_reserved_gb")


class ReadBacks(TorchDispatchMode):
    """Notes in `places` the function of this repository in which a GPU would be waited for.

    Seen are values that go to the host (`item`, `bool`, `tolist`, `numpy`) and results whose size
    depends on values (`nonzero`, an index of booleans), in a library and in backward as well.
    """
    WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select",
               "aten::_unique2", "aten::equal"}

    def __init__(self):
        super().__init__()
        self.places, self.patches = [], ExitStack()

    def note(self) -> None:
        own = [frame.name for frame in traceback.extract_stack()
               if Path(frame.filename).parent == REPOSITORY]
        self.places.append(own[-1] if own else "?")

    def __enter__(self):
        for name in ("tolist", "numpy"):  # on a CPU these dispatch nothing
            real = getattr(torch.Tensor, name)
            self.patches.enter_context(patch.object(
                torch.Tensor, name, lambda *args, real=real: self.note() or real(*args)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if "index" in function._schema.name and isinstance(args[1], list) else []
        booleans = any(index is not None and index.dtype == torch.bool for index in indices)
        if function._schema.name in self.WAITING or booleans:
            self.note()
        return function(*args, **(kwargs or {}))


def write_swin(folder: Path) -> None:
    torch.manual_seed(0)
    swin = SwinModel(SwinConfig(
        image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        drop_path_rate=0.1))
    swin.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="ViTImageProcessor", size=dict(height=32, width=32), resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])))


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(REPORTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_llama(folder: Path) -> None:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.2))
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_backbones(folder: Path) -> Path:
    write_swin(folder / "swin")
    write_llama(folder / "llama")
    return folder


def write_data(root: Path) -> Path:
    """12 training, 3 val and 5 test studies with one, two or three views."""
    rng = np.random.default_rng(0)
    tree, number = {}, 0
    for split, studies in dict(train=12, val=3, test=5).items():
        tree[split] = []
        for _ in range(studies):
            name = f"study{number:02d}"
            (root / "images" / name).mkdir(parents=True)
            paths = [f"{name}/{view}.png" for view in range(1 + number % 3)]
            for path in paths:
                pixels = rng.integers(0, 256, (40, 36), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / path)
            report = REPORTS[number % len(REPORTS)]
            tree[split].append(dict(id=name, report=report, image_path=paths, split=split))
            number += 1
    (root / "annotation.json").write_text(json.dumps(tree))
    return root


def tiny_config(backbones: Path, data_root: Path, output: Path, *overrides: str):
    """The tiny model on the tiny dataset, in float32."""
    return parse_config(dict(
        model=dict(vision=str(backbones / "swin"), llm=str(backbones / "llama")),
        data=dict(root=str(data_root), num_workers=0),
        train=dict(output=str(output), precision="fp32", batch_size=3, eval_batch_size=2, epochs=1),
        generate=dict(num_beams=2, min_new_tokens=1, max_new_tokens=6)), overrides)


def write_map_encoder(kind, folder, **more):
    """The folder of an encoder whose output is a map; returns the encoder."""
    sizes = dict(
        EfficientNet=dict(
            image_size=64,
            width_coefficient=0.1,
            depth_coefficient=0.1,
            hidden_dim=128,
            initializer_range=0.5,
        ),
        ResNet=dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    )[kind]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**sizes, **more)
    vision = getattr(transformers, kind + "Model")(config)
    vision.save_pretrained(folder)
    shape = dict(
        image_processor_type="ViTImageProcessor",
        size=64,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(shape))
    return vision


@pytest.fixture(scope="session")
def backbones(tmp_path_factory) -> Path:
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_config(backbones, data_root, tmp_path):
    """make_config("loss.did_weight=0", ...): see `tiny_config`."""
    return partial(tiny_config, backbones, data_root, tmp_path / "run")


@pytest.fixture
def make_model(make_config):
    def make(*overrides: str):
        torch.manual_seed(0)
        return load_model(make_config(*overrides))
    return make


def paper_model(*overrides: str, config=None, device: str = "meta") -> VDGen:
    """Sec. 4.1.2: the model of configs/iu_xray.yaml at its published sizes, with random weights.

    On the meta device it has none. The tokenizer is one of ours.
    """
    config = config or load_config(REPOSITORY / "configs/iu_xray.yaml", overrides)
    attention = "eager" if device == "meta" else "sdpa"
    with torch.device(device):
        swin = SwinModel(SwinConfig(
            image_size=224, patch_size=4, window_size=7, embed_dim=128, depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32], attn_implementation=attention), add_pooling_layer=False)
        llama = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
            num_attention_heads=32), dtype=torch.bfloat16)
        return VDGen(config, swin, llama, make_tokenizer()).train()


def library_search(model, prompt: torch.Tensor, settings) -> torch.Tensor:
    """The ids that transformers' `generate` writes behind a prompt (B, P, D_h).

    They are padded as `beam_search` pads them.
    """
    options = GenerationConfig(
        num_beams=settings.num_beams, repetition_penalty=settings.repetition_penalty,
        length_penalty=settings.length_penalty, min_new_tokens=settings.min_new_tokens,
        max_new_tokens=settings.max_new_tokens, do_sample=False,
        bos_token_id=model.bos_id, eos_token_id=model.eos_id, pad_token_id=model.eos_id)
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    ids = model.causal_lm.generate(inputs_embeds=prompt, attention_mask=mask,
                                   generation_config=options)
    missing = settings.max_new_tokens - ids.shape[1]
    return torch.nn.functional.pad(ids, (0, missing), value=model.eos_id)


@pytest.fixture(autouse=True)
def without_java(monkeypatch, request):
    """METEOR loads its tables for seconds: only the tests about it (marked `java`) run it."""
    if "java" not in request.keywords:
        monkeypatch.setattr("evaluate.shutil.which", lambda name: None)


def pytest_configure(config):
    """On a CPU, where there is a GPU as well; CUDA_VISIBLE_DEVICES=0 lets the tests have it."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    config.addinivalue_line("markers", "java: runs the program of METEOR 1.5")


@pytest.fixture(autouse=True)
def same_signal_handlers():
    """`train` takes SIGINT and SIGTERM; a test that ends it by an exception gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
