"""VDGen (Sec. 3): a Swin encoder, the heads of VSE and DID, and a Llama decoder with LoRA.

In the paper's order: the model, its decoding (Eq. 7), the teacher (Sec. 3.3), reading and writing
weights, the labeller of Table 3; last, what several processes share. The loss functions are in
losses.py; their sum (Eq. 8) is in the training loop. Left out on purpose: a [CLS] token (A6) and
any projection on the image side of DID (Eq. 4).
"""
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import partialmethod
from pathlib import Path

import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoImageProcessor, AutoModel,
                          AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, BertTokenizer)
from transformers.cache_utils import Cache, DynamicLayer

from configs import PROMPT, Config, Generate
from losses import did_loss, own_report_nearest, report_loss, vse_loss

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# So many studies, of like length, pass the LLM together on a CPU: 14 % fewer tokens than all 16. A
# GPU waits for launches: an H100 takes 0.40 s a step for the batch at once, 0.52 s for two groups.
LIKE_LENGTH = 8
# PyTorch's default: generation normalises by the last ten batches or so of training. A folder's own
# may hold on to its pretraining's statistics for a whole run, or know the last batch alone (A11).
BATCH_NORM_MOMENTUM = 0.1
TEACHER_MAX_TOKENS = 512  # where BERT-like teachers end; longer reports are cut, for every teacher
TEACHER_BATCH = 16  # fixed: the padding of a batch changes bfloat16 results in the last digit (A5)


class VDGen(nn.Module):
    """The whole model. All that trains is float32; the frozen LLM keeps its type.

    Args:
        config: see configs/__init__.py.
        vision: a Hugging Face encoder whose output has `last_hidden_state` (N, S, D), or a map
            (N, D, h, w) (Sec. 3.1).
        llm: a Hugging Face causal LM of the Llama architecture (`.model` and an output embedding).
        tokenizer: of that LLM, with a begin and an end token.
        teacher_width: D_t when `model.teacher` names another encoder; default: the LLM's width
            (A5).
        image_mean, image_std: what the encoder was pretrained with, three numbers each.
    """

    def __init__(self, config: Config, vision: nn.Module, llm: nn.Module, tokenizer,
                 teacher_width: int | None = None,
                 image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer

        # Sec. 3.2: the encoder, all of it trained (A11), and the LayerNorm on X^e (A26)
        pooler = getattr(vision, "pooler", None)
        if pooler is not None and any(True for _ in pooler.parameters()):
            vision.pooler = None  # h is a mean over S: a pooler's weights would never be trained
        self.vision = vision.requires_grad_()
        size = getattr(vision.config, "image_size", 224)  # Sec. 4.1.2 where any will do
        self.image_size = size if isinstance(size, int) else size[0]
        shape = self.measure_encoder()
        for layer in vision.modules():  # A11: an encoder of Sec. 3.1 may have some; Swin has none
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = BATCH_NORM_MOMENTUM
        D = shape[1 if len(shape) == 4 else 2]  # of a map, or of tokens
        D_h = llm.config.hidden_size
        self.norm = nn.LayerNorm(D)

        # The heads: W1 of Sec. 3.2 (A4), W2 of Eq. 5; and X^e to the LLM's width (A7)
        D_z, D_t = config.model.vse_expansion * D, teacher_width or D_h
        self.vse_head = nn.Linear(D, D_z) if config.loss.vse_weight else None
        self.did_head = nn.Linear(D_t, D) if config.loss.did_weight else None
        self.visual_projection = visual_projection(D, llm.get_input_embeddings().weight)

        # Sec. 3.4: the LLM, frozen, with LoRA (Sec. 4.1.2, A12; none: A18)
        llm.requires_grad_(False)
        llm.set_attn_implementation("grouped")
        lora = config.model.lora
        self.llm = llm if lora is None else get_peft_model(llm, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules), task_type="CAUSAL_LM"))
        if config.train.recompute:
            for part in (vision, llm):  # by its name in transformers 5.24, else by its older one
                enable = getattr(part, "activation_checkpointing_enable", None)
                (enable or part.gradient_checkpointing_enable)()

        # The prompt and the pixels' scale: constants, in no checkpoint
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in PROMPT)
        self.register_buffer("before_ids", torch.tensor([self.bos_id] + before), persistent=False)
        self.register_buffer("after_ids", torch.tensor(after), persistent=False)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    @property
    def causal_lm(self) -> nn.Module:
        """The LLM itself; its LoRA layers, if any, stand inside it."""
        return self.llm if self.config.model.lora is None else self.llm.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def autocast(self) -> torch.autocast:
        """A13: bfloat16 autocast, on CUDA and on CPU alike; off with `train.precision: fp32`."""
        enabled = self.config.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def measure_encoder(self) -> torch.Size:
        """The shape of X^e, (1, S, D) or (1, D, h, w), from one pass on the meta device.

        No two families of encoders name these sizes alike in their configs. What X^e does not
        depend on, such as a token for masked patches, is frozen: DDP would wait for its gradient.
        """
        kind = type(self.vision).__name__
        if kind.startswith("ViTMAE") and self.vision.config.mask_ratio:
            raise ValueError(f"model.vision: {kind} leaves out patches at random (mask_ratio), in "
                             f"generation, too; convert it to a plain ViT, or name another encoder")
        parameters = dict(self.vision.named_parameters())
        on_meta = {name: p.detach().to("meta").requires_grad_() for name, p in parameters.items()}
        buffers = {name: buffer.to("meta") for name, buffer in self.vision.named_buffers()}
        image = torch.empty(1, 3, self.image_size, self.image_size, device="meta")
        was_training = self.vision.training
        with torch.enable_grad():
            try:
                output = functional_call(self.vision.eval(), on_meta | buffers, image)
                hidden = output.last_hidden_state
            except Exception as error:  # of whatever family it is
                raise ValueError(f"model.vision: {kind} gives no last_hidden_state of an image "
                                 f"({_first_line(error)}); of a model of images and texts name the "
                                 f"image part") from None
            reached = torch.autograd.grad(hidden.sum(), list(on_meta.values()), allow_unused=True)
        self.vision.train(was_training)
        for parameter, gradient in zip(parameters.values(), reached):
            parameter.requires_grad_(gradient is not None)
        return hidden.shape

    def forward(self, images: Tensor, view_counts: list[int], report_ids: Tensor,
                report_lengths: list[int], teacher_embed: Tensor | None
                ) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """The unweighted terms of Eq. 8 for one batch of B studies.

        Args:
            images, view_counts: see `encode`.
            report_ids: (B, L) token ids, end token included (A20), padded on the right with any id.
            report_lengths: B numbers >= 1, how many of them count; sorted, least is padding.
            teacher_embed: (B, D_t) y of the reports (see `Teacher`); None if `did_weight` is 0.
        Returns:
            terms: {"vse": ..., "did": ..., "report": ...}, scalars in nats; one of weight 0 is left
                out. With several ranks the mean of each over the ranks is the term of the whole
                batch, and the mean of its gradients the gradient.
            visual_tokens: X^e (B, S, D), at which the gradients of the terms meet.
            did_top1: share of the images whose own report is the nearest of the batch (chance 1/B);
                None without DID.
        """
        terms, did_top1, loss = {}, None, self.config.loss
        visual_tokens = self.encode(images, view_counts)  # X^e
        visual_embed = visual_tokens.mean(dim=1)          # h
        with torch.autocast(self.device.type, enabled=False):  # B rows: float32 costs nothing here
            if self.vse_head is not None:  # Sec. 3.2
                z = gathered(self.vse_head(visual_embed))
                terms["vse"] = vse_loss(z, loss.vse_temperature, loss.vse_self_in_denominator)
            if self.did_head is not None:  # Sec. 3.3
                image_embed = gathered(visual_embed)
                text_embed = gathered(self.did_head(teacher_embed))
                terms["did"] = did_loss(image_embed, text_embed, loss.did_temperature)
                did_top1 = own_report_nearest(image_embed, text_embed).float().mean()
        terms["report"] = self.report_term(visual_tokens, report_ids, report_lengths)  # Sec. 3.4
        return terms, visual_tokens, did_top1

    def encode(self, images: Tensor, view_counts: list[int]) -> Tensor:
        """Sec. 3.2: X^e, visual tokens of each study: Swin, LayerNorm (A26), mean over views (A8).

        Args:
            images: (sum of view_counts, 3, H, W) uint8, the views of one study after the other's.
            view_counts: B numbers >= 1.
        Returns:
            (B, S, D) float32.
        """
        pixels = (images.float() / 255 - self.image_mean) / self.image_std
        hidden = self.vision(pixels).last_hidden_state
        if hidden.dim() == 4:  # a map (N, D, h, w): its h w places are the tokens (Sec. 3.1)
            hidden = hidden.flatten(2).mT
        tokens = self.norm(hidden.float())
        return torch.stack([views.mean(dim=0) for views in tokens.split(view_counts)])

    def embed_prompt(self, visual_tokens: Tensor) -> Tensor:
        """Sec. 3.4: BOS and the prompt, and in it the visual tokens, projected (A7).

        Args: visual_tokens: (B, S, D). Returns: (B, P, D_h).
        """
        embed, B = self.causal_lm.get_input_embeddings(), len(visual_tokens)
        before = embed(self.before_ids).expand(B, -1, -1)
        after = embed(self.after_ids).expand(B, -1, -1)
        visual = self.visual_projection(visual_tokens).to(before.dtype)
        return torch.cat([before, visual, after], dim=1)

    def report_term(self, visual_tokens: Tensor, report_ids: Tensor,
                    report_lengths: list[int]) -> Tensor:
        """Sec. 3.4, Eq. 2: the report loss after visual tokens (B, S, D). Arguments: `forward`."""
        prompt, embed = self.embed_prompt(visual_tokens), self.causal_lm.get_input_embeddings()
        P, hidden, targets = prompt.shape[1], [], []
        together = LIKE_LENGTH if self.device.type == "cpu" else len(report_lengths)
        for start in range(0, len(report_lengths), together):
            group = slice(start, start + together)
            lengths = report_lengths[group]
            ids = report_ids[group, :max(lengths)]  # padded to the longest report of the group
            # The last token predicts nothing. Padding on the right is never seen under a causal
            # mask: no other is needed.
            inputs = torch.cat([prompt[group], embed(ids[:, :-1])], dim=1)
            states = self.causal_lm.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            # Place P - 1, the prompt's last, predicts the first token of the report.
            hidden += [row[P - 1:P - 1 + n] for row, n in zip(states, lengths)]
            targets += [row[:n] for row, n in zip(ids, lengths)]
        lm_head = self.causal_lm.get_output_embeddings()
        logits = lm_head(torch.cat(hidden))  # at report positions only
        loss = report_loss(logits, torch.cat(targets))
        tokens, world = sum(report_lengths), ranks()[1]
        if world > 1:  # from the mean over this rank's tokens to its share of the mean over all
            total = torch.full((), tokens, device=self.device)
            torch.distributed.all_reduce(total)
            loss = loss * tokens * world / total
        return loss

    @torch.no_grad()
    def generate(self, images: Tensor, view_counts: list[int]) -> tuple[list[str], Tensor]:
        """Eq. 7: write a report for each study as `generate` in the config says (A14).

        Arguments: `encode`. Returns: B reports, and h (B, D).
        """
        # Else PEFT casts LoRA's inputs to float32, and autocast casts them back.
        with self.autocast(), disable_input_dtype_casting(self.llm):
            visual_tokens = self.encode(images, view_counts)
            prompt = self.embed_prompt(visual_tokens)
            written = beam_search(self.causal_lm, prompt, self.config.generate, self.eos_id)
        return [self.decode(ids) for ids in written.tolist()], visual_tokens.mean(dim=1)

    def decode(self, ids: list[int]) -> str:
        """Text up to the end token; padding after it may be any token (A9)."""
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
        return text.strip()

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: everything but the frozen LLM; buffers of the encoder, too."""
        named = self.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in named if not p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `trained_state`, strictly.

        Raises ValueError if a tensor is missing, unexpected, of another shape, or not finite.
        """
        own = self.trained_state()
        wrong = sorted(own.keys() ^ state.keys())
        both = sorted(own.keys() & state.keys())
        wrong += [name for name in both if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"checkpoint: {len(wrong)} tensors are missing, unexpected or of "
                             f"another shape, first {wrong[0]}; it was written by a model with "
                             f"other sizes or another `model` section")
        damaged = [name for name, value in state.items() if not value.isfinite().all()]
        if damaged:
            raise ValueError(f"checkpoint: {damaged[0]} holds values that are not finite")
        self.load_state_dict(state, strict=False)


def visual_projection(D: int, words: Tensor) -> nn.Linear:
    """A7: from X^e (deviation 1 in each view) to the LLM's width; begins at the scale of its words.

    PyTorch's default, weights uniform within D**-0.5, would begin with a deviation of 3**-0.5, 4
    times that of the words of SmolLM2-135M: an LLM has never read tokens of that size.

    Args: words: (vocabulary, D_h), the LLM's input embeddings.
    """
    projection = nn.Linear(D, words.shape[1])
    with torch.no_grad():
        projection.weight *= 3**0.5 * words.float().std()
        projection.bias.zero_()
    return projection


def load_model(config: Config) -> VDGen:
    """Read the backbones that `config.model` names, on the CPU; the LLM in its precision (A13).

    Raises FileNotFoundError for a model that is neither a folder nor on the hub, ValueError for one
    that does not fit.
    """
    names, options = config.model, {}
    if torch.cuda.is_available():
        # cuDNN's attention plans for each new shape, and a beam search meets one in every step.
        # Without it a mask takes the memory-efficient kernel, and no mask the flash one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:  # the fused kernel takes 2 to 3 times as long for bfloat16 and its gradients on a CPU
        options["attn_implementation"] = "eager"
    vision = _pretrained(AutoModel, names.vision, "model.vision", dtype=torch.float32, **options)
    processor = _pretrained(AutoImageProcessor, names.vision, "model.vision")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    llm = _pretrained(AutoModelForCausalLM, names.llm, "model.llm", dtype=dtype)
    tokenizer = _pretrained(AutoTokenizer, names.llm, "model.llm")
    if not hasattr(getattr(llm, "model", None), "embed_tokens"):
        raise ValueError(f"model.llm: {names.llm} is a {type(llm).__name__}; expected an LLM of "
                         f"the Llama architecture")
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"model.llm: the tokenizer of {names.llm} has no begin or no end token; "
                         f"both are needed (A9)")
    width = None
    if names.teacher is not None and config.loss.did_weight:
        width = _pretrained(AutoConfig, names.teacher, "model.teacher").hidden_size
    return VDGen(config, vision, llm, tokenizer, width, processor.image_mean, processor.image_std)


# The LLM's attention ------------------------------------------------------------------------------

def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | None, scaling: float, dropout: float = 0.0,
                      **_) -> tuple[Tensor, None]:
    """The attention of the LLM: a key-value head that serves G query heads is not copied to each.

    The library is told of no mask that goes with this attention, so that it neither makes one nor
    waits for the device to learn whether one is needed. A mask of padding would be lost here: VDGen
    pads on the right, which a causal LLM never sees.

    Args:
        query: (B, H, N, d), of the last N tokens.
        key, value: (B, H / G, T, d).
        attention_mask: (B or 1, 1, N, T), added to the scores; None: each token sees itself and
            those before it.
    Returns:
        (B, N, H, d), and None in place of the weights.
    """
    B, H, N, d = query.shape
    Hkv, T = key.shape[1:3]
    fused = nn.functional.scaled_dot_product_attention
    options = dict(dropout_p=dropout, scale=scaling)
    if attention_mask is not None:  # the query heads of a key-value head are further rows of one
        mask = attention_mask[:, :, None].expand(-1, -1, H // Hkv, -1, -1).flatten(2, 3)
        heads = fused(query.reshape(B, Hkv, -1, d), key, value, mask, **options)
        heads = heads.reshape(B, H, N, d)  # a GPU's kernel lays them out as (B, G N, Hkv, d)
    elif query.device.type != "cpu" and N in (1, T):  # its causal mask begins at the first key
        heads = fused(query, key, value, is_causal=N > 1, enable_gqa=H != Hkv, **options)
    else:  # a CPU, too: there fused takes 2 to 3 times as long for bfloat16 and its gradients
        scores = query.reshape(B, Hkv, -1, d) @ key.transpose(2, 3) * scaling
        scores = scores.view(B, H, N, T)
        scores = scores + scores.new_full((N, T), -torch.inf).triu(1 + T - N)
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout, module.training)
        heads = (weights.view(B, Hkv, -1, T) @ value).view(B, H, N, d)
    return heads.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)


# Decoding (Eq. 7) ---------------------------------------------------------------------------------

class _CacheLayer(DynamicLayer):
    """The keys and values of one layer of the LLM, with room for their final length.

    They grow without a copy, and their memory is asked for once.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Append (B, H, N, d) keys and values; returns views of all so far, (B, H, T, d)."""
        B, H, N, d = keys.shape
        T = self.get_seq_length()
        if not T:
            self.lazy_initialization(keys, values)
            self.room = keys.new_empty(2, B, H, self.length, d)
        for room, new in zip(self.room, (keys, values)):
            room[:, :, T:T + N] = new
        self.keys, self.values = self.room[:, :, :, :T + N]
        return self.keys, self.values

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in rising order; they move up within the room."""
        filled, B = self.room[:, :, :, :self.get_seq_length()], len(rows)
        filled[:, :B] = filled[:, rows]
        self.room = self.room[:, :B]
        self.keys, self.values = filled[:, :B]


@torch.no_grad()
def beam_search(llm: nn.Module, prompt: Tensor, settings: Generate, eos_id: int) -> Tensor:
    """Eq. 7: the beam search of transformers' `generate` (greedy with one beam), token for token.

    Without its repeated work: the prompt passes the LLM once a study, not once a beam. The beams of
    a study stand side by side in one row of the cache, as a tree: each step appends their N new
    tokens, and a mask shows each beam its own ancestors, so that no key is ever copied from beam to
    beam. A study whose result is settled leaves the batch.

    Args:
        prompt: (B, P, D_h), without padding.
    Returns:
        (B, max_new_tokens) ids, `eos_id` after the end.
    """
    (B, P, _), device = prompt.shape, prompt.device
    N, length = settings.num_beams, settings.max_new_tokens
    T_max = P + N * (length - 1)  # the last N tokens never enter the LLM
    cache = Cache(layers=[_CacheLayer(T_max) for _ in range(llm.config.num_hidden_layers)])
    # By place: this argument, `past_key_values` up to transformers 5.10, is `cache` in 5.24.
    hidden = llm.model(None, None, None, cache, prompt).last_hidden_state[:, -1:]
    written = torch.full((B, length), eos_id, device=device)
    studies = torch.arange(B, device=device)  # whose rows stand in all that follow
    tokens = torch.empty(B, N, 0, dtype=torch.long, device=device)  # of the running beams
    running = torch.zeros(B, 1, device=device)  # their log-probabilities; at first of one beam
    ended_scores = torch.full((B, N), -torch.inf, device=device)  # the best N that ended
    ended_tokens = written[:, None].repeat(1, N, 1)  # of these, best first
    mask = _prompt_mask(llm, B, N, P, T_max, device)  # what each running beam sees
    for t in range(length):
        logits = llm.get_output_embeddings()(hidden).float()
        candidates, parents, new_ids = _candidates(logits, tokens, running, settings, eos_id)
        grown = torch.cat([_of_beams(tokens, parents), new_ids[..., None]], dim=2)
        ends = (new_ids == eos_id) | (t + 1 == length)
        # Only the best N candidates may end. Their rank: log-probability over a power of length.
        power = (t + 1) ** settings.length_penalty
        scores = (candidates / power).masked_fill(~ends, -torch.inf)[:, :N]
        padded = nn.functional.pad(grown[:, :N], (0, length - t - 1), value=eos_id)
        ended_scores, order = torch.cat([ended_scores, scores], dim=1).topk(N)
        ended_tokens = _of_beams(torch.cat([ended_tokens, padded], dim=1), order)
        written[studies] = ended_tokens[:, 0]
        if t + 1 == length:
            break
        running, order = candidates.masked_fill(ends, -torch.inf).topk(N)
        tokens, mask = _of_beams(grown, order), _of_beams(mask, parents.gather(1, order))
        # Settled: N have ended, and the best running beam would not join them if it ended now.
        unsettled = running[:, 0] / power > ended_scores[:, -1]
        if t >= settings.min_new_tokens and not unsettled.all():  # before, none ends: no waiting
            left = unsettled.nonzero()[:, 0]
            if not len(left):
                break
            studies, tokens, running, mask, ended_scores, ended_tokens = (
                rows[left] for rows in (studies, tokens, running, mask, ended_scores, ended_tokens))
            cache.batch_select_indices(left)
        T = P + N * (t + 1)
        mask[:, :, T - N:T].diagonal(dim1=1, dim2=2).zero_()  # each new token sees itself
        positions = torch.full((1, N), P + t, device=device)
        embed = llm.get_input_embeddings()(tokens[..., -1])
        hidden = llm.model(None, mask[:, None, :, :T], positions, cache, embed).last_hidden_state
    return written


def _prompt_mask(llm: nn.Module, B: int, N: int, P: int, T_max: int,
                 device: torch.device) -> Tensor:
    """(B, N, T_max and more): 0 where a beam sees, on the prompt; -inf elsewhere.

    The rows are padded to a multiple of 8: the GPU's kernel wants such a stride.
    """
    mask = torch.full((B, N, T_max + -T_max % 8), -torch.inf, dtype=llm.dtype, device=device)
    mask[:, :, :P] = 0
    return mask


def _candidates(logits: Tensor, tokens: Tensor, running: Tensor, settings: Generate,
                eos_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best 2 N continuations of each study's N beams: of these at most N end.

    Args:
        logits: (B, N, V) of the next token, changed in place; in the first step (B, 1, V).
        tokens: (B, N, t) what the beams have written.
        running: (B, N) their log-probabilities; in the first step (B, 1).
    Returns:
        log-probability, parent beam and new token of each, all (B, 2 N), best first.
    """
    N, t = tokens.shape[1:]
    # The penalty works on logits when greedy, on log-probabilities with beams, as in the library.
    norm = logits.logsumexp(dim=2, keepdim=True) if N > 1 else 0
    if t and settings.repetition_penalty != 1:
        seen = logits.gather(2, tokens) - norm
        seen *= torch.where(seen < 0, settings.repetition_penalty, 1 / settings.repetition_penalty)
        logits.scatter_(2, tokens, seen + norm)
    if t < settings.min_new_tokens:
        logits[..., eos_id] = -torch.inf
    best, new_ids = logits.topk(2 * N)  # of each beam
    best, order = (best - norm + running[..., None]).flatten(1).topk(2 * N)
    return best, order // (2 * N), new_ids.flatten(1).gather(1, order)


def _of_beams(rows: Tensor, beams: Tensor) -> Tensor:
    """Of rows (B, N, T), one for each beam, those of the beams (B, M) that are named: (B, M, T)."""
    return rows.gather(1, beams[..., None].expand(-1, -1, rows.shape[2]))


# The teacher (Sec. 3.3, A5) -----------------------------------------------------------------------

@torch.no_grad()
def embed_reports(model: VDGen, texts: Iterable[str]) -> dict[str, Tensor]:
    """A5: y, the teacher's embedding of each report: the mean of its last hidden states.

    The teacher is the LLM without LoRA, reading BOS and the report alone, or the encoder that
    `model.teacher` names, with its own special tokens. The mean is over the report's tokens: BOS
    and special tokens are left out. No gradient. Equal texts are computed once, in an order and in
    batches that depend on the set of texts only.

    Returns:
        {text: (D_t,) on the CPU, in the LLM's type}.
    """
    name, dtype = model.config.model.teacher, model.causal_lm.dtype
    is_llm, adapters = name is None, nullcontext()
    if is_llm:
        teacher, tokenizer = model.causal_lm.model, model.tokenizer
        if model.config.model.lora:
            adapters = model.llm.disable_adapter()
    else:
        teacher = _pretrained(AutoModel, name, "model.teacher", dtype=torch.float32)
        teacher = teacher.to(model.device)
        tokenizer = _pretrained(AutoTokenizer, name, "model.teacher")
    texts = sorted(set(texts), key=lambda text: (len(text), text))
    was_training, embeddings = model.training, {}
    model.eval()
    teacher.eval()
    with adapters, model.autocast():
        starts = range(0, len(texts), TEACHER_BATCH)
        for start in tqdm(starts, desc="teacher", unit="batch", leave=False):
            batch = texts[start:start + TEACHER_BATCH]
            means = _mean_states(teacher, tokenizer, batch, is_llm)
            embeddings.update(zip(batch, means.to(dtype).cpu()))
    model.train(was_training)
    return embeddings


def _mean_states(teacher: nn.Module, tokenizer, texts: list[str], is_llm: bool) -> Tensor:
    """(B, D_t) float32: the last hidden states of each text, mean over its own tokens."""
    ids, kept = zip(*(_teacher_ids(tokenizer, text, is_llm) for text in texts))
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(teacher.device)
    kept = nn.utils.rnn.pad_sequence(kept, batch_first=True).to(teacher.device)
    lengths = torch.tensor([len(row) for row in ids], device=teacher.device)
    mask = torch.arange(padded.shape[1], device=teacher.device) < lengths[:, None]
    options = dict(use_cache=False) if is_llm else {}  # keys that nothing would read
    states = teacher(input_ids=padded, attention_mask=mask.long(), **options).last_hidden_state
    return (states.float() * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)


def _teacher_ids(tokenizer, text: str, is_llm: bool) -> tuple[Tensor, Tensor]:
    """(L,) token ids of a report as its teacher reads it; (L,) bool, True = counts in the mean."""
    if is_llm:
        ids = tokenizer(text, add_special_tokens=False, truncation=True,
                        max_length=TEACHER_MAX_TOKENS - 1).input_ids
        kept = [False] + [True] * len(ids)
        return torch.tensor([tokenizer.bos_token_id] + ids), torch.tensor(kept)
    encoded = tokenizer(text, truncation=True, max_length=TEACHER_MAX_TOKENS,
                        return_special_tokens_mask=True)
    special = torch.tensor(encoded.special_tokens_mask, dtype=torch.bool)
    return torch.tensor(encoded.input_ids), ~special


class Teacher:
    """A5: y of the training studies, each dimension standardised over them (mean 0, deviation 1).

    A report counts as often as it occurs. An LLM's embeddings lie in a narrow cone; standardising
    is an affine map that W2 and b2 of Eq. 5 could undo, so only their conditioning changes. All
    ranks, and a resumed run, compute the same.

    Args:
        embeddings: (U, D_t) of the U different reports, as `embed_reports` gives them.
        report_of_study: (N,) which row of these each of the N training studies has.
    """

    def __init__(self, embeddings: Tensor, report_of_study: Tensor):
        self.embeddings, self.report_of_study = embeddings, report_of_study
        N, (U, D_t) = len(report_of_study), embeddings.shape
        counts = report_of_study.bincount(minlength=U).double()
        self.mean, self.deviation = torch.zeros(2, D_t, dtype=torch.float64)
        step = 4096  # reports at a time: those of MIMIC-CXR are gigabytes
        for reports, times in zip(embeddings.split(step), counts.split(step)):
            self.mean += times @ reports.double() / N
        for reports, times in zip(embeddings.split(step), counts.split(step)):
            self.deviation += times @ (reports.double() - self.mean) ** 2 / N
        self.mean = self.mean.float()
        self.deviation = self.deviation.sqrt().float()
        self.deviation = self.deviation.clamp(min=1e-6)  # what does not vary stays finite

    def __call__(self, studies: list[int]) -> Tensor:
        """(B, D_t) float32 of training studies, by their numbers."""
        return self.standardise(self.embeddings[self.report_of_study[studies]])

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Any reports' embeddings (.., D_t), by the training studies' mean and deviation."""
        return (embeddings.float() - self.mean) / self.deviation


# Weights from disk --------------------------------------------------------------------------------

def _pretrained(kind, name: str, key: str, **options):
    """`kind.from_pretrained(name)`; FileNotFoundError that names the setting `key` if it fails."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # a cut file of weights ends in an error of safetensors' own
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise  # no fault of the folder
        raise FileNotFoundError(f"{key}: cannot load {name!r} as {kind.__name__}: expected a "
                                f"folder of a Hugging Face model, or a name on the hub that this "
                                f"machine can reach ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)  # some say nothing


def read_checkpoint(path, owner: str = "VDGen", keys=("model", "config"),
                    mmap: bool = False) -> dict:
    """A file of torch.save, tensors and plain values only: no code in it is run.

    Args:
        path: best.pt or last.pt, or a file of another owner.
        owner: whose checkpoint is expected; for the error.
        keys: those that it must have.
        mmap: tensors stay in the file, whose pages all processes of a machine share.
    Raises:
        FileNotFoundError: no such file. ValueError: it is no such checkpoint.
    """
    wrong = f"checkpoint {path}: not a checkpoint of {owner}"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path}: no such file") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{wrong}: it holds more than tensors and plain values; pickled code is "
                         f"never run") from None
    except Exception as error:  # a zip or runtime error, as the junk may be
        raise ValueError(f"{wrong} ({_first_line(error)})") from None
    if not isinstance(checkpoint, dict) or not set(keys) <= checkpoint.keys():
        expected = " and ".join(f"`{key}`" for key in keys)
        raise ValueError(f"{wrong}: it has no {expected}")
    return checkpoint


# The labeller of Table 3 --------------------------------------------------------------------------

# In the order of the labeller's heads.
CONDITIONS = ("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
              "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
              "Pleural Other", "Fracture", "Support Devices", "No Finding")


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
        """The classes of each report, one for each of CONDITIONS.

        Blanks are collapsed, and what comes after 512 tokens is not read.
        """
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
    hub. `config`: of its BERT; default: BERT-base. Raises FileNotFoundError or ValueError for
    another file.
    """
    state = read_checkpoint(path, "CheXbert", ["model_state_dict"])["model_state_dict"]
    beside = Path(path).parent / "vocab.txt"
    if beside.is_file():
        tokenizer = BertTokenizer(vocab=str(beside))
    else:
        key = f"--chexbert: without a {beside}"
        tokenizer = _pretrained(BertTokenizer, "bert-base-uncased", key)
    model = CheXbert(BertModel(config or BertConfig()), tokenizer)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state.pop("bert.embeddings.position_ids", None)  # a constant that older transformers stored
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path}: not the weights of CheXbert: {reason}") from None
    return model.eval()


def chexbert_labeller(checkpoint: Path, cache: Path) -> Callable[[list[str]], list[list[int]]]:
    """A function from reports to their 14 classes, as `CheXbert.label` gives them.

    A text is labelled once: the file `cache` (JSON) keeps it for the next time. The weights are
    read when a text is new, not before.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--chexbert {checkpoint}: no such file")
    version = f"{checkpoint.stat().st_size} bytes, {checkpoint.stat().st_mtime_ns} ns"
    known = _stored_labels(cache, version)

    def label(texts: list[str]) -> list[list[int]]:
        new = sorted({text for text in texts if text not in known})
        if new:
            model = load_chexbert(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
            known.update(zip(new, model.label(new)))
            stored = {"checkpoint": version, "conditions": CONDITIONS, "labels": known}
            cache.write_text(json.dumps(stored) + "\n")
        return [known[text] for text in texts]
    return label


def _stored_labels(cache: Path, version: str) -> dict[str, list[int]]:
    """{text: its classes} that these weights gave earlier; {}: none yet, or the file is cut."""
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        written_for = (stored["checkpoint"], stored["conditions"])
        return stored["labels"] if written_for == (version, list(CONDITIONS)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# Several processes --------------------------------------------------------------------------------

def ranks() -> tuple[int, int]:
    """(rank of this process, number of ranks); (0, 1) unless torchrun started it."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def join_ranks() -> None:
    """Under torchrun: join the group of processes. Ranks after the first print only errors."""
    if "RANK" not in os.environ:
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # torchrun ends all ranks when one dies, and the first may embed reports for hours (A5).
    torch.distributed.init_process_group("nccl" if device else "gloo",
                                         timeout=timedelta(hours=12), device_id=device)
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in their order: VSE and DID contrast the whole batch.

    Gradient reaches this rank's own rows, times the number of ranks: each rank computes the same
    loss from all rows, and what its rows ask for is divided by that number when the ranks'
    gradients are averaged.
    """
    rank, world = ranks()
    if world == 1:
        return rows
    rows_of_ranks = [torch.empty_like(rows) for _ in range(world)]
    torch.distributed.all_gather(rows_of_ranks, rows.detach())
    rows_of_ranks[rank] = rows.clone()
    if rows_of_ranks[rank].requires_grad:
        rows_of_ranks[rank].register_hook(lambda gradient: gradient * world)
    return torch.cat(rows_of_ranks)
