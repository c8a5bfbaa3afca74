"""Tiny backbones and a tiny dataset, made here: every test runs on a CPU, offline."""
import json
import os
import shutil
import signal
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

from configs import load_config, parse_config  # noqa: E402

# transformers and model.py are imported where they are used: test_losses.py needs torch alone.

REPORTS = [
    "The heart is enlarged. No pleural effusion.",
    "Lungs are clear.",
    "There is a small left pleural effusion. The heart size is normal. No pneumothorax.",
    "No acute disease.",
    "A large opacity in the right upper lobe. The heart is normal.",
    "Degenerative changes of the spine. Lungs are clear. No pneumothorax or pleural effusion.",
]


# What two equal runs log differently; the last only on a GPU.
TIMING = ("seconds", "peak_memory_gb", "peak_reserved_gb")


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
    from transformers import SwinConfig, SwinModel
    torch.manual_seed(0)
    swin = SwinModel(SwinConfig(
        image_size=32, patch_size=4, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        drop_path_rate=0.1))
    swin.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="ViTImageProcessor", size=dict(height=32, width=32), resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])))


def make_tokenizer(bos_token="<s>", eos_token="</s>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(REPORTS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos_token,
                                   eos_token=eos_token)


def write_backbones(folder: Path) -> Path:
    write_swin(folder / "swin")
    write_llm("Llama", folder / "llama", tie_word_embeddings=True)
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


def write_pixels(folder: Path, size: int) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="ViTImageProcessor", size=size, image_mean=[0.5] * 3,
        image_std=[0.25] * 3)))


def write_map_encoder(kind: str, folder: Path, **more):
    """The folder of an encoder whose output is a map; returns the encoder."""
    import transformers
    sizes = dict(EfficientNet=dict(image_size=64, width_coefficient=0.1, depth_coefficient=0.1,
                                   hidden_dim=128, initializer_range=0.5),
                 ResNet=dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1],
                             layer_type="basic"))[kind]
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**sizes, **more)
    vision = getattr(transformers, kind + "Model")(config)
    vision.save_pretrained(folder)
    write_pixels(folder, 64)
    return vision


def write_encoder(kind: str, folder: Path) -> None:
    """The folder of a tiny encoder of images of a family of transformers, with random weights."""
    import transformers
    if kind in ("EfficientNet", "ResNet"):
        write_map_encoder(kind, folder)
        return
    patches = dict(image_size=32, patch_size=8, hidden_size=16, intermediate_size=16,
                   num_hidden_layers=1, num_attention_heads=2)
    texts = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 vocab_size=99)
    sizes = dict(
        ConvNext=dict(image_size=32, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
        Swinv2=dict(image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1],
                    num_heads=[1, 2]),
        Hiera=dict(image_size=[32, 32], patch_size=[7, 7], patch_stride=[4, 4], embed_dim=8,
                   depths=[1, 1], num_heads=[1, 2], masked_unit_size=[2, 2], num_query_pool=1),
        PvtV2=dict(image_size=[32, 32], hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1],
                   num_attention_heads=[1, 1, 2, 2]),
        RegNet=dict(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1],
                    groups_width=8),
        CLIP=dict(vision_config=patches, text_config=texts),
        Siglip=dict(vision_config=patches, text_config=texts)).get(kind, patches)
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**sizes)
    getattr(transformers, kind + "Model")(config).save_pretrained(folder)
    write_pixels(folder, 32)


def write_llm(kind: str, folder: Path, **more) -> Path:
    """The folder of a tiny LLM of a family of transformers, with random weights of D_h = 32."""
    import transformers
    tokenizer = make_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                 num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    sizes |= {"Gemma2": dict(head_dim=8), "Gemma3Text": dict(head_dim=8), "Qwen3": dict(head_dim=8),
              "FalconH1": dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
              "GPTNeoX": dict(num_key_value_heads=4)}.get(kind, {})
    torch.manual_seed(1)
    config = getattr(transformers, kind + "Config")(**sizes | dict(initializer_range=0.2) | more)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
    from model import load_model

    def make(*overrides: str):
        torch.manual_seed(0)
        return load_model(make_config(*overrides))
    return make


def paper_model(*overrides: str, config=None, device: str = "meta"):
    """Sec. 4.1.2: the model of configs/iu_xray.yaml at its published sizes, with random weights.

    On the meta device it has none. The tokenizer is one of ours.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, SwinConfig, SwinModel

    from model import VDGen
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


@pytest.fixture(autouse=True)
def without_java(monkeypatch, request):
    """METEOR loads its tables for seconds: only the tests about it (marked `java`) run it."""
    if "java" not in request.keywords:
        monkeypatch.setattr(shutil, "which", lambda name: None)


def pytest_configure(config):
    """On a CPU, where there is a GPU as well; CUDA_VISIBLE_DEVICES=0 lets the tests have it."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    config.addinivalue_line("markers", "java: runs the program of METEOR 1.5")
