"""Every loss: computed by hand, and against its formula written again, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from newsbert_ray.config import LossWeights
from newsbert_ray.data.batches import Bucket
from newsbert_ray.distill import losses
from newsbert_ray.model.encoder import Projections


def whole(rows: int, tokens: int) -> Bucket:
    """A bucket without padding."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return Bucket(ids, torch.ones_like(ids))


def test_cross_entropy_by_hand() -> None:
    """The sum over a part is divided by the titles of the whole update, not of the part."""
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = losses.cross_entropy(logits, torch.tensor([1, 0]), rows=4)
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2.0)) / 4)


def test_cross_entropy_leaves_out_texts_without_a_label() -> None:
    """They count neither above nor below the line, and get no gradient."""
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, -2.0], [0.0, 0.0]], requires_grad=True)
    found = losses.cross_entropy(logits, torch.tensor([1, -1, 0]), rows=2)
    assert found.item() == pytest.approx((math.log(4 / 3) + math.log(2.0)) / 2)
    found.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[1].tolist() == [0.0, 0.0]
    none = losses.cross_entropy(logits, torch.tensor([-1, -1, -1]), rows=2)
    assert none.item() == 0.0


def test_soft_labels_by_hand() -> None:
    """Eq. 3 is a cross-entropy of tempered predictions, without Hinton's t squared."""
    teacher = torch.tensor([[2.0 * math.log(3.0), 0.0]])
    student = torch.tensor([[0.0, 0.0]])
    found = losses.soft_label_loss(student, teacher, temperature=2.0, rows=1)
    assert found.item() == pytest.approx(math.log(2.0))
    student = torch.tensor([[0.0, 2.0 * math.log(4.0)]])  # tempered: 1/5, 4/5; the teacher's: 3/4, 1/4
    by_hand = -(0.75 * math.log(0.2) + 0.25 * math.log(0.8))
    assert losses.soft_label_loss(student, teacher, temperature=2.0, rows=1).item() == pytest.approx(by_hand)
    assert losses.soft_label_loss(student, teacher, temperature=2.0, rows=1, t2=True).item() == pytest.approx(
        4 * by_hand
    )


def test_soft_labels_are_kl_and_entropy() -> None:
    """The loss equals KL(teacher || student) plus the teacher's entropy."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, log_q = torch.softmax(teacher / 3, -1), torch.log_softmax(student / 3, -1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="sum")
    entropy = -(p * p.log()).sum()
    found = losses.soft_label_loss(student, teacher, temperature=3.0, rows=5)
    assert found.item() == pytest.approx(float(kl + entropy) / 5, abs=1e-12)


def test_token_mse_by_hand_counts_real_tokens_only() -> None:
    """Padding must neither add error nor dilute it (the paper does not define it)."""
    student = torch.tensor([[[1.0, 2.0], [5.0, 5.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]])
    bucket = Bucket(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]))
    found = losses.token_mse(student, teacher, bucket, tokens=2)
    assert found.item() == pytest.approx((1 + 4 + 0 + 1) / (2 * 2))


def test_a_text_counts_as_often_as_it_is_used() -> None:
    """Encoding a news once for three mentions must give the loss of three encodings."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    once = Bucket(torch.zeros_like(mask), mask, torch.tensor([3.0, 1.0]))
    rows = torch.tensor([0, 0, 0, 1])
    each = Bucket(torch.zeros_like(mask[rows]), mask[rows])
    found = losses.token_mse(student, teacher, once, tokens=9)
    torch.testing.assert_close(found, losses.token_mse(student[rows], teacher[rows], each, tokens=9))
    s, t = student[:, 0], teacher[:, 0]
    together = losses.vector_mse(s, t, rows=4, uses=losses.uses_of([once]))
    torch.testing.assert_close(together, losses.vector_mse(s[rows], t[rows], rows=4))
    mixed = losses.uses_of([each, once])
    assert mixed is not None
    assert mixed.tolist() == [1, 1, 1, 1, 3, 1]
    assert losses.uses_of([each]) is None


def test_hidden_loss_takes_the_blocks_last_layers() -> None:
    """Student layer i is matched to teacher layer iK, not to its neighbours and not to the embeddings."""
    teacher = [torch.full((1, 1, 1), float(i)) for i in range(5)]  # embeddings 0, layers 1 to 4
    student = [torch.zeros(1, 1, 1) for _ in range(3)]  # K = 2: layers 2 and 4
    found = losses.hidden_loss([student], [teacher], [whole(1, 1)], tokens=1)
    assert found.item() == pytest.approx(2.0**2 + 4.0**2)


def test_matched_layers_by_hand() -> None:
    """Blocks of K end at iK; of a teacher's last layers each is compared with one."""
    assert [losses.matched_layer(i, 2, 6) for i in (1, 2)] == [3, 6]
    assert [losses.matched_layer(i, 2, 6, last=True) for i in (1, 2)] == [5, 6]


def test_news_embedding_loss_is_mse() -> None:
    """Eq. 2 against torch's own mean squared error."""
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    found = losses.vector_mse(student, teacher, rows=6)
    assert found.item() == pytest.approx(torch.nn.functional.mse_loss(student, teacher).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["token_mse", "news_embedding", "soft_labels"])
def test_teacher_is_a_constant(name: str) -> None:
    """A distillation loss with a gradient for the teacher would pull it towards the student."""
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, requires_grad=True)
    if name == "token_mse":
        loss = losses.token_mse(student, teacher, whole(2, 3), tokens=6)
    elif name == "news_embedding":
        loss = losses.vector_mse(student[0], teacher[0], rows=3)
    else:
        loss = losses.soft_label_loss(student[0], teacher[0], temperature=2.0, rows=3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    assert student.grad is not None


def test_total_weights_each_loss() -> None:
    """Each loss has its own weight, 1 in the paper."""
    parts = {name: torch.tensor(float(2**i)) for i, name in enumerate(LossWeights.model_fields)}
    assert losses.weighted_total(parts, LossWeights()).item() == 127.0
    weights = LossWeights(teacher_task=0.5, hidden=3.0)
    assert losses.weighted_total(parts, weights).item() == 0.5 + 2 + 4 + 24 + 16 + 32 + 64


LENGTHS, USES = (3, 5, 1), (2, 1, 4)
"""Of three texts: real tokens, and mentions."""
HEADS, WIDTH = 2, 6


@pytest.fixture
def bucket() -> Bucket:
    """Three texts of different lengths, mentioned 2, 1 and 4 times."""
    mask = (torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]).long()
    return Bucket(torch.zeros_like(mask), mask, torch.tensor(USES, dtype=torch.float32))


def states(seed: int, layers: int) -> list[Tensor]:
    """Hidden states of three texts, embeddings first, random values in the padding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, WIDTH, generator=generator) for _ in range(layers + 1)]


def projections(seed: int, layers: int, size: int = 3) -> list[Projections]:
    """Queries, keys and values of three texts."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Projections(*(torch.randn(3, HEADS, 5, size, generator=generator) for _ in range(3)))
        for _ in range(layers)
    ]


def mean_over_mentions(each: list[float]) -> float:
    """Mean over mentions of one number per text."""
    return sum(u * value for u, value in zip(USES, each, strict=True)) / sum(USES)


def test_divergence_by_hand() -> None:
    """KL is the cross-entropy minus the teacher's entropy: 0 for equal predictions."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = losses.soft_label_loss(student, teacher, temperature=1.0, rows=1, kl=True)
    assert found.item() == pytest.approx(by_hand)
    same = losses.soft_label_loss(teacher, teacher, temperature=2.0, rows=1, kl=True)
    assert same.item() == pytest.approx(0.0, abs=1e-7)


def test_divergence_has_the_cross_entropys_gradient() -> None:
    """Subtracting the teacher's entropy must not change the student's gradient."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 3)
    found = []
    for kl in (False, True):
        student = torch.zeros(4, 3, requires_grad=True)
        losses.soft_label_loss(student, teacher, temperature=2.0, rows=4, kl=kl).backward()  # type: ignore[no-untyped-call]
        found.append(student.grad)
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(found[0], found[1])


def test_logits_by_hand() -> None:
    """The mean is over examples of the whole update and over topics."""
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert losses.logit_mse(student, teacher, rows=2).item() == pytest.approx((1 + 4) / (2 * 2))


def test_first_token_by_hand() -> None:
    """States are normalised, and the last layer is not compared."""
    own = [torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.full((1, 2, 2), 7.0)]
    other = [torch.zeros(1, 2, 2), torch.tensor([[[0.0, 2.0], [1.0, 1.0]]]), torch.full((1, 2, 2), 5.0)]
    whole = Bucket(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    found = losses.cls_loss([own], [other], [whole], rows=1)
    assert found.item() == pytest.approx((0.6**2 + 0.2**2) / 2)
    assert losses.cls_loss([own[:2]], [other[:2]], [whole], rows=1).item() == 0.0


def test_first_token_against_its_formula(bucket: Bucket) -> None:
    """PKD-skip: layers i and iK, a mean over texts' mentions, layers and width."""
    own, other = states(1, 3), states(2, 6)
    each = []
    for text in range(3):
        parts = []
        for i in (1, 2):
            a, b = own[i][text, 0], other[2 * i][text, 0]
            parts.append(float(((a / a.norm() - b / b.norm()) ** 2).mean()))
        each.append(sum(parts) / 2)
    found = losses.cls_loss([own], [other], [bucket], rows=sum(USES))
    assert found.item() == pytest.approx(mean_over_mentions(each), rel=1e-5)


def test_cosine_by_hand() -> None:
    """Orthogonal states have distance 1, and padding does not count."""
    own = [torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])]
    other = [torch.zeros(1, 2, 2), torch.tensor([[[0.0, 5.0], [7.0, 0.0]]])]
    masked = Bucket(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, 0]]))
    assert losses.cosine_loss([own], [other], [masked], tokens=1).item() == pytest.approx(1.0)


def test_cosine_against_its_formula(bucket: Bucket) -> None:
    """The last layers' states, a mean over the real tokens of all mentions."""
    own, other = states(3, 1), states(4, 2)
    total = 0.0
    for text, (length, uses) in enumerate(zip(LENGTHS, USES, strict=True)):
        for token in range(length):
            a, b = own[-1][text, token], other[-1][text, token]
            total += uses * (1 - float(a @ b / (a.norm() * b.norm())))
    tokens = sum(n * u for n, u in zip(LENGTHS, USES, strict=True))
    found = losses.cosine_loss([own], [other], [bucket], tokens=tokens)
    assert found.item() == pytest.approx(total / tokens, rel=1e-5)


def test_attention_scores_by_hand() -> None:
    """Scores are divided by the square root of the head width, before the softmax."""
    one = torch.tensor([[[[1.0, 1.0, 1.0, 1.0]]]])  # one text, head and token, 4 wide
    own, other = Projections(one, 2 * one, one), Projections(one, 5 * one, one)
    whole = Bucket(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
    found = losses.attention_score_loss([[own]], [[other]], [whole], rows=1)
    assert found.item() == pytest.approx((8 / 2 - 20 / 2) ** 2)


def test_attention_scores_against_their_formula(bucket: Bucket) -> None:
    """TinyBERT's Eq. 7 over pairs of real tokens, layers i and iK; a student's heads may be narrower."""
    own, other = projections(5, 2), projections(6, 4, size=4)
    each = []
    for text, length in enumerate(LENGTHS):
        total = 0.0
        for i in (1, 2):
            a, b = own[i - 1], other[2 * i - 1]
            for head in range(HEADS):
                for row in range(length):
                    for column in range(length):
                        mine = float(a.query[text, head, row] @ a.key[text, head, column]) / math.sqrt(3)
                        theirs = float(b.query[text, head, row] @ b.key[text, head, column]) / math.sqrt(4)
                        total += (mine - theirs) ** 2 / (HEADS * length**2)
        each.append(total)
    found = losses.attention_score_loss([own], [other], [bucket], rows=sum(USES))
    assert found.item() == pytest.approx(mean_over_mentions(each), rel=1e-4)


def test_relations_by_hand() -> None:
    """Two keys that the teacher distinguishes and the student does not."""
    query = torch.tensor([[[[1.0], [1.0]]]])
    own = losses.relation(query, torch.zeros(1, 1, 2, 1))
    other = losses.relation(query, torch.tensor([[[[math.log(3.0)], [0.0]]]]))
    whole = Bucket(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert losses.relation_kl([own], [other], [whole], rows=1).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("parts", [("query", "key"), ("value", "value")])
def test_relations_against_their_formula(bucket: Bucket, parts: tuple[str, str]) -> None:
    """MiniLM's Eqs. 4-8: the divergence of each real token's row, over real keys, a mean over heads."""
    own, other = projections(7, 1)[0], projections(8, 1, size=4)[0]
    each = []
    for text, length in enumerate(LENGTHS):
        total = 0.0
        for head in range(HEADS):
            for row in range(length):
                rows = []
                for model in (other, own):
                    left, right = (getattr(model, part)[text, head] for part in parts)
                    rows.append(torch.softmax(right[:length] @ left[row] / math.sqrt(left.shape[-1]), 0))
                total += float((rows[0] * (rows[0] / rows[1]).log()).sum()) / (HEADS * length)
        each.append(total)
    scores = [losses.relation(*(getattr(model, part) for part in parts)) for model in (own, other)]
    found = losses.relation_kl([scores[0]], [scores[1]], [bucket], rows=sum(USES))
    assert found.item() == pytest.approx(mean_over_mentions(each), rel=1e-4)
