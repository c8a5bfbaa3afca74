"""The losses against loops written from the equations, in float64, and against closed forms
(temperatures near 0.5: at 0.07 that of DID is about 1e-6, and pins nothing)."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import did_loss, own_report_nearest, report_loss, vse_loss

T = 0.5


def rows(B=5, D=7, seed=0, dtype=torch.float64):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return (
        sum(x * y for x, y in zip(a, b))
        / math.sqrt(sum(x * x for x in a))
        / math.sqrt(sum(y * y for y in b))
    )


def vse_by_hand(z, t, with_self=False):
    """Eq. 3 with A1 and A2, term by term."""
    total = 0.0
    for i, a in enumerate(z):
        others = [math.exp(cosine(a, b) / t) for j, b in enumerate(z) if with_self or j != i]
        total += -math.log(math.exp(cosine(a, a) / t) / sum(others))
    return total / len(z)


def did_by_hand(image, text, t):
    """Eq. 4 to 6, term by term."""
    v2t = t2v = 0.0
    for i in range(len(image)):
        own = math.exp(cosine(image[i], text[i]) / t)
        v2t -= math.log(
            own / sum(math.exp(cosine(image[i], text[j]) / t) for j in range(len(image)))
        )
        t2v -= math.log(
            own / sum(math.exp(cosine(image[j], text[i]) / t) for j in range(len(image)))
        )
    return (v2t + t2v) / 2 / len(image)


@pytest.mark.parametrize("t", [0.07, T, 2.0])
@pytest.mark.parametrize("B", [2, 3, 16])
def test_vse_equals_eq3(B, t):
    z = rows(B)
    for with_self in (False, True):
        assert vse_loss(z, t, with_self).item() == pytest.approx(
            vse_by_hand(z.tolist(), t, with_self), abs=1e-10
        )


@pytest.mark.parametrize("B", [2, 5, 16])
def test_vse_closed_forms(B):
    same, apart = torch.ones(B, 20, dtype=torch.float64), torch.eye(B, 20, dtype=torch.float64)
    assert vse_loss(same, T).item() == pytest.approx(math.log(B - 1), abs=1e-12)
    assert vse_loss(apart, T).item() == pytest.approx(math.log(B - 1) - 1 / T, abs=1e-12)
    assert vse_loss(same, T, True).item() == pytest.approx(math.log(B), abs=1e-12)
    assert vse_loss(apart, T, True).item() == pytest.approx(
        math.log(1 + (B - 1) * math.exp(-1 / T)), abs=1e-12
    )
    simplex = apart - torch.eye(B, 20, dtype=torch.float64).mean(dim=0)
    assert vse_loss(simplex, T).item() == pytest.approx(
        math.log(B - 1) - (1 + 1 / (B - 1)) / T, abs=1e-12
    )


def test_vse_only_pushes_apart():
    """A2: its gradient on a pair of rows points away from each other, and none lies along the
    row itself."""
    z = F.normalize(rows(2), dim=1).requires_grad_()
    vse_loss(z, T).backward()
    first, second = z.detach()
    assert (-z.grad[0]) @ (second - first) < 0
    assert torch.allclose(
        (z.grad * z.detach()).sum(dim=1), torch.zeros(2, dtype=torch.float64), atol=1e-12
    )


@pytest.mark.parametrize("t", [0.07, T, 2.0])
@pytest.mark.parametrize("B", [2, 3, 16])
def test_did_equals_eq4_to_6(B, t):
    image, text = rows(B), rows(B, seed=1)
    assert did_loss(image, text, t).item() == pytest.approx(
        did_by_hand(image.tolist(), text.tolist(), t), abs=1e-10
    )


@pytest.mark.parametrize("B", [2, 5, 16])
def test_did_closed_forms(B):
    same, apart = torch.ones(B, 20, dtype=torch.float64), torch.eye(B, 20, dtype=torch.float64)
    assert did_loss(same, same, T).item() == pytest.approx(math.log(B), abs=1e-12)
    assert did_loss(apart, apart, T).item() == pytest.approx(
        math.log(1 + (B - 1) * math.exp(-1 / T)), abs=1e-12
    )


def test_did_has_both_directions():
    """One image equal to every text: the two directions of Eq. 6 differ, and the loss is their
    mean."""
    image, text = torch.eye(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    text[1, 0] = 3.0
    similarity = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / T
    own = torch.arange(3)
    v2t, t2v = F.cross_entropy(similarity, own), F.cross_entropy(similarity.T, own)
    assert abs(v2t - t2v) > 0.01
    assert did_loss(image, text, T).item() == pytest.approx(((v2t + t2v) / 2).item(), abs=1e-12)
    assert did_loss(image, text, T).item() == pytest.approx(
        did_loss(text, image, T).item(), abs=1e-12
    )


def test_contrastive_losses_ignore_order_and_scale():
    image, text = rows(6), rows(6, seed=1)
    order, scale = (
        torch.tensor([3, 1, 5, 0, 2, 4]),
        torch.linspace(0.1, 30, 6, dtype=torch.float64)[:, None],
    )
    for loss in (lambda a, b: vse_loss(a, T), lambda a, b: did_loss(a, b, T)):
        assert loss(image[order], text[order]).item() == pytest.approx(
            loss(image, text).item(), abs=1e-12
        )
        assert loss(image * scale, text * scale.flip(0)).item() == pytest.approx(
            loss(image, text).item(), abs=1e-12
        )
    assert did_loss(image[order], text, T).item() != pytest.approx(
        did_loss(image, text, T).item(), abs=1e-3
    )


def test_losses_gradcheck():
    image, text = rows(4, 3).requires_grad_(), rows(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: vse_loss(z, T), image)
    assert torch.autograd.gradcheck(lambda z: vse_loss(z, T, True), image)
    assert torch.autograd.gradcheck(lambda a, b: did_loss(a, b, T), (image, text))
    targets = torch.tensor([0, 2, -100, 1])
    assert torch.autograd.gradcheck(lambda x: report_loss(x, targets), image)


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
    """Eq. 2 with A10: the mean over the report tokens of the whole batch, not the mean of the
    studies' means."""
    logits = rows(2 * 5, 9).view(2, 5, 9)
    targets = torch.tensor([[3, 0, 8, 1, 4], [2, -100, -100, -100, -100]])
    by_hand = [
        -math.log(math.exp(logits[i, j, k]) / sum(math.exp(x) for x in logits[i, j].tolist()))
        for i, row in enumerate(targets.tolist())
        for j, k in enumerate(row)
        if k != -100
    ]
    assert report_loss(logits, targets).item() == pytest.approx(sum(by_hand) / 6, abs=1e-12)
    logits.requires_grad_()
    report_loss(logits, targets).backward()
    assert logits.grad[1, 1:].abs().max() == 0 and logits.grad[1, 0].abs().max() > 0


def test_report_closed_form():
    assert report_loss(torch.zeros(3, 11), torch.tensor([0, 5, 10])).item() == pytest.approx(
        math.log(11), abs=1e-6
    )


def test_report_loss_reads_no_values_off_a_cpu():
    """A GPU would have to be waited for; these tensors have no values to read."""
    with FakeTensorMode():
        logits, targets = torch.zeros(3, 11, device="cuda"), torch.zeros(
            3, dtype=torch.long, device="cuda"
        )
        assert report_loss(logits, targets).shape == ()


@pytest.mark.parametrize("call, words", [
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
def test_losses_refuse(call, words):
    with pytest.raises(ValueError, match=words):
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
