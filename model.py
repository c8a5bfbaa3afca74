"""VDGen (Sec. 3): a Swin encoder, the heads of VSE and DID, and a Llama decoder with LoRA.

In the paper's order: the model, the teacher (Sec. 3.3), reading and writing weights; last, what
several processes share. The loss functions are in losses.py; their sum
(Eq. 8) is in the training loop. Left out on purpose: a [CLS] token (A6) and any projection on the
image side of DID (Eq. 4).
"""
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import partialmethod
from inspect import signature
from pathlib import Path

import torch
import torch.distributed
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM,
                          AutoTokenizer, GenerationConfig)
from transformers.pytorch_utils import Conv1D

from configs import Config, InputError, Model, parse_config
from configs.files import first_line, pretrained, read_checkpoint
from losses import IGNORED, did_loss, own_report_nearest, report_loss, vse_loss

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# PyTorch's default: generation normalises by the last ten batches or so of training. The momentum
# of a folder may keep the statistics of its pretraining for a whole run, or those of the last batch
# only (A11).
BATCH_NORM_MOMENTUM = 0.1
TEACHER_MAX_TOKENS = 512  # where BERT-like teachers end; longer reports are cut, for every teacher
TEACHER_BATCH = 16  # fixed: the padding of a batch changes bfloat16 results in the last digit (A5)


class VDGen(nn.Module):
    """The whole model. All that trains is float32; the frozen LLM keeps its type.

    Args:
        config: see configs/__init__.py.
        vision: a Hugging Face encoder whose output has `last_hidden_state` (N, S, D), or a map
            (N, D, h, w) (Sec. 3.1).
        llm: a Hugging Face causal LM that reads `inputs_embeds`.
        tokenizer: of that LLM, with an end token; a begin token is used if there is one (A9).
        teacher_width: D_t when `model.teacher` names another encoder; default: the LLM's width
            (A5).
        image_mean, image_std: what the encoder was pretrained with, three numbers each.
    """

    def __init__(self, config: Config, vision: nn.Module, llm: nn.Module, tokenizer,
                 teacher_width: int | None = None,
                 image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.step: int | None = None  # completed steps of the checkpoint that was loaded

        # Sec. 3.2: the encoder, all of it trained (A11), and the LayerNorm on X^e (A26)
        self.vision = vision
        own = getattr(vision.config, "image_size", 224)  # Sec. 4.1.2 where any will do
        own = own if isinstance(own, int) else own[0]
        self.image_size = config.model.image_size or own
        can_interpolate = "interpolate_pos_encoding" in signature(vision.forward).parameters
        another_size = can_interpolate and self.image_size != own
        self.vision_options = {"interpolate_pos_encoding": True} if another_size else {}
        self.visual_token_count, D = self.measure_encoder()
        for layer in vision.modules():  # A11: an encoder of Sec. 3.1 may have some; Swin has none
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = BATCH_NORM_MOMENTUM
        self.norm = nn.LayerNorm(D)

        # The heads: W1 of Sec. 3.2 (A4), W2 of Eq. 5; and X^e to the LLM's width (A7)
        embed = llm.get_input_embeddings()
        words = embed(torch.arange(embed.num_embeddings, device=embed.weight.device)).detach()
        D_z, D_t = config.model.vse_expansion * D, teacher_width or words.shape[1]
        self.vse_head = nn.Linear(D, D_z) if config.loss.vse_weight else None
        self.did_head = nn.Linear(D_t, D) if config.loss.did_weight else None
        self.visual_projection = visual_projection(D, words)

        # Sec. 3.4: the LLM, frozen, with LoRA (Sec. 4.1.2, A12; none: A18)
        llm.requires_grad_(False)
        lora = config.model.lora
        self.llm = llm if lora is None else get_peft_model(llm, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules), task_type="CAUSAL_LM"))
        for layer in self.llm.modules():  # autocast casts; PEFT would cast to float32 and it back
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = False
        if config.train.recompute:
            enable_recompute(vision)
            enable_recompute(llm)

        # The prompt and the pixels' scale: constants, in no checkpoint
        self.eos_id, bos_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        before, after = (tokenizer(text, add_special_tokens=False).input_ids
                         for text in config.model.prompt)
        self.bos_ids = [] if bos_id is None else [bos_id]  # A9
        constants = {"before_ids": torch.tensor(self.bos_ids + before),
                     "after_ids": torch.tensor(after),
                     "image_mean": torch.tensor(image_mean).view(3, 1, 1),
                     "image_std": torch.tensor(image_std).view(3, 1, 1)}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.require_context()

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

    def require_context(self) -> None:
        """InputError where the prompt and the longest report exceed the LLM's context."""
        config = self.config
        texts = {"data.max_report_tokens": config.data.max_report_tokens,
                 "generate.max_new_tokens": config.generate.max_new_tokens}
        context = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        prompt = len(self.before_ids) + self.visual_token_count + len(self.after_ids)
        for key, tokens in texts.items():
            if context and prompt + tokens > context:
                raise InputError(f"{key}: a prompt of {prompt} tokens and {tokens} more do not fit "
                                 f"the {context} places of {config.model.llm}; lower it")

    def measure_encoder(self) -> tuple[int, int]:
        """S and D of X^e, from one pass of a blank image: families name them differently.

        Parameters that X^e does not depend on, such as a pooler's or the token of masked patches,
        are frozen: DDP would wait for their gradient. The encoder's mode stays as it is.
        """
        kind, parameters = type(self.vision).__name__, list(self.vision.parameters())
        if kind.startswith("ViTMAE") and self.vision.config.mask_ratio:
            raise InputError(f"model.vision: {kind} leaves out patches at random (mask_ratio), in "
                             f"generation, too; convert it to a plain ViT, or name another encoder")
        image = torch.zeros(1, 3, self.image_size, self.image_size, device=parameters[0].device)
        was_training = self.vision.training
        self.vision.requires_grad_().eval()
        with torch.enable_grad():
            try:
                hidden = self.vision(image, **self.vision_options).last_hidden_state
            except Exception as error:  # of whatever family it is
                raise InputError(f"model.vision: {kind} gives no last_hidden_state of an image "
                                 f"({first_line(error)}); name an encoder of images") from None
            reached = torch.autograd.grad(hidden.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, reached):
            parameter.requires_grad_(gradient is not None)
        self.vision.train(was_training)
        return _as_tokens(hidden).shape[1:]

    def forward(self, images: Tensor, view_counts: list[int], report_ids: Tensor,
                report_lengths: list[int], teacher_embed: Tensor | None
                ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The unweighted terms of Eq. 8 for one batch of B studies: see `encode` and `losses`."""
        visual_tokens = self.encode(images, view_counts)
        return self.losses(visual_tokens, report_ids, report_lengths, teacher_embed)

    def encode(self, images: Tensor, view_counts: list[int]) -> Tensor:
        """Sec. 3.2: X^e, visual tokens of each study: Swin, LayerNorm (A26), mean over views (A8).

        Args:
            images: (sum of view_counts, 3, H, W) uint8, the views of one study after the other's.
            view_counts: B numbers >= 1.
        Returns:
            (B, S, D) float32.
        """
        pixels = (images.to(self.device).float() / 255 - self.image_mean) / self.image_std
        hidden = self.vision(pixels, **self.vision_options).last_hidden_state
        tokens = self.norm(_as_tokens(hidden).float())
        return torch.stack([views.mean(dim=0) for views in tokens.split(view_counts)])

    @staticmethod
    def pool(visual_tokens: Tensor) -> Tensor:
        """Sec. 3.2: h, the mean of the visual tokens: (B, S, D) to (B, D)."""
        return visual_tokens.mean(dim=1)

    def losses(self, visual_tokens: Tensor, report_ids: Tensor, report_lengths: list[int],
               teacher_embed: Tensor | None
               ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """VSE, DID and the report loss, from X^e (B, S, D) on.

        Args:
            report_ids: (B, L) token ids, end token included (A20), padded on the right with any id.
            report_lengths: B numbers >= 1, how many of them count.
            teacher_embed: (B, D_t) y of the reports (see `Teacher`); None if `did_weight` is 0.
        Returns:
            terms: {"vse": ..., "did": ..., "report": ...}, scalars in nats; one of weight 0 is left
                out. With several ranks the mean of each over the ranks is the term of the whole
                batch, and the mean of its gradients the gradient.
            measures: what is logged beside them. "did_top1": the share of the images whose own
                report is the nearest of the batch (chance 1/B); not there without DID.
        """
        terms, measures, loss = {}, {}, self.config.loss
        visual_embed = self.pool(visual_tokens)  # h
        with torch.autocast(self.device.type, enabled=False):  # B rows: float32 costs nothing here
            if self.vse_head is not None:  # Sec. 3.2
                z = gathered(self.vse_head(visual_embed))
                terms["vse"] = vse_loss(z, loss.vse_temperature, loss.vse_self_in_denominator)
            if self.did_head is not None:  # Sec. 3.3
                image_embed = gathered(visual_embed)
                text_embed = gathered(self.did_head(teacher_embed))
                terms["did"] = did_loss(image_embed, text_embed, loss.did_temperature)
                nearest = own_report_nearest(image_embed, text_embed)
                measures["did_top1"] = nearest.float().mean()
        terms["report"] = self.report_term(visual_tokens, report_ids, report_lengths)  # Sec. 3.4
        return terms, measures

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
        """Sec. 3.4, Eq. 2: the report loss after visual tokens (B, S, D). Arguments: `losses`."""
        B, L = report_ids.shape
        embed = self.causal_lm.get_input_embeddings()
        # The last token predicts nothing. Padding on the right is never seen under a causal mask.
        inputs = torch.cat([self.embed_prompt(visual_tokens), embed(report_ids[:, :-1])], dim=1)
        # The prompt's last place predicts the first token of the report: L places in all.
        logits = self.causal_lm(inputs_embeds=inputs, use_cache=False, logits_to_keep=L).logits
        lengths = torch.tensor(report_lengths).to(self.device, non_blocking=True)
        is_padding = torch.arange(L, device=self.device) >= lengths[:, None]
        loss = report_loss(logits, report_ids.masked_fill(is_padding, IGNORED))
        tokens, world = sum(report_lengths), ranks()[1]
        if world > 1:  # from the mean over this rank's tokens to its share of the mean over all
            total = torch.full((), tokens, device=self.device)
            torch.distributed.all_reduce(total)
            loss = loss * tokens * world / total
        return loss

    @torch.no_grad()
    def generate(self, images: Tensor, view_counts: list[int]) -> tuple[list[str], Tensor]:
        """Eq. 7: write a report for each study by the library's beam search (A14).

        Arguments: `encode`. Returns: B reports, and h (B, D).
        """
        settings = self.config.generate
        of_beams = {"length_penalty": settings.length_penalty} if settings.num_beams > 1 else {}
        options = GenerationConfig(
            do_sample=False, num_beams=settings.num_beams, **of_beams,
            repetition_penalty=settings.repetition_penalty,
            min_new_tokens=settings.min_new_tokens, max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.eos_id, pad_token_id=self.eos_id)
        with warnings.catch_warnings(), self.autocast():
            # A14 wants what this warning says: the penalty counts the tokens of the report alone.
            warnings.filterwarnings("ignore", "Passing `repetition_penalty` with `inputs_embeds`")
            visual_tokens = self.encode(images, view_counts)
            prompt = self.embed_prompt(visual_tokens)
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=self.device)
            written = self.causal_lm.generate(inputs_embeds=prompt, attention_mask=mask,
                                              generation_config=options)
        return [self.decode(ids) for ids in written.tolist()], self.pool(visual_tokens)

    def decode(self, ids: list[int]) -> str:
        """Text up to the end token; padding after it may be any token (A9)."""
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)
        return text.strip()

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all but frozen weights; buffers of the encoder, too."""
        named = self.named_parameters(remove_duplicate=False)
        frozen = {name for name, p in named if not p.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The reverse of `trained_state`, strictly.

        Raises InputError if a tensor is missing, unexpected, of another shape, or not finite.
        """
        own = {name: value.shape for name, value in self.trained_state().items()}
        theirs = {name: value.shape for name, value in state.items()}
        wrong = sorted(name for name, _ in own.items() ^ theirs.items())
        if wrong:
            raise InputError(f"checkpoint: the tensor {wrong[0]} is missing, unexpected or of "
                             f"another shape; expected that of a model with these settings")
        damaged = [name for name, value in state.items() if not value.isfinite().all()]
        if damaged:
            raise InputError(f"checkpoint: {damaged[0]} holds values that are not finite")
        self.load_state_dict(state, strict=False)

    def load_what_fits(self, state: dict[str, Tensor]) -> None:
        """`train.init_from`: the tensors that this model has, too; prints which ones do not fit."""
        own = self.trained_state()
        fits = {name: value for name, value in state.items()
                if name in own and own[name].shape == value.shape}
        others = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys(),
                  "of another shape": (own.keys() & state.keys()) - fits.keys()}
        for what, names in others.items():
            if names:
                shown = ", ".join(sorted(names))
                print(f"train.init_from: {len(names)} tensors are {what}: {shown}")
        if not fits:
            raise InputError("train.init_from: no tensor of that checkpoint fits this model")
        self.load_state_dict(fits, strict=False)


def _as_tokens(hidden: Tensor) -> Tensor:
    """(N, S, D); of a map (N, D, h, w) its h w places are the tokens (Sec. 3.1)."""
    return hidden.flatten(2).mT if hidden.dim() == 4 else hidden


def visual_projection(D: int, words: Tensor) -> nn.Linear:
    """A7: from X^e (deviation 1 in each view) to the LLM's width; begins at the scale of its words.

    PyTorch's default, weights uniform within D**-0.5, would begin with a deviation of 3**-0.5, 4
    times that of the words of SmolLM2-135M: an LLM has never read tokens of that size.

    Args: words: (vocabulary, D_h), as the LLM's embedding layer gives them.
    """
    projection = nn.Linear(D, words.shape[1])
    with torch.no_grad():
        projection.weight *= 3**0.5 * words.float().std()
        projection.bias.zero_()
    return projection


def enable_recompute(part: nn.Module) -> None:
    """`train.recompute`: activations are computed again in backward instead of kept."""
    if not part.supports_gradient_checkpointing:
        return print(f"note: train.recompute: {type(part).__name__} keeps its activations")
    enable = getattr(part, "activation_checkpointing_enable", None)  # its name in transformers 5.24
    (enable or part.gradient_checkpointing_enable)()


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
    name, dtype, adapters = model.config.model.teacher, model.causal_lm.dtype, nullcontext()
    if name is None:
        teacher, tokenizer, bos_ids = model.causal_lm.base_model, model.tokenizer, model.bos_ids
        if model.config.model.lora:
            adapters = model.llm.disable_adapter()
    else:
        teacher, report = pretrained(AutoModel, name, "model.teacher", dtype=torch.float32,
                                     output_loading_info=True)
        needed = [key for key in report["missing_keys"] if "pooler" not in key]
        require_weights("model.teacher", name, needed)
        teacher = teacher.to(model.device)
        tokenizer, bos_ids = pretrained(AutoTokenizer, name, "model.teacher"), None
    texts = sorted(set(texts), key=lambda text: (len(text), text))
    was_training, embeddings = model.training, {}
    model.eval()
    teacher.eval()
    with adapters, model.autocast():
        starts = range(0, len(texts), TEACHER_BATCH)
        for start in tqdm(starts, desc="teacher", unit="batch", leave=False):
            batch = texts[start:start + TEACHER_BATCH]
            rows = [_teacher_ids(tokenizer, text, bos_ids) for text in batch]
            means = _mean_states(teacher, rows)
            embeddings.update(zip(batch, means.to(dtype).cpu()))
    model.train(was_training)
    return embeddings


def _mean_states(teacher: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """(B, D_t) float32: the last hidden states of each text, mean over its own tokens.

    Args: rows: of each text its token ids, and for each 1 where the mean keeps it, else 0.
    """
    ids, kept = ([torch.tensor(part, device=teacher.device) for part in parts]
                 for parts in zip(*rows))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    kept = pad(kept, batch_first=True)
    options = {"use_cache": False} if hasattr(teacher.config, "use_cache") else {}
    output = teacher(input_ids=pad(ids, batch_first=True), attention_mask=mask, **options)
    states = output.last_hidden_state.float() * kept[..., None]
    return states.sum(dim=1) / kept.sum(dim=1, keepdim=True)


def _teacher_ids(tokenizer, text: str, bos_ids: list[int] | None) -> tuple[list[int], list[int]]:
    """Token ids of a report as its teacher reads it, and for each 1 where the mean keeps it.

    bos_ids: those of the LLM; None: another encoder's tokenizer puts in its own special tokens.
    """
    if bos_ids is None:
        encoded = tokenizer(text, truncation=True, max_length=TEACHER_MAX_TOKENS,
                            return_special_tokens_mask=True)
        return encoded.input_ids, [1 - special for special in encoded.special_tokens_mask]
    ids = tokenizer(text, add_special_tokens=False, truncation=True,
                    max_length=TEACHER_MAX_TOKENS - len(bos_ids)).input_ids
    return bos_ids + ids, [0] * len(bos_ids) + [1] * len(ids)


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
        shares = report_of_study.bincount(minlength=U).double() / N
        self.mean, variance = torch.zeros(2, D_t, dtype=torch.float64)
        step = 4096  # reports at a time: those of MIMIC-CXR are gigabytes
        for reports, share in zip(embeddings.split(step), shares.split(step)):
            self.mean += share @ reports.double()
        for reports, share in zip(embeddings.split(step), shares.split(step)):
            variance += share @ (reports.double() - self.mean) ** 2
        self.mean = self.mean.float()
        self.deviation = variance.sqrt().float().clamp(min=1e-6)  # what does not vary stays finite

    def __call__(self, studies: list[int]) -> Tensor:
        """(B, D_t) float32 of training studies, by their numbers."""
        return self.standardise(self.embeddings[self.report_of_study[studies]])

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Any reports' embeddings (.., D_t), by the training studies' mean and deviation."""
        return (embeddings.float() - self.mean) / self.deviation


# Weights from disk --------------------------------------------------------------------------------

def load_model(config: Config, teacher_width: int | None = None) -> VDGen:
    """Read the backbones that `config.model` names, on the CPU; the LLM in its precision (A13).

    `teacher_width`: D_t where it is known; default: that of `model.teacher`, or the LLM's.
    Raises FileNotFoundError for a model that is neither a folder nor on the hub, InputError for one
    that does not fit.
    """
    names, is_bf16, options = config.model, config.train.precision == "bf16", {}
    if torch.cuda.is_available():
        # cuDNN's attention plans for each new shape, and a beam search meets one in every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif is_bf16:  # on a CPU the fused kernel takes longer in bfloat16, and shorter in float32
        options["attn_implementation"] = "eager"
    vision, report = pretrained(AutoModel, names.vision, "model.vision", dtype=torch.float32,
                                output_loading_info=True, **options)
    tensors = vision.state_dict(keep_vars=True).items()
    lost = {id(tensor) for name, tensor in tensors if name in report["missing_keys"]}
    vision = getattr(vision, "vision_model", vision)  # of CLIP, SigLIP: the image part
    processor = pretrained(AutoImageProcessor, names.vision, "model.vision")
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    llm, report = pretrained(AutoModelForCausalLM, names.llm, "model.llm", dtype=dtype,
                             output_loading_info=True, **options)
    require_weights("model.llm", names.llm, report["missing_keys"])
    llm.generation_config = GenerationConfig()  # its own file would fill what A14 leaves unset
    tokenizer = pretrained(AutoTokenizer, names.llm, "model.llm")
    require_fit(llm, tokenizer, config)
    if names.teacher and config.loss.did_weight and not teacher_width:
        teacher = pretrained(AutoConfig, names.teacher, "model.teacher")
        teacher_width = getattr(teacher, "hidden_size", None)
        if teacher.is_encoder_decoder or not teacher_width:
            raise InputError(f"model.teacher: {names.teacher} is a {teacher.model_type}; expected "
                             f"an encoder of texts, such as a BERT, or a causal LM")
    model = VDGen(config, vision, llm, tokenizer, teacher_width,
                  *pixel_statistics(processor, names.vision))
    needed = {name: tensor for name, tensor in vision.state_dict(keep_vars=True).items()
              if tensor.requires_grad or name.endswith(("running_mean", "running_var"))}
    require_weights("model.vision", names.vision,
                    [name for name, tensor in needed.items() if id(tensor) in lost])
    return model


def require_weights(key: str, name: str, missing: Iterable[str]) -> None:
    """InputError where a folder lacks weights that a loss depends on: they would be random."""
    missing = sorted(missing)
    if missing:
        raise InputError(f"{key}: {name} lacks {len(missing)} weights, such as "
                         f"{', '.join(missing[:3])}; expected all of the model's, under the names "
                         f"that transformers gives them")


def require_folders(names: Model) -> None:
    """FileNotFoundError for a path that is no folder here; a hub's name has one slash at most."""
    for key in ("vision", "llm", "teacher"):
        name = getattr(names, key)
        if name and name.count("/") > 1 and not Path(name).is_dir():
            raise FileNotFoundError(f"model.{key}: there is no folder {name} in {Path.cwd()}; "
                                    f"start in the repository's folder, or name another")


def require_fit(llm: nn.Module, tokenizer, config: Config) -> None:
    """InputError for an LLM that cannot be used as it is, before anything is computed with it."""
    name, lora = config.model.llm, config.model.lora
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.llm: the tokenizer of {name} has no end token")
    words, added = llm.get_input_embeddings().num_embeddings, tokenizer.added_tokens_decoder
    unused = {i for i, token in added.items() if token.special and i != tokenizer.eos_token_id}
    ids = tokenizer.get_vocab()
    beyond = [token for token, i in ids.items() if i >= words and i not in unused]
    if beyond:
        raise InputError(f"model.llm: the tokenizer of {name} has {len(beyond)} tokens beyond the "
                         f"{words} of the embedding, such as {beyond[0]!r}; use the LLM's own "
                         f"tokenizer, or resize its embedding")
    if getattr(llm, "_hf_peft_config_loaded", False):
        raise InputError(f"model.llm: {name} is a LoRA adapter; merge it into its LLM first "
                         f"(PEFT: merge_and_unload, then save_pretrained)")
    linear = {path.rpartition(".")[2] for path, part in llm.named_modules()
              if isinstance(part, (nn.Linear, Conv1D))}
    unknown = [target for target in (lora.target_modules if lora else ())
               if target.rpartition(".")[2] not in linear]
    if unknown:
        raise InputError(f"model.lora.target_modules: {name} has no layer {unknown[0]}; its "
                         f"linear layers are {', '.join(sorted(linear))}")
    try:
        blank = torch.zeros(1, 2, llm.get_input_embeddings().weight.shape[1], dtype=llm.dtype)
        llm.generate(inputs_embeds=blank, max_new_tokens=1, do_sample=False)
    except Exception as error:  # of whatever family it is
        raise InputError(f"model.llm: {name}, a {type(llm).__name__}, cannot read visual tokens "
                         f"(inputs_embeds): {first_line(error)}") from None


def pixel_statistics(processor, name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels that an encoder expects: three numbers each."""
    found = []
    for key in ("mean", "std"):
        value = getattr(processor, f"image_{key}", None)
        value = getattr(processor, "data_config", {}).get(key) if value is None else value  # timm's
        value = [value] if isinstance(value, (int, float)) else list(value or ())
        if len(value) not in (1, 3):
            raise InputError(f"model.vision: the image processor of {name} tells no image_{key}; "
                             f"write three numbers into its preprocessor_config.json")
        found.append(value * 3 if len(value) == 1 else value)
    return found[0], found[1]


def load_checkpoint(path: str | Path, overrides: Iterable[str] = ()) -> VDGen:
    """A trained model, ready to generate: on the GPU if there is one, in eval mode.

    Args:
        path: best.pt or last.pt of a run.
        overrides: `section.key=value` each, as after `--set`.
    """
    checkpoint = read_checkpoint(path)
    config, state = parse_config(checkpoint["config"], overrides, str(path)), checkpoint["model"]
    width = state["did_head.weight"].shape[1] if "did_head.weight" in state else None
    model = load_model(config, width)
    model.load_trained_state(state)
    model.step = checkpoint.get("step")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


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


def leave_ranks() -> None:
    """The end of a command under torchrun."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each value over the ranks, in place."""
    world = ranks()[1]
    if world > 1:
        torch.distributed.all_reduce(values)
        values /= world
    return values


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
