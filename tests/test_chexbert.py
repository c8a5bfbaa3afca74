"""CheXbert: the published format, its forward, its tokenisation, and what is refused."""
import math
import unicodedata
from collections import Counter

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear
from transformers import BertConfig, BertModel

from configs.chexbert import CONDITIONS, CheXbert, chexbert_labeller, load_chexbert

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "is", "enlarged", "lung",
         "##s", "clear", "no", "effusion", "cardio", "##megaly", ".", ",", "-", "x", "##xx", "12",
         "mm", "##e", "e", "f", "\u80ba"]
TINY = BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2,
                  num_attention_heads=4, intermediate_size=64)
TEXTS = ["the heart is enlarged .", "", "  lungs\n are \t clear, no effusion ",
         "Cardiomegaly - XXX 12 mm \u80ba \u00c9", "zzz", "clear" * 21, "the\u200b lu\0ng\ufffd",
         "the heart " * 150 + "no effusion , " * 100 + "mm " * 100]


def write_checkpoint(folder, config=TINY, words=WORDS):
    """Random weights in the format of the published chexbert.pth.

    The buffer of older library versions is included.
    """
    torch.manual_seed(0)
    bert = BertModel(config)
    heads = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, 4) for _ in range(13))
    heads.append(torch.nn.Linear(config.hidden_size, 2))
    # large, so that classes differ between texts
    for parameter in [*bert.parameters(), *heads.parameters()]:
        parameter.data += torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.05)
    state = {f"module.bert.{key}": value for key, value in bert.state_dict().items()}
    state |= {f"module.linear_heads.{key}": value for key, value in heads.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    folder.mkdir(exist_ok=True)
    torch.save({"epoch": 8, "model_state_dict": state, "optimizer_state_dict": {}},
               folder / "chexbert.pth")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder / "chexbert.pth", state


def split_words(text):
    """Lower case, accents and control characters off, punctuation and CJK apart."""
    spaced = ""
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        control = category.startswith("C") and not character.isspace()
        if category == "Mn" or character in "\0\ufffd" or control:
            continue
        mark = category.startswith("P") or character in "$+<=>^`|~"
        apart = mark or "\u4e00" <= character <= "\u9fff"
        spaced += f" {character} " if apart else character
    return spaced.split()


def pieces_of(word, index):
    """The longest known piece first, then the longest that continues it; else [UNK]."""
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1) if len(word) <= 100 else ()
        end = next((e for e in ends if prefix + word[start:e] in index), None)
        if end is None:
            return [index["[UNK]"]]
        pieces.append(index[prefix + word[start:end]])
        start = end
    return pieces


def word_pieces(text, words):
    """BERT's uncased tokenisation, from its description, cut to 512 ids."""
    index, ids = {word: i for i, word in enumerate(words)}, []
    for word in split_words(text):
        ids += pieces_of(word, index)
    return [index["[CLS]"], *ids[:510], index["[SEP]"]]


def plain_forward(state, ids, config):
    """BERT of one text from its paper, on the tensors of the checkpoint alone.

    No padding, no mask. Returns 14 classes.
    """
    def get(name):
        return state[f"module.{name}"].double()

    def dense(x, name):
        return linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(x, name):
        return layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-12)

    def heads_of(x, name):
        return dense(x, name).view(len(ids), config.num_attention_heads, -1).transpose(0, 1)
    e = "bert.embeddings"
    x = get(f"{e}.word_embeddings.weight")[ids]
    x = x + get(f"{e}.position_embeddings.weight")[:len(ids)]
    x = norm(x + get(f"{e}.token_type_embeddings.weight")[0], f"{e}.LayerNorm")
    for i in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{i}"
        attention = f"{layer}.attention"
        q, k, v = (heads_of(x, f"{attention}.self.{name}") for name in ("query", "key", "value"))
        attended = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        attended = attended.transpose(0, 1).reshape(len(ids), -1)
        x = norm(x + dense(attended, f"{attention}.output.dense"), f"{attention}.output.LayerNorm")
        hidden = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return [int(dense(x[0], f"linear_heads.{i}").argmax()) for i in range(14)]


def test_chexbert_equals_an_independent_forward(tmp_path):
    """Tokens and classes, of empty, long, and odd texts, in one padded batch."""
    path, state = write_checkpoint(tmp_path)
    chexbert = load_chexbert(path, TINY)
    expected = [plain_forward(state, word_pieces(text, WORDS), TINY) for text in TEXTS]
    assert chexbert.label(TEXTS) == expected
    assert chexbert.label(TEXTS, batch_size=2) == expected
    assert len({tuple(row) for row in expected}) >= 4
    assert {c for row in expected for c in row[:13]} == {0, 1, 2, 3}
    assert all(row[13] in (0, 1) for row in expected)
    for text in TEXTS:
        tokens = chexbert.tokenizer(" ".join(text.split()), truncation=True, max_length=512)
        assert tokens.input_ids == word_pieces(text, WORDS)


def test_chexbert_has_the_published_shape():
    with torch.device("meta"):
        chexbert = CheXbert(BertModel(BertConfig()), None)
    state = chexbert.state_dict()
    assert state["bert.embeddings.word_embeddings.weight"].shape == (30522, 768)
    assert "bert.pooler.dense.weight" in state
    assert [state[f"linear_heads.{i}.weight"].shape[0] for i in range(14)] == [4] * 13 + [2]
    assert len(state) == 199 + 28
    assert "; ".join(CONDITIONS) == (  # the order of the published heads
        "Enlarged Cardiomediastinum; Cardiomegaly; Lung Opacity; Lung Lesion; Edema; "
        "Consolidation; Pneumonia; Atelectasis; Pneumothorax; Pleural Effusion; Pleural Other; "
        "Fracture; Support Devices; No Finding")


def test_chexbert_refuses_other_files(tmp_path):
    path, state = write_checkpoint(tmp_path)
    missing = {key: value for key, value in state.items() if "heads.3.bias" not in key}
    extra = {**state, "module.extra": torch.zeros(1)}
    misshapen = {**state, "module.linear_heads.13.bias": torch.zeros(4)}
    for broken, key in ((missing, "linear_heads.3.bias"), (extra, "extra"),
                        (misshapen, "linear_heads.13.bias")):
        torch.save({"model_state_dict": broken}, path)
        with pytest.raises(ValueError, match=f"CheXbert.*{key}"):
            load_chexbert(path, TINY)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="CheXbert.*model_state_dict"):
        load_chexbert(path, TINY)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="CheXbert"):
        load_chexbert(path, TINY)
    with pytest.raises(FileNotFoundError, match="no such file"):
        chexbert_labeller(tmp_path / "none.pth")(["clear ."])


def test_a_text_is_labelled_once(tmp_path, monkeypatch):
    path, _ = write_checkpoint(tmp_path)
    chexbert, calls = load_chexbert(path, TINY), []
    monkeypatch.setattr("configs.chexbert.load_chexbert", lambda path: chexbert)
    monkeypatch.setattr(chexbert, "label", lambda texts: calls.append(texts) or [[0]] * len(texts))
    label = chexbert_labeller(path)
    assert label(TEXTS[:3] * 2) == [[0]] * 6 and label(TEXTS) == [[0]] * len(TEXTS)
    assert Counter(sum(calls, [])) == Counter(TEXTS)
    assert label(TEXTS) and len(calls) == 2  # no call, and no progress bar, for known texts
