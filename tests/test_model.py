"""The model: what reaches which loss, what trains and what stays, and the sizes of the paper."""
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from configs import PROMPT, InputError
from conftest import (REPORTS, make_tokenizer, paper_model, write_encoder, write_llm,
                      write_map_encoder)
from losses import did_loss, vse_loss
from configs.files import read_checkpoint
from model import (Teacher, embed_reports, load_checkpoint, pixel_statistics,
                   visual_projection)


def make_batch(model, reports=REPORTS[:4], views=(2, 1, 3, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids + [model.eos_id])
           for text in reports]
    size = (sum(views), 3, model.image_size, model.image_size)
    return dict(images=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
                view_counts=list(views),
                report_ids=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
                report_lengths=[len(row) for row in ids],
                teacher_embed=torch.randn(len(views), 32, generator=generator))


def shake_lora(model, scale=0.2):
    """LoRA starts as zero; make it do something."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def textbook_loss(llm, prompt, report_ids, report_lengths):
    """Every place in, the library's own labels and shift, an attention mask."""
    (B, P), L = prompt.shape[:2], report_ids.shape[1]
    inputs = torch.cat([prompt, llm.get_input_embeddings()(report_ids)], dim=1)
    real = torch.arange(L) < torch.tensor(report_lengths)[:, None]
    labels = torch.cat([torch.full((B, P), -100), report_ids.masked_fill(~real, -100)], dim=1)
    mask = torch.cat([torch.ones(B, P, dtype=torch.long), real.long()], dim=1)
    return llm(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The report term and generation: the library's ----------------------------------------------------

def test_report_term_equals_the_textbook_computation(make_model):
    """The same loss and the same gradients."""
    model = make_model("model.lora.dropout=0").eval()
    shake_lora(model)
    batch = make_batch(model)
    ours = model(**batch)[0]["report"]
    prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
    theirs = textbook_loss(model.causal_lm, prompt, batch["report_ids"], batch["report_lengths"])
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    ours, theirs = gradients(model, ours), gradients(model, theirs)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)


# All of it may stand in the generation_config.json of a chat model.
HOSTILE = dict(do_sample=True, temperature=3.0, top_k=5, num_beams=4, repetition_penalty=5.0,
               no_repeat_ngram_size=2, suppress_tokens=[5, 6, 7], early_stopping=True,
               eos_token_id=[3, 4], forced_eos_token_id=9, num_return_sequences=2,
               exponential_decay_length_penalty=[2, 3.0], encoder_repetition_penalty=2.0)


@pytest.mark.parametrize("kind, more", [
    ("Llama", {}), ("Gemma2", dict(attn_logit_softcapping=5.0, final_logit_softcapping=5.0)),
    ("Mistral", dict(sliding_window=8)), ("Granite", dict(logits_scaling=4.0)),
    ("Lfm2", dict(layer_types=["conv", "full_attention"]))])
def test_an_llm_computes_and_generates_as_the_library_does(make_model, tmp_path, kind, more):
    """Soft caps, windows, scales and caches are the model's own, and a generation_config.json
    changes nothing (A14)."""
    folder = write_llm(kind, tmp_path / "llm", **more)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    plain.generation_config = GenerationConfig()
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    model = make_model(f"model.llm={folder}", "generate.num_beams=3", "generate.min_new_tokens=4",
                       "generate.max_new_tokens=12", "generate.repetition_penalty=1.5",
                       "generate.length_penalty=2.0").eval()
    batch = make_batch(model)
    with torch.no_grad():
        ours = model(**batch)[0]["report"].item()
        prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
        theirs = textbook_loss(plain, prompt, batch["report_ids"], batch["report_lengths"]).item()
        assert ours == pytest.approx(theirs, abs=1e-5)
        ids = plain.generate(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2]),
                             num_beams=3, min_new_tokens=4, max_new_tokens=12, pad_token_id=1,
                             repetition_penalty=1.5, length_penalty=2.0, eos_token_id=model.eos_id)
    written = model.generate(batch["images"], batch["view_counts"])[0]
    assert written == [model.decode(row) for row in ids.tolist()]
    assert len(set(written)) > 1 or kind == "Mistral"  # whose window has left the visual tokens


def test_padding_changes_nothing(make_model):
    """Neither the id of the padding nor more of it; an end token inside the padding is no target
    (A9)."""
    model = make_model().eval()
    batch = make_batch(model)
    terms, _ = model(**batch)
    for pad in (model.eos_id, 7):
        padded = torch.full((4, batch["report_ids"].shape[1] + 5), pad)
        for row, ids, length in zip(padded, batch["report_ids"], batch["report_lengths"]):
            row[:length] = ids[:length]
        again, _ = model(**batch | {"report_ids": padded})
        for name in terms:
            assert again[name].item() == pytest.approx(terms[name].item(), abs=1e-6), name


def test_no_logits_outside_reports(make_model):
    """The output layer sees as many places as the longest report has, and none of the prompt."""
    model, rows = make_model(), []
    model.causal_lm.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape))
    batch = make_batch(model)
    model(**batch)
    assert rows == [(4, max(batch["report_lengths"]), 32)]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_alone_equals_generation_in_a_batch(make_model, beams):
    model = make_model(f"generate.num_beams={beams}", "generate.max_new_tokens=12",
                       "generate.repetition_penalty=1.5").eval()
    shake_lora(model, 1.0)
    batch = make_batch(model)
    together, h = model.generate(batch["images"], batch["view_counts"])
    torch.testing.assert_close(h, model.encode(batch["images"], batch["view_counts"]).mean(dim=1))
    start = 0
    for text, count in zip(together, batch["view_counts"]):
        assert model.generate(batch["images"][start:start + count], [count])[0] == [text]
        start += count
    assert len(set(together)) > 1  # else the test would say nothing


def test_greedy_generation_follows_the_training_forward(make_model):
    """Greedy tokens are the arg max of the logits that the loss sees: one prompt for both."""
    model = make_model("generate.num_beams=1", "generate.repetition_penalty=1",
                       "generate.max_new_tokens=8", "generate.min_new_tokens=8").eval()
    shake_lora(model, 1.0)
    batch = make_batch(model)
    prompt = model.embed_prompt(model.encode(batch["images"], batch["view_counts"]))
    ids = torch.empty(4, 0, dtype=torch.long)
    for _ in range(8):
        inputs = torch.cat([prompt, model.causal_lm.get_input_embeddings()(ids)], dim=1)
        logits = model.causal_lm(inputs_embeds=inputs).logits[:, -1]
        logits[:, model.eos_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
    written = model.generate(batch["images"], batch["view_counts"])[0]
    assert written == [model.decode(row) for row in ids.tolist()]


def test_decode_ends_at_the_end_token(make_model):
    model = make_model()
    ids = model.tokenizer("lungs are clear .", add_special_tokens=False).input_ids
    assert model.decode(ids + [model.eos_id] + ids) == "lungs are clear ."
    assert model.decode([model.eos_id, 5]) == model.decode([]) == ""


# The prompt (Sec. 3.4) ----------------------------------------------------------------------------

@pytest.mark.parametrize("has_bos", [True, False])
def test_prompt_is_that_of_section_3_4(make_model, backbones, tmp_path, has_bos):
    """BOS is left out where the tokenizer has none, as Qwen's (A9): in the teacher, too."""
    folder = shutil.copytree(backbones / "llama", tmp_path / "llama")
    if not has_bos:
        make_tokenizer(bos_token=None).save_pretrained(folder)
    model = make_model(f"model.llm={folder}").eval()
    visual_tokens = model.encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [1, 1])
    prompt, embed = model.embed_prompt(visual_tokens), model.causal_lm.get_input_embeddings()
    assert "".join(PROMPT) == (
        "Human: <img></img> Generate a comprehensive and detailed diagnosis report "
        "for this chest X-ray image.\nAssistant:")
    bos = [0] if has_bos else []
    before, after = (model.tokenizer(text, add_special_tokens=False).input_ids for text in PROMPT)
    before, S = bos + before, visual_tokens.shape[1]
    assert prompt.shape == (2, len(before) + S + len(after), 32) and S == 16
    assert model.visual_token_count == S
    assert torch.equal(prompt[0, :len(before)], embed(torch.tensor(before)))
    visual = model.visual_projection(visual_tokens)[1]
    assert torch.equal(prompt[1, len(before):-len(after)], visual)
    assert torch.equal(prompt[1, -len(after):], embed(torch.tensor(after)))
    y = embed_reports(model, ["clear ."])["clear ."]
    ids = torch.tensor([bos + model.tokenizer("clear .", add_special_tokens=False).input_ids])
    with torch.no_grad():
        states = model.causal_lm.base_model(input_ids=ids).last_hidden_state[0, len(bos):]
    torch.testing.assert_close(y, states.mean(dim=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Gemma3"])
def test_visual_tokens_begin_at_the_scale_of_words(make_model, tmp_path, kind):
    """A7: as the embedding layer gives them; Gemma's scales them by sqrt(D_h)."""
    name = "Gemma3Text" if kind == "Gemma3" else kind
    model = make_model(f"model.llm={write_llm(name, tmp_path / 'llm')}")
    embed = model.causal_lm.get_input_embeddings()
    words = embed(torch.arange(embed.num_embeddings)).float()
    tokens = model.visual_projection(torch.randn(500, 32))
    assert tokens.std().item() == pytest.approx(words.std().item(), rel=0.15)
    projection = visual_projection(32, (torch.randn(300, 48) * 0.07).bfloat16())
    assert projection(torch.randn(500, 32)).std().item() == pytest.approx(0.07, rel=0.15)


# X^e (Sec. 3.2) -----------------------------------------------------------------------------------

def test_views_are_averaged_token_by_token(make_model):
    """A8: and a study of a mixed batch is what it is alone."""
    model = make_model().eval()
    batch = make_batch(model)
    together, start = model.encode(batch["images"], batch["view_counts"]), 0
    for row, count in zip(together, batch["view_counts"]):
        each = [model.encode(view[None], [1])[0] for view in batch["images"][start:start + count]]
        torch.testing.assert_close(row, torch.stack(each).mean(dim=0), atol=1e-5, rtol=1e-5)
        start += count


def test_encode_normalises_as_the_encoder_expects_and_ends_in_layer_norm(make_model):
    model = make_model().eval()
    images = make_batch(model)["images"][:1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    hidden = model.vision(pixels.float()).last_hidden_state
    with torch.no_grad():
        model.norm.weight.mul_(3)
    centred, variance = hidden - hidden.mean(-1, keepdim=True), hidden.var(-1, unbiased=False)
    expected = 3 * centred / (variance[..., None] + 1e-5).sqrt()
    torch.testing.assert_close(model.encode(images, [1]), expected, atol=1e-4, rtol=1e-4)


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
    assert reached(model.train(), "did") == {"vision", "norm", "did_head"}


@pytest.mark.parametrize("momentum", [0.001, 0.99])
def test_generation_normalises_by_the_last_films(make_model, tmp_path, momentum):
    """A11: whatever the folder says, not by what a pretraining saw, and not by the last batch.

    Films are grey and dark, which the first statistics are not; no two batches are alike.
    """
    write_map_encoder("EfficientNet", tmp_path / "vision", batch_norm_momentum=momentum)
    model = make_model(f"model.vision={tmp_path / 'vision'}").train()
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


# What trains --------------------------------------------------------------------------------------

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
        assert p.requires_grad != frozen and (name in moved) != frozen, name
        assert p.dtype == (base_type if frozen else torch.float32), name
    lora = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in moved if "lora_" in name}
    assert lora == {"q_proj", "v_proj"}  # A12


def reached(model, term):
    """The parts that the gradient of a term reaches."""
    found = gradients(model, model(**make_batch(model))[0][term])
    return {"lora" if "lora_" in name else name.split(".")[0]
            for name, gradient in found.items() if gradient.abs().max() > 0}


def test_gradient_of_each_term_ends_where_the_paper_says(make_model):
    """That of DID not in the teacher, and none in the LLM."""
    model = make_model().train()
    assert reached(model, "did") == {"vision", "norm", "did_head"}
    assert reached(model, "vse") == {"vision", "norm", "vse_head"}
    assert reached(model, "report") == {"vision", "norm", "visual_projection", "lora"}


def test_ablations_build_nothing_that_they_do_not_use(make_model):
    """Table 2: a head of weight 0 is not built; without LoRA nothing of the LLM trains (A18)."""
    model = make_model("loss.vse_weight=0", "loss.did_weight=0", "model.lora=null")
    terms, measures = model(**make_batch(model) | {"teacher_embed": None})
    assert terms.keys() == {"report"} and measures == {}
    assert model.vse_head is model.did_head is None
    assert not any(p.requires_grad for p in model.llm.parameters())
    terms["report"].backward()
    assert model.visual_projection.weight.grad.abs().max() > 0
    assert make_model().vse_head.weight.shape == (64, 32)  # A4: D_z = 2 D
    assert make_model("model.vse_expansion=3").vse_head.weight.shape == (96, 32)


def test_recomputation_changes_nothing(make_model):
    """train.recompute: dropout included, the same terms and gradients, to the bit; less is kept."""
    kept, results = [], []
    for setting in ("false", "true"):
        model = make_model(f"train.recompute={setting}").train()
        shake_lora(model)
        batch, sizes = make_batch(model), {}
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            terms, _ = model(**batch)
        kept.append(sum(sizes.values()))
        found = gradients(model, sum(terms.values()))
        results.append([*terms.values(), *found.values()])
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    assert kept[1] < 0.8 * kept[0]


# The losses' arguments, and the teacher -----------------------------------------------------------

def test_each_loss_has_its_temperature_and_its_embeddings(make_model):
    """A3; and h and z are what Sec. 3.2 says: the mean over S of X^e, and W1 h + b."""
    model = make_model("loss.vse_temperature=0.5", "loss.did_temperature=0.2").eval()
    batch = make_batch(model)
    terms, measures = model(**batch)
    visual_tokens = model.encode(batch["images"], batch["view_counts"])
    h = torch.stack([row.sum(dim=0) / len(row) for row in visual_tokens])
    z = h @ model.vse_head.weight.T + model.vse_head.bias
    text = batch["teacher_embed"] @ model.did_head.weight.T + model.did_head.bias
    assert terms["vse"].item() == pytest.approx(vse_loss(z, 0.5).item(), abs=1e-5)
    assert terms["did"].item() == pytest.approx(did_loss(h, text, 0.2).item(), abs=1e-5)
    cosine = torch.nn.functional.cosine_similarity(h[:, None], text[None], dim=2)
    nearest = [max(range(4), key=lambda j: cosine[i, j].item()) for i in range(4)]
    assert measures["did_top1"].item() == sum(i == j for i, j in enumerate(nearest)) / 4


def test_vse_reading_of_a1_is_a_switch(make_model):
    """Plain InfoNCE has one more term in each denominator."""
    plain, ours = (make_model(f"loss.vse_self_in_denominator={flag}").eval()
                   for flag in ("true", "false"))
    batch = make_batch(ours)
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
        ids = model.bos_ids + model.tokenizer(text, add_special_tokens=False).input_ids
        hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:]
        torch.testing.assert_close(embedding, hidden.mean(dim=0), atol=1e-4, rtol=1e-4)
        assert not embedding.requires_grad
    in_another_order = embed_reports(model, REPORTS[::-1])
    assert all(torch.equal(in_another_order[text], embeddings[text]) for text in REPORTS)


def test_teacher_is_standardised_over_the_studies():
    """A5: a report counts as often as it occurs; a dimension that does not vary stays finite."""
    embeddings = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    embeddings[:, 2] = 4.0
    rows = torch.tensor([0, 2, 2, 1, 2, 0])
    teacher = Teacher(embeddings, rows)
    y, all_rows = teacher([3, 0, 5]), embeddings[rows].double()
    assert y.dtype == torch.float32 and torch.equal(y[1], y[2])
    expected = (all_rows - all_rows.mean(dim=0)) / all_rows.std(dim=0, correction=0)
    expected[:, 2] = 0
    torch.testing.assert_close(y.double(), expected[[3, 0, 5]], atol=1e-5, rtol=1e-5)
    assert teacher.standardise(embeddings.bfloat16()).dtype == torch.float32


def test_another_encoder_can_be_the_teacher(make_model, tmp_path):
    """A BERT: its special tokens are left out of the mean, its padding is masked, W2 takes its
    width; and it is not needed to generate."""
    words = sorted({word for text in REPORTS for word in text.lower().replace(".", " .").split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(special + words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).eval()
    bert.save_pretrained(tmp_path / "bert"), tokenizer.save_pretrained(tmp_path / "bert")
    model = make_model(f"model.teacher={tmp_path / 'bert'}")
    assert model.did_head.weight.shape == (32, 24)
    for text, embedding in embed_reports(model, REPORTS).items():
        hidden = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        torch.testing.assert_close(embedding, hidden.mean(dim=0), atol=1e-5, rtol=1e-4)
    content = dict(model=model.trained_state(), config=model.config.to_dict(), step=3)
    torch.save(content, tmp_path / "best.pt")
    shutil.rmtree(tmp_path / "bert")
    loaded = load_checkpoint(tmp_path / "best.pt", ["generate.max_new_tokens=7"])
    assert loaded.step == 3 and loaded.config.generate.max_new_tokens == 7 and not loaded.training


# Checkpoints --------------------------------------------------------------------------------------

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
    ours, theirs = model.eval()(**batch)[0], other.eval()(**batch)[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = next(iter(state))
    without = {key: value for key, value in state.items() if key != name}
    for broken in (without, state | {"extra": state[name]}, state | {name: torch.zeros(3, 1)}):
        with pytest.raises(ValueError, match="missing, unexpected or of another shape"):
            other.load_trained_state(broken)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        other.load_trained_state(state | {name: state[name] * torch.nan})


def test_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))
    torch.save(dict(model=Evil(), config={}), tmp_path / "bad.pt")
    (tmp_path / "junk.csv").write_text("a,b\n1,2\n")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("bad.pt", "junk.csv", "list.pt", "empty.pt"):
        with pytest.raises(ValueError, match="not a checkpoint of VDGen; expected"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


# Models that people bring -------------------------------------------------------------------------

ENCODERS = {  # the parameters that X^e does not depend on
    "Dinov2": {"embeddings.mask_token"}, "ConvNext": {"layernorm.weight", "layernorm.bias"},
    "ViT": {"pooler.dense.weight", "pooler.dense.bias"},
    "CLIP": {"post_layernorm.weight", "post_layernorm.bias"},
    "Hiera": {"pooler.layernorm.weight", "pooler.layernorm.bias"}, "Swinv2": set(),
    "PvtV2": set(), "DeiT": None, "Beit": None, "CLIPVision": None, "Siglip": None,
    "SiglipVision": None, "RegNet": set(), "ResNet": set(), "EfficientNet": set()}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_many_families(make_model, tmp_path, kind):
    """One step and one report. What X^e does not depend on is frozen: DDP would wait for it."""
    write_encoder(kind, tmp_path / "vision")
    model = make_model(f"model.vision={tmp_path / 'vision'}").train()
    assert not hasattr(model.vision, "text_model")  # of CLIP and SigLIP the image part
    frozen = {name for name, p in model.vision.named_parameters() if not p.requires_grad}
    assert ENCODERS[kind] in (None, frozen)
    batch = make_batch(model)
    gradients(model, sum(model(**batch)[0].values()))
    assert {name for name, p in model.vision.named_parameters() if p.grad is None} == frozen
    assert len(model.eval().generate(batch["images"], batch["view_counts"])[0]) == 4
    model.load_trained_state(model.trained_state())


LLMS = {"Llama": {}, "Qwen2": {}, "Qwen3": {}, "Phi3": {}, "Olmo": {}, "Olmo2": {}, "SmolLM3": {},
        "StableLm": {}, "Mistral": {}, "Gemma2": {}, "Gemma3Text": {}, "Granite": {}, "Lfm2": {},
        "GPT2": {}, "GPTNeoX": {}}
TARGETS = {"Phi3": "[qkv_proj]", "GPT2": "[c_attn]", "GPTNeoX": "[query_key_value]"}


@pytest.mark.parametrize("kind", LLMS)
def test_llms_of_many_families(make_model, tmp_path, kind):
    """One step, one report and one teacher; with other names for LoRA where they have them."""
    folder = write_llm(kind, tmp_path / "llm")
    targets = [f"model.lora.target_modules={TARGETS[kind]}"] if kind in TARGETS else []
    model = make_model(f"model.llm={folder}", *targets).train()
    batch = make_batch(model)
    found = gradients(model, sum(model(**batch)[0].values()))
    assert any("lora_" in name for name in found)
    assert len(model.eval().generate(batch["images"], batch["view_counts"])[0]) == 4
    assert embed_reports(model, REPORTS[:2])[REPORTS[0]].shape == (32,)


def test_models_that_cannot_serve_are_named(make_model, backbones, tmp_path):
    """Each in one line that names the setting, at load."""
    def folder_of(kind, source="llama"):
        folder = tmp_path / kind
        if not folder.exists():
            write_encoder(kind, folder) if source == "swin" else write_llm(kind, folder)
        return folder
    adapter = tmp_path / "adapter"
    model = make_model(f"model.llm={folder_of('Llama')}")
    model.llm.save_pretrained(adapter), model.tokenizer.save_pretrained(adapter)
    endless = shutil.copytree(folder_of("Llama"), tmp_path / "endless")
    make_tokenizer(eos_token=None).save_pretrained(endless)
    t5 = transformers.T5Config(vocab_size=99, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    t5.save_pretrained(tmp_path / "t5")
    for error, words, *settings in (
            (ValueError, "model.vision: ViTMAEModel leaves out patches at random",
             f"model.vision={folder_of('ViTMAE', 'swin')}"),
            (ValueError, "model.vision: LlamaModel gives no last_hidden_state of an image",
             f"model.vision={shutil.copytree(backbones / 'swin', tmp_path / 'mixed')}"),
            (ValueError, "model.llm: .*endless has no end token", f"model.llm={endless}"),
            (ValueError, "model.llm: .* is a LoRA adapter; merge it", f"model.llm={adapter}"),
            (ValueError, "model.lora.target_modules: .*no layer q_proj; .* are .*c_attn",
             f"model.llm={folder_of('GPT2')}"),
            (ValueError, "model.lora.target_modules: .*no layer v_prj",
             "model.lora.target_modules=[q_proj, v_prj]"),
            (ValueError, "model.llm: .*FalconH1ForCausalLM, cannot read visual tokens",
             f"model.llm={folder_of('FalconH1')}"),
            (ValueError, "model.teacher: .* is a t5; expected an encoder of texts",
             f"model.teacher={tmp_path / 't5'}"),
            (ValueError, "model.teacher: .* is a clip",
             f"model.teacher={folder_of('CLIP', 'swin')}"),
            (FileNotFoundError, "model.llm: cannot load '/nowhere/llm'", "model.llm=/nowhere/llm"),
            (FileNotFoundError, "model.vision", "model.vision=/nowhere/swin")):
        if "LlamaModel" in words:
            for path in folder_of("Llama").iterdir():
                shutil.copy(path, tmp_path / "mixed")
        with pytest.raises(error, match=words):
            make_model(*settings)


def test_recompute_passes_over_an_encoder_that_has_none(make_model, tmp_path, capsys):
    write_encoder("ResNet", tmp_path / "vision")
    model = make_model(f"model.vision={tmp_path / 'vision'}", "train.recompute=true")
    assert "ResNetModel keeps its activations" in capsys.readouterr().out
    assert model.causal_lm.is_activation_checkpointing


def test_damaged_weights_are_named(make_model, backbones, tmp_path):
    """Cut, or of other sizes than their config says."""
    cut = shutil.copytree(backbones / "llama", tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    other = shutil.copytree(backbones / "swin", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"embed_dim": 8}))
    for key, folder in (("llm", cut), ("vision", other)):
        with pytest.raises(FileNotFoundError, match=f"model.{key}: cannot load .*{folder.name}"):
            make_model(f"model.{key}={folder}")


def rewrite(folder, edit):
    """The weights of a folder, under the names and in the number that `edit` makes of them."""
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})
    return folder


def without(*words):
    return lambda weights: {name: value for name, value in weights.items()
                            if not any(word in name for word in words)}


def prefixed(weights):
    return {f"module.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("key, kind, edit, words", [
    ("llm", "Llama", without("lm_head"), "lacks 1 weights, such as lm_head.weight"),
    ("llm", "Llama", without("layers.1."), "lacks 9 weights, such as model.layers.1"),
    ("llm", "Llama", prefixed, "lacks 21 weights"),
    ("vision", "ViT", without("layer.0."), "lacks 16 weights, such as layers.0"),
    ("vision", "CLIP", without("vision_model.embeddings"), "lacks 3 weights, such as embeddings"),
    ("vision", "ResNet", without("running_mean"), "lacks .* weights, such as .*running_mean"),
    ("vision", "Swinv2", prefixed, "lacks .* weights")])
def test_weights_that_a_folder_lacks_are_named(make_model, tmp_path, key, kind, edit, words):
    """Each weight that a loss depends on must come from the folder: else it would be random."""
    folder = tmp_path / "model"
    (write_llm if key == "llm" else write_encoder)(kind, folder)
    make_model(f"model.{key}={folder}")
    with pytest.raises(InputError, match=f"model.{key}: {folder} {words}"):
        make_model(f"model.{key}={rewrite(folder, edit)}")


def test_a_weight_that_nothing_depends_on_may_be_missing(make_model, tmp_path):
    """A pooler, which X^e does not need."""
    write_encoder("ViT", tmp_path / "vision")
    make_model(f"model.vision={rewrite(tmp_path / 'vision', without('pooler'))}")


def test_a_tokenizer_and_lengths_that_do_not_fit_are_named(make_model, backbones, tmp_path):
    folder = shutil.copytree(backbones / "llama", tmp_path / "llama")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)  # stands in no report: as Gemma-3's
    tokenizer.save_pretrained(folder)
    make_model(f"model.llm={folder}")
    tokenizer.add_tokens(["pneumothorax"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="has 1 tokens beyond the .*, such as 'pneumothorax'"):
        make_model(f"model.llm={folder}")
    gpt2 = f"model.llm={write_llm('GPT2', tmp_path / 'gpt2', max_position_embeddings=128)}"
    fitting = [gpt2, "model.lora.target_modules=[c_attn]", "data.max_report_tokens=20"]
    make_model(*fitting)
    for setting in ("data.max_report_tokens=100", "generate.max_new_tokens=100"):
        with pytest.raises(InputError, match=f"{setting[:-4]}: a prompt of .* do not fit the 128"):
            make_model(*fitting, setting)


def test_another_prompt_and_another_image_size(make_model, tmp_path):
    """Settings, so that a checkpoint knows them; position embeddings are interpolated."""
    write_encoder("ViT", tmp_path / "vision")
    plain = make_model(f"model.vision={tmp_path / 'vision'}")
    model = make_model(f"model.vision={tmp_path / 'vision'}", "model.image_size=48",
                       r'model.prompt=["<image>", "</image>\nFindings: "]').eval()
    assert (plain.image_size, plain.visual_token_count) == (32, 17)
    assert (model.image_size, model.visual_token_count) == (48, 37)
    after = model.tokenizer("</image>\nFindings: ", add_special_tokens=False).input_ids
    assert model.after_ids.tolist() == after
    batch = make_batch(model)
    assert len(model.generate(batch["images"], batch["view_counts"])[0]) == 4


def test_the_encoder_keeps_its_mode(make_model):
    assert not any(part.training for part in make_model().vision.modules())


def test_generation_warns_of_nothing(make_model, recwarn, caplog):
    """Neither of what A14 wants, nor of a length penalty in a greedy search."""
    for beams in (1, 3):
        model = make_model(f"generate.num_beams={beams}").eval()
        batch = make_batch(model)
        model.generate(batch["images"], batch["view_counts"])
    told = [str(warning.message) for warning in recwarn.list]
    assert not [text for text in told if "penalty" in text] and "penalty" not in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_lora_reads_its_input_as_it_comes(make_model, precision):
    """Autocast undoes PEFT's cast to float32: the same terms and gradients, to the bit."""
    model = make_model(f"train.precision={precision}", "model.lora.dropout=0").eval()
    shake_lora(model)
    layers = [part for part in model.llm.modules() if hasattr(part, "cast_input_dtype_enabled")]
    results = []
    assert len(layers) == 4 and not any(part.cast_input_dtype_enabled for part in layers)
    for casts in (False, True):
        for part in layers:
            part.cast_input_dtype_enabled = casts
        with model.autocast():
            terms, _ = model(**make_batch(model))
        results.append([*terms.values(), *gradients(model, sum(terms.values())).values()])
    assert all(map(torch.equal, *results))


def test_pixel_statistics_of_any_processor():
    class Processor:
        pass
    timm, grey = Processor(), Processor()
    timm.data_config = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    grey.image_mean, grey.image_std = 0.5, [0.25]
    assert pixel_statistics(timm, "x") == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert pixel_statistics(grey, "x") == ([0.5] * 3, [0.25] * 3)
    with pytest.raises(ValueError, match="model.vision: .*tells no image_mean"):
        pixel_statistics(Processor(), "x")


def test_paper_scale_on_the_meta_device():
    """Sec. 4.1.2: the model of configs/iu_xray.yaml at its published sizes, without its weights."""
    model = paper_model()
    with torch.device("meta"):
        visual_tokens = model.encode(torch.zeros(2, 3, 224, 224, dtype=torch.uint8), [2])

    def count(parameters):
        return sum(p.numel() for p in parameters)
    assert visual_tokens.shape == (1, 49, 1024)  # S, D
    assert model.vse_head.weight.shape == (2048, 1024)  # D_z, A4
    assert model.did_head.weight.shape == (1024, 4096)
    assert model.visual_projection.weight.shape == (4096, 1024)
    assert round(count(model.vision.parameters()) / 1e6, 1) == 86.7
    assert round(count(p for p in model.llm.parameters() if not p.requires_grad) / 1e9, 2) == 6.74
    assert count(p for p in model.llm.parameters() if p.requires_grad) == 8_388_608  # LoRA: 8.39 M
    assert {p.dtype for p in model.llm.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
