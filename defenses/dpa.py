"""Deep partition aggregation: many victims on disjoint parts of the set, and a vote that is certified.

Every image goes to one of k parts by a hash of its content and label. A victim is trained on each
part, and the class with most votes wins, ties going to the smaller class. One image added or removed
changes one part and so one vote; with `n_c` votes for class c and t the winner, the answer cannot
change by

    ⌊(n_t - max over c ≠ t of (n_c + 1[c < t])) / 2⌋

additions and removals. An image replaced by another is one of each.

Paper: Levine and Feizi, "Deep Partition Aggregation: Provable Defense against General Poisoning
Attacks", ICLR 2021, https://arxiv.org/abs/2006.14768: at least half of the CIFAR-10 test set certified
against nine insertions, with 250 parts.

What is left open, and how it is settled here: a part is brought to a size that is a power of two by
repeating its own images in order of hash, so that a few programs train them all; neither its size nor
anything else of it depends on another part, which is all that the certificate asks for. Labels are part
of the hash, so a flip may change two parts; without them it would change one, but the certificate counts
a replacement as two in either case. What other defences do in a step, as mixup, the victims on the parts
meet too: it draws on nothing but their own part.

Cost: 1.5 victim trainings on `digits`, and 2.4 with k of 30: one to two in images, in k small ones,
which are slower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray, UInt8

from poisonbench._files import content_hash
from poisonbench.defenses import Defense, Predict, Predictions, View
from poisonbench.errors import UserError
from poisonbench.trained import TrainedVictim


@dataclass(frozen=True)
class DPA(Defense):
    """Deep partition aggregation.

    Attributes:
        k: parts.
    """

    k: int = 10

    def __post_init__(self) -> None:
        if self.k < 2:
            raise UserError("dpa.k must be at least 2")

    def train(self, view: View, key: PRNGKeyArray) -> Predict:
        """The vote of victims on the parts: what it says, and for how many changes that is certain."""
        victims = []
        for part, rows in enumerate(parts(view.images, view.labels, self.k)):
            if not len(rows):
                continue
            size = max(4, 1 << (len(rows) - 1).bit_length())
            own = np.resize(rows, size)  # repeated as often as it takes
            recipe = view.recipe.replace(batch_size=min(view.recipe.batch_size, size // 2))
            own_key = jax.random.fold_in(key, part)
            victim = TrainedVictim.on(
                view.images[own], view.labels[own], view.num_classes, recipe, own_key, guard=view.guard
            )
            # There may be many: what they trained with is not kept.
            victims.append(replace(victim, state=replace(victim.state, optimizer=None)))

        def vote(images: UInt8[np.ndarray, "m h w c"]) -> Predictions:
            votes = np.zeros((len(images), view.num_classes), int)
            for victim in victims:
                votes[np.arange(len(images)), victim.classes(images)] += 1
            return counted(votes)

        return vote


def parts(
    images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"], k: int
) -> list[Int[np.ndarray, " rows"]]:
    """The rows of each part, in order of hash: where an image goes depends on nothing but itself."""
    hashes = [
        int(content_hash(image, np.array([label], np.int64)), 16)
        for image, label in zip(images, labels, strict=True)
    ]
    order = sorted(range(len(hashes)), key=lambda i: hashes[i])
    return [np.array([i for i in order if hashes[i] % k == part], np.int64) for part in range(k)]


def counted(votes: Int[np.ndarray, "m classes"]) -> Predictions:
    """Winners, and what it would take to change them."""
    winners = votes.argmax(1)  # the smaller class of equal ones
    rows = np.arange(len(votes))
    rivals = votes + (np.arange(votes.shape[1])[None] < winners[:, None])
    rivals[rows, winners] = -1
    certified = (votes[rows, winners] - rivals.max(1)) // 2
    return Predictions(winners, certified)
