"""VDGen (Sec. 3): a Swin encoder, the heads of VSE and DID, and a Llama decoder with LoRA.

Left out on purpose: a [CLS] token (A6) and any projection on the image side of DID (Eq. 4). The loss functions are in
losses.py; their sum (Eq. 8) is in the training loop.
"""
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partialmethod
from itertools import chain
from pathlib import Path

import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM,
                          AutoTokenizer, BertConfig, BertModel, BertTokenizer)
from transformers.cache_utils import Cache, DynamicLayer

from configs import PROMPT, Config, Generate
from losses import did_loss, own_report_nearest, report_loss, vse_loss

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEACHER_MAX_TOKENS = 512  # where BERT-like teachers end; longer reports are cut, for every teacher alike
LIKE_LENGTH = 8           # studies, of like length, pass the LLM together: 14 % fewer tokens than all 16 (the benchmark's batch)
TEACHER_BATCH = 16        # fixed: the padding of a batch changes results of bfloat16 in the last digit (A5)


def ranks() -> tuple[int, int]:
    """(rank of this process, number of ranks); (0, 1) unless torchrun started it."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def join_ranks() -> None:
    """Under torchrun: join the group of processes. Ranks behind the first print nothing but their errors."""
    if "RANK" not in os.environ:
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(  # torchrun ends all ranks when one dies; the first may embed reports for hours (A5)
        "nccl" if device else "gloo", timeout=timedelta(hours=12), device_id=device)
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order: VSE and DID contrast the whole batch.

    Gradient reaches this rank's own rows, times the number of ranks: each rank computes the same loss from all rows, and
    what its rows ask for is divided by that number when the ranks' gradients are averaged.
    """
    rank, world = ranks()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    torch.distributed.all_gather(parts, rows.detach())
    parts[rank] = rows.clone()
    if parts[rank].requires_grad:
        parts[rank].register_hook(lambda gradient: gradient * world)
    return torch.cat(parts)


class VDGen(nn.Module):
    """The whole model. What trains (Swin, norm, heads, projection, LoRA) is float32; the frozen LLM keeps its type.

    Args:
        config: see configs/__init__.py.
        vision: a Hugging Face encoder whose output has `last_hidden_state` (N, S, D), or a map (N, D, h, w) (Sec. 3.1).
        llm: a Hugging Face causal LM of the Llama architecture (`.model` and an output embedding).
        tokenizer: of that LLM, with a begin and an end token.
        teacher_width: D_t when `model.teacher` names another encoder; default: the width of the LLM (A5).
        image_mean, image_std: what the encoder was pretrained with, three numbers each.
    """

    def __init__(self, config: Config, vision: nn.Module, llm: nn.Module, tokenizer, teacher_width: int | None = None,
                 image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        if any(True for _ in getattr(vision, "pooler", None) and vision.pooler.parameters() or ()):
            vision.pooler = None  # h is a mean over S; a pooler's weights would never be trained
        self.vision = vision.requires_grad_()  # A11: all of it
        self.image_size = getattr(vision.config, "image_size", 224)  # Sec. 4.1.2, for an encoder that takes any
        hidden = self.encoder_shape()
        if len(hidden) == 4:
            vision.to(memory_format=torch.channels_last)  # convolutions: a quarter of their time less
        D, D_h = hidden[1 if len(hidden) == 4 else 2], llm.config.hidden_size
        self.norm = nn.LayerNorm(D)            # Sec. 3.2, A26
        self.vse_head = nn.Linear(D, config.model.vse_expansion * D) if config.loss.vse_weight else None    # W1, A4
        self.did_head = nn.Linear(teacher_width or D_h, D) if config.loss.did_weight else None              # W2
        self.visual_projection = nn.Linear(D, D_h)                                                          # A7
        llm.requires_grad_(False)
        llm.set_attn_implementation("grouped")
        lora = config.model.lora
        self.llm = llm if lora is None else get_peft_model(llm, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM"))
        if config.train.recompute:
            for part in (vision, llm):  # by its name in transformers 5.24, else by its older one
                new = getattr(part, "activation_checkpointing_enable", None)
                (new or part.gradient_checkpointing_enable)()
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in PROMPT)
        for name, values in dict(before_ids=[self.bos_id] + before, after_ids=after,
                                 image_mean=image_mean, image_std=image_std).items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @property
    def causal_lm(self) -> nn.Module:
        """The LLM itself; its LoRA layers, if any, stand inside it."""
        return self.llm if self.config.model.lora is None else self.llm.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def autocast(self):
        """A13: bfloat16 autocast, on CUDA and on CPU alike; off with `train.precision: fp32`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def encoder_shape(self) -> torch.Size:
        """(1, S, D), or (1, D, h, w): of one pass on the meta device, as no two families name these sizes alike."""
        state = {name: value.to("meta") for name, value in self.vision.state_dict(keep_vars=True).items()}
        image = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        was_training = self.vision.training
        with torch.no_grad():
            hidden = functional_call(self.vision.eval(), state, image).last_hidden_state
        self.vision.train(was_training)
        return hidden.shape

    def encode(self, images: Tensor, view_counts: list[int]) -> Tensor:
        """Sec. 3.2: X^e, the visual tokens of each study: Swin, LayerNorm (A26), mean over its views (A8).

        Args:
            images: (sum of view_counts, 3, H, W) uint8, the views of all studies, one study after the other.
            view_counts: B numbers >= 1.
        Returns:
            (B, S, D) float32.
        """
        pixels = (images.float() / 255 - self.image_mean.view(3, 1, 1)) / self.image_std.view(3, 1, 1)
        tokens = self.norm(_as_tokens(self.vision(pixels).last_hidden_state).float())
        return torch.stack([views.mean(dim=0) for views in tokens.split(view_counts)])

    def embed_prompt(self, visual_tokens: Tensor) -> Tensor:
        """Sec. 3.4: BOS, the prompt, and the visual tokens in it, projected to the LLM's width (A7): (B, P, D_h)."""
        embed, B = self.causal_lm.get_input_embeddings(), len(visual_tokens)
        before, after = (embed(ids).expand(B, -1, -1) for ids in (self.before_ids, self.after_ids))
        return torch.cat([before, self.visual_projection(visual_tokens).to(before.dtype), after], dim=1)

    def forward(self, images: Tensor, view_counts: list[int], report_ids: Tensor,
                report_lengths: list[int], teacher_embed: Tensor | None
                ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The unweighted terms of Eq. 8 for one batch of B studies.

        Args:
            images, view_counts: see `encode`.
            report_ids: (B, L) token ids, end token included (A20), padded on the right with any id.
            report_lengths: B numbers >= 1, how many of them count; in rising order (see `collate`) least is padded.
            teacher_embed: (B, D_t) y, one for each report (see `Teacher`); None if `loss.did_weight` is 0.
        Returns:
            terms: {"report": ..., "vse": ..., "did": ...}, scalars in nats; a term of weight 0 is left out. With
                several ranks the mean of each over the ranks is the term of the whole batch, and the mean of its
                gradients the gradient.
            visual_tokens: X^e (B, S, D), at which the gradients of the terms meet.
            did_top1: share of the images whose own report is the nearest of the batch (chance 1/B); None without DID.
        """
        visual_tokens = self.encode(images, view_counts)
        visual_embed = visual_tokens.mean(dim=1)  # h
        terms = {"report": self.report_term(visual_tokens, report_ids, report_lengths)}
        loss, did_top1 = self.config.loss, None
        with torch.autocast(self.device.type, enabled=False):  # B rows: float32 costs nothing here
            if self.vse_head is not None:
                z = gathered(self.vse_head(visual_embed))
                terms["vse"] = vse_loss(z, loss.vse_temperature, loss.vse_self_in_denominator)
            if self.did_head is not None:
                image_embed, text_embed = gathered(visual_embed), gathered(self.did_head(teacher_embed))
                terms["did"] = did_loss(image_embed, text_embed, loss.did_temperature)
                did_top1 = own_report_nearest(image_embed, text_embed).float().mean()
        return terms, visual_tokens, did_top1

    def report_term(self, visual_tokens: Tensor, report_ids: Tensor, report_lengths: list[int]) -> Tensor:
        """Sec. 3.4, Eq. 2: the report loss behind visual tokens (B, S, D). The other arguments: `forward`."""
        prompt, embed = self.embed_prompt(visual_tokens), self.causal_lm.get_input_embeddings()
        P, hidden, targets = prompt.shape[1], [], []
        for start in range(0, len(report_lengths), LIKE_LENGTH):
            rows = slice(start, start + LIKE_LENGTH)
            lengths = report_lengths[rows]
            ids = report_ids[rows, :max(lengths)]  # each group is padded to its own longest report
            # The last token predicts nothing. Padding on the right is never seen under a causal mask: no other is needed.
            inputs = torch.cat([prompt[rows], embed(ids[:, :-1])], dim=1)
            states = self.causal_lm.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, P - 1:]
            hidden += [state[:n] for state, n in zip(states, lengths)]
            targets += [row[:n] for row, n in zip(ids, lengths)]
        logits = self.causal_lm.get_output_embeddings()(torch.cat(hidden))  # at report positions only
        loss = report_loss(logits, torch.cat(targets))
        if ranks()[1] > 1:  # from the mean over this rank's tokens to its share of the mean over all tokens
            torch.distributed.all_reduce(total := torch.tensor(sum(report_lengths), device=self.device))
            loss = loss * sum(report_lengths) * ranks()[1] / total
        return loss

    @torch.no_grad()
    def generate(self, images: Tensor, view_counts: list[int]) -> tuple[list[str], Tensor]:
        """Eq. 7: write a report for each study, decoded as `generate` in the config says (A14). Arguments: `encode`.

        Returns: B reports, and h (B, D), the visual embeddings of the studies.
        """
        with self.autocast(), disable_input_dtype_casting(self.llm):  # PEFT's to float32, which autocast would undo
            visual_tokens = self.encode(images, view_counts)
            written = beam_search(self.causal_lm, self.embed_prompt(visual_tokens), self.config.generate, self.eos_id)
        return [self.decode(ids) for ids in written.tolist()], visual_tokens.mean(dim=1)

    def decode(self, ids: list[int]) -> str:
        """Text up to the end token; padding behind it may be any token (A9)."""
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: everything but the frozen LLM. (Buffers of the encoder, if it has any, included.)"""
        frozen = {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The reverse, strictly: ValueError if a tensor is missing, unexpected, or of another shape."""
        own = self.trained_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += sorted(name for name in own.keys() & state.keys() if own[name].shape != state[name].shape)
        if wrong:
            raise ValueError(f"checkpoint: {len(wrong)} tensors are missing, unexpected or of another shape, first "
                             f"{wrong[0]}; it was written by a model with other sizes or another `model` section")
        self.load_state_dict(state, strict=False)


def _as_tokens(hidden: Tensor) -> Tensor:
    """(N, S, D) as it is; of a map (N, D, h, w) the h w places are the tokens (Sec. 3.1)."""
    return hidden.flatten(2).mT if hidden.dim() == 4 else hidden


def load_model(config: Config) -> VDGen:
    """Read the backbones that `config.model` names; the LLM in the type of `train.precision` (A13), on the CPU.

    Raises FileNotFoundError for a model that is neither a folder nor on the hub, ValueError for one that does not fit.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    names = config.model
    # On a CPU, torch's fused attention takes 2 to 3 times as long for bfloat16 and its gradients as plain products do. On
    # an H100 it would be cuDNN's, which plans for each new shape, and a beam search meets one in every step.
    plain = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # then it is flash, and with a mask the memory-efficient one
    vision = _pretrained(AutoModel, names.vision, "model.vision", dtype=torch.float32, **plain)
    processor = _pretrained(AutoImageProcessor, names.vision, "model.vision")
    llm = _pretrained(AutoModelForCausalLM, names.llm, "model.llm", dtype=dtype)
    tokenizer = _pretrained(AutoTokenizer, names.llm, "model.llm")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"model.llm: the tokenizer of {names.llm} has no begin or no end token; both are needed (A9)")
    width = None
    if names.teacher is not None and config.loss.did_weight:
        width = _pretrained(AutoConfig, names.teacher, "model.teacher").hidden_size
    return VDGen(config, vision, llm, tokenizer, width, processor.image_mean, processor.image_std)


def flop_counts(model: VDGen) -> dict[str, float]:
    """Floating-point operations of a training step, forward and backward, counted on the meta device.

    Returns:
        those of one "image" (encoder), of one "token" that passes the LLM (in a row of a prompt and 50 tokens), of one
        "report_token" (output layer); and "prompt", the tokens of a prompt. Left out: padding, `train.recompute`, and the
        projections of the visual tokens and of B rows.
    """
    def count(module: nn.Module, *inputs: Tensor, **options) -> tuple[int, Tensor]:
        state = {name: value.detach().to("meta").requires_grad_(value.requires_grad)
                 for name, value in chain(module.named_parameters(), module.named_buffers())}
        with FlopCounterMode(display=False) as counter:
            output = functional_call(module, state, inputs, options)
            output = output if isinstance(output, Tensor) else output.last_hidden_state
            output.sum().backward()
        return counter.get_total_flops(), output
    was_training, llm = model.training, model.causal_lm
    model.eval()
    image, tokens = count(model.vision, torch.empty(1, 3, model.image_size, model.image_size, device="meta"))
    prompt = len(model.before_ids) + tokens.shape[1] + len(model.after_ids)
    T, options = prompt + 50, dict(dtype=llm.dtype, device="meta")
    states = torch.empty(1, T, llm.config.hidden_size, requires_grad=True, **options)
    mask = torch.empty(1, 1, T, T, **options)
    token = count(llm.model, inputs_embeds=states, attention_mask=mask, use_cache=False)[0] / T
    report_token = count(llm.get_output_embeddings(), states)[0] / T
    model.train(was_training)
    return {"image": image, "token": token, "report_token": report_token, "prompt": prompt}


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float, dropout: float = 0.0, **_) -> tuple[Tensor, None]:
    """The attention of the LLM. A key-value head that serves G query heads is not copied to each of them.

    The library is told of no mask that goes with this attention, so that it neither makes one nor waits for the device to
    learn whether one is needed. A mask of padding would be lost here: VDGen pads on the right, which a causal LLM never sees.

    Args:
        query: (B, H, N, d), of the last N tokens.
        key, value: (B, H / G, T, d).
        attention_mask: (B or 1, 1, N, T), added to the scores; None: each token sees itself and those before it.
    Returns:
        (B, N, H, d).
    """
    B, H, N, d = query.shape
    Hkv, T = key.shape[1:3]
    fused, options = nn.functional.scaled_dot_product_attention, dict(dropout_p=dropout, scale=scaling)
    if attention_mask is not None:  # the query heads of a key-value head are further rows of one
        mask = attention_mask[:, :, None].expand(-1, -1, H // Hkv, -1, -1).flatten(2, 3)
        heads = fused(query.reshape(B, Hkv, -1, d), key, value, mask, **options).view(B, H, N, d)
    elif query.device.type != "cpu":
        heads = fused(query, key, value, is_causal=N > 1, enable_gqa=H != Hkv, **options)
    else:  # the fused kernel takes 2 to 3 times as long for bfloat16 and its gradients
        weights = (query.reshape(B, Hkv, -1, d) @ key.transpose(2, 3) * scaling).view(B, H, N, T)
        weights = weights + weights.new_full((N, T), -torch.inf).triu(1 + T - N)
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout, module.training)
        heads = (weights.view(B, Hkv, -1, T) @ value).view(B, H, N, d)
    return heads.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)


class _Layer(DynamicLayer):
    """A layer of the cache with room for its final length: it grows without a copy, and its memory is asked for once."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, d) keys and values; returns views of all so far, (B, H, T, d)."""
        (B, H, N, d), T = keys.shape, self.get_seq_length()
        if not T:
            self.lazy_initialization(keys, values)
            self.room = keys.new_empty(2, B, H, self.length, d)
        for room, new in zip(self.room, (keys, values)):
            room[:, :, T:T + N] = new
        self.keys, self.values = self.room[:, :, :, :T + N]
        return self.keys, self.values

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows, in rising order; they move up within the room."""
        filled, B = self.room[:, :, :, :self.get_seq_length()], len(rows)
        filled[:, :B] = filled[:, rows]
        self.room = self.room[:, :B]
        self.keys, self.values = filled[:, :B]


@torch.no_grad()
def beam_search(llm: nn.Module, prompt: Tensor, settings: Generate, eos_id: int) -> Tensor:
    """The beam search of transformers' `generate` (greedy with one beam), token for token, without its repeated work.

    The prompt passes the LLM once a study, not once a beam. The beams of a study stand side by side in one row of the
    cache, as a tree: each step appends their N new tokens, and a mask shows each beam its own ancestors, so that no key
    is ever copied from beam to beam. A study whose result is settled leaves the batch.

    Args:
        prompt: (B, P, D_h), without padding.
    Returns:
        (B, max_new_tokens) ids, `eos_id` behind the end.
    """
    (B, P, _), N, length = prompt.shape, settings.num_beams, settings.max_new_tokens
    device, most = prompt.device, P + N * (length - 1)
    cache = Cache(layers=[_Layer(most) for _ in range(llm.config.num_hidden_layers)])
    # By place: this argument, `past_key_values` up to transformers 5.10, is called `cache` in 5.24.
    hidden = llm.model(None, None, None, cache, prompt).last_hidden_state[:, -1:]
    written = torch.full((B, length), eos_id, device=device)
    studies = torch.arange(B, device=device)                           # those that the following rows belong to
    tokens = torch.empty(B, N, 0, dtype=torch.long, device=device)     # of the running beams
    running = torch.zeros(B, 1, device=device)                         # their log-probabilities; at first of one beam
    ended_scores = torch.full((B, N), -torch.inf, device=device)       # the best N that came to an end, best first
    ended_tokens = written[:, None].repeat(1, N, 1)
    # What each beam sees: the prompt and its ancestors. The row is padded: the GPU's kernel wants a stride of 8.
    mask = torch.full((B, N, most + -most % 8), -torch.inf, dtype=llm.dtype, device=device)
    mask[:, :, :P] = 0
    for t in range(length):
        candidates, parents, new = _candidates(llm.get_output_embeddings()(hidden).float(), tokens, running, settings, eos_id)
        grown = torch.cat([_of_beams(tokens, parents), new[..., None]], dim=2)
        ends = (new == eos_id) | (t + 1 == length)
        # Only the best N candidates may end. What ended is ranked by its log-probability over a power of its length.
        scores = (candidates / (t + 1) ** settings.length_penalty).masked_fill(~ends, -torch.inf)[:, :N]
        ended_scores, order = torch.cat([ended_scores, scores], dim=1).topk(N)
        padded = nn.functional.pad(grown[:, :N], (0, length - t - 1), value=eos_id)
        ended_tokens = _of_beams(torch.cat([ended_tokens, padded], dim=1), order)
        written[studies] = ended_tokens[:, 0]
        if t + 1 == length:
            break
        running, order = candidates.masked_fill(ends, -torch.inf).topk(N)
        tokens, mask = _of_beams(grown, order), _of_beams(mask, parents.gather(1, order))
        # Settled: N have ended, and the best running beam would not be among them if it ended now (the library's rule).
        open_ = running[:, 0] / (t + 1) ** settings.length_penalty > ended_scores[:, -1]
        if t >= settings.min_new_tokens and not open_.all():  # before, none can end: the device is not waited for
            left = open_.nonzero()[:, 0]
            if not len(left):
                break
            studies, tokens, running, mask, ended_scores, ended_tokens = (
                rows[left] for rows in (studies, tokens, running, mask, ended_scores, ended_tokens))
            cache.batch_select_indices(left)
        T = P + N * (t + 1)
        mask[:, :, T - N:T].diagonal(dim1=1, dim2=2).zero_()  # itself
        hidden = llm.model(None, mask[:, None, :, :T], torch.full((1, N), P + t, device=device), cache,
                           llm.get_input_embeddings()(tokens[..., -1])).last_hidden_state
    return written


def _candidates(logits: Tensor, tokens: Tensor, running: Tensor, settings: Generate,
                eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2 N continuations of each study, of which at most N end: log-probability, parent beam and new token, (B, 2 N)."""
    N, t = tokens.shape[1:]
    norm = logits.logsumexp(dim=2, keepdim=True) if N > 1 else 0  # penalties: greedy on logits, beams on log-probabilities
    if t and settings.repetition_penalty != 1:
        seen = logits.gather(2, tokens) - norm
        seen *= torch.where(seen < 0, settings.repetition_penalty, 1 / settings.repetition_penalty)
        logits.scatter_(2, tokens, seen + norm)
    if t < settings.min_new_tokens:
        logits[..., eos_id] = -torch.inf
    best, new = logits.topk(2 * N)  # of each beam
    best, order = (best - norm + running[..., None]).flatten(1).topk(2 * N)
    return best, order // (2 * N), new.flatten(1).gather(1, order)


def _of_beams(rows: Tensor, beams: Tensor) -> Tensor:
    """(B, N, T) rows of the beams (B, M): (B, M, T)."""
    return rows.gather(1, beams[..., None].expand(-1, -1, rows.shape[2]))


@torch.no_grad()
def embed_reports(model: VDGen, texts: Iterable[str]) -> dict[str, Tensor]:
    """A5: y, the teacher's embedding of each report: the mean of its last hidden states over the report's tokens.

    The teacher is the LLM without LoRA, reading BOS and the report alone (BOS is left out of the mean), or the encoder
    that `model.teacher` names, with its own special tokens (left out too). No gradient. Equal texts are computed once,
    in an order and in batches that depend on the set of texts only.

    Returns:
        {text: (D_t,) on the CPU, in the LLM's type}.
    """
    name, itself = model.config.model.teacher, model.config.model.teacher is None
    if itself:
        teacher, tokenizer = model.causal_lm.model, model.tokenizer
    else:
        teacher = _pretrained(AutoModel, name, "model.teacher", dtype=torch.float32).to(model.device)
        tokenizer = _pretrained(AutoTokenizer, name, "model.teacher")
    dtype, options = model.causal_lm.dtype, dict(use_cache=False) if itself else {}  # keys that nothing would read
    texts = sorted(set(texts), key=lambda text: (len(text), text))
    was_training, embeddings = model.training, {}
    model.eval(), teacher.eval()
    adapters = model.llm.disable_adapter() if itself and model.config.model.lora else torch.no_grad()
    with adapters, model.autocast():
        for start in tqdm(range(0, len(texts), TEACHER_BATCH), desc="teacher", unit="batch", leave=False):
            batch = texts[start:start + TEACHER_BATCH]
            ids, kept = zip(*(_teacher_ids(tokenizer, text, itself) for text in batch))
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
            kept = nn.utils.rnn.pad_sequence(kept, batch_first=True).to(model.device)
            lengths = torch.tensor([len(row) for row in ids], device=model.device)
            mask = torch.arange(padded.shape[1], device=model.device) < lengths[:, None]
            hidden = teacher(input_ids=padded, attention_mask=mask.long(), **options).last_hidden_state.float()
            means = (hidden * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
            embeddings.update(zip(batch, means.to(dtype).cpu()))
    model.train(was_training)
    return embeddings


class Teacher:
    """A5: y of the training studies, each dimension standardised over them (mean 0, deviation 1).

    A report counts as often as it occurs. An LLM's embeddings lie in a narrow cone; standardising is an affine map that
    W2 and b2 of Eq. 5 could undo, so only their conditioning changes. All ranks, and a resumed run, compute the same.

    Args:
        embeddings: (U, D_t) of the different reports, as `embed_reports` gives them.
        rows: (N,) the row of each of the N training studies.
    """

    def __init__(self, embeddings: Tensor, rows: Tensor):
        self.embeddings, self.rows = embeddings, rows
        counts = rows.bincount(minlength=len(embeddings)).double()
        self.mean, self.deviation = torch.zeros(2, embeddings.shape[1], dtype=torch.float64)
        for part, n in zip(embeddings.split(4096), counts.split(4096)):  # in parts: MIMIC-CXR has gigabytes of them
            self.mean += n @ part.double() / len(rows)
        for part, n in zip(embeddings.split(4096), counts.split(4096)):
            self.deviation += n @ (part.double() - self.mean) ** 2 / len(rows)
        self.mean = self.mean.float()
        self.deviation = self.deviation.sqrt().float().clamp(min=1e-6)  # a dimension that does not vary stays finite

    def __call__(self, studies: list[int]) -> Tensor:
        """(B, D_t) float32 of training studies, by their numbers."""
        return self.standardise(self.embeddings[self.rows[studies]])

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Any reports' embeddings (.., D_t), by the training studies' mean and deviation."""
        return (embeddings.float() - self.mean) / self.deviation


def _teacher_ids(tokenizer, text: str, is_decoder: bool) -> tuple[Tensor, Tensor]:
    """Token ids of one report as the teacher reads it, and which of them count in the mean (True = keep)."""
    if is_decoder:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=TEACHER_MAX_TOKENS - 1).input_ids
        return torch.tensor([tokenizer.bos_token_id] + ids), torch.tensor([False] + [True] * len(ids))
    encoded = tokenizer(text, truncation=True, max_length=TEACHER_MAX_TOKENS, return_special_tokens_mask=True)
    return torch.tensor(encoded.input_ids), ~torch.tensor(encoded.special_tokens_mask, dtype=torch.bool)


def _pretrained(kind, name: str, key: str, **options):
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"{key}: cannot load {name!r} as {kind.__name__}: expected a folder of a Hugging Face "
                                f"model, or a name on the hub that this machine can reach "
                                f"({str(error).strip().splitlines()[0]})") from None


def read_checkpoint(path, of: str = "VDGen", keys=("model", "config"), mmap: bool = False) -> dict:
    """best.pt or last.pt, tensors and plain values only (`weights_only`): else ValueError.

    mmap: tensors stay in the file, whose pages all processes of a machine share.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"checkpoint {path}: not a checkpoint of {of}: it holds more than tensors and plain values; pickled "
                         f"code is never run") from None
    except Exception as error:  # a zip or runtime error, as the junk may be
        raise ValueError(f"checkpoint {path}: not a checkpoint of {of} ({str(error).strip().splitlines()[0]})") from None
    if not isinstance(checkpoint, dict) or not set(keys) <= checkpoint.keys():
        raise ValueError(f"checkpoint {path}: not a checkpoint of {of}: it has no {' and '.join(f'`{k}`' for k in keys)}")
    return checkpoint


# The labeller of Table 3 ----------------------------------------------------------------------------------------------

CONDITIONS = ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
              "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
              "Support Devices", "No Finding")  # the order of its heads


class CheXbert(nn.Module):
    """CheXbert (Smit et al., 2020): BERT-base and, on its [CLS] state, one linear head for each of CONDITIONS.

    Classes: 0 not mentioned, 1 positive, 2 negative, 3 uncertain; No Finding knows 0 and 1 only. The dropout that stood
    before the heads in training is left out.
    """

    def __init__(self, bert: BertModel, tokenizer: BertTokenizer):
        super().__init__()
        self.bert, self.tokenizer = bert, tokenizer
        self.linear_heads = nn.ModuleList(nn.Linear(bert.config.hidden_size, 2 if name == "No Finding" else 4)
                                          for name in CONDITIONS)

    @torch.no_grad()
    def label(self, reports: list[str], batch_size: int = 32) -> list[list[int]]:
        """The 14 classes of each report; blanks are collapsed, and what lies behind 512 tokens is not read."""
        texts, device = [" ".join(report.split()) for report in reports], self.bert.device
        order, classes = sorted(range(len(texts)), key=lambda i: len(texts[i])), {}
        for start in tqdm(range(0, len(order), batch_size), desc="CheXbert", unit="batch", leave=False):
            rows = order[start:start + batch_size]  # of like length: little padding
            tokens = self.tokenizer([texts[i] for i in rows], truncation=True, max_length=512, padding=True,
                                    return_tensors="pt").to(device)
            cls = self.bert(**tokens).last_hidden_state[:, 0]  # not the pooler's output
            classes |= zip(rows, torch.stack([head(cls).argmax(dim=1) for head in self.linear_heads], dim=1).tolist())
        return [classes[i] for i in range(len(texts))]


def load_chexbert(path: str | Path, config: BertConfig | None = None) -> CheXbert:
    """The published chexbert.pth, loaded strictly. Its vocabulary is bert-base-uncased's: from a vocab.txt beside it if
    there is one, else from the hub. Raises FileNotFoundError or ValueError for another file."""
    state = read_checkpoint(path, "CheXbert", ["model_state_dict"])["model_state_dict"]
    beside = Path(path).parent / "vocab.txt"
    tokenizer = BertTokenizer(vocab=str(beside)) if beside.is_file() else \
        _pretrained(BertTokenizer, "bert-base-uncased", f"--chexbert: without a {beside}")
    model = CheXbert(BertModel(config or BertConfig()), tokenizer)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state.pop("bert.embeddings.position_ids", None)  # a constant that older versions of transformers stored
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path}: not the weights of CheXbert: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def chexbert_labeller(checkpoint: Path, cache: Path) -> Callable[[list[str]], list[list[int]]]:
    """A function from reports to their 14 classes. A text is labelled once; `cache` (JSON) keeps it for the next time."""
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--chexbert {checkpoint}: no such file")
    version = f"{checkpoint.stat().st_size} bytes, {checkpoint.stat().st_mtime_ns} ns"
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        known = stored["labels"] if (stored["checkpoint"], stored["conditions"]) == (version, list(CONDITIONS)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}  # none yet, or cut short

    def label(texts: list[str]) -> list[list[int]]:
        new = sorted(set(texts) - known.keys())
        if new:
            model = load_chexbert(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
            known.update(zip(new, model.label(new)))
            cache.write_text(json.dumps({"checkpoint": version, "conditions": CONDITIONS, "labels": known}) + "\n")
        return [known[text] for text in texts]
    return label
