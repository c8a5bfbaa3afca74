"""The losses against loops written from the equations, in float64, and against closed forms
(temperatures near 0.5: at 0.07 that of DID is about 1e-6, and pins nothing)."""
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from losses import did_loss, own_report_nearest, report_loss, vse_loss

T = 0.5


def rows(B=5, D=7, seed=0, dtype=torch.float64):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("z", [rows(), torch.ones(5, 7), torch.eye(5, 7)],
                         ids=["any rows", "equal rows", "orthonormal rows"])
def test_eq3_as_printed_is_infinite(z):
    """A1: with S_ii = -inf in the numerator, too, Eq. 3 is infinite whatever the encoder does."""
    S = z @ z.T / T
    S.fill_diagonal_(-torch.inf)
    printed = -(S.diagonal().exp() / S.exp().sum(dim=1)).log().mean()
    assert printed == torch.inf
    assert vse_loss(z, T).isfinite()


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def vse_by_hand(z, t, with_self=False):
    """Eq. 3 with A1 and A2, term by term."""
    total = 0.0
    for i, a in enumerate(z):
        others = [math.exp(cosine(a, b) / t) for j, b in enumerate(z) if with_self or j != i]
        total += -math.log(math.exp(cosine(a, a) / t) / sum(others))
    return total / len(z)


def did_by_hand(image, text, t):
    """Eq. 4 to 6, term by term."""
    B, v2t, t2v = len(image), 0.0, 0.0
    for i in range(B):
        own = math.exp(cosine(image[i], text[i]) / t)
        v2t -= math.log(own / sum(math.exp(cosine(image[i], text[j]) / t) for j in range(B)))
        t2v -= math.log(own / sum(math.exp(cosine(image[j], text[i]) / t) for j in range(B)))
    return (v2t + t2v) / 2 / B


def near(value):
    return pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("t", [0.07, T, 2.0])
@pytest.mark.parametrize("B", [2, 3, 16])
def test_vse_equals_eq3(B, t):
    z = rows(B)
    for with_self in (False, True):
        assert vse_loss(z, t, with_self).item() == near(vse_by_hand(z.tolist(), t, with_self))


@pytest.mark.parametrize("B", [2, 5, 16])
def test_vse_closed_forms(B):
    same, apart = torch.ones(B, 20, dtype=torch.float64), torch.eye(B, 20, dtype=torch.float64)
    simplex = apart - apart.mean(dim=0)
    assert vse_loss(same, T).item() == near(math.log(B - 1))
    assert vse_loss(apart, T).item() == near(math.log(B - 1) - 1 / T)
    assert vse_loss(simplex, T).item() == near(math.log(B - 1) - (1 + 1 / (B - 1)) / T)
    assert vse_loss(same, T, True).item() == near(math.log(B))
    assert vse_loss(apart, T, True).item() == near(math.log(1 + (B - 1) * math.exp(-1 / T)))


def test_vse_only_pushes_apart():
    """A2: its gradient on a pair of rows points away from each other, none along the row itself."""
    z = F.normalize(rows(2), dim=1).requires_grad_()
    vse_loss(z, T).backward()
    first, second = z.detach()
    assert -z.grad[0] @ (second - first) < 0
    assert (z.grad * z.detach()).sum(dim=1).abs().max() < 1e-12


@pytest.mark.parametrize("t", [0.07, T, 2.0])
@pytest.mark.parametrize("B", [2, 3, 16])
def test_did_equals_eq4_to_6(B, t):
    image, text = rows(B), rows(B, seed=1)
    by_hand = did_by_hand(image.tolist(), text.tolist(), t)
    assert did_loss(image, text, t).item() == near(by_hand)


@pytest.mark.parametrize("B", [2, 5, 16])
def test_did_closed_forms(B):
    same, apart = torch.ones(B, 20, dtype=torch.float64), torch.eye(B, 20, dtype=torch.float64)
    assert did_loss(same, same, T).item() == near(math.log(B))
    assert did_loss(apart, apart, T).item() == near(math.log(1 + (B - 1) * math.exp(-1 / T)))


def test_did_has_both_directions():
    """Where the two directions of Eq. 6 differ, the loss is their mean."""
    image, text = torch.eye(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    text[1, 0] = 3.0
    similarity = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / T
    own = torch.arange(3)
    v2t, t2v = F.cross_entropy(similarity, own), F.cross_entropy(similarity.T, own)
    assert abs(v2t - t2v) > 0.01
    assert did_loss(image, text, T).item() == near((v2t + t2v).item() / 2)
    assert did_loss(image, text, T).item() == near(did_loss(text, image, T).item())


def test_contrastive_losses_ignore_order_and_scale():
    image, text, order = rows(6), rows(6, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    scale = torch.linspace(0.1, 30, 6, dtype=torch.float64)[:, None]
    for loss in (lambda a, b: vse_loss(a, T), lambda a, b: did_loss(a, b, T)):
        value = near(loss(image, text).item())
        assert loss(image[order], text[order]).item() == value
        assert loss(image * scale, text * scale.flip(0)).item() == value
    paired_wrongly = did_loss(image[order], text, T)
    assert abs(paired_wrongly - did_loss(image, text, T)) > 1e-3


def differences(loss, x, step=1e-6):
    """The gradient of loss(x) by central differences; torch's own check imports for a second."""
    found = torch.zeros(x.numel(), dtype=x.dtype)
    for i in range(x.numel()):
        change = torch.zeros_like(x).view(-1)
        change[i] = step
        change = change.view_as(x)
        found[i] = (loss(x + change) - loss(x - change)) / (2 * step)
    return found.view_as(x)


def test_losses_gradcheck():
    image, text, targets = rows(4, 3), rows(4, 3, seed=1), torch.tensor([0, 2, -100, 1])
    for loss in (lambda x: vse_loss(x, T), lambda x: vse_loss(x, T, True),
                 lambda x: did_loss(x, text, T), lambda x: did_loss(text, x, T),
                 lambda x: report_loss(x, targets)):
        x = image.clone().requires_grad_()
        loss(x).backward()
        assert torch.allclose(x.grad, differences(loss, image), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_in_half_precision_and_under_autocast(dtype):
    image, text, t = rows(16, 64, dtype=dtype), rows(16, 64, seed=1, dtype=dtype), 0.01
    targets = torch.arange(16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = [vse_loss(image, t), did_loss(image, text, t), report_loss(image * 100, targets)]
    exact = [vse_loss(image.double(), t), did_loss(image.double(), text.double(), t),
             report_loss((image * 100).double(), targets)]
    for value, reference in zip(ours, exact):
        assert value.dtype == torch.float32 and reference.dtype == torch.float64
        assert value.item() == pytest.approx(reference.item(), rel=1e-4)


def test_report_equals_eq2():
    """Eq. 2 with A10: the mean over the report tokens of the batch, not of the studies' means."""
    logits = rows(2 * 5, 9).view(2, 5, 9)
    targets = torch.tensor([[3, 0, 8, 1, 4], [2, -100, -100, -100, -100]])
    total = 0.0
    for i, j in [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]:
        exponentials = [math.exp(x) for x in logits[i, j].tolist()]
        total -= math.log(exponentials[targets[i, j]] / sum(exponentials))
    logits.requires_grad_()
    loss = report_loss(logits, targets)
    loss.backward()
    assert loss.item() == near(total / 6)
    assert logits.grad[1, 1:].abs().max() == 0 and logits.grad[1, 0].abs().max() > 0


def test_report_closed_form():
    loss = report_loss(torch.zeros(3, 11, dtype=torch.float64), torch.tensor([0, 5, 10]))
    assert loss.item() == near(math.log(11))


def test_report_loss_reads_no_values_off_a_cpu(monkeypatch):
    """A GPU would have to be waited for; tensors of meta have no values to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no meta
    monkeypatch.setattr(F, "cross_entropy", lambda *_, **__: "the library's")
    targets = torch.zeros(3, dtype=torch.long, device="meta")
    assert report_loss(torch.zeros(3, 11, device="meta"), targets) == "the library's"


@pytest.mark.parametrize("call, word", [
    (lambda: vse_loss(rows(1), T), "B >= 2"),
    (lambda: vse_loss(rows(4)[0], T), r"\(B, D\)"),
    (lambda: vse_loss(rows(4), 0.0), "temperature"),
    (lambda: vse_loss(rows(4), float("nan")), "temperature"),
    (lambda: vse_loss(rows(4).long(), T), "int64"),
    (lambda: did_loss(rows(4), rows(4), -1.0), "temperature"),
    (lambda: did_loss(rows(4), rows(3), T), "same"),
    (lambda: did_loss(rows(4, 7), rows(4, 8), T), "same"),
    (lambda: did_loss(rows(1), rows(1), T), "B >= 2"),
    (lambda: report_loss(rows(4), torch.full((4,), -100)), "no target"),
    (lambda: report_loss(rows(4), torch.zeros(5, dtype=torch.long)), "expected"),
    (lambda: report_loss(rows(4), torch.tensor([0, 1, 2, 7])), "7 is no id"),
    (lambda: report_loss(rows(4), torch.tensor([0, 1, 2, -1])), "-1 is no id"),
    (lambda: report_loss(rows(4), torch.zeros(4)), "token ids"),
])
def test_losses_refuse(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_own_report_nearest_asks_each_image():
    """By cosine, of the longest rows too; and it is not the same when the reports ask."""
    image, text = rows(16, seed=1), rows(16, seed=1) + rows(16, seed=2)
    text = text * torch.arange(1, 17)[:, None]
    by_image, by_text = [], []
    for i in range(16):
        here = [cosine(image[i], text[j]).item() for j in range(16)]
        there = [cosine(image[j], text[i]).item() for j in range(16)]
        by_image.append(max(range(16), key=here.__getitem__) == i)
        by_text.append(max(range(16), key=there.__getitem__) == i)
    assert own_report_nearest(image, text).tolist() == by_image != by_text
    assert True in by_image and False in by_image  # else the test would say little
