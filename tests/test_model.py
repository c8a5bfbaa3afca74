"""The model: what reaches which loss, what trains and what stays, and the sizes of the paper."""
import json
import os
import shutil

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from configs import PROMPT, Generate
from conftest import REPORTS, ReadBacks, library_search, paper_model, write_map_encoder
from losses import did_loss, vse_loss
from model import (Teacher, beam_search, embed_reports, grouped_attention, read_checkpoint,
                   visual_projection)


def make_batch(model, reports=REPORTS[:4], views=(2, 1, 3, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [
        torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids + [model.eos_id])
        for text in reports
    ]
    return dict(
        images=torch.randint(
            0, 256, (sum(views), 3, 32, 32), generator=generator, dtype=torch.uint8
        ),
        view_counts=list(views),
        report_ids=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        report_lengths=[len(row) for row in ids],
        teacher_embed=torch.randn(len(views), 32, generator=generator),
    )


def shake_lora(model, scale=0.2):
    """LoRA starts as zero; make it do something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def test_report_term_equals_the_textbook_computation(make_model, monkeypatch):
    """Every position in, the library's own labels and shift, an attention mask: the same loss
    and the same gradients."""
    monkeypatch.setattr("model.LIKE_LENGTH", 2)  # two groups
    model = make_model("model.lora.dropout=0").eval()
    shake_lora(model)
    batch = make_batch(model)
    ours = model(**batch)[0]["report"]
    ours.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
    B, P = prompt.shape[:2]
    inputs = torch.cat([prompt, model.causal_lm.get_input_embeddings()(batch["report_ids"])], dim=1)
    real = (
        torch.arange(batch["report_ids"].shape[1]) < torch.tensor(batch["report_lengths"])[:, None]
    )
    labels = torch.cat(
        [torch.full((B, P), -100), batch["report_ids"].masked_fill(~real, -100)], dim=1
    )
    mask = torch.cat([torch.ones(B, P, dtype=torch.long), real.long()], dim=1)
    textbook = model.causal_lm(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
    textbook.backward()
    assert ours.item() == pytest.approx(textbook.item(), abs=1e-5)
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == theirs.keys() and any("lora_A" in name for name in theirs)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)


def test_padding_changes_nothing(make_model):
    """Neither the id of the padding nor more of it; an end token inside the padding is no target
    (A9)."""
    model = make_model().eval()
    batch = make_batch(model)
    terms, *_ = model(**batch)
    for pad in (model.eos_id, 7):
        padded = torch.full((4, batch["report_ids"].shape[1] + 5), pad)
        for row, (ids, length) in enumerate(zip(batch["report_ids"], batch["report_lengths"])):
            padded[row, :length] = ids[:length]
        again, *_ = model(**{**batch, "report_ids": padded})
        for name in terms:
            assert again[name].item() == pytest.approx(terms[name].item(), abs=1e-6), name


def test_prompt_is_that_of_section_3_4(make_model):
    model = make_model().eval()
    visual_tokens = model.encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [1, 1])
    prompt, embed = model.embed_prompt(visual_tokens), model.causal_lm.get_input_embeddings()
    assert "".join(PROMPT) == (
        "Human: <img></img> Generate a comprehensive and detailed diagnosis report "
        "for this chest X-ray image.\nAssistant:"
    )
    before = [model.bos_id] + model.tokenizer(PROMPT[0], add_special_tokens=False).input_ids
    after = model.tokenizer(PROMPT[1], add_special_tokens=False).input_ids
    S = visual_tokens.shape[1]
    assert prompt.shape == (2, len(before) + S + len(after), 32) and S == 16
    assert torch.equal(prompt[0, :len(before)], embed(torch.tensor(before)))
    assert torch.equal(
        prompt[1, len(before) : -len(after)], model.visual_projection(visual_tokens)[1]
    )
    assert torch.equal(prompt[1, -len(after):], embed(torch.tensor(after)))


def test_visual_tokens_begin_at_the_scale_of_words(make_model):
    """A7, whatever that scale is: an LLM has never read tokens of another."""
    model, words = make_model(), torch.randn(300, 32) * 0.07
    own = model.causal_lm.get_input_embeddings().weight
    begun = [(visual_projection(32, words.bfloat16()), words), (model.visual_projection, own)]
    for projection, words in begun:
        tokens = projection(torch.randn(500, 32))
        assert tokens.std().item() == pytest.approx(words.std().item(), rel=0.15)


def test_no_logits_outside_reports_no_mask_and_little_padding(make_model, monkeypatch):
    """Two groups of like length: each passes the LLM at the length of its own longest report,
    without its last token."""
    monkeypatch.setattr("model.LIKE_LENGTH", 2)
    model = make_model()
    rows, calls = [], []
    model.causal_lm.lm_head.register_forward_hook(
        lambda m, args, result: rows.append(args[0].shape)
    )
    model.causal_lm.model.register_forward_pre_hook(
        lambda m, args, kw: calls.append(kw), with_kwargs=True
    )
    batch = make_batch(
        model, sorted(REPORTS[:4], key=lambda text: len(model.tokenizer(text).input_ids))
    )
    model(**batch)
    assert rows == [(sum(batch["report_lengths"]), 32)]
    assert all(call.get("attention_mask") is None for call in calls)
    prompt, ordered = model.embed_prompt(torch.zeros(1, 16, 32)).shape[1], sorted(
        batch["report_lengths"]
    )
    assert ordered[1] < ordered[3]  # else the test would say nothing
    assert [tuple(call["inputs_embeds"].shape[:2]) for call in calls] == [
        (2, prompt + n - 1) for n in (ordered[1], ordered[3])
    ]


def test_a_gpu_takes_the_batch_at_once(make_model, monkeypatch):
    """One pass of the LLM, and the loss of a CPU's two."""
    monkeypatch.setattr("model.LIKE_LENGTH", 2)
    model, calls = make_model().eval(), []
    model.causal_lm.model.register_forward_pre_hook(
        lambda m, args, kw: calls.append(kw["inputs_embeds"].shape), with_kwargs=True)
    visual_tokens, ids = torch.randn(4, 16, 32), torch.randint(3, 30, (4, 9))
    on_cpu = model.report_term(visual_tokens, ids, [3, 4, 6, 9])
    calls.clear()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    torch.testing.assert_close(model.report_term(visual_tokens, ids, [3, 4, 6, 9]), on_cpu)
    prompt = model.embed_prompt(visual_tokens).shape[1]
    assert [tuple(shape[:2]) for shape in calls] == [(4, prompt + 8)]


def test_views_are_averaged_token_by_token(make_model):
    """A8: and a study of a mixed batch is what it is alone."""
    model = make_model().eval()
    batch = make_batch(model)
    together = model.encode(batch["images"], batch["view_counts"])
    start = 0
    for row, count in enumerate(batch["view_counts"]):
        views = batch["images"][start:start + count]
        each = [model.encode(view[None], [1])[0] for view in views]
        torch.testing.assert_close(
            together[row], torch.stack(each).mean(dim=0), atol=1e-5, rtol=1e-5
        )
        start += count


def test_encode_normalises_as_the_encoder_expects_and_ends_in_layer_norm(make_model):
    model = make_model().eval()
    images = make_batch(model)["images"][:1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    hidden = model.vision(pixels.float()).last_hidden_state
    with torch.no_grad():
        model.norm.weight.mul_(3)
    expected = (
        3
        * (hidden - hidden.mean(-1, keepdim=True))
        / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    )
    torch.testing.assert_close(model.encode(images, [1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_base_stays_bit_for_bit_and_the_rest_trains(make_model, precision):
    model = make_model(f"train.precision={precision}").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        with model.autocast():
            loss = sum(model(**make_batch(model))[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    base_type = torch.bfloat16 if precision == "bf16" else torch.float32
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for name, p in model.named_parameters():
        frozen = name.startswith("llm.") and "lora_" not in name
        assert (
            p.requires_grad != frozen
            and p.dtype == (base_type if frozen else torch.float32)
        ), name
        assert (name in moved) != frozen, name
    for part in ("vision.", "norm.", "vse_head.", "did_head.", "visual_projection.", "llm."):
        assert any(name.startswith(part) for name in moved), part
    lora = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in moved if "lora_" in name}
    assert lora == {"q_proj", "v_proj"}  # A12


def reached(model, term):
    model.zero_grad()
    term.backward()
    return {
        name.split(".")[0] if "lora_" not in name else "lora"
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }


def test_gradient_of_each_term_ends_where_the_paper_says(make_model):
    model = make_model().train()
    batch = make_batch(model)
    # not the teacher, not the LLM
    assert reached(model, model(**batch)[0]["did"]) == {"vision", "norm", "did_head"}
    assert reached(model, model(**batch)[0]["vse"]) == {"vision", "norm", "vse_head"}
    assert reached(model, model(**batch)[0]["report"]) == {
        "vision", "norm", "visual_projection", "lora"
    }


def test_ablations_build_nothing_that_they_do_not_use(make_model):
    """Table 2: a head of weight 0 is not built; without LoRA nothing of the LLM trains (A18)."""
    model = make_model("loss.vse_weight=0", "loss.did_weight=0", "model.lora=null")
    terms, *_ = model(**{**make_batch(model), "teacher_embed": None})
    assert terms.keys() == {"report"} and model.vse_head is None and model.did_head is None
    assert not any(p.requires_grad for p in model.llm.parameters())
    terms["report"].backward()
    assert model.visual_projection.weight.grad.abs().max() > 0
    assert make_model().vse_head.weight.shape == (64, 32)  # A4: D_z = 2 D
    assert make_model("model.vse_expansion=3").vse_head.weight.shape == (96, 32)


def test_vse_reading_of_a1_is_a_switch(make_model):
    plain, ours = (
        make_model(f"loss.vse_self_in_denominator={flag}").eval() for flag in ("true", "false")
    )
    batch = make_batch(ours)
    # one more term in each denominator
    assert plain(**batch)[0]["vse"].item() > ours(**batch)[0]["vse"].item() + 0.1


def test_teacher_is_the_llm_without_lora_on_the_report_alone(make_model):
    """A5: BOS in, BOS out of the mean, no gradient; neither LoRA nor the other reports of a
    batch change it."""
    model = make_model().train()
    shake_lora(model)
    embeddings = embed_reports(model, REPORTS + REPORTS)
    assert embeddings.keys() == set(REPORTS) and model.training
    base = LlamaForCausalLM.from_pretrained(model.config.model.llm).eval()
    for text, embedding in embeddings.items():
        ids = [model.bos_id] + model.tokenizer(text, add_special_tokens=False).input_ids
        hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:]
        torch.testing.assert_close(embedding, hidden.mean(dim=0), atol=1e-4, rtol=1e-4)
        assert not embedding.requires_grad
    in_another_order = embed_reports(model, REPORTS[::-1])
    assert all(torch.equal(in_another_order[text], embeddings[text]) for text in REPORTS)


def test_each_loss_has_its_temperature_and_its_embeddings(make_model):
    """A3; and h and z are what Sec. 3.2 says: the mean over S of the visual tokens, and W1 h +
    b."""
    model = make_model("loss.vse_temperature=0.5", "loss.did_temperature=0.2").eval()
    batch = make_batch(model)
    terms, visual_tokens, did_top1 = model(**batch)
    h = torch.stack([row.sum(dim=0) / len(row) for row in visual_tokens])
    z = h @ model.vse_head.weight.T + model.vse_head.bias
    text = batch["teacher_embed"] @ model.did_head.weight.T + model.did_head.bias
    assert terms["vse"].item() == pytest.approx(vse_loss(z, 0.5).item(), abs=1e-5)
    assert terms["did"].item() == pytest.approx(did_loss(h, text, 0.2).item(), abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(h[:, None], text[None], dim=2)
    nearest = [max(range(4), key=lambda j: cosine[i, j].item()) for i in range(4)]
    assert did_top1.item() == sum(i == j for i, j in enumerate(nearest)) / 4


def test_teacher_is_standardised_over_the_studies():
    """A5: a report counts as often as it occurs; a dimension that does not vary stays finite."""
    embeddings = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    embeddings[:, 2] = 4.0
    rows = torch.tensor([0, 2, 2, 1, 2, 0])
    teacher = Teacher(embeddings, rows)
    y = teacher([3, 0, 5])
    assert y.dtype == torch.float32 and torch.equal(y[1], y[2])
    for d in range(5):
        values = [embeddings[row, d].item() for row in rows]
        mean = sum(values) / 6
        deviation = (sum((v - mean) ** 2 for v in values) / 6) ** 0.5
        for value, study in zip(y[:, d].tolist(), (3, 0, 5)):
            expected = (values[study] - mean) / deviation if d != 2 else 0
            assert value == pytest.approx(expected, abs=1e-5)
    assert teacher.standardise(embeddings.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["EfficientNet", "ResNet"])
def test_an_encoder_whose_output_is_a_map(make_model, tmp_path, kind):
    """Sec. 3.1: its h w places are the tokens, row by row; no name in its config gives S or D."""
    vision = write_map_encoder(kind, tmp_path / "vision")
    model = make_model(f"model.vision={tmp_path / 'vision'}").eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    maps = vision.eval()((images / 255 - 0.5) / 0.25).last_hidden_state
    N, D, h, w = maps.shape
    tokens = model.encode(images, [1, 2])
    assert tokens.shape == (2, h * w, D) and h > 1
    place = torch.nn.functional.layer_norm(maps[0, :, 1, 0], (D,))
    torch.testing.assert_close(tokens[0, w], place, atol=1e-4, rtol=1e-3)
    batch = make_batch(model) | dict(
        images=torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    )
    assert reached(model.train(), model(**batch)[0]["did"]) == {"vision", "norm", "did_head"}


@pytest.mark.parametrize("kind, sizes, unused", [
    ("Dinov2", dict(image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1,
                    num_attention_heads=2), {"embeddings.mask_token"}),
    ("ConvNext", dict(image_size=32, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
     {"layernorm.weight", "layernorm.bias"}),
    ("Swinv2", dict(image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1],
                    num_heads=[1, 2]), set()),
    ("Hiera", dict(image_size=[32, 32], patch_size=[7, 7], patch_stride=[4, 4], embed_dim=8,
                   depths=[1, 1], num_heads=[1, 2], masked_unit_size=[2, 2],
                   num_query_pool=1), set()),
    ("PvtV2", dict(image_size=[32, 32], hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1],
                   num_attention_heads=[1, 1, 2, 2]), set())])
def test_encoders_of_other_families(make_model, tmp_path, kind, sizes, unused):
    """Buffers in no checkpoint, two sizes of an image, and parameters that X^e does not depend on.

    The latter are frozen, since torchrun would wait for their gradient, and all others train.
    """
    encoder = getattr(transformers, kind + "Model")(getattr(transformers, kind + "Config")(**sizes))
    encoder.save_pretrained(tmp_path / "vision")
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="ViTImageProcessor", image_mean=[0.5] * 3, image_std=[0.25] * 3)))
    model = make_model(f"model.vision={tmp_path / 'vision'}").train()
    assert model.image_size == 32
    frozen = {name for name, p in model.vision.named_parameters() if not p.requires_grad}
    assert frozen == unused
    model.encode(make_batch(model)["images"], [1] * 7).square().sum().backward()
    without = {name for name, p in model.vision.named_parameters() if p.grad is None}
    assert without == unused
    model.load_trained_state(model.trained_state())


@pytest.mark.parametrize("momentum", [0.001, 0.99])
def test_generation_normalises_by_the_last_films(make_model, tmp_path, momentum):
    """A11: whatever the folder says, not by what a pretraining saw, and not by the last batch.

    Films are grey and dark, which the first statistics are not; no two batches are alike.
    """
    write_map_encoder("EfficientNet", tmp_path / "vision", batch_norm_momentum=momentum)
    model = make_model(f"model.vision={tmp_path / 'vision'}", "train.precision=fp32").train()
    first = next(part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d))
    seen = []
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    light = torch.rand(400, 1, 1, 1)
    films = (100 * light * torch.rand(400, 1, 64, 64)).to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        for batch in films.split(4):
            model.encode(batch, [1] * 4)
    of_all = torch.stack(seen).mean(dim=0)
    assert (first.running_mean - of_all).norm() < 0.05 * of_all.norm()


def test_another_encoder_can_be_the_teacher(make_model, tmp_path):
    """A BERT: its special tokens are left out of the mean, its padding is masked, W2 takes its
    width."""
    from transformers import BertConfig, BertModel, BertTokenizer
    words = sorted({word for text in REPORTS for word in text.lower().replace(".", " .").split()})
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).eval()
    bert.save_pretrained(tmp_path / "bert"), tokenizer.save_pretrained(tmp_path / "bert")
    model = make_model(f"model.teacher={tmp_path / 'bert'}")
    assert model.did_head.weight.shape == (32, 24)
    for text, embedding in embed_reports(model, REPORTS).items():
        hidden = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(embedding, hidden.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_alone_equals_generation_in_a_batch(make_model, beams):
    model = make_model(
        f"generate.num_beams={beams}",
        "generate.max_new_tokens=12",
        "generate.repetition_penalty=1.5",
    ).eval()
    shake_lora(model, 1.0)
    batch = make_batch(model)
    together, h = model.generate(batch["images"], batch["view_counts"])
    torch.testing.assert_close(h, model.encode(batch["images"], batch["view_counts"]).mean(dim=1))
    start = 0
    for text, count in zip(together, batch["view_counts"]):
        assert model.generate(batch["images"][start:start + count], [count])[0] == [text]
        start += count
    assert len(set(together)) > 1  # else the test would say nothing


SEARCHES = [
    dict(),
    dict(num_beams=1),
    dict(num_beams=1, repetition_penalty=1.0),
    dict(num_beams=4, length_penalty=0.0, min_new_tokens=1),
    dict(num_beams=2, length_penalty=-1.0, repetition_penalty=1.3),
    dict(num_beams=5, repetition_penalty=1.0, min_new_tokens=3),
]


@pytest.mark.parametrize("changes", SEARCHES, ids=str)
def test_beam_search_equals_the_librarys(make_model, changes):
    """Token for token; with beams that cross, studies that end at different steps, and one that
    never ends."""
    settings = Generate(
        **dict(
            num_beams=3,
            repetition_penalty=2.0,
            length_penalty=2.0,
            min_new_tokens=4,
            max_new_tokens=20,
        )
        | changes
    )
    model = make_model().eval()
    shake_lora(model, 1.0)
    model.causal_lm.lm_head.weight.data *= 2  # one token is repeated until the penalty has its say
    model.causal_lm.lm_head.weight.data[model.eos_id] *= 2  # and ends come within the limit
    prompt = torch.randn(24, 9, 32, generator=torch.Generator().manual_seed(1))
    calls = []
    hook = model.causal_lm.model.register_forward_hook(
        lambda module, args, result: calls.append(len(result.last_hidden_state))
    )
    ours = beam_search(model.causal_lm, prompt, settings, model.eos_id)
    hook.remove()
    theirs = library_search(model, prompt, settings)
    assert torch.equal(ours, theirs)
    lengths = (ours != model.eos_id).sum(dim=1)
    # else the test would say little
    assert len(lengths.unique()) > 2 and len(ours.unique(dim=0)) > 12, lengths
    # settled studies leave
    assert calls[0] == 24 and calls[-1] < 24 and calls == sorted(calls, reverse=True)


def test_a_decoding_step_reads_back_once_at_most_on_average(make_model):
    """None before an end is possible, then one, and one more where a study leaves."""
    settings = Generate(num_beams=3, min_new_tokens=10, max_new_tokens=20)
    model = make_model().eval()
    shake_lora(model, 1.0)
    model.causal_lm.lm_head.weight.data[model.eos_id] *= 4
    prompt = torch.randn(24, 9, 32, generator=torch.Generator().manual_seed(1))
    read, rows = ReadBacks(), []  # as each step, after the prompt's, enters the LLM
    model.causal_lm.model.register_forward_pre_hook(
        lambda module, args: rows.append((len(args[-1]), len(read.places))))
    with read:
        beam_search(model.causal_lm, prompt, settings, model.eos_id)
    studies, counts = zip(*rows)
    assert set(read.places) == {"beam_search"} and len(set(studies)) > 3  # studies leave
    steps = range(1, len(rows))
    for step in steps:
        left = studies[step] < studies[step - 1]
        expected = 0 if step <= settings.min_new_tokens else 1 + left
        assert counts[step] - counts[step - 1] == expected, step
    assert counts[-1] <= len(steps)


def test_the_cache_asks_for_its_memory_once(make_model):
    """Growing copies nothing, and a study that leaves gives nothing back: it stays one tensor."""
    model = make_model().eval()
    seen = []
    settings = Generate(num_beams=3, min_new_tokens=2, max_new_tokens=20)
    model.causal_lm.lm_head.weight.data[model.eos_id] *= 4

    def note(module, args):
        cache = args[3]
        if cache.get_seq_length():
            layer = cache.layers[0]
            seen.append((layer.keys.untyped_storage().data_ptr(), layer.keys.shape,
                         args[1].stride(2), args[1].shape[3]))
    model.causal_lm.model.register_forward_pre_hook(note)
    prompt = torch.randn(24, 9, 32, generator=torch.Generator().manual_seed(1))
    beam_search(model.causal_lm, prompt, settings, model.eos_id)
    pointers, shapes, strides, widths = zip(*seen)
    assert len(set(pointers)) == 1 and shapes[-1][0] < 24
    assert [shape[2] for shape in shapes] == [9 + 3 * step for step in range(len(shapes))]
    assert widths == tuple(9 + 3 * (step + 1) for step in range(len(shapes)))
    assert set(strides) == {72}  # 9 + 3 * 19 = 66 keys at most, rounded up to 8's multiple


def test_recomputation_changes_nothing(make_model):
    """train.recompute: dropout included, the same terms and the same gradients, to the bit; and
    less is kept."""
    kept, results = [], []
    for setting in ("false", "true"):
        model = make_model(f"train.recompute={setting}").train()
        shake_lora(model)
        batch, sizes = make_batch(model), {}
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            terms, *_ = model(**batch)
        sum(terms.values()).backward()
        kept.append(sum(sizes.values()))
        results.append(
            [*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    assert kept[1] < 0.8 * kept[0]


def test_fused_attention_is_called_only_where_its_causal_mask_is_right(monkeypatch):
    """Its mask lets the first query see the first key only: right for all tokens, or for one."""
    called = []

    def fused(query, key, value, **options):
        called.append((query.shape[2], options["is_causal"]))
        return query
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    key, value = torch.empty(2, 3, 2, 5, 8, device="meta").unbind()
    for N in (1, 3, 5):
        query = torch.empty(3, 4, N, 8, device="meta")
        heads, _ = grouped_attention(torch.nn.Module(), query, key, value, None, 1.0)
        assert heads.shape == (3, N, 4, 8)
    assert called == [(1, False), (5, True)]


@pytest.mark.parametrize("masked, laid_out_as", [(True, "CPU"), (True, "GPU"), (False, "CPU")])
def test_grouped_attention_equals_a_plain_one(masked, laid_out_as, monkeypatch):
    """Two query heads to a key-value head; a mask of each study's own, or none: causal; gradients.

    Without a mask the last 5 of 7 tokens ask: each sees itself and those before it. A GPU's kernel
    gives (B, H, N, d) as a view of (B, N, H, d).
    """
    fused = torch.nn.functional.scaled_dot_product_attention
    if laid_out_as == "GPU":
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention",
            lambda *args, **kw: fused(*args, **kw).transpose(1, 2).contiguous().transpose(1, 2))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, generator=generator, requires_grad=True)
                         for heads, n in ((4, 5), (2, 7), (2, 7)))
    seen = torch.rand(3, 1, 5, 7, generator=generator) < 0.7
    seen[..., 0] = True
    if not masked:
        seen = (torch.arange(7) <= torch.arange(2, 7)[:, None]).expand(3, 1, 5, 7)
    mask = torch.zeros(3, 1, 5, 7).masked_fill(~seen, -torch.inf)
    ours, _ = grouped_attention(torch.nn.Module(), query, key, value, mask if masked else None,
                                scaling=0.3)
    keys, values = (rows.repeat_interleave(2, dim=1) for rows in (key, value))
    theirs = ((query @ keys.mT * 0.3 + mask).softmax(dim=-1) @ values).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn(ours.shape, generator=generator)
    gradients = [torch.autograd.grad((heads * weight).sum(), (query, key, value))
                 for heads in (ours, theirs)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_greedy_generation_follows_the_training_forward(make_model):
    """The prompt of generation is that of training: greedy tokens are the arg max of the logits
    the loss sees."""
    model = make_model(
        "generate.num_beams=1",
        "generate.repetition_penalty=1",
        "generate.max_new_tokens=8",
        "generate.min_new_tokens=8",
    ).eval()
    shake_lora(model, 1.0)
    batch = make_batch(model)
    prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
    ids = torch.empty(4, 0, dtype=torch.long)
    for _ in range(8):
        inputs = torch.cat([prompt, model.causal_lm.get_input_embeddings()(ids)], dim=1)
        logits = model.causal_lm(inputs_embeds=inputs).logits[:, -1]
        logits[:, model.eos_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert model.generate(batch["images"], batch["view_counts"])[0] == [
        model.decode(row) for row in ids.tolist()
    ]


def test_decode_ends_at_the_end_token(make_model):
    model = make_model()
    ids = model.tokenizer("lungs are clear .", add_special_tokens=False).input_ids
    # and the blank before the dot stays
    assert model.decode(ids + [model.eos_id] + ids) == "lungs are clear ."
    assert model.decode([model.eos_id, 5]) == model.decode([]) == ""


def test_trained_state_is_complete_and_strict(make_model, tmp_path):
    model, other = make_model(), make_model()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    state = model.trained_state()
    assert state.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    torch.save(dict(model=state, config=model.config.to_dict()), tmp_path / "best.pt")
    other.load_trained_state(read_checkpoint(tmp_path / "best.pt")["model"])
    batch = make_batch(model)
    assert {k: v.item() for k, v in model.eval()(**batch)[0].items()} == {
        k: v.item() for k, v in other.eval()(**batch)[0].items()
    }
    name = next(iter(state))
    for broken in (
        {k: v for k, v in state.items() if k != name},
        state | {"extra": state[name]},
        state | {name: torch.zeros(3, 1)},
    ):
        with pytest.raises(ValueError, match="missing, unexpected or of another shape"):
            other.load_trained_state(broken)


def test_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))
    torch.save(dict(model=Evil(), config={}), tmp_path / "bad.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")  # torch's error has no words
    for name in ("bad.pt", "junk.pt", "list.pt", "empty.pt"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_missing_backbone_is_named(make_model):
    with pytest.raises(FileNotFoundError, match="model.llm: cannot load '/nowhere/llm'"):
        make_model("model.llm=/nowhere/llm")
    with pytest.raises(FileNotFoundError, match="model.vision"):
        make_model("model.vision=/nowhere/swin")


def test_cut_weights_are_named(make_model, backbones, tmp_path):
    folder = shutil.copytree(backbones / "llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="model.llm: cannot load .*llama"):
        make_model(f"model.llm={folder}")


@pytest.mark.parametrize("part, sizes", [("llm", {"vocab_size": 999}),
                                         ("vision", {"embed_dim": 8})])
def test_weights_of_other_sizes_are_named(make_model, backbones, tmp_path, part, sizes):
    source = backbones / {"llm": "llama", "vision": "swin"}[part]
    folder = shutil.copytree(source, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | sizes))
    with pytest.raises(FileNotFoundError, match=f"model.{part}: cannot load .*other"):
        make_model(f"model.{part}={folder}")


def test_models_of_another_kind_are_named(make_model, backbones, tmp_path):
    """An LLM that is no Llama; an encoder of images and texts; one that leaves out patches."""
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=400, n_embd=32, n_layer=1, n_head=2))
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=99),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, image_size=32, patch_size=8)))
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=8))
    for model, source, key, words in (
            (gpt, "llama", "llm", "is a GPT2LMHeadModel; expected an LLM of the Llama"),
            (clip, "swin", "vision", "CLIPModel gives no last_hidden_state of an image"),
            (masked, "swin", "vision", "ViTMAEModel leaves out patches at random")):
        folder = shutil.copytree(backbones / source, tmp_path / type(model).__name__)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"model.{key}: .*{words}"):
            make_model(f"model.{key}={folder}", "model.lora=null")


def test_paper_scale_on_the_meta_device():
    """Sec. 4.1.2: the model of configs/iu_xray.yaml at its published sizes, without its weights."""
    model = paper_model()
    with torch.device("meta"):
        visual_tokens = model.encode(torch.zeros(2, 3, 224, 224, dtype=torch.uint8), [2])
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    assert visual_tokens.shape == (1, 49, 1024)                                          # S, D
    assert model.vse_head.weight.shape == (2048, 1024)                                   # D_z, A4
    assert (
        model.did_head.weight.shape == (1024, 4096)
        and model.visual_projection.weight.shape == (4096, 1024)
    )
    assert round(count(model.vision.parameters()) / 1e6, 1) == 86.7
    assert round(count(p for p in model.llm.parameters() if not p.requires_grad) / 1e9, 2) == 6.74
    assert count(p for p in model.llm.parameters() if p.requires_grad) == 8_388_608  # LoRA: 8.39 M
    assert {p.dtype for p in model.llm.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_tests_stay_on_a_cpu():
    """Unless they are told otherwise: what they compare to the bit is a CPU's."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" or torch.cuda.is_available()
