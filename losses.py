"""The three losses of VDGen (Sec. 3.1 to 3.3): pure functions of tensors.

Each gives a scalar in nats, a mean over its rows. They compute in float32 at least, whatever
autocast says (float64 stays float64): at temperature 0.07 a similarity of bfloat16 would be wrong
by up to 0.06 nats. Their sum, Eq. 8, stands in the training loop (train.py).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # target of a position that takes no loss; PyTorch's own default for cross-entropy


def vse_loss(z: Tensor, temperature: float, self_in_denominator: bool = False) -> Tensor:
    """Eq. 3: Vision Self-Equilibration, a contrastive loss within the batch.

    S_ij = z_i . z_j / temperature on unit-norm z,
    L = mean_i [ -S_ii + log sum_{j != i} exp(S_ij) ].

    As printed, S_ii = -inf makes Eq. 3 infinite, so the mask acts on the denominator only (A1).
    With unit-norm rows (A2) the target term S_ii is then the constant 1/temperature: the loss only
    pushes the studies of a batch apart. Its minimum, for B rows that form a simplex, is
    log(B-1) - (1 + 1/(B-1)) / temperature: for 16 rows 1.641 at 1.0, and negative below 0.39.

    Args:
        z: (B, D_z) raw projected embeddings W1 h + b, B >= 2; normalised here. Gradient reaches
            every row.
        temperature: tau > 0.
        self_in_denominator: keep j = i in the sum, which gives plain InfoNCE with the row itself as
            its positive (A1).
    Returns:
        scalar, nats, mean over the batch.
    Raises:
        ValueError: z is not a floating (B >= 2, D_z) matrix, or temperature is not above 0.
    """
    _check_contrast(z, "z", temperature)
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(_at_least_float32(z), dim=1)  # A2
        similarity = z @ z.T / temperature
        target = similarity.diagonal()
        if not self_in_denominator:
            itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
            similarity = similarity.masked_fill(itself, -torch.inf)
        return (similarity.logsumexp(dim=1) - target).mean()


def did_loss(image_embed: Tensor, text_embed: Tensor, temperature: float) -> Tensor:
    """Eq. 4 to 6: Disease Information Distillation, symmetric contrast of images and their reports.

    Row i of the text belongs to image i; all other rows are negatives, equal reports too (A25).

    Args:
        image_embed: (B, D) h_i, the mean visual token, B >= 2; raw, normalised here (Eq. 4).
        text_embed: (B, D) W2 y_i + b2 of the frozen teacher's embedding y_i; raw, normalised here
            (Eq. 5). Gradient reaches both arguments; that it ends at W2 on the text side is the
            caller's doing (y is computed without gradient).
        temperature: tau > 0.
    Returns:
        scalar, nats: (v2t + t2v) / 2, each the mean over the batch.
    Raises:
        ValueError: not two floating (B >= 2, D) matrices of one shape, or temperature is not above
            0.
    """
    if image_embed.shape != text_embed.shape:
        raise ValueError(f"did_loss: image_embed has shape {tuple(image_embed.shape)}, text_embed "
                         f"{tuple(text_embed.shape)}; expected the same (B, D)")
    _check_contrast(image_embed, "image_embed", temperature)
    _check_contrast(text_embed, "text_embed", temperature)
    with torch.autocast(image_embed.device.type, enabled=False):
        z_img = F.normalize(_at_least_float32(image_embed), dim=1)  # Eq. 4
        z_text = F.normalize(_at_least_float32(text_embed), dim=1)  # Eq. 5
        similarity = z_img @ z_text.T / temperature
        own = torch.arange(len(z_img), device=z_img.device)
        v2t = F.cross_entropy(similarity, own)
        t2v = F.cross_entropy(similarity.T, own)
        return (v2t + t2v) / 2  # Eq. 6


@torch.no_grad()
def own_report_nearest(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """For which images the own report is the nearest of the batch, by cosine; a measure, no loss.

    Args: image_embed, text_embed: (B, D), row i of one belongs to row i of the other.
    Returns: (B,) bool.
    """
    z_img = F.normalize(image_embed.float(), dim=1)
    z_text = F.normalize(text_embed.float(), dim=1)
    nearest = (z_img @ z_text.T).argmax(dim=1)
    return nearest == torch.arange(len(nearest), device=nearest.device)


def report_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Eq. 2: next-token cross-entropy, mean over the report tokens of the whole batch (A10).

    Args:
        logits: (..., V) scores of the token that stands in `targets` at the same place: the caller
            shifts.
        targets: (...) token ids, -100 where no loss is taken (prompt, image, padding).
    Returns:
        scalar, nats per report token.
    Raises:
        ValueError: shapes that do not fit; on a CPU also an id outside the vocabulary, or no target
            left. On a GPU both checks would make the host wait: an id outside the vocabulary ends
            in PyTorch's own assertion, and no target left gives nan.
    """
    if logits.shape[:-1] != targets.shape or logits.dim() < 2:
        raise ValueError(f"report_loss: logits have shape {tuple(logits.shape)}, targets "
                         f"{tuple(targets.shape)}; expected (..., V) and (...)")
    if targets.is_floating_point():
        raise ValueError(f"report_loss: targets are {targets.dtype}; expected token ids")
    if targets.device.type == "cpu":
        _check_ids(targets, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        rows = _at_least_float32(logits.flatten(0, -2))
        return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_contrast(rows: Tensor, name: str, temperature: float) -> None:
    """ValueError unless `rows` is a floating (B >= 2, D) matrix and the temperature above 0."""
    if rows.dim() != 2 or len(rows) < 2 or not rows.is_floating_point():
        raise ValueError(f"{name}: got {rows.dtype} of shape {tuple(rows.shape)}; expected a "
                         "floating (B, D) matrix of B >= 2 studies (a contrast needs another "
                         "study)")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; expected a number above 0")


def _check_ids(targets: Tensor, V: int) -> None:
    """ValueError unless each target that counts is one of V ids, and one at least counts."""
    kept = targets != IGNORED
    bad = kept & ((targets < 0) | (targets >= V))
    if bad.any():
        raise ValueError(f"report_loss: target {targets[bad][0].item()} is no id of {V} tokens")
    if not kept.any():
        raise ValueError("report_loss: no target is left: every one is -100")
