"""Train several score heads on one backbone: each learns from its own part of the pairs, so they can disagree.

Every pair is dealt to half of the heads. Half of the data without replacement lets estimates vary as much as a
bootstrap sample of all of it, and every batch has as many terms as any other.

Source: Buhlmann & Yu 2002, "Analyzing bagging", Annals of Statistics 30(4), section 3 (half-sampling).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COLUMN = "heads"


class DealtPairs:
    """Collate pairs as another collator does, and add the heads that learn from each pair, `(B, M)`.

    The heads of a pair depend on its tokens and the seed alone: in each epoch, on each rank and after a resume they
    are the same.

    Args:
        collator: Collator of pairs with `chosen_ids` and `rejected_ids`.
        count: Number of heads, K. A pair is dealt to M = K/2 of them, rounded up.
        seed: Seed.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]], count: int, seed: int) -> None:
        self.collator, self.count, self.seed = collator, count, seed

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other collator with the column `heads`."""
        heads = [self.heads(example) for example in examples]
        return self.collator(examples) | {COLUMN: torch.tensor(heads)}

    def heads(self, example: dict[str, Any]) -> list[int]:
        """Return the heads of a pair."""
        drawn = random.Random(f"{self.seed} {list(example['chosen_ids'])} {list(example['rejected_ids'])}")
        return sorted(drawn.sample(range(self.count), -(-self.count // 2)))


class HeadsAsPairs:
    """Stand in front of a reward model with K heads, so that TRL's loss sees each pair once per head that learns it.

    TRL's mean over these terms is the mean of the losses of the heads.

    Args:
        model: Reward model.
        heads: Heads of each pair, `(B, M)`.
    """

    outputs: Any  # of the latest call, with all heads

    def __init__(self, model: Callable[..., Any], heads: Tensor) -> None:
        self.model, self.heads = model, heads

    def __call__(self, **inputs: Any) -> Any:
        """Return the output of the model with the logits of the dealt pairs, `(2 B M, 1)`: chosen, then rejected."""
        self.outputs = self.model(**inputs)
        of_both = [scores.gather(1, self.heads).flatten() for scores in self.outputs.logits.chunk(2)]
        return type(self.outputs)(logits=torch.cat(of_both).unsqueeze(1))

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of a model, with one margin per term, `(B M,)`, if the pairs have margins, `(B,)`."""
        own = {name: value for name, value in inputs.items() if name != COLUMN}
        return own | {name: own[name].repeat_interleave(self.heads.size(1)) for name in ("margin",) if name in own}
