"""CheXbert, the labeller of Table 3."""
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer

from configs import InputError
from configs.files import pretrained, read_checkpoint

# In the order of the labeller's heads.
CONDITIONS = ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
              "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
              "Pleural Other", "Fracture", "Support Devices", "No Finding")
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # CheXpert's
LABELS = {"14": CONDITIONS, "13": CONDITIONS[:-1], "5": FIVE}  # 13: without No Finding
READINGS = {"uncertain_negative": [1], "uncertain_positive": [1, 3]}  # the classes that are true


class CheXbert(nn.Module):
    """CheXbert (Smit et al., 2020): BERT-base, and on its [CLS] state a linear head a condition.

    Classes: 0 not mentioned, 1 positive, 2 negative, 3 uncertain; No Finding knows 0 and 1 only.
    The dropout that stood before the heads in training is left out.
    """

    def __init__(self, bert: BertModel, tokenizer: BertTokenizer):
        super().__init__()
        self.bert, self.tokenizer = bert, tokenizer
        classes = [2 if name == "No Finding" else 4 for name in CONDITIONS]
        self.linear_heads = nn.ModuleList(nn.Linear(bert.config.hidden_size, n) for n in classes)

    @torch.no_grad()
    def label(self, reports: list[str], batch_size: int = 32) -> list[list[int]]:
        """The classes of the first 512 tokens of each report, one for each of CONDITIONS."""
        texts = [" ".join(report.split()) for report in reports]
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        classes = {}
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc="CheXbert", unit="batch", leave=False):
            batch = by_length[start:start + batch_size]  # of like length: little padding
            tokens = self.tokenizer([texts[i] for i in batch], truncation=True, max_length=512,
                                    padding=True, return_tensors="pt").to(self.bert.device)
            cls = self.bert(**tokens).last_hidden_state[:, 0]  # not the pooler's output
            highest = [head(cls).argmax(dim=1) for head in self.linear_heads]
            classes |= zip(batch, torch.stack(highest, dim=1).tolist())
        return [classes[i] for i in range(len(texts))]


def load_chexbert(path: str | Path, config: BertConfig | None = None) -> CheXbert:
    """The published chexbert.pth, loaded strictly, ready to label.

    Its vocabulary is bert-base-uncased's: from a vocab.txt beside it if there is one, else from the
    hub. `config`: of its BERT; default: BERT-base.
    """
    state = read_checkpoint(path, "CheXbert", ["model_state_dict"])["model_state_dict"]
    beside = Path(path).parent / "vocab.txt"
    if beside.is_file():
        tokenizer = BertTokenizer(vocab=str(beside))
    else:
        key = f"--chexbert: without a {beside}"
        tokenizer = pretrained(BertTokenizer, "bert-base-uncased", key)
    model = CheXbert(BertModel(config or BertConfig()), tokenizer)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state.pop("bert.embeddings.position_ids", None)  # a constant that older transformers stored
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"checkpoint {path}: not the weights of CheXbert: {reason}") from None
    return model.eval()


def chexbert_labeller(checkpoint: Path) -> Callable[[list[str]], list[list[int]]]:
    """A function from reports to their 14 classes, as `CheXbert.label` gives them.

    The weights are read when the first text is labelled, and a text is labelled once.
    """
    known: dict[str, list[int]] = {}
    model = None

    def label(texts: list[str]) -> list[list[int]]:
        nonlocal model
        new = sorted(set(texts) - known.keys())
        if new and model is None:
            model = load_chexbert(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
        if new:  # else the page would show a progress bar a study
            known.update(zip(new, model.label(new)))
        return [known[text] for text in texts]
    return label


def chexbert_matrices(predictions: list[list[int]],
                      references: list[list[int]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"<reading>.<size>": (N, L) bool of either side} of the classes of N reports each (A17)."""
    named, true, parts = np.array(predictions), np.array(references), {}
    for (reading, classes), (size, labels) in product(READINGS.items(), LABELS.items()):
        columns = [CONDITIONS.index(name) for name in labels]
        parts[f"{reading}.{size}"] = (np.isin(named[:, columns], classes),
                                      np.isin(true[:, columns], classes))
    return parts
